"""Fields v(t, z): what moves the states of a continuous normalizing flow.

A field is any ``torch.nn.Module`` that maps a scalar time ``t`` and states ``z`` of shape (B, D) to velocities
of shape (B, D), or ``(t, z, context)`` where a context of shape (B, C) is given. The multilayer perceptron
shipped here has its divergence in closed form (:mod:`pycnf.tangents`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TimeConditioning = Literal["concat", "concatsquash", "none"]


@dataclass(frozen=True)
class Activation:
    """Give an activation, its slope, and how gradients pass through both.

    Attributes:
        value: h = value(a).
        slope: s = slope(a, h), the derivative of h.
        pull: ga = pull(a, h, s, gh, gs) = gh s + gs ds/da, the gradient of a from those of h and s.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


_ONE = torch.ones(())


def _silu_curvature(a: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(a)
    return sigmoid * (1 - sigmoid) * (2 + a * (1 - 2 * sigmoid))


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(
        torch.tanh,
        lambda a, h: torch.addcmul(_ONE.to(h), h, h, value=-1),
        lambda a, h, s, gh, gs: torch.addcmul(gh, h, gs, value=-2).mul_(s),
    ),
    "softplus": Activation(
        F.softplus,
        lambda a, h: torch.sigmoid(a),
        lambda a, h, s, gh, gs: torch.addcmul(gh, gs, 1 - s).mul_(s),
    ),
    "sigmoid": Activation(
        torch.sigmoid,
        lambda a, h: h - h * h,
        lambda a, h, s, gh, gs: torch.addcmul(gh, gs, 1 - 2 * h).mul_(s),
    ),
    "silu": Activation(
        F.silu,
        lambda a, h: torch.sigmoid(a) * (1 + a - h),
        lambda a, h, s, gh, gs: torch.addcmul(gh * s, gs, _silu_curvature(a)),
    ),
    "sin": Activation(
        torch.sin,
        lambda a, h: torch.cos(a),
        lambda a, h, s, gh, gs: torch.addcmul(gh * s, gs, h, value=-1),
    ),
}


class TimeLinear(nn.Module):
    r"""Apply an affine map conditioned on time.

    - ``"concat"``: time is one more input, y = W x + b + t w;
    - ``"concatsquash"``: y = sigmoid(t u + s) * (W x + b) + t c;
    - ``"none"``: y = W x + b.

    Args:
        in_features: Size of x.
        out_features: Size of y.
        time: Time conditioning.

    References:
        Grathwohl et al., FFJORD: Free-form continuous dynamics for scalable reversible generative models,
        ICLR 2019, appendix B.
    """

    def __init__(self, in_features: int, out_features: int, time: TimeConditioning = "concat") -> None:
        super().__init__()
        self.time = time
        fan_in = in_features + (time == "concat")
        bound = fan_in**-0.5

        def uniform(*shape: int, bound: float = bound) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

        self.weight = uniform(out_features, in_features)
        self.bias = uniform(out_features)
        if time == "concat":
            self.time_weight = uniform(out_features)
        elif time == "concatsquash":
            self.gate_weight, self.gate_bias = (
                uniform(out_features, bound=1.0),
                uniform(out_features, bound=1.0),
            )
            self.shift_weight = uniform(out_features, bound=1.0)

    @property
    def steady(self) -> bool:
        """Whether the matrix of the map is the same at all times."""
        return self.time != "concatsquash"

    def affine(self, t: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the matrix (out, in) and the offset (out,) of the map at scalar time t.

        Args:
            t: Scalar time.
            weight: Columns of the weight to use in place of all.
        """
        weight = self.weight if weight is None else weight
        if self.time == "none":
            return weight, self.bias
        if self.time == "concat":
            return weight, torch.addcmul(self.bias, t, self.time_weight)
        gate = torch.sigmoid(torch.addcmul(self.gate_bias, t, self.gate_weight))
        return gate.unsqueeze(1) * weight, torch.addcmul(gate * self.bias, t, self.shift_weight)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return y of shape (B, out) at scalar time t and x of shape (B, in)."""
        return F.linear(x, *self.affine(t))


class MLP(nn.Module):
    r"""Compute v(t, z) with a multilayer perceptron conditioned on time.

    h_0 = [z, context], h_l = activation(layer_l(t, h_{l-1})), v = layer_{L+1}(t, h_L).

    Args:
        features: Dimension D of z.
        hidden: Widths of the L >= 1 hidden layers.
        context: Dimension C of the context, 0 for none.
        activation: A name in ``ACTIVATIONS``.
        time: Time conditioning of every layer (:class:`TimeLinear`).

    Raises:
        ValueError: On sizes below 1 or unknown names.

    >>> v = MLP(3, hidden=(16, 16))
    >>> v(torch.tensor(0.5), torch.randn(8, 3)).shape == (8, 3)
    True
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64, 64),
        *,
        context: int = 0,
        activation: str = "tanh",
        time: TimeConditioning = "concat",
    ) -> None:
        super().__init__()
        if features < 1 or context < 0 or not hidden or min(hidden) < 1:
            raise ValueError(
                f"expected features >= 1, context >= 0 and hidden widths >= 1, got features={features}, "
                f"context={context}, hidden={tuple(hidden)}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if time not in ("concat", "concatsquash", "none"):
            raise ValueError(f"unknown time conditioning {time!r}: choose one of concat, concatsquash, none")
        self.features, self.context, self.activation = features, context, activation
        sizes = [features + context, *hidden, features]
        self.layers = nn.ModuleList(TimeLinear(a, b, time) for a, b in itertools.pairwise(sizes))

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Evaluate v(t, z) of shape (B, D) at states z of shape (B, D), with a context (B, C) if there is one."""
        h = z if context is None else torch.cat([z, context], dim=1)
        first, *rest = self.layers
        a = first(t, h)
        for layer in rest:
            a = layer(t, ACTIVATIONS[self.activation].value(a))
        return a
