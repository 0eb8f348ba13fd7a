r"""Trajectory polynomial regularization (TPR): keep trajectories close to their own polynomial regression."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pycnf.regularizers.base import Regularizer
from pycnf.solution import Solution

TimeLaw = Literal["uniform", "stratified", "chebyshev", "gauss"]
Channels = Literal["z", "logp", "both"]


@dataclass(frozen=True)
class TPR(Regularizer):
    r"""Penalize the distance of each trajectory from its polynomial regression of degree p.

    With the states Z at K = n + 2 times tau = T {0, u_1 <= ... <= u_n, 1}, the matrix G of the polynomials of
    degree <= p at tau and the projection R = I - Q Q^T, Q an orthonormal basis of the columns of G,

        L_p = ‖R Z‖² / (K B),

    summed over dimensions and blocks, averaged over the batch of B. The states come from the solver's dense
    output: no evaluation of the field is added to the forward solve. L_p = 0 exactly when every trajectory
    agrees with a polynomial of degree <= p at the sampled times; it does not change when time is rescaled and
    scales with the square of the states.

    Args:
        weight: Factor alpha of L_p.
        degree: Degree p >= 0 of the regression.
        times: Number n >= 1 of interior times; K = n + 2 must exceed p + 1, else L_p is identically 0.
        law: Law of the interior times: ``"uniform"`` (sorted independent draws, the paper's), ``"stratified"``
            (one draw in each of n equal intervals), ``"chebyshev"`` or ``"gauss"`` (fixed nodes of the
            Chebyshev or Legendre polynomial of degree n on (0, 1)).
        channels: What is regressed: ``"z"`` (the paper's), ``"logp"`` (the log-density along the trajectory,
            which the step control sees too), or ``"both"``.
        logp_weight: Factor of the log-density channel relative to z, for ``channels="both"``.
        per_dimension: Divide by D ln 2, the paper's choice for images, whose likelihood it counts in bits per
            dimension. Beside a likelihood in nats this weakens the penalty by that factor.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degree < 0 or self.times < 1:
            raise ValueError(f"expected degree >= 0 and times >= 1, got {self.degree} and {self.times}")
        if self.times + 2 <= self.degree + 1:
            raise ValueError(
                f"degree {self.degree} interpolates the {self.times + 2} sampled states, so the penalty is always "
                f"0: take degree <= {self.times} or times >= {self.degree}"
            )
        for setting, value, allowed in (
            ("law", self.law, ("uniform", "stratified", "chebyshev", "gauss")),
            ("channels", self.channels, ("z", "logp", "both")),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {setting} {value!r}: choose one of {', '.join(allowed)}")
        if not (self.logp_weight >= 0 and math.isfinite(self.logp_weight)):
            raise ValueError(f"expected a finite logp_weight >= 0, got {self.logp_weight}")

    def sample_times(self) -> Tensor:
        """Draw the n interior times as sorted fractions of T, by the law of this regularizer."""
        n = self.times
        if self.law == "gauss":
            return torch.as_tensor((np.polynomial.legendre.leggauss(n)[0] + 1) / 2)
        if self.law == "chebyshev":
            return torch.as_tensor((1 - np.cos(np.pi * (np.arange(n) + 0.5) / n)) / 2)
        u = torch.rand(n, dtype=torch.float64)
        if self.law == "stratified":
            return (torch.arange(n) + u) / n
        return u.sort().values

    def penalty(self, solution: Solution) -> Tensor:
        """Return L_p of one block, a scalar (see :class:`TPR`).

        Args:
            solution: Solve with z of shape ``(K, *batch, D)`` and, for the log-density channel, logp ``(K, *batch)``.
        """
        total = torch.zeros((), dtype=solution.z.dtype, device=solution.z.device)
        if self.channels != "logp":
            total = total + polynomial_residual(solution.ts, solution.z, self.degree)
        if self.channels != "z":
            if solution.logp is None:
                raise ValueError(f"channels={self.channels!r} needs the log-density: solve with density=True")
            factor = self.logp_weight if self.channels == "both" else 1.0
            total = total + factor * polynomial_residual(solution.ts, solution.logp.unsqueeze(-1), self.degree)
        return total / (solution.z.shape[-1] * math.log(2)) if self.per_dimension else total


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


__all__ = ["TPR", "orthonormal_basis", "polynomial_residual"]
