"""Compare regularizers: sets × arms × seeds at equal tolerance, in several processes, one record a run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pycnf.experiments.arms import parse_arms, parse_seeds
from pycnf.experiments.bench_results import PLAIN, RUNS, BenchResult, check_protocol, load_bench
from pycnf.experiments.budgets import Budget, read_budget
from pycnf.experiments.jobs import CRASHED, Job, failure, perform
from pycnf.experiments.pool import Event, run_parallel
from pycnf.experiments.progress import Progress
from pycnf.experiments.runs import data_fingerprint
from pycnf.experiments.setup import Setup
from pycnf.records import command_line
from pycnf.training.folder import make_folder


def bench(
    budget: str | Path | Budget = "small",
    *,
    data: str | Sequence[str] | None = None,
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
    """Train and test every regularizer on every set with every seed, the arms of a set at the same tolerance.

    Each run is recorded in a file of its own when it ends. Calling again goes on where the last call ended: runs
    that are recorded are not made again, interrupted ones are resumed from their last checkpoint. Arms, sets and
    seeds can be added later with the same ``output``; all runs of a set in one folder share setup, data and
    tolerances. A run that fails is recorded with its message, and the others go on; one that ended for a reason
    outside of it (its process was killed, memory ran out) is tried again by the next call.

    Args:
        budget: What to run: "small", "paper", a TOML file (:func:`~pycnf.experiments.budgets.read_budget`) or a
            :class:`~pycnf.experiments.budgets.Budget`. The next three replace what it names.
        data: Names or paths of sets; a string lists them with commas.
        regularizers: The arms, see :func:`~pycnf.experiments.arms.parse_arms`; "none", the plain arm, is the
            reference and must be among them.
        seeds: A number N for 0 ... N-1, or the seeds.
        jobs: Processes at a time, each with one torch thread. None takes one a core, or one for a GPU; 1 works in
            this process. Wall-clock times mean something where there are no more than cores.
        output: Folder of the records, ``results/regularizers-BUDGET`` if None.
        runs: Folder of checkpoints and curves, ``runs/`` with the name of ``output`` if None.
        data_dir: Folder with the files of the benchmark tables.
        overwrite: Make the runs again.
        progress: Report on stderr.
        command: Command to record; None for that of this process.
        **settings: Settings of :class:`~pycnf.experiments.setup.Setup` for all sets.

    Returns:
        All runs that are recorded in the folder (:class:`~pycnf.experiments.bench_results.BenchResult`).

    Raises:
        ValueError: Data, arms, seeds or settings are not usable, or the folder holds runs of a set with other
            settings; nothing was run.
        KeyboardInterrupt: Ctrl-C; what is finished is recorded.
        OSError: A file could not be written.
    """
    chosen = budget if isinstance(budget, Budget) else read_budget(budget)
    folder = default_output(chosen) if output is None else Path(output)
    shared: dict[str, Any] = {
        "data_dir": None if data_dir is None else Path(data_dir),
        "records": folder / RUNS,
        "runs": Path(RUNS) / folder.name if runs is None else Path(runs),
        "overwrite": overwrite,
        "command": command or command_line(),
        "work": chosen.work,
    }
    names = list(chosen.data) if data is None else split_names(data)
    specs = chosen.regularizers if regularizers is None else regularizers
    arms = _plan_arms(chosen, names, specs, settings, jobs, shared)
    plan = _order(arms, parse_seeds(chosen.seeds if seeds is None else seeds), folder if chosen.figures else None)
    if (folder / RUNS).is_dir():
        check_protocol([*load_bench(folder).rows, *({"configuration": job.configuration} for job in plan)])
    todo = [job for job in plan if overwrite or (job.read() or {"status": CRASHED})["status"] == CRASHED]
    make_folder(folder / RUNS)
    try:
        with Progress(todo, done=len(plan) - len(todo), shown=progress) as watch:
            _run(todo, watch)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):  # a full disk may be the cause
            load_bench(folder).save(command=shared["command"], budget=chosen.name, status="interrupted")
        raise
    result = load_bench(folder)
    result.save(command=shared["command"], budget=chosen.name)
    return result


def default_output(budget: Budget) -> Path:
    """Return the folder of a budget's records where none is named."""
    return Path("results") / f"regularizers-{budget.name}"


def split_names(names: str | Sequence[str]) -> list[str]:
    """Read names of sets, of which a string lists several with commas.

    Raises:
        ValueError: There is none, or one is given twice.

    >>> split_names("power,moons")
    ['power', 'moons']
    """
    words = [word.strip() for word in names.split(",")] if isinstance(names, str) else [str(name) for name in names]
    found = [word for word in words if word]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"expected at least one data set, all different, got {names!r}")
    return found


def _plan_arms(
    budget: Budget,
    names: Sequence[str],
    specs: str | Sequence[str],
    settings: dict[str, Any],
    jobs: int | None,
    shared: dict[str, Any],
) -> list[list[Job]]:
    """List the arms of each set, as jobs with seed 0."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"expected jobs >= 1, got {jobs}")
    for name in names:  # before any data are read
        _check_setup(budget.work.setup(name, budget.settings_for(name, settings)), specs)
    planned: list[list[Job]] = []
    for name in names:
        dataset = budget.work.load(name, shared["data_dir"])
        if dataset.name in [other[0].data for other in planned]:
            raise ValueError(f"two sets have the name {dataset.name!r}: rename a file")
        setup = budget.work.setup(name, budget.settings_for(name, settings), dataset)
        common: dict[str, Any] = {
            "source": name,
            "data": dataset.name,
            "rows": data_fingerprint(dataset),
            "seed": 0,
            "sweep_rows": budget.sweep_rows,
            "truth_rows": budget.truth_rows,
            "workers": jobs or (_cores() if setup.device == "cpu" else 1),
        }
        planned.append(
            [
                Job(
                    regularizer=arm.regularizer,
                    setup=arm.setup,
                    tolerances=tuple(sorted({*budget.tolerances, arm.setup.test_rtol}, reverse=True)),
                    **common,
                    **shared,
                )
                for arm in parse_arms(specs, setup)
            ]
        )
    return planned


def _check_setup(setup: Setup, specs: str | Sequence[str]) -> None:
    arms = parse_arms(specs, setup)
    if PLAIN not in [arm.regularizer for arm in arms]:
        raise ValueError(f"expected {PLAIN!r} among the regularizers: the others are compared with it")
    _, _, rtol, atol = arms[0].tolerance
    if not setup.adaptive or rtol != atol:
        raise ValueError(
            "expected an adaptive method, tested at rtol = atol: the benchmark varies this tolerance, got "
            f"{setup.method} at {rtol:g} and {atol:g}"
        )


def _order(arms: Sequence[Sequence[Job]], seeds: Sequence[int], figures: Path | None) -> list[Job]:
    """Take seed after seed, and in it the arms of a set next to each other, in alternating order."""
    plan: list[Job] = []
    for i, seed in enumerate(seeds):
        own: dict[str, Any] = {"seed": seed, "figures": None if i else figures}
        for jobs in arms:
            plan += [dataclasses.replace(job, **own) for job in (jobs if i % 2 == 0 else jobs[::-1])]
    return plan


def _run(todo: Sequence[Job], progress: Progress) -> None:
    workers = max((job.workers for job in todo), default=1)
    if workers > 1:

        def watch(event: Event, index: int, value: int) -> None:
            if event == "died":
                todo[index].write(failure(todo[index], CRASHED, f"its process ended with exit code {value}"))
            progress.show(event, index, value)

        run_parallel(perform, todo, workers, watch)
        return
    with _one_thread():
        for index, job in enumerate(todo):
            progress.show("started", index, 0)
            perform(job, functools.partial(progress.show, "step", index))
            progress.show("finished", index, 0)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Work with one torch thread, as the processes of a pool do, so that times can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


__all__ = ["bench", "default_output", "split_names"]
