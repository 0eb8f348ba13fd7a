"""Run an experiment of the TPR paper by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycnf.data import DataError
from pycnf.data.catalog import data_folders
from pycnf.experiments.autoencoders import AutoEncoders
from pycnf.experiments.bench_results import PLAIN, BenchResult
from pycnf.experiments.benchmark import bench
from pycnf.experiments.budgets import Budget
from pycnf.experiments.image_flows import Images
from pycnf.experiments.presets import Preset, get_preset
from pycnf.experiments.settings import check_settings, settable
from pycnf.experiments.setup import Setup
from pycnf.experiments.workloads import TABLES, Workload

KINDS: dict[str, type[Workload]] = {kind.kind: kind for kind in (type(TABLES), Images, AutoEncoders)}
"""The workloads by the name that presets give them."""


def run_experiment(
    name: str,
    budget: str = "small",
    *,
    regularizers: str | Sequence[str] | None = None,
    seeds: int | str | Sequence[int] | None = None,
    jobs: int | None = None,
    output: str | Path | None = None,
    runs: str | Path | None = None,
    data_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    command: str | None = None,
    **settings: Any,
) -> BenchResult:
    """Train and test a preset without and with regularizers, over seeds, all at the same solver tolerance.

    It is a benchmark (:func:`~pycnf.experiments.benchmark.bench`) of one set: each run is recorded in a file of its
    own when it ends, and calling again goes on where the last call ended. With the first seed, figures show what each
    arm has learned: samples and reconstructions of images, densities in the plane.

    Args:
        name: A name in :func:`~pycnf.experiments.presets.list_presets`.
        budget: "small" or "paper".
        regularizers: What is compared with the plain arm, which is always there; None for the preset's.
        seeds: A number N for 0 ... N-1, or the seeds; None for the preset's.
        jobs: Processes at a time.
        output: Folder of the records; if None, ``results/experiments/NAME``, and for another budget than "small"
            ``results/experiments/NAME-BUDGET``.
        runs: Folder of checkpoints and curves, ``runs/`` with the name of ``output`` if None.
        data_dir: Folder with the files of the data.
        overwrite: Make the runs again.
        progress: Report on stderr.
        command: Command to record; None for that of this process.
        **settings: Settings that replace the preset's; those that are None do not.

    Returns:
        The runs (:class:`~pycnf.experiments.bench_results.BenchResult`).

    Raises:
        ValueError: The data are not there (the message names the command that fetches them), or a name or setting is
            not usable; nothing was run.
        KeyboardInterrupt: Ctrl-C; what is finished is recorded.
        OSError: A file could not be written.
    """
    plan = plan_experiment(name, budget, regularizers, data_dir=data_dir, **settings)
    return bench(
        plan,
        seeds=seeds,
        jobs=jobs,
        output=default_folder(name, budget) if output is None else output,
        runs=runs,
        data_dir=data_dir,
        overwrite=overwrite,
        progress=progress,
        command=command,
    )


def plan_experiment(
    name: str,
    budget: str = "small",
    regularizers: str | Sequence[str] | None = None,
    *,
    data_dir: str | Path | None = None,
    **settings: Any,
) -> Budget:
    """Return what :func:`run_experiment` runs, as a benchmark of one set that is present.

    Raises:
        ValueError: The data are not there, or a name or setting is not usable.

    >>> plan = plan_experiment("moons", regularizers="error", max_steps=5)
    >>> plan.regularizers, plan.data["moons"]["max_steps"]
    (('none', 'error'), 5)
    """
    preset = get_preset(name)
    kind, parts = KINDS[preset.kind], dict[type, dict[str, Any]]()
    given = {key: value for key, value in settings.items() if value is not None}
    check_settings(given, settable(Setup, kind, Budget), name)  # before a complaint that data are absent
    data = find_data(preset, budget, kind(), data_dir)
    values = preset.settings(budget, data) | given
    for of in (Budget, Setup, kind):
        parts[of] = {key: _frozen(values[key]) for key in settable(of) if key in values}
    work = kind(**parts[kind])
    own = parts[Budget]
    if regularizers is not None:
        own["regularizers"] = _arms(regularizers)
    return Budget(
        name=f"{name}-{budget}", about=preset.about, data={data: parts[Setup]}, work=work, figures=True, **own
    )


def preset_settings(name: str) -> dict[str, dict[str, Any]]:
    """Return all settings of an experiment by budget: those of its preset, and the defaults of the others.

    Raises:
        ValueError: On an unknown name.

    >>> found = preset_settings("mnist")
    >>> found["paper"]["hidden"], found["small"]["dequantization"], found["small"]["rtol"]
    ((64, 64, 64), 'uniform', 0.0001)
    """
    preset, found = get_preset(name), {}
    work = KINDS[preset.kind]
    for budget in preset.budgets:
        data, *_ = preset.data(budget)
        own = preset.settings(budget, data)
        setup = work().setup(data, {key: own[key] for key in settable(Setup) if key in own})
        values = dataclasses.asdict(setup) | {f.name: f.default for f in dataclasses.fields(work)}
        if "epochs" in values and "max_steps" not in own:  # epochs say how many steps there are between validations
            del values["max_steps"], values["validate_every"]
        found[budget] = values | {key: own[key] for key in settable(work, Budget) if key in own}
    return found


def find_data(preset: Preset, budget: str, work: Workload, data_dir: str | Path | None = None) -> str:
    """Return the first set of a budget that is present.

    Raises:
        DataError: None is; the message names the command that fetches it.
    """
    names = preset.data(budget)
    folder = None if data_dir is None else Path(data_dir)
    for name in names:
        if work.present(name, folder):
            return name
    places = " or ".join(map(str, data_folders(data_dir)))
    raise DataError(
        f"{preset.name}, budget {budget}: the data {' or '.join(names)} are not in {places}. Get them with: "
        f"{preset.fetch} (PYCNF_DATA names the folder, or data_dir)"
    )


def default_folder(name: str, budget: str) -> Path:
    """Return the folder of an experiment's records where none is named."""
    return Path("results") / "experiments" / (name if budget == "small" else f"{name}-{budget}")


def draw_result(result: BenchResult) -> list[Path]:
    """Draw fronts, the course of training, and work and precision of every set into the folder of a benchmark."""
    from pycnf.plots import save_figure
    from pycnf.plots_fronts import course_figure, front_figure, precision_figure

    drawn = []
    for data in result.data:
        if result.comparison(data).finished(PLAIN):
            for name, draw in (("front", front_figure), ("course", course_figure), ("precision", precision_figure)):
                drawn.append(save_figure(draw(result, data), result.folder / f"{name}-{data}.svg"))
    return drawn


def _arms(regularizers: str | Sequence[str]) -> tuple[str, ...]:
    words = [regularizers] if isinstance(regularizers, str) else regularizers
    return (PLAIN, *(word for given in words for word in given.split() if word != PLAIN))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


__all__ = [
    "KINDS",
    "default_folder",
    "draw_result",
    "find_data",
    "plan_experiment",
    "preset_settings",
    "run_experiment",
]
