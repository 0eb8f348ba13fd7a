"""``pycnf evaluate``: the held-out likelihood of a trained model."""

from __future__ import annotations

import dataclasses
import math
import time as clock
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from pycnf.cli import options as o
from pycnf.cli.running import check_target, data_card, data_source, npy, open_run, print_json, refuse, units_of
from pycnf.cli.tables import console, facts_table
from pycnf.data import load
from pycnf.divergence import parse_divergence
from pycnf.experiments.arms import write_tolerance
from pycnf.experiments.trained import TrainedRun, kind_of, reopen
from pycnf.records import run_record, write_bytes, write_json
from pycnf.rows import RowSource, Standardized, open_rows
from pycnf.scale import log_prob
from pycnf.solve import METHODS, Solver
from pycnf.training.evaluation import summarize

BATCH_SIZE = 1000


@dataclass(frozen=True)
class _Found:
    """Hold what was evaluated, for the record and in words."""

    title: str
    record: dict[str, Any]
    facts: dict[str, str]
    device: torch.device


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
    standardized: o.Standard = False,
    first: Annotated[
        int | None,
        o.option("--first", o.WHAT, "Take the first N rows alone. [default: all, of pictures the run's]", min=1),
    ] = None,
    data_dir: o.DataDir = None,
    config: o.Config = None,
    method: Annotated[
        str | None,
        o.option("--method", o.SOLVER, "Solver method. [default: that of the run]", **o.one_of(METHODS)),
    ] = None,
    rtol: o.RunRtol = None,
    atol: o.RunAtol = None,
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
    probes: Annotated[
        int | None,
        o.option("--probes", o.SOLVER, "Pictures: probes of the divergence. [default: the run's]", min=1),
    ] = None,
    repeats: Annotated[
        int | None,
        o.option(
            "--repeats", o.SOLVER, "Images: solves of the test, each with noise of its own. [default: the run's]", min=1
        ),
    ] = None,
    importance_samples: Annotated[
        int | None,
        o.option(
            "--importance-samples",
            o.SOLVER,
            "Auto-encoders: samples a picture of the likelihood by importance weights. [default: the run's]",
            min=1,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        o.option(
            "--batch-size",
            o.SOLVER,
            "Rows of one solve: they share its steps, and it holds them in memory. [default: 1000, of pictures that "
            "of the run's tests]",
            min=1,
        ),
    ] = None,
    order: Annotated[
        str,
        o.option(
            "--order",
            o.SOLVER,
            "given, or difficulty: rows of like difficulty share a solve, which pays at tight tolerances.",
            **o.one_of(("given", "difficulty")),
        ),
    ] = "given",
    workers: o.Workers = 1,
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
    """Compute the held-out likelihood of a trained model, and what it costs.

    For example:

    - `pycnf evaluate runs/first`

    - `pycnf evaluate runs/first --rtol 1e-3 --atol 1e-3 --json`

    - `pycnf evaluate runs/first --rows million.npy --densities log_prob.npy --workers 2`

    - `pycnf evaluate runs/mnist/some-run --probes 16 --repeats 4`

    Runs of images and auto-encoders are tested as their experiment tests them, with the same noise. Likelihoods of
    tables are those of the standardized data. The density in the units of the data is log p minus the number
    that the record calls log_scale, the sum of the logarithms of the columns' scales.
    """
    check_target(densities, (".npy",), overwrite)
    kind = kind_of(run)
    changed = {"method": method, "rtol": rtol, "atol": atol, "n_steps": n_steps, "max_nfe": max_nfe}
    changed = {name: value for name, value in changed.items() if value is not None}
    if method is not None and METHODS[method].kind != "fixed":
        changed.setdefault("n_steps", None)
    of_pictures: dict[str, Any] = {"probes": probes, "repeats": repeats, "importance_samples": importance_samples}
    if kind == "table" or (kind == "images" and rows is not None):
        refuse(kind if rows is None else f"{kind} with --rows", of_pictures)
        found = _evaluate_rows(
            run,
            _rows_to_evaluate(run, rows, data, split, data_dir, first, standardized=standardized),
            changed,
            divergence,
            device=device,
            densities=densities,
            quiet=quiet,
            batch_size=batch_size or BATCH_SIZE,
            order=order,
            workers=workers,
        )
    else:
        others = {"order": order != "given", "workers": workers > 1, "divergence": divergence, "densities": densities}
        refuse(kind, others | {"standardized": standardized, "rows": rows})
        source = data or data_source(run)
        places: dict[str, Any] = {"data_dir": data_dir, "device": device or "auto"}
        opened = reopen(run, source, batch_size=batch_size, first=first, **places, **of_pictures)
        found = _evaluate_pictures(run, opened, source, split, changed, quiet=quiet)
    record = run_record(device=found.device, command=o.this_command(), run=str(run), **found.record)
    if output is not None:
        write_json(output, record)
    if as_json:
        print_json(record)
        return
    console().print(facts_table(found.title, found.facts))
    if densities is not None:
        console().print(f"log p of every row: {densities}", soft_wrap=True)


def _evaluate_rows(
    run: Path,
    given: tuple[RowSource, dict[str, Any]],
    changed: dict[str, Any],
    divergence: str | None,
    *,
    device: str | None,
    densities: Path | None,
    quiet: bool,
    **options: Any,
) -> _Found:
    """Evaluate a flow on rows."""
    flow, (table, what) = open_run(run, device), given
    solver = Solver(**flow.eval_solver.to_dict() | changed)
    if divergence is not None:
        flow.eval_divergence = parse_divergence(divergence)
    title = f"{run} on {what.pop('title')}"
    o.say(f"Evaluating {title}", quiet=quiet)
    began = clock.perf_counter()
    computed = log_prob(flow, table, solver=solver, progress=not quiet, **options)
    found = summarize(computed, options["batch_size"], solver, clock.perf_counter() - began)
    if densities is not None:
        write_bytes(densities, npy(computed.values))
    values = dataclasses.asdict(found)
    record = what | {"log_scale": _log_scale(run), "nfe_test": values.pop("nfe"), **values}
    record |= {"divergence": str(flow.eval_divergence), "order": options["order"], "workers": options["workers"]}
    return _Found(title, record, _facts(record, "rows", {}), next(flow.parameters()).device)


def _evaluate_pictures(
    run: Path, opened: TrainedRun, source: str, split: str, changed: dict[str, Any], *, quiet: bool
) -> _Found:
    """Test a run of images or of an auto-encoder as its experiment does."""
    opened.flow.eval_solver = solver = Solver(**opened.flow.eval_solver.to_dict() | changed)
    title = f"{run} on the {split} rows of {source}"
    o.say(f"Evaluating {title}", quiet=quiet)
    row = opened.test(split)
    record: dict[str, Any] = {
        "data": source,
        "split": split,
        "rows": len(getattr(opened.data, split)),
        "batch_size": opened.setup.test_batch_size,
        "method": solver.method,
        "rtol": solver.rtol,
        "atol": solver.atol,
        "divergence": row.pop("test_divergence"),
        "seconds": row.pop("seconds_test"),
        **row,
    }
    measures = {label: f"{row[name]:.4f}" for name, label in opened.work.measures.items()}
    return _Found(title, record, _facts(record, "pictures", measures), next(opened.model.parameters()).device)


def _facts(record: dict[str, Any], rows: str, measures: dict[str, str]) -> dict[str, str]:
    """Return what a record tells, in words."""
    return {
        "NLL": f"{record['nll']:.4f} nats, standard error {record['nll_se']:.4f} ({record['rows']:,} {rows})",
        **measures,
        "evaluations": f"{record['nfe_test']:.1f} a batch of {record['batch_size']:,}",
        "steps": f"{record['accepted']:.1f} accepted, {record['rejected']:.1f} rejected a batch",
        "solver": f"{record['method']}, tolerance {write_tolerance(record['rtol'], record['atol'])}",
        "divergence": record["divergence"],
        "time": f"{record['seconds']:.1f} s",
    }


def _rows_to_evaluate(
    run: Path,
    rows: Path | None,
    data: str | None,
    split: str,
    data_dir: Path | None,
    first: int | None,
    *,
    standardized: bool,
) -> tuple[RowSource, dict[str, Any]]:
    """Return the rows in the units of the flow, and what they are."""
    if rows is None:
        source = data or data_source(run)
        dataset = load(source, data_dir=data_dir)
        title = f"the {split} rows of {dataset.name}"
        return getattr(dataset, split)[:first], {"data": dataset.name, "split": split, "title": title}
    if data is not None:
        raise ValueError("--rows stands in place of --data: give one of them")
    if first is not None:
        raise ValueError("--first is for the rows of a data set, --rows takes a whole file")
    table = open_rows(rows)
    what = {"data": str(rows), "split": "all", "title": f"the rows of {rows}"}
    return table if standardized else Standardized(table, *units_of(run)), what


def _log_scale(run: Path) -> float | None:
    return sum(math.log(scale) for scale in data_card(run)["scale"]) if data_card(run) else None
