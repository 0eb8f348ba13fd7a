r"""Trajectory polynomial regularization (TPR): keep trajectories close to their own polynomial regression."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from pycnf.regularizers.base import Regularizer, check_choice
from pycnf.regularizers.times import LAWS, TimeLaw, draw_times
from pycnf.solution import Solution

Channels = Literal["z", "logp", "both"]
CHANNELS: tuple[str, ...] = get_args(Channels)
Unit = Literal["state", "tolerance"]
UNITS: tuple[str, ...] = get_args(Unit)


@dataclass(frozen=True)
class TPR(Regularizer):
    r"""Penalize the distance of each trajectory from its polynomial regression of degree p.

    With the states Z at K = n + 2 times tau = T {0, u_1 <= ... <= u_n, 1}, the matrix G of the polynomials of
    degree <= p at tau and the projection R = I - Q Q^T, Q an orthonormal basis of the columns of G,

        L_p = ‖R Z‖² / (K B),

    summed over dimensions and blocks, averaged over the batch of B. The states come from the solver's dense
    output: no evaluation of the field is added to the forward solve. L_p = 0 exactly when every trajectory
    agrees with a polynomial of degree <= p at the sampled times; it does not change when time is rescaled and
    scales with the square of the states. Dense output is a quartic on each step: degrees above 3 see how steps differ
    from one another, and nothing of a solve in one step, unless the solver's samples are ``"exact"``.

    ``unit="tolerance"`` speaks the language of the step control instead: the residual of each trajectory and channel
    is divided by its tolerance ``s = atol + rtol * max_k |Z_k|``, without gradient through s, and averaged over D, so
    that sqrt(L_p) is the root mean square residual in units of the tolerance. The residual of a degree p falls like
    h^(p+1) when a trajectory is cut into pieces of length h: with ``power=1/(p+1)`` the penalty estimates into how
    many pieces it must be cut until polynomials of degree p follow it to tolerance.

    Args:
        weight: Factor alpha of L_p.
        degree: Degree p >= 0 of the regression.
        times: Number n >= 1 of interior times; K = n + 2 must exceed p + 1, else L_p is identically 0.
        law: Law of the interior times: ``"uniform"`` (sorted independent draws, the paper's), ``"stratified"``
            (one draw in each of n equal intervals), ``"chebyshev"`` or ``"gauss"`` (fixed nodes of the
            Chebyshev or Legendre polynomial of degree n on (0, 1)).
        channels: What is regressed: ``"z"`` (the paper's), ``"logp"`` (the log-density along the trajectory,
            which the step control sees too), or ``"both"``, all that the step control sees.
        logp_weight: Factor of the log-density channel relative to z, for ``channels="both"``.
        per_dimension: Divide by D ln 2, the paper's choice for images, whose likelihood it counts in bits per
            dimension. Beside a likelihood in nats this weakens the penalty by that factor.
        unit: ``"state"`` (the paper's) or ``"tolerance"``.
        power: Exponent q > 0 of the root mean square residual: the penalty is L_p^(q/2); 2, the paper's, is L_p.

    Raises:
        ValueError: On an impossible setting, with the possible ones.

    References:
        Huang & Yeh, Accelerating continuous normalizing flow with trajectory polynomial regularization,
        AAAI 2021, arXiv:2012.04228.

    >>> from pycnf.solution import SolveStats
    >>> ts = torch.tensor([0.0, 0.3, 0.4, 1.0], dtype=torch.float64)
    >>> line = ts.view(-1, 1, 1) * torch.ones(1, 5, 2, dtype=torch.float64)
    >>> bool(TPR().penalty(Solution(ts, line, None, SolveStats())) < 1e-25)
    True
    >>> bool(TPR().penalty(Solution(ts, line**2, None, SolveStats())) > 1e-3)
    True
    """

    name: ClassVar[str] = "tpr"

    weight: float = 5.0
    degree: int = 1
    times: int = 2
    law: TimeLaw = "uniform"
    channels: Channels = "z"
    logp_weight: float = 1.0
    per_dimension: bool = False
    unit: Unit = "state"
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degree < 0 or self.times < 1:
            raise ValueError(f"expected degree >= 0 and times >= 1, got {self.degree} and {self.times}")
        if self.times + 2 <= self.degree + 1:
            raise ValueError(
                f"degree {self.degree} interpolates the {self.times + 2} sampled states, so the penalty is always "
                f"0: take degree <= {self.times} or times >= {self.degree}"
            )
        check_choice("law", self.law, LAWS)
        check_choice("channels", self.channels, CHANNELS)
        check_choice("unit", self.unit, UNITS)
        if not (self.logp_weight >= 0 and math.isfinite(self.logp_weight)):
            raise ValueError(f"expected a finite logp_weight >= 0, got {self.logp_weight}")
        if not (self.power > 0 and math.isfinite(self.power)):
            raise ValueError(f"expected a finite power > 0, got {self.power}")
        if self.per_dimension and self.unit == "tolerance":
            raise ValueError("per_dimension counts states, and unit='tolerance' averages over D as it is: choose one")

    def sample_times(self) -> Tensor:
        """Draw the n interior times as sorted fractions of T, by the law of this regularizer."""
        return draw_times(self.law, self.times)

    def penalty(self, solution: Solution) -> Tensor:
        """Return L_p of one block, a scalar (see :class:`TPR`).

        Args:
            solution: Solve with z of shape ``(K, *batch, D)`` and, for the log-density channel, logp ``(K, *batch)``.
        """
        total = torch.zeros((), dtype=solution.z.dtype, device=solution.z.device)
        D = solution.z.shape[-1]
        if self.channels != "logp":
            on_z = self._residual(solution, solution.z)
            total = total + (on_z / D if self.unit == "tolerance" else on_z)
        if self.channels != "z":
            if solution.logp is None:
                raise ValueError(f"channels={self.channels!r} needs the log-density: solve with density=True")
            factor = self.logp_weight if self.channels == "both" else 1.0
            total = total + factor * self._residual(solution, solution.logp.unsqueeze(-1))
        total = total / (D * math.log(2)) if self.per_dimension else total
        return total if self.power == 2 else positive_power(total, self.power / 2)

    def _residual(self, solution: Solution, y: Tensor) -> Tensor:
        if self.unit == "tolerance":
            if solution.tolerance is None:
                raise ValueError("unit='tolerance' needs a solve that has one: take an adaptive method")
            rtol, atol = solution.tolerance
            y = y / (atol + rtol * y.detach().abs().amax(0))
        return polynomial_residual(solution.ts, y, self.degree)


def polynomial_residual(ts: Tensor, y: Tensor, degree: int) -> Tensor:
    r"""Return ‖R Y‖² / (K B), the mean squared distance of trajectories from their regression.

    Args:
        ts: Times (K,).
        y: States ``(K, *batch, C)``.
        degree: Degree p of the regression; 0 is returned where K <= p + 1.

    Returns:
        A scalar: summed over the C columns, averaged over times and batch.
    """
    if len(ts) <= degree + 1:
        return torch.zeros((), dtype=y.dtype, device=y.device)
    q = orthonormal_basis(ts, degree).to(y)
    flat = y.flatten(1)
    residual = flat - q @ (q.t() @ flat)
    rows = y.numel() // y.shape[-1]
    return residual.pow(2).sum() / rows


def orthonormal_basis(ts: Tensor, degree: int) -> Tensor:
    """Return Q (K, p+1) float64, an orthonormal basis of the polynomials of degree <= p at the times ts (K,)."""
    ts = ts.detach().double()
    x = 2 * (ts - ts[0]) / (ts[-1] - ts[0]) - 1
    columns = [torch.ones_like(x), x]
    for k in range(1, degree):
        columns.append(((2 * k + 1) * x * columns[k] - k * columns[k - 1]) / (k + 1))
    return torch.linalg.qr(torch.stack(columns[: degree + 1], dim=1)).Q


def positive_power(x: Tensor, power: float) -> Tensor:
    """Return x^power for x >= 0, with gradient 0 where x = 0."""
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).pow(power))


__all__ = ["CHANNELS", "TPR", "UNITS", "Channels", "Unit", "orthonormal_basis", "polynomial_residual", "positive_power"]
