r"""Polynomial content of trajectories: their coefficients on orthonormal polynomials of time, and what is left over.

On [0, T] the polynomials q_k(t) = sqrt(2k + 1) P_k(2t/T - 1), with Legendre's P_k, are orthonormal in the mean over
time, (1/T) int q_j q_k dt = delta_jk. A trajectory z has the coefficients c_k = (1/T) int z q_k dt; what is left over
at degree p, r_p = z - sum_{k<=p} c_k q_k, is what trajectory polynomial regularization of degree p samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pycnf.diagnostics.truth import joint_states, solve_truth
from pycnf.flow import CNF


@dataclass(frozen=True)
class PolynomialContent:
    """Hold the polynomial content of the trajectories of a batch, in each of N blocks.

    The last of the D + 1 columns is log p, counted from the start of the block; the others are z.

    Attributes:
        coefficients: c_0 ... c_P, (N, P + 1, B, D + 1), float64.
        residuals: Root mean square over time of r_p for p = 0 ... P, (N, P + 1, B, D + 1).
        T: End time of a block.
    """

    coefficients: Tensor
    residuals: Tensor
    T: float

    @property
    def degree(self) -> int:
        """Highest degree P."""
        return self.coefficients.shape[1] - 1

    def coefficient_rms(self) -> dict[str, Tensor]:
        """Return the root mean square over samples and dimensions of c_k, (N, P + 1), of ``"z"`` and ``"logp"``."""
        return _channels(self.coefficients)

    def residual_rms(self) -> dict[str, Tensor]:
        """Return the root mean square over time, samples and dimensions of r_p, (N, P + 1), of z and log p."""
        return _channels(self.residuals)


def polynomial_content(
    flow: CNF, x: Tensor, context: Tensor | None = None, *, degree: int = 8, nodes: int | None = None
) -> PolynomialContent:
    """Expand the trajectories of a batch in orthonormal polynomials of time, block by block.

    The trajectories are solved to rounding, with a step that ends at each node of a Gauss-Legendre quadrature; the
    quadrature is exact for a trajectory that is a polynomial of degree up to 2 nodes - 1 - degree.

    Args:
        flow: The flow, in any precision.
        x: Batch (B, D).
        context: Context (C,) or (B, C) of a conditional flow.
        degree: Highest degree P >= 0.
        nodes: Number of nodes, more than P; None for P + 6.

    Returns:
        Coefficients and residuals (:class:`PolynomialContent`).

    Raises:
        ValueError: On an impossible degree or number of nodes.
    """
    nodes = degree + 6 if nodes is None else nodes
    if degree < 0 or nodes <= degree:
        raise ValueError(f"expected degree >= 0 and more nodes than that, got degree {degree} and {nodes} nodes")
    u, weights, basis = legendre(degree, nodes)
    solution = solve_truth(flow, x.reshape(-1, x.shape[-1]), context, times=torch.from_numpy((1 + u) / 2 * flow.T))
    mean, q = torch.from_numpy(weights), torch.from_numpy(basis)
    coefficients, residuals = [], []
    for block in solution.blocks:
        y = joint_states(block)[1:-1].cpu()
        c = torch.einsum("k,kp,kbd->pbd", mean, q, y)
        left = y.clone()
        found = []
        for p in range(degree + 1):
            left -= q[:, p, None, None] * c[p]
            found.append(torch.einsum("k,kbd->bd", mean, left.square()).sqrt())
        coefficients.append(c)
        residuals.append(torch.stack(found))
    return PolynomialContent(torch.stack(coefficients), torch.stack(residuals), flow.T)


def legendre(degree: int, nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the nodes u in (-1, 1) and mean weights of Gauss-Legendre quadrature, and q_0 ... q_P there.

    Args:
        degree: Highest degree P.
        nodes: Number K of nodes.

    Returns:
        Nodes (K,), weights (K,) that sum to 1, and polynomials (K, P + 1), orthonormal under the weights.

    >>> u, w, q = legendre(5, 8)
    >>> bool(np.allclose(q.T @ np.diag(w) @ q, np.eye(6)))
    True
    """
    u, weights = np.polynomial.legendre.leggauss(nodes)
    basis = np.polynomial.legendre.legvander(u, degree) * np.sqrt(2 * np.arange(degree + 1) + 1)
    return u, weights / 2, basis


def _channels(values: Tensor) -> dict[str, Tensor]:
    square = values.square()
    return {"z": square[..., :-1].mean((2, 3)).sqrt(), "logp": square[..., -1].mean(2).sqrt()}


__all__ = ["PolynomialContent", "legendre", "polynomial_content"]
