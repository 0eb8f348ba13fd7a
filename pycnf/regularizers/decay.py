r"""The trivial baseline: small parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycnf.regularizers.base import Regularizer, bound_field
from pycnf.solution import Solution


@dataclass(frozen=True)
class Decay(Regularizer):
    r"""Penalize half the squared norm of the parameters theta of each block's field.

        P = ‖theta‖² / 2,    gradient weight * theta.

    With ``optimizer="adam"`` or ``"adamax"`` this is the optimizer's own ``weight_decay``, which adds the same term
    to the gradient; here it is part of the loss, takes a schedule or a ``target_nfe``, and counts in the norm that
    ``clip`` bounds. With ``"adamw"`` the two differ: its ``weight_decay`` shrinks the parameters apart from the
    gradient, whereas the gradient of P is divided by the gradient's running size like any other.

    Args:
        weight: Factor of P.

    References:
        Loshchilov & Hutter, Decoupled weight decay regularization, ICLR 2019.
    """

    name: ClassVar[str] = "decay"

    weight: float = 1e-5

    def penalty(self, solution: Solution) -> Tensor:
        """Return P of one block, a scalar (see :class:`Decay`)."""
        total = torch.zeros((), dtype=solution.z.dtype, device=solution.z.device)
        for parameter in bound_field(solution).parameters():
            total = total + parameter.pow(2).sum().to(total)
        return total / 2


__all__ = ["Decay"]
