"""Distributions of pixels given what a decoder says of them: p(x | z) of a variational auto-encoder."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 256
_STEP = 1 / (LEVELS - 1)


class Pixels(Protocol):
    """Describe independent pixels in [0, 1] by raw parameters of shape ``(*batch, channels, pixels)``.

    Attributes:
        channels: Raw parameters of a pixel.
        levels: How many values a pixel can take.
    """

    channels: int
    levels: int

    def log_prob(self, x: Tensor, raw: Tensor) -> Tensor:
        """Return log p(x) in nats, shape ``(*batch,)``, of pixels x, shape ``(*batch, pixels)``."""
        ...

    def mean(self, raw: Tensor) -> Tensor:
        """Return the expected picture, shape ``(*batch, pixels)``."""
        ...

    def sample(self, raw: Tensor) -> Tensor:
        """Draw pictures, shape ``(*batch, pixels)``."""
        ...


class Bernoulli:
    """Describe black and white pixels by their log-odds."""

    channels, levels = 1, 2

    def log_prob(self, x: Tensor, raw: Tensor) -> Tensor:
        odds = raw.squeeze(-2)
        return (x * odds - F.softplus(odds)).sum(-1)

    def mean(self, raw: Tensor) -> Tensor:
        return torch.sigmoid(raw.squeeze(-2))

    def sample(self, raw: Tensor) -> Tensor:
        return torch.bernoulli(self.mean(raw))


class DiscretizedLogistic:
    r"""Describe 256 gray levels by a logistic distribution, cut at the middle between levels.

    p(x) = F(x + 1/510) - F(x - 1/510) with F(y) = sigmoid((y - m) / s), and all mass beyond 0 and 1 at these levels.
    The raw parameters are the log-odds of m and log s + 2, so that zeros mean a broad pixel around mid-gray.

    References:
        Kingma et al., Improved variational inference with inverse autoregressive flow, NeurIPS 2016, appendix.
    """

    channels, levels = 2, LEVELS

    def log_prob(self, x: Tensor, raw: Tensor) -> Tensor:
        mean, scale = self._moments(raw)
        upper = (x - mean + _STEP / 2) / scale
        lower = (x - mean - _STEP / 2) / scale
        below = torch.where(x < _STEP / 2, torch.zeros_like(x), F.logsigmoid(-lower))
        above = torch.where(x > 1 - _STEP / 2, torch.zeros_like(x), F.logsigmoid(upper))
        inside = (x >= _STEP / 2) & (x <= 1 - _STEP / 2)
        width = torch.log(-torch.expm1(-_STEP / scale))
        return (below + above + torch.where(inside, width, torch.zeros_like(x))).sum(-1)

    def mean(self, raw: Tensor) -> Tensor:
        return self._moments(raw)[0]

    def sample(self, raw: Tensor) -> Tensor:
        mean, scale = self._moments(raw)
        u = torch.rand_like(mean)
        y = mean + scale * (u.log() - torch.log1p(-u))
        return (y.clamp(0, 1) / _STEP).round() * _STEP

    @staticmethod
    def _moments(raw: Tensor) -> tuple[Tensor, Tensor]:
        odds, log_scale = raw.unbind(-2)
        return torch.sigmoid(odds), torch.exp(torch.clamp(log_scale - 2, min=-7.0))


class Categorical:
    """Describe 256 gray levels by a probability of each."""

    channels, levels = LEVELS, LEVELS

    def log_prob(self, x: Tensor, raw: Tensor) -> Tensor:
        level = (x / _STEP).round().long().unsqueeze(-2)
        return torch.log_softmax(raw, dim=-2).gather(-2, level).squeeze(-2).sum(-1)

    def mean(self, raw: Tensor) -> Tensor:
        levels = torch.arange(LEVELS, dtype=raw.dtype, device=raw.device) * _STEP
        return torch.einsum("...cp,c->...p", torch.softmax(raw, dim=-2), levels)

    def sample(self, raw: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=raw.mT).sample().to(raw) * _STEP


PIXELS: dict[str, Pixels] = {
    "bernoulli": Bernoulli(),
    "logistic": DiscretizedLogistic(),
    "categorical": Categorical(),
}


__all__ = ["PIXELS", "Bernoulli", "Categorical", "DiscretizedLogistic", "Pixels"]
