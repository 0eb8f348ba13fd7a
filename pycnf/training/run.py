"""One training run, from its checked inputs to its result."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer

from pycnf.records import device_name
from pycnf.regularizers import Regularizer, describe_regularizers
from pycnf.solution import SolveError
from pycnf.training.batches import Batches, Rows, preserved_rng
from pycnf.training.engine import AtomicCheckpointIO, FlowModule, NonFiniteLoss, Recorder
from pycnf.training.folder import CHECKPOINT, WEIGHTS, Row, RunFolder, write_weights
from pycnf.training.keeper import Keeper, interruptible
from pycnf.training.options import TrainingOptions
from pycnf.training.results import FitResult, TrainingError, TrainingInterrupted
from pycnf.training.task import Task

RESIDENT = 2 * 2**30  # bytes of training rows that are moved to a GPU once instead of batch by batch
_COLUMNS = ("step", "split", "loss", "nll", "nfe", "nfe_backward", "accepted", "rejected", "stopped", "lr")
_RESULTS = (
    "nll",
    "best_step",
    "stopped",
    "seconds",
    "nfe_train",
    "nfe_train_last",
    "nfe_backward",
    "nfe_backward_last",
)


class Run:
    """Carry one run from its checked inputs to its result."""

    def __init__(
        self,
        task: Task,
        rows: Rows,
        held_out: Rows | None,
        options: TrainingOptions,
        device: torch.device,
        folder: RunFolder | None,
        label: str | None,
        callbacks: tuple[Any, ...],
    ) -> None:
        self.task, self.flow, self.rows, self.options = task, task.model, rows, options
        self.device, self.folder, self.callbacks = device, folder, callbacks
        self.home = next(self.flow.parameters()).device
        self.began = datetime.now(UTC)
        checkpoint = None if folder is None else folder.checkpoint
        self.start = 0 if checkpoint is None else int(checkpoint["global_step"])
        columns = [*_COLUMNS, *task.columns, *_penalty_columns(task.regularizers), "seconds"]
        self.recorder = Recorder(folder, columns, lr=options.lr, bar=label)
        self.keeper = Keeper(task, held_out, options, folder, self.recorder)
        if folder is not None and checkpoint is not None:
            self._restore(checkpoint)
            self.recorder.history = folder.read_metrics(self.start, self.keeper.validated)

    def _restore(self, checkpoint: Row) -> None:
        weights = {k.removeprefix("flow."): v for k, v in checkpoint["state_dict"].items() if k.startswith("flow.")}
        try:
            self.flow.load_state_dict(weights)
        except RuntimeError as err:
            raise ValueError(f"cannot resume: the checkpoint is of another flow: {err}") from err
        self.keeper.step = self.keeper.saved = self.start
        self.keeper.load_state_dict(checkpoint["callbacks"]["Keeper"])

    def execute(self, data_name: str | None) -> FitResult:
        """Train, then leave flow, files and random generators in order whatever happened."""
        stopped, error, clock = "max_steps", None, time.perf_counter()
        if self.folder is not None:
            self.folder.begin()
        self._record(data_name, "running")
        with preserved_rng(self.device):
            try:
                self._train()
                stopped = "plateau" if self.keeper.plateaued else "max_steps"
            except KeyboardInterrupt:
                stopped = "interrupted"
            except BaseException as err:
                error = err
            self._settle()
        seconds = time.perf_counter() - clock
        if error is not None:
            status = "interrupted" if isinstance(error, SystemExit) else "failed"
            cause = str(error) or type(error).__name__
            with suppress(OSError):  # a full disk may be the cause
                self.recorder.close()
                self._record(data_name, status, error=cause, seconds_total=seconds)
            self._raise(error)
        self.recorder.close()
        result = self._result(stopped)
        if self.folder is not None:
            write_weights(self.folder.path / WEIGHTS, self.flow.state_dict())
        status = "interrupted" if result.interrupted else "finished"
        self._record(data_name, status, result, seconds_total=seconds)
        if result.interrupted:
            raise TrainingInterrupted(self._interrupted_message(), result)
        return result

    def _train(self) -> None:
        """Run the steps that are left, and validate the last weights where the schedule has not."""
        if not self.keeper.plateaued and self.start < self.options.max_steps:
            self._run_lightning()
        if self.keeper.validated != self.keeper.step:
            self.flow.to(self.device)
            self.keeper.validate(self.recorder.lr)

    def _run_lightning(self) -> None:
        self.flow.train()
        resident = sum(part.nbytes for part in self.rows if part is not None) <= RESIDENT
        rows = _to(self.rows, self.device) if resident else self.rows
        module = FlowModule(self.task, self.options)
        with _quiet():
            trainer = Trainer(
                accelerator="gpu" if self.device.type == "cuda" else "cpu",
                devices=[self.device.index or 0] if self.device.type == "cuda" else 1,
                max_steps=self.options.max_steps,
                max_epochs=-1,
                gradient_clip_val=self.options.clip,
                callbacks=[self.recorder, self.keeper, *self.callbacks],
                plugins=[AtomicCheckpointIO(), LightningEnvironment()],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
            )
            path = None if self.folder is None or not self.start else str(self.folder.path / CHECKPOINT)
            batches = Batches(rows, self.options.batch_size, self.options.seed, self.start)
            try:
                with interruptible(self.keeper):
                    trainer.fit(module, batches, ckpt_path=path)
            except SystemExit as err:
                if not self.keeper.caught_interrupt:
                    raise
                raise KeyboardInterrupt from err  # what Lightning made a SystemExit of

    def _settle(self) -> None:
        """Give the flow its best weights, and put it back where it was, in evaluation mode."""
        if self.keeper.best is not None:
            self.flow.load_state_dict(self.keeper.best)
        self.flow.zero_grad(set_to_none=True)
        self.flow.to(self.home).eval()

    def _raise(self, error: BaseException) -> None:
        if not isinstance(error, (SolveError, NonFiniteLoss)):
            raise error
        step = self.keeper.step + (1 if self.keeper.in_step else 0)
        task = "step" if self.keeper.in_step else "the validation after step"
        message = f"training failed in {task} {step}: {error}"
        if self.folder is not None and self.keeper.saved >= 0:
            message += f" The checkpoint of step {self.keeper.saved} is kept in {self.folder.path}."
        raise TrainingError(message, step=step, folder=None if self.folder is None else self.folder.path) from error

    def _interrupted_message(self) -> str:
        message = f"training was interrupted after step {self.keeper.step}"
        if self.folder is not None and self.keeper.saved >= 0:
            message += f"; go on from step {self.keeper.saved} in {self.folder.path} with resume=True"
        return message

    def _result(self, stopped: str) -> FitResult:
        rows = [row for row in self.recorder.history if row["split"] == "train"]
        tail = rows[-max(1, len(rows) // 10) :]
        validated = self.keeper.best is not None
        return FitResult(
            nll=self.keeper.best_nll if validated else None,
            best_step=self.keeper.best_step if validated else self.keeper.step,
            steps=self.keeper.step,
            stopped=stopped,
            seconds=sum(row["seconds"] for row in rows),
            nfe_train=_mean(rows, "nfe"),
            nfe_train_last=_mean(tail, "nfe"),
            nfe_backward=_mean(rows, "nfe_backward"),
            nfe_backward_last=_mean(tail, "nfe_backward"),
            history=self.recorder.history,
            options=self.options,
            device=device_name(self.device),
            folder=None if self.folder is None else self.folder.path,
        )

    def _record(self, data_name: str | None, status: str, result: FitResult | None = None, **more: Any) -> None:
        if self.folder is None:
            return
        fields: Row = {
            "data": data_name,
            "regularizer": describe_regularizers(self.task.regularizers),
            "seed": self.options.seed,
            **self.task.describe(),
            "parameters": sum(p.numel() for p in self.flow.parameters()),
            "started": self.began.isoformat(timespec="seconds"),
            "steps": self.keeper.step,
        }
        if result is not None:
            fields |= {name: getattr(result, name) for name in _RESULTS}
        self.folder.write_record(status, self.device, **fields, **more)


def _penalty_columns(terms: Sequence[Regularizer]) -> list[str]:
    """Name the columns as :func:`pycnf.objective.objective` names the penalties."""
    names: list[str] = []
    for i, term in enumerate(terms):
        names.append(term.name if term.name not in names else f"{term.name}-{i}")
    return [f"{kind}_{name}" for kind in ("penalty", "weight") for name in names]


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows) if rows else math.nan


def _to(rows: Rows, device: torch.device) -> Rows:
    table, context = rows
    return table.to(device), None if context is None else context.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's notes about itself out of the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
