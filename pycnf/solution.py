"""What a solve gives back: the states at sampled times, what they cost, and how a solve fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class SolveError(RuntimeError):
    """Report a solve that failed, with where, why and what to try.

    Attributes:
        method: Name of the solver method.
        t: Time of the last accepted state.
        step: Last step size tried (NaN where no step was tried).
        nfe: Evaluations of the field spent so far in this solve.
    """

    def __init__(self, cause: str, advice: str, *, method: str, t: float, step: float, nfe: int) -> None:
        self.method, self.t, self.step, self.nfe = method, t, step, nfe
        super().__init__(
            f"{method} failed at t = {t:.6g} (step {step:.3g}, {nfe} evaluations): {cause}. Try: {advice}."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_error, (str(self), self.method, self.t, self.step, self.nfe)


def _rebuild_error(message: str, method: str, t: float, step: float, nfe: int) -> SolveError:
    error = SolveError.__new__(SolveError)
    RuntimeError.__init__(error, message)
    error.method, error.t, error.step, error.nfe = method, t, step, nfe
    return error


class SolveWarning(UserWarning):
    """Warn that a solve ended before its end time (soft stop at the evaluation budget)."""


@dataclass
class SolveStats:
    """Count what a solve cost.

    One evaluation is one call of the right-hand side, so the counts equal those of a wrapper around the
    field. ``nfe_backward`` grows while ``loss.backward()`` runs: it stays 0 for ``gradient="backprop"``,
    which differentiates the forward evaluations and makes no calls of its own.

    Attributes:
        nfe: Calls of the field in the forward solve.
        nfe_backward: Calls of the field in the backward pass.
        accepted: Accepted steps, forward (every step of a fixed-step method).
        rejected: Rejected steps, forward.
        min_step: Smallest accepted step, in units of t (inf where no step was taken).
        max_step: Largest accepted step, in units of t (0 where no step was taken).
        stopped: Whether the evaluation budget ended the solve early.
        opening: Size of the first step with which a like solve can start, in units of t: what the step control
            makes of the first accepted step. NaN where no step was chosen, or in a sum.
    """

    nfe: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    min_step: float = math.inf
    max_step: float = 0.0
    stopped: bool = False
    opening: float = math.nan

    def accept(self, step: float) -> None:
        """Count an accepted step of this size."""
        self.accepted += 1
        self.min_step = min(self.min_step, step)
        self.max_step = max(self.max_step, step)

    def __add__(self, other: SolveStats) -> SolveStats:
        """Sum the counts of two solves and keep the extremes of their steps."""
        return SolveStats(
            nfe=self.nfe + other.nfe,
            nfe_backward=self.nfe_backward + other.nfe_backward,
            accepted=self.accepted + other.accepted,
            rejected=self.rejected + other.rejected,
            min_step=min(self.min_step, other.min_step),
            max_step=max(self.max_step, other.max_step),
            stopped=self.stopped or other.stopped,
        )


def refuse_second_derivatives() -> None:
    """Refuse to be part of a graph of derivatives, which a written-out reverse pass cannot continue.

    Raises:
        RuntimeError: When a backward pass is recorded (``create_graph=True``).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this solve can be differentiated once, and create_graph=True asks for more: take "
            "Solver(engine='torchdiffeq') and divergence='exact-forward' for derivatives of higher order"
        )


@dataclass(frozen=True)
class Steps:
    """Hold the S accepted steps of one solve by an embedded Runge-Kutta pair, differentiable.

    The states have C = D + 1 channels, log p the last, or C = D where the density was not carried.

    Attributes:
        t: Times at the steps' starts (S,), float64.
        h: Signed sizes (S,), float64.
        error: Embedded error estimates in units of the state, ``(S, B, C)``.
        scale: Tolerances ``atol + rtol * max(|y_0|, |y_1|)``, ``(S, B, C)``, without gradient.
        slope_change: f(Y_s) - f(Y_{s-1}) of the last two stages where both sit at the end of the step, else None.
        stage_change: Y_s - Y_{s-1}, likewise.
        order: Order of the method.
    """

    t: Tensor
    h: Tensor
    error: Tensor
    scale: Tensor
    slope_change: Tensor | None
    stage_change: Tensor | None
    order: int


class BoundVelocity(Protocol):
    """Evaluate the field of one block, its context bound: v(t, z) for a scalar t and z of shape (B, D)."""

    def __call__(self, t: Tensor, z: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[Tensor]:
        """Return the parameters of the field."""
        ...


@dataclass(frozen=True)
class Solution:
    """Hold one solve of (z, log p) along a block of a flow.

    Attributes:
        ts: Times (K,), float64, first the start and last the end of the solve.
        z: States ``(K, *batch, D)`` at these times.
        logp: Change of the log-density along each trajectory, -int div v dt since the start, ``(K, *batch)``;
            None where the solve did not ask for it.
        stats: What the solve cost; live, so that backward calls show after ``loss.backward()``.
        steps: The accepted steps, where they were asked for.
        field: The field that was integrated, where the solve was a flow's.
        tolerance: (rtol, atol) of the step control; None where there was none.
    """

    ts: Tensor
    z: Tensor
    logp: Tensor | None
    stats: SolveStats
    steps: Steps | None = None
    field: BoundVelocity | None = None
    tolerance: tuple[float, float] | None = None

    def at(self, times: Tensor) -> Solution:
        """Restrict to the two ends and those of the sampled times that are named, all exactly in ``ts``.

        A solve that the evaluation budget stopped early holds no interior samples and is returned whole.
        """
        if self.stats.stopped:
            return self
        wanted = torch.isin(self.ts, times.to(self.ts))
        if int(wanted.sum()) != len(times):
            raise ValueError("the solution was not sampled at all of these times: pass them to the solve")
        wanted[0] = wanted[-1] = True
        logp = None if self.logp is None else self.logp[wanted]
        return replace(self, ts=self.ts[wanted], z=self.z[wanted], logp=logp)


__all__ = ["BoundVelocity", "Solution", "SolveError", "SolveStats", "SolveWarning", "Steps"]
