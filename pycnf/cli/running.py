"""``pycnf train``, ``pycnf evaluate`` and ``pycnf sample``: one run and its flow."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time as clock
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pycnf.cli import options as o
from pycnf.cli.tables import console, facts_table, run_facts
from pycnf.data import load
from pycnf.divergence import parse_divergence
from pycnf.experiments import setup_for, train_and_test
from pycnf.experiments.arms import describe_tolerance, write_tolerance
from pycnf.experiments.runs import DATA_CARD
from pycnf.flow import CNF
from pycnf.records import read_json, run_record, to_plain, write_bytes, write_json
from pycnf.regularizers import describe_regularizers, parse_regularizers
from pycnf.rows import RowSource, Standardized, cut, open_rows
from pycnf.scale import log_prob
from pycnf.scale import sample as draw_samples
from pycnf.solve import METHODS, Solver
from pycnf.training import load_flow
from pycnf.training.evaluation import summarize
from pycnf.training.options import resolve_device

RESULT = "result.json"
ENCODED = 10_000  # samples written at once

Workers = Annotated[int, o.option("--workers", o.SOLVER, "Processes that share the work, one thread each.", min=1)]
BatchSize = Annotated[
    int,
    o.option("--batch-size", o.SOLVER, "Rows of one solve: they share its steps, and it holds them in memory.", min=1),
]
Standard = Annotated[
    bool, o.option("--standardized", o.WHAT, "The rows are in the flow's own units instead of those of the data.")
]


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


def evaluate(
    run: o.RunFolder,
    data: o.RunData = None,
    split: o.Split = "test",
    rows: Annotated[
        Path | None,
        o.option(
            "--rows",
            o.WHAT,
            "A .npy file of rows in the units of the data, in place of a data set. It is read part by part and may be "
            "larger than the memory.",
            metavar="FILE",
        ),
    ] = None,
    standardized: Standard = False,
    data_dir: o.DataDir = None,
    config: o.Config = None,
    method: Annotated[
        str | None,
        o.option("--method", o.SOLVER, "Solver method. [default: that of the run]", **o.one_of(METHODS)),
    ] = None,
    rtol: Annotated[
        float | None,
        o.option("--rtol", o.SOLVER, "Relative tolerance. [default: the run's in test]", **o.positive()),
    ] = None,
    atol: Annotated[
        float | None,
        o.option("--atol", o.SOLVER, "Absolute tolerance. [default: the run's in test]", **o.positive()),
    ] = None,
    n_steps: o.NSteps = None,
    max_nfe: o.MaxNfe = None,
    divergence: Annotated[
        str | None,
        o.option(
            "--divergence",
            o.SOLVER,
            "Divergence. [default: exact]",
            metavar="NAME",
            **o.checked(parse_divergence),
        ),
    ] = None,
    batch_size: BatchSize = 1000,
    order: Annotated[
        str,
        o.option(
            "--order",
            o.SOLVER,
            "given, or difficulty: rows of like difficulty share a solve, which pays at tight tolerances.",
            **o.one_of(("given", "difficulty")),
        ),
    ] = "given",
    workers: Workers = 1,
    device: o.Device = None,
    densities: Annotated[
        Path | None,
        o.option("--densities", o.OUTPUT, "Also write log p of every row to a .npy file.", metavar="FILE"),
    ] = None,
    output: Annotated[
        Path | None,
        o.option("--output -o", o.OUTPUT, "Also write the record to a file.", metavar="FILE"),
    ] = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compute the held-out likelihood of a trained flow, and what it costs.

    For example:

    - `pycnf evaluate runs/first`

    - `pycnf evaluate runs/first --rtol 1e-3 --atol 1e-3 --json`

    - `pycnf evaluate runs/first --rows million.npy --densities log_prob.npy --workers 2`

    Likelihoods are those of the standardized data. The density in the units of the data is log p minus the number
    that the record calls log_scale, the sum of the logarithms of the columns' scales.
    """
    _check_target(densities, (".npy",), overwrite)
    flow = open_run(run, device)
    changed = {"method": method, "rtol": rtol, "atol": atol, "n_steps": n_steps, "max_nfe": max_nfe}
    changed = {name: value for name, value in changed.items() if value is not None}
    if method is not None and METHODS[method].kind != "fixed":
        changed.setdefault("n_steps", None)
    solver = Solver(**flow.eval_solver.to_dict() | changed)
    if divergence is not None:
        flow.eval_divergence = parse_divergence(divergence)
    table, what = _rows_to_evaluate(run, rows, data, split, data_dir, standardized=standardized)
    o.say(f"Evaluating {run} on {what['title']}", quiet=quiet)
    began = clock.perf_counter()
    computed = log_prob(
        flow,
        table,
        batch_size=batch_size,
        solver=solver,
        order=order,  # type: ignore[arg-type]  # checked by the option
        workers=workers,
        progress=not quiet,
    )
    found = summarize(computed, batch_size, solver, clock.perf_counter() - began)
    if densities is not None:
        write_bytes(densities, _npy(computed.values))
    values = dataclasses.asdict(found) | {"divergence": str(flow.eval_divergence), "order": order, "workers": workers}
    record = run_record(
        device=next(flow.parameters()).device,
        command=o.this_command(),
        run=str(run),
        data=what["data"],
        split=what["split"],
        log_scale=_log_scale(run),
        **{"nfe_test" if name == "nfe" else name: value for name, value in values.items()},
    )
    if output is not None:
        write_json(output, record)
    if as_json:
        print_json(record)
        return
    facts = {
        "NLL": f"{found.nll:.4f} nats, standard error {found.nll_se:.4f} ({found.rows:,} rows)",
        "evaluations": f"{found.nfe:.1f} a batch of {found.batch_size:,}",
        "steps": f"{found.accepted:.1f} accepted, {found.rejected:.1f} rejected a batch",
        "solver": f"{found.method}, tolerance {write_tolerance(found.rtol, found.atol)}",
        "divergence": str(flow.eval_divergence),
        "time": f"{found.seconds:.1f} s",
    }
    console().print(facts_table(f"{run} on {what['title']}", facts))
    if densities is not None:
        console().print(f"log p of every row: {densities}", soft_wrap=True)


def sample(
    run: o.RunFolder,
    n: Annotated[int, o.option("--n -n", o.WHAT, "Number of samples.", min=1)] = 1000,
    seed: o.Seed = 0,
    standardized: Standard = False,
    config: o.Config = None,
    batch_size: BatchSize = 1000,
    workers: Workers = 1,
    device: o.Device = None,
    output: Annotated[
        Path,
        o.option("--output -o", o.OUTPUT, "A .csv or .npy file.", metavar="FILE"),
    ] = Path("samples.csv"),
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Draw samples from a trained flow, in the units of its data.

    For example: `pycnf sample runs/first -n 1000 --seed 1 --output samples.npy`
    """
    kind: Literal["csv", "npy"] = "npy" if _check_target(output, (".csv", ".npy"), overwrite) == ".npy" else "csv"
    flow = open_run(run, device)
    shift, scale = (0.0, 1.0) if standardized else _units(run)
    o.say(f"Sampling {n:,} rows from {run}", quiet=quiet)
    drawn = draw_samples(flow, n, seed=seed, batch_size=batch_size, workers=workers, progress=not quiet)
    columns = data_card(run).get("columns") or [f"x{i + 1}" for i in range(flow.features)]
    write_bytes(output, _encode(drawn.values, columns, kind, shift, scale))
    if as_json:
        units = "standardized" if standardized else "data"
        record: dict[str, Any] = {
            "run": str(run),
            "output": str(output),
            "n": n,
            "seed": seed,
            "columns": columns,
            "units": units,
        }
        print_json(run_record(command=o.this_command(), nfe=drawn.stats.nfe, **record))
    else:
        console().print(f"{n:,} samples of {flow.features} features: {output}", soft_wrap=True)


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


def _rows_to_evaluate(
    run: Path, rows: Path | None, data: str | None, split: str, data_dir: Path | None, *, standardized: bool
) -> tuple[RowSource, dict[str, Any]]:
    """Return the rows in the units of the flow, and what they are."""
    if rows is None:
        source = data or data_source(run)
        dataset = load(source, data_dir=data_dir)
        title = f"the {split} rows of {dataset.name}"
        return getattr(dataset, split), {"data": dataset.name, "split": split, "title": title}
    if data is not None:
        raise ValueError("--rows stands in place of --data: give one of them")
    table = open_rows(rows)
    what = {"data": str(rows), "split": "all", "title": f"the rows of {rows}"}
    return table if standardized else Standardized(table, *_units(run)), what


def _units(run: Path) -> tuple[list[float], list[float]]:
    """Return shift and scale of the data that a run was trained on."""
    card = data_card(run)
    if not card:
        raise ValueError(f"{run} does not tell the units of its data ({DATA_CARD} is missing): ask for --standardized")
    return card["shift"], card["scale"]


def _log_scale(run: Path) -> float | None:
    return sum(math.log(scale) for scale in data_card(run)["scale"]) if data_card(run) else None


def _check_target(path: Path | None, suffixes: tuple[str, ...], overwrite: bool) -> str:
    """Return the suffix of a file that is to be written, if it may be."""
    if path is None:
        return ""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"expected a {' or '.join(suffixes)} file, got {path}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is already there: choose another name, or --overwrite")
    return path.suffix.lower()


def _encode(values: Any, columns: list[str], kind: Literal["csv", "npy"], shift: Any, scale: Any) -> bytes:
    """Return rows · scale + shift in float64 as the content of a file."""
    import csv
    import io

    import numpy as np

    parts = (values[rows].numpy() * np.asarray(scale) + np.asarray(shift) for rows in cut(len(values), ENCODED))
    if kind == "npy":
        x = np.empty(values.shape)
        for rows, part in zip(cut(len(values), ENCODED), parts, strict=True):
            x[rows] = part
        return _npy(x)
    pieces, text = [], io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for part in parts:
        writer.writerows([f"{value:.9g}" for value in row] for row in part)
        pieces.append(text.getvalue().encode())
        text.seek(0)
        text.truncate()
    return b"".join(pieces)


def _npy(values: Any) -> bytes:
    """Return an array in float64 as the content of a .npy file."""
    import io

    import numpy as np

    file = io.BytesIO()
    np.save(file, np.asarray(values, dtype=np.float64))
    return file.getvalue()


def print_json(record: Any) -> None:
    """Write a record to stdout as one line of JSON."""
    typer.echo(json.dumps(to_plain(record), ensure_ascii=False))
