"""Truths about diagnostics: local errors, how they add up, work and precision, polynomials, and the command."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import PROBLEMS, Linear, Problem, Sine, Wave, as_flow, parameter, small_flow
from rich.console import Console
from scipy.linalg import expm
from torch import Tensor, nn
from typer.testing import CliRunner

from pycnf import CNF, Solver, fit
from pycnf.cli import app
from pycnf.cli.diagnosing import step_table, work_table
from pycnf.data import load
from pycnf.diagnostics import (
    LocalErrors,
    WorkPoint,
    contributions,
    diagnose,
    local_errors,
    observed_order,
    polynomial_content,
    sample_difficulty,
    solve_truth,
    work_precision,
)
from pycnf.diagnostics.polynomials import legendre
from pycnf.plots import save_figure
from pycnf.plots_diagnostics import (
    contribution_figure,
    difficulty_figure,
    local_error_figure,
    polynomial_figure,
    tolerance_figure,
    work_precision_figure,
)
from pycnf.solve import METHODS
from pycnf.stepper import Attempt

ADAPTIVE = [name for name, method in METHODS.items() if method.kind == "adaptive"]
ROUNDING = 1e-12
FINE = {"dopri8": 1e-7, "dopri5": 1e-6, "bosh3": 1e-4, "fehlberg2": 1e-3, "adaptive_heun": 1e-3}
"""Tolerances at which every adaptive method takes tens of steps."""
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


def start(problem: Problem, n: int = 8) -> Tensor:
    """Points to start from."""
    return problem.start(n)


def tight(method: str = "dopri5", tolerance: float = 1e-5, **settings: Any) -> Solver:
    return Solver(method=method, rtol=tolerance, atol=tolerance, **settings)


def units(errors: LocalErrors) -> Tensor:
    """What a local error of 1 is in units of the state."""
    scale = errors.solver.atol + errors.solver.rtol * torch.maximum(errors.y0.abs(), errors.y1.abs())
    return scale * METHODS[errors.solver.method].tolerance_factor


def one_step(method: str) -> Solver:
    """A solver that crosses [0, 1] in one step."""
    if METHODS[method].kind == "fixed":
        return Solver(method=method, n_steps=1)
    return Solver(method=method, rtol=1e6, atol=1e6, first_step=1.0)


# --- the observer -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTIVE)
def test_an_observer_sees_every_step_and_changes_nothing(method: str) -> None:
    flow = small_flow(2, blocks=2).eval()
    x, solver = torch.randn(6, 2, dtype=torch.float64), tight(method, 1e-4 * FINE[method], first_step=1.0)
    seen: list[tuple[int, Attempt]] = []
    with torch.no_grad():
        want = flow.solve(x, solver=solver)
        found = flow.solve(x, solver=solver, observer=lambda *step: seen.append(step))
    assert torch.equal(found.z, want.z)
    assert found.stats == want.stats
    kept = [(block, step) for block, step in seen if step.accepted]
    assert (len(kept), len(seen) - len(kept)) == (want.stats.accepted, want.stats.rejected)
    assert want.stats.rejected > 0, "the first step is too large"
    for block in range(2):
        own = [step for i, step in kept if i == block]
        assert sum(step.h for step in own) == pytest.approx(flow.T)
        assert all(torch.equal(a.y1, b.y0) for a, b in itertools.pairwise(own))
        assert torch.equal(own[-1].y1[:, :2], want.blocks[block].z[-1])
    for _, step in seen:
        assert step.error.shape == step.y0.shape
        assert step.accepted == (step.ratio <= 1)


def test_an_observer_sees_the_steps_of_a_solve_that_is_differentiated() -> None:
    flow, seen = small_flow(2, tol=1e-5, method="dopri5"), []
    x = torch.randn(4, 2, dtype=torch.float64)
    flow.solve(x, observer=lambda block, step: seen.append(step), reverse=True).log_prob.sum().backward()
    assert seen[0].t == flow.T
    assert all(step.h < 0 and not step.error.requires_grad for step in seen)
    assert all(p.grad is not None for p in flow.parameters())


@pytest.mark.parametrize(
    "solver",
    [Solver(method="rk4", n_steps=2), Solver(engine="torchdiffeq"), Solver(gradient="adjoint")],
    ids=["fixed", "torchdiffeq", "adjoint"],
)
def test_an_observer_that_would_see_nothing_is_refused(solver: Solver) -> None:
    flow = small_flow(2)
    with pytest.raises(ValueError, match="only an adaptive method with engine='pycnf' and gradient='backprop'"):
        flow.solve(torch.zeros(3, 2, dtype=torch.float64), solver=solver, observer=lambda block, step: None)


# --- local errors -------------------------------------------------------------------------------


def exponential(problem: Linear, t: float) -> Tensor:
    """expm(A t), transposed, from SciPy: torch.linalg.matrix_exp is wrong by up to 3e-12 at some t."""
    return torch.from_numpy(expm(problem.a.detach().numpy() * t)).t()


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_true_local_error_is_that_of_the_closed_form(method: str) -> None:
    problem = Linear()
    found = local_errors(as_flow(problem, tight(method, FINE[method])), start(problem))
    assert len(found) >= 3
    true = found.true * units(found)
    for i in range(len(found)):
        h, y0, y1 = float(found.h[i]), found.y0[i], found.y1[i]
        want = y1[:, :-1] - y0[:, :-1] @ exponential(problem, h)
        torch.testing.assert_close(true[i, :, :-1], want, atol=1e-13, rtol=0)
        assert true[i, :, -1].abs().max() < ROUNDING, "a constant divergence is integrated exactly"


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_estimate_is_near_the_true_error_on_a_smooth_field(method: str) -> None:
    problem = Sine()
    errors = local_errors(as_flow(problem, tight(method, FINE[method])), start(problem))
    kept = errors.only_accepted()
    settled = slice(1, -1)  # the first step is a guess, the last one is cut off
    found = (kept.norm("true") / kept.norm("estimate"))[settled]
    # The solution that goes on has a higher order than the one it is compared with, except for fehlberg2's.
    assert 1e-4 < found.min() <= found.max() < 10
    torch.testing.assert_close(errors.norm("estimate"), errors.ratio, rtol=1e-9, atol=0)
    torch.testing.assert_close(errors.only_accepted().h.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_local_errors_shrink_with_the_order_of_the_step() -> None:
    problem = Sine()

    def largest(h: float) -> float:
        solver = Solver(method="bosh3", rtol=1.0, atol=1.0, first_step=h, max_step=h)
        found = local_errors(as_flow(problem, solver), start(problem))
        return float((found.true * units(found))[0].abs().max())

    assert np.log2(largest(0.125) / largest(0.0625)) == pytest.approx(4, abs=0.3), "order 3: h^4 a step"


def test_rejected_steps_are_told_with_their_errors() -> None:
    problem = Sine()
    errors = local_errors(as_flow(problem, tight("dopri5", 1e-7, first_step=1.0)), start(problem))
    lost = ~errors.accepted
    assert int(lost.sum()) == errors.stats.rejected > 0
    assert (errors.norm("estimate")[lost] > 1).all()
    assert (errors.norm("true")[lost] > errors.norm("true")[errors.accepted].max()).any()
    rows = errors.rows()
    assert len(rows) == errors.stats.accepted + errors.stats.rejected
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_the_solve_is_that_of_the_flow_in_its_own_precision() -> None:
    flow = CNF(2, (16, 16), blocks=2)
    x = torch.randn(20, 2)
    with torch.no_grad():
        stats = flow.eval().solve(x).stats
    errors = local_errors(flow.train(), x)
    assert flow.training, "the flow keeps its mode"
    assert next(flow.parameters()).dtype == torch.float32, "and its precision"
    assert errors.stats == stats
    assert errors.true.dtype == torch.float64
    assert errors.block.unique().tolist() == [0, 1]
    edges, density = errors.density()
    assert float(edges[-1]) == pytest.approx(2 * flow.T)
    assert float((density * edges.diff()).sum()) == pytest.approx(stats.accepted)


def test_a_conditional_flow_is_diagnosed() -> None:
    flow = CNF(2, field=Wave(context=3), context=3, eval_divergence="hutchinson", eval_solver=tight()).double()
    x, context = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    found = diagnose(flow, x, context, methods=["rk4"], n_steps=[2, 4], degree=3, alone=2)
    shared = local_errors(flow, x, context[0])
    assert found.errors.norm("true").max() < 10
    assert shared.norm("true").max() < 10
    assert len(found.difficulty.alone) == 2
    same = local_errors(flow, x, context)
    assert torch.equal(same.estimate, found.errors.estimate), "the divergence is exact, so nothing is drawn"


@pytest.mark.parametrize("method", ["rk4", "scipy_solver"])
def test_a_method_without_an_estimate_is_refused(method: str) -> None:
    solver = Solver(method=method, n_steps=4 if method == "rk4" else None)
    with pytest.raises(ValueError, match="has no embedded error estimate: choose one of dopri8"):
        local_errors(small_flow(2), torch.zeros(3, 2, dtype=torch.float64), solver=solver)


# --- straight lines are exact, curves are not ----------------------------------------------------


class Power(nn.Module):
    """v = p c z / (1 + c t): every trajectory is z0 (1 + c t)^p, a polynomial of degree p."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree, self.c = degree, parameter([0.7, -0.4])

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.degree * self.c * z / (1 + self.c * t)

    def state(self, t: float, z0: Tensor) -> Tensor:
        return z0 * (1 + self.c * t) ** self.degree


class Shear(nn.Module):
    """v = (sin z2, 0): straight lines that keep volumes, so that log p is straight too."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.stack([torch.sin(z[:, 1]), torch.zeros_like(z[:, 0])], dim=1)


EXPLICIT = [*ADAPTIVE, *ORDERS, "explicit_adams"]


def error_of_one_step(field: nn.Module, method: str) -> tuple[Tensor, Tensor]:
    flow = CNF(2, field=field, eval_solver=one_step(method)).eval()
    x = torch.randn(8, 2, dtype=torch.float64)
    with torch.no_grad():
        found, truth = flow.solve(x), solve_truth(flow, x)
    assert found.stats.accepted == 1
    return (found.z - truth.z).abs().max(), (found.logp - truth.logp).abs().max()


@pytest.mark.parametrize("method", EXPLICIT)
def test_straight_lines_have_no_local_error_for_any_explicit_method(method: str) -> None:
    z, logp = error_of_one_step(Power(1), method)
    assert z < ROUNDING
    assert logp > 1e3 * ROUNDING, "the log-density along a straight line is no polynomial"
    assert max(error_of_one_step(Shear(), method)) < ROUNDING


@pytest.mark.parametrize("method", EXPLICIT)
def test_trajectories_of_degree_two_have_a_local_error_for_every_explicit_method(method: str) -> None:
    assert error_of_one_step(Power(2), method)[0] > 1e3 * ROUNDING


@pytest.mark.parametrize("method", ADAPTIVE)
def test_diagnostics_show_it(method: str) -> None:
    x = torch.randn(8, 2, dtype=torch.float64)
    straight, curved = (
        local_errors(CNF(2, field=Power(degree), eval_solver=tight(method, FINE[method])), x) for degree in (1, 2)
    )
    for error in ("true", "estimate"):
        assert (getattr(straight, error) * units(straight))[..., :2].abs().max() < ROUNDING
    assert straight.deciding("true")[1:-1] == ["logp"] * (len(straight) - 2), "log p alone sets the steps"
    assert (curved.true * units(curved))[..., :2].abs().max() > 1e3 * ROUNDING


# --- how errors add up ---------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
def test_contributions_add_up_to_the_error_of_the_solve(blocks: int) -> None:
    flow = small_flow(2, tol=1e-4, method="dopri5", blocks=blocks)
    x = torch.randn(6, 2, dtype=torch.float64)
    errors = local_errors(flow, x)
    found = contributions(flow, errors)
    with torch.no_grad():
        solved, truth = flow.eval().solve(x), solve_truth(flow, x)
    torch.testing.assert_close(found.total[:, :2], solved.z - truth.z, atol=1e-11, rtol=0)
    torch.testing.assert_close(found.total[:, 2], solved.logp - truth.logp, atol=1e-11, rtol=0)
    torch.testing.assert_close(found.step.sum(0), found.total, atol=1e-14, rtol=0)
    torch.testing.assert_close(found.step[-1], found.local[-1], atol=1e-12, rtol=0)
    kept = errors.only_accepted()
    torch.testing.assert_close(found.local, kept.true * units(kept), atol=1e-11, rtol=0)
    assert contributions(flow, errors, samples=2).total.shape == (2, 3)


def test_a_linear_field_carries_each_local_error_by_its_exponential() -> None:
    problem = Linear()
    flow, x = as_flow(problem, tight("bosh3", 1e-3)), start(problem)
    errors = local_errors(flow, x)
    found, kept = contributions(flow, errors), errors.only_accepted()
    for i in range(len(kept)):
        left = 1 - float(kept.t[i] + kept.h[i])
        with torch.no_grad():
            want = found.local[i, :, :-1] @ exponential(problem, left)
        torch.testing.assert_close(found.step[i, :, :-1], want, atol=1e-11, rtol=0)


# --- samples ------------------------------------------------------------------------------------


def test_a_hard_sample_sets_the_steps() -> None:
    problem = Sine()
    x = torch.full((10, 3), 1e-3, dtype=torch.float64)
    x[4] = 2.0
    flow = as_flow(problem, tight("dopri5", 1e-7))
    errors = local_errors(flow, x)
    found = sample_difficulty(flow, x, errors, alone=10)
    assert int(found.share.argmax()) == 4
    assert found.share.sum().item() == pytest.approx(1)
    assert found.share[4] > 0.9
    assert found.hardest(0.1) == pytest.approx(found.share[4].item())
    assert found.hardest(1.0) == pytest.approx(1)
    assert 1 <= found.effective < 1.5
    assert int(found.alone.argmax()) == 4
    assert found.together == errors.stats.nfe
    with pytest.raises(ValueError, match=r"a fraction in \(0, 1\]"):
        found.hardest(0.0)
    with pytest.raises(ValueError, match="errors of 9 samples, got those of 10"):
        sample_difficulty(flow, x[:9], errors)


def test_shares_of_equal_samples_are_equal() -> None:
    flow = small_flow(2, tol=1e-5, method="dopri5")
    errors = local_errors(flow, torch.ones(4, 2, dtype=torch.float64))
    torch.testing.assert_close(errors.shares(), torch.full_like(errors.shares(), 0.25))
    nothing = dataclasses.replace(errors, estimate=torch.zeros_like(errors.estimate))
    torch.testing.assert_close(nothing.shares(), torch.full_like(errors.shares(), 0.25))


# --- work and precision -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ORDERS)
def test_fixed_steps_show_their_order(method: str) -> None:
    problem = Sine()
    points = work_precision(as_flow(problem, tight()), start(problem), methods=[method], n_steps=[64, 32, 16])
    assert [point.n_steps for point in points] == [16, 32, 64]
    assert observed_order(points, method) == pytest.approx(ORDERS[method], abs=0.25)
    assert observed_order(points, method, "logp") == pytest.approx(ORDERS[method], abs=0.25)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2", "adaptive_heun"])
def test_adaptive_methods_show_their_order_and_follow_the_tolerance(method: str) -> None:
    problem = Sine()
    finest = {"dopri5": 2e-11, "bosh3": 1e-7, "fehlberg2": 1e-4}.get(method, 1e-5)
    tolerances = [finest, finest * 10, finest * 100]
    points = work_precision(as_flow(problem, tight()), start(problem), methods=[method], tolerances=tolerances)
    assert observed_order(points, method) == pytest.approx(METHODS[method].order, abs=0.8)  # from above
    assert [point.tolerance for point in points] == sorted(tolerances, reverse=True)
    assert all(1e-3 < point.error_z / point.tolerance < 50 for point in points if point.tolerance)
    assert sorted(point.nfe for point in points) == [point.nfe for point in points]


def test_errors_are_those_against_the_closed_form() -> None:
    problem = Sine()
    x, flow = start(problem), as_flow(problem, tight())
    (point,) = work_precision(flow, x, methods=["rk4"], n_steps=[4])
    with torch.no_grad():
        solved = flow.eval().solve(x, solver=Solver(method="rk4", n_steps=4))
        z, logp = solved.z - problem.state(1.0, x), solved.logp - problem.logp(1.0, x)
        log_prob = (-0.5 * problem.state(1.0, x).square().sum(1) - 1.5 * np.log(2 * np.pi)) - problem.logp(1.0, x)
    assert point.error_z == pytest.approx(z.square().mean().sqrt().item(), rel=1e-6)
    assert point.error_z_max == pytest.approx(z.abs().max().item(), rel=1e-6)
    assert point.error_logp == pytest.approx(logp.square().mean().sqrt().item(), rel=1e-6)
    assert point.error_logp_max == pytest.approx(logp.abs().max().item(), rel=1e-6)
    assert point.error_nll == pytest.approx((log_prob - solved.log_prob).mean().item(), rel=1e-6)
    assert point.nfe == solved.stats.nfe


def test_a_spent_budget_is_told_and_finer_settings_are_left_out() -> None:
    problem = Sine()
    flow, x = as_flow(problem, tight()), start(problem)
    points = work_precision(flow, x, methods=["adaptive_heun"], tolerances=[1e-2, 1e-6, 1e-7], max_nfe=40)
    assert [point.failed is None for point in points] == [True, False]
    assert "max_nfe = 40" in str(points[1].failed)
    assert np.isnan(points[1].error_z)
    assert np.isnan(observed_order(points, "adaptive_heun")), "one point tells no order"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["euler", "newton"]}, "unknown method 'newton': choose one of dopri8"),
        ({"methods": ["dopri5"], "tolerances": []}, "give tolerances"),
        ({"methods": ["rk4"], "n_steps": []}, "give n_steps"),
        ({"methods": ["rk4"], "n_steps": [0]}, "n_steps >= 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        work_precision(small_flow(2), torch.zeros(2, 2, dtype=torch.float64), **settings)


# --- polynomials --------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_polynomial_trajectory_has_no_residual_from_its_degree_on(degree: int) -> None:
    field = Power(degree)
    x = torch.randn(5, 2, dtype=torch.float64)
    content = polynomial_content(CNF(2, field=field), x, degree=4)
    left = content.residual_rms()["z"][0]
    assert (left[degree:] < ROUNDING).all()
    assert (left[:degree] > 1e-4).all()
    assert (content.coefficients[0, degree + 1 :, :, :2].abs() < ROUNDING).all()
    t = torch.from_numpy((1 + legendre(4, 10)[0]) / 2)
    q = torch.from_numpy(legendre(4, 10)[2])
    with torch.no_grad():
        want = torch.stack([field.state(s, x) for s in t])
    torch.testing.assert_close(torch.einsum("kp,pbd->kbd", q, content.coefficients[0, ..., :2]), want)
    assert (content.residual_rms()["logp"][0] > 1e-8).all(), "its log-density is no polynomial"


def test_coefficients_are_projections_and_residuals_fall() -> None:
    flow = small_flow(2, blocks=2)
    content = polynomial_content(flow, torch.randn(7, 2, dtype=torch.float64), degree=6)
    again = polynomial_content(flow, torch.randn(7, 2, dtype=torch.float64), degree=6, nodes=20)
    assert content.coefficients.shape == content.residuals.shape == (2, 7, 7, 3)
    assert content.degree == again.degree == 6
    assert (content.residuals.diff(dim=1) < 1e-12).all()
    # Parseval: what is left at degree p - 1 is c_p and what is left at p.
    torch.testing.assert_close(
        content.residuals[:, :-1].square(),
        content.coefficients[:, 1:].square() + content.residuals[:, 1:].square(),
        atol=1e-14,
        rtol=1e-9,
    )


@pytest.mark.parametrize("settings", [{"degree": -1}, {"degree": 4, "nodes": 4}])
def test_impossible_degrees_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="more nodes than that"):
        polynomial_content(small_flow(2), torch.zeros(2, 2, dtype=torch.float64), **settings)


# --- independent solvers agree on trained flows ---------------------------------------------------


@pytest.fixture(scope="module", params=["moons", "power"])
def trained(request: pytest.FixtureRequest) -> tuple[CNF, Tensor]:
    """A trained flow with the paper's shape, and test rows."""
    torch.manual_seed(0)
    data = load(request.param)
    hidden, T = {"moons": ((64, 64, 64), 0.5), "power": ((60, 60, 60), 1.0)}[request.param]
    flow = CNF(data.features, hidden, T=T, solver={"method": "dopri5"})
    fit(flow, data.train[:2000], max_steps=30, batch_size=100, lr=5e-3, progress=False, device="cpu")
    return flow, data.test[:30]


def test_scipy_and_dopri8_agree_on_a_trained_flow(trained: tuple[CNF, Tensor]) -> None:
    """DOP853 at 1e-13 shares no line with the stepper, nor its divergence with the closed form."""
    flow, x = trained
    truth = solve_truth(flow, x, times=[flow.T / 3])
    other = Solver(method="scipy_solver", scipy_method="DOP853", rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        found = flow.double().solve(x.double(), solver=other, divergence="exact-reverse", times=[flow.T / 3])
    assert truth.blocks[0].ts.shape == (3,)
    for a, b in ((truth.z, found.z), (truth.logp, found.logp), (truth.blocks[0].z, found.blocks[0].z)):
        assert (a - b).abs().max() < 1e-9
    flow.float()


# --- figures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diagnosis() -> Any:
    torch.manual_seed(1)
    flow = CNF(2, (8,), blocks=2, eval_solver=tight("dopri5", 1e-6, first_step=0.9))
    return diagnose(
        flow, torch.randn(12, 2), methods=["dopri5", "rk4"], tolerances=[1e-3, 1e-5], n_steps=[2, 4], degree=3, alone=4
    )


def flat(found: Any, features: int) -> Any:
    """The same difficulties in another number of dimensions."""
    return dataclasses.replace(found.difficulty, x=torch.randn(12, features))


FIGURES: dict[str, Callable[[Any], Any]] = {
    "local errors": lambda d: local_error_figure(d.errors),
    "no rejected step": lambda d: local_error_figure(d.errors.only_accepted()),
    "difficulty in the plane": lambda d: difficulty_figure(d.errors, d.difficulty),
    "difficulty in space": lambda d: difficulty_figure(d.errors, flat(d, 3)),
    "contributions": lambda d: contribution_figure(d.errors, d.contributions),
    "work and precision": lambda d: work_precision_figure(d.points, title="power"),
    "tolerance": lambda d: tolerance_figure(d.points),
    "polynomials": lambda d: polynomial_figure(d.content),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_render_with_labels_on_every_axis(name: str, diagnosis: Any, tmp_path: Path) -> None:
    figure = FIGURES[name](diagnosis)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = save_figure(figure, tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert svg.startswith("<?xml")
    for axes in figure.axes:
        assert axes.get_ylabel()
        assert axes.get_xlabel() or axes.get_label() == "<colorbar>"


def test_figures_show_what_was_measured(diagnosis: Any) -> None:
    errors: LocalErrors = diagnosis.errors
    left = local_error_figure(errors).axes[0]
    crosses = next(line for line in left.lines if line.get_label() == "rejected step")
    assert len(crosses.get_xdata()) == errors.stats.rejected > 0
    lines = work_precision_figure(diagnosis.points).axes[1].lines
    assert [line.get_label() for line in lines] == ["dopri5", "rk4"]
    assert list(lines[0].get_ydata()) == [p.error_logp for p in diagnosis.points if p.method == "dopri5"]
    assert len(tolerance_figure(diagnosis.points).axes[0].lines) == 2, "one adaptive method, and the diagonal"


def test_nothing_to_draw_is_refused() -> None:
    point = WorkPoint(
        method="dopri5", kind="adaptive", order=5, tolerance=1e-3, n_steps=None, nfe=9, failed="no budget"
    )
    for draw in (work_precision_figure, tolerance_figure):
        with pytest.raises(ValueError, match="no solve came to its end"):
            draw([point])


def test_the_summary_is_plain(diagnosis: Any) -> None:
    summary = diagnosis.summary()
    assert summary["nfe"] == diagnosis.errors.stats.nfe
    assert len(summary["steps"]) == summary["accepted"] + summary["rejected"]
    assert sum(summary["deciding"].values()) == summary["accepted"]
    assert len(summary["contributions"]["z"]) == summary["accepted"]
    assert summary["samples"]["alone_max"] == max(summary["samples"]["alone"])
    assert set(summary["orders"]) == {"dopri5", "rk4"}
    json.dumps(summary)


# --- the command --------------------------------------------------------------------------------

TINY = [
    *("--rows", 8, "--methods", "dopri5,rk4", "--tolerances", "1e-2,1e-4", "--n-steps", "2,4"),
    *("--degree", 3, "--alone", 2, "--device", "cpu"),
]


def call(*arguments: Any) -> Any:
    """Run a command in this process."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a small flow on the POWER subset."""
    folder = tmp_path_factory.mktemp("train") / "run"
    small = ["--max-steps", 3, "--hidden", "8,8", "--batch-size", 200, "--device", "cpu"]
    done = call("train", "--output", folder, "--quiet", *small)
    assert done.exit_code == 0, done.output
    return folder


def test_the_command_prints_tables_and_leaves_record_and_figures(run: Path) -> None:
    done = call("diagnose", run, *TINY)
    assert done.exit_code == 0, done.output
    for words in ("true local error", "deciding channel", "steps tried", "work and precision", "left over at degree 3"):
        assert words in done.stdout
    folder = run / "diagnosis"
    record = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))
    assert set(record) >= {"command", "versions", "device", "date", "seed", "run", "data", "split", "rows", "dtype"}
    assert set(record) >= {"solver", "truth", "steps", "contributions", "samples", "work_precision", "polynomials"}
    assert (record["data"], record["rows"], record["dtype"]) == ("power", 8, "float32")
    assert set(record["steps"][0]) >= {"block", "t", "h", "accepted", "estimate_z", "true_logp", "true_over_estimate"}
    assert [(p["method"], p["tolerance"], p["n_steps"]) for p in record["work_precision"]] == [
        ("dopri5", 1e-2, None), ("dopri5", 1e-4, None), ("rk4", None, 2), ("rk4", None, 4),
    ]  # fmt: skip
    assert len(record["figures"]) == 12
    for name in ("diagnosis.json", *record["figures"]):
        assert (folder / name).stat().st_size > 0
        assert name in done.stdout


def test_tables_fit_80_columns(diagnosis: Any) -> None:
    summary, out = diagnosis.summary(), Console(width=80, file=io.StringIO())
    for table in (step_table(out, summary), work_table(out, summary)):
        out.print(table)
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    first = summary["steps"][0]
    row = next(line for line in lines if line.startswith("1 "))
    assert f"{first['t']:.4f} {first['h']:.4f}" in row
    assert "…" not in "".join(lines)
    assert any(line.startswith("rk4") and f"{summary['work_precision'][-2]['error_z']:.1e}" in line for line in lines)


def test_json_stands_alone_and_settings_are_followed(run: Path, tmp_path: Path) -> None:
    own = ["--method", "bosh3", "--rtol", 1e-3, "--atol", 1e-2, "--json", "--quiet", "--output", tmp_path / "new"]
    done = call("diagnose", run, *TINY, "--methods", "euler", *own)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert done.stderr == ""
    assert record["solver"] == {"method": "bosh3", "rtol": 1e-3, "atol": 1e-2}
    assert "tolerance.svg" not in record["figures"], "no method has a tolerance"
    assert json.loads((tmp_path / "new" / "diagnosis.json").read_text(encoding="utf-8")) == record


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-run"], "no folder no-such-run"),
        (["--rows", "0"], "0 is not in the range|greater than or equal to 1"),
        (["--methods", "dopri5,newton"], "'newton' is not one of dopri8"),
        (["--methods", ","], "is not one of dopri8"),
        (["--tolerances", "1e-3;1e-4"], "numbers separated by commas"),
        (["--tolerances", "1e-3,0"], "numbers > 0"),
        (["--n-steps", "2,0.5"], "whole numbers >= 1"),
        (["--method", "rk4"], "'rk4' is not one of dopri8"),
        (["--data", "pwer"], "did you mean power"),
        (["--data", "moons"], "(*, 6)"),
        (["--split", "tset"], "not one of test"),
    ],
)
def test_bad_input_gives_one_message_and_exit_code_2(arguments: list[str], message: str, run: Path) -> None:
    given = arguments if arguments[0] == "no-such-run" else [run, *arguments]
    done = call("diagnose", *given, "--device", "cpu")
    assert done.exit_code == 2
    assert any(part in done.stderr for part in message.split("|")), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_run_that_does_not_tell_its_data_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    done = call("diagnose", tmp_path)
    assert (done.exit_code, "--data" in done.stderr) == (2, True)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_truth_is_that_of_the_closed_form(name: str) -> None:
    problem = PROBLEMS[name]()
    x = start(problem)
    truth = solve_truth(as_flow(problem, tight()), x)
    with torch.no_grad():
        torch.testing.assert_close(truth.z, problem.state(1.0, x), atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(truth.logp, problem.logp(1.0, x), atol=1e-11, rtol=1e-11)
