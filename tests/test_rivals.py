"""Truths about the rivals of TPR: integrals along trajectories, random end times, decay, the solver's own estimates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    AffineInTime,
    Calls,
    Diagonal,
    GaussianToGaussian,
    Linear,
    Problem,
    Rotation,
    Sine,
    TimeScaled,
    Wave,
    as_flow,
    flat_gradient,
    parameter,
    small_flow,
    z_score_bound,
)
from torch import Tensor, nn

from pycnf import CNF, Regularizer, Solution, Solver, SolveStats, SolveWarning, objective
from pycnf.objective import Objective
from pycnf.regularizers import (
    TPR,
    Decay,
    Derivative,
    Jacobian,
    Kinetic,
    LocalError,
    Steer,
    Stiffness,
    describe_regularizers,
    parse_regularizers,
)
from pycnf.regularizers.integrals import path_derivative
from pycnf.regularizers.times import LAWS, draw_times, quadrature_weights
from pycnf.solve import METHODS
from pycnf.stepper import Attempt

TIGHT = Solver(method="dopri8", rtol=1e-11, atol=1e-11, samples="exact")
EVERY = [
    "tpr",
    "tpr:degree=5,times=6,unit=tolerance,channels=both",
    "kinetic",
    "jacobian:probes=2",
    "jacobian:exact=true",
    "derivative:order=3",
    "decay",
    "error",
    "error:power=0.5",
    "error:power=1,unit=state",
    "stiffness",
]


class Constant(Problem):
    """v = c: straight lines at constant speed."""

    features = 3

    def __init__(self) -> None:
        super().__init__()
        self.c = parameter([1.0, -2.0, 0.5])

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.c.expand_as(z)

    def state(self, t: float, z0: Tensor) -> Tensor:
        return z0 + self.c * t

    def logp(self, t: float, z0: Tensor) -> Tensor:
        return torch.zeros_like(z0[:, 0])


def penalty(problem: Problem, regularizer: Regularizer, solver: Solver = TIGHT, **settings: Any) -> Tensor:
    """Penalty of a regularizer on the flow of a problem from its own starting points."""
    found = objective(as_flow(problem, solver, **settings), problem.start(), regularizers=regularizer).penalties
    return found[regularizer.name]


def sampled(problem: Problem, regularizer: Regularizer, T: float = 1.0) -> Solution:
    """The exact solution of a problem at the times that a regularizer names."""
    inner = regularizer.sample_times()
    assert inner is not None
    ts = torch.cat([torch.zeros(1).double(), inner * T, torch.full((1,), T).double()])
    z = torch.stack([problem.state(float(t), problem.start()) for t in ts])
    return Solution(ts, z, None, SolveStats(), field=problem)


# --- integrals along trajectories: values --------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_kinetic_energy_of_a_straight_line(law: str) -> None:
    """The integrand is |c|^2 at all times: every rule is exact."""
    got = penalty(Constant(), Kinetic(law=law), T=0.7)  # type: ignore[arg-type]
    torch.testing.assert_close(got, 0.7 * Constant().c.detach().square().sum(), rtol=1e-12, atol=0)


def test_kinetic_energy_in_closed_form() -> None:
    rotation, diagonal = Rotation(), Diagonal()
    z0, omega = rotation.start(), rotation.omega.item()
    want = omega**2 * z0.square().sum(1).mean()
    torch.testing.assert_close(penalty(rotation, Kinetic()), want, rtol=1e-9, atol=0)
    z0, a = diagonal.start(), diagonal.a.detach()
    want = (z0.square() * a / 2 * (torch.exp(2 * a) - 1)).sum(1).mean()
    torch.testing.assert_close(penalty(diagonal, Kinetic(times=10)), want, rtol=1e-9, atol=0)


def test_jacobian_norm_in_closed_form() -> None:
    exact = Jacobian(exact=True)
    torch.testing.assert_close(penalty(Linear(), exact), Linear().a.detach().square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(penalty(Rotation(), exact, T=0.5), torch.tensor(4.0).double(), rtol=1e-12, atol=0)
    scaled = TimeScaled()
    a, b = scaled.a.item(), scaled.b.item()
    want = 2 * (a**2 + a * b + b**2 / 3)  # 2 int (a + b t)^2 over [0, 1]
    assert float(penalty(scaled, exact)) == pytest.approx(want, rel=1e-12)
    assert float(penalty(Constant(), exact)) == 0.0


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("probes", [1, 3])
def test_probes_are_drawn_once_per_solve(probes: int, noise: str) -> None:
    """With a constant Jacobian the integrand is constant, if the probes are: ||e^T A||^2 with the first draw."""
    problem = Linear()
    z0 = problem.start()
    torch.manual_seed(5)
    got = Jacobian(probes=probes, noise=noise).penalty(sampled(problem, Kinetic()))  # type: ignore[arg-type]
    torch.manual_seed(5)
    if noise == "gaussian":
        eps = torch.randn(probes, *z0.shape, dtype=torch.float64)
    else:
        eps = torch.randint(0, 2, (probes, *z0.shape)).double() * 2 - 1
    want = (eps @ problem.a.detach()).square().sum(-1).mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_probes_estimate_the_norm_without_bias(noise: str) -> None:
    """Mean of 500 estimates, each over 8 samples (false-alarm rate 1e-6)."""
    problem = Linear()
    term, held = Jacobian(noise=noise), sampled(Linear(), Kinetic(times=1))  # type: ignore[arg-type]
    values = torch.stack([replace(term, times=1).penalty(held) for _ in range(500)]).detach()
    want = float(problem.a.detach().square().sum())
    assert abs(float(values.mean()) - want) <= z_score_bound(1e-6) * float(values.std()) / math.sqrt(len(values))
    spread = replace(term, times=1, probes=25)
    assert torch.stack([spread.penalty(held) for _ in range(50)]).std() < 0.5 * values.std()


def test_signs_are_exact_on_diagonal_jacobians() -> None:
    got, want = (
        penalty(Sine(), Jacobian(noise="rademacher", law="chebyshev")),
        penalty(Sine(), Jacobian(exact=True, law="chebyshev")),
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def by_reverse_mode(field: Callable[[Tensor, Tensor], Tensor], t: Tensor, z: Tensor, order: int) -> Tensor:
    """Total derivative of a trajectory by torch's double-backward Jacobian-vector products."""
    if order == 1:
        return field(t, z)

    def below(t: Tensor, z: Tensor) -> Tensor:
        return by_reverse_mode(field, t, z, order - 1)

    direction = (torch.ones_like(t), field(t, z))
    return torch.autograd.functional.jvp(below, (t, z), direction, create_graph=True)[1]


ORDERS = [1, 2, 3, 4, 5]


@pytest.mark.parametrize("order", ORDERS)
def test_path_derivatives_in_closed_form(order: int) -> None:
    t = torch.tensor(0.3, dtype=torch.float64)
    linear, z = Linear(), Linear().start()
    want = z @ torch.linalg.matrix_power(linear.a.detach().t(), order)
    torch.testing.assert_close(path_derivative(linear, t, z, order), want, rtol=1e-11, atol=1e-12)

    affine, z = AffineInTime(), AffineInTime().start()
    want = z @ affine.a.t() + affine.b + affine.c * t
    for k in range(2, order + 1):
        want = want @ affine.a.t() + (affine.c if k == 2 else 0)
    torch.testing.assert_close(path_derivative(affine, t, z, order), want, rtol=1e-11, atol=1e-12)

    scaled, z = TimeScaled(), TimeScaled().start()
    p, b = scaled.a + scaled.b * t, scaled.b  # z = exp(a t + b t^2 / 2) z0
    factor = [p, p**2 + b, p**3 + 3 * b * p, p**4 + 6 * b * p**2 + 3 * b**2, p**5 + 10 * b * p**3 + 15 * b**2 * p]
    torch.testing.assert_close(path_derivative(scaled, t, z, order), factor[order - 1] * z, rtol=1e-11, atol=1e-12)

    sine = Sine()
    clock = t.clone().requires_grad_()
    rows = []
    for z0 in sine.start().flatten():  # derivatives of the closed-form solution with respect to its time
        value = 2 * torch.atan(torch.tan(z0 / 2) * torch.exp(sine.a.detach() * clock))
        for _ in range(order):
            (value,) = torch.autograd.grad(value, clock, create_graph=True)
        rows.append(value.detach())
    got = path_derivative(sine, t, sine.state(0.3, sine.start()), order)
    torch.testing.assert_close(got.flatten(), torch.stack(rows), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["concat", "concatsquash", "none", "conditional"])
def test_path_derivatives_of_networks(name: str, order: int) -> None:
    """Nested forward mode against nested double-backward, on the bound fields that regularizers are given."""
    settings: dict[str, Any] = {"context": 2} if name == "conditional" else {"time": name}
    flow = small_flow(tol=1e-4, method="dopri5", **settings)
    x, context = torch.randn(6, 2).double(), torch.randn(6, 2).double() if flow.context else None
    field = flow.solve(x, context).blocks[0].field
    assert field is not None
    t = torch.tensor(0.4).double()
    want = by_reverse_mode(field, t, x, order)
    torch.testing.assert_close(path_derivative(field, t, x, order), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_straight_lines_have_no_higher_derivatives(order: int) -> None:
    for problem in (Constant(), GaussianToGaussian()):
        assert float(penalty(problem, Derivative(order=order))) < 1e-18


@pytest.mark.parametrize("order", ORDERS)
def test_derivative_penalty_in_closed_form(order: int) -> None:
    rotation = Rotation()
    want = rotation.omega.item() ** (2 * order) * rotation.start().square().sum(1).mean() * 0.6
    torch.testing.assert_close(penalty(rotation, Derivative(order=order), T=0.6), want, rtol=1e-8, atol=0)


class Powers(Problem):
    """v = d (t, t^2): trajectories are cubics in time."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.stack([t, t**2]).expand_as(z)

    def state(self, t: float, z0: Tensor) -> Tensor:
        return z0 + torch.tensor([t**2 / 2, t**3 / 3]).double()

    def logp(self, t: float, z0: Tensor) -> Tensor:
        return torch.zeros_like(z0[:, 0])


def test_derivatives_of_polynomial_trajectories() -> None:
    values = [float(Derivative(order=k).penalty(sampled(Powers(), Derivative()))) for k in ORDERS]
    assert values == pytest.approx([1 / 3 + 1 / 5, 1 + 4 / 3, 4, 0, 0], abs=1e-12)


def test_first_derivative_is_the_kinetic_energy() -> None:
    got, want = penalty(Sine(), Derivative(order=1, times=3)), penalty(Sine(), Kinetic(times=3))
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


# --- integrals along trajectories: quadrature ----------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
def test_quadrature_rules_are_exact_on_polynomials(n: int) -> None:
    for law, exact in (("gauss", 2 * n - 1), ("chebyshev", n - 1)):
        u, w = draw_times(law, n), quadrature_weights(law, n)
        assert float(w.min()) > 0
        for degree in range(exact + 1):
            assert float((w * u**degree).sum()) == pytest.approx(1 / (degree + 1), rel=1e-13)
    for law in ("uniform", "stratified"):
        assert torch.equal(quadrature_weights(law, n), torch.full((n,), 1 / n, dtype=torch.float64))


def test_random_times_are_unbiased_and_strata_beat_them() -> None:
    """Kinetic energy of an exponential path: mean within 4.9 standard errors, and the order of the variances."""
    problem = Diagonal()
    a = problem.a.detach()
    want = float((problem.start().square() * a / 2 * (torch.exp(2 * a) - 1)).sum(1).mean())
    found = {}
    for law in LAWS:
        term = Kinetic(times=4, law=law)  # type: ignore[arg-type]
        found[law] = torch.stack([term.penalty(sampled(problem, term)) for _ in range(300)]).detach()
    for law in ("uniform", "stratified"):
        bound = z_score_bound(1e-6) * float(found[law].std()) / math.sqrt(300)
        assert abs(float(found[law].mean()) - want) <= bound
    assert float(found["stratified"].var()) < 0.2 * float(found["uniform"].var())
    for law in ("gauss", "chebyshev"):
        assert torch.equal(found[law], found[law][:1].expand(300)), "fixed nodes have no variance"
    assert abs(float(found["gauss"][0]) - want) < 1e-3 * float(found["stratified"].std())


@pytest.mark.parametrize("term", [Kinetic(), Jacobian(exact=True), Derivative()], ids=str)
def test_quadrature_against_a_fine_integral_on_a_trained_field(term: Kinetic | Jacobian | Derivative) -> None:
    flow = small_flow(tol=1e-9, hidden=(12, 12))
    x = torch.randn(32, 2).double() * torch.tensor([1.5, 0.5]).double() + 1
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2)
    flow.solver = Solver(rtol=1e-3, atol=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        objective(flow, x).loss.backward()
        optimizer.step()
    flow.solver = TIGHT
    with torch.no_grad():
        fine = float(objective(flow, x, regularizers=replace(term, times=25)).penalties[term.name])
        errors = {}
        for n in (2, 4, 8):
            flow.solver = Solver(rtol=1e-6, atol=1e-6)
            found = objective(flow, x, regularizers=replace(term, times=n)).penalties
            errors[n] = abs(float(found[term.name]) / fine - 1)
        flow.solver = TIGHT
        dense = flow.solve(x, times=torch.linspace(0, 1, 202)[1:-1].double()).blocks[0]
        integrand = term.integrand(dense.field, x)  # type: ignore[arg-type]
        values = torch.stack([integrand(t, z).mean() for t, z in zip(dense.ts, dense.z, strict=True)])
    assert float(torch.trapezoid(values, dense.ts)) == pytest.approx(fine, rel=1e-4), "the reference by another rule"
    assert errors[4] < 5e-3
    assert errors[8] < 1e-4
    assert errors[2] > errors[8]


# --- what the integrals cost, and what they leave alone ------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("spec", [*EVERY, "kinetic:times=7", "derivative:order=1", "derivative:times=2,order=5"])
def test_evaluations_are_counted_and_the_solve_is_left_alone(spec: str, blocks: int) -> None:
    (term,) = parse_regularizers(spec)
    calls = [Calls(Wave(width=9)) for _ in range(blocks)]
    flow = CNF(2, field=calls, blocks=blocks, solver=Solver(rtol=1e-5, atol=1e-5))
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(6)
    x = torch.randn(16, 2).double()
    plain = objective(flow, x)
    for field in calls:
        field.count = 0
    got = objective(flow, x, regularizers=term)
    stats = got.solution.stats
    assert stats == plain.solution.stats
    assert stats.rejected > 0
    assert torch.equal(got.nll, plain.nll)
    assert sum(field.count for field in calls) == stats.nfe + blocks * term.evaluations
    got.loss.backward()
    assert sum(field.count for field in calls) == stats.nfe + blocks * term.evaluations
    assert stats.nfe_backward == 0


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    flow, x = small_flow(tol=1e-5, method="dopri5"), torch.randn(8, 2).double()
    terms = parse_regularizers("+".join(EVERY))
    torch.manual_seed(0)
    want = objective(flow, x, regularizers=terms)
    torch.manual_seed(0)
    with torch.no_grad():
        got = objective(flow, x, regularizers=terms)
    assert not got.loss.requires_grad
    torch.testing.assert_close(got.loss, want.loss.detach(), rtol=1e-12, atol=0)


def test_stopped_solves_have_no_integral() -> None:
    flow = small_flow(tol=1e-9, solver=Solver(rtol=1e-9, atol=1e-9, max_nfe=20, on_budget="stop"))
    with pytest.warns(SolveWarning):
        got = objective(flow, torch.randn(4, 2).double(), regularizers=[Kinetic(), Jacobian(), Derivative()])
    assert got.solution.stats.stopped
    assert all(float(value) == 0 for value in got.penalties.values())


@pytest.mark.parametrize("term", [Kinetic(), Jacobian(), Derivative(), Decay()], ids=str)
def test_solutions_without_a_field_are_refused(term: Regularizer) -> None:
    held = replace(sampled(Rotation(), Kinetic()), field=None)
    with pytest.raises(ValueError, match="evaluates the field: expected a solution of a flow"):
        term.penalty(held)


class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Opaque(nn.Module):
    """A field without forward-mode formula."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Wave()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return OneWay.apply(self.inner(t, z))


def test_fields_without_forward_mode_are_refused() -> None:
    flow, x = CNF(2, field=Opaque()), torch.randn(4, 2).double()
    assert objective(flow, x, regularizers=[Kinetic(), Jacobian()]).loss.isfinite()
    with pytest.raises(RuntimeError, match="cannot be differentiated in forward mode, which path derivatives need"):
        objective(flow, x, regularizers=Derivative())


# --- gradients ---------------------------------------------------------------------------------


def compare_with_differences(flow: CNF, x: Tensor, context: Tensor, spec: str, *, h: float, bound: float) -> None:
    """Compare the gradient along a random direction of parameters, data and context with a central difference."""
    (term,) = parse_regularizers(spec)
    term = replace(term, weight=1.0)
    leaves = [x, context, *flow.parameters()]

    def solve() -> Objective:
        torch.manual_seed(3)  # the same probes
        return objective(flow, x, context, term)

    got = solve()
    gradient = flat_gradient(got.loss - got.nll, leaves)
    direction = torch.randn_like(gradient)
    direction /= direction.norm()
    pieces = direction.split([leaf.numel() for leaf in leaves])
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for leaf, piece in zip(leaves, pieces, strict=True):
                leaf += sign * h * piece.view_as(leaf)
            values.append(float(solve().penalties[term.name]))
    slope = float(gradient @ direction)
    assert abs(slope) > 1e-3 * float(gradient.norm()) > 0
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=bound)


def waves(kind: str, solver: Solver, T: float = 1.2) -> tuple[CNF, Tensor, Tensor]:
    """A conditional flow of two blocks, with data and context that want gradients."""
    settings: dict[str, Any] = {"context": 2, "solver": solver, "T": T, "blocks": 2}
    flow = CNF(2, (6, 5), **settings).double() if kind == "perceptron" else CNF(2, field=lambda: Wave(2, 2), **settings)
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(2)
    x, context = (torch.randn(5, 2).double().requires_grad_() for _ in range(2))
    return flow, x, context


@pytest.mark.parametrize("field", ["perceptron", "user's"])
@pytest.mark.parametrize("spec", [s.replace("tpr", "tpr:law=gauss").replace("gauss:", "gauss,") for s in EVERY])
def test_gradients_agree_with_finite_differences(spec: str, field: str) -> None:
    """The steps are frozen, and so is the tolerance, through which no gradient passes: atol alone."""
    frozen = Solver(first_step=0.3, min_step=0.3, max_step=0.3, rtol=1e-14, atol=1e-5)
    flow, x, context = waves(field, frozen)
    compare_with_differences(flow, x, context, spec, h=1e-4, bound=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient": "adjoint", "samples": "exact"},
        {"engine": "torchdiffeq", "samples": "exact"},
        {"method": "rk4", "n_steps": 6, "rtol": 1e-5, "atol": 1e-5},
        {"method": "bosh3", "first_step": 0.1, "min_step": 0.1, "max_step": 0.1},
    ],
    ids=["adjoint", "torchdiffeq", "rk4", "bosh3"],
)
@pytest.mark.parametrize("spec", ["kinetic", "jacobian", "derivative", "decay"])
def test_integrals_work_with_every_solver(spec: str, settings: dict[str, Any]) -> None:
    solver = Solver(**{"method": "dopri8", "rtol": 1e-11, "atol": 1e-11, **settings})
    flow, x, context = waves("perceptron", solver)
    compare_with_differences(flow, x, context, spec, h=1e-4, bound=1e-5)


def test_sums_of_regularizers() -> None:
    flow, x = small_flow(blocks=2, tol=1e-5, method="dopri5"), torch.randn(8, 2).double()
    terms = parse_regularizers("kinetic:weight=0.3+jacobian:exact=true+derivative+decay+error+stiffness+tpr:law=gauss")
    got = objective(flow, x, regularizers=terms)
    assert list(got.penalties) == [term.name for term in terms]
    total = got.nll
    for term in terms:
        alone = objective(flow, x, regularizers=term)
        torch.testing.assert_close(got.penalties[term.name], alone.penalties[term.name], rtol=1e-12, atol=0)
        total = total + term.weight * alone.penalties[term.name]
    torch.testing.assert_close(got.loss, total, rtol=1e-12, atol=0)


# --- random end times --------------------------------------------------------------------------


def test_end_times_are_uniform() -> None:
    """Range, mean and variance of 2,000 draws (false-alarm rate 1e-6 each)."""
    draws = torch.tensor([Steer(weight=0.4).end_time() for _ in range(2000)]).double()
    assert float(draws.min()) > 0.6
    assert float(draws.max()) < 1.4
    bound = z_score_bound(1e-6)
    assert abs(float(draws.mean()) - 1) <= bound * 0.4 / math.sqrt(3 * 2000)
    assert abs(float(draws.var()) / (0.16 / 3) - 1) <= bound * math.sqrt(0.8 / 2000)


def test_solves_end_at_random_times_in_training_only() -> None:
    flow, x = small_flow(blocks=3, tol=1e-6, T=2.0), torch.randn(8, 2).double()
    torch.manual_seed(1)
    got = objective(flow, x, regularizers=[TPR(law="gauss", times=3), Steer(weight=0.5), Kinetic()])
    torch.manual_seed(1)
    ends = [2.0 * Steer(weight=0.5).end_time() for _ in range(3)]  # type: ignore[operator]
    assert [float(block.ts[-1]) for block in got.solution.blocks] == ends
    assert len(set(ends)) == 3
    assert float(got.penalties["steer"]) == 0.0
    for block, end in zip(got.solution.blocks, ends, strict=True):
        fractions = torch.cat([TPR(law="gauss", times=3).sample_times(), Kinetic().sample_times()]).unique()
        torch.testing.assert_close(block.ts[1:-1] / end, fractions)
    z = x
    for block, field, end in zip(got.solution.blocks, flow.fields, ends, strict=True):
        alone = CNF(2, field=field, T=end, solver=flow.solver).solve(z)
        torch.testing.assert_close(block.z[-1], alone.z, rtol=1e-12, atol=1e-12)
        z = alone.z
    assert float(flow.eval().solve(x).blocks[0].ts[-1]) == 2.0


def test_width_of_end_times() -> None:
    assert Steer(weight=0.0).end_time() is None
    assert Steer(weight=0.5).end_time(0.0) is None
    assert all(0.95 < Steer(weight=0.5).end_time(0.1) < 1.05 for _ in range(50))  # type: ignore[operator]
    with pytest.raises(ValueError, match="only one regularizer can choose the end time"):
        objective(small_flow(), torch.randn(4, 2).double(), regularizers=[Steer(), Steer()])


# --- decay -------------------------------------------------------------------------------------


def test_decay_is_half_the_squared_norm() -> None:
    flow, x = small_flow(blocks=2, tol=1e-4), torch.randn(4, 2).double()
    got = objective(flow, x, regularizers=Decay(weight=2.0))
    want = sum(p.square().sum() for p in flow.parameters()) / 2
    torch.testing.assert_close(got.penalties["decay"], want.detach())
    leaves = list(flow.parameters())
    torch.testing.assert_close(
        flat_gradient(got.loss - got.nll, leaves), 2 * torch.cat([p.detach().flatten() for p in leaves])
    )


@pytest.mark.parametrize(("optimizer", "same"), [("Adam", True), ("Adamax", True), ("AdamW", False)])
def test_decay_is_the_weight_decay_of_adam(optimizer: str, same: bool) -> None:
    found = []
    for in_loss in (True, False):
        torch.manual_seed(0)
        flow, x = small_flow(tol=1e-5), torch.randn(16, 2).double()
        settings = {"lr": 1e-2, "weight_decay": 0.0 if in_loss else 0.1}
        step = getattr(torch.optim, optimizer)(flow.parameters(), **settings)
        for _ in range(5):
            step.zero_grad()
            objective(flow, x, regularizers=[Decay(weight=0.1)] if in_loss else []).loss.backward()
            step.step()
        found.append(torch.cat([p.detach().flatten() for p in flow.parameters()]))
    assert torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-9) == same


# --- the solver's own estimates ----------------------------------------------------------------


def attempts(flow: CNF, x: Tensor) -> list[list[Attempt]]:
    """Accepted steps that an observer sees, block by block."""
    seen: list[list[Attempt]] = [[] for _ in range(flow.blocks)]
    with torch.no_grad():
        flow.solve(x, observer=lambda block, attempt: seen[block].append(attempt))
    return [[attempt for attempt in block if attempt.accepted] for block in seen]


def rough_flow(**settings: Any) -> tuple[CNF, Tensor]:
    """A flow that takes several steps and rejects some."""
    flow = small_flow(hidden=(9, 8), **{"tol": 1e-5, "method": "dopri5", **settings})
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(3)
    return flow, torch.randn(12, 2).double()


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.kind == "adaptive"])
@pytest.mark.parametrize("channels", ["z", "logp", "both"])
@pytest.mark.parametrize("power", [0.2, 1.0, 2.0])
def test_error_equals_what_an_observer_sees(power: float, channels: str, method: str) -> None:
    flow, x = rough_flow(blocks=2, method=method, tol=1e-4)
    want = 0.0
    for block in attempts(flow, x):
        for attempt in block:
            e = np.asarray(attempt.error)
            square = (channels != "logp") * (e[:, :2] ** 2).mean() + (channels != "z") * (e[:, 2] ** 2).mean()
            want += square ** (power / 2)
    got = objective(flow, x, regularizers=LocalError(power=power, channels=channels))  # type: ignore[arg-type]
    assert float(got.penalties["error"]) == pytest.approx(want, rel=1e-9)


def test_error_in_units_of_the_state() -> None:
    flow, x = rough_flow()
    want = 0.0
    for attempt in attempts(flow, x)[0]:
        scale = flow.solver.atol + flow.solver.rtol * torch.maximum(attempt.y0.abs(), attempt.y1.abs())
        e = attempt.error * scale
        want += abs(attempt.h) * float((e[:, :2].square().mean() + e[:, 2].square().mean()).sqrt())
    got = objective(flow, x, regularizers=LocalError(power=1.0, unit="state"))
    assert float(got.penalties["error"]) == pytest.approx(want, rel=1e-9)


# Dormand and Prince's pair, with Shampine's weights of fourth order
NODES = [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
STAGES = [
    [],
    [1 / 5],
    [3 / 40, 9 / 40],
    [44 / 45, -56 / 15, 32 / 9],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
]
FIFTH = [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0]
FOURTH = [1951 / 21600, 0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60]


def dormand_prince(flow: CNF, x: Tensor, h: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One step on (z, log p), written out: start, stages and slopes."""
    y = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    stages, slopes = [], []
    for c, row in zip(NODES, STAGES, strict=True):
        stage = y + h * sum((a * k for a, k in zip(row, slopes, strict=True)), torch.zeros_like(y))
        t, z = torch.tensor(c * h, dtype=torch.float64), stage[:, :2].detach().requires_grad_()
        v = flow.fields[0](t, z)
        div = torch.stack([torch.autograd.grad(v[:, i].sum(), z, retain_graph=True)[0][:, i] for i in range(2)]).sum(0)
        stages.append(stage)
        slopes.append(torch.cat([v.detach(), -div.unsqueeze(1)], dim=1))
    return y, stages, slopes


def test_one_step_by_hand() -> None:
    h, rtol, atol = 0.4, 1e-3, 1e-4
    flow, x = rough_flow(T=h, solver=Solver(rtol=rtol, atol=atol, first_step=h, min_step=h, max_step=h))
    y0, stages, slopes = dormand_prince(flow, x, h)
    y1 = y0 + h * sum((b * k for b, k in zip(FIFTH, slopes, strict=True)), torch.zeros_like(y0))
    error = h * sum((a - b) * k for a, b, k in zip(FIFTH, FOURTH, slopes, strict=True))
    scale = atol + rtol * torch.maximum(y0.abs(), y1.abs())
    square = (error / scale).square()
    rho = (square[:, :2].mean() + square[:, 2].mean()).sqrt()
    stiffness = (slopes[-1] - slopes[-2]).norm() / (stages[-1] - stages[-2]).norm()
    terms = [LocalError(power=1.0), LocalError(power=1.0, unit="state", channels="z"), Stiffness()]
    got = objective(flow, x, regularizers=terms)
    assert got.solution.stats.accepted == 1
    values = list(got.penalties.values())
    torch.testing.assert_close(values[0], rho, rtol=1e-9, atol=0)
    torch.testing.assert_close(values[1], h * error[:, :2].square().mean().sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(values[2], stiffness, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("method", "order"), [("dopri5", 4), ("bosh3", 2), ("adaptive_heun", 1)])
def test_estimates_see_the_slopes_less_their_regression(method: str, order: int) -> None:
    """d annihilates polynomials of degree below the lower order at the nodes, so e = h d^T k = h d^T R k."""
    from pycnf.tableau import tableau

    tab = tableau(method)
    c, d = np.concatenate([[0.0], tab.c]), tab.rows[-1]
    basis, _ = np.linalg.qr(c[:, None] ** np.arange(order))
    np.testing.assert_allclose(d @ basis, 0, atol=1e-14)
    k = np.random.default_rng(0).normal(size=(len(c), 5))
    np.testing.assert_allclose(d @ (k - basis @ (basis.T @ k)), d @ k, atol=1e-14)
    assert abs(d @ c**order) > 1e-4, "the next degree is seen"


def test_straight_lines_have_no_error() -> None:
    solver = Solver(rtol=1e-6, atol=1e-6)
    assert float(penalty(Constant(), LocalError(), solver)) < 1e-20
    assert float(penalty(Constant(), LocalError(power=0.2), solver)) < 0.02, "rounding, 1e-11 of the tolerance"
    straight = as_flow(GaussianToGaussian(), replace(solver, first_step=0.25, min_step=0.25, max_step=0.25))
    terms = [LocalError(channels="z"), LocalError(channels="logp")]
    on_z, on_logp = objective(straight, GaussianToGaussian().start(), regularizers=terms).penalties.values()
    assert float(on_z) < 1e-18
    assert float(on_logp) > 1e-6, "the log-density of straight lines is no polynomial"


def test_error_estimates_the_number_of_steps() -> None:
    """With the power 1/p a step counts for what it could have been, so that smaller steps change nothing."""
    problem, tol = Rotation(), 1e-8
    counts = {}
    for n in (10, 20, 40):
        frozen = Solver(rtol=1e-14, atol=tol, first_step=1 / n, min_step=1 / n, max_step=1 / n)
        counts[n] = float(penalty(problem, LocalError(power=1 / 5, channels="z"), frozen))
    assert counts[20] == pytest.approx(counts[40], rel=0.02)
    assert counts[10] == pytest.approx(counts[20], rel=0.05)
    free = as_flow(problem, Solver(rtol=1e-14, atol=tol)).solve(problem.start()).stats
    assert free.accepted == pytest.approx(counts[40] / 0.9, rel=0.15), "0.9 is the safety factor of the step control"


def test_stiffness_of_linear_fields() -> None:
    """On v = A z both changes are linear in each other: ||A d|| / ||d||, at most the norm of A."""
    solver = Solver(rtol=1e-5, atol=1e-5)
    isotropic = Diagonal()
    with torch.no_grad():
        isotropic.a.fill_(-3.0)
    assert float(penalty(isotropic, Stiffness(), solver)) == pytest.approx(3.0, rel=1e-6)
    norm = float(torch.linalg.matrix_norm(Linear().a.detach(), 2))
    assert 0 < float(penalty(Linear(), Stiffness(), solver)) <= norm
    assert float(penalty(Constant(), Stiffness(), solver)) == 0.0


@pytest.mark.parametrize("spec", ["error", "stiffness"])
@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"gradient": "adjoint"}, "method 'dopri5', engine 'pycnf' and gradient 'adjoint'"),
        ({"engine": "torchdiffeq"}, "method 'dopri5', engine 'torchdiffeq'"),
        ({"method": "rk4", "n_steps": 4}, "method 'rk4'"),
    ],
    ids=["adjoint", "engine", "fixed"],
)
def test_solvers_that_hide_their_steps_are_refused(settings: dict[str, Any], got: str, spec: str) -> None:
    flow = small_flow(solver=Solver(**settings))
    with pytest.raises(ValueError, match=f"only an adaptive method.*regularizers of the solver's error.*{got}"):
        objective(flow, torch.randn(4, 2).double(), regularizers=parse_regularizers(spec))
    held = sampled(Rotation(), Kinetic())
    with pytest.raises(ValueError, match="reads the solver's accepted steps: train with an adaptive method"):
        parse_regularizers(spec)[0].penalty(held)


@pytest.mark.parametrize("method", ["bosh3", "fehlberg2", "adaptive_heun"])
def test_stiffness_needs_two_stages_at_the_end(method: str) -> None:
    flow = small_flow(method=method, tol=1e-3)
    with pytest.raises(ValueError, match="two stages at the end: take dopri5 or dopri8"):
        objective(flow, torch.randn(4, 2).double(), regularizers=Stiffness())


def test_error_of_the_log_density_needs_it() -> None:
    flow, x = small_flow(tol=1e-4, method="dopri5"), torch.randn(4, 2).double()
    block = flow.solve_blocks(x, None, [None], density=False, watched=True).blocks[0]
    assert LocalError(channels="z").penalty(block).item() > 0
    with pytest.raises(ValueError, match="channels='both' needs the log-density: solve with density=True"):
        LocalError().penalty(block)


# --- names and settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "terms",
    [
        [Kinetic(), Jacobian(), Derivative(), Steer(), Decay(), LocalError(), Stiffness()],
        [Kinetic(weight=0.02, times=8, law="stratified", start=10, ramp=500, stop=2000)],
        [Jacobian(weight=1e-3, probes=4, noise="rademacher"), Jacobian(exact=True, law="uniform")],
        [Derivative(order=5, times=3, target_nfe=32.5), Decay(weight=1e-20)],
        [Steer(weight=0.99, start=100), LocalError(power=1 / 5, unit="state", channels="z", target_nfe=20.0)],
        [TPR(degree=5, times=6, unit="tolerance", channels="both", power=1 / 6)],
    ],
    ids=describe_regularizers,
)
def test_written_regularizers_read_back(terms: list[Regularizer]) -> None:
    assert parse_regularizers(describe_regularizers(terms)) == terms


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kinetic:times=0", "expected times >= 1, got 0"),
        ("kinetic:law=simpson", "unknown law 'simpson': choose one of uniform, stratified, chebyshev, gauss"),
        ("kinetic:order=2", "unknown setting 'order=2' of kinetic: write key=value with a key of weight"),
        ("jacobian:probes=0", "expected probes >= 1, got 0"),
        ("jacobian:noise=pink", "unknown noise 'pink': choose one of gaussian, rademacher"),
        ("jacobian:exact=maybe", "cannot read 'maybe' for jacobian:exact"),
        ("derivative:order=0", "expected order >= 1, got 0"),
        ("derivative:order=two", "cannot read 'two' for derivative:order"),
        ("steer:weight=1", r"expected a half width in \[0, 1\), got weight=1.0"),
        ("steer:target_nfe=20", "cannot be steered: leave target_nfe out"),
        ("decay:weight=-1", "expected a finite weight >= 0, got -1"),
        ("error:power=0", "expected a finite power > 0, got 0"),
        ("error:power=nan", "expected a finite power > 0, got nan"),
        ("error:unit=bits", "unknown unit 'bits': choose one of state, tolerance"),
        ("error:channels=x", "unknown channels 'x': choose one of z, logp, both"),
        ("stiffness:weight=inf", "expected a finite weight >= 0, got inf"),
        ("energy", "choose none, default or one of decay, derivative, .*error, jacobian, kinetic, steer, stiff.*, tpr"),
    ],
)
def test_impossible_settings_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_regularizers(spec)
