"""Truths about flows: closed forms, inverses, log-determinants, masses, counters, distributions."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from problems import PROBLEMS, Calls, GaussianToGaussian, Linear, Rotation, Sine, Wave, as_flow, small_flow
from torch import Tensor, nn

from pycnf import CNF, TPR, Exact, FlowDistribution, Hutchinson, Solver, SolveWarning, objective
from pycnf.flow import standard_normal_log_prob
from pycnf.solve import METHODS
from pycnf.stepper import Attempt, Stepper

TIME = ["concat", "concatsquash", "none"]
ADAPTIVE = [name for name, method in METHODS.items() if method.kind == "adaptive"]
# Second-order methods spend about 1 / sqrt(tol) steps, so the tightest tolerance is left to the others.
TOLERANCES = [
    *((method, tol) for method in ADAPTIVE for tol in (1e-4, 1e-6)),
    *((method, 1e-8) for method in ADAPTIVE if METHODS[method].order > 2),
]


# --- closed forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("method", "tol"), TOLERANCES)
def test_error_is_at_most_ten_tolerances(method: str, tol: float, name: str) -> None:
    """States, log-determinant and log-density at T, in the units atol + rtol |value| of the step control."""
    problem = PROBLEMS[name]()
    flow = as_flow(problem, Solver(method=method, rtol=tol, atol=tol))
    x = problem.start()
    with torch.no_grad():
        solution = flow.solve(x)
        z, logp = problem.state(1.0, x), problem.logp(1.0, x)
    bound, bound_logp = 10 * tol * (1 + z.abs()), 10 * tol * (1 + logp.abs())
    assert ((solution.z - z).abs() <= bound).all()
    assert ((solution.logp - logp).abs() <= bound_logp).all()
    want = standard_normal_log_prob(z) - logp
    through_the_base = (z.abs() * bound).sum(-1)  # d log N(z) = -z dz
    assert ((solution.log_prob - want).abs() <= bound_logp + through_the_base).all()


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("reverse", [False, True])
def test_sampled_trajectories(name: str, reverse: bool) -> None:
    problem, tol = PROBLEMS[name](), 1e-9
    flow = as_flow(problem, Solver(method="dopri8", rtol=tol, atol=tol, samples="exact"))
    x = problem.start()
    with torch.no_grad():
        start = problem.state(1.0, x) if reverse else x
        solution = flow.solve(start, times=[0.2, 0.5, 0.9], reverse=reverse)
        (block,) = solution.blocks
        times = [0.0, 0.2, 0.5, 0.9, 1.0]
        assert block.ts.tolist() == (times[::-1] if reverse else times)
        z = torch.stack([problem.state(float(t), x) for t in block.ts])
        logp = torch.stack([problem.logp(float(t), x) for t in block.ts])
    assert block.z.shape == (5, *x.shape)
    assert block.logp is not None
    assert block.logp.shape == (5, len(x))
    torch.testing.assert_close(block.z, z, atol=10 * tol, rtol=0)
    torch.testing.assert_close(block.logp, logp - logp[0], atol=10 * tol, rtol=0)
    want = standard_normal_log_prob(problem.state(1.0, x)) - problem.logp(1.0, x)
    torch.testing.assert_close(solution.log_prob, want, atol=1e-7, rtol=0)
    assert solution.reverse == reverse


def test_density_of_a_gaussian() -> None:
    problem = GaussianToGaussian()
    flow = as_flow(problem, Solver(rtol=1e-9, atol=1e-9))
    x = 2 * torch.randn(50, 2).double()
    torch.testing.assert_close(flow().log_prob(x), problem.log_prob(x), atol=1e-7, rtol=0)


def test_samples_of_a_gaussian() -> None:
    """Means and variances within 4.9 standard errors (false-alarm rate 1e-6 each)."""
    problem, n = GaussianToGaussian(), 20_000
    x = as_flow(problem, Solver())().sample((n,))
    bound = 4.9 / math.sqrt(n)
    with torch.no_grad():
        assert float(((x.mean(0) - problem.m) / problem.s).abs().max()) <= bound
        assert float((x.var(0) / problem.s**2 - 1).abs().max()) <= bound * math.sqrt(2)


def test_rotation_keeps_the_density() -> None:
    flow, x = as_flow(Rotation(), Solver(rtol=1e-10, atol=1e-10)), torch.randn(20, 2).double()
    torch.testing.assert_close(flow().log_prob(x), standard_normal_log_prob(x), atol=1e-8, rtol=0)


@pytest.mark.parametrize("end", [0.25, 1.0, 2.0])
def test_end_time(end: float) -> None:
    problem = Linear()
    flow = as_flow(problem, Solver(rtol=1e-9, atol=1e-9), T=end)
    x = problem.start()
    solution = flow.solve(x, times=[0.1, 0.2])
    torch.testing.assert_close(solution.z, problem.state(end, x), atol=1e-7, rtol=0)
    torch.testing.assert_close(solution.logp, problem.logp(end, x), atol=1e-7, rtol=0)
    assert float(solution.blocks[0].ts[-1]) == end


# --- inverse and log-determinant ---------------------------------------------------------------

SETTINGS = [
    {"time": time, "blocks": blocks, "context": context, "hidden": hidden}
    for time in TIME
    for blocks, context, hidden in ((1, 0, (5,)), (3, 0, (5, 4)), (1, 2, (5, 4, 4)), (2, 3, (5, 4)))
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_there_and_back_again(settings: dict[str, object]) -> None:
    flow = small_flow(3, tol=1e-9, **settings)
    x, context = torch.randn(6, 3).double(), torch.randn(6, flow.context).double() if flow.context else None
    with torch.no_grad():
        there = flow.solve(x, context)
        back = flow.solve(there.z, context, reverse=True)
    torch.testing.assert_close(back.z, x, atol=1e-7, rtol=0)
    torch.testing.assert_close(back.logp, -there.logp, atol=1e-7, rtol=0)
    torch.testing.assert_close(back.log_prob, there.log_prob, atol=1e-6, rtol=0)
    assert len(there.blocks) == flow.blocks
    torch.testing.assert_close(back.blocks[0].z[0], there.blocks[-1].z[-1])
    if flow.blocks > 1:
        torch.testing.assert_close(there.blocks[1].z[0], there.blocks[0].z[-1], atol=0, rtol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_log_determinant_is_that_of_the_jacobian(settings: dict[str, object], reverse: bool) -> None:
    """-int div v = -log |det dz(T)/dx|, the Jacobian by differentiating the solve."""
    flow = small_flow(3, tol=1e-10, **settings)
    x = torch.randn(4, 3).double().requires_grad_()
    context = torch.randn(4, flow.context).double() if flow.context else None
    solution = flow.solve(x, context, reverse=reverse)
    rows = [torch.autograd.grad(solution.z[:, i].sum(), x, retain_graph=True)[0] for i in range(3)]
    sign, logdet = torch.linalg.slogdet(torch.stack(rows, dim=1))
    assert (sign == 1).all()
    torch.testing.assert_close(solution.logp, -logdet, atol=1e-7, rtol=0)


@pytest.mark.parametrize("divergence", ["exact", "exact-forward", "exact-reverse"])
def test_log_density_of_a_users_field(divergence: str) -> None:
    solver = Solver(method="dopri8", rtol=1e-10, atol=1e-10)
    flow = CNF(3, field=lambda: Wave(3), blocks=2, eval_solver=solver, eval_divergence=divergence).eval()
    x = torch.randn(4, 3).double().requires_grad_()
    solution = flow.solve(x)
    rows = [torch.autograd.grad(solution.z[:, i].sum(), x, retain_graph=True)[0] for i in range(3)]
    _, logdet = torch.linalg.slogdet(torch.stack(rows, dim=1))
    torch.testing.assert_close(solution.logp, -logdet, atol=1e-7, rtol=0)


def test_without_the_density_the_states_are_the_same() -> None:
    flow, x = small_flow(3, blocks=2), torch.randn(5, 3).double()
    with_density, without = flow.solve(x), flow.solve(x, density=False)
    torch.testing.assert_close(with_density.z, without.z, atol=1e-8, rtol=0)
    assert without.blocks[0].logp is None
    with pytest.raises(ValueError, match="density=True"):
        _ = without.logp


def eight_gaussians(n: int) -> Tensor:
    angle = torch.randint(0, 8, (n,)) * (math.pi / 4)
    return 2 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.4 * torch.randn(n, 2)


def test_a_trained_density_has_mass_one() -> None:
    """Train briefly on eight Gaussians; int exp(log p) over a grid is 1 within 1e-3."""
    flow = CNF(2, hidden=(32, 32), T=0.5, solver=Solver(rtol=1e-3, atol=1e-3))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        got = objective(flow, eight_gaussians(256), regularizers=[TPR(weight=0.1)])
        optimizer.zero_grad()
        got.loss.backward()
        optimizer.step()
        losses.append(float(got.nll.detach()))
    assert sum(losses[-20:]) / 20 < losses[0] - 0.3
    flow.eval()
    side = torch.linspace(-8, 8, 161)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)
    with torch.no_grad():
        log_prob = flow().log_prob(grid)
        assert log_prob.shape == (161, 161)
        held_out = eight_gaussians(2000)
        assert float(flow().log_prob(held_out).mean()) > float(standard_normal_log_prob(held_out).mean())
    mass = float(log_prob.double().exp().sum()) * float(side[1] - side[0]) ** 2
    assert mass == pytest.approx(1, abs=1e-3)


# --- counters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize(
    "divergence", ["exact", "exact-forward", "exact-reverse", "hutchinson", "hutchinson-rademacher-3"]
)
@pytest.mark.parametrize(
    "method", ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "rk4", "midpoint", "implicit_adams"]
)
def test_counters_equal_the_calls_of_the_users_field(method: str, divergence: str, gradient: str) -> None:
    steps = {"n_steps": 6} if METHODS[method].kind == "fixed" else {}
    solver = Solver(method=method, rtol=1e-3, atol=1e-3, gradient=gradient, **steps)  # type: ignore[arg-type]
    fields = [Calls(Wave()) for _ in range(3)]
    flow = CNF(2, field=fields, blocks=3, solver=solver, divergence=divergence)
    got = objective(flow, torch.randn(5, 2).double(), regularizers=[TPR(times=3)])
    stats = got.solution.stats
    forward = [field.count for field in fields]
    assert stats.nfe == sum(forward)
    assert [block.stats.nfe for block in got.solution.blocks] == forward
    assert stats.nfe_backward == 0
    got.loss.backward()
    assert got.solution.stats.nfe == sum(forward)
    assert got.solution.stats.nfe_backward == sum(field.count for field in fields) - sum(forward)
    assert (got.solution.stats.nfe_backward > 0) == (gradient == "adjoint")


@pytest.mark.parametrize("density", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_counters_of_sampling(reverse: bool, density: bool) -> None:
    calls = Calls(Wave())
    flow = CNF(2, field=calls).eval()
    stats = flow.solve(torch.randn(5, 2).double(), reverse=reverse, density=density).stats
    assert stats.nfe == calls.count > 0
    assert stats.accepted >= 1


def test_a_budget_is_per_block() -> None:
    flow = small_flow(2, blocks=2)
    x = torch.randn(5, 2).double()
    with pytest.warns(SolveWarning, match="max_nfe = 20"):
        solution = flow.solve(x, solver=Solver(rtol=1e-9, atol=1e-9, max_nfe=20, on_budget="stop"))
    assert solution.stats.stopped
    assert [block.stats.nfe for block in solution.blocks] == [20, 20]
    assert solution.log_prob.shape == (5,)


def test_objective_of_a_stopped_solve_is_finite() -> None:
    flow = CNF(2, hidden=(8,), solver=Solver(rtol=1e-9, atol=1e-9, max_nfe=20, on_budget="stop"))
    with pytest.warns(SolveWarning):
        got = objective(flow, torch.randn(5, 2), regularizers=[TPR()])
    got.loss.backward()
    assert math.isfinite(float(got.loss))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


# --- modes, step control -----------------------------------------------------------------------


def test_training_and_evaluation_use_their_own_solvers() -> None:
    loose, tight = Solver(rtol=1e-2, atol=1e-2), Solver(rtol=1e-7, atol=1e-7)
    flow = CNF(2, hidden=(16, 16), solver=loose, eval_solver=tight)
    x = torch.randn(20, 2)
    coarse = flow.train().solve(x).stats.nfe
    fine = flow.eval().solve(x).stats.nfe
    assert fine > coarse
    assert flow.solve(x, solver=loose).stats.nfe == coarse
    assert CNF(2).solver == Solver(rtol=1e-4, atol=1e-4)
    assert CNF(2).eval_solver == Solver(rtol=1e-5, atol=1e-5)
    assert CNF(2, solver={"method": "bosh3"}).solver == Solver(method="bosh3", rtol=1e-4, atol=1e-4)


def test_training_and_evaluation_use_their_own_divergences() -> None:
    flow = small_flow(3, tol=1e-6, divergence="hutchinson", eval_divergence="exact")
    x = torch.randn(8, 3).double()
    flow.train()
    one, two = flow.solve(x).logp, flow.solve(x).logp
    assert not torch.equal(one, two)
    flow.eval()
    assert torch.equal(flow.solve(x).logp, flow.solve(x).logp)
    assert not torch.equal(flow.solve(x, divergence=Hutchinson()).logp, flow.solve(x).logp)
    flow.train()
    torch.testing.assert_close(flow.solve(x, divergence=Exact()).logp, flow.eval().solve(x).logp)


def test_hutchinson_log_densities_are_unbiased_along_a_solve() -> None:
    """Mean over many copies of one point, each with its own probe, within 4.9 standard errors (1e-6)."""
    flow, n = small_flow(3, tol=1e-6, method="dopri5"), 4000
    x = torch.randn(1, 3).double()
    with torch.no_grad():
        exact = flow.solve(x).logp
        copies = flow.solve(x.expand(n, 3), divergence="hutchinson").logp
    assert abs(float(copies.mean() - exact)) <= 4.9 * float(copies.std()) / math.sqrt(n) + 1e-5


def test_a_solve_of_hutchinson_converges() -> None:
    """A probe redrawn at every call would make the right-hand side noise, and the steps tiny."""
    flow, x = small_flow(3, tol=1e-8, method="dopri5"), torch.randn(16, 3).double()
    exact, estimate = flow.solve(x).stats, flow.solve(x, divergence="hutchinson").stats
    assert estimate.nfe <= 2 * exact.nfe
    assert estimate.rejected <= exact.rejected + 5


class Twist(nn.Module):
    """v = a sin(w t) z with a zero mean: the states hardly move, the log-density swings."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return 1e-3 * torch.sin(1e3 * z)


def test_the_step_control_sees_the_log_density() -> None:
    """States that hardly move, a divergence of order one: the error of log p stays near the tolerance."""
    x, tol = torch.rand(4, 2).double(), 1e-6
    flow = CNF(2, field=Twist(), eval_solver=Solver(rtol=tol, atol=tol)).eval()
    tight = Solver(method="dopri8", rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        error = (flow.solve(x).logp - flow.solve(x, solver=tight).logp).abs().max()
    assert float(error) <= 20 * tol


# --- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("features", [1, 2, 5])
def test_shapes(features: int, batch: tuple[int, ...]) -> None:
    flow = CNF(features, hidden=(4,), blocks=2).eval()
    x = torch.randn(*batch, features)
    solution = flow.solve(x, times=[0.25, 0.5])
    assert solution.z.shape == x.shape
    assert solution.logp.shape == solution.log_prob.shape == batch
    for block in solution.blocks:
        assert block.ts.shape == (4,)
        assert block.z.shape == (4, *x.shape)
        assert block.logp is not None
        assert block.logp.shape == (4, *batch)
    assert flow().log_prob(x).shape == batch


def test_a_batch_equals_its_rows() -> None:
    flow, x = small_flow(2), torch.randn(3, 4, 2).double()
    whole = flow().log_prob(x)
    rows = torch.stack([torch.stack([flow().log_prob(point) for point in row]) for row in x])
    torch.testing.assert_close(whole, rows, atol=1e-8, rtol=0)


# --- distribution ------------------------------------------------------------------------------


def test_distribution_without_context() -> None:
    flow = small_flow(3)
    p = flow()
    assert isinstance(p, FlowDistribution)
    assert isinstance(p, torch.distributions.Distribution)
    assert p.batch_shape == ()
    assert p.event_shape == (3,)
    assert p.has_rsample
    assert "FlowDistribution" in repr(p)
    for shape in ((), (5,), (2, 4)):
        x = p.sample(shape)
        assert x.shape == (*shape, 3)
        assert x.dtype == torch.float64
        assert not x.requires_grad
        assert p.support.check(x).all()
        assert p.log_prob(x).shape == shape


def test_distribution_with_context() -> None:
    flow = small_flow(3, context=2)
    context = torch.randn(5, 2).double()
    p = flow(context)
    assert p.batch_shape == (5,)
    assert p.event_shape == (3,)
    assert p.sample().shape == (5, 3)
    assert p.sample((4, 2)).shape == (4, 2, 5, 3)
    assert p.log_prob(torch.randn(3).double()).shape == (5,)
    assert p.log_prob(torch.randn(5, 3).double()).shape == (5,)
    assert p.log_prob(torch.randn(4, 1, 3).double()).shape == (4, 5)
    assert flow(torch.randn(2).double()).sample((6,)).shape == (6, 3)
    assert flow(torch.randn(2, 5, 2).double()).batch_shape == (2, 5)


def test_contexts_broadcast_as_if_they_were_repeated() -> None:
    flow = small_flow(2, context=1)
    x, context = torch.randn(4, 1, 2).double(), torch.randn(3, 1).double()
    got = flow(context).log_prob(x)
    assert got.shape == (4, 3)
    for j in range(3):
        torch.testing.assert_close(got[:, j], flow(context[j]).log_prob(x[:, 0]), atol=1e-8, rtol=0)
    assert float((got[:, 0] - got[:, 1]).abs().min()) > 0, "the context matters"


@pytest.mark.parametrize("context", [0, 2])
def test_expanded_distribution(context: int) -> None:
    flow = small_flow(3, context=context)
    c = torch.randn(context).double() if context else None
    p = flow(c).expand((4, 5))
    assert p.batch_shape == (4, 5)
    assert p.event_shape == (3,)
    assert p.sample((2,)).shape == (2, 4, 5, 3)
    x = torch.randn(3).double()
    torch.testing.assert_close(p.log_prob(x), flow(c).log_prob(x).expand(4, 5), atol=1e-8, rtol=0)
    independent = torch.distributions.Independent(p, 1)
    assert independent.event_shape == (5, 3)
    assert independent.log_prob(independent.sample()).shape == (4,)


@pytest.mark.parametrize("context", [0, 2])
def test_samples_agree_with_their_densities(context: int) -> None:
    flow = small_flow(3, context=context, blocks=2)
    p = flow(torch.randn(5, context).double() if context else None)
    x, log_prob = p.rsample_and_log_prob((4,))
    assert log_prob.shape == x.shape[:-1]
    torch.testing.assert_close(p.log_prob(x), log_prob, atol=1e-7, rtol=0)


def test_samples_are_differentiable() -> None:
    problem = GaussianToGaussian()
    p = as_flow(problem, Solver(rtol=1e-9, atol=1e-9))()
    torch.manual_seed(5)
    x = p.rsample((6,))
    noise = ((x - problem.m) / problem.s).detach()
    gradient_m, gradient_s = torch.autograd.grad(x.sum(), [problem.m, problem.s])
    torch.testing.assert_close(gradient_m, torch.full((2,), 6.0).double(), atol=1e-6, rtol=0)  # x = m + s e
    torch.testing.assert_close(gradient_s, noise.sum(0), atol=1e-6, rtol=0)


def test_samples_follow_the_seed() -> None:
    flow = CNF(2, hidden=(8,)).eval()
    found = []
    for _ in range(2):
        torch.manual_seed(9)
        found.append(flow().sample((5,)))
    assert torch.equal(*found)


def test_a_flow_fitted_by_gradients_of_its_samples() -> None:
    """The reverse Kullback-Leibler divergence has a finite gradient in every parameter."""
    flow = small_flow(2, tol=1e-6)
    x, log_q = flow().rsample_and_log_prob((32,))
    (log_q + x.square().sum(-1)).mean().backward()
    for p in flow.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert p.grad.abs().sum() > 0


# --- fields of the user ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        [Sine(), Sine()],
        (Sine(), Sine()),
        nn.ModuleList([Sine(), Sine()]),
        Sine,
        lambda: Sine(),
    ],
    ids=["list", "tuple", "module list", "class", "function"],
)
def test_ways_to_give_fields(field: object) -> None:
    flow = CNF(3, field=field, blocks=2, eval_solver=Solver(rtol=1e-8, atol=1e-8)).eval()  # type: ignore[arg-type]
    x = Sine().start()
    with torch.no_grad():
        want = Sine().state(2.0, x)
    torch.testing.assert_close(flow.solve(x).z, want, atol=1e-6, rtol=0)
    assert len(list(flow.parameters())) == 2
    assert flow.fields[0] is not flow.fields[1]


@pytest.mark.parametrize("field", ["perceptron", "user's"])
def test_second_derivatives_of_a_solve_are_right_or_refused(field: str) -> None:
    """A score that enters another loss, as in score matching, is never silently taken for a constant."""
    flow = (
        small_flow(2, hidden=(4, 4, 4)) if field == "perceptron" else as_flow(Linear(), Solver(rtol=1e-10, atol=1e-10))
    )
    x = torch.randn(3, flow.features).double().requires_grad_()
    direction, h = torch.randn_like(x), 1e-4

    def loss(x: Tensor, create_graph: bool) -> Tensor:
        (score,) = torch.autograd.grad(flow().log_prob(x).sum(), x, create_graph=create_graph)
        return (score * x).sum()

    ahead, behind = (loss((x + sign * h * direction).detach().requires_grad_(), False) for sign in (1, -1))
    try:
        (gradient,) = torch.autograd.grad(loss(x, True), x)
    except RuntimeError:
        return  # refused
    want = float(ahead - behind) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_a_frozen_field_needs_no_graph() -> None:
    flow = small_flow(2).requires_grad_(False)
    assert not flow().log_prob(torch.randn(3, 2).double()).requires_grad
    x = torch.randn(3, 2).double().requires_grad_()
    for gradient in ("backprop", "adjoint"):
        solver = Solver(rtol=1e-9, atol=1e-9, gradient=gradient)  # type: ignore[arg-type]
        flow.eval_solver = flow.solver = solver
        (score,) = torch.autograd.grad(flow().log_prob(x).sum(), x)
        assert score.isfinite().all()


def test_openings_save_evaluations_and_keep_the_answer() -> None:
    torch.manual_seed(0)
    flow = CNF(2, hidden=(16,), blocks=2).double().eval()
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(2)
    x, y = torch.randn(200, 2).double(), torch.randn(200, 2).double()
    cold, other = flow.solve(x), flow.solve(y)
    warm = flow.solve(x, first_steps=other.openings)
    assert len(other.openings) == 2
    assert all(0 < opening <= flow.T for opening in other.openings)
    assert warm.stats.nfe < cold.stats.nfe
    assert warm.stats.rejected == 0
    truth = flow.solve(x, solver=Solver(method="dopri8", rtol=1e-11, atol=1e-11))
    assert (warm.log_prob - truth.log_prob).abs().max() < 1e-4
    assert flow.solve(x, first_steps=(math.nan, math.nan)).stats.nfe == cold.stats.nfe


def test_opening_is_what_the_control_makes_of_the_first_step() -> None:
    torch.manual_seed(0)
    flow = CNF(2, hidden=(16,)).double().eval()
    attempts: list[Attempt] = []
    solution = flow.solve(torch.randn(50, 2).double(), observer=lambda block, attempt: attempts.append(attempt))
    assert attempts[0].accepted
    assert solution.openings[0] == pytest.approx(attempts[1].h)
    assert math.isnan((solution.stats + solution.stats).opening)
    fixed = flow.solve(torch.randn(5, 2).double(), solver=Solver(method="rk4", n_steps=3))
    assert math.isnan(fixed.openings[0])


def test_watched_solves_are_let_go_at_once() -> None:
    flow, x = CNF(2, hidden=(8,)).double(), torch.randn(4, 2).double()

    def alive() -> int:
        return sum(isinstance(thing, Stepper) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        solution = flow.solve_blocks(x, None, [None], watched=True)
        assert alive() == before + 1
        del solution
        assert alive() == before, "a cycle keeps a solve, with all its stages, until the collector runs"
    finally:
        gc.enable()
