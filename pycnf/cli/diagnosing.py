"""``pycnf diagnose``: the errors of a trained flow's solver, where they arise, and what other methods would do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table

from pycnf.cli import options as o
from pycnf.cli.running import data_source, open_run, print_json
from pycnf.cli.sweeps import make_table, read_counts, read_names, read_tolerances, write_order, write_setting
from pycnf.cli.tables import console, facts_table
from pycnf.data import load
from pycnf.experiments.arms import write_tolerance
from pycnf.records import run_record, write_json
from pycnf.solve import METHODS, Solver
from pycnf.training.folder import make_folder

if TYPE_CHECKING:
    from pycnf.diagnostics import Diagnosis

RECORD = "diagnosis.json"
FOLDER = "diagnosis"
SHOWN = 30  # steps in the table
ADAPTIVE = tuple(name for name, method in METHODS.items() if method.kind == "adaptive")


def read_methods(text: str) -> tuple[str, ...]:
    """Read names of solver methods."""
    return read_names(text, METHODS)


def diagnose(
    run: o.RunFolder,
    data: o.RunData = None,
    split: o.Split = "test",
    rows: Annotated[
        int, o.option("--rows", o.WHAT, "Rows, drawn at random; they set the steps together.", min=1)
    ] = 100,
    seed: o.Seed = 0,
    data_dir: o.DataDir = None,
    config: o.Config = None,
    method: Annotated[
        str | None,
        o.option("--method", o.SOLVER, "Adaptive method to look at. [default: the run's]", **o.one_of(ADAPTIVE)),
    ] = None,
    rtol: o.RunRtol = None,
    atol: o.RunAtol = None,
    methods: Annotated[
        str | None,
        o.option(
            "--methods",
            o.SOLVER,
            "Methods of the work-precision diagram, separated by commas. [default: all but SciPy's]",
            metavar="NAMES",
            **o.checked(read_methods),
        ),
    ] = None,
    tolerances: Annotated[
        str,
        o.option(
            "--tolerances",
            o.SOLVER,
            "Tolerances of its adaptive methods, rtol = atol.",
            metavar="LIST",
            **o.checked(read_tolerances),
        ),
    ] = "1e-2,1e-3,1e-4,1e-5,1e-6,1e-7,1e-8",
    n_steps: Annotated[
        str,
        o.option(
            "--n-steps",
            o.SOLVER,
            "Steps per block of its methods with equal steps.",
            metavar="LIST",
            **o.checked(read_counts),
        ),
    ] = "1,2,4,8,16,32,64",
    max_nfe: Annotated[
        int, o.option("--max-nfe", o.SOLVER, "Budget of evaluations of each of its solves and blocks.", min=1)
    ] = 500,
    degree: Annotated[
        int, o.option("--degree", o.SOLVER, "Highest degree of the polynomial content.", min=0, max=30)
    ] = 8,
    alone: Annotated[int, o.option("--alone", o.SOLVER, "Rows that are also solved one by one.", min=0)] = 64,
    device: o.Device = None,
    output: Annotated[
        Path | None,
        o.option("--output -o", o.OUTPUT, "Folder of record and figures. [default: RUN/diagnosis]", metavar="DIR"),
    ] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Show the errors of a trained flow's solver: true and estimated, in time, in space, and by method.

    Every step is solved again to rounding, in float64: its true local error stands beside the estimate that
    chose its size, for the state z and for log p. The record also tells what each step contributes to the error at
    the end, which rows set the steps, what error every method reaches for its evaluations, and how much of the
    trajectories is polynomial in time.

    For example:

    - `pycnf diagnose runs/first`

    - `pycnf diagnose runs/first --rows 50 --methods dopri5,rk4 --tolerances 1e-3,1e-5,1e-7`
    """
    flow = open_run(run, device)
    if flow.context:
        raise ValueError(
            f"{run} is a conditional flow: diagnose it in code, pycnf.diagnostics.diagnose(flow, x, context)"
        )
    source = data or data_source(run)
    changed: dict[str, Any] = {"method": method, "rtol": rtol, "atol": atol}
    changed = {name: value for name, value in changed.items() if value is not None}
    if method is not None:
        changed["n_steps"] = None
    solver = Solver(**flow.eval_solver.to_dict() | changed)
    folder = make_folder(output or run / FOLDER)
    o.say(f"Diagnosing {run} on {rows} {split} rows of {source}; results go to {folder}", quiet=quiet)

    import torch

    from pycnf.diagnostics import diagnose as measure

    dataset = load(source, data_dir=data_dir)
    table = getattr(dataset, split)
    drawn = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:rows]
    weight = next(flow.parameters())
    found = measure(
        flow,
        table[drawn].to(weight),
        solver=solver,
        methods=None if methods is None else read_methods(methods),
        tolerances=read_tolerances(tolerances),
        n_steps=read_counts(n_steps),
        max_nfe=max_nfe,
        degree=degree,
        alone=alone,
        say=lambda text: o.say(f"  {text}", quiet=quiet),
    )
    figures = _draw(found, folder, f"{len(drawn)} {split} rows of {dataset.name}")
    record = run_record(
        device=weight.device,
        command=o.this_command(),
        run=str(run),
        data=dataset.name,
        split=split,
        rows=len(drawn),
        seed=seed,
        dtype=str(weight.dtype).removeprefix("torch."),
        features=flow.features,
        blocks=flow.blocks,
        T=flow.T,
        **found.summary(),
        figures=[path.name for path in figures],
    )
    write_json(folder / RECORD, record)
    if as_json:
        print_json(record)
        return
    out = console()
    out.print(facts_table(f"{run} on {len(drawn)} {split} rows of {dataset.name}", _facts(record)))
    out.print(step_table(out, record))
    out.print(work_table(out, record))
    for path in (folder / RECORD, *figures):
        out.print(str(path), soft_wrap=True)


def _draw(found: Diagnosis, folder: Path, what: str) -> list[Path]:
    from pycnf import plots_diagnostics as draw
    from pycnf.plots import save_figure

    figures = {
        "local-errors": draw.local_error_figure(found.errors),
        "contributions": draw.contribution_figure(found.errors, found.contributions),
        "difficulty": draw.difficulty_figure(found.errors, found.difficulty),
        "polynomials": draw.polynomial_figure(found.content, title=f"trajectories of {what}"),
    }
    done = [point for point in found.points if point.failed is None]
    if done:
        figures["work-precision"] = draw.work_precision_figure(done, title=f"work and precision, {what}")
    if any(point.tolerance is not None for point in done):
        figures["tolerance"] = draw.tolerance_figure(done, title=f"error against tolerance, {what}")
    return [
        save_figure(figure, folder / f"{name}.{kind}") for name, figure in figures.items() for kind in ("svg", "png")
    ]


def _facts(record: dict[str, Any]) -> dict[str, str]:
    solver, samples, ratio, content = (record[k] for k in ("solver", "samples", "true_over_estimate", "polynomials"))
    deciding, error = record["deciding"], record["error"]
    facts = {
        "solver": f"{solver['method']}, tolerance {write_tolerance(solver['rtol'], solver['atol'])}",
        "cost": f"{record['nfe']} evaluations, {record['accepted']} steps, {record['rejected']} rejected",
        "true local error": f"{ratio['median']:.2g} times its estimate (median), {ratio['max']:.2g} at most"
        if ratio["steps"]
        else "far below the tolerance in every step",
        "deciding channel": f"z in {deciding['z']} of the accepted steps, log p in {deciding['logp']}",
        "error at the end": f"z {error['z']:.2g}, log p {error['logp']:.2g} nats (RMS)",
        "hardest tenth of rows": f"{samples['hardest_tenth']:.0%} of the squared error norm".replace("%", " %"),
    }
    if samples["alone"]:
        facts["evaluations alone"] = f"{samples['alone_mean']:.1f} mean, {samples['alone_max']:.0f} most, of a row"
    for p in (degree for degree in (1, 3, 5) if degree <= content["degree"]):
        left = {name: _rms([block[p] for block in values]) for name, values in content["residuals"].items()}
        facts[f"left over at degree {p}"] = f"z {left['z']:.2g}, log p {left['logp']:.2g} nats (RMS)"
    return facts


def step_table(out: Console, record: dict[str, Any]) -> Table:
    """Return a row per step tried of the record of a diagnosis, as it will be printed on ``out``."""
    heads = (
        *("block", "t", "size", "kept", "estimate\nz", "\nlog p", "true\nz", "\nlog p"),
        *("true /\nest.", "decided\nby", "largest\nshare"),
    )
    caption = "kept: whether the step was accepted; largest share: of one row in the squared norm of the estimate"
    if len(record["steps"]) > SHOWN:
        caption += f"; the first {SHOWN} steps, all are in {RECORD}"
    table = make_table(out, "steps tried; errors in units of the tolerance (RMS)", heads, caption)
    for step in record["steps"][:SHOWN]:
        values = (step[name] for name in ("estimate_z", "estimate_logp", "true_z", "true_logp", "true_over_estimate"))
        table.add_row(
            str(step["block"] + 1),
            f"{step['t']:.4f}",
            f"{step['h']:.4f}",
            "yes" if step["accepted"] else "no",
            *(f"{value:.2g}" for value in values),
            "z" if step["deciding"] == "z" else "log p",
            f"{step['largest_share']:.0%}".replace("%", " %"),
        )
    return table


def work_table(out: Console, record: dict[str, Any]) -> Table:
    """Return a row per method and setting of the record of a diagnosis, as it will be printed on ``out``."""
    heads = (
        *("method", "tolerance\nor steps", "NFE", "error of\nz", "\nlog p", "\nmean NLL", "order in z\n(nominal)"),
    )
    caption = "NFE: function evaluations; errors at the end, in float64: root mean square of z and of log p (nats)"
    table = make_table(out, "work and precision", heads, caption)
    previous = None
    for point in record["work_precision"]:
        first, previous = point["method"] != previous, point["method"]
        errors = (
            [f"{point[name]:.1e}" for name in ("error_z", "error_logp", "error_nll")]
            if point["failed"] is None
            else ["failed", "", ""]
        )
        order = write_order(record["orders"][point["method"]]["z"], point["order"]) if first else ""
        setting = write_setting(point["tolerance"], point["n_steps"])
        table.add_row(point["method"] if first else "", setting, str(point["nfe"]), *errors, order)
    return table


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


__all__ = ["diagnose"]
