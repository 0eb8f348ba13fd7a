r"""Gradients by the adjoint equation, solved backwards without a halt at the sampled times.

With the gradients g_k of a loss with respect to the states z(t_k), k = 0 ... K, the cotangent lambda solves

    dlambda/dt = -(df/dz)^T lambda,  lambda(T) = g_K,  lambda(t_k^-) = lambda(t_k^+) + g_k,

and int_0^T (df/dtheta)^T lambda dt is the gradient of the parameters. States and cotangents are integrated backwards
together; nothing is kept of the forward solve but its states at the sampled times, so memory does not grow with the
number of evaluations.

The equation is linear in lambda, so a jump g_k inside a step need not end it: the step is taken without the jump,
which is carried by itself to the nearer end of the step and joins lambda there. At that end the pullback is at hand,
so a jump costs one evaluation, at t_k (Heun's method), and a second one half-way where the tolerance asks for more
(the classical method of order 4).

References:
    Chen et al., Neural ordinary differential equations, NeurIPS 2018. Kidger, Chen & Lyons, "Hey, that's not an ODE":
    faster ODE adjoints via seminorms, ICML 2021. Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I,
    section II.1 (the methods of Heun and Kutta).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycnf.backprop import Run
from pycnf.dynamics import Dynamics, Pullback
from pycnf.solution import SolveStats, refuse_second_derivatives
from pycnf.stepper import RESOLUTION, Progress, Step, StepControl, StepError, Stepper, explain_failure, rms

Weights = tuple[Sequence[float], Sequence[float]]
"""Weights of a method's slopes in its solution, and in the difference to a solution of one order less."""

HEUN: Weights = (1 / 2, 1 / 2), (-1 / 2, 1 / 2)
RK4: Weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6, 0), (0, 0, 0, 1 / 6, -1 / 6)


def integrate(
    dynamics: Dynamics,
    y0: Tensor,
    ts: Sequence[float],
    control: StepControl,
    progress: Progress,
    backward: StepControl,
    *,
    full_norm: bool = False,
) -> Tensor:
    """Integrate from ts[0] to ts[-1] and return the states at ts, shape ``(K, *y0.shape)``.

    Args:
        dynamics: Right-hand side.
        y0: Start.
        ts: Times, monotone, the start first and the end last.
        control: What decides the steps.
        progress: Counts and position, updated as the solve goes, and the budget of either solve.
        backward: What decides the steps of the adjoint; without a first step it goes on with that of the solve.
        full_norm: Whether the gradients of ``dynamics.tensors`` join in the step control of the adjoint.

    Raises:
        StepError: When the budget is spent or no step can be taken.
    """
    solve = _Solve(dynamics, tuple(ts), control, progress, backward, full_norm)
    return _Integrate.apply(solve, y0, *dynamics.tensors)


@dataclass
class _Solve:
    """Hold what the two directions of a solve share."""

    dynamics: Dynamics
    ts: tuple[float, ...]
    control: StepControl
    progress: Progress
    backward: StepControl
    full_norm: bool


@dataclass
class _Point:
    """Hold an evaluation: time, state, its slope and pullback, and the cotangent's share of the tensors' gradients."""

    t: float
    z: Tensor
    slope: Tensor
    pull: Pullback
    share: list[Tensor]


class _Pulled(NamedTuple):
    """Hold the slope -(df/dz)^T lambda of a cotangent at one point, and its share of the tensors' gradients."""

    slope: Tensor
    share: list[Tensor]


@dataclass(frozen=True)
class _Jump:
    """Hold a sampled time, the state there and the gradient with respect to it."""

    t: float
    z: Tensor
    gradient: Tensor


class Adjoint(Stepper[list[Tensor]]):
    """Integrate (z, lambda) backwards, shape (2, *z.shape), and add up the gradients of the tensors.

    Args:
        dynamics: Right-hand side of z.
        control: What decides the steps.
        progress: Counts and position of this solve.
        jumps: Interior sampled times, in the order in which they are met.
        size: First step, where the control names none.
        full_norm: Whether the gradients of the tensors join in the step control.

    Attributes:
        grads: Gradients of ``dynamics.tensors``.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        control: StepControl,
        progress: Progress,
        jumps: list[_Jump],
        size: float,
        *,
        full_norm: bool,
    ) -> None:
        super().__init__(dynamics, control, progress)
        self.jumps, self.size, self.full_norm = jumps, size, full_norm
        self.grads = [torch.zeros_like(tensor) for tensor in dynamics.tensors]
        self.weights, self.errors = self.tableau.rows[-2:].tolist()

    def solve(self, z: Tensor, cotangent: Tensor, start: float, end: float) -> Tensor:
        """Carry a cotangent from start back to end, and return it there."""
        self.advance(torch.stack([z, cotangent]), start, end)
        return self.y[1]

    def propose(self, t: float, y: Tensor, slope: Tensor, direction: float) -> float:
        """Go on with the step of the forward solve."""
        return self.size

    def point(self, t: float, z: Tensor) -> _Point:
        """Evaluate the right-hand side at one point."""
        self.progress.spend()
        slope, pull = self.dynamics.linearize(self.time(t, z), z)
        return _Point(t, z, slope, pull, [torch.zeros_like(grad) for grad in self.grads])

    def begin(self, t: float, y: Tensor) -> Tensor:
        """Return the slopes at the start."""
        self.here = self.latest = self.point(t, y[0])
        return self.slopes(self.here, y[1])

    def evaluate(self, t: float, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the slopes (f, -(df/dz)^T lambda) at one point, and its share of the gradients."""
        self.latest = self.here  # lets go of what the stage before keeps in memory
        self.latest = self.point(t, y[0])
        return self.slopes(self.latest, y[1]), self.latest.share

    def slopes(self, point: _Point, cotangent: Tensor) -> Tensor:
        """Return the slopes at a point, and note there its share of the gradients."""
        return torch.stack([point.slope, -point.pull(cotangent, point.share)])

    def measure(self, step: Step[list[Tensor]]) -> Tensor:
        """Return the larger norm of the errors of z and lambda, and with the full norm of the gradients."""
        norms = [self.control.norm(part) for part in step.error]
        if self.full_norm:
            shares = [self.here.share, *step.points]
            for i, grad in enumerate(self.grads):
                change, error = (
                    sum((w * step.h * share[i] for w, share in zip(row, shares, strict=True)), grad.new_zeros(()))
                    for row in (self.weights, self.errors)
                )
                size = torch.maximum(grad.abs(), (grad - change).abs())
                norms.append(rms(error / (self.control.atol + self.control.rtol * size)))
        return torch.stack(norms).max()

    def accept(self, step: Step[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Add the gradients of a step, and take up the jumps that it passed."""
        for weight, share in zip(self.weights, [self.here.share, *step.points], strict=True):
            if weight:
                self.add(share, -weight * step.h)
        self.here, self.y, slope = self.latest, step.y1, step.slope
        while self.jumps and (self.jumps[0].t - step.t1) * step.h <= 0:
            self.y, slope = self.join(self.jumps.pop(0), step.t1, self.y, slope)
        return self.y, slope

    def prepare(self, t: float, t1: float, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Take up the jumps in the first half of the step to come."""
        while self.jumps and abs(self.jumps[0].t - t) <= abs(t1 - t) / 2:
            y, slope = self.join(self.jumps.pop(0), t, y, slope)
        return y, slope

    def join(self, jump: _Jump, t: float, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Add a jump, carried to the time t, to the cotangent there."""
        cotangent = jump.gradient
        if jump.t != t:
            here = _Point(t, y[0], slope[0], self.here.pull, self.here.share)
            cotangent = self.carry(cotangent, self.point(jump.t, jump.z), here)
        pulled = self.here.pull(cotangent, self.here.share)
        return torch.stack([y[0], y[1] + cotangent]), torch.stack([slope[0], slope[1] - pulled])

    def carry(self, cotangent: Tensor, a: _Point, b: _Point) -> Tensor:
        """Carry a cotangent from a to b by Heun's method, or by RK4 where that errs too much, or in two halves."""
        h = b.t - a.t
        k1 = self.pull(a, cotangent)
        k2 = self.pull(b, cotangent + h * k1.slope)
        if self.judge(HEUN, h, cotangent, k1, k2):
            return cotangent + _sum(HEUN[0], h, k1, k2)
        middle = self.point(a.t + h / 2, (a.z + b.z) / 2 + h / 8 * (a.slope - b.slope))
        k2 = self.pull(middle, cotangent + h / 2 * k1.slope)
        k3 = self.pull(middle, cotangent + h / 2 * k2.slope)
        k4 = self.pull(b, cotangent + h * k3.slope)
        carried = cotangent + _sum(RK4[0], h, k1, k2, k3, k4)
        k5 = self.pull(b, carried)
        if self.judge(RK4, h, cotangent, k1, k2, k3, k4, k5):
            return carried
        if abs(h) < RESOLUTION * max(abs(a.t), abs(b.t)):
            raise StepError("underflow")
        return self.carry(self.carry(cotangent, a, middle), middle, b)

    def pull(self, point: _Point, cotangent: Tensor) -> _Pulled:
        """Pull a cotangent back at one point."""
        share = [torch.zeros_like(grad) for grad in self.grads]
        return _Pulled(-point.pull(cotangent, share), share)

    def judge(self, method: Weights, h: float, start: Tensor, *pulled: _Pulled) -> bool:
        """Tell whether a method carries a cotangent within tolerance; if so, add the shares of its slopes."""
        control, (weights, errors) = self.control, method
        size = torch.maximum(start.abs(), (start + _sum(weights, h, *pulled)).abs())
        error = _sum(errors, h, *pulled) / (control.atol + control.rtol * size)
        self.progress.ratio = ratio = abs(float(control.norm(error)))
        accurate = ratio <= 1 or abs(h) <= control.min_step
        if accurate:
            for weight, one in zip(weights, pulled, strict=True):
                self.add(one.share, -weight * h)
        return accurate

    def add(self, share: list[Tensor], weight: float) -> None:
        """Add a share, weighted, to the gradients."""
        for grad, part in zip(self.grads, share, strict=True):
            grad.add_(part, alpha=weight)


def _sum(weights: Sequence[float], h: float, *pulled: _Pulled) -> Tensor:
    """Return h sum_j w_j k_j over the slopes that there are."""
    total = torch.zeros_like(pulled[0].slope)
    for weight, one in zip(weights, pulled, strict=False):
        total.add_(one.slope, alpha=h * weight)
    return total


class _Integrate(torch.autograd.Function):
    """Join a solve and its adjoint to automatic differentiation."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, y0: Tensor, *tensors: Tensor) -> Tensor:
        run = Run(solve.dynamics, solve.control, solve.progress, solve.ts, keep="start")
        states, _ = run.solve(y0)
        ctx.solve, ctx.size = solve, run.size
        ctx.save_for_backward(states, *tensors)
        return states

    @staticmethod
    def backward(ctx: Any, gout: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        solve, states = ctx.solve, ctx.saved_tensors[0]
        ts, stats = solve.ts, solve.progress.stats
        progress = Progress(SolveStats(), ts[-1], max_nfe=solve.progress.max_nfe)
        used = gout.flatten(1).any(1).tolist()
        jumps = [_Jump(ts[k], states[k], gout[k]) for k in range(len(ts) - 2, 0, -1) if used[k]]
        adjoint = Adjoint(solve.dynamics, solve.backward, progress, jumps, ctx.size, full_norm=solve.full_norm)
        try:
            cotangent = adjoint.solve(states[-1], gout[-1], ts[-1], ts[0])
        except StepError as err:
            raise explain_failure(err.cause, solve.control.method, progress, backward=True) from err.__cause__
        finally:
            stats.nfe_backward += progress.stats.nfe
        return None, cotangent + gout[0], *adjoint.grads


__all__ = ["Adjoint", "integrate"]
