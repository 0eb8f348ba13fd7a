r"""Adaptive Runge-Kutta steps: their control, what may be seen of them, and how they fail.

:class:`Stepper` takes the steps that torchdiffeq's adaptive methods take (same tableaus, initial step, error norm and
step-size rule) and decides them on the host, with one synchronization a step. What is integrated, and what happens
between the steps, is for its subclasses to say: :mod:`pycnf.backprop` samples a solve and differentiates through it,
:mod:`pycnf.adjoint` solves the adjoint equation backwards.

References:
    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, sections II.4 and II.6.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from pycnf.dynamics import Dynamics
from pycnf.solution import SolveError, SolveStats
from pycnf.tableau import tableau

Norm = Callable[[Tensor], Tensor]

SAFETY, MAX_FACTOR, MIN_FACTOR = 0.9, 10.0, 0.2
RESOLUTION = 16 * 2.0**-52  # smallest step, in units of t, that float64 still tells from none


class StepError(Exception):
    """End an integration that cannot go on; ``cause`` is "budget", "underflow" or "non-finite"."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass
class Progress:
    """Follow one integration: its counts, the last accepted time, the last step tried and its error over tolerance."""

    stats: SolveStats
    t: float
    step: float = math.nan
    ratio: float = math.nan
    max_nfe: int | None = None

    def spend(self) -> None:
        """Count one evaluation of the dynamics, if the budget has it."""
        if self.max_nfe is not None and self.stats.nfe >= self.max_nfe:
            raise StepError("budget")
        self.stats.nfe += 1


@dataclass(frozen=True)
class Attempt:
    """Show an observer one step that was tried.

    Attributes:
        t: Time at its start.
        h: Its size, in units of t, negative in a solve that runs backwards.
        y0: State at its start.
        y1: State at its end, were it accepted.
        error: Embedded error estimate over the tolerance, ``e / (atol + rtol * max(|y0|, |y1|))``, shaped like y0.
        ratio: Norm of ``error``.
        accepted: Whether the solve goes on from ``y1``.
    """

    t: float
    h: float
    y0: Tensor
    y1: Tensor
    error: Tensor
    ratio: float
    accepted: bool


Observer = Callable[[Attempt], None]


@dataclass
class Watch:
    """Collect what an integration leaves of its accepted steps, differentiable with respect to what it solved.

    Attributes:
        t: Times at their starts.
        h: Their signed sizes.
        scales: Tolerances ``atol + rtol * max(|y0|, |y1|)``, one detached array like y a step.
        values: Embedded error estimates and changes of slope and of state between the last two stages,
            ``(S, 3, *y.shape)`` (``pycnf.tableau.Tableau.watched``).
    """

    t: list[float] = field(default_factory=list)
    h: list[float] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    values: Tensor | None = None


def explain_failure(cause: str, method: str, progress: Progress, *, backward: bool = False) -> SolveError:
    """Turn the end of an integration into an error that says what happened and what to try."""
    advice = (
        "a smaller learning rate or gradient clipping if this is training, a looser tolerance or min_step > 0, "
        "or a regularizer such as TPR that keeps the field easy"
    )
    if cause == "budget":
        cause = f"the budget of max_nfe = {progress.max_nfe} evaluations is spent"
        advice = "a larger max_nfe, a looser tolerance, on_budget='stop', or a regularizer such as TPR"
    elif cause == "underflow" and math.isfinite(progress.ratio):
        cause = "the step size underflowed: the field is stiff or discontinuous for this method and tolerance"
    elif cause in ("underflow", "non-finite"):
        cause = "the field returns NaN or infinity there or close by, so it has blown up"
    if backward:
        cause = f"in the adjoint's backward solve, {cause}"
        advice = "gradient='backprop' (or 'checkpoint'), which solves nothing backwards, or a larger max_nfe"
    return SolveError(cause, advice, method=method, t=progress.t, step=progress.step, nfe=progress.stats.nfe)


@dataclass(frozen=True)
class StepControl:
    """Hold what decides the steps.

    Attributes:
        method: Name of an adaptive method.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        norm: Norm of the error over the tolerance.
        stops: Times at which a step must end, in order, the last of them the end of the solve.
        first_step: First step, None to choose it.
        min_step: Smallest step, accepted whatever its error.
        max_step: Largest step.
        soft_stop: Whether a spent budget returns the last accepted state.
        observer: What is shown every step that was tried; it must not change what it sees.
    """

    method: str
    rtol: float
    atol: float
    norm: Norm
    stops: tuple[float, ...]
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    soft_stop: bool = False
    observer: Observer | None = None


P = TypeVar("P")


@dataclass(frozen=True)
class Step(Generic[P]):
    """Hold one step that was tried.

    Attributes:
        t: Time at its start.
        t1: Time at its end.
        h: Its signed size.
        y0: State at its start.
        y1: State at its end.
        slopes: Slopes k of the s stages, each as one vector, (s, N).
        points: What evaluations left at the stages after the first.
        error: Embedded error estimate over the tolerance, shaped like y0.
        scale: Tolerance, shaped like y0.
    """

    t: float
    t1: float
    h: float
    y0: Tensor
    y1: Tensor
    slopes: Tensor
    points: list[P]
    error: Tensor
    scale: Tensor

    @property
    def slope(self) -> Tensor:
        """Slope at its end, which the next step starts from."""
        return self.slopes[-1].view_as(self.y1)

    def combine(self, weights: np.ndarray) -> Tensor:
        """Return y0 + h sum_j w_j k_j."""
        flat = self.y0.reshape(-1)
        return torch.addmv(flat, self.slopes.t(), torch.as_tensor(weights * self.h).to(flat)).view_as(self.y0)


class Stepper(ABC, Generic[P]):
    """Take adaptive steps; what they integrate and what becomes of them is for subclasses to say.

    Args:
        dynamics: Right-hand side.
        control: What decides the steps.
        progress: Counts and position, updated as the integration goes.

    Attributes:
        size: Step with which to go on after the last one, or which that would have had without the stop that cut it.
    """

    def __init__(self, dynamics: Dynamics, control: StepControl, progress: Progress) -> None:
        self.dynamics, self.control, self.progress = dynamics, control, progress
        self.tableau = tableau(control.method)
        self.size = math.nan

    @staticmethod
    def time(t: float, y: Tensor) -> Tensor:
        """Return a time as a scalar beside a state."""
        return torch.full((), t, dtype=y.dtype, device=y.device)

    @abstractmethod
    def begin(self, t: float, y: Tensor) -> Tensor:
        """Return the slope at the start."""

    @abstractmethod
    def evaluate(self, t: float, y: Tensor) -> tuple[Tensor, P]:
        """Return the slope at one point, and what else the evaluation leaves."""

    @abstractmethod
    def accept(self, step: Step[P]) -> tuple[Tensor, Tensor]:
        """Use an accepted step, and return the state and the slope from which to go on."""

    def prepare(self, t: float, t1: float, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state and the slope from which to try a step from t to t1."""
        return y, slope

    def measure(self, step: Step[P]) -> Tensor:
        """Return the norm of a step's error over the tolerance."""
        return self.control.norm(step.error)

    def advance(self, y: Tensor, start: float, end: float) -> None:
        """Take the steps from start to end."""
        control, progress, stops = self.control, self.progress, list(self.control.stops)
        rows = torch.as_tensor(self.tableau.rows, dtype=y.dtype, device=y.device)
        t, direction = start, math.copysign(1.0, end - start)
        slope = self.begin(t, y)
        size = control.first_step or self.propose(t, y, slope, direction)
        while stops:
            size = min(max(size, control.min_step), control.max_step)
            progress.t, progress.step = t, size
            on_stop = (t + direction * size - stops[0]) * direction > -1e-12 * abs(end - start)
            t1 = stops[0] if on_stop else t + direction * size
            y, slope = self.prepare(t, t1, y, slope)
            step = self.step(t, t1, y, slope, rows)
            progress.ratio = ratio = abs(float(self.measure(step)))
            accepted = ratio <= 1 or min(size, abs(step.h)) <= control.min_step
            if control.observer is not None:
                control.observer(Attempt(t, step.h, y, step.y1, step.error, ratio, accepted))
            following = abs(step.h) * self.factor(ratio)
            if accepted:
                if not math.isfinite(ratio):
                    raise StepError("non-finite")
                progress.stats.accept(abs(step.h))
                if progress.stats.accepted == 1:
                    progress.stats.opening = min(following, abs(end - start))
                progress.t = t = t1
                y, slope = self.accept(step)
                if on_stop:
                    stops.pop(0)
                self.size = max(following, size)
            else:
                progress.stats.rejected += 1
                if following < RESOLUTION * max(abs(t), abs(end)):
                    raise StepError("underflow")
            size = following

    def step(self, t: float, t1: float, y: Tensor, slope: Tensor, rows: Tensor) -> Step[P]:
        """Try one step from t to t1."""
        control, flat, h = self.control, y.reshape(-1), t1 - t
        weights = rows * h
        slopes, last, points = self.stages(t, h, y, slope, weights)
        y1 = last if self.tableau.advances else torch.addmv(flat, slopes.t(), weights[-2])
        scale = torch.maximum(flat.abs(), y1.abs()).mul_(control.rtol).add_(control.atol)
        error = torch.mv(slopes.t(), weights[-1]).div_(scale)
        return Step(t, t1, h, y, y1.view_as(y), slopes, points, error.view_as(y), scale.view_as(y))

    def stages(self, t: float, h: float, y: Tensor, slope: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, list[P]]:
        """Return the slopes (s, N) at the stages of a step, the last stage (N,), and what the evaluations leave."""
        flat, nodes = y.reshape(-1), self.tableau.c.tolist()
        slopes = torch.empty(1 + len(nodes), flat.numel(), dtype=y.dtype, device=y.device)
        slopes[0] = slope.reshape(-1)
        points: list[P] = []
        stage = flat
        for i, c in enumerate(nodes, 1):
            stage = torch.addmv(flat, slopes[:i].t(), weights[i - 1, :i])
            value, point = self.evaluate(t + c * h, stage.view_as(y))
            slopes[i] = value.reshape(-1)
            points.append(point)
        return slopes, stage, points

    def factor(self, ratio: float) -> float:
        """Return the factor of the step size after a step with this error over tolerance."""
        if ratio == 0:
            return MAX_FACTOR
        if not math.isfinite(ratio):
            return MIN_FACTOR
        lowest = 1.0 if ratio < 1 else MIN_FACTOR
        return min(MAX_FACTOR, max(SAFETY / ratio ** (1 / self.tableau.order), lowest))

    def propose(self, t: float, y: Tensor, slope: Tensor, direction: float) -> float:
        """Choose the first step from the size of y, its slope and one Euler step."""
        control, order = self.control, self.tableau.order - 1
        scale = y.abs().mul(control.rtol).add_(control.atol)
        d0, d1 = float(control.norm(y / scale)), float(control.norm(slope / scale))
        if not math.isfinite(d1):
            raise StepError("non-finite")
        h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        self.progress.spend()
        probe = self.dynamics(self.time(t + direction * h0, y), torch.add(y, slope, alpha=direction * h0))
        d2 = abs(float(control.norm((probe - slope) / scale))) / h0
        if not math.isfinite(d2):
            return 1e-3 * h0
        h1 = max(1e-6, h0 * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / (order + 1))
        return min(100 * h0, h1)


def rms(y: Tensor) -> Tensor:
    """Return the root mean square of an array, the norm of the step control where none is named."""
    return y.pow(2).mean().sqrt()


__all__ = [
    "Attempt",
    "Observer",
    "Progress",
    "Step",
    "StepControl",
    "StepError",
    "Stepper",
    "Watch",
    "explain_failure",
    "rms",
]
