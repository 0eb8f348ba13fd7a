"""What a training run gives back, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pycnf.training.folder import Row
from pycnf.training.options import TrainingOptions


class TrainingError(RuntimeError):
    """Report a run that failed; the cause is chained.

    Attributes:
        step: The step that failed, counted from 1.
        folder: The run folder, or None.
    """

    def __init__(self, message: str, *, step: int, folder: Path | None) -> None:
        super().__init__(message)
        self.step, self.folder = step, folder


class TrainingInterrupted(KeyboardInterrupt):
    """Report a run that was interrupted (Ctrl-C) and left in order.

    Attributes:
        result: What the run came to, as :func:`~pycnf.training.loop.fit` would have returned it.
    """

    def __init__(self, message: str, result: FitResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Hold what a training run came to.

    Attributes:
        nll: Held-out NLL of the weights that the flow has now, in nats: the lowest of all validations. None
            without validation data.
        best_step: Step of these weights.
        steps: Steps done.
        stopped: "max_steps", "plateau" or "interrupted".
        seconds: Wall-clock time of the steps (batch, solve, backward pass, update), without validation,
            checkpoints and logs.
        nfe_train: Function evaluations of one step, forward, all blocks together, mean over the run.
        nfe_train_last: The same over the last tenth of the steps.
        nfe_backward: Function evaluations of one step, backward, mean over the run.
        nfe_backward_last: The same over the last tenth of the steps.
        history: Rows of numbers by step; "split" tells training rows (loss, nll, nfe, nfe_backward, accepted,
            rejected, stopped, lr, seconds and the unweighted penalties) from validation rows (nll, nfe,
            accepted, rejected, lr, seconds).
        options: The options of the run, with "auto" resolved.
        device: Name of the processor.
        folder: The run folder, or None.
    """

    nll: float | None
    best_step: int
    steps: int
    stopped: str
    seconds: float
    nfe_train: float
    nfe_train_last: float
    nfe_backward: float
    nfe_backward_last: float
    history: list[Row]
    options: TrainingOptions
    device: str
    folder: Path | None = None

    @property
    def interrupted(self) -> bool:
        """Whether the run ended by an interrupt."""
        return self.stopped == "interrupted"

    def rows(self, split: str) -> list[Row]:
        """Return the rows of ``history`` of one split, "train" or "validation"."""
        return [row for row in self.history if row["split"] == split]
