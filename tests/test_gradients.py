"""The gradient modes of the stepper agree: through the steps, through their checkpoints, by the adjoint equation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Calls, Linear, Rotation, Sine, TimeScaled, Wave, flat_gradient
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pycnf import CNF, TPR, SolveError, Solver, SolveWarning, objective
from pycnf.solve import METHODS
from pycnf.stepper import Attempt, Watch

ADAPTIVE = [name for name, method in METHODS.items() if method.kind == "adaptive"]
STAGES = {"dopri8": 13, "dopri5": 6, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 1}  # new calls in a step
TIMES = [0.13, 0.4, 0.55, 0.9]
FLOWS: dict[str, Callable[[], CNF]] = {
    "perceptron": lambda: CNF(2, (10, 12, 8), blocks=2),
    "conditional": lambda: CNF(2, (10, 10), context=2),
    "gated by time": lambda: CNF(2, (8, 6), time="concatsquash"),
    "two probes": lambda: CNF(2, (8, 6), divergence="hutchinson-2"),
    "user's": lambda: CNF(2, field=Wave(2, 2), context=2),
}


def make_flow(name: str) -> CNF:
    """A flow in float64 that takes several steps."""
    torch.manual_seed(0)
    flow = FLOWS[name]().double()
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(2)
    return flow


def rough_field() -> Wave:
    """A field in float64 that takes several steps."""
    torch.manual_seed(3)
    field = Wave(width=8)
    for p in field.parameters():
        nn.init.normal_(p, std=1.5)
    return field


def differentiate(flow: CNF, **settings: Any) -> tuple[Tensor, Any]:
    """Gradient of an objective with TPR on both channels with respect to everything, and the statistics."""
    torch.manual_seed(1)
    x = torch.randn(20, 2).double().requires_grad_()
    context = torch.randn(20, 2).double().requires_grad_() if flow.context else None
    flow.solver = Solver(**settings)
    result = objective(flow, x, context, [TPR(weight=3.0, channels="both")])
    gradient = flat_gradient(result.loss, [*flow.parameters(), *((x,) if context is None else (x, context))])
    return gradient, result.solution.stats


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", ["dense", "exact"])
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("name", FLOWS)
def test_checkpoints_give_the_gradient_of_backpropagation(name: str, method: str, samples: str) -> None:
    flow = make_flow(name)
    settings = {"method": method, "rtol": 1e-3, "atol": 1e-3, "samples": samples}
    want, plain = differentiate(flow, **settings)
    got, stats = differentiate(flow, gradient="checkpoint", **settings)
    assert (stats.nfe, stats.accepted, stats.rejected) == (plain.nfe, plain.accepted, plain.rejected)
    assert plain.nfe_backward == 0
    assert stats.nfe_backward == STAGES[method] * stats.accepted
    torch.testing.assert_close(got, want, atol=1e-13 * float(want.abs().max()), rtol=1e-11)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_checkpoints_of_a_users_field(method: str, reverse: bool) -> None:
    """Every call of the backward pass is counted, rejected steps are not repeated, and steps may be watched."""
    calls = Calls(rough_field())
    parameters = tuple(calls.parameters())
    y0, weights = torch.randn(4, 2).double().requires_grad_(), torch.randn(6, 4, 2).double()
    t0, t1, times = (1.0, 0.0, TIMES[::-1]) if reverse else (0.0, 1.0, TIMES)
    found = []
    for gradient in ("backprop", "checkpoint"):
        solver = Solver(method=method, rtol=1e-3, atol=1e-3, first_step=1.0, gradient=gradient)  # type: ignore[arg-type]
        watch, before = Watch(), calls.count
        _, ys, stats = solver.integrate(calls, y0, t0, t1, times=times, tensors=parameters, watch=watch)
        assert watch.values is not None
        loss = (ys * weights).sum() + watch.values.pow(2).sum()
        found.append(flat_gradient(loss, [y0, *parameters]))
        assert stats.rejected > 0
        assert calls.count - before == stats.nfe + stats.nfe_backward
    assert stats.nfe_backward == STAGES[method] * stats.accepted
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-11)


def test_checkpoints_of_a_solve_that_the_budget_stopped() -> None:
    field, y0, found = rough_field(), torch.randn(4, 2).double(), []
    for gradient in ("backprop", "checkpoint"):
        solver = Solver(rtol=1e-9, atol=1e-9, max_nfe=50, on_budget="stop", gradient=gradient)  # type: ignore[arg-type]
        with pytest.warns(SolveWarning):
            _, ys, stats = solver.integrate(field, y0, 0.0, 1.0, times=TIMES, tensors=tuple(field.parameters()))
        found.append(flat_gradient(ys[-1].square().sum(), list(field.parameters())))
    assert stats.stopped
    assert stats.nfe_backward == 6 * stats.accepted > 0
    torch.testing.assert_close(found[1], found[0], atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_a_graph_that_is_retained_can_be_differentiated_again(gradient: str) -> None:
    field = rough_field()
    solver = Solver(gradient=gradient)  # type: ignore[arg-type]
    _, ys, _ = solver.integrate(field, torch.randn(4, 2).double(), 0.0, 1.0, tensors=tuple(field.parameters()))
    one, two = (torch.autograd.grad(ys[-1].sum(), list(field.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# --- memory ------------------------------------------------------------------------------------


def saved_bytes(gradient: str, tol: float) -> int:
    """Bytes that the graph of one solve of a user's field keeps for the backward pass."""
    field, kept = rough_field(), 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel() * x.element_size()
        return x

    solver = Solver(rtol=tol, atol=tol, gradient=gradient)  # type: ignore[arg-type]
    with saved_tensors_hooks(pack, lambda x: x):
        solver.integrate(field, torch.randn(50, 2).double(), 0.0, 1.0, tensors=tuple(field.parameters()))
    return kept


def test_only_backpropagation_keeps_the_graphs_of_the_stages() -> None:
    for gradient in ("checkpoint", "adjoint"):
        assert saved_bytes(gradient, 1e-3) == saved_bytes(gradient, 1e-9)
    assert saved_bytes("backprop", 1e-9) > 3 * saved_bytes("backprop", 1e-3) > 3 * saved_bytes("checkpoint", 1e-3)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_the_forward_pass_records_one_evaluation_alone(gradient: str) -> None:
    """That one shows whether gradients would be lost."""
    field, recorded = rough_field(), []

    def spy(t: Tensor, y: Tensor) -> Tensor:
        v = field(t, y)
        recorded.append(v.requires_grad)
        return v

    solver = Solver(gradient=gradient)  # type: ignore[arg-type]
    solver.integrate(spy, torch.randn(3, 2).double(), 0.0, 1.0, tensors=tuple(field.parameters()))
    assert recorded[0]
    assert not any(recorded[1:])
    with pytest.raises(ValueError, match="is no parameter of the field"):
        solver.integrate(spy, torch.randn(3, 2).double().requires_grad_(), 0.0, 1.0)


# --- the adjoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("samples", ["dense", "exact"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adjoint_error_falls_with_the_tolerance(method: str, samples: str, reverse: bool) -> None:
    """Against the closed form of a loss on the states at all times, and beside torchdiffeq's adjoint."""
    problem, weights = TimeScaled(), torch.randn(6, 5, 2).double()
    parameters = list(problem.parameters())
    t0, t1, inner = (1.0, 0.0, TIMES[::-1]) if reverse else (0.0, 1.0, TIMES)
    y0 = torch.randn(5, 2).double().requires_grad_()
    back = [problem.state(t, y0) / problem.state(t0, torch.ones_like(y0)) for t in (t0, *inner, t1)]
    want = flat_gradient((torch.stack(back).sin() * weights).sum(), [y0, *parameters])
    errors: dict[str, list[float]] = {"pycnf": [], "torchdiffeq": []}
    tolerances = (1e-2, 1e-4, 1e-6)
    for engine, found in errors.items():
        for tol in tolerances:
            solver = Solver(method=method, rtol=tol, atol=tol, samples=samples, gradient="adjoint", engine=engine)  # type: ignore[arg-type]
            _, ys, _ = solver.integrate(problem, y0, t0, t1, times=inner, tensors=parameters)
            got = flat_gradient((ys.sin() * weights).sum(), [y0, *parameters])
            found.append(float((got - want).norm() / want.norm()))
    for ours, theirs, tol in zip(*errors.values(), tolerances, strict=True):
        assert ours < 3 * theirs + 10 * tol
    assert errors["pycnf"][-1] < 1e-3


@pytest.mark.parametrize("norm", ["seminorm", "full"])
@pytest.mark.parametrize("name", FLOWS)
def test_adjoint_agrees_with_backpropagation_and_torchdiffeq(name: str, norm: str) -> None:
    flow = make_flow(name)
    settings = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9, "samples": "exact"}
    want, _ = differentiate(flow, **settings)
    for engine in ("pycnf", "torchdiffeq"):
        got, stats = differentiate(flow, gradient="adjoint", adjoint_norm=norm, engine=engine, **settings)
        torch.testing.assert_close(got, want, atol=1e-6 * float(want.abs().max()), rtol=0)
    assert stats.nfe_backward > 0


@pytest.mark.parametrize("times", [[0.5], [1e-9], [1 - 1e-9], [0.31, 0.32, 0.33, 0.34, 0.35, 0.36], TIMES], ids=str)
@pytest.mark.parametrize("tol", [1e-3, 1e-8])
@pytest.mark.parametrize("problem", [Linear(), Rotation(), Sine()], ids=lambda p: type(p).__name__)
def test_jumps_are_carried_to_tolerance(problem: Linear, tol: float, times: list[float]) -> None:
    """A loss on the sampled times alone, wherever they lie in the steps, and however near to each other."""
    y0, weights = problem.start(4).requires_grad_(), torch.randn(len(times), 4, problem.features).double()
    parameters = list(problem.parameters())
    exact = torch.stack([problem.state(t, y0) for t in times])
    want = flat_gradient((exact * weights).sum(), [y0, *parameters])
    solver = Solver(rtol=tol, atol=tol, gradient="adjoint")
    _, ys, _ = solver.integrate(problem, y0, 0.0, 1.0, times=times, tensors=parameters)
    got = flat_gradient((ys[1:-1] * weights).sum(), [y0, *parameters])
    assert float((got - want).norm()) < 100 * tol * float(want.norm()) + 1e-12


@pytest.mark.parametrize("method", ADAPTIVE)
def test_sampled_times_hardly_cost_backward_calls(method: str) -> None:
    """A penalty on two sampled times, small beside the loss at the end, as TPR's is."""
    field, y0 = rough_field(), torch.randn(100, 2).double()
    parameters = tuple(field.parameters())

    def count(times: list[float], engine: str = "pycnf") -> int:
        solver = Solver(method=method, rtol=1e-4, atol=1e-4, gradient="adjoint", engine=engine)  # type: ignore[arg-type]
        _, ys, stats = solver.integrate(field, y0, 0.0, 1.0, times=times, tensors=parameters)
        (ys[-1].square().sum() + 0.01 * ys[1:-1].square().sum()).backward()
        return stats.nfe_backward

    without = count([])
    draws = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)).sort(1).values.tolist()
    more = [count(times) / without - 1 for times in draws]
    assert 0 < max(more) <= 0.2
    assert (without - 1) % STAGES[method] == 0, "the first step is that of the forward solve: no call to choose it"
    assert without <= count([], "torchdiffeq")


def test_sampled_times_that_the_loss_does_not_use_cost_nothing() -> None:
    field, y0, calls = rough_field(), torch.randn(10, 2).double(), []
    for times in ([], TIMES):
        solver = Solver(gradient="adjoint")
        _, ys, stats = solver.integrate(field, y0, 0.0, 1.0, times=times, tensors=tuple(field.parameters()))
        ys[-1].square().sum().backward()
        calls.append(stats.nfe_backward)
    assert calls[0] == calls[1]


def test_exact_samples_end_a_backward_step_without_a_call() -> None:
    field, y0, visited = rough_field(), torch.randn(10, 2).double(), []

    def spy(t: Tensor, y: Tensor) -> Tensor:
        visited.append(float(t))
        return field(t, y)

    solver = Solver(samples="exact", gradient="adjoint")
    _, ys, stats = solver.integrate(spy, y0, 0.0, 1.0, times=TIMES, tensors=tuple(field.parameters()))
    visited.clear()
    ys.square().sum().backward()
    assert set(TIMES) | {0.0, 1.0} <= set(visited)
    assert len(visited) == stats.nfe_backward
    assert (stats.nfe_backward - 1) % 6 == 0


def test_adjoint_of_a_field_without_parameters() -> None:
    y0 = torch.ones(2, 1).double().requires_grad_()
    solver = Solver(rtol=1e-9, atol=1e-9, gradient="adjoint")
    _, ys, _ = solver.integrate(lambda t, y: -y, y0, 0.0, 1.0, times=[0.5])
    (gradient,) = torch.autograd.grad((ys[1] + ys[2]).sum(), y0)
    torch.testing.assert_close(gradient, torch.full_like(y0, math.exp(-0.5) + math.exp(-1)), atol=1e-8, rtol=0)


def test_adjoint_takes_steps_as_small_as_the_smallest_whatever_their_error() -> None:
    field = rough_field()
    solver = Solver(rtol=1e-13, atol=1e-13, min_step=0.05, max_nfe=400, gradient="adjoint")
    _, ys, stats = solver.integrate(
        field, torch.randn(4, 2).double(), 0.0, 1.0, times=TIMES, tensors=tuple(field.parameters())
    )
    ys.sum().backward()
    assert stats.nfe_backward <= 1 + 6 * 2 * 21 + 2 * 2 * len(TIMES)


# --- failures and settings ---------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_parameters_that_changed_before_the_backward_pass_are_noticed(gradient: str) -> None:
    field = rough_field()
    solver = Solver(gradient=gradient)  # type: ignore[arg-type]
    _, ys, _ = solver.integrate(field, torch.randn(4, 2).double(), 0.0, 1.0, tensors=tuple(field.parameters()))
    with torch.no_grad():
        field.inner.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys[-1].sum().backward()


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_second_derivatives_are_refused(gradient: str) -> None:
    y0 = torch.randn(4, 2).double().requires_grad_()
    _, ys, _ = Solver(gradient=gradient).integrate(lambda t, y: -y.sin(), y0, 0.0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(ys[-1].sum(), y0, create_graph=True)


class LateNaN(Wave):
    """A field that the forward solve leaves whole and the backward pass finds broken."""

    broken = False

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        v = super().forward(t, z)
        return v * math.nan if self.broken and float(t) < 0.5 else v


@pytest.mark.parametrize("times", [[], [0.45]], ids=["a step", "a jump"])
def test_an_adjoint_that_meets_nan_says_where_and_why(times: list[float]) -> None:
    field = LateNaN()
    _, ys, stats = Solver(gradient="adjoint").integrate(
        field, torch.randn(4, 2).double(), 0.0, 1.0, times=times, tensors=tuple(field.parameters())
    )
    field.broken = True
    with pytest.raises(SolveError, match=r"adjoint's backward solve, the field returns NaN.*'checkpoint'") as caught:
        ys.sum().backward()
    assert 0 <= caught.value.t <= 1
    assert caught.value.nfe == stats.nfe_backward > 0


def test_an_error_of_the_users_field_passes_through_the_adjoint() -> None:
    class Broken(Wave):
        def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
            if self.outer.weight.grad is not None:
                raise KeyError("mine")
            return super().forward(t, z)

    field = Broken()
    _, ys, stats = Solver(gradient="adjoint").integrate(
        field, torch.randn(4, 2).double(), 0.0, 1.0, tensors=tuple(field.parameters())
    )
    field.outer.weight.grad = torch.zeros_like(field.outer.weight)
    with pytest.raises(KeyError, match="mine"):
        ys.sum().backward()
    assert stats.nfe_backward == 1


def test_steps_show_themselves_to_checkpoints_and_not_to_the_adjoint() -> None:
    field, seen = rough_field(), []

    def integrate(gradient: str, observer: Callable[[Attempt], None] | None, watch: Watch | None) -> Any:
        solver = Solver(gradient=gradient)  # type: ignore[arg-type]
        y0 = torch.randn(4, 2).double().requires_grad_()
        return solver.integrate(field, y0, 0.0, 1.0, tensors=tuple(field.parameters()), observer=observer, watch=watch)

    _, _, stats = integrate("checkpoint", seen.append, None)
    assert len(seen) == stats.accepted + stats.rejected
    for shown in ((seen.append, None), (None, Watch())):
        with pytest.raises(ValueError, match="gradient='backprop' or 'checkpoint' shows its steps"):
            integrate("adjoint", *shown)


@pytest.mark.parametrize(
    "settings", [{"method": "rk4", "n_steps": 3}, {"engine": "torchdiffeq"}, {"method": "scipy_solver"}], ids=str
)
def test_checkpoints_need_steps_of_pycnf(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gradient='checkpoint' needs an adaptive method and engine='pycnf'"):
        Solver(gradient="checkpoint", **settings)
