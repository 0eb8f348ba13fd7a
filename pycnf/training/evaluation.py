"""Held-out log-likelihood of a flow, and what it costs to compute."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pycnf.flow import CNF
from pycnf.scale import Batched, Order, log_prob
from pycnf.solve import Solver


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Hold the result of :func:`evaluate`.

    Attributes:
        nll: Mean negative log-likelihood of the rows, in nats.
        nll_se: Standard error of that mean over the rows (NaN for one row).
        rows: Number of rows.
        batch_size: Rows per batch.
        nfe: Function evaluations of one batch, forward, all blocks together, mean over the batches.
        accepted: Accepted steps of one batch, mean over the batches.
        rejected: Rejected steps of one batch, mean over the batches.
        seconds: Wall-clock time.
        method: Method of the solver.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver.
    """

    nll: float
    nll_se: float
    rows: int
    batch_size: int
    nfe: float
    accepted: float
    rejected: float
    seconds: float
    method: str
    rtol: float
    atol: float


def evaluate(
    flow: CNF,
    data: Any,
    context: Any = None,
    *,
    batch_size: int = 1000,
    solver: Solver | None = None,
    warm_start: bool = True,
    order: Order = "given",
    workers: int = 1,
    device: str | None = None,
    progress: bool | str = False,
) -> Evaluation:
    """Compute the mean negative log-likelihood of data under a flow in evaluation mode.

    Runs without gradients, with the flow's ``eval_solver`` and ``eval_divergence``, and leaves the flow in
    the mode in which it was. All rows are used; the last batch may be smaller. :func:`pycnf.scale.log_prob`, which
    does the work, gives the log-density of each row.

    Args:
        flow: The flow.
        data: Rows, shape (N, D); converted to the flow's precision batch by batch, so that a memory-mapped array
            or the path of a .npy file may be larger than the memory.
        context: Their context, shape (N, C), for a flow with context.
        batch_size: Rows per batch. The number of evaluations depends on it: the rows of a batch share their steps.
        solver: Solver in place of ``flow.eval_solver``.
        warm_start: Start the solve of each batch with the step that the one before suggests, in place of the
            method's own choice.
        order: "difficulty" makes batches of rows of like difficulty (:func:`pycnf.scale.log_prob`).
        workers: Number of processes, with one thread each.
        device: Where to solve, None for where the flow is.
        progress: Show a progress bar; a string is its label.

    Returns:
        The evaluation.

    Raises:
        ValueError: The data do not fit the flow, or hold NaN or infinity.
        pycnf.scale.BatchError: A solve failed.
    """
    began = time.perf_counter()
    found = log_prob(
        flow,
        data,
        context,
        batch_size=batch_size,
        solver=solver,
        warm_start=warm_start,
        order=order,
        workers=workers,
        device=device,
        progress=progress,
    )
    return summarize(found, batch_size, solver or flow.eval_solver, time.perf_counter() - began)


def evaluate_rows(
    flow: CNF,
    rows: tuple[Tensor, Tensor | None],
    *,
    batch_size: int,
    solver: Solver | None = None,
    warm_start: bool = True,
) -> Evaluation:
    """Do :func:`evaluate` on rows and their context."""
    return evaluate(flow, *rows, batch_size=batch_size, solver=solver, warm_start=warm_start)


def summarize(found: Batched, batch_size: int, solver: Solver, seconds: float) -> Evaluation:
    """Return what log-densities that were computed in batches come to."""
    nll = -found.values.double()
    return Evaluation(
        nll=nll.mean().item(),
        nll_se=nll.std().item() / len(nll) ** 0.5 if len(nll) > 1 else float("nan"),
        rows=len(nll),
        batch_size=batch_size,
        nfe=found.stats.nfe / found.batches,
        accepted=found.stats.accepted / found.batches,
        rejected=found.stats.rejected / found.batches,
        seconds=seconds,
        method=solver.method,
        rtol=solver.rtol,
        atol=solver.atol,
    )
