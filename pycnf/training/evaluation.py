"""Held-out log-likelihood of a flow, and what it costs to compute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycnf.flow import CNF
from pycnf.solve import Solver
from pycnf.training.batches import check_context, check_rows


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
    flow: CNF, data: Any, context: Any = None, *, batch_size: int = 1000, solver: Solver | None = None
) -> Evaluation:
    """Compute the mean negative log-likelihood of data under a flow in evaluation mode.

    Runs without gradients, with the flow's ``eval_solver`` and ``eval_divergence``, and leaves the flow in
    the mode in which it was. All rows are used; the last batch may be smaller.

    Args:
        flow: The flow.
        data: Rows, shape (N, D); converted to the flow's precision.
        context: Their context, shape (N, C), for a flow with context.
        batch_size: Rows per batch. The number of evaluations depends on it: the hardest row sets the step.
        solver: Solver in place of ``flow.eval_solver``.

    Returns:
        The evaluation.

    Raises:
        ValueError: The data do not fit the flow, or hold NaN or infinity.
        pycnf.solution.SolveError: A solve failed.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"expected an integer batch_size >= 1, got {batch_size!r}")
    weight = next(flow.parameters())
    rows = check_rows("data", data, flow.features, weight.dtype)
    given = check_context("context", context, len(rows), flow.context, weight.dtype)
    return evaluate_rows(flow, (rows, given), batch_size=batch_size, solver=solver)


def evaluate_rows(
    flow: CNF, rows: tuple[Tensor, Tensor | None], *, batch_size: int, solver: Solver | None = None
) -> Evaluation:
    """Do the work of :func:`evaluate` on rows that have been checked."""
    table, context = rows
    device = next(flow.parameters()).device
    used = flow.eval_solver if solver is None else solver
    began = time.perf_counter()
    log_prob, nfe, accepted, rejected = [], 0, 0, 0
    starts = range(0, len(table), batch_size)
    with evaluation_mode(flow), torch.no_grad():
        for i in starts:
            x = table[i : i + batch_size].to(device)
            given = None if context is None else context[i : i + batch_size].to(device)
            solution = flow.solve(x, given, solver=used)
            log_prob.append(solution.log_prob.double())
            stats = solution.stats
            nfe, accepted, rejected = nfe + stats.nfe, accepted + stats.accepted, rejected + stats.rejected
    nll = -torch.cat(log_prob)
    return Evaluation(
        nll=nll.mean().item(),
        nll_se=nll.std().item() / len(nll) ** 0.5 if len(nll) > 1 else float("nan"),
        rows=len(nll),
        batch_size=batch_size,
        nfe=nfe / len(starts),
        accepted=accepted / len(starts),
        rejected=rejected / len(starts),
        seconds=time.perf_counter() - began,
        method=used.method,
        rtol=used.rtol,
        atol=used.atol,
    )


@contextmanager
def evaluation_mode(flow: CNF) -> Iterator[None]:
    """Put every module of the flow into evaluation mode, and back into the mode it had."""
    modes = {module: module.training for module in flow.modules()}
    flow.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
