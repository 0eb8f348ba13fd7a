r"""Adaptive Runge-Kutta steps whose reverse pass is written out.

:func:`integrate` takes the steps that torchdiffeq's adaptive methods take (same tableaus, initial step, error
norm, step-size rule and interpolant), decides them on the host with one synchronization a step, and differentiates
through them without recording the solver's arithmetic: every stage, solution and dense output is linear in the
start y_0 of its step and the slopes k_j,

    Y_i = y_0 + h sum_j a_ij k_j,   k_i = f(t + c_i h, Y_i),   y_1 = y_0 + h sum_j b_j k_j,

so the reverse pass needs only the pullbacks of f at the stages.

References:
    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, sections II.4 and II.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycnf.dynamics import Dynamics, Pullback
from pycnf.solution import SolveError, SolveStats, refuse_second_derivatives
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
            ``(S, 3, *y.shape)`` (:meth:`pycnf.tableau.Tableau.watched`).
    """

    t: list[float] = field(default_factory=list)
    h: list[float] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    values: Tensor | None = None


def explain_failure(cause: str, method: str, progress: Progress) -> SolveError:
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


def integrate(
    dynamics: Dynamics,
    y0: Tensor,
    ts: Sequence[float],
    control: StepControl,
    progress: Progress,
    watch: Watch | None = None,
) -> Tensor:
    """Integrate from ts[0] to ts[-1] and return the states at ts, shape ``(K, *y0.shape)``.

    Args:
        dynamics: Right-hand side.
        y0: Start, any shape; it is treated as one vector.
        ts: Times, monotone, the start first and the end last.
        control: What decides the steps.
        progress: Counts and position, updated as the solve goes; after a :class:`StepError` they tell where.
        watch: What to fill with the accepted steps; None to keep nothing of them.

    Raises:
        StepError: When the budget is spent or no step can be taken.
    """
    # the run shares the lists but not the values, whose graph holds the run: a cycle would never be freed
    noted = None if watch is None else Watch(watch.t, watch.h, watch.scales)
    if torch.is_grad_enabled() and (y0.requires_grad or any(tensor.requires_grad for tensor in dynamics.tensors)):
        out, watched = _Integrate.apply(dynamics, tuple(ts), control, progress, noted, y0, *dynamics.tensors)
    else:
        out, watched = _Run(dynamics, control, progress, noted, record=False).forward(y0, ts)
    if watch is not None:
        watch.values = watched
    return out


@dataclass
class _Step:
    """Keep what the reverse pass needs of one accepted step."""

    h: float
    pullbacks: list[Pullback]
    samples: list[tuple[int, np.ndarray | None]] = field(default_factory=list)


class _Run:
    """Carry one integration forward and, where it was recorded, back."""

    def __init__(
        self, dynamics: Dynamics, control: StepControl, progress: Progress, watch: Watch | None, *, record: bool
    ) -> None:
        self.dynamics, self.control, self.progress, self.record = dynamics, control, progress, record
        self.watch, self.watched = watch, list[Tensor]()
        self.tableau = tableau(control.method)
        self.steps: list[_Step] = []
        self.y = torch.empty(0)
        self.start: Pullback | None = None

    def evaluate(self, t: float, y: Tensor) -> tuple[Tensor, Pullback | None]:
        """Evaluate the dynamics at one point, with the pullback where the run is recorded."""
        self.progress.spend()
        time = torch.full((), t, dtype=y.dtype, device=y.device)
        if self.record:
            return self.dynamics.linearize(time, y)
        value = self.dynamics(time, y)
        if value.requires_grad:
            raise ValueError("the right-hand side closes over tensors that want gradients: name them in tensors=")
        return value, None

    def forward(self, y0: Tensor, ts: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Take the steps: the states at ts, or at the start and a soft stop, and what is watched of the steps."""
        out = torch.empty(len(ts), *y0.shape, dtype=y0.dtype, device=y0.device)
        out[0] = y0
        self.y = y0
        try:
            self.advance(out, ts)
        except StepError as err:
            if err.cause != "budget" or not self.control.soft_stop:
                raise
            self.progress.stats.stopped = True
            out = torch.stack([y0, self.y])
            for step in self.steps:
                step.samples.clear()
            if self.steps:
                self.steps[-1].samples.append((1, None))
        return out, torch.stack(self.watched) if self.watched else y0.new_zeros(0, 3, *y0.shape)

    def advance(self, out: Tensor, ts: Sequence[float]) -> None:
        """Take the steps and fill in the states at ts[1:]."""
        control, progress, y = self.control, self.progress, self.y
        rows = torch.as_tensor(self.tableau.rows, dtype=y.dtype, device=y.device)
        t, end, direction = ts[0], ts[-1], math.copysign(1.0, ts[-1] - ts[0])
        stops = list(control.stops)
        slope, self.start = self.evaluate(t, y)
        size, sample = control.first_step or self.initial_step(t, y, slope, direction), 1
        while stops:
            size = min(max(size, control.min_step), control.max_step)
            progress.t, progress.step = t, size
            on_stop = (t + direction * size - stops[0]) * direction > -1e-12 * abs(end - ts[0])
            t1 = stops[0] if on_stop else t + direction * size
            h = t1 - t
            y1, slopes, pullbacks, error, scale = self.step(t, h, y, slope, rows)
            progress.ratio = ratio = abs(float(control.norm(error)))
            accepted = ratio <= 1 or min(size, abs(h)) <= control.min_step
            if control.observer is not None:
                control.observer(Attempt(t, h, y, y1, error, ratio, accepted))
            if accepted:
                if not math.isfinite(ratio):
                    raise StepError("non-finite")
                progress.stats.accept(abs(h))
                step = _Step(h, pullbacks)
                self.note(t, h, slopes, scale)
                while sample < len(ts) and (t1 - ts[sample]) * direction >= 0:
                    weights = None if ts[sample] == t1 else self.interpolate((ts[sample] - t) / h)
                    out[sample] = y1 if weights is None else self.combine(y, slopes, weights, h)
                    step.samples.append((sample, weights))
                    sample += 1
                if self.record:
                    self.steps.append(step)
                if on_stop:
                    stops.pop(0)
                t, y, slope = t1, y1, slopes[-1].view_as(y)
                progress.t, self.y = t, y
            else:
                progress.stats.rejected += 1
                if abs(h) * self.factor(ratio) < RESOLUTION * max(abs(t), abs(end)):
                    raise StepError("underflow")
            size = abs(h) * self.factor(ratio)

    def step(
        self, t: float, h: float, y: Tensor, slope: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, list[Pullback], Tensor, Tensor]:
        """Take one step: solution, slopes (s, N), the stages' pullbacks, error over the tolerance, tolerance."""
        tab, control, flat = self.tableau, self.control, y.reshape(-1)
        s = len(tab.c) + 1
        slopes = torch.empty(s, flat.numel(), dtype=y.dtype, device=y.device)
        slopes[0] = slope.reshape(-1)
        weights = rows * h
        pullbacks: list[Pullback] = []
        stage = flat
        for i in range(1, s):
            stage = torch.addmv(flat, slopes[:i].t(), weights[i - 1, :i])
            value, pullback = self.evaluate(t + float(tab.c[i - 1]) * h, stage.view_as(y))
            slopes[i] = value.reshape(-1)
            if pullback is not None:
                pullbacks.append(pullback)
        y1 = stage if tab.advances else torch.addmv(flat, slopes.t(), weights[s - 1])
        scale = torch.maximum(flat.abs(), y1.abs()).mul_(control.rtol).add_(control.atol)
        error = torch.mv(slopes.t(), weights[s]).div_(scale)
        return y1.view_as(y), slopes, pullbacks, error.view_as(y), scale.view_as(y)

    def note(self, t: float, h: float, slopes: Tensor, scale: Tensor) -> None:
        """Keep of an accepted step what is watched."""
        if self.watch is not None:
            weights = torch.as_tensor(self.tableau.watched(h)).to(slopes)
            self.watched.append((weights @ slopes).view(3, *scale.shape))
            self.watch.t.append(t)
            self.watch.h.append(h)
            self.watch.scales.append(scale)

    def combine(self, y: Tensor, slopes: Tensor, weights: np.ndarray, h: float) -> Tensor:
        """Return y + h sum_j w_j k_j."""
        return torch.addmv(y.reshape(-1), slopes.t(), torch.as_tensor(weights * h).to(y)).view_as(y)

    def interpolate(self, theta: float) -> np.ndarray:
        """Return the weights (s,) of the slopes in the dense output at a fraction theta of the step."""
        return theta ** np.arange(4, 0, -1) @ self.tableau.dense

    def factor(self, ratio: float) -> float:
        """Return the factor of the step size after a step with this error over tolerance."""
        if ratio == 0:
            return MAX_FACTOR
        if not math.isfinite(ratio):
            return MIN_FACTOR
        lowest = 1.0 if ratio < 1 else MIN_FACTOR
        return min(MAX_FACTOR, max(SAFETY / ratio ** (1 / self.tableau.order), lowest))

    def initial_step(self, t: float, y: Tensor, slope: Tensor, direction: float) -> float:
        """Choose the first step from the size of y, its slope and one Euler step."""
        control, order = self.control, self.tableau.order - 1
        scale = y.abs().mul(control.rtol).add_(control.atol)
        d0, d1 = float(control.norm(y / scale)), float(control.norm(slope / scale))
        if not math.isfinite(d1):
            raise StepError("non-finite")
        h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        self.progress.spend()
        t1 = torch.full((), t + direction * h0, dtype=y.dtype, device=y.device)
        probe = self.dynamics(t1, torch.add(y, slope, alpha=direction * h0))
        d2 = abs(float(control.norm((probe - slope) / scale))) / h0
        if not math.isfinite(d2):
            return 1e-3 * h0
        h1 = max(1e-6, h0 * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / (order + 1))
        return min(100 * h0, h1)

    def backward(self, gout: Tensor, gwatched: Tensor, grads: list[Tensor]) -> Tensor:
        """Pull gradients of the states at ts and of what is watched back to y_0, adding the tensors' to grads."""
        tab = self.tableau
        s, flat = len(tab.c) + 1, gout.reshape(len(gout), -1)
        rows = torch.as_tensor(tab.rows, dtype=gout.dtype, device=gout.device)
        gy = torch.zeros_like(flat[0]) if self.steps else flat[1].clone()
        gslope = torch.zeros_like(gy)
        for number, step in reversed(list(enumerate(self.steps))):
            weights = rows * step.h
            if self.watch is None:
                gslopes = torch.zeros(s, gy.numel(), dtype=gy.dtype, device=gy.device)
            else:
                gslopes = torch.as_tensor(tab.watched(step.h)).to(gy).t() @ gwatched[number].reshape(3, -1)
            gslopes[-1] += gslope
            inside = torch.zeros_like(gy)
            for sample, at in step.samples:
                if at is None:
                    gy = gy + flat[sample]
                else:
                    inside += flat[sample]
                    gslopes.addr_(torch.as_tensor(at * step.h).to(gy), flat[sample])
            if not tab.advances:
                gslopes.addr_(weights[s - 1], gy)
                inside += gy
            for i in range(s - 1, 0, -1):
                gstage = step.pullbacks[i - 1](gslopes[i].view(gout.shape[1:]), grads).reshape(-1)
                if tab.advances and i == s - 1:
                    gstage = gstage + gy
                gslopes[:i].addr_(weights[i - 1, :i], gstage)
                inside += gstage
            gy, gslope = inside, gslopes[0]
        if self.start is not None:
            gy = gy + self.start(gslope.view(gout.shape[1:]), grads).reshape(-1)
        return (gy + flat[0]).view(gout.shape[1:])


class _Integrate(torch.autograd.Function):
    """Join an integration to automatic differentiation."""

    @staticmethod
    def forward(
        ctx: Any,
        dynamics: Dynamics,
        ts: tuple[float, ...],
        control: StepControl,
        progress: Progress,
        watch: Watch | None,
        y0: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.run = _Run(dynamics, control, progress, watch, record=True)
        ctx.tensors = tensors
        return ctx.run.forward(y0, ts)

    @staticmethod
    def backward(ctx: Any, gout: Tensor, gwatched: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        grads = [torch.zeros_like(tensor) for tensor in ctx.tensors]
        gy = ctx.run.backward(gout.contiguous(), gwatched, grads)
        return None, None, None, None, None, gy, *grads


def rms(y: Tensor) -> Tensor:
    """Return the root mean square of an array, the norm of the step control where none is named."""
    return y.pow(2).mean().sqrt()


__all__ = [
    "Attempt",
    "Observer",
    "Progress",
    "StepControl",
    "StepError",
    "Watch",
    "explain_failure",
    "integrate",
    "rms",
]
