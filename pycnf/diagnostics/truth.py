"""What errors are measured against: the flow in float64, solved to rounding."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from pycnf.divergence import Divergence, Exact
from pycnf.flow import CNF, FlowSolution
from pycnf.joint import JointDynamics
from pycnf.solution import Solution
from pycnf.solve import Solver

TRUTH = Solver(method="dopri8", rtol=1e-12, atol=1e-12, samples="exact")
"""Dormand and Prince's method of order 8 at tolerance 1e-12, with a step that ends at every sampled time."""


def exact_divergence(flow: CNF) -> Divergence:
    """Return the flow's evaluation divergence where it is exact, and the exact one in place of an estimator.

    An estimator's probes differ from solve to solve, so that solves could not be compared.
    """
    return flow.eval_divergence if isinstance(flow.eval_divergence, Exact) else Exact()


def in_float64(flow: CNF) -> CNF:
    """Return a copy of a flow in float64 and in evaluation mode."""
    return copy.deepcopy(flow).double().eval()


def solve_truth(
    flow: CNF, x: Tensor, context: Tensor | None = None, *, times: Tensor | Sequence[float] | None = None
) -> FlowSolution:
    """Solve a flow from data to base density to rounding (:data:`TRUTH`), in float64, without gradients.

    Args:
        flow: The flow, in any precision.
        x: Data, shape (B, D).
        context: Context (C,) or (B, C) of a conditional flow.
        times: Interior times in (0, T) at which each block's states are wanted.

    Returns:
        The solution, in float64.
    """
    given = None if context is None else context.double()
    with torch.no_grad():
        return in_float64(flow).solve(x.double(), given, times=times, solver=TRUTH, divergence=exact_divergence(flow))


def joint_states(solution: Solution) -> Tensor:
    """Return the states (z, log p) of one block at the solution's times, (K, B, D + 1).

    Raises:
        ValueError: When the solve left the density out.
    """
    if solution.logp is None:
        raise ValueError("this solve left the density out: solve with density=True")
    return torch.cat([solution.z, solution.logp.unsqueeze(-1)], dim=-1)


def carry(
    flow: CNF,
    block: int,
    y: Tensor,
    t0: float,
    t1: float,
    context: Tensor | None = None,
) -> Tensor:
    """Carry states y = (z, log p) of one block from t0 to t1 to rounding.

    The step control looks at the worst entry of the batch instead of a
    mean, so that every sample is exact.

    Args:
        flow: The flow, in float64.
        block: Index of the block.
        y: States at t0, float64, shape (B, D + 1).
        t0: Start time.
        t1: End time.
        context: Context (B, C) of a conditional flow.

    Returns:
        States at t1, shape (B, D + 1).
    """
    field, divergence = flow.fields[block], exact_divergence(flow)
    with torch.no_grad():
        dynamics = JointDynamics(divergence.bind(field, y[:, :-1], context))
        _, ys, _ = TRUTH.integrate(dynamics, y, t0, t1, norm=_largest)
        return ys[-1]


def _largest(error: Tensor) -> Tensor:
    return error.abs().max()


__all__ = ["TRUTH", "carry", "exact_divergence", "in_float64", "joint_states", "solve_truth"]
