r"""The velocity of a convolutional field and its divergence in one pass, without automatic differentiation.

Beside the value, tangents u go through the hidden layers: u_1 = W_1 * e, u_l = W_l * (s_{l-1} u_{l-1}) with the slopes
s_l = activation'(a_l), and meet the cotangents W_{L+1}^T * e at the end, so that e^T J e = (W_{L+1}^T * e) . (s_L u_L).
Both ends are the same at all times and are formed once per solve; the value and its tangents share one convolution a
layer. The trace takes e through the D unit vectors. The reverse pass is written out and keeps only what the
convolutions return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from pycnf.convolution import ConvNet, TimeConvolution
from pycnf.fields import ACTIVATIONS, Activation
from pycnf.solution import refuse_second_derivatives
from pycnf.tangents import Pullback

CHUNK = 2**24  # numbers in the tangents of one layer that are carried together


class Hidden(NamedTuple):
    """Hold what the hidden layers know.

    Attributes:
        f: Activation.
        weights: Kernels between hidden layers.
        starts: Tangents u_1, (m, B, h_1, H, W) for m probes or (D, 1, h_1, H, W) for the unit vectors.
        ends: Cotangents, (m, B, h_L, H, W) or (D, 1, h_L, H, W).
        chunk: Number of tangents that are carried together.
    """

    f: Activation
    weights: Sequence[Tensor]
    starts: Tensor
    ends: Tensor
    chunk: int


class Gradients(NamedTuple):
    """Collect gradients: weights, starts and ends are added to, offsets (h_l, H, W) are appended, last layer first."""

    weights: Sequence[Tensor]
    starts: Tensor
    ends: Tensor
    offsets: list[Tensor]


class Saved(NamedTuple):
    """Keep what the convolutions returned: a_l of every layer, and u_l of every layer of every chunk."""

    values: list[Tensor]
    tangents: list[list[Tensor]]


def propagate(hidden: Hidden, a: Tensor, offsets: Sequence[Tensor], *, keep: bool) -> tuple[Tensor, Tensor, Saved]:
    """Carry a_1 (B, h_1, H, W) and the tangents through the hidden layers.

    Returns:
        h_L (B, h_L, H, W), the divergence (B,), and what :func:`pull` needs, empty where it is not kept.
    """
    f, weights = hidden.f, hidden.weights
    saved, slopes = Saved([], []), list[Tensor]()
    h, B = a, len(a)
    div = torch.zeros(B, dtype=a.dtype, device=a.device)
    pairs = zip(hidden.starts.split(hidden.chunk), hidden.ends.split(hidden.chunk), strict=True)
    for number, (tangents, end) in enumerate(pairs):
        with_value, kept = number == 0, list[Tensor]()
        for i in range(len(weights) + 1):
            if with_value:
                h = f.value(a)
                slopes.append(f.slope(a, h))
                if keep:
                    saved.values.append(a)
            if keep:
                kept.append(tangents)
            if i == len(weights):
                break
            out = _convolve(_stack(h if with_value else None, tangents, slopes[i]), weights[i])
            if with_value:
                a, out = out[:B].add_(offsets[i]), out[B:]
            tangents = out.unflatten(0, (-1, B))
        div += (tangents * slopes[-1] * end).sum((0, 2, 3, 4))
        saved.tangents.append(kept)
    return h, div, saved


def pull(hidden: Hidden, saved: Saved, gh: Tensor, gdiv: Tensor, grads: Gradients) -> Tensor:
    """Return the gradient of a_1, given those of h_L and of the divergence, and add the others to ``grads``."""
    f, weights, chunk = hidden.f, hidden.weights, hidden.chunk
    h = [f.value(a) for a in saved.values]
    s = [f.slope(a, below) for a, below in zip(saved.values, h, strict=True)]
    gs: list[Tensor | None] = [None] * len(s)
    g, B = gdiv.view(-1, 1, 1, 1), len(gdiv)
    for number in reversed(range(len(saved.tangents))):
        tangents, part = saved.tangents[number], slice(number * chunk, (number + 1) * chunk)
        with_value = number == 0
        _add_product(grads.ends[part], tangents[-1], s[-1] * g)
        gt = hidden.ends[part] * g
        for i in range(len(weights), -1, -1):
            share, others = (gt * tangents[i]).sum(0), gs[i]
            gs[i] = share if others is None else share.add_(others)
            ga = f.pull(saved.values[i], h[i], s[i], gh, share) if with_value else None
            if i == 0:
                break
            above = _stack(ga, gt, s[i])
            below = _stack(h[i - 1] if with_value else None, tangents[i - 1], s[i - 1])
            back = _pull_convolution(below, weights[i - 1], above, grads.weights[i - 1])
            if ga is not None:
                grads.offsets.append(ga.sum(0))
                gh, back = back[:B], back[B:]
            gt = back.unflatten(0, (-1, B))
        _add_product(grads.starts[part], gt, s[0])
    return cast(Tensor, ga)


class ConvolutionPass:
    r"""Evaluate a :class:`~pycnf.convolution.ConvNet` and its divergence together, for one solve.

    What does not depend on state and time is formed once per solve: the kernels in the memory layout that
    convolutions prefer, the offsets of time and context, the tangents behind the first layer and the cotangents before
    the last one. The result can be differentiated once.

    Args:
        field: The field.
        z: A batch like those to come, (B, D).
        context: Context (B, C) or None.
        probes: Probes (m, B, D) of Hutchinson's estimator, None for the exact divergence, which carries D tangents,
            as many at once as a bounded memory takes, and is meant for small images.

    Attributes:
        tensors: Parameters and context that the evaluation closes over and that may want gradients.
        pullable: Whether :meth:`linearize` is at hand (fields whose kernels do not move with time).
        prepared: What :meth:`linearize` gives gradients for; from there automatic differentiation carries them to
            the parameters and the context, once per solve.
    """

    def __init__(self, field: ConvNet, z: Tensor, context: Tensor | None, probes: Tensor | None) -> None:
        self.field, self.context, self.f = field, context, ACTIVATIONS[field.activation]
        self.layers = [cast(TimeConvolution, layer) for layer in field.layers]
        self.probes = torch.eye(field.features).to(z).unsqueeze(1) if probes is None else probes
        self.mean = 1 if probes is None else len(probes)
        self.sizes = [len(layer.bias) for layer in self.layers]
        _, *self.size = field.shape
        self.chunk = max(1, CHUNK // (len(z) * max(self.sizes) * self.size[0] * self.size[1]))
        self.tensors = (*field.parameters(), *(() if context is None else (context,)))
        self.pullable = self.layers[0].steady
        if not self.pullable:
            return
        self.weights, self.extra = self._split([layer.weight for layer in self.layers])
        self.starts, self.ends = self._prepare(self.weights)
        biases = [layer.bias.view(-1, 1, 1).expand(-1, *self.size) for layer in self.layers]
        self.offset, self.rate = torch.cat(biases), torch.cat([layer.rate(*self.size) for layer in self.layers])
        extra = () if self.extra is None else (self.extra,)
        self.prepared = (self.offset, self.rate, self.starts, self.ends, *self.weights, *extra)

    def __call__(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return v of shape (B, D) and div v of shape (B,) at scalar t and z of shape (B, D)."""
        if self.pullable:
            weights, extra, starts, ends = self.weights, self.extra, self.starts, self.ends
            offsets: Sequence[Tensor] = torch.addcmul(self.offset, t, self.rate).split(self.sizes)
        else:
            affine = [layer.affine(t, *self.size) for layer in self.layers]
            offsets = [offset.expand(-1, *self.size) for _, offset in affine]
            weights, extra = self._split([weight for weight, _ in affine])
            starts, ends = self._prepare(weights)
        a = _convolve(self.field.images(z), weights[0]) + offsets[0]
        a = a if extra is None else a + extra
        between, inner = weights[1:-1], offsets[1:-1]
        if torch.is_grad_enabled():
            h, div = _Apply.apply(self.f, self.chunk, len(between), a, starts, ends, *between, *inner)
        else:
            h, div, _ = propagate(Hidden(self.f, between, starts, ends, self.chunk), a, inner, keep=False)
        return (_convolve(h, weights[-1]) + offsets[-1]).flatten(1), div

    def linearize(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return v, div v and their pullback (gv, gdiv, grads) -> gz, which adds to grads, ordered as ``prepared``."""
        offsets = torch.addcmul(self.offset, t, self.rate).split(self.sizes)
        first, *between, last = self.weights
        hidden, x = Hidden(self.f, between, self.starts, self.ends, self.chunk), self.field.images(z)
        a = _convolve(x, first).add_(offsets[0])
        a = a if self.extra is None else a.add_(self.extra)
        h, div, saved = propagate(hidden, a, offsets[1:-1], keep=True)
        v = _convolve(h, last).add_(offsets[-1]).flatten(1)

        def pullback(gv: Tensor, gdiv: Tensor, grads: list[Tensor]) -> Tensor:
            goffset, grate, gstarts, gends, *gweights = grads
            g = self.field.images(gv)
            parts = Gradients(gweights[1 : len(between) + 1], gstarts, gends, [g.sum(0)])
            out = self.f.value(saved.values[-1])
            gh = _pull_convolution(out, last, g, gweights[len(between) + 1])
            ga = pull(hidden, saved, gh, gdiv, parts)
            share = torch.cat([ga.sum(0), *reversed(parts.offsets)])
            goffset.add_(share)
            grate.addcmul_(share, t)
            if self.extra is not None:
                gweights[-1] += ga
            return _pull_convolution(x, first, ga, gweights[0]).flatten(1)

        return v, div, pullback

    def _split(self, weights: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Keep the kernels of the first layer that act on z, and return the share of the context in that layer."""
        channels, extra = self.field.shape[0], None
        if self.context is not None:
            extra = _convolve(self.field.context_images(self.context), weights[0][:, channels:])
            extra = extra.contiguous(memory_format=torch.channels_last)
        kept = [weights[0][:, :channels], *weights[1:]]
        return [weight.contiguous(memory_format=torch.channels_last) for weight in kept], extra

    def _prepare(self, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the tangents behind the first layer and the cotangents before the last one."""
        probes, shape = self.field.images(self.probes), self.probes.shape[:2]
        starts = _convolve(probes, weights[0])
        ends = F.conv_transpose2d(probes, weights[-1], padding=weights[-1].shape[-1] // 2) / self.mean
        return starts.unflatten(0, shape), ends.unflatten(0, shape)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def _pull_convolution(x: Tensor, weight: Tensor, g: Tensor, gweight: Tensor) -> Tensor:
    """Return the gradient of x, given that of the convolution of x with the weight, and add the weight's."""
    padding = weight.shape[-1] // 2
    gweight += conv2d_weight(x, list(weight.shape), g, padding=padding)
    return conv2d_input(list(x.shape), weight, g, padding=padding)


def _stack(value: Tensor | None, tangents: Tensor, slope: Tensor) -> Tensor:
    """Put a value (B, h, H, W), where there is one, before k tangents (k, B or 1, h, H, W) times a slope."""
    B, k, head = len(slope), len(tangents), 0 if value is None else len(slope)
    shape = (head + k * B, *slope.shape[1:])
    stack = torch.empty(shape, dtype=slope.dtype, device=slope.device, memory_format=torch.channels_last)
    if value is not None:
        stack[:B] = value
    torch.mul(tangents, slope, out=stack[head:].unflatten(0, (k, B)))
    return stack


def _add_product(grad: Tensor, tangents: Tensor, factor: Tensor) -> None:
    """Add (k, B, h, H, W) times (B, h, H, W) to a gradient, or its sum over the batch to one of (k, 1, h, H, W)."""
    if grad.shape[1] == len(factor):
        grad.addcmul_(tangents, factor)
    else:
        grad += (tangents * factor).sum(1, keepdim=True)


class _Apply(torch.autograd.Function):
    """Join the hidden layers to automatic differentiation: (a, starts, ends, weights, offsets) to (h, div)."""

    @staticmethod
    def forward(
        ctx: Any, f: Activation, chunk: int, n: int, a: Tensor, starts: Tensor, ends: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        h, div, saved = propagate(Hidden(f, rest[:n], starts, ends, chunk), a, rest[n:], keep=True)
        ctx.f, ctx.chunk, ctx.n = f, chunk, n
        ctx.save_for_backward(starts, ends, *rest[:n], *saved.values, *(u for part in saved.tangents for u in part))
        return h, div

    @staticmethod
    def backward(ctx: Any, gh: Tensor, gdiv: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        (starts, ends, *kept), n = ctx.saved_tensors, ctx.n
        weights, values, flat = kept[:n], kept[n : 2 * n + 1], kept[2 * n + 1 :]
        saved = Saved(values, [flat[i : i + n + 1] for i in range(0, len(flat), n + 1)])
        hidden = Hidden(ctx.f, weights, starts, ends, ctx.chunk)
        grads = Gradients([torch.zeros_like(w) for w in weights], torch.zeros_like(starts), torch.zeros_like(ends), [])
        ga = pull(hidden, saved, gh, gdiv, grads)
        return None, None, None, ga, grads.starts, grads.ends, *grads.weights, *reversed(grads.offsets)


__all__ = ["ConvolutionPass", "Gradients", "Hidden", "Saved", "propagate", "pull"]
