"""One run of a benchmark, in a form that another process can take up, and its record."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycnf.experiments.pool import Report
from pycnf.experiments.runs import FAILURES, digest, train_and_test
from pycnf.experiments.setup import Setup
from pycnf.experiments.workloads import TABLES, Row, Workload
from pycnf.records import read_json, run_record, write_json
from pycnf.regularizers import parse_regularizers

FAILED, CRASHED = "failed", "crashed"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Hold one run of a benchmark.

    Attributes:
        source: Name or path of the data set.
        data: Name of the loaded set.
        data_dir: Folder of the benchmark tables, None for the usual ones.
        rows: Fingerprint of the set.
        regularizer: Regularizer of the arm.
        seed: Seed.
        setup: What it is trained and tested with.
        tolerances: Test tolerances at which evaluations and errors are measured.
        sweep_rows: Test rows on which they are.
        truth_rows: Rows of these at which the error of log p is measured.
        records: Folder of the record.
        runs: Folder of the run folder, which may be large.
        overwrite: Whether a run that was begun is dropped.
        command: Command to record.
        workers: Number of processes that share the machine.
        work: What is trained, and how it is tested.
        figures: Folder for figures of what the model has learned; None draws nothing.
    """

    source: str
    data: str
    data_dir: Path | None
    rows: str
    regularizer: str
    seed: int
    setup: Setup
    tolerances: tuple[float, ...]
    sweep_rows: int
    truth_rows: int
    records: Path
    runs: Path
    overwrite: bool
    command: str
    workers: int
    work: Workload = TABLES
    figures: Path | None = None

    @property
    def configuration(self) -> Row:
        """What the outcome depends on, as plain values."""
        return {
            "data": self.data,
            "rows": self.rows,
            "regularizer": self.regularizer,
            "seed": self.seed,
            "setup": self.setup.to_dict(),
            "test_tolerances": list(self.tolerances),
            "sweep_rows": self.sweep_rows,
            "truth_rows": self.truth_rows,
            **self.work.describe(),
        }

    @property
    def name(self) -> str:
        """Name of its files; no two runs have the same."""
        return f"{self.slug}-seed{self.seed}-{digest(self.configuration)}"

    @property
    def slug(self) -> str:
        """Set and regularizer in file names."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.data}-{self.regularizer}").strip("-")[:80]

    @property
    def record(self) -> Path:
        """File of the record."""
        return self.records / f"{self.name}.json"

    @property
    def title(self) -> str:
        """What it is, for messages."""
        return f"{self.data}, {self.regularizer}, seed {self.seed}"

    def read(self) -> Row | None:
        """Return the record where there is one of this very configuration."""
        try:
            row: Row = read_json(self.record)
            return row if row["configuration"] == self.configuration and row["status"] else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing or damaged
            return None

    def write(self, row: Row) -> Row:
        """Write the record, and return it."""
        row = {"experiment": "bench", "workers": self.workers, **row, "configuration": self.configuration}
        write_json(self.record, row)
        return row


def perform(job: Job, report: Report) -> None:
    """Train and test, and write the record; a failure is recorded with its message.

    Args:
        job: What to do; the run folder is resumed where it holds a checkpoint.
        report: Is told every training step; it may raise KeyboardInterrupt to stop.

    Raises:
        OSError: The record could not be written.
    """
    try:
        row = train_and_test(
            _load(job.work, job.source, job.data_dir),
            parse_regularizers(job.regularizer),
            job.seed,
            job.setup,
            work=job.work,
            folder=job.runs / job.name,
            resume=False if job.overwrite else "auto",
            overwrite=job.overwrite,
            progress=False,
            callbacks=[_reporter(report)],
            test_tolerances=job.tolerances,
            sweep_rows=job.sweep_rows,
            truth_rows=job.truth_rows,
            command=job.command,
            loaded_from=job.source,
            figures=None if job.figures is None else job.figures / job.slug,
        )
    except FAILURES as err:
        row = failure(job, FAILED, str(err))
    except Exception as err:
        row = failure(job, CRASHED, f"{type(err).__name__}: {err}")
    job.write(row)


def failure(job: Job, status: str, message: str) -> Row:
    """Return the row of a run that came to nothing: "failed" by what it computes, "crashed" by what is around it."""
    setup = job.setup
    fields = {
        "data": job.data,
        "regularizer": job.regularizer,
        "arm": job.regularizer,
        "seed": job.seed,
        "rtol": setup.rtol,
        "atol": setup.atol,
        "test_rtol": setup.test_rtol,
        "test_atol": setup.test_atol,
        "status": status,
        "error": message,
        "tolerances": [],
        "curve": {},
    }
    return run_record(device=setup.device, command=job.command, **fields)


@functools.lru_cache(maxsize=1)
def _load(work: Workload, source: str, data_dir: Path | None) -> Any:
    return work.load(source, data_dir)


def _reporter(report: Report) -> Any:
    """Return a Lightning callback that reports every step."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    class Reporter(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            report(trainer.global_step)

    return Reporter()


__all__ = ["CRASHED", "FAILED", "Job", "failure", "perform"]
