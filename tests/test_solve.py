"""Truths about solves: orders, sampled times, counters, budgets, limits of the step, gradients."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import AffineInTime, Calls, GaussianToGaussian, Linear, Rotation, Sine, Wave, flat_gradient
from torch import Tensor, nn

from pycnf.solution import Solution, SolveError, SolveStats, SolveWarning
from pycnf.solve import METHODS, Solver

ADAPTIVE = [name for name, method in METHODS.items() if method.kind == "adaptive"]
FIXED = [name for name, method in METHODS.items() if method.kind == "fixed"]
ONE_STEP = [name for name in FIXED if not METHODS[name].multistep]
MULTISTEP = [name for name in FIXED if METHODS[name].multistep]
STAGES = {"dopri8": 13, "dopri5": 6, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 1}  # new calls in a step
FIXED_STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
TIMES = [0.13, 0.4, 0.55, 0.9]


def make(method: str, **settings: object) -> Solver:
    """Make a solver of any kind with sensible settings."""
    kind = METHODS[method].kind
    if kind == "fixed":
        settings = {"n_steps": 20} | settings
    if kind == "scipy":
        settings = {"gradient": "adjoint"} | settings
    return Solver(method=method, **settings)  # type: ignore[arg-type]


# --- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("times", [None, TIMES], ids=["ends", "sampled"])
@pytest.mark.parametrize("samples", ["dense", "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_times_and_states_agree(method: str, samples: str, times: list[float] | None, reverse: bool) -> None:
    if METHODS[method].multistep and samples == "exact":
        pytest.skip("multistep methods have no exact samples")
    problem = Sine()
    t0, t1 = (1.0, 0.0) if reverse else (0.0, 1.0)
    inner = times if times is None or not reverse else times[::-1]
    with torch.no_grad():
        y0 = problem.state(t0, problem.start())
        tol = 1e-5
        n_steps = {"euler": 2000}.get(method, 200)
        settings = {"n_steps": n_steps} if METHODS[method].kind == "fixed" else {}
        solver = make(method, rtol=tol, atol=tol, samples=samples, **settings)
        ts, ys, stats = solver.integrate(problem, y0, t0, t1, times=inner)
        exact = torch.stack([problem.state(float(t), problem.start()) for t in ts])
    assert ts.dtype == torch.float64
    assert ts.tolist() == [t0, *(inner or []), t1]
    assert ys.shape == (len(ts), *y0.shape)
    assert ys.dtype == y0.dtype
    assert torch.equal(ys[0], y0)
    assert float((ys - exact).abs().max()) < 1e-2
    assert stats.nfe > 0
    assert stats.nfe_backward == 0
    assert not stats.stopped


@pytest.mark.parametrize("method", ADAPTIVE)
def test_sampled_times_may_be_a_list_or_a_tensor_of_any_float(method: str) -> None:
    problem, y0 = Rotation(), Rotation().start()
    solver = Solver(method=method)
    with torch.no_grad():
        _, one, _ = solver.integrate(problem, y0, 0.0, 1.0, times=[0.25, 0.5])
        _, two, _ = solver.integrate(problem, y0, 0.0, 1.0, times=torch.tensor([0.25, 0.5], dtype=torch.float32))
    assert torch.equal(one, two)


def test_states_keep_float32() -> None:
    _, ys, _ = Solver().integrate(lambda t, y: -y, torch.ones(3, 2), 0.0, 1.0, times=[0.5])
    assert ys.dtype == torch.float32
    torch.testing.assert_close(ys[-1], torch.full((3, 2), math.exp(-1)), atol=1e-5, rtol=0)


# --- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ONE_STEP)
@pytest.mark.parametrize("problem", [AffineInTime(), Sine()], ids=["affine in time", "sine"])
def test_order_of_fixed_steps(problem: AffineInTime | Sine, method: str) -> None:
    steps = [16, 32, 64, 128]
    y0, errors = problem.start(), []
    with torch.no_grad():
        for n in steps:
            _, ys, _ = Solver(method=method, n_steps=n).integrate(problem, y0, 0.0, 1.0)
            errors.append(float((ys[-1] - problem.state(1.0, y0)).pow(2).mean().sqrt()))
    assert slope(steps, errors) == pytest.approx(METHODS[method].order, abs=0.3)


@pytest.mark.parametrize("method", MULTISTEP)
def test_multistep_methods_converge_fast(method: str) -> None:
    problem, steps, errors = AffineInTime(), [16, 32, 64], []
    y0 = problem.start()
    with torch.no_grad():
        for n in steps:
            solver = Solver(method=method, n_steps=n, rtol=1e-13, atol=1e-13)
            _, ys, _ = solver.integrate(problem, y0, 0.0, 1.0)
            errors.append(float((ys[-1] - problem.state(1.0, y0)).pow(2).mean().sqrt()))
    assert slope(steps, errors) > 2.5
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("method", [name for name in MULTISTEP if METHODS[name].order])
def test_stated_order_of_multistep_methods(method: str) -> None:
    """The first steps, taken by a one-step method of order 4, are off the asymptote: more steps than above."""
    problem, steps, errors = Sine(), [32, 64, 128, 256], []
    y0 = problem.start()
    with torch.no_grad():
        for n in steps:
            _, ys, _ = Solver(method=method, n_steps=n).integrate(problem, y0, 0.0, 1.0)
            errors.append(float((ys[-1] - problem.state(1.0, y0)).pow(2).mean().sqrt()))
    assert slope(steps, errors) == pytest.approx(METHODS[method].order, abs=0.3)


def slope(steps: list[int], errors: list[float]) -> float:
    """Order of convergence: minus the slope of log error against log n, by least squares."""
    x, y = torch.tensor(steps).double().log(), torch.tensor(errors).double().log()
    x = x - x.mean()
    return -float((x * y).sum() / x.square().sum())


@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_falls_with_the_tolerance(method: str) -> None:
    problem = Sine()
    y0 = problem.start()
    errors, calls = [], []
    with torch.no_grad():
        for tol in (1e-2, 1e-5, 1e-8) if METHODS[method].order > 2 else (1e-2, 1e-4, 1e-6):
            _, ys, stats = Solver(method=method, rtol=tol, atol=tol).integrate(problem, y0, 0.0, 1.0)
            errors.append(float((ys[-1] - problem.state(1.0, y0)).abs().max()))
            calls.append(stats.nfe)
    assert max(errors[0], errors[1]) > 10 * errors[2]
    assert calls[0] <= calls[1] < calls[2]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_exact_samples_are_as_accurate_as_the_end(method: str) -> None:
    problem, tol = Sine(), 1e-6
    y0 = problem.start()
    errors = {}
    with torch.no_grad():
        for samples in ("dense", "exact"):
            solver = Solver(method=method, rtol=tol, atol=tol, samples=samples)
            ts, ys, _ = solver.integrate(problem, y0, 0.0, 1.0, times=TIMES)
            exact = torch.stack([problem.state(float(t), y0) for t in ts])
            errors[samples] = ((ys - exact) / (1 + exact.abs())).abs().amax((1, 2))
    assert float(errors["exact"].max()) <= 10 * tol
    assert float(errors["dense"][-1]) <= 10 * tol, "the end is hit with dense samples too"
    assert float(errors["dense"].max()) <= 1e-2, "dense samples carry the error of the interpolation"


def test_dense_samples_of_dopri8_are_worse_than_exact_ones() -> None:
    problem = Sine()
    y0 = problem.start()
    errors = {}
    with torch.no_grad():
        for samples in ("dense", "exact"):
            solver = Solver(method="dopri8", rtol=1e-8, atol=1e-8, samples=samples)
            ts, ys, _ = solver.integrate(problem, y0, 0.0, 1.0, times=TIMES)
            exact = torch.stack([problem.state(float(t), y0) for t in ts])
            errors[samples] = float((ys - exact).abs().max())
    assert errors["dense"] > 10 * errors["exact"]


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("times", [[0.25, 0.5, 0.75], [0.25, 0.5], [0.25, 0.6]], ids=str)
@pytest.mark.parametrize("engine", ["pycnf", "torchdiffeq"])
def test_exact_samples_survive_a_step_that_lands_on_one(method: str, times: list[float], engine: str) -> None:
    problem, tol = Sine(), 1e-8 if METHODS[method].order > 2 else 1e-6
    y0 = problem.start()
    settings: dict[str, Any] = {"engine": engine, "first_step": 0.25}
    solver = Solver(method=method, rtol=tol, atol=tol, samples="exact", max_step=0.25, **settings)
    lands = Solver(method=method, rtol=1.0, atol=1.0, samples="exact", max_step=0.4, **settings)
    with torch.no_grad():
        ts, ys, _ = solver.integrate(problem, y0, 0.0, 1.0, times=times)
        visited: list[float] = []

        def spy(t: Tensor, y: Tensor) -> Tensor:
            visited.append(round(float(t), 12))
            return problem(t, y)

        lands.integrate(spy, y0, 0.0, 1.0, times=times)
    exact = torch.stack([problem.state(float(t), y0) for t in ts]).detach()
    assert float(((ys - exact) / (1 + exact.abs())).abs().max()) <= 10 * tol
    assert set(times) | {1.0} <= set(visited), "every named time and the end are the end of a step"
    assert max(visited) == 1.0, "no call beyond the end"


@pytest.mark.parametrize("samples", ["dense", "exact"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_no_call_outside_the_interval(method: str, reverse: bool, samples: str) -> None:
    if METHODS[method].multistep and samples == "exact":
        pytest.skip("multistep methods have no exact samples")
    visited: list[float] = []
    t0, t1 = (1.0, 0.0) if reverse else (0.0, 1.0)

    def spy(t: Tensor, y: Tensor) -> Tensor:
        visited.append(float(t))
        return -y

    inner = [0.3, 0.7][:: -1 if reverse else 1]
    make(method, samples=samples).integrate(spy, torch.ones(2, 1).double(), t0, t1, times=inner)
    assert min(visited) >= 0.0
    assert max(visited) <= 1.0


def test_norm_controls_the_step() -> None:
    y0 = torch.ones(4, 2, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[:, 0], 40 * torch.cos(40 * t) * torch.ones_like(y[:, 1])], dim=1)

    def first_only(y: Tensor) -> Tensor:
        return y.reshape(-1, 2)[:, 0].pow(2).mean().sqrt()

    _, _, both = Solver().integrate(func, y0, 0.0, 1.0)
    _, _, first = Solver().integrate(func, y0, 0.0, 1.0, norm=first_only)
    assert first.nfe < both.nfe / 2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("samples", ["dense", "exact"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_engines_agree(method: str, samples: str, reverse: bool) -> None:
    """The steps taken here are those that torchdiffeq takes: same counts, states and gradients."""
    field, weights = Wave(width=16), torch.randn(6, 4, 2).double()
    with torch.no_grad():
        field.inner.weight *= 4
    y0 = torch.randn(4, 2).double().requires_grad_()
    t0, t1 = (1.0, 0.0) if reverse else (0.0, 1.0)
    found = []
    for engine in ("pycnf", "torchdiffeq"):
        solver = Solver(method=method, rtol=1e-4, atol=1e-4, samples=samples, engine=engine)  # type: ignore[arg-type]
        parameters = tuple(field.parameters())
        inner = TIMES[:: -1 if reverse else 1]
        ts, ys, stats = solver.integrate(field, y0, t0, t1, times=inner, tensors=parameters)
        found.append((ts, ys, stats, flat_gradient((ys * weights).sum(), [y0, *parameters])))
    (ts, ys, stats, gradient), (other_ts, other_ys, other_stats, other_gradient) = found
    assert torch.equal(ts, other_ts)
    assert (stats.nfe, stats.accepted, stats.rejected) == (
        other_stats.nfe,
        other_stats.accepted,
        other_stats.rejected,
    )
    assert stats.min_step == pytest.approx(other_stats.min_step, rel=1e-6)
    torch.testing.assert_close(ys, other_ys, atol=1e-11, rtol=1e-10)
    torch.testing.assert_close(gradient, other_gradient, atol=1e-9, rtol=1e-8)


# --- counters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first_step", [None, 0.01], ids=["chosen first step", "given first step"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_calls_of_an_adaptive_solve(method: str, first_step: float | None) -> None:
    calls = Calls(Sine())
    solver = Solver(method=method, rtol=1e-4, atol=1e-4, first_step=first_step)
    with torch.no_grad():
        _, _, stats = solver.integrate(calls, Sine().start(), 0.0, 1.0)
    assert stats.nfe == calls.count
    before = 1 if first_step else 2
    assert stats.nfe == before + STAGES[method] * (stats.accepted + stats.rejected)


def test_rejected_steps_are_counted() -> None:
    calls = Calls(Sine())
    solver = Solver(rtol=1e-6, atol=1e-6, first_step=1.0)
    with torch.no_grad():
        _, _, stats = solver.integrate(calls, Sine().start(), 0.0, 1.0)
    assert stats.rejected >= 1
    assert stats.nfe == calls.count == 1 + 6 * (stats.accepted + stats.rejected)


@pytest.mark.parametrize("method", ONE_STEP)
def test_calls_of_a_fixed_solve(method: str) -> None:
    calls = Calls(Sine())
    solver = Solver(method=method, n_steps=12)
    with torch.no_grad():
        _, _, stats = solver.integrate(calls, Sine().start(), 0.0, 1.0)
    assert stats.nfe == calls.count
    assert stats.accepted == 12
    assert stats.rejected == 0
    assert stats.nfe - FIXED_STAGES[method] * 12 in (0, 1)
    assert stats.min_step == pytest.approx(1 / 12)
    assert stats.max_step == pytest.approx(1 / 12)


@pytest.mark.parametrize("method", [*MULTISTEP, "scipy_solver"])
def test_calls_of_the_other_solves(method: str) -> None:
    calls = Calls(Sine())
    with torch.no_grad():
        _, _, stats = make(method).integrate(calls, Sine().start(), 0.0, 1.0, times=[0.5])
    assert stats.nfe == calls.count > 0


@pytest.mark.parametrize("samples", ["dense", "exact"])
def test_dense_samples_cost_nothing(samples: str) -> None:
    solver = Solver(rtol=1e-6, atol=1e-6, samples=samples)
    with torch.no_grad():
        _, without, bare = solver.integrate(Sine(), Sine().start(), 0.0, 1.0)
        _, sampled, stats = solver.integrate(Sine(), Sine().start(), 0.0, 1.0, times=TIMES)
    if samples == "dense":
        assert stats == bare
        assert torch.equal(without[-1], sampled[-1])
    else:
        assert stats.accepted > bare.accepted


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("times", [None, TIMES], ids=["ends", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_backward_calls(method: str, times: list[float] | None, gradient: str) -> None:
    if method == "scipy_solver" and gradient == "backprop":
        pytest.skip("cannot be differentiated")
    field = Wave()
    calls = Calls(field)
    _, ys, stats = make(method, gradient=gradient).integrate(
        calls, torch.randn(4, 2).double(), 0.0, 1.0, times=times, tensors=tuple(field.parameters())
    )
    forward = calls.count
    assert stats.nfe == forward
    assert stats.nfe_backward == 0
    accepted = stats.accepted
    ys.square().sum().backward()
    assert stats.nfe == forward
    assert stats.accepted == accepted
    assert stats.nfe_backward == calls.count - forward
    assert (stats.nfe_backward > 0) == (gradient == "adjoint")


@pytest.mark.parametrize("times", [[0.5], [0.97], TIMES], ids=str)
def test_fixed_adjoint_takes_the_steps_of_the_forward_solve(times: list[float]) -> None:
    field = Wave()
    solver = Solver(method="rk4", n_steps=20, gradient="adjoint")
    _, ys, stats = solver.integrate(
        field, torch.randn(4, 2).double(), 0.0, 1.0, times=times, tensors=tuple(field.parameters())
    )
    ys.sum().backward()
    assert stats.nfe_backward <= 2 * stats.nfe + 10 * len(times)


def test_stats_add_up() -> None:
    one = SolveStats(nfe=3, nfe_backward=1, accepted=2, rejected=1, min_step=0.1, max_step=0.2)
    two = SolveStats(nfe=4, accepted=1, min_step=0.05, max_step=0.1, stopped=True)
    assert one + two == SolveStats(7, 1, 3, 1, 0.05, 0.2, True)
    assert SolveStats() + one == one


# --- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTIVE)
def test_steps_stay_within_their_limits(method: str) -> None:
    calls = Calls(Sine())
    with torch.no_grad():
        _, _, free = Solver(method=method).integrate(calls, Sine().start(), 0.0, 1.0)
        _, _, small = Solver(method=method, max_step=1 / 64).integrate(calls, Sine().start(), 0.0, 1.0)
        tight = Solver(method=method, rtol=1e-13, atol=1e-13, min_step=0.05, max_nfe=2000)
        _, _, large = tight.integrate(calls, Sine().start(), 0.0, 1.0)
    assert 0 < free.min_step <= free.max_step <= 1
    assert small.max_step <= (1 + 1e-12) / 64
    assert small.accepted >= 64
    assert large.accepted <= 20 + 1
    assert large.max_step >= 0.05


def test_first_step_is_taken() -> None:
    with torch.no_grad():
        _, _, stats = Solver(first_step=1e-3).integrate(Sine(), Sine().start(), 0.0, 1.0)
    assert stats.min_step == pytest.approx(1e-3)


# --- budget ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dopri8", "dopri5", "bosh3", "rk4", "euler", "implicit_adams", "scipy_solver"])
def test_budget_ends_in_an_error(method: str) -> None:
    calls = Calls(Sine())
    budget = 15
    solver = make(method, rtol=1e-9, atol=1e-9, max_nfe=budget)
    with torch.no_grad(), pytest.raises(SolveError, match="max_nfe = 15") as caught:
        solver.integrate(calls, Sine().start(), 0.0, 1.0)
    assert calls.count == budget
    assert caught.value.nfe == budget
    assert caught.value.method == method
    message = str(caught.value)
    assert method in message
    assert "15 evaluations" in message
    assert "Try:" in message
    if method not in ("scipy_solver", "dopri8"):
        assert 0 < caught.value.t < 1
        assert 0 < caught.value.step < 1


def test_budget_that_suffices_changes_nothing() -> None:
    with torch.no_grad():
        _, free, stats = Solver().integrate(Sine(), Sine().start(), 0.0, 1.0)
        _, bound, _ = Solver(max_nfe=stats.nfe).integrate(Sine(), Sine().start(), 0.0, 1.0)
    assert torch.equal(free, bound)


@pytest.mark.parametrize("times", [None, TIMES], ids=["ends", "sampled"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "euler"])
def test_soft_stop_returns_the_last_accepted_state(method: str, reverse: bool, times: list[float] | None) -> None:
    problem = Sine()
    t0, t1 = (1.0, 0.0) if reverse else (0.0, 1.0)
    budget = 9 if method == "euler" else 34
    solver = make(method, rtol=1e-9, atol=1e-9, max_nfe=budget, on_budget="stop")
    inner = times if times is None or not reverse else times[::-1]
    with torch.no_grad():
        y0 = problem.state(t0, problem.start())
        with pytest.warns(SolveWarning, match=f"max_nfe = {budget}"):
            ts, ys, stats = solver.integrate(problem, y0, t0, t1, times=inner)
    assert stats.stopped
    assert stats.nfe == budget
    assert len(ts) == len(ys) == 2
    assert float(ts[0]) == t0
    assert 0 < float(ts[1]) < 1
    exact = problem.state(float(ts[1]), problem.start()).detach()
    assert float((ys[1] - exact).abs().max()) < (0.3 if method == "euler" else 1e-4)
    length = abs(float(ts[1] - ts[0]))
    assert stats.accepted * stats.max_step >= length - 1e-12, "the steps that were accepted lead to the end"
    if METHODS[method].kind == "fixed":
        assert stats.accepted * stats.max_step == pytest.approx(length)


def test_soft_stop_before_the_first_step_returns_the_start() -> None:
    y0 = Sine().start()
    solver = Solver(max_nfe=1, on_budget="stop")
    with torch.no_grad(), pytest.warns(SolveWarning, match="stopped at t = 0 "):
        ts, ys, stats = solver.integrate(Sine(), y0, 0.0, 1.0)
    assert ts.tolist() == [0.0, 0.0]
    assert torch.equal(ys[-1], y0)
    assert stats.nfe == 1
    assert stats.accepted == 0


@pytest.mark.parametrize("engine", ["pycnf", "torchdiffeq"])
def test_soft_stop_has_the_gradient_of_the_shortened_solve(engine: str) -> None:
    field, y0 = Wave(), torch.randn(4, 2).double()
    calls = Calls(field)
    parameters = tuple(field.parameters())
    solver = Solver(rtol=1e-10, atol=1e-10, max_nfe=50, on_budget="stop", engine=engine)
    with pytest.warns(SolveWarning):
        ts, ys, stats = solver.integrate(calls, y0, 0.0, 1.0, tensors=parameters)
    assert stats.nfe == calls.count == 50
    got = flat_gradient(ys[-1].square().sum(), list(parameters))
    full = Solver(rtol=1e-10, atol=1e-10)
    _, ys, _ = full.integrate(field, y0, 0.0, float(ts[-1]), tensors=parameters)
    want = flat_gradient(ys[-1].square().sum(), list(parameters))
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-6)


def test_budget_of_the_backward_solve_is_an_error() -> None:
    field, y0 = Wave(), torch.randn(4, 2).double()
    parameters = tuple(field.parameters())
    solver = Solver(rtol=1e-4, atol=1e-4, gradient="adjoint", adjoint_rtol=1e-11, adjoint_atol=1e-11, max_nfe=40)
    _, ys, stats = solver.integrate(field, y0, 0.0, 1.0, tensors=parameters)
    with pytest.raises(SolveError, match="max_nfe = 40"):
        ys[-1].square().sum().backward()
    assert stats.nfe_backward == 40


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", ["dense", "exact"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4", "implicit_adams"])
def test_gradcheck(method: str, gradient: str, reverse: bool, samples: str) -> None:
    if METHODS[method].multistep and samples == "exact":
        pytest.skip("multistep methods have no exact samples")
    field = Wave(width=3)
    y0 = torch.randn(2, 2).double().requires_grad_()
    tol = 1e-8 if method == "bosh3" else 1e-11
    settings = {"n_steps": 60} if METHODS[method].kind == "fixed" else {}
    solver = make(method, rtol=tol, atol=tol, gradient=gradient, samples=samples, **settings)
    t0, t1 = (1.0, 0.0) if reverse else (0.0, 1.0)
    parameters = tuple(field.parameters())

    def ends(y0: Tensor, *parameters: Tensor) -> Tensor:
        _, ys, _ = solver.integrate(field, y0, t0, t1, times=[0.5], tensors=parameters)
        return ys[1:] if samples == "exact" else ys[-1]

    assert torch.autograd.gradcheck(ends, (y0, *parameters), atol=2e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize(
    "problem", [Linear(), AffineInTime(), GaussianToGaussian(), Sine()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient": "backprop"},
        {"gradient": "adjoint"},
        {"gradient": "adjoint", "adjoint_norm": "full"},
        {"gradient": "adjoint", "adjoint_rtol": 1e-12, "adjoint_atol": 1e-12},
    ],
    ids=["backprop", "adjoint", "full norm", "own tolerance"],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_closed_forms(problem: Linear, settings: dict[str, object], reverse: bool) -> None:
    """Compare with the gradient of the closed form, for the start and every parameter."""
    start, weights = problem.start(4), torch.randn(4, problem.features).double()
    parameters = list(problem.parameters())
    if reverse:  # run back from z(1); the start's gradient is compared through z(1)
        with torch.no_grad():
            y0 = problem.state(1.0, start)
        y0.requires_grad_()
        x = start.requires_grad_()
        # implicit: the solution x(theta, y0) of state(1, x) = y0
        jacobian = torch.stack(
            [
                flat_gradient(problem.state(1.0, x)[i, j], [x, *parameters])
                for i in range(4)
                for j in range(problem.features)
            ]
        )
        n = x.numel()
        adjoint = torch.linalg.solve(jacobian[:, :n].t(), weights.flatten())
        want = torch.cat([adjoint, -adjoint @ jacobian[:, n:]])
        t0, t1 = 1.0, 0.0
    else:
        y0 = start.requires_grad_()
        want = flat_gradient((problem.state(1.0, y0) * weights).sum(), [y0, *parameters])
        t0, t1 = 0.0, 1.0
    solver = Solver(rtol=1e-9, atol=1e-9, **settings)  # type: ignore[arg-type]
    _, ys, _ = solver.integrate(problem, y0, t0, t1, tensors=parameters)
    got = flat_gradient((ys[-1] * weights).sum(), [y0, *parameters])
    torch.testing.assert_close(got, want, atol=2e-7, rtol=1e-7)


def test_adjoint_at_the_tolerance_is_accurate_in_both_directions() -> None:
    """The backward solve ends exactly at its end as well, whichever way the forward solve ran."""
    errors = {}
    for t0, t1 in ((0.0, 1.0), (1.0, 0.0)):
        field, weights = Wave(), torch.ones(8, 2).double()
        torch.manual_seed(3)
        for p in field.parameters():
            torch.nn.init.normal_(p, std=1.5)
        y0 = torch.randn(8, 2).double()
        found = []
        for solver in (
            Solver(method="dopri8", rtol=1e-6, atol=1e-6, gradient="adjoint"),
            Solver(method="dopri8", rtol=1e-12, atol=1e-12),
        ):
            _, ys, _ = solver.integrate(field, y0, t0, t1, tensors=tuple(field.parameters()))
            found.append(flat_gradient((ys[-1] * weights).sum(), list(field.parameters())))
        errors[t0] = float((found[0] - found[1]).abs().max() / found[1].abs().max())
    assert max(errors.values()) < 1e-4, errors
    assert errors[1.0] < 100 * errors[0.0] + 1e-6, errors


def test_seminorm_spends_fewer_calls_than_the_full_norm() -> None:
    calls = {}
    for norm in ("seminorm", "full"):
        torch.manual_seed(0)
        field = Wave(width=32)
        solver = Solver(rtol=1e-7, atol=1e-7, gradient="adjoint", adjoint_norm=norm)  # type: ignore[arg-type]
        y0 = torch.randn(64, 2).double()
        _, ys, stats = solver.integrate(field, y0, 0.0, 1.0, tensors=tuple(field.parameters()))
        (ys[-1].square().sum() * 100).backward()
        calls[norm] = stats.nfe_backward
    assert calls["seminorm"] < calls["full"]


def test_gradient_holds_the_steps_fixed() -> None:
    """The call that only serves the choice of the first step is no part of the graph."""
    field = Wave()
    seen: list[bool] = []

    def spy(t: Tensor, y: Tensor) -> Tensor:
        v = field(t, y)
        seen.append(v.requires_grad)
        return v

    Solver().integrate(spy, torch.randn(3, 2).double(), 0.0, 1.0, tensors=tuple(field.parameters()))
    assert seen.count(False) == 1
    assert not seen[1]


def test_scipy_adjoint_gradient() -> None:
    problem = Sine()
    y0 = problem.start(4).requires_grad_()
    solver = Solver(method="scipy_solver", rtol=1e-9, atol=1e-9, gradient="adjoint")
    _, ys, _ = solver.integrate(problem, y0, 0.0, 1.0, tensors=tuple(problem.parameters()))
    got = flat_gradient(ys[-1].sum(), [y0, problem.a])
    want = flat_gradient(problem.state(1.0, y0).sum(), [y0, problem.a])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scipy_method", ["DOP853", "RK45", "LSODA"])
def test_scipy_methods(scipy_method: str) -> None:
    problem = Sine()
    solver = Solver(method="scipy_solver", rtol=1e-7, atol=1e-7, scipy_method=scipy_method)
    with torch.no_grad():
        _, ys, _ = solver.integrate(problem, problem.start(), 0.0, 1.0)
        want = problem.state(1.0, problem.start())
    assert float((ys[-1] - want).abs().max()) < 1e-4


# --- failures and settings ---------------------------------------------------------------------


def test_error_survives_pickling() -> None:
    error = SolveError("a cause", "an advice", method="dopri5", t=0.25, step=1e-3, nfe=42)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, SolveError)
    assert str(copy) == str(error)
    assert (copy.method, copy.t, copy.step, copy.nfe) == ("dopri5", 0.25, 1e-3, 42)


@pytest.mark.parametrize(
    "solver",
    [
        Solver(),
        Solver(method="rk4", n_steps=8, samples="exact"),
        Solver(method="dopri8", rtol=1e-3, gradient="adjoint", adjoint_rtol=1e-2, adjoint_norm="full"),
        Solver(max_nfe=100, on_budget="stop", min_step=1e-3, max_step=0.5, first_step=0.1, gradient="checkpoint"),
        Solver(method="scipy_solver", scipy_method="RK23"),
    ],
    ids=lambda solver: solver.method,
)
def test_settings_survive_json(solver: Solver) -> None:
    import json

    assert Solver(**json.loads(json.dumps(solver.to_dict()))) == solver
    assert {"method", "rtol", "atol"} <= set(solver.to_dict())


def test_restrict_a_solution_to_some_of_its_times() -> None:
    ts = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0], dtype=torch.float64)
    z, logp = torch.randn(5, 3, 2).double(), torch.randn(5, 3).double()
    solution = Solution(ts, z, logp, SolveStats())
    some = solution.at(ts[[1, 3]])
    assert some.ts.tolist() == [0.0, 0.2, 0.7, 1.0]
    assert torch.equal(some.z, z[[0, 1, 3, 4]])
    assert some.logp is not None
    assert torch.equal(some.logp, logp[[0, 1, 3, 4]])
    with pytest.raises(ValueError, match="not sampled"):
        solution.at(torch.tensor([0.3]))


def discontinuous(t: Tensor, y: Tensor) -> Tensor:
    """Push towards 0 from both sides, so hard that no step is short enough to cross."""
    return -1e14 * torch.sign(y) if float(t) > 0.5 else torch.zeros_like(y)


def explosion(t: Tensor, y: Tensor) -> Tensor:
    return y.square()


def missing(t: Tensor, y: Tensor) -> Tensor:
    return torch.full_like(y, math.nan)


def missing_later(t: Tensor, y: Tensor) -> Tensor:
    return y if float(t) < 0.5 else torch.full_like(y, math.nan)


FAILURES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "blows up": (explosion, "blown up|non-finite|underflow"),
    "is discontinuous": (discontinuous, "discontinuous|stiff"),
    "is NaN": (missing, "NaN"),
    "is NaN later": (missing_later, "NaN"),
}


@pytest.mark.parametrize(
    "settings", [{}, {"gradient": "checkpoint"}, {"gradient": "adjoint"}, {"engine": "torchdiffeq"}], ids=str
)
@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_failed_solves_say_why(method: str, what: str, settings: dict[str, str]) -> None:
    func, cause = FAILURES[what]
    solver = Solver(method=method, max_nfe=6000, **settings)  # type: ignore[arg-type]
    y0 = torch.full((2, 1), 2.0).double().requires_grad_()
    with pytest.raises(SolveError, match=cause) as caught:
        solver.integrate(func, y0, 0.0, 1.0)
    check_error(caught.value, method)


@pytest.mark.parametrize("what", ["blows up", "is NaN", "is NaN later"])
@pytest.mark.parametrize("method", ["rk4", "euler", "explicit_adams"])
def test_failed_fixed_solves_say_why(method: str, what: str) -> None:
    y0 = torch.full((2, 1), 1e3).double()
    with pytest.raises(SolveError, match=r"non-finite|NaN") as caught:
        Solver(method=method, n_steps=30).integrate(FAILURES[what][0], y0, 0.0, 1.0)
    check_error(caught.value, method)


@pytest.mark.parametrize("what", ["is NaN", "is NaN later"])
def test_failed_solves_with_a_smallest_step_say_why(what: str) -> None:
    y0 = torch.full((400, 3), 2.0).double()
    with pytest.raises(SolveError, match=r"non-finite|NaN") as caught:
        Solver(min_step=1e-3, max_nfe=6000).integrate(FAILURES[what][0], y0, 0.0, 1.0)
    check_error(caught.value, "dopri5")


def check_error(error: SolveError, method: str) -> None:
    """Check that one clear line names method, time, step, calls and advice."""
    assert error.method == method
    assert error.nfe > 0
    assert 0 <= error.t <= 1
    message = str(error)
    assert f"{error.nfe} evaluations" in message
    assert f"t = {error.t:.6g}" in message
    assert "Try:" in message
    assert "\n" not in message
    assert len(message) < 500
    assert "TPR" in message


class Contraction(nn.Module):
    """v = -k z: harmless forwards, an explosion backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(3000.0, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -self.k * z + torch.sin(20 * t)


def test_failed_backward_solves_are_named_errors() -> None:
    field = Contraction()
    solver = Solver(method="dopri5", rtol=1e-2, atol=1e-2, gradient="adjoint", max_nfe=200_000)
    _, ys, _ = solver.integrate(field, torch.ones(2, 1).double(), 0.0, 1.0, tensors=tuple(field.parameters()))
    with pytest.raises(SolveError, match="backward") as caught:
        ys[-1].sum().backward()
    assert caught.value.method == "dopri5"


def test_an_assertion_of_the_users_own_field_stays_readable() -> None:
    def picky(t: Tensor, y: Tensor) -> Tensor:
        assert y.shape == (9, 9), "my own check"
        return y

    with pytest.raises((AssertionError, SolveError), match="my own check"):
        Solver().integrate(picky, torch.ones(2, 1), 0.0, 1.0)


def test_an_error_of_the_users_own_field_passes_through() -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Solver().integrate(broken, torch.ones(2, 1), 0.0, 1.0)
