r"""Noise that is learned: a small flow, conditional on an image, of the noise that makes the image continuous.

With q(u | x) the density of the noise u on (0, 1)^D and p that of x + u, Jensen's inequality gives a bound for every q,

    log P(x) = log int p(x + u) du >= E_q[log p(x + u) - log q(u | x)],

which is tight where q(u | x) is proportional to p(x + u). Uniform noise is the case log q = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycnf.convolution import ConvNet

LARGEST = 3.0
"""Bound of the logarithm of a layer's scales: a noise that is nearly a point would make log q large and rough."""


class VariationalNoise(nn.Module):
    r"""Draw noise u in (0, 1) for the levels x of an image, with its density q(u | x), from a conditional flow.

    u = sigmoid(v), where v is logistic noise that affine layers have moved. Each layer moves the pixels of one color of
    a checkerboard, v <- m + exp(s) v, the colors in turn; m and s come from a
    :class:`~pycnf.convolution.ConvNet` that sees x and the v of the other color, so that

        log q(u | x) = sum log sigmoid'(v_start) - sum s - sum log sigmoid'(v_end).

    The last convolutions start at zero: untrained noise is uniform.

    Args:
        shape: Shape (C, H, W) of the images.
        hidden: Channels of the hidden layers of each ConvNet.
        layers: Number of affine layers.
        levels: Number of levels of a pixel.
        kernel: Height and width of the convolutions' kernels, odd.
        activation: Activation of the ConvNets.

    Raises:
        ValueError: On impossible sizes or settings.

    References:
        Ho et al., Flow++: improving flow-based generative models with variational dequantization and architecture
        design, ICML 2019. Hoogeboom, Cohen & Tomczak, Learning discrete distributions by dequantization, 2020.

    >>> u, log_q = VariationalNoise((1, 4, 4), hidden=(8,))(torch.full((5, 16), 255.0))
    >>> u.shape, bool((log_q == 0).all())
    (torch.Size([5, 16]), True)
    """

    moved: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        hidden: Sequence[int] = (32, 32),
        layers: int = 2,
        *,
        levels: int = 256,
        kernel: int = 3,
        activation: str = "softplus",
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"expected layers >= 1, got {layers}")
        channels, height, width = shape
        self.features, self.levels = channels * height * width, levels
        nets = [
            ConvNet((2 * channels, height, width), hidden, kernel=kernel, activation=activation, time="none")
            for _ in range(layers)
        ]
        for net in nets:
            for parameter in net.layers[-1].parameters():
                nn.init.zeros_(parameter)
        self.nets = nn.ModuleList(nets)
        dark = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
        moved = torch.stack([dark.expand(channels, -1, -1).flatten() ^ bool(i % 2) for i in range(layers)])
        self.register_buffer("moved", moved, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Draw noise u ``(*, D)`` for levels x ``(*, D)``, and return log q(u | x) ``(*,)`` with it."""
        w = torch.rand_like(x).clamp_min(torch.finfo(x.dtype).eps / 4)
        return self.carry(x, torch.log(w) - torch.log1p(-w))

    def carry(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise u ``(*, D)`` that logistic noise v ``(*, D)`` becomes for levels x, and log q(u | x)."""
        seen, v = (2 * x / (self.levels - 1) - 1).reshape(-1, self.features), v.reshape(-1, self.features)
        t, log_q = v.new_zeros(()), _log_logistic(v)
        for net, moved in zip(self.nets, self.moved, strict=True):
            other = torch.tanh(v / 2).masked_fill(moved, 0.0)
            shift, size = net(t, torch.cat([seen, other], dim=1)).chunk(2, dim=1)
            scale = (LARGEST * torch.tanh(size / LARGEST)).masked_fill(~moved, 0.0)
            v = torch.where(moved, shift + scale.exp() * v, v)
            log_q = log_q - scale.sum(1)
        log_q = log_q - _log_logistic(v)
        return torch.sigmoid(v).view_as(x), log_q.view(x.shape[:-1])


def _log_logistic(v: Tensor) -> Tensor:
    """Return the log-density of independent logistic variables, the logarithm of the slopes of sigmoids."""
    return (F.logsigmoid(v) + F.logsigmoid(-v)).sum(-1)


__all__ = ["VariationalNoise"]
