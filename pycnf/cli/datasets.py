"""``pycnf data list`` and ``pycnf data fetch``."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from pycnf import images
from pycnf.cli import options as o
from pycnf.cli.tables import console, data_table
from pycnf.data import describe, fetch, names
from pycnf.records import to_plain

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="List and download data sets.")


@data_app.command("list")
def list_data(data_dir: o.DataDir = None, as_json: o.Json = False) -> None:
    """List the data sets that go by a name, and where they are.

    For example: `pycnf data list --data-dir ~/data`
    """
    rows: list[dict[str, Any]] = []
    found_sets = [describe(name, data_dir) for name in names()]
    found_sets += [images.describe(name, data_dir) for name in images.SOURCES]
    for found in found_sets:
        missing = f"no: pycnf data fetch {found.name}" if found.fetchable else "no"
        where = (str(found.path) if found.path else "yes") if found.present else missing
        rows.append(to_plain(dataclasses.asdict(found)) | {"where": where})
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
    else:
        console().print(data_table(rows))


@data_app.command("fetch")
def fetch_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the set, see `pycnf data list`.")],
    data_dir: o.DataDir = None,
    quiet: o.Quiet = False,
) -> None:
    """Download a benchmark table or a set of images from its public source, check it and unpack it.

    For example: `pycnf data fetch power-full`
    """
    o.say(f"Fetching {name} …", quiet=quiet)
    get = images.fetch if name in images.SOURCES else fetch
    for path in get(name, data_dir, progressbar=not quiet):
        typer.echo(str(path))
