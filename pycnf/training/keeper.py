"""The callback that watches over a run: validation, learning rate, best weights, checkpoints, interrupts."""

from __future__ import annotations

import math
import signal
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pycnf.training.batches import Rows, seed_all
from pycnf.training.engine import NonFiniteLoss, Recorder
from pycnf.training.folder import CHECKPOINT, WEIGHTS, RunFolder, write_weights
from pycnf.training.options import TrainingOptions
from pycnf.training.task import Task


class Keeper(Callback):
    """Validate, lower the learning rate, keep the best weights, write checkpoints, stop in time.

    A checkpoint is written only between two steps, so that it is always whole.
    """

    def __init__(
        self,
        task: Task,
        validation: Rows | None,
        options: TrainingOptions,
        folder: RunFolder | None,
        recorder: Recorder,
    ) -> None:
        self.task, self.flow, self.validation, self.options = task, task.model, validation, options
        self.folder, self.recorder = folder, recorder
        self.best: dict[str, Tensor] | None = None
        self.best_nll, self.best_step = math.inf, 0
        self.validated, self.saved, self.drops, self.step = 0, -1, 0, 0
        self.plateaued, self.in_step, self.interrupt, self.caught_interrupt = False, False, False, False
        self._plateau: ReduceLROnPlateau | None = None
        self._plateau_state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""
        plateau = None if self._plateau is None else dict(self._plateau.state_dict())
        names = ("best", "best_nll", "best_step", "validated", "drops", "plateaued")
        return {"plateau": plateau, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        state = dict(state_dict)
        self._plateau_state = state.pop("plateau")
        for name, value in state.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the schedule, and prove that a checkpoint can be written before any work is done."""
        self.step = trainer.global_step
        if self.options.schedule == "plateau":
            self._plateau = ReduceLROnPlateau(
                trainer.optimizers[0], factor=0.1, patience=self.options.patience - 1, threshold=0.0, eps=0.0
            )
            if self._plateau_state is not None:
                self._plateau.load_state_dict(self._plateau_state)
        if self.step == 0:
            self._save(trainer)
        elif self._due() and self.validated != self.step:
            self._validate(trainer)
        self.recorder.restart_clock()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enter a step."""
        self.in_step = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave a step; validate and save where it is time."""
        self.in_step, self.step = False, trainer.global_step
        if self.interrupt:
            raise KeyboardInterrupt
        if self._due():
            self._validate(trainer)
        if self._due() or self.step >= self.options.max_steps:
            self._save(trainer)
        self.recorder.restart_clock()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save an interrupted run where it stands, if it stands between two steps."""
        self.caught_interrupt = isinstance(exception, KeyboardInterrupt)
        ended = isinstance(exception, (KeyboardInterrupt, SystemExit))
        if ended and not self.in_step and self.step > max(self.saved, 0):
            self._save(trainer)

    def validate(self, lr: float) -> float | None:
        """Compute the held-out NLL, if there are held-out rows, and keep the weights if it is the best."""
        if self.validation is None:
            return None
        device = next(self.flow.parameters()).device
        size = self.options.eval_batch_size or self.options.batch_size
        seed_all(self.options.seed, self.step, stream=3, device=device)
        result = self.task.evaluate(self.validation, size, warm_start=self.options.warm_start)
        if not math.isfinite(result.nll):
            raise NonFiniteLoss(f"the held-out NLL is {result.nll}. Try: a smaller lr, gradient clipping (clip=1.0)")
        self.recorder.add_validation(self.step, lr, result)
        if result.nll < self.best_nll:
            self.best_nll, self.best_step = result.nll, self.step
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.flow.state_dict().items()}
            if self.folder is not None:
                write_weights(self.folder.path / WEIGHTS, self.best)
        return result.nll

    def _due(self) -> bool:
        return self.step % self.options.validate_every == 0

    def _validate(self, trainer: Trainer) -> None:
        lr = _lr(trainer.optimizers[0])
        nll = self.validate(lr)
        if nll is not None and self._plateau is not None and self.step >= self.task.settled:
            self._plateau.step(nll)
            if _lr(trainer.optimizers[0]) < lr:
                self.drops += 1
                if self.drops > self.options.lr_drops:
                    self.plateaued = trainer.should_stop = True
        self.validated = self.step  # last, so that an interrupt before it repeats the validation on resuming

    def _save(self, trainer: Trainer) -> None:
        self.recorder.flush()
        if self.folder is not None:
            trainer.save_checkpoint(self.folder.path / CHECKPOINT)
            if self.validation is None:
                write_weights(self.folder.path / WEIGHTS, self.flow.state_dict())
        self.saved = self.step


@contextmanager
def interruptible(keeper: Keeper) -> Iterator[None]:
    """Let the first Ctrl-C wait for the end of its step, so that the state can be saved.

    Lightning leaves SIGINT ignored after an interrupt; the handler from before is restored here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: types.FrameType | None) -> None:
        if keeper.in_step and not keeper.interrupt:
            keeper.interrupt = True
        else:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _lr(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
