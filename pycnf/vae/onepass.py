r"""The velocity of a perceptron with per-sample weights and its divergence in one pass, the reverse pass written out.

Sample n has the matrices W_l + U_l V_l^T of its own. The matrices are never formed: a layer costs a product with W_l
that all samples share and two thin ones of each sample. What meets the first and the last layer, the columns that
tangents start from and the rows in which they end, is formed once per solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pycnf.fields import ACTIVATIONS
from pycnf.tangents import Pullback

if TYPE_CHECKING:
    from pycnf.vae.amortized import LowRankMLP


class Layer(NamedTuple):
    """Hold the matrix of a layer for B samples: ``weight`` (out, in), ``up`` (B, out, R), ``down`` (B, in, R)."""

    weight: Tensor
    up: Tensor
    down: Tensor

    def apply(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (W + U V^T) x for k vectors a sample, (B, k, in) to (B, k, out), and V^T x, (B, k, R)."""
        inner = torch.bmm(x, self.down)
        return torch.matmul(x, self.weight.t()) + torch.bmm(inner, self.up.mT), inner

    def pull(self, g: Tensor, x: Tensor, inner: Tensor, grads: Sequence[Tensor]) -> Tensor:
        """Return the gradient of x for that of the result, adding to the gradients of (weight, up, down)."""
        gweight, gup, gdown = grads
        ginner = torch.bmm(g, self.up)
        gweight.addmm_(g.flatten(0, 1).t(), x.flatten(0, 1))
        gup.baddbmm_(g.mT, inner)
        gdown.baddbmm_(x.mT, ginner)
        return torch.matmul(g, self.weight) + torch.bmm(ginner, self.down.mT)


class _Point(NamedTuple):
    """Keep what the reverse pass needs of one evaluation; the lists have one entry a hidden layer."""

    a: list[Tensor]
    h: list[Tensor]
    s: list[Tensor]
    before: list[Tensor]
    both: list[Tensor]
    inner: list[Tensor]


class LowRankOnePass:
    r"""Evaluate a :class:`~pycnf.vae.amortized.LowRankMLP` and its divergence together, for one solve.

    With J the Jacobian of a sample, s_l the slopes of its hidden layers and E the D unit vectors or the probes:

    - one hidden layer: tr(E J E^T) = m . s_1, the vector m formed once per solve;
    - two, exact: tr J = s_2 . M s_1, the matrix M of each sample formed once per solve;
    - otherwise k = D or m tangents are carried through the hidden layers beside the value.

    Args:
        field: The perceptron.
        z: A batch like those to come, (B, D).
        context: Numbers of each sample, (B, C).
        probes: Probes (m, B, D) of Hutchinson's estimator, None for the exact divergence.

    Attributes:
        tensors: Parameters and context that the evaluation closes over and that may want gradients.
        pullable: Whether :meth:`linearize` is at hand: always.
        prepared: What :meth:`linearize` gives gradients for.
    """

    pullable = True

    def __init__(self, field: LowRankMLP, z: Tensor, context: Tensor, probes: Tensor | None) -> None:
        self.activation = ACTIVATIONS[field.activation]
        self.tensors = (*field.parameters(), context)
        updates, parameters = field.updates(context), dict(field.named_parameters())
        depth = len(updates)
        weights = [parameters[f"layers.{i}.weight"] for i in range(depth)]
        biases = torch.cat([parameters[f"layers.{i}.bias"] for i in range(depth)])
        self.layers = [Layer(w, u.up, u.down) for w, u in zip(weights, updates, strict=True)]
        self.sizes = [len(w) for w in weights]
        self.offset = biases + torch.cat([u.bias for u in updates], dim=1)
        self.rate = torch.cat([parameters[f"layers.{i}.time_weight"] for i in range(depth)])
        start, end = self._ends(probes)
        self.form = "tangents"
        self.constants: tuple[Tensor, ...] = (start, end)
        if depth == 2:
            self.form, self.constants = "vector", ((start * end).sum(1),)
        elif depth == 3 and probes is None:
            middle = weights[1] + torch.bmm(updates[1].up, updates[1].down.mT)
            self.form, self.constants = "matrix", (middle * torch.bmm(end.mT, start),)
        self.prepared = (self.offset, self.rate, *(part for layer in self.layers for part in layer), *self.constants)

    def __call__(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return v of shape (B, D) and div v of shape (B,) at scalar t and z of shape (B, D)."""
        v, div, _, _ = self._evaluate(t, z)
        return v, div

    def linearize(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return v, div v and their pullback (gv, gdiv, grads) -> gz, which adds to grads, ordered as ``prepared``."""
        v, div, point, inner = self._evaluate(t, z)

        def pullback(gv: Tensor, gdiv: Tensor, grads: list[Tensor]) -> Tensor:
            goffset, grate = grads[:2]
            of_layer = [grads[2 + 3 * i : 5 + 3 * i] for i in range(len(self.layers))]
            gh = self.layers[-1].pull(gv.unsqueeze(1), point.h[-1].unsqueeze(1), inner[-1], of_layer[-1]).squeeze(1)
            gs, gt = self._pull_divergence(gdiv, point, grads[2 + 3 * len(self.layers) :])
            offsets = [gv]
            for i in range(len(point.a) - 1, -1, -1):
                gslope = gs[i] if gt is None else (gt * point.before[i]).sum(1)
                gt = None if gt is None else gt * point.s[i].unsqueeze(1)
                ga = self.activation.pull(point.a[i], point.h[i], point.s[i], gh, gslope)
                offsets.append(ga)
                if i == 0:
                    break
                g = ga.unsqueeze(1) if gt is None else torch.cat([ga.unsqueeze(1), gt], dim=1)
                back = self.layers[i].pull(g, point.both[i - 1], point.inner[i - 1], of_layer[i])
                gh, gt = back[:, 0], None if gt is None else back[:, 1:]
            if gt is not None:
                grads[2 + 3 * len(self.layers)].add_(gt)
            share = torch.cat(offsets[::-1], dim=1)
            goffset.add_(share)
            grate.addcmul_(share.sum(0), t)
            return self.layers[0].pull(ga.unsqueeze(1), z.unsqueeze(1), inner[0], of_layer[0]).squeeze(1)

        return v, div, pullback

    def _ends(self, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what tangents start from, (B, k, h_1), and what they meet, (B, k, h_L)."""
        first, last = self.layers[0], self.layers[-1]
        if probes is None:
            start = first.weight.t() + torch.bmm(first.down, first.up.mT)
            return start, last.weight + torch.bmm(last.up, last.down.mT)
        e = probes.transpose(0, 1)
        end = torch.matmul(e, last.weight) + torch.bmm(torch.bmm(e, last.up), last.down.mT)
        return first.apply(e)[0], end / len(probes)

    def _evaluate(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, _Point, list[Tensor]]:
        """Return v, div v, the hidden layers, and V^T x of the first and the last layer."""
        offsets = torch.addcmul(self.offset, t, self.rate).split(self.sizes, dim=1)
        point = _Point([], [], [], [], [], [])
        value, first = self.layers[0].apply(z.unsqueeze(1))
        a = value.squeeze(1) + offsets[0]
        tangents = self.constants[0] if self.form == "tangents" else None
        for i in range(len(self.layers) - 1):
            h = self.activation.value(a)
            s = self.activation.slope(a, h)
            both = h.unsqueeze(1)
            if tangents is not None:
                point.before.append(tangents)
                both = torch.cat([both, tangents * s.unsqueeze(1)], dim=1)
            for kept, new in zip(point[:3], (a, h, s), strict=True):
                kept.append(new)
            point.both.append(both)
            if i < len(self.layers) - 2:
                moved, inner = self.layers[i + 1].apply(both)
                point.inner.append(inner)
                a = moved[:, 0] + offsets[i + 1]
                tangents = None if tangents is None else moved[:, 1:]
        value, last = self.layers[-1].apply(h.unsqueeze(1))
        return value.squeeze(1) + offsets[-1], self._divergence(point), point, [first, last]

    def _divergence(self, point: _Point) -> Tensor:
        if self.form == "vector":
            return torch.linalg.vecdot(point.s[0], self.constants[0])
        if self.form == "matrix":
            return torch.linalg.vecdot(point.s[1], torch.bmm(self.constants[0], point.s[0].unsqueeze(2)).squeeze(2))
        return (point.both[-1][:, 1:] * self.constants[1]).sum((1, 2))

    def _pull_divergence(
        self, gdiv: Tensor, point: _Point, grads: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the gradients of the slopes, or that of the last tangents where tangents are carried."""
        g = gdiv.unsqueeze(1)
        if self.form == "vector":
            grads[0].addcmul_(g, point.s[0])
            return [g * self.constants[0]], None
        if self.form == "matrix":
            below, above, matrix = point.s[0].unsqueeze(2), (g * point.s[1]).unsqueeze(2), self.constants[0]
            grads[0].baddbmm_(above, below.mT)
            return [torch.bmm(matrix.mT, above).squeeze(2), g * torch.bmm(matrix, below).squeeze(2)], None
        grads[1].addcmul_(g.unsqueeze(2), point.both[-1][:, 1:])
        return [], g.unsqueeze(2) * self.constants[1]


__all__ = ["LowRankOnePass"]
