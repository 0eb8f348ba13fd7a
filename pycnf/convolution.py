r"""The convolutional field: states that are images, moved by a stack of convolutions conditioned on time.

States stay flat, (B, D) with D = C H W, so that everything that moves vectors moves images too; the field knows their
shape (C, H, W). Every convolution is padded with zeros to keep the height and the width. That holds for time and
context as well: both enter as images of one constant value each, which the padding surrounds with zeros, so that a
convolution can tell the border from the middle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycnf.fields import ACTIVATIONS, TimeConditioning


class TimeConvolution(nn.Module):
    r"""Convolve images with kernels conditioned on time.

    With W * x the convolution, padded with zeros, and 1 an image of ones:

    - ``"concat"``: time is one more channel, y = W * x + b + t (w * 1);
    - ``"concatsquash"``: y = sigmoid(t u + s) (W * x + b) + t c, a gate and a shift a channel;
    - ``"none"``: y = W * x + b.

    Args:
        in_channels: Channels of x.
        out_channels: Channels of y.
        kernel: Height and width of the kernels, odd.
        time: Time conditioning.

    References:
        Grathwohl et al., FFJORD: Free-form continuous dynamics for scalable reversible generative models, ICLR 2019.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, time: TimeConditioning = "concat") -> None:
        super().__init__()
        self.time, self.padding = time, kernel // 2
        bound = ((in_channels + (time == "concat")) * kernel**2) ** -0.5

        def uniform(*shape: int, bound: float = bound) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

        self.weight = uniform(out_channels, in_channels, kernel, kernel)
        self.bias = uniform(out_channels)
        if time == "concat":
            self.time_weight = uniform(out_channels, 1, kernel, kernel)
        elif time == "concatsquash":
            self.gate_weight, self.gate_bias = uniform(out_channels, bound=1.0), uniform(out_channels, bound=1.0)
            self.shift_weight = uniform(out_channels, bound=1.0)

    @property
    def steady(self) -> bool:
        """Whether the kernels are the same at all times."""
        return self.time != "concatsquash"

    def rate(self, height: int, width: int) -> Tensor:
        """Return d y / dt of a layer whose kernels are steady, (out, H, W)."""
        if self.time == "none":
            return torch.zeros(1, height, width).to(self.bias).expand(len(self.bias), -1, -1)
        return self.convolve(torch.ones(1, 1, height, width).to(self.bias), self.time_weight)[0]

    def affine(self, t: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return kernels like the weight and the offset (out, H, W) or (out, 1, 1) of the layer at scalar time t."""
        bias = self.bias.view(-1, 1, 1)
        if self.time == "none":
            return self.weight, bias
        if self.time == "concat":
            return self.weight, torch.addcmul(bias, t, self.rate(height, width))
        gate = torch.sigmoid(torch.addcmul(self.gate_bias, t, self.gate_weight)).view(-1, 1, 1)
        return gate.unsqueeze(1) * self.weight, torch.addcmul(gate * bias, t, self.shift_weight.view(-1, 1, 1))

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve images x (B, C, H, W) with kernels (out, C, k, k), keeping height and width."""
        return F.conv2d(x, weight, padding=self.padding)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return y of shape (B, out, H, W) at scalar time t and x of shape (B, in, H, W)."""
        weight, offset = self.affine(t, *x.shape[2:])
        return self.convolve(x, weight) + offset


class ConvNet(nn.Module):
    r"""Compute v(t, z) with a stack of convolutions conditioned on time.

    h_0 = [z, context], h_l = activation(layer_l(t, h_{l-1})), v = layer_{L+1}(t, h_L), with z as an image. A context of
    C values is C constant channels beside those of z.

    Args:
        shape: Shape (C, H, W) of the images; the states have D = C H W features in this order.
        hidden: Channels of the L >= 1 hidden layers.
        context: Dimension of the context, 0 for none.
        kernel: Height and width of the kernels, odd.
        activation: A name in ``ACTIVATIONS``.
        time: Time conditioning of every layer (``TimeConvolution``).

    Raises:
        ValueError: On impossible sizes or unknown names.

    >>> v = ConvNet((3, 4, 4), hidden=(8, 8))
    >>> v(torch.tensor(0.5), torch.randn(5, 48)).shape == (5, 48)
    True
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        *,
        context: int = 0,
        kernel: int = 3,
        activation: str = "softplus",
        time: TimeConditioning = "concat",
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"expected an image shape (channels, height, width), each >= 1, got {tuple(shape)}")
        if context < 0 or not hidden or min(hidden) < 1:
            raise ValueError(f"expected context >= 0 and hidden channels >= 1, got {context} and {tuple(hidden)}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"expected an odd kernel size, which keeps height and width, got {kernel}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if time not in ("concat", "concatsquash", "none"):
            raise ValueError(f"unknown time conditioning {time!r}: choose one of concat, concatsquash, none")
        channels, height, width = shape
        self.shape, self.features = (channels, height, width), math.prod(shape)
        self.context, self.activation = context, activation
        sizes = [channels + context, *hidden, channels]
        self.layers = nn.ModuleList(TimeConvolution(a, b, kernel, time) for a, b in itertools.pairwise(sizes))

    def images(self, z: Tensor) -> Tensor:
        """Return states ``(*, D)`` as images (B, C, H, W), in the memory layout that convolutions prefer."""
        return z.reshape(-1, *self.shape).contiguous(memory_format=torch.channels_last)

    def context_images(self, context: Tensor) -> Tensor:
        """Return a context (B, C) as C constant images, (B, C, H, W)."""
        return context[:, :, None, None].expand(-1, -1, *self.shape[1:])

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Evaluate v(t, z) of shape (B, D) at states z of shape (B, D), with a context (B, C) if there is one."""
        h = self.images(z)
        if context is not None:
            h = torch.cat([h, self.context_images(context)], dim=1)
        first, *rest = self.layers
        a = first(t, h)
        for layer in rest:
            a = layer(t, ACTIVATIONS[self.activation].value(a))
        return a.flatten(1)


__all__ = ["ConvNet", "TimeConvolution"]
