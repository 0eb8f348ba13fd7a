r"""The fixed pieces of a flow of images: noise that makes levels continuous, logits, and space squeezed into channels.

Images are flat rows (B, D) in the order channels, height, width. Their values are levels 0, 1, ..., 255, and a density
is one over levels: a pixel's cell [x, x + 1) has volume one, so that -log p(x) / (D ln 2) is in bits per dimension as
it stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Number = TypeVar("Number", float, Tensor)


def dequantize(x: Tensor, u: Tensor | None = None) -> Tensor:
    r"""Add noise u from [0, 1) to levels, which makes them continuous.

    With p the density of x + u the probability of a level is P(x) = int p(x + u) du, so that log p(x + u) is on average
    over uniform u a lower bound of log P(x). (For other noise see
    :class:`~pycnf.images.dequantization.VariationalNoise`.)

    Args:
        x: Levels of any shape, whole numbers of a floating-point type.
        u: Noise like x; None draws it uniformly.

    Returns:
        x + u, shaped like x.

    Raises:
        ValueError: When x holds other than whole numbers.

    References:
        Theis, van den Oord & Bethge, A note on the evaluation of generative models, ICLR 2016.

    >>> x = torch.tensor([0.0, 255.0])
    >>> bool((dequantize(x).floor() == x).all())
    True
    """
    if not bool((x == x.floor()).all()):
        raise ValueError(
            "expected whole levels, which noise makes continuous, got values between them: round them, or build the "
            "flow with dequantization='none' for a density of continuous values"
        )
    u = torch.rand_like(x) if u is None else u
    return torch.minimum(x + u, torch.nextafter(x + 1, x))  # a sum must not round up to the next level


def bits_per_dim(nats: Number, features: int) -> Number:
    r"""Return -log p(x) / (D ln 2), the bits that a dimension costs.

    Args:
        nats: Negative log-likelihood of levels, in nats an image.
        features: Dimension D of an image.

    >>> bits_per_dim(784 * 8 * math.log(2), 784)  # every one of 256 levels as likely
    8.0
    """
    return nats / (features * math.log(2))


@dataclass(frozen=True)
class Logit:
    r"""Carry levels to the real line: p = alpha + (1 - 2 alpha) x / levels, y = log p - log(1 - p).

    Attributes:
        levels: Number of levels; x is in [0, levels].
        alpha: Margin that keeps p away from 0 and 1, in (0, 1/2).

    References:
        Dinh, Sohl-Dickstein & Bengio, Density estimation using real NVP, ICLR 2017, section 4.1.
    """

    levels: int = 256
    alpha: float = 1e-6

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"expected levels >= 2, got {self.levels}")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"expected alpha in (0, 1/2), got {self.alpha}")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return y and log|det dy/dx| = sum log((1 - 2 alpha) / levels) - log p - log(1 - p).

        Args:
            x: Values in [0, levels], shape ``(*, D)``.

        Returns:
            y ``(*, D)`` and the logarithm ``(*,)``.
        """
        slope = (1 - 2 * self.alpha) / self.levels
        below, above = torch.log(self.alpha + slope * x), torch.log(self.alpha + slope * (self.levels - x))
        return below - above, (math.log(slope) - below - above).sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy|, shapes ``(*, D)`` and ``(*,)``, for y of shape ``(*, D)``.

        Far out, x leaves [0, levels] by up to alpha * levels / (1 - 2 alpha).
        """
        slope = (1 - 2 * self.alpha) / self.levels
        volume = (F.logsigmoid(y) + F.logsigmoid(-y) - math.log(slope)).sum(-1)
        return (torch.sigmoid(y) - self.alpha) / slope, volume


def squeeze(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Turn every square of 2 x 2 pixels into 4 channels: (C, H, W) to (4 C, H/2, W/2), a permutation.

    Args:
        x: Flat images ``(*, C H W)``.
        shape: Shape (C, H, W), H and W even.

    Returns:
        Flat images ``(*, C H W)`` of shape (4 C, H/2, W/2).
    """
    return F.pixel_unshuffle(x.unflatten(-1, shape), 2).flatten(-3)


def unsqueeze(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Undo :func:`squeeze`; the shape is the larger one, (C, H, W)."""
    channels, height, width = shape
    return F.pixel_shuffle(x.unflatten(-1, (4 * channels, height // 2, width // 2)), 2).flatten(-3)


__all__ = ["Logit", "bits_per_dim", "dequantize", "squeeze", "unsqueeze"]
