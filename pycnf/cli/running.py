"""``pycnf train``, ``pycnf evaluate`` and ``pycnf sample``: one run and its flow."""

from __future__ import annotations

import dataclasses
import json
import re
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
from pycnf.solve import METHODS, Solver
from pycnf.training import evaluate as evaluate_flow
from pycnf.training import load_flow
from pycnf.training.options import resolve_device

RESULT = "result.json"
CHUNK = 10_000  # samples of one solve


def train(
    data: o.Data = "power",
    regularizers: o.Regularizer = "none",
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
    batch_size: Annotated[int, o.option("--batch-size", o.SOLVER, "Rows of one solve.", min=1)] = 1000,
    device: o.Device = None,
    output: Annotated[
        Path | None,
        o.option("--output -o", o.OUTPUT, "Also write the record to a file.", metavar="FILE"),
    ] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compute the held-out likelihood of a trained flow, and what it costs.

    For example:

    - `pycnf evaluate runs/first`

    - `pycnf evaluate runs/first --rtol 1e-3 --atol 1e-3 --json`
    """
    flow = open_run(run, device)
    changed = {"method": method, "rtol": rtol, "atol": atol, "n_steps": n_steps, "max_nfe": max_nfe}
    changed = {name: value for name, value in changed.items() if value is not None}
    if method is not None and METHODS[method].kind != "fixed":
        changed.setdefault("n_steps", None)
    solver = Solver(**flow.eval_solver.to_dict() | changed)
    if divergence is not None:
        flow.eval_divergence = parse_divergence(divergence)
    source = data or data_source(run)
    o.say(f"Evaluating {run} on the {split} rows of {source}", quiet=quiet)
    dataset = load(source, data_dir=data_dir)
    found = evaluate_flow(flow, getattr(dataset, split), batch_size=batch_size, solver=solver)
    values = dataclasses.asdict(found) | {"divergence": str(flow.eval_divergence)}
    record = run_record(
        device=next(flow.parameters()).device,
        command=o.this_command(),
        run=str(run),
        data=dataset.name,
        split=split,
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
    console().print(facts_table(f"{run} on the {split} rows of {dataset.name}", facts))


def sample(
    run: o.RunFolder,
    n: Annotated[int, o.option("--n -n", o.WHAT, "Number of samples.", min=1)] = 1000,
    seed: o.Seed = 0,
    standardized: Annotated[
        bool,
        o.option("--standardized", o.WHAT, "Keep the flow's own units instead of those of the data."),
    ] = False,
    config: o.Config = None,
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
    kind = _sample_format(output)
    if output.exists() and not overwrite:
        raise ValueError(f"{output} is already there: choose another name, or --overwrite")
    flow = open_run(run, device)
    card = data_card(run)
    if not card and not standardized:
        raise ValueError(f"{run} does not tell the units of its data ({DATA_CARD} is missing): ask for --standardized")
    o.say(f"Sampling {n:,} rows from {run}", quiet=quiet)
    import torch

    parts = []
    torch.manual_seed(seed)
    nfe = 0
    with torch.no_grad():
        for start in range(0, n, CHUNK):
            z = torch.randn(min(CHUNK, n - start), flow.features)
            solution = flow.solve(z.to(next(flow.parameters())), reverse=True, density=False)
            parts.append(solution.z.double().cpu())
            nfe += solution.stats.nfe
    x = torch.cat(parts)
    if not standardized:
        x = x * torch.tensor(card["scale"], dtype=x.dtype) + torch.tensor(card["shift"], dtype=x.dtype)
    columns = card.get("columns") or [f"x{i + 1}" for i in range(flow.features)]
    write_bytes(output, _encode(x.numpy(), columns, kind))
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
        print_json(run_record(command=o.this_command(), nfe=nfe, **record))
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


def _sample_format(path: Path) -> Literal["csv", "npy"]:
    if path.suffix.lower() == ".npy":
        return "npy"
    if path.suffix.lower() == ".csv":
        return "csv"
    raise ValueError(f"expected a .csv or .npy file, got {path}")


def _encode(x: Any, columns: list[str], kind: Literal["csv", "npy"]) -> bytes:
    import csv
    import io

    import numpy as np

    if kind == "npy":
        buffer = io.BytesIO()
        np.save(buffer, x)
        return buffer.getvalue()
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([f"{value:.9g}" for value in row] for row in x)
    return text.getvalue().encode()


def print_json(record: Any) -> None:
    """Write a record to stdout as one line of JSON."""
    typer.echo(json.dumps(to_plain(record), ensure_ascii=False))
