r"""A perceptron whose weights depend on the sample: W + U V^T, with U, V and a bias emitted by an encoder.

The numbers of one sample arrive as the context of the flow, so that any solver, divergence or regularizer takes
them along. The value and its divergence come in one pass (:mod:`pycnf.vae.onepass`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pycnf.divergence import BoundField
from pycnf.fields import ACTIVATIONS, MLP, TimeLinear
from pycnf.tangents import OnePass
from pycnf.vae.onepass import LowRankOnePass


class Update(NamedTuple):
    """Hold what B samples add to one layer: ``up`` U (B, out, R), ``down`` V (B, in, R), ``bias`` (B, out)."""

    up: Tensor
    down: Tensor
    bias: Tensor


class LowRankMLP(nn.Module):
    r"""Compute v(t, z; c) with a perceptron of which each sample changes the weights by a low-rank update.

    Layer l maps h to (W_l + U_l V_l^T / sqrt(n_l R)) h + b_l + c_l + t w_l, with n_l the size of h and R the rank.
    W_l, b_l and w_l are shared parameters; U_l, V_l and c_l are read from the context of the sample. The factor
    keeps an update of order one when the numbers are, whatever the sizes.

    Args:
        features: Dimension D of z.
        hidden: Widths of the hidden layers.
        rank: Rank R of the updates.
        activation: A name in ``pycnf.fields.ACTIVATIONS``.
        block: Number of this field among those that share a context.
        blocks: How many of equal shape share it.

    Attributes:
        numbers: Numbers a sample needs for this field.
        silent: How many of them, the first ones (those of all U and c), leave the field unchanged while they are zero.
        context: Numbers a sample needs for all blocks, the size of the context.

    Raises:
        ValueError: On sizes below 1, an unknown activation, or a block that is not among the blocks.

    References:
        Grathwohl et al., FFJORD: Free-form continuous dynamics for scalable reversible generative models, ICLR 2019,
        section 4.2.

    >>> field = LowRankMLP(2, hidden=(8,), rank=3)
    >>> t, z, silence = torch.tensor(0.5), torch.randn(5, 2), torch.zeros(5, field.context)
    >>> bool(torch.equal(field(t, z, silence), field(t, z, torch.randn(5, field.context))))
    False
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        rank: int = 20,
        *,
        activation: str = "softplus",
        block: int = 0,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        if features < 1 or rank < 1 or not hidden or min(hidden) < 1:
            raise ValueError(
                f"expected features, rank and hidden widths >= 1, got {features}, {rank} and {tuple(hidden)}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if not 0 <= block < blocks:
            raise ValueError(f"expected 0 <= block < blocks, got {block} and {blocks}")
        self.features, self.rank, self.activation, self.block = features, rank, activation, block
        self.hidden = tuple(hidden)
        self.sizes = tuple(itertools.pairwise((features, *hidden, features)))
        self.layers = nn.ModuleList(TimeLinear(a, b, "concat") for a, b in self.sizes)
        self.silent = sum(b * (rank + 1) for _, b in self.sizes)
        self.numbers = self.silent + sum(a * rank for a, _ in self.sizes)
        self.context = blocks * self.numbers

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        """Evaluate v of shape (B, D) at scalar t, states z (B, D) and context (B, C)."""
        h = z
        for i, update in enumerate(self.updates(context)):
            h = ACTIVATIONS[self.activation].value(h) if i else h
            moved = torch.bmm(torch.bmm(h.unsqueeze(1), update.down), update.up.mT).squeeze(1)
            h = self.layers[i](t, h) + moved + update.bias
        return h

    def updates(self, context: Tensor) -> list[Update]:
        """Return what each sample adds to each layer, the factor 1 / sqrt(n R) included in U."""
        own = context[:, self.block * self.numbers : (self.block + 1) * self.numbers]
        n, widths = len(self.sizes), [b for _, b in self.sizes]
        pieces = own.split([*(b * self.rank for b in widths), *widths, *(a * self.rank for a, _ in self.sizes)], dim=1)
        return [
            Update(up.reshape(-1, b, self.rank) * (a * self.rank) ** -0.5, down.reshape(-1, a, self.rank), bias)
            for (a, b), up, bias, down in zip(self.sizes, pieces[:n], pieces[n : 2 * n], pieces[2 * n :], strict=True)
        ]

    def merge(self, context: Tensor) -> MLP:
        """Return the perceptron that this field is for a single sample, of context (1, C), differentiable."""
        with torch.device("meta"):
            merged = MLP(self.features, self.hidden, activation=self.activation)
        for own, layer, update in zip(self.layers, merged.layers, self.updates(context), strict=True):
            source, target = cast(TimeLinear, own), cast(TimeLinear, layer)
            tensors = {
                "weight": source.weight + update.up[0] @ update.down[0].mT,
                "bias": source.bias + update.bias[0],
                "time_weight": source.time_weight,
            }
            for name, tensor in tensors.items():
                delattr(target, name)
                setattr(target, name, tensor)
        return merged

    def one_pass(self, z: Tensor, context: Tensor, probes: Tensor | None) -> BoundField:
        """Bind v and div v for one solve: exactly, or for probes (m, B, D) by Hutchinson's estimate.

        Where all rows share one sample's numbers (one row, or a context that was expanded), the weights are merged
        and the field is as cheap as an ordinary perceptron.
        """
        if len(context) > 1 and context.stride(0) != 0:
            return LowRankOnePass(self, z, context, probes)
        bound = OnePass(self.merge(context[:1]), z, None, probes)
        bound.tensors = (*self.parameters(), context)
        return bound


__all__ = ["LowRankMLP", "Update"]
