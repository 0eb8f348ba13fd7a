"""``pycnf data list`` and ``pycnf data fetch``."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from pycnf import images
from pycnf.cli import options as o
from pycnf.cli.tables import console, data_table
from pycnf.data import DataError, describe, fetch, names
from pycnf.experiments import list_presets
from pycnf.records import to_plain
from pycnf.vae.pictures import SOURCES as PICTURES
from pycnf.vae.pictures import describe_pictures

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="List and download data sets.")


@data_app.command("list")
def list_data(data_dir: o.DataDir = None, as_json: o.Json = False) -> None:
    """List the data sets that go by a name, and where they are.

    For example: `pycnf data list --data-dir ~/data`
    """
    rows: list[dict[str, Any]] = []
    found_sets = [describe(name, data_dir) for name in names()]
    found_sets += [images.describe(name, data_dir) for name in images.SOURCES]
    found_sets += [describe_pictures(name, data_dir) for name in PICTURES if name not in images.SOURCES]
    for found in found_sets:
        get = f"pycnf data fetch {found.name}" if found.fetchable else _by_hand(found.name)
        missing = f"no: {get}" if get else "no"
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
    if name in PICTURES and name not in images.SOURCES:
        raise DataError(f"{name} has no archive with a known checksum; get it by hand: {_by_hand(name)}")
    o.say(f"Fetching {name} …", quiet=quiet)
    get = images.fetch if name in images.SOURCES else fetch
    for path in get(name, data_dir, progressbar=not quiet):
        typer.echo(str(path))


def _by_hand(name: str) -> str | None:
    """Return the command that an experiment on a set names for getting it."""
    return {preset.data("paper")[0]: preset.fetch for preset in list_presets().values()}.get(name)
