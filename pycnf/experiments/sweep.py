"""What the tolerance alone does to a trained flow: evaluations, steps and the error of log p that is really reached."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pycnf.diagnostics.truth import exact_divergence, in_float64, solve_truth
from pycnf.flow import CNF, FlowSolution
from pycnf.solution import SolveError, SolveStats
from pycnf.solve import Solver

Row = dict[str, Any]
Solved = tuple[Tensor, SolveStats, int]
"""Log p (N,) of all rows, the counts of all solves, and the number of solves."""


def sweep_tolerances(
    flow: CNF,
    x: Tensor,
    tolerances: Sequence[float],
    *,
    batch_size: int = 1000,
    truth_rows: int = 1000,
    warm_start: bool = True,
) -> list[Row]:
    """Repeat the test of a flow at several tolerances, and measure the error of log p at each.

    Everything is computed in float64 with the exact divergence, so that what is measured is the solver and not
    rounding. The truth is :func:`~pycnf.diagnostics.truth.solve_truth`. As rows do not act on one another in it,
    it is computed for some rows of each batch only, while the solves keep whole batches, which set the steps.

    Args:
        flow: The flow; its ``eval_solver`` with each tolerance in turn is used.
        x: Rows, shape (N, D).
        tolerances: Tolerances, rtol = atol.
        batch_size: Rows of one solve.
        truth_rows: Rows, over all batches, at which the error is measured.
        warm_start: Whether the solve of each batch starts with the step that the one before suggests.

    Returns:
        A row a tolerance, in the order given: rtol, atol, rows, nll, nll_se (nats), nfe, accepted and rejected (of
        one batch), error_rms and error_max (of log p, nats), error_rows, seconds. A solve that failed leaves None
        and tells its "error". Nothing for a fixed-step method, which has no tolerance.
    """
    if flow.eval_solver.kind == "fixed" or not tolerances:
        return []
    double = in_float64(flow)
    batches = x.to(next(double.parameters())).split(batch_size)
    share = max(1, math.ceil(truth_rows / len(batches)))
    try:
        known = [solve_truth(double, batch[:share]).log_prob for batch in batches]
        rest = [batch.new_full((len(batch) - len(true),), math.nan) for batch, true in zip(batches, known, strict=True)]
        truth = torch.cat([part for pair in zip(known, rest, strict=True) for part in pair])
    except SolveError:
        truth = None

    def solve(solver: Solver) -> Solved:
        found: list[FlowSolution] = []
        for batch in batches:
            first_steps = found[-1].openings if found and warm_start else None
            found.append(double.solve(batch, solver=solver, divergence=exact_divergence(flow), first_steps=first_steps))
        stats = sum((solution.stats for solution in found), SolveStats())
        return torch.cat([solution.log_prob for solution in found]), stats, len(batches)

    return sweep(solve, flow.eval_solver, tolerances, truth, len(x))


def sweep(
    solve: Callable[[Solver], Solved], solver: Solver, tolerances: Sequence[float], truth: Tensor | None, rows: int
) -> list[Row]:
    """Measure evaluations and the error of log p at several tolerances.

    Args:
        solve: Function of a solver that returns log p (N,) in nats, the counts of all solves, and their number.
        solver: Solver, with each tolerance in turn.
        tolerances: Tolerances, rtol = atol.
        truth: True log p (N,), NaN where it is not known; None where it is known nowhere.
        rows: Number N of rows.

    Returns:
        Rows as :func:`sweep_tolerances` returns them.
    """
    return [_measure(solve, dataclasses.replace(solver, rtol=t, atol=t), truth, rows) for t in tolerances]


def nfe_at_error(tolerances: Sequence[Mapping[str, Any]], error: float) -> float | None:
    """Return the evaluations that a flow needs for an RMS error of log p, from its sweep.

    The logarithm of the evaluations is interpolated linearly in that of the error, between the loosest tolerance
    that reaches the error and the one before it.

    Args:
        tolerances: Rows of :func:`sweep_tolerances`.
        error: Error of log p, in nats.

    Returns:
        Evaluations of a batch; None where the sweep does not enclose the error.

    >>> rows = [{"rtol": t, "nfe": n, "error_rms": e} for t, n, e in ((1e-3, 20, 1e-3), (1e-5, 80, 1e-5))]
    >>> round(nfe_at_error(rows, 1e-4), 9)
    40.0
    """
    done = [row for row in tolerances if row["nfe"] is not None and row["error_rms"] is not None]
    done.sort(key=lambda row: -row["rtol"])
    before: Mapping[str, Any] | None = None
    for row in done:
        if row["error_rms"] > error:
            before = row
            continue
        if before is None:
            return None
        low, high = (math.log(max(r["error_rms"], 1e-300)) for r in (row, before))
        part = (math.log(error) - high) / (low - high)
        return math.exp((1 - part) * math.log(before["nfe"]) + part * math.log(row["nfe"]))
    return None


def _measure(solve: Callable[[Solver], Solved], solver: Solver, truth: Tensor | None, rows: int) -> Row:
    row: Row = {"rtol": solver.rtol, "atol": solver.atol, "rows": rows}
    began = time.perf_counter()
    try:
        with torch.no_grad():
            log_prob, stats, solves = solve(solver)
    except SolveError as err:
        measured = ("nll", "nll_se", "nfe", "accepted", "rejected", "error_rms", "error_max")
        return row | dict.fromkeys(measured) | {"error": str(err)}
    row |= {
        "nll": -log_prob.mean().item(),
        "nll_se": log_prob.std().item() / len(log_prob) ** 0.5 if len(log_prob) > 1 else math.nan,
        **{name: getattr(stats, name) / solves for name in ("nfe", "accepted", "rejected")},
        "seconds": time.perf_counter() - began,
        "error_rms": None,
        "error_max": None,
    }
    if truth is not None:
        error = (log_prob - truth)[~truth.isnan()]
        row |= {
            "error_rms": error.square().mean().sqrt().item(),
            "error_max": error.abs().max().item(),
            "error_rows": len(error),
        }
    return row


__all__ = ["Solved", "nfe_at_error", "sweep", "sweep_tolerances"]
