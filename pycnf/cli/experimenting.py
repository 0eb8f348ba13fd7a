"""``pycnf experiment list``, ``pycnf experiment show`` and ``pycnf experiment run``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pycnf.cli import options as o
from pycnf.cli.benching import bench_table, report, run_recorded
from pycnf.cli.tables import console, tolerance_table
from pycnf.experiments import BenchResult, get_preset, list_presets, parse_seeds, plan_experiment
from pycnf.experiments.bench_results import BENCH
from pycnf.experiments.presets import BUDGETS
from pycnf.experiments.reproduction import KINDS, default_folder, preset_settings
from pycnf.experiments.results import write_cell
from pycnf.experiments.settings import read_settings

experiment_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Run the experiments of the TPR paper by name."
)
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of the experiment, see `pycnf experiment list`.",
        autocompletion=lambda: list(list_presets()),
        **o.checked(get_preset),
    ),
]


@experiment_app.command("list")
def list_experiments(data_dir: o.DataDir = None, as_json: o.Json = False) -> None:
    """List the experiments, and whether their data are there.

    For example: `pycnf experiment list --data-dir ~/data`
    """
    rows = [_describe(name, data_dir) for name in list_presets()]
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    table = Table(box=SIMPLE_HEAD, caption="small: for two cores; paper: the settings of the TPR paper")
    for head in ("name", "trains", "about", *(f"data, {budget}" for budget in BUDGETS)):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(row["name"], row["kind"], row["about"], *(row["data"][budget] or "absent" for budget in BUDGETS))
    console().print(table)
    if absent := {row["fetch"] for row in rows if None in row["data"].values()}:
        console().print("absent data:", *sorted(absent), sep="\n  ", soft_wrap=True, markup=False)


@experiment_app.command("show")
def show_experiment(name: Name, as_json: o.Json = False) -> None:
    """Show the settings of an experiment in both budgets.

    For example: `pycnf experiment show vae-mnist`
    """
    found = preset_settings(name)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    table = Table(
        title=get_preset(name).about,
        box=SIMPLE_HEAD,
        caption="small: for two cores; paper: the settings of the TPR paper. `pycnf experiment run` replaces them by "
        "--set NAME=VALUE",
    )
    for head in ("setting", *found):
        table.add_column(head, overflow="fold")
    for key in {key: None for settings in found.values() for key in settings}:
        table.add_row(key, *(_write(settings.get(key)) for settings in found.values()))
    console().print(table)


@experiment_app.command()
def run(
    name: Name,
    regularizer: Annotated[
        list[str] | None,
        o.option(
            "--regularizer --regularizers",
            o.WHAT,
            "What is compared with the plain arm, which is always there: specs separated by spaces, or repeat the "
            "option. [default: the preset's]",
            metavar="SPECS",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        o.option(
            "--set",
            o.WHAT,
            "A setting to replace, such as epochs=10, hidden=[32,32] or dequantization=variational; repeat the option "
            "for more. `pycnf experiment show NAME` lists them.",
            metavar="NAME=VALUE",
            **o.checked(read_settings),
        ),
    ] = None,
    budget: Annotated[
        str,
        o.option(
            "--budget",
            o.WHAT,
            "small, for two cores, or paper, the settings of the TPR paper.",
            **o.one_of(BUDGETS),
        ),
    ] = "small",
    seeds: Annotated[
        str | None,
        o.option(
            "--seeds",
            o.WHAT,
            "A number N for the seeds 0 to N-1, or a list such as 0,3,7. [default: the preset's]",
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
        int | None, o.option("--max-steps", o.TRAINING, "Training steps at most. [default: the preset's]", min=1)
    ] = None,
    device: o.Device = None,
    jobs: o.Jobs = None,
    output: Annotated[
        Path | None,
        o.option(
            "--output -o",
            o.OUTPUT,
            "Folder for records and figures. [default: results/experiments/NAME]",
            metavar="DIR",
        ),
    ] = None,
    runs: o.Runs = None,
    resume: o.KeepRuns = True,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Run an experiment: without and with regularizers, over seeds, all at the same solver tolerance.

    Every run is recorded in a file of its own, and the same command goes on where it was interrupted. The result is a
    table, figures of likelihood against evaluations, and for the first seed pictures of what each arm has learned.

    For example:

    - `pycnf experiment run moons` — two minutes on two cores

    - `pycnf experiment run vae-caltech --regularizer "tpr:weight=5 error:weight=0.5"`

    - `pycnf experiment run mnist --set dequantization=variational --output results/variational`

    - `pycnf experiment run mnist --budget paper --device cuda`
    """
    flags = {
        "rtol": rtol,
        "atol": atol,
        "test_rtol": test_tolerance,
        "test_atol": test_tolerance,
        "max_steps": max_steps,
        "device": device,
    }
    settings = read_settings(setting or ()) | {key: value for key, value in flags.items() if value is not None}
    plan = plan_experiment(name, budget, regularizer, data_dir=data_dir, **settings)
    folder = output or default_folder(name, budget)
    o.say(
        f"{plan.about}; budget {budget}, on {_name_data(name, budget, *plan.data)}; results go to {folder}", quiet=quiet
    )
    options: dict[str, Any] = {"seeds": seeds, "jobs": jobs, "runs": runs, "data_dir": data_dir}
    result = run_recorded(plan, folder, options, resume=resume, quiet=quiet)
    report(result, lambda figures: _print(result, name, figures), as_json=as_json)


def _describe(name: str, data_dir: Path | None) -> dict[str, Any]:
    preset = get_preset(name)
    work = KINDS[preset.kind]()
    there = {
        budget: next((data for data in preset.data(budget) if work.present(data, data_dir)), None) for budget in BUDGETS
    }
    return {"name": name, "kind": preset.kind, "about": preset.about, "data": there, "fetch": preset.fetch}


def _write(value: Any) -> str:
    """Write a setting as --set takes it."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value)


def _name_data(name: str, budget: str, data: str) -> str:
    """Name the set, and say where it stands in for another."""
    wanted = get_preset(name).substituted(data, budget)
    return data if wanted is None else f"{data}, which stands in for {wanted} and is not {wanted}"


def measures_table(result: BenchResult, data: str, measures: Mapping[str, str]) -> Table:
    """Return a row per arm of what a workload measures beyond the likelihood, with paired differences."""
    table = Table(title=f"{data}: mean ± sd over seeds, in brackets the difference to none", box=SIMPLE_HEAD)
    table.add_column("arm", overflow="fold")
    for text in measures.values():
        table.add_column(textwrap.fill(text, 20), justify="right")
    for line in result.comparison(data).summary(tuple(measures)):
        cells = [line[name] | {"change": None} for name in measures]
        table.add_row(line["arm"], *(write_cell(cell, 3) for cell in cells))
    return table


def _print(result: BenchResult, name: str, figures: Sequence[Path]) -> None:
    out, work = console(), KINDS[get_preset(name).kind]
    for data in result.data:
        out.print(bench_table(result, data))
        if work.measures:
            out.print(work.note)
            out.print(measures_table(result, data, work.measures))
        if (sweep := tolerance_table(result.comparison(data))) is not None:
            out.print(sweep)
    for row in result.failures:
        out.print(f"{row['status']}: {row['arm']}, seed {row['seed']}: {row['error']}", style="red", markup=False)
    for path in (*figures, *sorted(result.folder.glob("*.png")), result.folder / BENCH):
        out.print(str(path), soft_wrap=True)


__all__ = ["experiment_app", "measures_table"]
