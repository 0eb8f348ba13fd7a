"""Compare regularizers at the same solver tolerance, over seeds, with everything else equal."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycnf.data import Dataset, load
from pycnf.experiments.arms import Arm, describe_tolerance, parse_arms, parse_seeds
from pycnf.experiments.results import ComparisonResult
from pycnf.experiments.runs import FAILURES, data_fingerprint, digest, identify, train_and_test
from pycnf.experiments.setup import setup_for, setup_on
from pycnf.experiments.workloads import Row
from pycnf.records import read_json, write_json

RECORD = "comparison.json"
RUNS = "runs"
TEST_TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
ARMS = ("none", "tpr:weight=5", "default")


def compare(
    data: str | Path | Dataset = "power",
    regularizers: str | Sequence[str] = ARMS,
    seeds: int | str | Sequence[int] = 3,
    *,
    output: str | Path | None = None,
    data_dir: str | Path | None = None,
    allow_unequal_tolerance: bool = False,
    test_tolerances: Sequence[float] = TEST_TOLERANCES,
    overwrite: bool = False,
    progress: bool = True,
    command: str | None = None,
    **settings: Any,
) -> ComparisonResult:
    """Train and test every arm with every seed, all at the same solver tolerance.

    The arms of a seed start from the same weights, see the same batches and run one after the other, in an
    order that alternates from seed to seed, so that differences can be taken seed by seed. The test uses the
    exact divergence.

    With ``output`` every run is recorded when it ends, under ``runs/``, and the whole in ``comparison.json``.
    Calling again goes on where the last call ended: runs that are recorded with the same configuration are
    not made again, an interrupted one is resumed. A run that fails is recorded with its message, and the
    others go on.

    Args:
        data: Name or path of a data set (see :func:`~pycnf.data.loading.load`), or the set itself.
        regularizers: The arms, see :func:`~pycnf.experiments.arms.parse_arms`; the first is the reference.
        seeds: A number N for 0 ... N-1, or the seeds.
        output: Folder for records and runs; None keeps nothing.
        data_dir: Folder with the files of the benchmark tables.
        allow_unequal_tolerance: Accept arms at different tolerances, and say so wherever they appear.
        test_tolerances: Tolerances (rtol = atol) at which the test is repeated, to show what the tolerance
            alone does to the number of evaluations.
        overwrite: Make all runs again.
        progress: Report on stderr.
        command: Command to record; None for that of this process.
        **settings: Settings of :class:`~pycnf.experiments.setup.Setup` that replace those of the data's preset.

    Returns:
        Rows and statistics (:class:`~pycnf.experiments.results.ComparisonResult`).

    Raises:
        ValueError: Data, arms, seeds or settings are not usable; nothing was run.
        KeyboardInterrupt: Ctrl-C; what is finished is recorded.
        OSError: A file could not be written; earlier files stay readable.
    """
    seeds = parse_seeds(seeds)
    name = data.name if isinstance(data, Dataset) else str(data)
    setup = setup_for(name, settings)
    parse_arms(regularizers, setup, allow_unequal_tolerance=allow_unequal_tolerance)
    for tolerance in test_tolerances:
        dataclasses.replace(setup, test_rtol=tolerance, test_atol=tolerance)
    dataset = data if isinstance(data, Dataset) else load(data, data_dir=data_dir)
    setup = setup_on(dataset, name, settings)
    arms = parse_arms(regularizers, setup, allow_unequal_tolerance=allow_unequal_tolerance)
    folder = None if output is None else Path(output)
    loaded_from = None if isinstance(data, Dataset) else str(data)
    comparison = _Comparison(
        dataset, arms, seeds, tuple(test_tolerances), folder, overwrite, progress, command, loaded_from
    )
    result = ComparisonResult(
        rows=comparison.rows,
        data=dataset.name,
        arms=tuple(arm.label for arm in arms),
        seeds=seeds,
        setup=setup.to_dict(),
        equal_tolerance=len({arm.tolerance for arm in arms}) == 1,
        command=command,
        folder=folder,
    )
    try:
        comparison.run()
    except BaseException:
        if folder is not None:
            with contextlib.suppress(OSError):  # a full disk may be the cause
                dataclasses.replace(result, status="interrupted").save(folder / RECORD)
        raise
    if folder is not None:
        result.save(folder / RECORD)
    return result


class _Comparison:
    """Carry out the runs of a comparison, those that are not recorded yet."""

    def __init__(
        self,
        data: Dataset,
        arms: tuple[Arm, ...],
        seeds: tuple[int, ...],
        test_tolerances: tuple[float, ...],
        folder: Path | None,
        overwrite: bool,
        progress: bool,
        command: str | None,
        loaded_from: str | None,
    ) -> None:
        self.loaded_from = loaded_from
        self.data, self.arms, self.seeds, self.test_tolerances = data, arms, seeds, test_tolerances
        self.folder, self.overwrite, self.progress, self.command = folder, overwrite, progress, command
        self.rows: list[Row] = []
        self.fingerprint = data_fingerprint(data)
        self.spent: list[float] = []

    def run(self) -> None:
        """Make the runs, the arms of a seed next to each other, in alternating order."""
        plan = [
            (arm, seed) for i, seed in enumerate(self.seeds) for arm in (self.arms if i % 2 == 0 else self.arms[::-1])
        ]
        if self.folder is not None:
            (self.folder / RUNS).mkdir(parents=True, exist_ok=True)
        for number, (arm, seed) in enumerate(plan, 1):
            self._one(arm, seed, f"[{number}/{len(plan)}] {arm.label}, seed {seed}", left=len(plan) - number)

    def _one(self, arm: Arm, seed: int, title: str, left: int) -> None:
        configuration = self._configuration(arm, seed)
        path = self._path(arm, seed, configuration)
        row = self._recorded(path, configuration)
        if row is not None:
            self.rows.append(row | {"arm": arm.label})
            self._say(f"{title}: {_outcome(row)} (recorded before)")
            return
        began = time.perf_counter()
        try:
            row = self._train(arm, seed, title, path)
        except FAILURES as err:
            named = identify(self.data, arm.terms, seed, arm.setup, label=arm.label, command=self.command)
            row = named | {"status": "failed", "error": str(err), "tolerances": [], "curve": {}}
        row |= {
            "arm": arm.label,
            "setup": arm.setup.to_dict(),
            "run": None if path is None else f"{RUNS}/{path.stem}",
        }
        self.rows.append(row)
        if path is not None:
            write_json(path, {"configuration": configuration, "row": row})
        self.spent.append(time.perf_counter() - began)
        minutes = left * sum(self.spent) / len(self.spent) / 60
        remaining = f"; about {minutes:.1f} min left" if left else ""
        self._say(f"{title}: {_outcome(row)}{remaining}")

    def _train(self, arm: Arm, seed: int, title: str, path: Path | None) -> Row:
        folder = None if path is None else path.with_suffix("")
        return train_and_test(
            self.data,
            arm.terms,
            seed,
            arm.setup,
            label=arm.label,
            folder=folder,
            resume=False if self.overwrite else "auto",
            overwrite=self.overwrite and folder is not None,
            progress=(title if len(title) <= 60 else title[:59] + "…") if self.progress else False,
            test_tolerances=self.test_tolerances,
            command=self.command,
            loaded_from=self.loaded_from,
        )

    def _configuration(self, arm: Arm, seed: int) -> Row:
        return {
            "data": self.data.name,
            "rows": self.fingerprint,
            "regularizer": arm.regularizer,
            "seed": seed,
            "setup": arm.setup.to_dict(),
            "test_tolerances": list(self.test_tolerances),
        }

    def _path(self, arm: Arm, seed: int, configuration: Row) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / RUNS / f"{arm.slug}-seed{seed}-{digest(configuration)}.json"

    def _recorded(self, path: Path | None, configuration: Row) -> Row | None:
        if path is None or self.overwrite or not path.is_file():
            return None
        try:
            record = read_json(path)
            row: Row = record["row"]
            return row if record["configuration"] == configuration and row["status"] else None
        except (ValueError, KeyError, TypeError):  # damaged: make the run again
            return None

    def _say(self, text: str) -> None:
        if self.progress:
            print(text, file=sys.stderr, flush=True)


def announce(data: str, arms: Sequence[Arm], seeds: Sequence[int]) -> str:
    """Say in a line what is about to be compared, and at which tolerance."""
    tolerances = {arm.tolerance for arm in arms}
    at = describe_tolerance(arms[0].setup) if len(tolerances) == 1 else "UNEQUAL tolerances"
    return f"{data}: {' | '.join(arm.label for arm in arms)}; seeds {', '.join(map(str, seeds))}; {at}"


def _outcome(row: Row) -> str:
    if row["status"] == "failed":
        return f"failed: {row['error']}"
    return (
        f"held-out NLL {row['nll']:.4f} ± {row['nll_se']:.4f} nats, evaluations {row['nfe_train']:.1f} "
        f"in training and {row['nfe_test']:.1f} in test, {row['seconds']:.1f} s"
    )
