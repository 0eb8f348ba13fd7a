r"""Gradients through the solver's own steps, the reverse pass written out.

:func:`integrate` samples a solve and differentiates through its steps, whose sizes are held fixed, without recording
the solver's arithmetic: every stage, solution and dense output is linear in the start y_0 of its step and the slopes
k_j,

    Y_i = y_0 + h sum_j a_ij k_j,   k_i = f(t + c_i h, Y_i),   y_1 = y_0 + h sum_j b_j k_j,

so the reverse pass needs only the pullbacks of f at the stages: kept from the forward pass, or, with checkpoints, had
again from (t, h, y_0, k_1) of one step at a time.

References:
    Griewank & Walther, Evaluating Derivatives, SIAM 2008, chapter 12 (checkpoints).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from pycnf.dynamics import Dynamics, Pullback, SteppingDynamics, StepPullback
from pycnf.solution import refuse_second_derivatives
from pycnf.stepper import Progress, Step, StepControl, StepError, Stepper, Watch

Point = Pullback | StepPullback | None
Keep = Literal["nothing", "start", "steps", "stages"]


def integrate(
    dynamics: Dynamics,
    y0: Tensor,
    ts: Sequence[float],
    control: StepControl,
    progress: Progress,
    watch: Watch | None = None,
    *,
    checkpoint: bool = False,
) -> Tensor:
    """Integrate from ts[0] to ts[-1] and return the states at ts, shape ``(K, *y0.shape)``.

    Args:
        dynamics: Right-hand side.
        y0: Start, any shape; it is treated as one vector.
        ts: Times, monotone, the start first and the end last.
        control: What decides the steps.
        progress: Counts and position, updated as the solve goes; after a ``StepError`` they tell where.
        watch: What to fill with the accepted steps; None to keep nothing of them.
        checkpoint: Whether to keep the accepted steps alone and evaluate their stages again in the reverse pass.

    Raises:
        StepError: When the budget is spent or no step can be taken.
    """
    # the run shares the lists but not the values, whose graph holds the run: a cycle would live until collected
    noted = None if watch is None else Watch(watch.t, watch.h, watch.scales)
    if torch.is_grad_enabled() and (y0.requires_grad or any(tensor.requires_grad for tensor in dynamics.tensors)):
        run = Run(dynamics, control, progress, ts, keep="steps" if checkpoint else "stages", watch=noted)
        out, watched = _Integrate.apply(run, y0, *dynamics.tensors)
    else:
        out, watched = Run(dynamics, control, progress, ts, watch=noted).solve(y0)
    if watch is not None:
        watch.values = watched
    return out


@dataclass
class _Kept:
    """Keep what the reverse pass needs of one accepted step: its pullbacks, or what gives them again."""

    t: float
    t1: float
    samples: list[tuple[int, np.ndarray | None]]
    pullbacks: list[Pullback] | list[StepPullback] | None
    y: Tensor | None = None
    slope: Tensor | None = None


class Run(Stepper[Point]):
    """Carry one solve forward and, where it was kept, its gradients back.

    Args:
        dynamics: Right-hand side.
        control: What decides the steps.
        progress: Counts and position.
        ts: Times at which the states are wanted, the start first and the end last.
        keep: What to keep for the reverse pass: ``"nothing"`` under no gradient, the ``"start"`` alone, whose
            evaluation shows whether gradients would be lost, the accepted ``"steps"``, or their ``"stages"`` too.
        watch: What to fill with the accepted steps.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        control: StepControl,
        progress: Progress,
        ts: Sequence[float],
        keep: Keep = "nothing",
        watch: Watch | None = None,
    ) -> None:
        super().__init__(dynamics, control, progress)
        self.ts, self.keep, self.watch = ts, keep, watch
        self.whole = dynamics if isinstance(dynamics, SteppingDynamics) else None
        self.steps: list[_Kept] = []
        self.watched: list[Tensor] = []
        self.pullback: Pullback | None = None
        self.replaying = False

    def solve(self, y0: Tensor) -> tuple[Tensor, Tensor]:
        """Take the steps: the states at ts, or at the start and a soft stop, and what is watched of the steps."""
        self.out = torch.empty(len(self.ts), *y0.shape, dtype=y0.dtype, device=y0.device)
        self.out[0] = y0
        self.y, self.sampled = y0, 1
        try:
            self.advance(y0, self.ts[0], self.ts[-1])
            out = self.out
        except StepError as err:
            if err.cause != "budget" or not self.control.soft_stop:
                raise
            self.progress.stats.stopped = True
            out = torch.stack([y0, self.y])
            for step in self.steps:
                step.samples.clear()
            if self.steps:
                self.steps[-1].samples.append((1, None))
        watched = torch.stack(self.watched) if self.watched else y0.new_zeros(0, 3, *y0.shape)
        del self.out, self.y, self.watched
        return out, watched

    def begin(self, t: float, y: Tensor) -> Tensor:
        """Return the slope at the start, its pullback kept where gradients will pass."""
        if self.keep == "nothing":
            return self.evaluate(t, y)[0]
        self.progress.spend()
        slope, pullback = self.dynamics.linearize(self.time(t, y), y)
        self.pullback = None if self.keep == "start" else pullback
        return slope

    def stages(
        self, t: float, h: float, y: Tensor, slope: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, list[Point]]:
        """Evaluate the stages of a step, all at once where the right-hand side can."""
        if self.whole is None:
            return super().stages(t, h, y, slope, weights)
        for _ in self.tableau.c:
            self.count()
        slopes, last, pullback = self.whole.step(t, h, y, slope, self.tableau)
        return slopes, last, [pullback]

    def count(self) -> None:
        """Count an evaluation."""
        if self.replaying:
            self.progress.stats.nfe_backward += 1
        else:
            self.progress.spend()

    def evaluate(self, t: float, y: Tensor) -> tuple[Tensor, Pullback | None]:
        """Return the slope at one point, and the pullback there where it is kept or had again."""
        self.count()
        if self.replaying or self.keep == "stages":
            return self.dynamics.linearize(self.time(t, y), y)
        value = self.dynamics(self.time(t, y), y)
        if value.requires_grad:
            raise ValueError("the right-hand side closes over tensors that want gradients: name them in tensors=")
        return value, None

    def accept(self, step: Step[Point]) -> tuple[Tensor, Tensor]:
        """Sample and watch a step, and keep what the reverse pass will need of it."""
        samples = self.sample(step)
        if self.watch is not None:
            weights = torch.as_tensor(self.tableau.watched(step.h)).to(step.slopes)
            self.watched.append((weights @ step.slopes).view(3, *step.y1.shape))
            self.watch.t.append(step.t)
            self.watch.h.append(step.h)
            self.watch.scales.append(step.scale)
        if self.keep == "stages":
            self.steps.append(_Kept(step.t, step.t1, samples, cast(list[Pullback], step.points)))
        elif self.keep == "steps":
            self.steps.append(_Kept(step.t, step.t1, samples, None, step.y0, step.slopes[0].clone()))
        self.y = step.y1
        return step.y1, step.slope

    def sample(self, step: Step[Point]) -> list[tuple[int, np.ndarray | None]]:
        """Fill in the states at those of the times that lie in a step; return their numbers and weights."""
        direction, samples = (1 if step.h > 0 else -1), []
        while self.sampled < len(self.ts) and (step.t1 - self.ts[self.sampled]) * direction >= 0:
            time = self.ts[self.sampled]
            weights = None if time == step.t1 else self.interpolate((time - step.t) / step.h)
            self.out[self.sampled] = step.y1 if weights is None else step.combine(weights)
            samples.append((self.sampled, weights))
            self.sampled += 1
        return samples

    def interpolate(self, theta: float) -> np.ndarray:
        """Return the weights (s,) of the slopes in the dense output at a fraction theta of the step."""
        return theta ** np.arange(4, 0, -1) @ self.tableau.dense

    def pullbacks(self, kept: _Kept, rows: Tensor) -> list[Pullback] | list[StepPullback]:
        """Return the pullbacks at the stages of a step, from evaluating them again where they were not kept."""
        if kept.pullbacks is not None:
            return kept.pullbacks
        y, slope = cast(Tensor, kept.y), cast(Tensor, kept.slope)
        self.replaying = True
        return cast(list[Pullback], self.step(kept.t, kept.t1, y, slope, rows).points)

    def backward(self, gout: Tensor, gwatched: Tensor, grads: list[Tensor]) -> Tensor:
        """Pull gradients of the states at ts and of what is watched back to y_0, adding the tensors' to grads."""
        tab = self.tableau
        s, flat = len(tab.c) + 1, gout.reshape(len(gout), -1)
        rows = torch.as_tensor(tab.rows, dtype=gout.dtype, device=gout.device)
        gy = torch.zeros_like(flat[0]) if self.steps else flat[1].clone()
        gslope = torch.zeros_like(gy)
        for number, kept in reversed(list(enumerate(self.steps))):
            h, pullbacks = kept.t1 - kept.t, self.pullbacks(kept, rows)
            weights = rows * h
            if self.watch is None:
                gslopes = torch.zeros(s, gy.numel(), dtype=gy.dtype, device=gy.device)
            else:
                gslopes = torch.as_tensor(tab.watched(h)).to(gy).t() @ gwatched[number].reshape(3, -1)
            gslopes[-1] += gslope
            inside = torch.zeros_like(gy)
            for sample, at in kept.samples:
                if at is None:
                    gy = gy + flat[sample]
                else:
                    inside += flat[sample]
                    gslopes.addr_(torch.as_tensor(at * h).to(gy), flat[sample])
            if not tab.advances:
                gslopes.addr_(weights[s - 1], gy)
                inside += gy
            glast = gy if tab.advances else torch.zeros_like(gy)
            if self.whole is not None:
                (pull,) = cast(list[StepPullback], pullbacks)
                inside += pull(gslopes, glast, grads)
            else:
                for i, pullback in reversed(list(enumerate(cast(list[Pullback], pullbacks), 1))):
                    gstage = pullback(gslopes[i].view(gout.shape[1:]), grads).reshape(-1)
                    gstage = gstage + glast if i == s - 1 else gstage
                    gslopes[:i].addr_(weights[i - 1, :i], gstage)
                    inside += gstage
            gy, gslope = inside, gslopes[0]
        if self.pullback is not None:
            gy = gy + self.pullback(gslope.view(gout.shape[1:]), grads).reshape(-1)
        return (gy + flat[0]).view(gout.shape[1:])


class _Integrate(torch.autograd.Function):
    """Join a solve to automatic differentiation."""

    @staticmethod
    def forward(ctx: Any, run: Run, y0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run.solve(y0)

    @staticmethod
    def backward(ctx: Any, gout: Tensor, gwatched: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        grads = [torch.zeros_like(tensor) for tensor in ctx.saved_tensors]  # which also tells whether they changed
        return None, ctx.run.backward(gout.contiguous(), gwatched, grads), *grads


__all__ = ["Run", "integrate"]
