r"""Penalize what makes the solver take small steps: its own error estimates, and the stiffness that they see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycnf.regularizers.base import Regularizer, check_choice
from pycnf.regularizers.polynomial import CHANNELS, UNITS, Channels, Unit, positive_power
from pycnf.solution import Solution, Steps


@dataclass(frozen=True)
class LocalError(Regularizer):
    r"""Penalize the embedded error estimates of the accepted steps.

    With the error estimate e_j (B x C) of step j and its tolerance ``s_j = atol + rtol * max(|y_j|, |y_{j+1}|)``,

        E = sum_j rho_j^q,    rho_j^2 = mean_B sum_D (e_j / s_j)^2 / D + mean_B (e_j / s_j)^2 of log p,

    so that rho_j is, to a factor sqrt(2) at most, the number that the step control holds below 1. A step of a
    method of order p could have been rho_j^(-1/p) times as large: with q = 1/p the penalty is the number of steps
    that the solve would need if each were as large as its tolerance allows. The estimates are linear in the slopes
    of the step, so the penalty costs no evaluation, and its gradient passes through the solve like the states'.

    This is a regression residual on each step, and so a relative of TPR. The weights d of the estimate
    e = h sum_i d_i k_i annihilate polynomials: sum_i d_i c_i^m = 0 at the nodes c for all m below the order p' of the
    embedded solution. Hence e = h d^T R k with the projection R of the slopes k away from the polynomials of degree
    below p' at c: one functional of what the lower order of the pair cannot integrate, which also sees the stages
    leave the trajectory. The step's dense output, a quartic, would hide just that from a regression of degree >= 4.

    Args:
        weight: Factor of the penalty.
        power: Exponent q > 0.
        unit: ``"tolerance"`` divides by s_j, without gradient through it; ``"state"`` leaves the estimates in units
            of the state and multiplies each step by its size, as published by Pal et al. for q = 1.
        channels: Which errors count: ``"z"``, ``"logp"`` or ``"both"``.

    Raises:
        ValueError: On an impossible setting.

    References:
        Pal, Ma, Shah & Rackauckas, Opening the blackbox: accelerating neural differential equations by regularizing
        internal solver heuristics, ICML 2021.
    """

    name: ClassVar[str] = "error"
    watches_steps: ClassVar[bool] = True

    weight: float = 0.05
    power: float = 2.0
    unit: Unit = "tolerance"
    channels: Channels = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.power > 0 and math.isfinite(self.power)):
            raise ValueError(f"expected a finite power > 0, got {self.power}")
        check_choice("unit", self.unit, UNITS)
        check_choice("channels", self.channels, CHANNELS)

    def penalty(self, solution: Solution) -> Tensor:
        """Return E of one block, a scalar (see :class:`LocalError`)."""
        steps = _steps(solution)
        scaled = self.unit == "tolerance"
        error = steps.error / steps.scale if scaled else steps.error
        D = solution.z.shape[-1]
        square = torch.zeros_like(error[:, 0, 0])
        if self.channels != "logp":
            square = square + error[..., :D].pow(2).mean((1, 2))
        if self.channels != "z":
            if error.shape[-1] == D:
                raise ValueError(f"channels={self.channels!r} needs the log-density: solve with density=True")
            square = square + error[..., D].pow(2).mean(1)
        sizes = 1.0 if scaled else steps.h.abs().to(square)
        return (positive_power(square, self.power / 2) * sizes).sum()


@dataclass(frozen=True)
class Stiffness(Regularizer):
    r"""Penalize the stiffness that an embedded pair with two stages at the end of its steps estimates.

        S = mean_j ‖f(Y_s) - f(Y_{s-1})‖ / ‖Y_s - Y_{s-1}‖,

    where numerator and denominator are taken over the batch and over all channels of step j; the quotient
    approximates the largest eigenvalue of the Jacobian that the step meets.

    Args:
        weight: Factor of the penalty.

    References:
        Pal et al., ICML 2021, after Shampine, Stiffness and nonstiff differential equation solvers, II, 1977.
    """

    name: ClassVar[str] = "stiffness"
    watches_steps: ClassVar[bool] = True

    weight: float = 0.01

    def penalty(self, solution: Solution) -> Tensor:
        """Return S of one block, a scalar (see :class:`Stiffness`)."""
        steps = _steps(solution)
        if steps.slope_change is None or steps.stage_change is None:
            raise ValueError("the stiffness estimate needs a method with two stages at the end: take dopri5 or dopri8")
        slopes = steps.slope_change.flatten(1).pow(2).sum(1)
        stages = steps.stage_change.flatten(1).pow(2).sum(1)
        # where the stages agree to rounding the field is straight, and the quotient would be noise
        resolved = stages.detach() > torch.finfo(stages.dtype).eps ** 2 * steps.scale.flatten(1).pow(2).sum(1)
        quotient = positive_power(slopes, 0.5) / positive_power(stages.clamp_min(torch.finfo(stages.dtype).tiny), 0.5)
        return torch.where(resolved, quotient, torch.zeros_like(quotient)).sum() / max(len(quotient), 1)


def _steps(solution: Solution) -> Steps:
    if solution.steps is None:
        raise ValueError(
            "this regularizer reads the solver's accepted steps: train with an adaptive method, engine='pycnf' and "
            "gradient='backprop' or 'checkpoint'"
        )
    return solution.steps


__all__ = ["LocalError", "Stiffness"]
