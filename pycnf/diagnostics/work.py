"""Work and precision: what each method spends, and what error it really reaches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pycnf.diagnostics.truth import exact_divergence, in_float64, solve_truth
from pycnf.flow import CNF, FlowSolution
from pycnf.solution import SolveError
from pycnf.solve import METHODS, Solver

TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
N_STEPS = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_METHODS = tuple(
    name for name, method in METHODS.items() if method.kind != "scipy" and name != "fixed_adams"
)  # fixed_adams is another name of implicit_adams
FLOOR = 1e-11
"""Errors below this are near the accuracy of the reference and tell no order."""

Channel = Literal["z", "logp"]


@dataclass(frozen=True, kw_only=True)
class WorkPoint:
    """Hold one solve: its settings, its cost and its error against the truth, over a batch.

    Attributes:
        method: Method of the solver.
        kind: ``"adaptive"``, ``"fixed"`` or ``"scipy"``.
        order: Order of the method, 0 where it varies.
        tolerance: rtol = atol, None for a fixed-step method.
        n_steps: Steps per block of a fixed-step method, else None.
        nfe: Evaluations of the field, all blocks together (of a failed solve, those of the block that failed).
        accepted: Accepted steps.
        rejected: Rejected steps.
        error_z: Root mean square error of the final state over samples and dimensions.
        error_z_max: Largest error of the final state.
        error_logp: Root mean square error of the log-density's change, in nats.
        error_logp_max: Largest error of the log-density's change, in nats.
        error_nll: Error of the batch's mean negative log-likelihood, signed, in nats.
        failed: Why there is no error, None where there is one.
    """

    method: str
    kind: str
    order: int
    tolerance: float | None
    n_steps: int | None
    nfe: int
    accepted: int = 0
    rejected: int = 0
    error_z: float = math.nan
    error_z_max: float = math.nan
    error_logp: float = math.nan
    error_logp_max: float = math.nan
    error_nll: float = math.nan
    failed: str | None = None


def work_precision(
    flow: CNF,
    x: Tensor,
    context: Tensor | None = None,
    *,
    methods: Iterable[str] | None = None,
    tolerances: Sequence[float] = TOLERANCES,
    n_steps: Sequence[int] = N_STEPS,
    max_nfe: int | None = 500,
) -> list[WorkPoint]:
    """Solve a batch with many methods at many settings and measure the error of each.

    Everything is computed in float64, so that what is measured is the method and not rounding. The truth is
    :func:`~pycnf.diagnostics.truth.solve_truth`.

    Args:
        flow: The flow, in any precision.
        x: Batch (B, D).
        context: Context (C,) or (B, C) of a conditional flow.
        methods: Names of methods; None for all but SciPy's.
        tolerances: rtol = atol of adaptive methods.
        n_steps: Steps per block of fixed-step methods.
        max_nfe: Budget of each solve and block; a solve that needs more is recorded as failed, and the finer
            settings of its method are left out.

    Returns:
        One point per method and setting, those of a method from coarse to fine.

    Raises:
        ValueError: On an unknown method, no settings, or data that do not fit the flow.
    """
    chosen = list(dict.fromkeys(DEFAULT_METHODS if methods is None else methods))
    settings = [setting for method in chosen for setting in _settings(method, tolerances, n_steps, max_nfe)]
    double = in_float64(flow)
    x, context = x.detach().double(), None if context is None else context.detach().double()
    truth = solve_truth(double, x, context)
    points: list[WorkPoint] = []
    spent: set[str] = set()
    for solver in settings:
        if solver.method not in spent:
            points.append(_measure(double, x, context, truth, solver))
            if points[-1].failed is not None and max_nfe is not None and points[-1].nfe >= max_nfe:
                spent.add(solver.method)
    return points


def observed_order(points: Iterable[WorkPoint], method: str, channel: Channel = "z", *, last: int = 3) -> float:
    """Fit the order at which a method's error falls with its evaluations, error ~ NFE^-order (``fit_order``).

    Args:
        points: Points of :func:`work_precision`.
        method: The method.
        channel: ``"z"`` or ``"logp"``.
        last: Number of points that count, the dearest ones.

    Returns:
        The order, NaN where fewer than two points tell.
    """
    own = [point for point in points if point.method == method and point.failed is None]
    return fit_order(((point.nfe, getattr(point, f"error_{channel}")) for point in own), last=last)


def fit_order(solves: Iterable[tuple[int, float]], *, last: int = 3) -> float:
    """Fit the order p at which errors fall with evaluations, error ~ NFE^-p, by least squares of the logarithms.

    An adaptive method comes to its order from above: evaluations that choose the first steps weigh less and less.

    Args:
        solves: Evaluations and error of each solve of one method; errors below ``FLOOR`` are left out.
        last: Number of solves that count, the dearest ones.

    Returns:
        The order, NaN where fewer than two numbers of evaluations are left.

    >>> round(fit_order((n, 7.0 * n**-4) for n in (10, 20, 40)), 6)
    4.0
    """
    told = {nfe: error for nfe, error in solves if math.isfinite(error) and error > FLOOR}
    used = sorted(told.items())[-last:]
    if len(used) < 2:
        return math.nan
    nfe, errors = np.log(np.array(used, dtype=float)).T
    return float(-np.polyfit(nfe, errors, 1)[0])


def _settings(method: str, tolerances: Sequence[float], n_steps: Sequence[int], max_nfe: int | None) -> list[Solver]:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if METHODS[method].kind == "fixed":
        if not n_steps:
            raise ValueError(f"method {method!r} takes equal steps: give n_steps")
        return [Solver(method=method, n_steps=n, rtol=1e-10, atol=1e-10, max_nfe=max_nfe) for n in sorted(n_steps)]
    if not tolerances:
        raise ValueError(f"method {method!r} chooses its own steps: give tolerances")
    return [Solver(method=method, rtol=t, atol=t, max_nfe=max_nfe) for t in sorted(tolerances, reverse=True)]


def _measure(flow: CNF, x: Tensor, context: Tensor | None, truth: FlowSolution, solver: Solver) -> WorkPoint:
    fixed, method = solver.kind == "fixed", METHODS[solver.method]
    settings: dict[str, Any] = {
        "method": solver.method,
        "kind": solver.kind,
        "order": method.order,
        "tolerance": None if fixed else solver.rtol,
        "n_steps": solver.n_steps,
    }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Functional iteration did not converge", UserWarning)
            found = flow.solve(x, context, solver=solver, divergence=exact_divergence(flow))
    except SolveError as err:
        return WorkPoint(**settings, nfe=err.nfe, failed=str(err))
    z, logp = found.z - truth.z, found.logp - truth.logp
    return WorkPoint(
        **settings,
        nfe=found.stats.nfe,
        accepted=found.stats.accepted,
        rejected=found.stats.rejected,
        error_z=float(z.square().mean().sqrt()),
        error_z_max=float(z.abs().max()),
        error_logp=float(logp.square().mean().sqrt()),
        error_logp_max=float(logp.abs().max()),
        error_nll=float(truth.log_prob.mean() - found.log_prob.mean()),
    )


__all__ = [
    "DEFAULT_METHODS",
    "FLOOR",
    "N_STEPS",
    "TOLERANCES",
    "WorkPoint",
    "fit_order",
    "observed_order",
    "work_precision",
]
