"""Truths about coarser matrix products: what is rounded, what is not, and what rounding does to a solver."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import Sine
from torch import Tensor

from pycnf import CNF, Solver, objective
from pycnf.divergence import Exact, Hutchinson
from pycnf.fields import MLP
from pycnf.products import PRECISIONS

UNIT = {"bfloat16": 2.0**-8}  # spacing of its numbers, relative


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def test_bfloat16_rounds_what_is_multiplied_and_the_product() -> None:
    a, b, c = torch.randn(5, 7), torch.randn(7, 3), torch.randn(5, 3)
    exact = rounded(a).double() @ rounded(b).double()
    products = PRECISIONS["bfloat16"]
    bound = UNIT["bfloat16"] * exact.abs() + 1e-6
    assert ((products.mm(a, b).double() - exact).abs() <= bound).all()
    assert ((products.addmm(c, a, b).double() - c - exact).abs() <= bound).all()
    total = c.clone()
    products.accumulate(total, a, b)
    assert ((total.double() - c - exact).abs() <= bound).all()
    assert products.mm(a, b).dtype == torch.float32
    assert not torch.equal(products.mm(a, b), a @ b)


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_products_on_a_cpu_are_those_of_torch(precision: str) -> None:
    a, b, c = torch.randn(5, 7), torch.randn(7, 3), torch.randn(5, 3)
    products, total = PRECISIONS[precision], c.clone()
    products.accumulate(total, a, b)
    torch.testing.assert_close(products.mm(a, b), torch.mm(a, b), atol=0.0, rtol=0.0)
    torch.testing.assert_close(products.addmm(c, a, b), torch.addmm(c, a, b), atol=0.0, rtol=0.0)
    torch.testing.assert_close(total, torch.addmm(c, a, b), atol=0.0, rtol=0.0)


def test_tf32_leaves_the_setting_of_torch_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    flow = CNF(2, (8,), precision="tf32")
    objective(flow, torch.randn(5, 2)).loss.backward()
    with pytest.raises(RuntimeError):
        PRECISIONS["tf32"].mm(torch.ones(2, 3), torch.ones(2, 3))
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("hidden", "divergence"), [*itertools.product([(6,), (6, 5), (6, 5, 7)], [Exact(), Hutchinson(2)])], ids=str
)
def test_a_rounded_field_is_close_and_its_pullback_is_that_of_a_close_one(
    hidden: tuple[int, ...], divergence: Exact | Hutchinson
) -> None:
    """Value, divergence and gradients in bfloat16 differ from those in float64 by its rounding, and do differ."""
    field, z = MLP(3, hidden).double(), torch.randn(40, 3).double()
    bound, t, found = divergence.bind(field, z, None), torch.tensor(0.4, dtype=torch.float64), []
    for precision in ("float32", "bfloat16"):
        bound.round_to(precision)
        with torch.no_grad():
            v, div, pull = bound.linearize(t, z)
            grads = [torch.zeros_like(tensor) for tensor in bound.prepared]
            gz = pull(torch.ones_like(v), torch.ones_like(div), grads)
        found.append([v, div, gz, *grads])
    assert not torch.equal(found[0][0], found[1][0])
    for got, want in zip(found[1], found[0], strict=True):
        assert got.dtype == torch.float64
        assert (got - want).abs().max() <= 8 * UNIT["bfloat16"] * (want.abs().max() + 0.1)


def test_log_densities_keep_their_precision() -> None:
    """The last bits of log p are those of its own sums: far more of its values differ than bfloat16 could hold."""
    flow, x = CNF(2, (16, 16), precision="bfloat16"), torch.randn(500, 2)
    with torch.no_grad():
        solution = flow.solve(x, solver=Solver(rtol=1e-2, atol=1e-2))
    assert solution.logp.dtype == torch.float32
    assert len(solution.logp.unique()) > 2 * len(rounded(solution.logp).unique())


def test_rounding_drives_the_steps_below_its_own_size() -> None:
    """At a loose tolerance evaluations are those of float32; at a tight one the solver resolves stairs, in vain."""
    torch.manual_seed(2)
    flow, x = CNF(2, (32, 32, 32)), torch.randn(60, 2)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(2.0)
        truth = flow.double().solve(x.double(), solver=Solver(rtol=1e-10, atol=1e-10)).log_prob
        flow, nfe, error = flow.float(), {}, {}
        for precision, tolerance in itertools.product(("float32", "bfloat16"), (1e-1, 1e-6)):
            flow.precision = precision
            solution = flow.solve(x, solver=Solver(rtol=tolerance, atol=tolerance))
            nfe[precision, tolerance] = solution.stats.nfe
            error[precision, tolerance] = (solution.log_prob - truth).abs().max().item()
    assert nfe["bfloat16", 1e-1] <= 2 * nfe["float32", 1e-1]
    assert nfe["bfloat16", 1e-6] > 4 * nfe["float32", 1e-6]
    assert error["bfloat16", 1e-6] > 100 * error["float32", 1e-6]


def test_precision_is_kept_with_a_flow() -> None:
    flow = CNF(2, (8,), precision="bfloat16")
    assert flow.config["precision"] == "bfloat16"
    assert CNF(**flow.config).precision == "bfloat16"


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown precision 'half': choose one of float32, tf32, bfloat16"):
        CNF(2, precision="half")
    with pytest.raises(ValueError, match=r"precision='bfloat16' is for perceptrons: take torch\.autocast"):
        CNF(3, field=Sine(), precision="bfloat16")
