"""``pycnf train``, and what all commands that open a run folder share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pycnf.cli import options as o
from pycnf.cli.tables import console, facts_table, run_facts
from pycnf.data import load
from pycnf.experiments import setup_for, train_and_test
from pycnf.experiments.arms import describe_tolerance
from pycnf.experiments.runs import DATA_CARD
from pycnf.flow import CNF
from pycnf.records import read_json, to_plain, write_json
from pycnf.regularizers import describe_regularizers, parse_regularizers
from pycnf.training import load_flow
from pycnf.training.options import resolve_device

RESULT = "result.json"


def train(
    data: o.Data = "power",
    regularizers: o.Regularizer = "default",
    seed: o.Seed = 0,
    data_dir: o.DataDir = None,
    config: o.Config = None,
    hidden: o.Hidden = None,
    blocks: o.Blocks = None,
    activation: o.Activation = None,
    time: o.Time = None,
    end_time: o.EndTime = None,
    divergence: o.DivergenceName = None,
    method: o.Method = None,
    rtol: o.Rtol = None,
    atol: o.Atol = None,
    test_rtol: o.TestRtol = None,
    test_atol: o.TestAtol = None,
    gradient: o.Gradient = None,
    n_steps: o.NSteps = None,
    max_nfe: o.MaxNfe = None,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    schedule: o.Schedule = None,
    optimizer: o.Optimizer = None,
    clip: o.Clip = None,
    device: o.Device = None,
    output: Annotated[
        Path | None,
        o.option("--output -o", o.OUTPUT, "Run folder. [default: runs/DATA-REGULARIZERS-seedN]", metavar="DIR"),
    ] = None,
    resume: Annotated[
        bool,
        o.option("--resume", o.OUTPUT, "Go on with the run in the output folder."),
    ] = False,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train one flow, test it, and keep everything in a run folder.

    The folder holds the configuration, the curves (metrics.csv and TensorBoard), the weights with the lowest
    held-out NLL, the state to resume from, and the result. `pycnf evaluate` and `pycnf sample` take it from
    there.

    For example:

    - `pycnf train --data power --regularizers tpr:weight=50 --output runs/first`

    - `pycnf train --data moons --max-steps 2000 --seed 1`
    """
    settings = o.settings_of(locals())
    terms = parse_regularizers(regularizers)
    name = describe_regularizers(terms)
    setup = setup_for(data, settings)
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{Path(data).stem}-{name}").strip("-")
    folder = output or Path("runs") / f"{slug}-seed{seed}"
    o.say(
        f"Training on {data}: {name}; seed {seed}; {describe_tolerance(setup)}; results go to {folder}",
        quiet=quiet,
    )
    dataset = load(data, data_dir=data_dir)
    row = train_and_test(
        dataset,
        terms,
        seed,
        setup_for(data, settings, rows=len(dataset.train)),
        folder=folder,
        resume=resume,
        overwrite=overwrite,
        progress=False if quiet else "training",
        command=o.this_command(),
        loaded_from=data,
    )
    write_json(folder / RESULT, row)
    if as_json:
        print_json(row)
        return
    out = console()
    out.print(facts_table(f"{row['data']}, {row['regularizer']}, seed {seed}", run_facts(row)))
    out.print(f"run folder: {folder}", soft_wrap=True)


def open_run(run: Path, device: str | None) -> CNF:
    """Read the flow of a run folder onto a device."""
    flow = load_flow(run)
    return flow.to(resolve_device(device or "auto"))


def data_card(run: Path) -> dict[str, Any]:
    """Return what a run folder tells of its data, nothing where it does not tell."""
    path = run / DATA_CARD
    return dict(read_json(path)) if path.is_file() else {}


def data_source(run: Path) -> str:
    """Return the name or path of the data a run was trained on.

    Raises:
        ValueError: The run does not tell.
    """
    source = data_card(run).get("load")
    if source is None:
        raise ValueError(f"{run} does not tell which data it was trained on: name them with --data")
    return str(source)


def units_of(run: Path) -> tuple[list[float], list[float]]:
    """Return shift and scale of the data that a run was trained on.

    Raises:
        ValueError: The run does not tell.
    """
    card = data_card(run)
    if not card:
        raise ValueError(f"{run} does not tell the units of its data ({DATA_CARD} is missing): ask for --standardized")
    return card["shift"], card["scale"]


def check_target(path: Path | None, suffixes: tuple[str, ...], overwrite: bool) -> str:
    """Return the suffix of a file that is to be written, if it may be.

    Raises:
        ValueError: It is another suffix, or the file is there.
    """
    if path is None:
        return ""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"expected a {' or '.join(suffixes)} file, got {path}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is already there: choose another name, or --overwrite")
    return path.suffix.lower()


def refuse(kind: str, options: Mapping[str, Any]) -> None:
    """Refuse options that say nothing to a kind of runs.

    Raises:
        ValueError: One of them is given.
    """
    for name, value in options.items():
        if value:
            raise ValueError(f"--{name.replace('_', '-')} is not for runs of kind {kind}")


def npy(values: Any, dtype: str = "float64") -> bytes:
    """Return an array as the content of a .npy file."""
    import io

    import numpy as np

    file = io.BytesIO()
    np.save(file, np.asarray(values, dtype=dtype))
    return file.getvalue()


def print_json(record: Any) -> None:
    """Write a record to stdout as one line of JSON."""
    typer.echo(json.dumps(to_plain(record), ensure_ascii=False))
