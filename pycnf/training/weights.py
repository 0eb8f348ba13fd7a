"""How the weights of regularizers change in the course of training: schedules, and steering to a target NFE."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pycnf.regularizers import Regularizer

PATIENCE = 100  # training steps in which a batch that costs twice the target doubles the weight
SPAN = 10  # powers of two by which steering may change a weight, either way


class WeightControl:
    """Hold the factor on the weight of each regularizer.

    Steering changes a weight by log2(nfe / target) / 100 powers of two a step, at most one over 100 steps. A weight
    that its schedule holds back is not steered, so that it does not grow while it cannot act.

    Args:
        terms: The regularizers, each with its schedule and its ``target_nfe``.

    Attributes:
        powers: Powers of two by which steering has changed each weight so far.

    >>> from pycnf.regularizers import TPR
    >>> control = WeightControl([TPR(ramp=4), TPR(target_nfe=20)])
    >>> control.factors(0)
    [0.25, 1.0]
    >>> control.update(40)
    >>> round(control.factors(1)[1] ** PATIENCE, 6)
    2.0
    """

    def __init__(self, terms: Sequence[Regularizer]) -> None:
        self.terms = tuple(terms)
        self.powers = [0.0] * len(self.terms)
        self._acting = [False] * len(self.terms)

    def factors(self, step: int) -> list[float]:
        """Return the factor of each weight at a training step, counted from 0."""
        scheduled = [term.scheduled(step) for term in self.terms]
        self._acting = [share == 1 for share in scheduled]
        return [share * 2.0**power for share, power in zip(scheduled, self.powers, strict=True)]

    def update(self, nfe: int) -> None:
        """Steer by the forward evaluations, of all blocks, at the step whose :meth:`factors` were asked for last."""
        for i, term in enumerate(self.terms):
            if term.target_nfe is not None and self._acting[i]:
                change = max(-1.0, min(1.0, math.log2(max(nfe, 1) / term.target_nfe)))
                self.powers[i] = max(-SPAN, min(SPAN, self.powers[i] + change / PATIENCE))


__all__ = ["WeightControl"]
