r"""Times at which a solve is sampled: the laws that they follow, and the quadrature rules that go with them."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

TimeLaw = Literal["uniform", "stratified", "chebyshev", "gauss"]
LAWS: tuple[str, ...] = get_args(TimeLaw)


def draw_times(law: str, n: int) -> Tensor:
    """Return n sorted times in (0, 1), (n,) float64.

    Args:
        law: ``"uniform"`` (sorted independent draws), ``"stratified"`` (one draw in each of n equal intervals),
            ``"chebyshev"`` or ``"gauss"`` (the zeros of the Chebyshev or Legendre polynomial of degree n).
        n: Number of times.
    """
    if law == "gauss":
        return torch.as_tensor((np.polynomial.legendre.leggauss(n)[0] + 1) / 2)
    if law == "chebyshev":
        return torch.as_tensor((1 - np.cos(np.pi * (np.arange(n) + 0.5) / n)) / 2)
    u = torch.rand(n, dtype=torch.float64)
    if law == "stratified":
        return (torch.arange(n) + u) / n
    return u.sort().values


def quadrature_weights(law: str, n: int) -> Tensor:
    r"""Return the weights w of int_0^1 f(u) du ≈ sum_i w_i f(u_i) at the times of a law, (n,) float64.

    For the random laws all are 1/n, and the sum is an unbiased estimate. For the fixed nodes the rule is exact on
    polynomials: of degree below 2n for ``"gauss"``, below n for ``"chebyshev"`` (Fejér's first rule).

    Args:
        law: Law of the times (:func:`draw_times`).
        n: Number of times.

    References:
        Waldvogel, Fast construction of the Fejér and Clenshaw-Curtis quadrature rules, BIT 46, 2006.

    >>> u, w = draw_times("gauss", 3), quadrature_weights("gauss", 3)
    >>> bool(torch.isclose((w * u**5).sum(), torch.tensor(1 / 6).double()))
    True
    """
    if law == "gauss":
        return torch.as_tensor(np.polynomial.legendre.leggauss(n)[1] / 2)
    if law == "chebyshev":
        j = np.arange(1, n // 2 + 1)
        angles = np.pi * (2 * np.arange(n) + 1) / n
        return torch.as_tensor((1 - 2 * (np.cos(np.outer(angles, j)) / (4 * j**2 - 1)).sum(1)) / n)
    return torch.full((n,), 1 / n, dtype=torch.float64)


__all__ = ["LAWS", "TimeLaw", "draw_times", "quadrature_weights"]
