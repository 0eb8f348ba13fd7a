"""``pycnf compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pycnf.cli import options as o
from pycnf.cli.tables import comparison_table, console, tolerance_table
from pycnf.experiments import ComparisonResult, parse_arms, parse_seeds, setup_for
from pycnf.experiments import compare as run_comparison
from pycnf.experiments.arms import describe_tolerance
from pycnf.experiments.comparison import ARMS, RECORD, announce


def compare(
    data: o.Data = "power",
    regularizers: o.Regularizers = None,
    seeds: o.Seeds = "3",
    allow_unequal_tolerance: Annotated[
        bool,
        o.option(
            "--allow-unequal-tolerance",
            o.WHAT,
            "Accept arms at tolerances of their own: none@1e-6 (training and test), none@1e-6/1e-8 "
            "(rtol/atol), none@1e-4:1e-6 (training:test). Such a comparison is unfair, and is labeled so.",
        ),
    ] = False,
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
        o.option(
            "--output -o",
            o.OUTPUT,
            "Folder for records, figure and runs. [default: runs/compare-DATA]",
            metavar="DIR",
        ),
    ] = None,
    resume: Annotated[
        bool,
        o.option(
            "--resume/--overwrite",
            o.OUTPUT,
            "Keep the runs that are recorded with the same configuration, or make all anew.",
        ),
    ] = True,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare regularizers at the same solver tolerance, over several seeds.

    Every arm is trained and tested with every seed, from the same weights, on the same batches, at the same
    tolerance. The result is a table, a figure and one JSON record. An interrupted comparison goes on where it
    was when the same command is given again.

    For example:

    - `pycnf compare --data power` — the flow with TPR against the flow without, in minutes

    - `pycnf compare --data moons --regularizers "none tpr:weight=50" --seeds 5 --max-steps 2000`

    - `pycnf compare --data mine.csv --hidden 100,100 --rtol 1e-3 --atol 1e-3 --output runs/mine`
    """
    settings = o.settings_of(locals())
    specs = regularizers or list(ARMS)
    setup = setup_for(data, settings)
    arms = parse_arms(specs, setup, allow_unequal_tolerance=allow_unequal_tolerance)
    folder = output or Path("runs") / f"compare-{Path(data).stem}"
    o.say(f"Comparing on {announce(data, arms, parse_seeds(seeds))}; results go to {folder}", quiet=quiet)
    try:
        result = run_comparison(
            data,
            specs,
            seeds,
            output=folder,
            data_dir=data_dir,
            allow_unequal_tolerance=allow_unequal_tolerance,
            overwrite=not resume,
            progress=not quiet,
            command=o.this_command(),
            **settings,
        )
    except KeyboardInterrupt as err:
        message = f"interrupted; what is finished is in {folder / RECORD}. The same command goes on from there"
        raise KeyboardInterrupt(message + ("." if resume else ", without --overwrite.")) from err
    figures = _draw(result, folder)
    if as_json:
        typer.echo(json.dumps(result.record(), ensure_ascii=False))
    else:
        _print(result, describe_tolerance(arms[0].setup) if result.equal_tolerance else "unequal tolerances")
        if figures:
            console().print(f"figure: {' and '.join(map(str, figures))}", soft_wrap=True)
        console().print(f"record: {folder / RECORD}", soft_wrap=True)
    if len(result.failures) == len(result.rows):
        raise typer.Exit(1)


def _draw(result: ComparisonResult, folder: Path) -> list[Path]:
    if all(row["status"] != "finished" for row in result.rows):
        return []
    from pycnf.plots import compare_figure, save_figure

    figure = compare_figure(result.rows)
    return [save_figure(figure, folder / f"comparison.{kind}") for kind in ("svg", "png")]


def _print(result: ComparisonResult, tolerance: str) -> None:
    out = console()
    out.print(comparison_table(result, tolerance, narrow=out.width < 110))
    if (table := tolerance_table(result)) is not None:
        out.print(table)
    for row in result.failures:
        out.print(f"failed: {row['arm']}, seed {row['seed']}: {row['error']}", style="red", markup=False)
