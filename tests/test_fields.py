"""Truths about the shipped fields: what a layer computes, shapes, names, contexts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from pycnf.fields import ACTIVATIONS, MLP, TimeLinear

TIME = ["concat", "concatsquash", "none"]


@pytest.mark.parametrize("t", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("time", TIME)
def test_layer_equals_its_formula(time: str, t: float) -> None:
    layer = TimeLinear(4, 3, time).double()  # type: ignore[arg-type]
    x, at = torch.randn(7, 4).double(), torch.tensor(t, dtype=torch.float64)
    if time == "concat":
        joined = torch.cat([x, torch.full((7, 1), t, dtype=torch.float64)], dim=1)
        weight = torch.cat([layer.weight, layer.time_weight.unsqueeze(1)], dim=1)
        want = F.linear(joined, weight, layer.bias)
    elif time == "concatsquash":
        gate = torch.sigmoid(t * layer.gate_weight + layer.gate_bias)
        want = (x @ layer.weight.t() + layer.bias) * gate + t * layer.shift_weight
    else:
        want = x @ layer.weight.t() + layer.bias
    torch.testing.assert_close(layer(at, x), want, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("time", TIME)
def test_layer_depends_on_time_as_it_says(time: str) -> None:
    layer, x = TimeLinear(4, 3, time).double(), torch.randn(7, 4).double()  # type: ignore[arg-type]
    early, late = (layer(torch.tensor(t).double(), x) for t in (0.1, 0.9))
    assert torch.equal(early, late) == (time == "none")


@pytest.mark.parametrize("time", TIME)
def test_every_parameter_matters(time: str) -> None:
    field = MLP(3, (5, 4), context=2, time=time).double()  # type: ignore[arg-type]
    v = field(torch.tensor(0.3).double(), torch.randn(6, 3).double(), torch.randn(6, 2).double())
    v.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in field.parameters())


@pytest.mark.parametrize(("context", "time", "activation"), [*itertools.product([0, 3], TIME, ACTIVATIONS)])
def test_perceptron_equals_its_layers(context: int, time: str, activation: str) -> None:
    field = MLP(2, (6, 5), context=context, time=time, activation=activation).double()  # type: ignore[arg-type]
    t, z = torch.tensor(0.4).double(), torch.randn(9, 2).double()
    c = torch.randn(9, context).double() if context else None
    h = z if c is None else torch.cat([z, c], dim=1)
    for i, layer in enumerate(field.layers):
        h = layer(t, h if i == 0 else ACTIVATIONS[activation].value(h))
    torch.testing.assert_close(field(t, z) if c is None else field(t, z, c), h, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_and_curvatures_are_derivatives(name: str) -> None:
    activation = ACTIVATIONS[name]
    a = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    h = activation.value(a)
    (first,) = torch.autograd.grad(h.sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a, retain_graph=True)
    slope = activation.slope(a, h)
    torch.testing.assert_close(slope, first, atol=1e-14, rtol=1e-12)
    gh, gs = torch.randn_like(a), torch.randn_like(a)
    pulled = activation.pull(a, h, slope, gh, gs)
    torch.testing.assert_close(pulled, gh * slope + gs * second, atol=1e-14, rtol=1e-11)
    (differentiated,) = torch.autograd.grad(slope.sum(), a)
    torch.testing.assert_close(differentiated, second, atol=1e-14, rtol=1e-11)


@pytest.mark.parametrize("hidden", [(8,), (8, 4), [8, 4, 6], (3, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("features", [1, 2, 7])
def test_shapes(features: int, hidden: tuple[int, ...]) -> None:
    field = MLP(features, hidden)
    assert field(torch.tensor(0.5), torch.randn(5, features)).shape == (5, features)
    assert [layer.weight.shape[0] for layer in field.layers] == [*hidden, features]


def test_rows_do_not_see_each_other() -> None:
    field, z, t = MLP(3, (8,)).double(), torch.randn(6, 3).double(), torch.tensor(0.2).double()
    torch.testing.assert_close(field(t, z)[2:4], field(t, z[2:4]), atol=1e-15, rtol=1e-13)


def test_same_seed_same_field() -> None:
    fields = []
    for _ in range(2):
        torch.manual_seed(4)
        fields.append(MLP(3, (8,)))
    pairs = zip(fields[0].parameters(), fields[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "features >= 1"),
        ({"features": 2, "hidden": ()}, "hidden widths >= 1"),
        ({"features": 2, "hidden": (4, 0)}, "hidden widths >= 1"),
        ({"features": 2, "context": -1}, "context >= 0"),
        ({"features": 2, "activation": "relu6"}, "unknown activation 'relu6': choose one of tanh"),
        ({"features": 2, "time": "sometimes"}, "unknown time conditioning 'sometimes': choose one of concat"),
    ],
)
def test_impossible_fields_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(**settings)  # type: ignore[arg-type]
