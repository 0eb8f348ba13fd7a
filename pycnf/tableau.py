r"""Tableaus of the embedded Runge-Kutta pairs, read from torchdiffeq.

A step of size h from y_0 has the stages Y_i = y_0 + h sum_j a_ij k_j with the slopes k_i = f(t + c_i h, Y_i), the
solution y_1 = y_0 + h sum_j b_j k_j and the error estimate e = h sum_j e_j k_j: everything is linear in the slopes.

References:
    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, sections II.4 and II.6.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from torchdiffeq._impl.odeint import SOLVERS


@dataclass(frozen=True)
class Tableau:
    """Hold an embedded Runge-Kutta pair in float64.

    Attributes:
        order: Order of the advanced solution.
        c: Nodes of the stages after the first, (s-1,).
        rows: The s-1 rows a_i, the weights b of the solution and the weights of the error estimate, (s+1, s).
        dense: Coefficients of theta^4 ... theta of the quartic interpolant's weights on the slopes, (4, s).
        advances: Whether the last stage is the solution itself.
        paired: Whether the last two stages both sit at the end of the step, so that the quotient of the changes of
            slope and state between them estimates the stiffness.
    """

    order: int
    c: np.ndarray
    rows: np.ndarray
    dense: np.ndarray
    advances: bool
    paired: bool

    def watched(self, h: float) -> np.ndarray:
        """Return the weights on the slopes of a step's error, and of its last change of slope and state, (3, s)."""
        s = self.rows.shape[1]
        slope = np.zeros(s)
        slope[-1], slope[-2] = 1.0, -1.0
        before = self.rows[s - 3] if s > 2 else np.zeros(s)
        return np.stack([h * self.rows[s], slope, h * (self.rows[s - 2] - before)])


@functools.cache
def tableau(method: str) -> Tableau:
    """Return the tableau of an adaptive method, as torchdiffeq defines it."""
    solver = SOLVERS[method]
    source, mid = solver.tableau, np.asarray(solver.mid.double())
    b, error = np.asarray(source.c_sol.double()), np.asarray(source.c_error.double())
    c = np.asarray(source.alpha.double())
    s = len(b)
    rows = np.zeros((s + 1, s))
    for i, row in enumerate(source.beta):
        rows[i, : len(row)] = row.double()
    rows[s - 1], rows[s] = b, error
    first, last = np.eye(s)[0], np.eye(s)[-1]
    dense = np.stack(
        [
            2 * (last - first) - 8 * b + 16 * mid,
            5 * first - 3 * last + 14 * b - 32 * mid,
            last - 4 * first - 5 * b + 16 * mid,
            first,
        ]
    )
    return Tableau(
        solver.order, c, rows, dense, bool(np.allclose(rows[s - 2], b)), bool(s > 2 and np.allclose(c[-2:], 1))
    )


__all__ = ["Tableau", "tableau"]
