"""The training objective: the likelihood of a batch and what regularizers add to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycnf.flow import CNF, FlowSolution
from pycnf.regularizers import Regularizer, check_regularizers


@dataclass(frozen=True)
class Penalized:
    """Hold a solve and what regularizers make of it.

    Attributes:
        total: Sum of weight * penalty, a scalar.
        penalties: Unweighted penalty of each regularizer, by its name, detached.
        weights: Weight that each had in the total.
        solution: The solve.
    """

    total: Tensor
    penalties: dict[str, Tensor]
    weights: dict[str, float]
    solution: FlowSolution


@dataclass(frozen=True)
class Objective:
    """Hold the training objective of one batch and what it is made of.

    Attributes:
        loss: nll + sum of weight * penalty, a scalar.
        nll: Mean negative log-likelihood of the batch, in nats.
        penalties: Unweighted penalty of each regularizer, by its name, detached.
        weights: Weight that each had in the loss.
        solution: The solve.
    """

    loss: Tensor
    nll: Tensor
    penalties: dict[str, Tensor]
    weights: dict[str, float]
    solution: FlowSolution


def objective(
    flow: CNF,
    x: Tensor,
    context: Tensor | None = None,
    regularizers: Sequence[Regularizer] | Regularizer | None = None,
    factors: Sequence[float] | None = None,
    first_steps: Sequence[float] | None = None,
) -> Objective:
    r"""Return the training objective -mean log p(x) + sum_r factor_r weight_r sum_blocks penalty_r(block).

    Args:
        flow: The flow.
        x: Batch (B, D).
        context: Context (B, C) of a conditional flow.
        regularizers: Regularizers to add, none by default.
        factors: Factor of each regularizer's weight at this step of training, 1 by default.
        first_steps: First step of each block (:meth:`CNF.solve <pycnf.flow.CNF.solve>`).

    Returns:
        The objective with its parts (:class:`Objective`).

    >>> from pycnf.regularizers import TPR
    >>> flow, x = CNF(2, hidden=(8,)), torch.randn(16, 2)
    >>> bool(objective(flow, x, regularizers=[TPR(weight=5.0)]).loss >= objective(flow, x).nll)
    True
    """
    found = solve_penalized(flow, x, context, regularizers, factors, first_steps)
    nll = -found.solution.log_prob.mean()
    return Objective(nll + found.total, nll, found.penalties, found.weights, found.solution)


def solve_penalized(
    flow: CNF,
    x: Tensor,
    context: Tensor | None = None,
    regularizers: Sequence[Regularizer] | Regularizer | None = None,
    factors: Sequence[float] | None = None,
    first_steps: Sequence[float] | None = None,
) -> Penalized:
    """Carry a batch through a flow as the regularizers want it, and sum up their penalties (see :func:`objective`)."""
    terms = check_regularizers(regularizers)
    if factors is not None and len(factors) != len(terms):
        raise ValueError(f"expected {len(terms)} factors, one a regularizer, got {len(factors)}")
    factors = [1.0] * len(terms) if factors is None else factors
    ends = [flow.T * _end_time(terms, factors) for _ in range(flow.blocks)]
    named = [[r.sample_times() for r in terms] for _ in range(flow.blocks)]
    plan = [_merge([u for u in block if u is not None], end) for block, end in zip(named, ends, strict=True)]
    watched = any(term.watches_steps for term in terms)
    solution = flow.solve_blocks(x, context, plan, first_steps=first_steps, ends=ends, watched=watched)
    total, penalties, weights = x.new_zeros(()), {}, {}
    for i, term in enumerate(terms):
        parts, weight = [], term.weight * factors[i]
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            for block, fractions, end in zip(solution.blocks, named, ends, strict=True):
                own = fractions[i]
                parts.append(term.penalty(block if own is None else block.at(own * end)))
            penalty = torch.stack(parts).sum()
        if weight > 0:
            total = total + weight * penalty
        label = term.name if term.name not in penalties else f"{term.name}-{i}"
        penalties[label], weights[label] = penalty.detach(), weight
    return Penalized(total, penalties, weights, solution)


def _end_time(terms: Sequence[Regularizer], factors: Sequence[float]) -> float:
    drawn = [end for term, factor in zip(terms, factors, strict=True) if (end := term.end_time(factor)) is not None]
    if len(drawn) > 1:
        raise ValueError("only one regularizer can choose the end time of a solve")
    return drawn[0] if drawn else 1.0


def _merge(fractions: list[Tensor], T: float) -> Tensor | None:
    return torch.cat(fractions).mul(T).unique() if fractions else None


__all__ = ["Objective", "Penalized", "objective", "solve_penalized"]
