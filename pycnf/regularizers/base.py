"""The protocol every regularizer follows, and the names by which regularizers are called."""

from __future__ import annotations

import abc
import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from pycnf.solution import BoundVelocity, Solution

REGISTRY: dict[str, type[Regularizer]] = {}

DEFAULT = "tpr:weight=0.005,degree=4,times=6,law=stratified,channels=both,unit=tolerance"
"""The regularizer that is called "default", TPR of the degree of dopri5's dense output, on every channel that the step
control sees and in its units, at stratified times, which leave less to chance than uniform ones. It is the winner on
POWER in the recorded benchmarks (results/regularizers, results/regularizers-ablations)."""


@dataclass(frozen=True)
class Regularizer(abc.ABC):
    """Add ``weight * penalty`` to the training objective, summed over the blocks of a flow.

    A regularizer is a frozen dataclass: its fields are its settings. Before each solve of a block it may name
    sampled times and choose the end time; after the solve it turns the block's
    :class:`~pycnf.solution.Solution` into a scalar. Regularizers act in training only and never enter the step
    control. Neither do the calls of the field that a penalty makes count as the solve's: they are
    ``evaluations``, and 0 for most.

    Attributes:
        weight: Factor of the penalty, >= 0.
        start: Training step from which the regularizer acts.
        ramp: Training steps in which the weight then rises linearly from 0; 0 for all at once.
        stop: Training step from which it no longer acts; None for never.
        target_nfe: Evaluations of a training batch that the weight is steered to, once it has its full size: it is
            doubled over some hundred steps that spend twice as many, halved over as many that spend half; None to
            leave it.
        name: Name on the command line and in records.
        watches_steps: Whether :meth:`penalty` reads the accepted steps, ``solution.steps``.
    """

    weight: float
    start: int = field(default=0, kw_only=True)
    ramp: int = field(default=0, kw_only=True)
    stop: int | None = field(default=None, kw_only=True)
    target_nfe: float | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    watches_steps: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"expected a finite weight >= 0, got {self.weight}")
        if self.start < 0 or self.ramp < 0 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(
                f"expected start >= 0, ramp >= 0 and stop > start, got {self.start}, {self.ramp} and {self.stop}"
            )
        if self.target_nfe is not None and not (self.target_nfe > 0 and math.isfinite(self.target_nfe)):
            raise ValueError(f"expected target_nfe > 0 or None, got {self.target_nfe}")

    def scheduled(self, step: int) -> float:
        """Return the factor in [0, 1] that the schedule puts on the weight at a training step, counted from 0."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return 0.0
        return min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else 1.0

    @property
    def evaluations(self) -> int:
        """Calls of the field that one :meth:`penalty` makes, beyond those of the solve that ``stats`` count."""
        return 0

    def end_time(self, factor: float = 1.0) -> float | None:
        """Draw the end of one solve as a fraction of T; None for T.

        Args:
            factor: Factor on the weight at this step of training.
        """
        return None

    def sample_times(self) -> Tensor | None:
        """Draw the interior times of one solve as sorted fractions of T in (0, 1), (n,) float64; None for none."""
        return None

    @abc.abstractmethod
    def penalty(self, solution: Solution) -> Tensor:
        """Return the penalty of one block, a scalar.

        Args:
            solution: The block's solve, sampled at 0, the times this regularizer named, and the end.
        """

    def __str__(self) -> str:
        """Write the settings that differ from the defaults, as :func:`parse_regularizers` reads them."""
        settings = [
            f"{f.name}={_write(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if f.name == "weight" or getattr(self, f.name) != f.default
        ]
        return f"{self.name}:{','.join(settings)}"


def parse_regularizers(spec: str) -> list[Regularizer]:
    """Read a sum of regularizers such as ``"none"``, ``"tpr"`` or ``"tpr:weight=50,degree=1,channels=both"``.

    Terms are joined by ``+``; the settings of a term follow its name after a colon. ``"tpr"`` alone has the settings
    of its authors; ``"default"`` stands for those that the benchmark recommends (:data:`DEFAULT`).

    Raises:
        ValueError: On an unknown name or setting, with what is known.

    >>> [term.weight for term in parse_regularizers("tpr:weight=2.5+tpr:channels=logp")]
    [2.5, 5.0]
    """
    if spec.strip().lower() in ("none", ""):
        return []
    spec = DEFAULT if spec.strip() == "default" else spec
    return [_parse_term(term.strip()) for term in re.split(r"\+(?!\d)", spec)]


def describe_regularizers(regularizers: Iterable[Regularizer]) -> str:
    """Write regularizers as :func:`parse_regularizers` reads them, ``"none"`` for none."""
    return "+".join(str(r) for r in regularizers) or "none"


def check_regularizers(regularizers: Sequence[Regularizer] | Regularizer | None) -> tuple[Regularizer, ...]:
    """Return a tuple of regularizers, or say what was given instead.

    Raises:
        TypeError: When something else than a regularizer is given.
    """
    if regularizers is None:
        return ()
    if isinstance(regularizers, Regularizer):
        return (regularizers,)
    for r in regularizers:
        if not isinstance(r, Regularizer):
            raise TypeError(f"expected regularizers such as TPR(weight=5.0), got {r!r}")
    return tuple(regularizers)


def check_choice(setting: str, value: object, allowed: Sequence[str]) -> None:
    """Check that a setting is one of those allowed.

    Raises:
        ValueError: When it is not, with those that are.
    """
    if value not in allowed:
        raise ValueError(f"unknown {setting} {value!r}: choose one of {', '.join(allowed)}")


def bound_field(solution: Solution) -> BoundVelocity:
    """Return the velocity of the block that was solved.

    Raises:
        ValueError: When the solution holds none, as one that is made by hand.
    """
    if solution.field is None:
        raise ValueError("this regularizer evaluates the field: expected a solution of a flow, got one without field")
    return solution.field


def _parse_term(term: str) -> Regularizer:
    name, _, settings = term.partition(":")
    if name not in REGISTRY:
        raise ValueError(f"unknown regularizer {name!r}: choose none, default or one of {', '.join(sorted(REGISTRY))}")
    cls = REGISTRY[name]
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for setting in filter(None, settings.split(",")):
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or key not in known:
            raise ValueError(f"unknown setting {setting!r} of {name}: write key=value with a key of {', '.join(known)}")
        values[key] = _read(text, hints[key], f"{name}:{key}")
    return cls(**values)


def _read(text: str, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in options:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in options or any(typing.get_origin(option) is typing.Literal for option in options):
        return text
    raise ValueError(f"cannot read {text!r} for {where}")


def _write(value: Any) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
