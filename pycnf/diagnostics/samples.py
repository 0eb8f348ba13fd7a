"""Where in space a solver suffers: the samples that set the steps, and what each would cost alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycnf.diagnostics.steps import LocalErrors
from pycnf.diagnostics.truth import exact_divergence
from pycnf.flow import CNF
from pycnf.scale import evaluation_mode


@dataclass(frozen=True)
class Difficulty:
    """Hold how hard each of B samples is for the solver.

    Attributes:
        x: The samples, (B, D).
        share: Mean over the steps tried of the sample's share of the squared error norm, (B,); the sum is 1.
        together: Evaluations of the field when all are solved together.
        alone: Evaluations of the field when each of the first M samples is solved by itself, (M,).
    """

    x: Tensor
    share: Tensor
    together: int
    alone: Tensor

    def hardest(self, fraction: float = 0.1) -> float:
        """Return the share of the squared error norm that the hardest fraction of the samples has.

        Args:
            fraction: Fraction of the samples, in (0, 1]; at least one sample is counted.

        Raises:
            ValueError: On another fraction.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"expected a fraction in (0, 1], got {fraction}")
        count = max(1, round(fraction * len(self.share)))
        return float(self.share.topk(count).values.sum())

    @property
    def effective(self) -> float:
        """Number of samples that effectively set the steps, 1 / sum share^2, from 1 to B."""
        return float(1 / self.share.square().sum())


def sample_difficulty(
    flow: CNF, x: Tensor, errors: LocalErrors, context: Tensor | None = None, *, alone: int = 64
) -> Difficulty:
    """Find which samples of a batch set the steps.

    Args:
        flow: The flow.
        x: Batch (B, D) that ``errors`` are of.
        errors: Steps of :func:`~pycnf.diagnostics.steps.local_errors`.
        context: Context (C,) or (B, C) of a conditional flow.
        alone: Number of samples, the first ones, that are also solved by themselves, with the same solver.

    Returns:
        The difficulty of each sample (:class:`Difficulty`).

    Raises:
        ValueError: When the errors are of another batch.
        pycnf.SolveError: When a solve fails.
    """
    if errors.estimate.shape[1] != len(x):
        raise ValueError(f"expected the errors of {len(x)} samples, got those of {errors.estimate.shape[1]}")
    given = None if context is None else context.expand(len(x), flow.context)
    found = []
    with torch.no_grad(), evaluation_mode(flow):
        divergence = exact_divergence(flow)
        for i in range(min(alone, len(x))):
            own = None if given is None else given[i : i + 1]
            solved = flow.solve(x[i : i + 1], own, solver=errors.solver, divergence=divergence)
            found.append(solved.stats.nfe)
    return Difficulty(x.detach().cpu(), errors.shares().mean(0), errors.stats.nfe, torch.tensor(found))


__all__ = ["Difficulty", "sample_difficulty"]
