"""``pycnf diagnose``: the errors of a trained flow's solver, where they arise, and what other methods would do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pycnf.cli import options as o
from pycnf.cli.running import data_source, open_run, print_json
from pycnf.cli.tables import console, facts_table
from pycnf.data import load
from pycnf.records import run_record, write_json
from pycnf.solve import METHODS, Solver
from pycnf.training.folder import make_folder

if TYPE_CHECKING:
    from pycnf.diagnostics import Diagnosis

RECORD = "diagnosis.json"
FOLDER = "diagnosis"
SHOWN = 30  # steps in the table
ADAPTIVE = tuple(name for name, method in METHODS.items() if method.kind == "adaptive")


def read_numbers(text: str) -> tuple[float, ...]:
    """Read finite numbers > 0, separated by commas.

    >>> read_numbers("1e-3,1e-5") == (1e-3, 1e-5)
    True
    """
    try:
        found = tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError as err:
        raise ValueError(f"expected numbers separated by commas, such as 1e-3,1e-5, got {text!r}") from err
    if not found or not all(0 < value < math.inf for value in found):
        raise ValueError(f"expected finite numbers > 0, separated by commas, got {text!r}")
    return found


def read_counts(text: str) -> tuple[int, ...]:
    """Read whole numbers >= 1, separated by commas."""
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    if not found or not all(word.isdigit() and int(word) for word in found):
        raise ValueError(f"expected whole numbers >= 1, separated by commas, such as 2,4,8, got {text!r}")
    return tuple(int(word) for word in found)


def read_methods(text: str) -> tuple[str, ...]:
    """Read names of solver methods, separated by commas."""
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    unknown = [name for name in found if name not in METHODS]
    if unknown or not found:
        raise ValueError(f"{unknown[0] if unknown else text!r} is not one of {', '.join(METHODS)}")
    return found


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
    rtol: Annotated[
        float | None,
        o.option("--rtol", o.SOLVER, "Relative tolerance. [default: the run's in test]", **o.positive()),
    ] = None,
    atol: Annotated[
        float | None,
        o.option("--atol", o.SOLVER, "Absolute tolerance. [default: the run's in test]", **o.positive()),
    ] = None,
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
            **o.checked(read_numbers),
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
        tolerances=read_numbers(tolerances),
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
    out.print(_step_table(record))
    out.print(_work_table(record))
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
        "solver": f"{solver['method']}, rtol {solver['rtol']:g}, atol {solver['atol']:g}",
        "cost": f"{record['nfe']} evaluations, {record['accepted']} steps, {record['rejected']} rejected",
        "true local error": f"{ratio['median']:.2g} times its estimate (median), {ratio['max']:.2g} at most"
        if ratio["steps"]
        else "far below the tolerance in every step",
        "deciding channel": f"z in {deciding['z']} steps, log p in {deciding['logp']}",
        "error at the end": f"z {error['z']:.2g}, log p {error['logp']:.2g} nats (RMS)",
        "hardest tenth of rows": f"{samples['hardest_tenth']:.0%} of the squared error norm".replace("%", " %"),
    }
    if samples["alone"]:
        facts["evaluations alone"] = f"{samples['alone_mean']:.1f} mean, {samples['alone_max']:.0f} most, of a row"
    for p in (degree for degree in (1, 3, 5) if degree <= content["degree"]):
        left = {name: _rms([block[p] for block in values]) for name, values in content["residuals"].items()}
        facts[f"left over at degree {p}"] = f"z {left['z']:.2g}, log p {left['logp']:.2g} nats (RMS)"
    return facts


def _step_table(record: dict[str, Any]) -> Table:
    table = Table(
        title="steps tried; errors in units of the tolerance (RMS)",
        box=SIMPLE_HEAD,
        caption=None if len(record["steps"]) <= SHOWN else f"the first {SHOWN} steps; all are in {RECORD}",
        caption_justify="left",
    )
    heads = (
        *("block", "t", "size", "", "estimate\nz", "\nlog p", "true\nz", "\nlog p"),
        *("true /\nestimate", "decided\nby", "largest share\nof one row"),
    )
    for name in heads:
        table.add_column(name, justify="right")
    for step in record["steps"][:SHOWN]:
        values = (step[name] for name in ("estimate_z", "estimate_logp", "true_z", "true_logp", "true_over_estimate"))
        table.add_row(
            str(step["block"] + 1),
            f"{step['t']:.4f}",
            f"{step['h']:.4f}",
            "" if step["accepted"] else "rejected",
            *(f"{value:.3g}" for value in values),
            "z" if step["deciding"] == "z" else "log p",
            f"{step['largest_share']:.1%}".replace("%", " %"),
        )
    return table


def _work_table(record: dict[str, Any]) -> Table:
    table = Table(title="work and precision, in float64", box=SIMPLE_HEAD)
    heads = (
        *("method", "tolerance\nor steps", "evaluations", "RMS error\nz", "\nlog p (nats)", "error of NLL\n(nats)"),
        "order in z\n(nominal)",
    )
    for name in heads:
        table.add_column(name, justify="left" if name == "method" else "right")
    previous = None
    for point in record["work_precision"]:
        setting = f"{point['n_steps']}" if point["tolerance"] is None else f"{point['tolerance']:.0e}"
        order = record["orders"][point["method"]]["z"]
        first, previous = point["method"] != previous, point["method"]
        errors = (
            [f"{point[name]:.1e}" for name in ("error_z", "error_logp", "error_nll")]
            if point["failed"] is None
            else ["failed", "", ""]
        )
        nominal = f" ({point['order']})" if point["order"] else ""
        shown = f"{order:.1f}{nominal}" if first and order > 0 else ""
        table.add_row(point["method"] if first else "", setting, str(point["nfe"]), *errors, shown)
    return table


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


__all__ = ["diagnose"]
