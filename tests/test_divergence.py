"""Truths about divergences: in one pass as by differentiation, unbiased estimates, probes fixed per solve.

Random tests are z-tests with a two-sided false-alarm rate of 1e-6 each, and a fixed seed.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems import Calls, Linear, Sine, Wave, z_score_bound
from torch import Tensor, nn

from pycnf.divergence import Exact, Hutchinson, call_field, parse_divergence
from pycnf.fields import ACTIVATIONS, MLP

FALSE_ALARM = 1e-6
BOUND = z_score_bound(FALSE_ALARM)
TIME = ["concat", "concatsquash", "none"]
T = torch.tensor(0.37, dtype=torch.float64)


def jacobian(field: nn.Module, z: Tensor, context: Tensor | None = None) -> Tensor:
    """Jacobians dv/dz of every row, (B, D, D), by reverse mode with a graph for more derivatives."""
    v = call_field(field, T, z, context)
    rows = [torch.autograd.grad(v[:, i].sum(), z, create_graph=True)[0] for i in range(z.shape[1])]
    return torch.stack(rows, dim=1)


def trace(jacobians: Tensor) -> Tensor:
    return torch.diagonal(jacobians, dim1=-2, dim2=-1).sum(-1)


class Normalized(nn.Module):
    """A user's field with a layer norm."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, features)).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z) * torch.cos(t)


class Convolution(nn.Module):
    """A user's field that sees its states as signals of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.Softplus(), nn.Conv1d(4, 2, 3, padding=1)).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        signal = z.unflatten(1, (2, 3))
        clock = t.expand(len(z), 1, 3)
        return self.net(torch.cat([signal, clock], dim=1)).flatten(1)


USERS = {"layer norm": (Normalized, 4), "convolution": (Convolution, 6), "wave": (Wave, 2), "sine": (Sine, 3)}


# --- exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "time", "activation", "context"),
    [*itertools.product([(5,), (5, 4), (5, 4, 6), (4, 3, 5, 4)], TIME, ACTIVATIONS, [0, 2])],
)
def test_one_pass_equals_differentiation(hidden: tuple[int, ...], time: str, activation: str, context: int) -> None:
    """Values, and gradients with respect to states, parameters and context."""
    field = MLP(3, hidden, time=time, activation=activation, context=context).double()  # type: ignore[arg-type]
    z = torch.randn(6, 3).double().requires_grad_()
    c = torch.randn(6, context).double().requires_grad_() if context else None
    v, div = Exact().bind(field, z, c)(T, z)
    want_v, want = call_field(field, T, z, c), trace(jacobian(field, z, c))
    torch.testing.assert_close(v, want_v, atol=1e-13, rtol=1e-12)
    with torch.no_grad():
        bare_v, bare = Exact().bind(field, z, c)(T, z)
    torch.testing.assert_close(bare_v, want_v, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(bare, want, atol=1e-13, rtol=1e-11)
    torch.testing.assert_close(div, want, atol=1e-13, rtol=1e-11)
    leaves = [z, *field.parameters(), *([] if c is None else [c])]
    weights = torch.randn(6).double()
    got = torch.autograd.grad(
        (div * weights).sum() + v.square().sum(), leaves, allow_unused=True, materialize_grads=True
    )
    wanted = torch.autograd.grad(
        (want * weights).sum() + want_v.square().sum(), leaves, allow_unused=True, materialize_grads=True
    )
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("features", [1, 2, 9])
@pytest.mark.parametrize("hidden", [(4,), (4, 4), (4, 4, 4)], ids=str)
def test_one_pass_in_every_dimension(features: int, hidden: tuple[int, ...]) -> None:
    field, z = MLP(features, hidden).double(), torch.randn(5, features).double().requires_grad_()
    _, div = Exact().bind(field, z, None)(T, z)
    torch.testing.assert_close(div, trace(jacobian(field, z)), atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("hidden", [(4,), (4, 3), (4, 3, 3)], ids=str)
def test_first_derivatives_of_the_one_pass(hidden: tuple[int, ...]) -> None:
    field = MLP(2, hidden).double()
    z = torch.randn(2, 2).double().requires_grad_()

    def both(z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return Exact().bind(field, z, None)(T, z)

    assert torch.autograd.gradcheck(both, (z, *field.parameters()))


def test_second_derivatives_by_differentiation() -> None:
    field = MLP(2, (4, 3, 3)).double()
    z = torch.randn(2, 2).double().requires_grad_()

    def div(z: Tensor, *parameters: Tensor) -> Tensor:
        return Exact("forward").bind(field, z, None)(T, z)[1]

    assert torch.autograd.gradgradcheck(div, (z, *field.parameters()))


@pytest.mark.parametrize("divergence", [Exact(), Exact("forward"), Hutchinson()], ids=str)
@pytest.mark.parametrize("hidden", [(4,), (4, 3), (4, 3, 3)], ids=str)
def test_second_derivatives_of_the_one_pass_are_right_or_refused(
    hidden: tuple[int, ...], divergence: Exact | Hutchinson
) -> None:
    field = MLP(2, hidden).double()
    z = torch.randn(3, 2).double().requires_grad_()
    leaves = list(field.parameters())

    def size(z: Tensor, create_graph: bool) -> Tensor:
        torch.manual_seed(2)
        div = divergence.bind(field, z, None)(T, z)[1].sum()
        gradients = torch.autograd.grad(div, leaves, create_graph=create_graph, allow_unused=True)
        return torch.stack([g.square().sum() for g in gradients if g is not None]).sum()

    direction, h = torch.randn_like(z), 1e-5
    ahead, behind = (size((z + sign * h * direction).detach(), False) for sign in (1, -1))
    try:
        (gradient,) = torch.autograd.grad(size(z, True), z)
    except RuntimeError:
        return  # refused
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * h), atol=1e-7, rtol=1e-5)


def test_a_subclass_with_its_own_forward_keeps_its_own_divergence() -> None:
    class Doubled(MLP):
        def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
            return 2 * super().forward(t, z, context)

    field, z = Doubled(2, (4,)).double(), torch.randn(5, 2).double().requires_grad_()
    v, div = Exact().bind(field, z, None)(T, z)
    torch.testing.assert_close(v, field(T, z))
    torch.testing.assert_close(div, trace(jacobian(field, z)))


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("name", USERS)
def test_modes_of_differentiation_agree(name: str, mode: str) -> None:
    if (name, mode) == ("layer norm", "forward"):
        pytest.xfail("torch's forward-mode formula of layer normalization has a wrong derivative of its own")
    make, features = USERS[name]
    field = make()
    z = torch.randn(5, features).double().requires_grad_()
    bound = Exact(mode).bind(field, z, None)  # type: ignore[arg-type]
    v, div = bound(T, z)
    want = trace(jacobian(field, z))
    torch.testing.assert_close(v, field(T, z))
    torch.testing.assert_close(div, want, atol=1e-13, rtol=1e-11)
    leaves = [z, *field.parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(div.square().sum(), leaves, **options)
    wanted = torch.autograd.grad(want.square().sum(), leaves, **options)
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("divergence", ["exact", "exact-reverse", "hutchinson", "hutchinson-rademacher-3"])
def test_a_context_reaches_a_users_field(divergence: str) -> None:
    field, z = Wave(3, context=2), torch.randn(4, 3).double()
    context = torch.randn(4, 2).double().requires_grad_()
    v, div = parse_divergence(divergence).bind(field, z, context)(T, z)
    torch.testing.assert_close(v, field(T, z, context))
    (gradient,) = torch.autograd.grad(div.sum(), context)
    assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_divergence_of_a_field_without_parameters_or_dependence(mode: str) -> None:
    class Constant(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return torch.ones_like(z)

    z = torch.randn(4, 3).double()
    v, div = Exact(mode).bind(Constant(), z, None)(T, z)  # type: ignore[arg-type]
    assert torch.equal(v, torch.ones_like(z))
    assert torch.equal(div, torch.zeros(4).double())


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_no_graph_is_left_where_none_is_wanted(mode: str) -> None:
    z = torch.randn(4, 2).double()
    with torch.no_grad():
        v, div = Exact(mode).bind(Wave(), z, None)(T, z)  # type: ignore[arg-type]
    assert not v.requires_grad
    assert not div.requires_grad


@pytest.mark.parametrize("divergence", [Exact(), Exact("reverse"), Hutchinson(), Hutchinson(5)], ids=str)
def test_one_call_of_the_field_an_evaluation(divergence: Exact | Hutchinson) -> None:
    calls, z = Calls(Wave()), torch.randn(4, 2).double()
    bound = divergence.bind(calls, z, None)
    assert calls.count == 0
    bound(T, z)
    bound(T, z)
    assert calls.count == 2


# --- Hutchinson --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize(
    "field",
    [MLP(4, (6,)), MLP(4, (6, 5), time="concatsquash"), MLP(4, (4, 4, 4)), Wave(4)],
    ids=[
        "one hidden layer",
        "two, gated",
        "three",
        "user's",
    ],
)
def test_hutchinson_is_the_quadratic_form_of_its_probes(field: nn.Module, probes: int, noise: str) -> None:
    field, z = field.double(), torch.randn(5, 4).double().requires_grad_()
    hutchinson = Hutchinson(probes, noise)  # type: ignore[arg-type]
    torch.manual_seed(2)
    v, div = hutchinson.bind(field, z, None)(T, z)
    users = Wave(4)
    torch.manual_seed(2)
    eps = hutchinson.bind(users, z, None).probes  # type: ignore[attr-defined]
    jacobians = jacobian(field, z)
    assert eps.shape == (probes, 5, 4)
    want = torch.einsum("kbi,bij,kbj->kb", eps, jacobians, eps).mean(0)
    torch.testing.assert_close(v, field(T, z))
    torch.testing.assert_close(div, want, atol=1e-12, rtol=1e-10)
    leaves = [z, *field.parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    for one, two in zip(
        torch.autograd.grad(div.square().sum(), leaves, **options),
        torch.autograd.grad(want.square().sum(), leaves, **options),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-9)


def moments(noise: str, s: Tensor) -> tuple[float, float]:
    """Variance and fourth central moment of e^T S e for a symmetric S."""
    if noise == "gaussian":  # cumulants 2 tr S^2 and 48 tr S^4
        variance = 2 * float(torch.trace(s @ s))
        return variance, 48 * float(torch.trace(s @ s @ s @ s)) + 3 * variance**2
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(s))), dtype=torch.float64)
    values = torch.einsum("ki,ij,kj->k", signs, s, signs)
    centered = values - values.mean()
    return float(centered.pow(2).mean()), float(centered.pow(4).mean())


class Matrix(nn.Module):
    """v = A z with A given."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.a.t()


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_mean_and_variance_of_hutchinson(noise: str, probes: int) -> None:
    """Unbiased, with the variance that the docstring states: 2 |S|^2, less the diagonal for signs, over m."""
    a = torch.randn(4, 4).double()
    s = (a + a.t()) / 2
    n = 40_000
    z = torch.zeros(n, 4).double()
    with torch.no_grad():
        _, div = Hutchinson(probes, noise).bind(Matrix(a), z, None)(T, z)  # type: ignore[arg-type]
    variance, fourth = moments(noise, s)
    stated = 2 * float(s.square().sum())
    if noise == "rademacher":
        stated -= 2 * float(torch.diagonal(s).square().sum())
    assert variance == pytest.approx(stated)
    variance_m = variance / probes
    fourth_m = (fourth + 3 * (probes - 1) * variance**2) / probes**3
    assert abs(float(div.mean()) - float(torch.trace(a))) <= BOUND * math.sqrt(variance_m / n)
    deviation = math.sqrt((fourth_m - variance_m**2) / n)
    assert abs(float(div.var()) - variance_m) <= BOUND * deviation


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_hutchinson_is_unbiased_on_a_perceptron(noise: str) -> None:
    field, n = MLP(3, (8, 8)).double(), 20_000
    z = torch.randn(1, 3).double()
    with torch.no_grad():
        _, exact = Exact().bind(field, z, None)(T, z)
        rows = z.expand(n, 3)
        _, div = Hutchinson(noise=noise).bind(field, rows, None)(T, rows)  # type: ignore[arg-type]
    assert abs(float(div.mean() - exact)) <= BOUND * float(div.std()) / math.sqrt(n)


@pytest.mark.parametrize("probes", [1, 3])
def test_signs_are_exact_on_diagonal_jacobians(probes: int) -> None:
    field, z = Sine(), torch.randn(6, 3).double()
    _, exact = Exact().bind(field, z, None)(T, z)
    _, div = Hutchinson(probes, "rademacher").bind(field, z, None)(T, z)
    torch.testing.assert_close(div, exact, atol=1e-14, rtol=1e-13)


def test_probes_have_the_stated_laws() -> None:
    z = torch.zeros(5000, 2).double()
    signs = Hutchinson(2, "rademacher").bind(Linear(), z, None).probes  # type: ignore[attr-defined]
    normal = Hutchinson(2).bind(Linear(), z, None).probes  # type: ignore[attr-defined]
    assert signs.abs().eq(1).all()
    for eps, fourth in ((signs, 1.0), (normal, 3.0)):
        n = eps.numel()
        assert abs(float(eps.mean())) <= BOUND / math.sqrt(n)
        assert abs(float(eps.square().mean()) - 1) <= BOUND * math.sqrt((fourth - 1) / n) + 1e-15


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("field", [MLP(5, (6, 6)), Wave(5)], ids=["perceptron", "user's"])
def test_probes_are_fixed_for_a_solve_and_drawn_anew_for_the_next(field: nn.Module, noise: str) -> None:
    field, z = field.double(), torch.randn(8, 5).double()
    hutchinson = Hutchinson(noise=noise)  # type: ignore[arg-type]
    one, two = (hutchinson.bind(field, z, None) for _ in range(2))
    first, other = one(T, z)[1], two(T, z)[1]
    one(T / 2, z + 1)
    assert torch.equal(first, one(T, z)[1])
    assert not torch.equal(first, other)


def test_the_seed_fixes_the_probes() -> None:
    field, z = MLP(5, (6, 6)), torch.randn(8, 5)
    found = []
    for _ in range(2):
        torch.manual_seed(11)
        found.append(Hutchinson().bind(field, z, None)(torch.tensor(0.5), z)[1])
    assert torch.equal(*found)


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "divergence"),
    [
        ("exact", Exact()),
        ("exact-forward", Exact("forward")),
        ("exact-reverse", Exact("reverse")),
        ("hutchinson", Hutchinson()),
        ("hutchinson-gaussian", Hutchinson()),
        ("hutchinson-rademacher", Hutchinson(1, "rademacher")),
        ("hutchinson-8", Hutchinson(8)),
        ("Hutchinson-Rademacher-8", Hutchinson(8, "rademacher")),
    ],
)
def test_names_of_divergences(spec: str, divergence: Exact | Hutchinson) -> None:
    assert parse_divergence(spec) == divergence
    assert parse_divergence(str(divergence)) == divergence
    assert parse_divergence(divergence) is divergence


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "approximate",
        "exact-forward-reverse",
        "hutchinson-uniform",
        "hutchinson-0",
        "hutchinson--",
        "hutchinson-4-5",
        "hutchinson-gaussian-rademacher",
        "hutchinson-gaussian-4-4",
    ],
)
def test_unknown_divergences_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"unknown divergence|unknown noise|probes >= 1"):
        parse_divergence(spec)


def test_impossible_divergences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown mode 'backward': choose .*forward or reverse"):
        Exact("backward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="probes >= 1, got 0"):
        Hutchinson(0)
    with pytest.raises(ValueError, match="unknown noise 'uniform'"):
        Hutchinson(noise="uniform")  # type: ignore[arg-type]
