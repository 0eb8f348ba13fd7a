"""``pycnf bench regularizers``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pycnf.cli import options as o
from pycnf.cli.tables import console, tolerance_table
from pycnf.experiments import BenchResult, parse_seeds, read_budget
from pycnf.experiments import bench as run_bench
from pycnf.experiments.arms import describe_tolerance
from pycnf.experiments.bench_results import BENCH
from pycnf.experiments.benchmark import default_output, split_names
from pycnf.experiments.budgets import Budget, budget_names
from pycnf.experiments.reproduction import draw_result
from pycnf.experiments.setup import Setup
from pycnf.records import read_json

bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Run the benchmarks of the project.")


@bench_app.command()
def regularizers(
    budget: Annotated[
        str,
        o.option(
            "--budget",
            o.WHAT,
            f"Sets, arms, seeds, steps and models: {', '.join(budget_names())}, or a .toml file of that form.",
            metavar="NAME|FILE",
            **o.checked(read_budget),
        ),
    ] = "small",
    data: Annotated[
        str | None,
        o.option(
            "--data",
            o.WHAT,
            "Data sets instead of the budget's, separated by commas.",
            metavar="NAMES",
            **o.checked(split_names),
        ),
    ] = None,
    regularizers: Annotated[
        list[str] | None,
        o.option(
            "--regularizers",
            o.WHAT,
            "The arms instead of the budget's, separated by spaces (or repeat the option); none must be among them.",
            metavar="SPECS",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        o.option(
            "--seeds",
            o.WHAT,
            "A number N for the seeds 0 to N-1, or a list such as 0,3,7. [default: the budget's]",
            metavar="N|LIST",
            **o.checked(parse_seeds),
        ),
    ] = None,
    data_dir: o.DataDir = None,
    config: o.Config = None,
    rtol: o.Rtol = None,
    atol: o.Atol = None,
    test_tolerance: o.TestTolerance = None,
    max_steps: Annotated[
        int | None, o.option("--max-steps", o.TRAINING, "Training steps at most. [default: the budget's]", min=1)
    ] = None,
    device: o.Device = None,
    jobs: o.Jobs = None,
    output: Annotated[
        Path | None,
        o.option(
            "--output -o",
            o.OUTPUT,
            "Folder for records and figures. [default: results/regularizers-BUDGET]",
            metavar="DIR",
        ),
    ] = None,
    runs: o.Runs = None,
    resume: o.KeepRuns = True,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Benchmark regularizers: data sets × regularizers × seeds, all at the same solver tolerance.

    For each run: the held-out NLL with the exact divergence, evaluations in training and at test tolerances from
    1e-3 to 1e-8, steps, time, and the error of log p that is really reached. Each run is recorded in a file of its
    own; the same command goes on where it was interrupted, and arms, sets and seeds can be added later. Every table
    also shows what the tolerance alone does to the flow without regularizer.

    For example:

    - `pycnf bench regularizers` — an hour on two cores

    - `pycnf bench regularizers --data power --regularizers "none tpr:weight=5 tpr:weight=50" --seeds 5`

    - `pycnf bench regularizers --budget paper --device cuda`
    """
    chosen = read_budget(budget)
    folder = output or default_output(chosen)
    o.say(f"Benchmark of regularizers, budget {chosen.name} ({chosen.about}); results go to {folder}", quiet=quiet)
    settings = {
        "rtol": rtol,
        "atol": atol,
        "test_rtol": test_tolerance,
        "test_atol": test_tolerance,
        "max_steps": max_steps,
        "device": device,
    }
    options: dict[str, Any] = {"seeds": seeds, "jobs": jobs, "runs": runs, "data_dir": data_dir}
    options |= {"data": data, "regularizers": regularizers or None, **settings}
    result = run_recorded(chosen, folder, options, resume=resume, quiet=quiet)
    report(result, lambda figures: _print(result, figures), as_json=as_json)


def run_recorded(budget: Budget, folder: Path, options: Mapping[str, Any], *, resume: bool, quiet: bool) -> BenchResult:
    """Run a benchmark into a folder; an interruption tells how to go on."""
    try:
        return run_bench(
            budget,
            output=folder,
            overwrite=not resume,
            progress=not quiet,
            command=o.this_command(),
            **options,
        )
    except KeyboardInterrupt as err:
        again = "The same command goes on from there" + ("." if resume else ", without --overwrite.")
        raise KeyboardInterrupt(f"interrupted; what is finished is recorded in {folder}. {again}") from err


def report(result: BenchResult, show: Callable[[list[Path]], None], *, as_json: bool) -> None:
    """Draw a result and show it; exit with 1 where every run failed."""
    figures = draw_result(result)
    if as_json:
        typer.echo(json.dumps(read_json(result.folder / BENCH), ensure_ascii=False))
    else:
        show(figures)
    if len(result.failures) == len(result.rows):
        raise typer.Exit(1)


def bench_table(result: BenchResult, data: str) -> Table:
    """Return a row per arm, and one per looser tolerance at which the plain arm was tested."""
    comparison = result.comparison(data)
    found = result.table(data)
    table = Table(
        title=f"{data}, {describe_tolerance(Setup(**comparison.setup))}; means over {len(comparison.seeds)} seed(s)",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="NFE: function evaluations of a batch; in brackets the change against none, of the NLL ± the standard "
        "error of the\npaired difference. Within 1 SE: of that difference (paired) and of the NLL of none (unpaired), "
        "or which. Times: ratios.\nOnly tested at: what a looser tolerance alone changes, in float64, on the first "
        "test rows.",
        caption_justify="left",
    )
    table.add_column("arm", overflow="fold")
    for name in found.columns:
        table.add_column(textwrap.fill(name, 12), justify="right")
    for arm, cells in zip(found.index, found.to_numpy(), strict=True):
        table.add_row(
            str(arm),
            *(cell.replace(" (", "\n(") for cell in cells),
            style="dim" if "only tested at" in str(arm) else None,
        )
    return table


def _print(result: BenchResult, figures: list[Path]) -> None:
    out = console()
    for data in result.data:
        out.print(bench_table(result, data))
        if (sweep := tolerance_table(result.comparison(data))) is not None:
            out.print(sweep)
        if (best := result.best(data)) is not None:
            change = f"{best['nfe_test']['change']:+.1%}".replace("%", " %").replace("-", "−")
            out.print(f"fewest evaluations within one standard error: {best['arm']}, {change}", markup=False)
    for row in result.failures:
        out.print(
            f"{row['status']}: {row['data']}, {row['arm']}, seed {row['seed']}: {row['error']}",
            style="red",
            markup=False,
        )
    for path in (*figures, result.folder / BENCH):
        out.print(str(path), soft_wrap=True)


__all__ = ["bench_app", "bench_table"]
