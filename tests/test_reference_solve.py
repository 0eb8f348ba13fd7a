"""Truths about reference solves: they agree with closed forms, with each other and with tight solves of pycnf."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from problems import PROBLEMS, Problem, Rotation, Wave, as_flow, small_flow, start_julia
from torch import Tensor, nn

from pycnf import CNF, MLP, FlowSolution, Solution, SolveError, Solver, fit, reference
from pycnf.data import load
from pycnf.fields import ACTIVATIONS
from pycnf.julia import JULIA_METHODS, shared_worker
from pycnf.reference import ClosedForm, choose_backend, describe_problem, julia_local_errors, reference_solve

TIGHT = Solver(method="dopri8", rtol=1e-12, atol=1e-12, samples="exact")
TIMES = [0.2, 0.7]


@pytest.fixture(scope="module")
def julia() -> Iterator[None]:
    """Julia, or the reason why it is not there; PYCNF_REQUIRE_JULIA=1 makes its absence a failure."""
    start_julia()
    yield
    shared_worker().close()


@pytest.fixture(scope="module", params=["moons", "power"])
def trained(request: pytest.FixtureRequest) -> tuple[CNF, Tensor]:
    """A flow after some training, in double precision, and rows of its data."""
    torch.manual_seed(0)
    data = load(request.param)
    flow = CNF(data.features, hidden=(32, 32), T=0.5 if request.param == "moons" else 1.0)
    fit(flow, data.train[:5000], max_steps=60, batch_size=250, lr=5e-3, progress=False)
    return flow.double().eval(), data.test[:24].double()


class Closed(nn.Module):
    """A problem that offers its closed form."""

    features = 2

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem, self.features = problem, problem.features

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.problem(t, z)

    def closed_form(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.problem.state(float(t), z), self.problem.logp(float(t), z)


# --- closed forms and SciPy ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["DOP853", "Radau", "LSODA"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_scipy_reaches_the_closed_form(name: str, method: str) -> None:
    problem = PROBLEMS[name]()
    start = problem.start()
    exact = reference_solve(Closed(problem), start, times=TIMES, backend="closed-form")
    tol = 1e-13 if method == "DOP853" else 1e-9
    found = reference_solve(problem, start, times=TIMES, backend="scipy", method=method, rtol=tol, atol=tol)
    for solution in (exact, found):
        assert isinstance(solution, Solution)
        assert solution.ts.tolist() == [0.0, *TIMES, 1.0]
        assert solution.z.dtype == torch.float64
        assert not solution.z.requires_grad
    bound = 1e-11 if method == "DOP853" else 1e-6
    torch.testing.assert_close(found.z, exact.z, atol=bound, rtol=0)
    torch.testing.assert_close(found.logp, exact.logp, atol=bound, rtol=0)
    assert found.stats.nfe > 0


@pytest.mark.parametrize("name", PROBLEMS)
def test_scipy_there_and_back(name: str) -> None:
    problem = PROBLEMS[name]()
    start = problem.start()
    there = reference_solve(problem, start, times=TIMES, backend="scipy")
    back = reference_solve(problem, there.z[-1], times=TIMES, backend="scipy", reverse=True)
    assert back.ts.tolist() == [1.0, *TIMES[::-1], 0.0]
    torch.testing.assert_close(back.z, there.z.flip(0), atol=1e-11, rtol=0)
    assert there.logp is not None
    torch.testing.assert_close(back.logp[-1], -there.logp[-1], atol=1e-11, rtol=0)


def test_counts_of_scipy_are_those_of_a_wrapper() -> None:
    class Counted(Rotation):
        calls = 0

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            Counted.calls += 1
            return super().forward(t, z)

    field = Counted()
    found = reference_solve(field, field.start(), backend="scipy", method="RK45", rtol=1e-6, atol=1e-6)
    assert found.stats.nfe == Counted.calls
    assert found.stats.nfe == 2 + 6 * (found.stats.accepted + found.stats.rejected)
    assert 0 < found.stats.min_step <= found.stats.max_step <= 1


def test_a_context_is_passed_on() -> None:
    field, x, context = Wave(2, context=3), torch.randn(4, 5, 2).double(), torch.randn(3).double()
    one = reference_solve(field, x, context=context, backend="scipy")
    flow = CNF(2, context=3, field=field).eval()
    two = flow.solve(x, context, solver=TIGHT)
    assert one.z.shape == (2, 4, 5, 2)
    assert one.logp.shape == (2, 4, 5)
    torch.testing.assert_close(one.z[-1], two.z, atol=1e-11, rtol=0)
    torch.testing.assert_close(one.logp[-1], two.logp, atol=1e-11, rtol=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_flow_gives_what_its_own_solve_gives(reverse: bool) -> None:
    flow = small_flow(2, blocks=3, T=0.8, time="concatsquash").eval()
    x = torch.randn(6, 2, dtype=torch.float64)
    want = flow.solve(x, times=TIMES, reverse=reverse, solver=TIGHT)
    found = reference_solve(flow, x, times=TIMES, reverse=reverse, backend="scipy")
    assert isinstance(found, FlowSolution)
    assert found.reverse == reverse
    for a, b in zip(found.blocks, want.blocks, strict=True):
        assert a.ts.tolist() == b.ts.tolist()
        torch.testing.assert_close(a.z, b.z, atol=1e-11, rtol=0)
        torch.testing.assert_close(a.logp, b.logp, atol=1e-11, rtol=0)
    torch.testing.assert_close(found.log_prob, want.log_prob, atol=1e-11, rtol=0)


def test_trained_flows_agree_with_scipy(trained: tuple[CNF, Tensor]) -> None:
    flow, x = trained
    inner = [0.25 * flow.T, 0.5 * flow.T]
    (found,) = reference_solve(flow, x, times=inner, backend="scipy", method="DOP853").blocks
    with torch.no_grad():
        (want,) = flow.solve(x, times=inner, solver=TIGHT).blocks
    torch.testing.assert_close(want.z, found.z, atol=1e-9, rtol=0)
    torch.testing.assert_close(want.logp, found.logp, atol=1e-9, rtol=0)


def test_the_weights_are_left_as_they_are() -> None:
    flow = CNF(2, (8,))
    x = torch.randn(3, 2)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    found = reference_solve(flow, x, backend="scipy")
    assert found.z.dtype == torch.float64
    assert flow.training
    for name, parameter in flow.named_parameters():
        assert parameter.requires_grad
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])


def test_a_field_that_blows_up_is_told() -> None:
    class Explosion(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return z**2

    with pytest.raises(SolveError, match=r"SciPy's DOP853 failed at t = 1 .*Required step size") as caught:
        reference_solve(Explosion(), torch.ones(1, 1), T=2.0, backend="scipy")
    assert caught.value.nfe > 0


# --- straight lines and parabolas (one step of every explicit method) ----------------------------


class Polynomial(nn.Module):
    """Trajectories z(t) = (I + t A + t^2 B) z0: straight lines at constant speed for B = 0, else parabolas."""

    def __init__(self, curvature: float) -> None:
        super().__init__()
        a = torch.tensor([[0.6, -0.8], [0.5, 0.3]], dtype=torch.float64)
        b = torch.tensor([[0.4, 0.3], [-0.6, 0.5]], dtype=torch.float64)
        self.register_buffer("a", a)
        self.register_buffer("b", curvature * b)

    def matrix(self, t: Tensor) -> Tensor:
        return torch.eye(2, dtype=torch.float64) + t * self.a + t**2 * self.b

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        start = torch.linalg.solve(self.matrix(t), z.t())
        return ((self.a + 2 * t * self.b) @ start).t()

    def closed_form(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return z @ self.matrix(t).t(), -torch.linalg.slogdet(self.matrix(t))[1].expand(len(z))


ONE_STEP = {
    **{name: Solver(method=name, n_steps=1) for name in ("euler", "midpoint", "heun2", "heun3", "rk4")},
    **{
        name: Solver(method=name, first_step=1.0, min_step=1.0)
        for name in ("adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8")
    },
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_is_exact_on_straight_lines_and_not_on_parabolas(name: str) -> None:
    start = torch.randn(8, 2, dtype=torch.float64)
    error = {}
    for curvature in (0.0, 1.0):
        field = Polynomial(curvature)
        exact = reference_solve(field, start)
        assert choose_backend(field) == "closed-form"
        _, ys, stats = ONE_STEP[name].integrate(field, start, 0.0, 1.0)
        assert stats.accepted == 1
        error[curvature] = float((ys[-1] - exact.z[-1]).abs().max())
    assert error[0.0] < 1e-14, "every stage sees the same velocity"
    assert error[1.0] > 1e-8, "the stages leave the trajectory"


def test_the_polynomial_fields_solve_their_equations() -> None:
    for curvature in (0.0, 1.0):
        field, start = Polynomial(curvature), torch.randn(5, 2, dtype=torch.float64)
        found, exact = reference_solve(field, start, backend="scipy"), reference_solve(field, start)
        torch.testing.assert_close(found.z, exact.z, atol=1e-11, rtol=0)
        torch.testing.assert_close(found.logp, exact.logp, atol=1e-11, rtol=0)


# --- backends and arguments ----------------------------------------------------------------------


def test_the_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Rotation()
    assert isinstance(Closed(problem), ClosedForm)
    assert choose_backend(Closed(problem)) == "closed-form"
    assert choose_backend(Closed(problem), reverse=True) == "scipy"
    assert choose_backend(problem) == "scipy"
    for there, backend in ((True, "julia"), (False, "scipy")):
        monkeypatch.setattr(reference, "_julia_is_there", lambda there=there: there)
        assert choose_backend(MLP(2)) == backend
        assert choose_backend(CNF(2, blocks=2)) == backend
        assert choose_backend(problem) == "scipy"
        assert choose_backend(as_flow(Closed(problem), TIGHT)) == "closed-form"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "matlab"}, "unknown backend 'matlab': choose one of auto, closed-form, scipy, julia"),
        ({"backend": "closed-form"}, r"no closed form: the field has no method closed_form\(t, z\)"),
        ({"backend": "scipy", "method": "Vern9"}, "unknown method 'Vern9' of scipy: choose one of DOP853, Radau"),
        ({"backend": "scipy", "rtol": 0.0}, "expected a finite rtol > 0, got 0"),
        ({"backend": "scipy", "times": [0.5, 0.2]}, r"increasing times strictly between 0 and 1, got \[0.5, 0.2\]"),
        ({"backend": "scipy", "times": [0.5, 1.0]}, "strictly between 0 and 1"),
        ({"backend": "scipy", "T": -1.0}, "strictly between 0 and -1"),
    ],
)
def test_impossible_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference_solve(MLP(2), torch.zeros(3, 2), **arguments)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("target", "x", "context", "message"),
    [
        (MLP(2), torch.zeros(3, 4), None, r"expected states of shape \(\*, 2\), at least one, got \(3, 4\)"),
        (CNF(2), torch.zeros(0, 2), None, r"expected states of shape \(\*, 2\), at least one, got \(0, 2\)"),
        (MLP(2, context=3), torch.zeros(3, 2), None, "expected a context of size 3"),
        (MLP(2), torch.zeros(3, 2), torch.zeros(3, 1), r"expected a context of size 0 \(0: none\), got 1"),
        (MLP(2), torch.full((3, 2), torch.nan), None, "NaN or infinity"),
    ],
)
def test_impossible_states(target: nn.Module, x: Tensor, context: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference_solve(target, x, context=context, backend="scipy")


def test_julia_evaluates_the_shipped_field_only() -> None:
    with pytest.raises(ValueError, match=r"Julia evaluates pycnf\.fields\.MLP only.*backend='scipy'"):
        reference_solve(Rotation(), torch.zeros(1, 2), backend="julia")
    with pytest.raises(ValueError, match="a flow has its own end time"):
        reference_solve(CNF(2), torch.zeros(1, 2), T=2.0)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="a closed form has no method"):
        reference_solve(Closed(Rotation()), torch.zeros(1, 2), method="DOP853")


# --- what Julia is told --------------------------------------------------------------------------


def velocity_and_divergence(
    about: dict[str, str], arrays: dict[str, np.ndarray], t: float
) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate a described problem as the Julia package does, column by column, from the description alone."""

    def sigmoid(a: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-a))

    activations = {
        "tanh": (np.tanh, lambda a: 1 - np.tanh(a) ** 2),
        "softplus": (lambda a: np.logaddexp(a, 0), sigmoid),
        "sigmoid": (sigmoid, lambda a: sigmoid(a) * (1 - sigmoid(a))),
        "silu": (lambda a: a * sigmoid(a), lambda a: sigmoid(a) * (1 + a * (1 - sigmoid(a)))),
        "sin": (np.sin, np.cos),
    }
    value, slope = activations[about["activation"]]
    flat, sizes, h = arrays["parameters"], arrays["sizes"].tolist(), arrays["inputs"]
    d, used, jacobian = sizes[-1], 0, None
    for index, (n, m) in enumerate(itertools.pairwise(sizes)):

        def take(count: int) -> np.ndarray:
            nonlocal used
            used += count
            return flat[used - count : used]

        w, b = take(n * m).reshape(m, n), take(m)
        if about["time"] == "concat":
            b = b + t * take(m)
        elif about["time"] == "concatsquash":
            gate = sigmoid(t * take(m) + take(m))
            w, b = gate[:, None] * w, gate * b + t * take(m)
        if index:
            jacobian = np.einsum("mn,nbd->mbd", w, jacobian * slope(a)[:, :, None])  # noqa: F821
            h = value(a)  # noqa: F821
        else:
            jacobian = np.repeat(w[:, None, :d], h.shape[1], axis=1)
        a = w @ h + b[:, None]
    assert used == len(flat)
    return a, np.einsum("dbd->b", jacobian)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("time", ["none", "concat", "concatsquash"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_description_determines_the_field(activation: str, time: str, context: int) -> None:
    field = MLP(3, (6, 5), context=context, activation=activation, time=time).double()  # type: ignore[arg-type]
    z = torch.randn(4, 3, dtype=torch.float64)
    given = torch.randn(4, context, dtype=torch.float64) if context else None
    about, arrays = describe_problem(field, z, given)
    assert set(about) == {"activation", "time"}
    assert arrays["sizes"].tolist() == [3 + context, 6, 5, 3]
    assert arrays["inputs"].shape == (3 + context, 4)
    v, div = velocity_and_divergence(about, arrays, 0.3)
    from pycnf import Exact

    want, trace = Exact("reverse").bind(field, z, given)(torch.tensor(0.3, dtype=torch.float64), z)
    np.testing.assert_allclose(v.T, want.detach(), atol=1e-13)
    np.testing.assert_allclose(div, trace.detach(), atol=1e-13)


def test_other_fields_cannot_be_described() -> None:
    with pytest.raises(ValueError, match=r"expected a pycnf\.fields\.MLP, got Rotation"):
        describe_problem(Rotation(), torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"field": Rotation()}, r"expected a pycnf\.fields\.MLP, got Rotation"),
        ({"method": "dopri5"}, "unknown method 'dopri5' of julia: choose one of Tsit5"),
        ({"atol": -1.0}, "expected a finite atol > 0, got -1"),
        ({"T": 0.0}, "expected a finite T > 0, got 0"),
        ({"x": torch.zeros(3, 4)}, r"expected states of shape \(\*, 2\)"),
    ],
)
def test_impossible_local_errors_are_told_before_julia_starts(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        julia_local_errors(**{"field": MLP(2), "x": torch.zeros(3, 2)} | arguments)
    assert not shared_worker().running


# --- Julia ---------------------------------------------------------------------------------------


@pytest.mark.julia
@pytest.mark.usefixtures("julia")
def test_three_implementations_agree_on_trained_flows(trained: tuple[CNF, Tensor]) -> None:
    flow, x = trained
    inner = [0.25 * flow.T, 0.5 * flow.T]
    (vern9,) = reference_solve(flow, x, times=inner, backend="julia", rtol=1e-12, atol=1e-12).blocks
    (dop853,) = reference_solve(flow, x, times=inner, backend="scipy").blocks
    with torch.no_grad():
        (dopri8,) = flow.solve(x, times=inner, solver=TIGHT).blocks
    for other in (dop853, dopri8):
        assert vern9.ts.tolist() == other.ts.tolist()
        torch.testing.assert_close(vern9.z, other.z, atol=1e-9, rtol=0)
        torch.testing.assert_close(vern9.logp, other.logp, atol=1e-9, rtol=0)


@pytest.mark.julia
@pytest.mark.usefixtures("julia")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("time", ["none", "concat", "concatsquash"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_julia_evaluates_every_shipped_field(activation: str, time: str, context: int, reverse: bool) -> None:
    flow = CNF(2, (6, 5), blocks=2, context=context, activation=activation, time=time).double()  # type: ignore[arg-type]
    x = torch.randn(5, 2, dtype=torch.float64)
    given = torch.randn(5, context, dtype=torch.float64) if context else None
    found = reference_solve(flow, x, TIMES, context=given, reverse=reverse, backend="julia")
    want = reference_solve(flow, x, TIMES, context=given, reverse=reverse, backend="scipy")
    for a, b in zip(found.blocks, want.blocks, strict=True):
        torch.testing.assert_close(a.z, b.z, atol=1e-10, rtol=0)
        torch.testing.assert_close(a.logp, b.logp, atol=1e-10, rtol=0)


@pytest.mark.julia
@pytest.mark.usefixtures("julia")
@pytest.mark.parametrize("method", JULIA_METHODS)
def test_methods_of_julia(method: str) -> None:
    field, x = MLP(2, (8, 8)).double(), torch.randn(4, 2, dtype=torch.float64)
    truth = reference_solve(field, x, backend="scipy")
    costs = []
    for tol in (1e-4, 1e-8):
        found = reference_solve(field, x, backend="julia", method=method, rtol=tol, atol=tol)
        assert float((found.z[-1] - truth.z[-1]).abs().max()) < 1e3 * tol
        assert found.stats.accepted > 0
        costs.append(found.stats.nfe)
    assert 0 < costs[0] < costs[1]


@pytest.mark.julia
@pytest.mark.usefixtures("julia")
def test_local_errors_from_julia() -> None:
    field, x = MLP(2, (8, 8)).double(), torch.randn(4, 2, dtype=torch.float64)
    straight = MLP(2, (4,), time="none").double()
    with torch.no_grad():
        straight.layers[1].weight.zero_()  # type: ignore[operator, union-attr]
    largest = []
    for v in (field, straight):
        found = julia_local_errors(v, x)
        steps = len(found.h)
        assert found.z.shape == (steps, 4, 2)
        assert found.logp.shape == (steps, 4)
        assert float(found.h.sum()) == pytest.approx(1.0)
        largest.append(float(found.z.abs().max()))
    assert largest[0] > 1e-12
    assert largest[1] < 1e-14
