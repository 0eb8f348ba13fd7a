r"""Random end times: a solve in training ends somewhat before or after T (STEER)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycnf.regularizers.base import Regularizer
from pycnf.solution import Solution


@dataclass(frozen=True)
class Steer(Regularizer):
    r"""End each solve in training at a random time.

    Each block is solved to T (1 + w U) with U uniform on (-1, 1), drawn anew for each block and training step; in
    evaluation it is solved to T. A field that must come close to its goal by T (1 - w) and stay there until
    T (1 + w) cannot leave its stiff part to the end. The penalty is 0: the regularizer acts through the likelihood.

    Args:
        weight: Half width w of the end time's distribution as a fraction of T, in [0, 1); the source's b = w T.

    Raises:
        ValueError: On another width, or on ``target_nfe``, by which no width can be steered.

    References:
        Ghosh, Behl, Dupont, Torr & Namboodiri, STEER: simple temporal regularization for neural ODE, NeurIPS 2020.

    >>> ends = [Steer(weight=0.1).end_time() for _ in range(20)]
    >>> all(0.9 < end < 1.1 for end in ends)
    True
    """

    name: ClassVar[str] = "steer"

    weight: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight >= 1:
            raise ValueError(f"expected a half width in [0, 1), got weight={self.weight}: T (1 - weight) must be > 0")
        if self.target_nfe is not None:
            raise ValueError("the width of random end times cannot be steered: leave target_nfe out")

    def end_time(self, factor: float = 1.0) -> float | None:
        """Draw the end of one solve as a fraction of T; None where the width is 0."""
        width = self.weight * factor
        return 1 + width * (2 * float(torch.rand((), dtype=torch.float64)) - 1) if width else None

    def penalty(self, solution: Solution) -> Tensor:
        """Return 0."""
        return torch.zeros((), dtype=solution.z.dtype, device=solution.z.device)


__all__ = ["Steer"]
