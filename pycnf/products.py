"""Matrix products in the precision that is asked for; what goes in and comes out keeps its own.

Rounding is to a relative 2^-24 in float32, 2^-11 in TF32 (products of tensor cores, from Ampere on) and 2^-9 in
bfloat16. A field evaluated so coarsely is a staircase to the solver: below a tolerance of about the rounding error its
error estimates are those of the steps of the stairs, and it takes ever smaller steps for no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Products:
    """Multiply matrices.

    Attributes:
        mm: (a, b) -> a b.
        addmm: (c, a, b) -> c + a b.
        accumulate: (c, a, b): adds a b to c.
    """

    mm: Callable[[Tensor, Tensor], Tensor]
    addmm: Callable[[Tensor, Tensor, Tensor], Tensor]
    accumulate: Callable[[Tensor, Tensor, Tensor], Tensor]


@contextmanager
def _tensor_cores() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tf32_mm(a: Tensor, b: Tensor) -> Tensor:
    with _tensor_cores():
        return torch.mm(a, b)


def _tf32_addmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    with _tensor_cores():
        return torch.addmm(c, a, b)


def _tf32_accumulate(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    with _tensor_cores():
        return c.addmm_(a, b)


def _bfloat16_mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a.bfloat16(), b.bfloat16()).to(a.dtype)


PRECISIONS: dict[str, Products] = {
    "float32": Products(torch.mm, torch.addmm, Tensor.addmm_),
    "tf32": Products(_tf32_mm, _tf32_addmm, _tf32_accumulate),
    "bfloat16": Products(
        _bfloat16_mm,
        lambda c, a, b: c + _bfloat16_mm(a, b),
        lambda c, a, b: c.add_(_bfloat16_mm(a, b)),
    ),
}
"""By name. ``"float32"`` leaves products as they are, whatever the dtype; ``"tf32"`` acts on CUDA devices alone."""


__all__ = ["PRECISIONS", "Products"]
