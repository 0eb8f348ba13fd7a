"""Encoders and decoders of variational auto-encoders: gated convolutions and gated dense layers.

An encoder maps pictures (B, pixels) to features (B, H), a decoder maps latent states (B, D) to the raw parameters of
the pixels' distribution, (B, channels, pixels). Pixels run row by row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

NetworkKind = Literal["conv", "dense"]
Shape = tuple[int, int]


class Gated(nn.Module):
    r"""Apply y = (A x + a) sigmoid(B x + b) with two affine maps of the same kind, computed as one.

    Args:
        layer: Affine map whose outputs, channels or features on axis 1, are the halves of both maps.

    References:
        Dauphin et al., Language modeling with gated convolutional networks, ICML 2017.

    >>> import torch
    >>> Gated(nn.Linear(3, 8))(torch.zeros(2, 3)).shape == (2, 4)
    True
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return half as many channels or features as the layer gives."""
        return nn.functional.glu(self.layer(x), dim=1)


def dense_encoder(shape: Shape, widths: Sequence[int]) -> nn.Module:
    """Stack gated dense layers of the given widths on the pixels; the last width is the number H of features."""
    sizes = [shape[0] * shape[1], *widths]
    return nn.Sequential(*(Gated(nn.Linear(a, 2 * b)) for a, b in itertools.pairwise(sizes)))


def dense_decoder(shape: Shape, widths: Sequence[int], latent: int, channels: int) -> nn.Module:
    """Stack gated dense layers of the given widths on the latent state, then one affine layer."""
    sizes, pixels = [latent, *widths], shape[0] * shape[1]
    hidden = [Gated(nn.Linear(a, 2 * b)) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], channels * pixels), nn.Unflatten(1, (channels, pixels)))


def conv_encoder(shape: Shape, widths: Sequence[int]) -> nn.Module:
    """Stack six gated convolutions: five of kernel 5, two of them with stride 2, and one that covers what is left.

    Args:
        shape: Height and width of the pictures, multiples of 4.
        widths: Channels n, those of the first scale (the second has 2 n), and the number H of features.

    References:
        van den Berg et al., Sylvester normalizing flows for variational inference, UAI 2018, appendix A.
    """
    n, features = widths
    plan = [(1, n, 1), (n, n, 2), (n, 2 * n, 1), (2 * n, 2 * n, 2), (2 * n, 2 * n, 1)]
    layers = [Gated(nn.Conv2d(a, 2 * b, 5, stride=stride, padding=2)) for a, b, stride in plan]
    rest = (shape[0] // 4, shape[1] // 4)
    return nn.Sequential(
        nn.Unflatten(1, (1, *shape)), *layers, Gated(nn.Conv2d(2 * n, 2 * features, rest)), nn.Flatten()
    )


def conv_decoder(shape: Shape, widths: Sequence[int], latent: int, channels: int) -> nn.Module:
    """Stack six gated transposed convolutions, the mirror of :func:`conv_encoder`, then one convolution of kernel 1."""
    n = widths[0]
    rest = (shape[0] // 4, shape[1] // 4)
    plan = [(2 * n, 2 * n, 1), (2 * n, n, 2), (n, n, 1), (n, n, 2), (n, n, 1)]
    layers = [
        Gated(nn.ConvTranspose2d(a, 2 * b, 5, stride=stride, padding=2, output_padding=stride - 1))
        for a, b, stride in plan
    ]
    return nn.Sequential(
        nn.Unflatten(1, (latent, 1, 1)),
        Gated(nn.ConvTranspose2d(latent, 4 * n, rest)),
        *layers,
        nn.Conv2d(n, channels, 1),
        nn.Flatten(2),
    )


def build_networks(
    kind: NetworkKind, shape: Shape, widths: Sequence[int], latent: int, channels: int
) -> tuple[nn.Module, nn.Module]:
    """Build an encoder and its decoder.

    Args:
        kind: ``"conv"`` or ``"dense"``.
        shape: Height and width of the pictures.
        widths: Widths of the encoder, the last of them the number H of features: for ``"conv"`` two, the channels
            of the first scale and H; for ``"dense"`` those of the layers, which the decoder has in reverse order.
        latent: Dimension D of the latent state.
        channels: Raw parameters of a pixel.

    Raises:
        ValueError: On an unknown kind or sizes that do not fit it.

    >>> import torch
    >>> encoder, decoder = build_networks("conv", (28, 20), (4, 16), latent=3, channels=2)
    >>> encoder(torch.rand(5, 560)).shape == (5, 16), decoder(torch.randn(5, 3)).shape == (5, 2, 560)
    (True, True)
    """
    if min(shape) < 1 or latent < 1 or channels < 1 or not widths or min(widths) < 1:
        raise ValueError(f"expected sizes >= 1, got shape {shape}, widths {tuple(widths)} and latent {latent}")
    if kind == "dense":
        return dense_encoder(shape, widths), dense_decoder(shape, widths[::-1], latent, channels)
    if kind != "conv":
        raise ValueError(f"unknown kind of networks {kind!r}: choose conv or dense")
    if len(widths) != 2 or shape[0] % 4 or shape[1] % 4:
        raise ValueError(
            "expected widths (channels, features) and sides that are multiples of 4 for gated convolutions, got "
            f"{tuple(widths)} and {shape}"
        )
    return conv_encoder(shape, widths), conv_decoder(shape, widths, latent, channels)


__all__ = [
    *("Gated", "NetworkKind", "Shape", "build_networks"),
    *("conv_decoder", "conv_encoder", "dense_decoder", "dense_encoder"),
]
