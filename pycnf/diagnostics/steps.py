r"""Local errors: what a solve believes of each of its steps, and what is true.

A step from (t, y_0) of size h that ends in y_1 has the true local error y_1 - phi_h(y_0), with phi the exact flow of
the dynamics; the solver only knows its embedded estimate e of it. Both are told in units of the tolerance,

    e_i / (atol + rtol max(|y_0i|, |y_1i|)),

in which a step is accepted when the norm of e is at most 1: the larger root mean square of the channels z and log p.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pycnf.diagnostics.truth import carry, exact_divergence, in_float64
from pycnf.flow import CNF
from pycnf.scale import evaluation_mode
from pycnf.solution import SolveStats
from pycnf.solve import METHODS, Solver
from pycnf.stepper import Attempt

Error = Literal["estimate", "true"]
COUNTS = 0.01
"""Local error, in units of the tolerance, below which a step's ratio of true error and estimate tells nothing: in a
tiny first or last step it is that of rounding."""


@dataclass(frozen=True)
class LocalErrors:
    """Hold the steps of one solve, S of them with the rejected ones, and their errors in units of the tolerance.

    The last of the D + 1 columns is log p, the others are z. All tensors but ``block`` and ``accepted`` are float64.

    Attributes:
        block: Block of each step, (S,).
        t: Time at its start, in its block, (S,).
        h: Its size, (S,).
        accepted: Whether it was accepted, (S,).
        ratio: Norm of its estimate, as the step control saw it, (S,).
        estimate: Embedded error estimate, signed, (S, B, D + 1).
        true: True local error, signed, (S, B, D + 1).
        y0: State at its start, log p counted from the start of the block, (S, B, D + 1).
        y1: State at its end, (S, B, D + 1).
        T: End time of a block.
        solver: Solver whose steps these are.
        stats: What the solve cost.
    """

    block: Tensor
    t: Tensor
    h: Tensor
    accepted: Tensor
    ratio: Tensor
    estimate: Tensor
    true: Tensor
    y0: Tensor
    y1: Tensor
    T: float
    solver: Solver
    stats: SolveStats

    def __len__(self) -> int:
        return len(self.t)

    def only_accepted(self) -> LocalErrors:
        """Leave the rejected steps out."""
        own = ("block", "t", "h", "accepted", "ratio", "estimate", "true", "y0", "y1")
        return dataclasses.replace(self, **{name: getattr(self, name)[self.accepted] for name in own})

    @property
    def clock(self) -> Tensor:
        """Time at the start of each step, counted on through the blocks, (S,)."""
        return self.block * self.T + self.t

    @property
    def counts(self) -> Tensor:
        """Whether each step was accepted and its error, true or estimated, is above :data:`COUNTS`, (S,)."""
        return self.accepted & (torch.maximum(self.norm("estimate"), self.norm("true")) > COUNTS)

    def density(self) -> tuple[Tensor, Tensor]:
        """Return the density of accepted steps over time, in steps per unit of t.

        Returns:
            The edges (N + 1,) of the N accepted steps on :attr:`clock`, and the density 1 / h in each, (N,).
        """
        steps = self.only_accepted()
        end = steps.clock[-1:] + steps.h[-1:]
        return torch.cat([steps.clock, end]), 1 / steps.h

    def rms(self, error: Error) -> dict[str, Tensor]:
        """Return the root mean square over samples and dimensions, (S,), of channel ``"z"`` and of ``"logp"``."""
        square = getattr(self, error).square()
        return {"z": square[..., :-1].mean((1, 2)).sqrt(), "logp": square[..., -1].mean(1).sqrt()}

    def norm(self, error: Error) -> Tensor:
        """Return the norm of the step control, the larger of the two channels, (S,)."""
        found = self.rms(error)
        return torch.maximum(found["z"], found["logp"])

    def deciding(self, error: Error = "estimate") -> list[str]:
        """Name the channel that decides each step's norm, ``"z"`` or ``"logp"``."""
        found = self.rms(error)
        return ["z" if z >= logp else "logp" for z, logp in zip(found["z"], found["logp"], strict=True)]

    def shares(self, error: Error = "estimate") -> Tensor:
        """Return each sample's share of the squared norm of each step, (S, B), which sums to 1 over the samples.

        The samples of a step without any error share it equally.
        """
        square = getattr(self, error).square()
        in_z = torch.tensor([name == "z" for name in self.deciding(error)])
        own = torch.where(in_z[:, None], square[..., :-1].mean(2), square[..., -1])
        total = own.sum(1, keepdim=True)
        return torch.where(total > 0, own / total.clamp_min(torch.finfo(own.dtype).tiny), 1 / own.shape[1])

    def rows(self) -> list[dict[str, Any]]:
        """Return one mapping per step, ready for a table or JSON; errors are in units of the tolerance."""
        estimate, true = self.rms("estimate"), self.rms("true")
        found = self.norm("true") / self.norm("estimate")
        deciding, largest = self.deciding(), self.shares().amax(1)
        return [
            {
                "block": int(self.block[i]),
                "t": float(self.t[i]),
                "h": float(self.h[i]),
                "accepted": bool(self.accepted[i]),
                "norm": float(self.ratio[i]),
                **{f"estimate_{name}": float(value[i]) for name, value in estimate.items()},
                **{f"true_{name}": float(value[i]) for name, value in true.items()},
                "true_over_estimate": float(found[i]),
                "deciding": deciding[i],
                "largest_share": float(largest[i]),
            }
            for i in range(len(self))
        ]


def local_errors(flow: CNF, x: Tensor, context: Tensor | None = None, *, solver: Solver | None = None) -> LocalErrors:
    """Solve a batch and measure the true local error of every step that was tried.

    The solve is the flow's own, in its own precision; each step is then solved again from its own start in float64
    to rounding (:func:`~pycnf.diagnostics.truth.carry`). In float32 the true errors hold the rounding of the step.
    The divergence is exact, also where the flow has an estimator.

    Args:
        flow: The flow.
        x: Batch (B, D) in the flow's precision; all of it decides the steps together.
        context: Context (C,) or (B, C) of a conditional flow.
        solver: Adaptive solver; None for ``flow.eval_solver``.

    Returns:
        The steps and their errors (:class:`LocalErrors`).

    Raises:
        ValueError: For a method that has no embedded error estimate, or data that do not fit the flow.
        pycnf.SolveError: When the solve fails.

    >>> found = local_errors(CNF(2, hidden=(8,)), torch.randn(5, 2))
    >>> bool((found.norm("estimate")[found.accepted] <= 1).all()), len(found) == int(found.accepted.sum())
    (True, True)
    """
    used = dataclasses.replace(solver or flow.eval_solver, engine="pycnf", gradient="backprop")
    if used.kind != "adaptive":
        names = ", ".join(name for name, method in METHODS.items() if method.kind == "adaptive")
        raise ValueError(f"method {used.method!r} has no embedded error estimate: choose one of {names}")
    x = x.detach().reshape(-1, x.shape[-1]) if x.ndim else x
    seen: list[tuple[int, Attempt]] = []
    with torch.no_grad(), evaluation_mode(flow):
        divergence = exact_divergence(flow)
        stats = flow.solve(
            x, context, solver=used, divergence=divergence, observer=lambda *step: seen.append(step)
        ).stats
    double = in_float64(flow)
    given = None if context is None else context.detach().double().expand(len(x), flow.context)
    factor = METHODS[used.method].tolerance_factor
    estimates, trues = [], []
    for block, step in seen:
        y0, y1 = step.y0.double(), step.y1.double()
        scale = torch.maximum(y0.abs(), y1.abs()).mul_(used.rtol).add_(used.atol) * factor
        exact = carry(double, block, y0, step.t, step.t + step.h, given)
        estimates.append(step.error.double().cpu())
        trues.append(((y1 - exact) / scale).cpu())
    steps = [step for _, step in seen]
    return LocalErrors(
        block=torch.tensor([block for block, _ in seen]),
        t=torch.tensor([step.t for step in steps], dtype=torch.float64),
        h=torch.tensor([step.h for step in steps], dtype=torch.float64),
        accepted=torch.tensor([step.accepted for step in steps]),
        ratio=torch.tensor([step.ratio for step in steps], dtype=torch.float64),
        estimate=torch.stack(estimates),
        true=torch.stack(trues),
        y0=torch.stack([step.y0.double().cpu() for step in steps]),
        y1=torch.stack([step.y1.double().cpu() for step in steps]),
        T=flow.T,
        solver=used,
        stats=stats,
    )


__all__ = ["COUNTS", "LocalErrors", "local_errors"]
