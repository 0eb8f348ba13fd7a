r"""The velocity of a perceptron and its divergence in one pass, without automatic differentiation.

With the matrices W_l(t) of the layers and the slopes s_l = activation'(a_l) of the L hidden ones, D_l = diag(s_l),
the Jacobian of the field is J = W_{L+1} D_L W_L ... D_1 W_1. Its trace, or e^T J e for a probe e, comes with the
value in one pass, and the reverse pass through both is written out, which saves most of what automatic
differentiation would record and move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pycnf.fields import ACTIVATIONS, MLP, Activation, TimeLinear
from pycnf.products import PRECISIONS, Products
from pycnf.solution import refuse_second_derivatives

Pullback = Callable[[Tensor, Tensor, list[Tensor]], Tensor]


class Gradients(NamedTuple):
    """Collect the gradients of the hidden layers: weights and constants are added to, offsets appended, last first."""

    weights: list[Tensor]
    constants: list[Tensor]
    offsets: list[Tensor]


class Rule(Protocol):
    """Form tr J or a mean of e^T J e from what the hidden layers know: one formula per depth and purpose.

    Shapes: a (B, h_1) inputs of the first activation; h (B, h_L) output of the last one; ``weights`` and
    ``offsets`` those of the layers between hidden ones.
    """

    @property
    def products(self) -> Products:
        """How matrices are multiplied."""
        ...

    def prepare(
        self, first: Tensor, hidden: Sequence[Tensor], last: Tensor, probes: Tensor | None = None
    ) -> list[Tensor]:
        """Return what does not depend on the state."""
        ...

    def forward(
        self,
        f: Activation,
        a: Tensor,
        weights: Sequence[Tensor],
        offsets: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return h, the divergence (B,), and what :meth:`backward` needs."""
        ...

    def backward(
        self,
        f: Activation,
        saved: Sequence[Tensor],
        weights: Sequence[Tensor],
        constants: Sequence[Tensor],
        gh: Tensor,
        gdiv: Tensor,
        grads: Gradients,
    ) -> Tensor:
        """Return the gradient of a, given those of h and of the divergence."""
        ...


@dataclass(frozen=True)
class Slopes:
    r"""Form the exact trace of up to three hidden layers as a multilinear form of their slopes.

    - one: tr J = s_1 . m with m_j = sum_i W_1[j, i] W_2[i, j];
    - two: tr J = s_2 . M s_1 with M = W_2 * (W_1 W_3)^T, one more matrix product whatever D is;
    - three: tr J = sum_i s_2 . (S_1^i s_1) * (S_3^i s_3) over the D dimensions, with S_1^i = W_2 diag(W_1[:, i]) and
      S_3^i = W_3^T diag(W_4[i, :]): tangents from below and cotangents from above meet in the middle.
    """

    products: Products = PRECISIONS["float32"]

    def prepare(
        self, first: Tensor, hidden: Sequence[Tensor], last: Tensor, probes: Tensor | None = None
    ) -> list[Tensor]:
        if not hidden:
            return [(first * last.t()).sum(1)]
        if len(hidden) == 1:
            return [hidden[0] * (first @ last).t()]
        below = first.unsqueeze(2) * hidden[0].t().unsqueeze(1)
        above = last.t().unsqueeze(2) * hidden[1].unsqueeze(1)
        return [below.flatten(1), above.flatten(1)]

    def forward(
        self,
        f: Activation,
        a: Tensor,
        weights: Sequence[Tensor],
        offsets: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        saved: list[Tensor] = []
        for i in range(len(weights) + 1):
            h = f.value(a)
            saved += [a, h, f.slope(a, h)]
            if i < len(weights):
                a = self.products.addmm(offsets[i], h, weights[i].t())
        s = saved[2::3]
        if len(s) == 1:
            return h, torch.mv(s[0], constants[0]), saved
        if len(s) == 2:
            q = self.products.mm(s[0], constants[0].t())
        else:
            below = self.products.mm(s[0], constants[0]).view(len(a), -1, s[1].shape[1])
            above = self.products.mm(s[2], constants[1]).view_as(below)
            q = (below * above).sum(1)
            saved += [below, above]
        saved.append(q)
        return h, torch.linalg.vecdot(q, s[1]), saved

    def backward(
        self,
        f: Activation,
        saved: Sequence[Tensor],
        weights: Sequence[Tensor],
        constants: Sequence[Tensor],
        gh: Tensor,
        gdiv: Tensor,
        grads: Gradients,
    ) -> Tensor:
        depth, g = len(weights) + 1, gdiv.unsqueeze(1)
        s = saved[2 : 3 * depth : 3]
        if depth == 1:
            grads.constants[0].addmv_(s[0].t(), gdiv)
            gs = [g * constants[0]]
        elif depth == 2:
            gq = g * s[1]
            self.products.accumulate(grads.constants[0], gq.t(), s[0])
            gs = [self.products.mm(gq, constants[0]), g * saved[-1]]
        else:
            below, above = saved[-3:-1]
            gq = (g * s[1]).unsqueeze(1)
            gbelow, gabove = (above * gq).flatten(1), (below * gq).flatten(1)
            self.products.accumulate(grads.constants[0], s[0].t(), gbelow)
            self.products.accumulate(grads.constants[1], s[2].t(), gabove)
            gs = [self.products.mm(gbelow, constants[0].t()), g * saved[-1], self.products.mm(gabove, constants[1].t())]
        for i in range(depth - 1, 0, -1):
            a, h, slope = saved[3 * i : 3 * i + 3]
            ga = f.pull(a, h, slope, gh, gs[i])
            self.products.accumulate(grads.weights[i - 1], ga.t(), saved[3 * i - 2])
            grads.offsets.append(ga.sum(0))
            gh = self.products.mm(ga, weights[i - 1])
        a, h, slope = saved[:3]
        return f.pull(a, h, slope, gh, gs[0])


@dataclass(frozen=True)
class Tangents:
    """Carry k tangents through the hidden layers beside the value, to meet k cotangents at the end.

    The tangents start as the D columns of W_1 and meet the rows of W_{L+1} (exact trace of any depth), or start as
    W_1 e for the probes e (m, B, D) and meet W_{L+1}^T e. Value and tangents share one buffer (1 + k, B, h), so
    that each layer costs one matrix product.
    """

    products: Products = PRECISIONS["float32"]

    def prepare(
        self, first: Tensor, hidden: Sequence[Tensor], last: Tensor, probes: Tensor | None = None
    ) -> list[Tensor]:
        if probes is None:
            return [first.t().unsqueeze(1), last.unsqueeze(1)]
        return [F.linear(probes, first), probes @ last / len(probes)]

    def forward(
        self,
        f: Activation,
        a: Tensor,
        weights: Sequence[Tensor],
        offsets: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        tangents, cotangents = constants
        saved: list[Tensor] = []
        for i in range(len(weights) + 1):
            h = f.value(a)
            s = f.slope(a, h)
            both = torch.empty(1 + len(tangents), *a.shape, dtype=a.dtype, device=a.device)
            torch.mul(tangents, s, out=both[1:])
            saved += [a, h, s, tangents, both]
            if i < len(weights):
                both[0] = h
                out = self.products.mm(both.view(-1, both.shape[2]), weights[i].t()).view(len(both), len(a), -1)
                a, tangents = out[0].add_(offsets[i]), out[1:]
        return h, (both[1:] * cotangents).sum((0, 2)), saved

    def backward(
        self,
        f: Activation,
        saved: Sequence[Tensor],
        weights: Sequence[Tensor],
        constants: Sequence[Tensor],
        gh: Tensor,
        gdiv: Tensor,
        grads: Gradients,
    ) -> Tensor:
        cotangents, last = constants[1], saved[-1][1:]
        if cotangents.shape[1] == 1:
            grads.constants[1][:, 0] += torch.matmul(gdiv, last)
        else:
            grads.constants[1].addcmul_(last, gdiv.unsqueeze(1))
        gt = cotangents * gdiv.unsqueeze(1)
        for i in range(len(weights), -1, -1):
            a, h, s, tangents, both = saved[5 * i : 5 * i + 5]
            ga = f.pull(a, h, s, gh, (gt * tangents).sum(0))
            if i == 0:
                break
            g = torch.empty_like(both)
            g[0] = ga
            torch.mul(gt, s, out=g[1:])
            flat, below = g.view(-1, g.shape[2]), saved[5 * i - 1]
            self.products.accumulate(grads.weights[i - 1], flat.t(), below.view(-1, below.shape[2]))
            grads.offsets.append(ga.sum(0))
            back = self.products.mm(flat, weights[i - 1]).view_as(below)
            gh, gt = back[0], back[1:]
        start = gt * s
        grads.constants[0].add_(start if constants[0].shape[1] == start.shape[1] else start.sum(1, keepdim=True))
        return ga


@dataclass(frozen=True)
class Form:
    """Evaluate v and div v from the tensors that one solve prepares, and pull gradients back to them.

    Attributes:
        rule: How the divergence is formed.
        activation: The activation.
        sizes: Widths of the hidden layers and D.
        constants: How many tensors the rule prepares.

    The ``tensors`` of its methods are those of all layers' offsets and of their rates in time, the weights, the rule's
    constants and, where there is one, the context's share of the first layer: :attr:`OnePass.prepared`.
    """

    rule: Rule
    activation: Activation
    sizes: tuple[int, ...]
    constants: int

    def forward(self, t: Tensor, z: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return v (B, D), div v (B,) and what :meth:`backward` needs, at scalar t and z (B, D)."""
        (offset, rate), (first, *hidden, last), constants, extra = self._split(tensors)
        products, offsets = self.rule.products, torch.addcmul(offset, t, rate).split(self.sizes)
        a = products.addmm(offsets[0], z, first.t())
        a = a.add_(extra[0]) if extra else a
        h, div, saved = self.rule.forward(self.activation, a, hidden, offsets[1:-1], constants)
        return products.addmm(offsets[-1], h, last.t()), div, [h, *saved]

    def backward(
        self,
        t: Tensor,
        z: Tensor,
        tensors: Sequence[Tensor],
        saved: Sequence[Tensor],
        gv: Tensor,
        gdiv: Tensor,
        grads: Sequence[Tensor],
    ) -> Tensor:
        """Return the gradient of z, given those of v and div v, and add those of the tensors to ``grads``."""
        _, (first, *hidden, last), constants, _ = self._split(tensors)
        (goffset, grate), (gfirst, *gweights), gconstants, gextra = self._split(grads)
        products, parts = self.rule.products, Gradients(gweights[:-1], list(gconstants), [gv.sum(0)])
        products.accumulate(gweights[-1], gv.t(), saved[0])
        gh = products.mm(gv, last)
        ga = self.rule.backward(self.activation, saved[1:], hidden, constants, gh, gdiv, parts)
        share = torch.cat([ga.sum(0), *reversed(parts.offsets)])
        goffset.add_(share)
        grate.addcmul_(share, t)
        products.accumulate(gfirst, ga.t(), z)
        for slot in gextra:
            slot.add_(ga)
        return products.mm(ga, first)

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        layers = 2 + len(self.sizes)
        constants = layers + self.constants
        return tensors[:2], tensors[2:layers], tensors[layers:constants], tensors[constants:]


class OnePass:
    r"""Evaluate an MLP and its divergence together, for one solve.

    What does not depend on state and time is formed once per solve. The result can be differentiated once; for
    derivatives of higher order take ``Exact(mode="forward")``.

    Args:
        field: The MLP.
        z: A batch like those to come, (B, D).
        context: Context (B, C) or None.
        probes: Probes (m, B, D) of Hutchinson's estimator, None for the exact divergence.

    Attributes:
        tensors: Parameters and context that the evaluation closes over and that may want gradients.
        pullable: Whether :meth:`linearize` is at hand (fields whose matrices do not move with time).
        prepared: What :meth:`linearize` gives gradients for; from there automatic differentiation carries them to
            the parameters and the context, once per solve.
        form: How :meth:`linearize` evaluates what was prepared.
    """

    def __init__(self, field: MLP, z: Tensor, context: Tensor | None, probes: Tensor | None) -> None:
        self.field, self.z, self.context, self.probes = field, z, context, probes
        self.activation, self.features = ACTIVATIONS[field.activation], field.features
        self.layers = [cast(TimeLinear, layer) for layer in field.layers]
        self.rule = _choose_rule(self.layers, len(z), probes)
        self.tensors = (*field.parameters(), *(() if context is None else (context,)))
        self.pullable = self.layers[0].steady
        self.sizes = tuple(len(layer.bias) for layer in self.layers)
        if not self.pullable:
            return
        self.weights, self.extra = self._split([layer.weight for layer in self.layers])
        self.constants = self._prepare(self.weights)
        self.offset = torch.cat([layer.bias for layer in self.layers])
        concat = self.layers[0].time == "concat"
        self.rate = torch.cat([layer.time_weight for layer in self.layers]) if concat else torch.zeros_like(self.offset)
        extra = () if self.extra is None else (self.extra,)
        self.prepared = (self.offset, self.rate, *self.weights, *self.constants, *extra)
        self.form = Form(self.rule, self.activation, self.sizes, len(self.constants))

    def round_to(self, precision: str) -> None:
        """Multiply matrices in a precision of ``PRECISIONS`` from now on."""
        self.rule = replace(self.rule, products=PRECISIONS[precision])
        if self.pullable:
            self.form = replace(self.form, rule=self.rule)

    def __call__(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return v of shape (B, D) and div v of shape (B,) at scalar t and z of shape (B, D)."""
        if self.pullable:
            weights, extra, constants = self.weights, self.extra, self.constants
            offsets: Sequence[Tensor] = torch.addcmul(self.offset, t, self.rate).split(self.sizes)
        else:
            affine = [layer.affine(t) for layer in self.layers]
            offsets = [offset for _, offset in affine]
            weights, extra = self._split([weight for weight, _ in affine])
            constants = self._prepare(weights)
        a = self.rule.products.addmm(offsets[0], z, weights[0].t())
        a = a if extra is None else a + extra
        hidden = (*weights[1:-1], *offsets[1:-1], *constants)
        h, div = _Apply.apply(self.rule, self.activation, len(weights) - 2, a, *hidden)
        return self.rule.products.addmm(offsets[-1], h, weights[-1].t()), div

    def linearize(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Pullback]:
        """Return v, div v and their pullback (gv, gdiv, grads) -> gz, which adds to grads, ordered as ``prepared``."""
        form, tensors = self.form, self.prepared
        v, div, saved = form.forward(t, z, tensors)

        def pullback(gv: Tensor, gdiv: Tensor, grads: list[Tensor]) -> Tensor:
            return form.backward(t, z, tensors, saved, gv, gdiv, grads)

        return v, div, pullback

    def _prepare(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return self.rule.prepare(weights[0], weights[1:-1], weights[-1], self.probes)

    def _split(self, weights: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Keep the columns of the first matrix that act on z, and return the share of the context in that layer."""
        if self.context is None:
            return weights, None
        first = weights[0]
        return [first[:, : self.features], *weights[1:]], F.linear(self.context, first[:, self.features :])


def _choose_rule(layers: Sequence[TimeLinear], batch: int, probes: Tensor | None) -> Slopes | Tangents:
    """Take the multilinear form where there is one; that of three layers pays in batches larger than a layer."""
    widths = [len(layer.bias) for layer in layers[:-1]]
    if probes is None and (len(widths) < 3 or (len(widths) == 3 and batch >= max(widths))):
        return Slopes()
    return Tangents()


class _Apply(torch.autograd.Function):
    """Join a rule to automatic differentiation: (a, hidden weights, hidden offsets, constants) to (h, div)."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, f: Activation, n: int, a: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        weights, offsets, constants = rest[:n], rest[n : 2 * n], rest[2 * n :]
        h, div, saved = rule.forward(f, a, weights, offsets, constants)
        ctx.rule, ctx.f, ctx.n, ctx.constants = rule, f, n, len(constants)
        ctx.save_for_backward(*weights, *constants, *saved)
        return h.clone(), div

    @staticmethod
    def backward(ctx: Any, gh: Tensor, gdiv: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        kept, n = ctx.saved_tensors, ctx.n
        weights, constants, saved = kept[:n], kept[n : n + ctx.constants], kept[n + ctx.constants :]
        grads = Gradients([torch.zeros_like(w) for w in weights], [torch.zeros_like(c) for c in constants], [])
        ga = ctx.rule.backward(ctx.f, saved, weights, constants, gh, gdiv, grads)
        return None, None, None, ga, *grads.weights, *reversed(grads.offsets), *grads.constants


__all__ = ["Form", "OnePass", "Pullback", "Slopes", "Tangents"]
