"""Options of a training run, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

OptimizerName = Literal["adam", "adamw", "adamax"]
ScheduleName = Literal["auto", "plateau", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Hold the options of a training run.

    The plateau schedule is the one of the TPR paper: every ``validate_every`` steps the held-out NLL is
    computed; after ``patience`` validations in a row without a new best the learning rate is divided by 10;
    after ``lr_drops`` such drops the next one stops the run instead.

    Attributes:
        max_steps: Number of optimizer steps at most.
        batch_size: Rows per step.
        eval_batch_size: Rows per batch in validation; None takes ``batch_size``. The number of function
            evaluations of a batch grows slowly with its size, because its hardest row sets the step.
        lr: Learning rate at the start.
        weight_decay: Weight decay: an L2 term in the gradient for adam and adamax, decoupled for adamw.
        optimizer: "adam", "adamw" or "adamax".
        schedule: "plateau" (see above; needs validation data), "cosine" (from ``lr`` to 0 at ``max_steps``),
            "constant", or "auto": plateau where validation data are given, cosine where not.
        patience: Validations in a row without improvement before the learning rate drops.
        lr_drops: Drops of the learning rate before the run stops.
        validate_every: Steps between two validations, and between two checkpoints.
        warm_start: Whether each solve starts with the step that the last solve's experience suggests, in training
            and from batch to batch of a validation. Otherwise the method chooses it anew every time, which costs an
            evaluation and usually a needlessly short step.
        clip: Largest 2-norm of the gradient of all parameters; None leaves it as it is.
        seed: Seed of everything random in training: order of the rows, divergence probes, sampled times.
            What is random in step s depends on (seed, s) alone, so a resumed run repeats the same draws.
        device: "auto" (a GPU where there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: An option is out of its range; the message names it.

    Example:
        >>> TrainingOptions(max_steps=100).lr
        0.001
        >>> TrainingOptions(lr=-1.0)
        Traceback (most recent call last):
            ...
        ValueError: expected a finite lr > 0, got -1.0
    """

    max_steps: int = 10_000
    batch_size: int = 1000
    eval_batch_size: int | None = None
    lr: float = 1e-3
    weight_decay: float = 0.0
    optimizer: OptimizerName = "adam"
    schedule: ScheduleName = "auto"
    patience: int = 20
    lr_drops: int = 2
    validate_every: int = 200
    warm_start: bool = True
    clip: float | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check every option."""
        for name, least in (
            ("max_steps", 1),
            ("batch_size", 1),
            ("patience", 1),
            ("lr_drops", 0),
            ("validate_every", 1),
        ):
            _check_int(name, getattr(self, name), least)
        if self.eval_batch_size is not None:
            _check_int("eval_batch_size", self.eval_batch_size, 1)
        _check_int("seed", self.seed, 0)
        _check_float("lr", self.lr, positive=True)
        _check_float("weight_decay", self.weight_decay, positive=False)
        if self.clip is not None:
            _check_float("clip", self.clip, positive=True)
        _check_choice("optimizer", self.optimizer, get_args(OptimizerName))
        _check_choice("schedule", self.schedule, get_args(ScheduleName))
        resolve_device(self.device, available=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a plain dict, from which ``TrainingOptions(**...)`` rebuilds them."""
        return asdict(self)


def resolve_device(device: str, *, available: bool = True) -> torch.device:
    """Return the torch device that a name stands for.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        available: Also require the device to be there.

    Raises:
        ValueError: The name is not one of these, or there is no such device.
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}: choose auto, cpu, cuda or cuda:N")
    if found.type == "cpu":
        return torch.device("cpu")
    found = torch.device("cuda", found.index or 0)
    if available and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} asked for, but torch sees no GPU: take device='cpu'")
    if available and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} asked for, but torch sees {torch.cuda.device_count()} GPU")
    return found


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected an integer {name} >= {least}, got {value!r}")


def _check_float(name: str, value: object, *, positive: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):  # type: ignore[operator]
        raise ValueError(f"expected a finite {name} {'>' if positive else '>='} 0, got {value!r}")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")
