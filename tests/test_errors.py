"""Bad input and failing solves: each gives one clear message of the right type."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from problems import Sine, Wave
from torch import Tensor, nn

from pycnf import CNF, TPR, SolveError, Solver, objective
from pycnf.solve import METHODS

NAN, INF = math.nan, math.inf


@pytest.fixture
def flow() -> CNF:
    return CNF(3, hidden=(4,))


@pytest.fixture
def conditional() -> CNF:
    return CNF(3, hidden=(4,), context=2)


# --- states ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((128, 2), r"expected states of shape \(\*, 3\), .*got \(128, 2\)"),
        ((128, 4), r"expected states of shape \(\*, 3\), .*got \(128, 4\)"),
        ((5,), r"expected states of shape \(\*, 3\), .*got \(5,\)"),
        ((), r"expected states of shape \(\*, 3\), .*got \(\)"),
        ((0, 3), r"at least one, got \(0, 3\)"),
        ((4, 0, 3), r"at least one, got \(4, 0, 3\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["solve", "log_prob", "objective"])
def test_wrong_shapes(flow: CNF, call: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(flow, call, torch.zeros(shape))


def use(flow: CNF, call: str, x: Tensor) -> object:
    """Give states to a flow in one of the ways there are."""
    if call == "solve":
        return flow.solve(x)
    return flow().log_prob(x) if call == "log_prob" else objective(flow, x)


@pytest.mark.parametrize("call", ["solve", "log_prob", "objective"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_rows(flow: CNF, call: str, bad: float) -> None:
    x = torch.randn(10, 3)
    x[2, 1] = x[7, 0] = x[7, 2] = bad
    with pytest.raises(ValueError, match="2 of 10 states hold NaN or infinity"):
        use(flow, call, x)


@pytest.mark.parametrize(
    ("flow_dtype", "dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.int64),
        (torch.float32, torch.bool),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_wrong_dtypes(flow: CNF, flow_dtype: torch.dtype, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"expected {flow_dtype} like the flow's parameters, got {dtype}"):
        flow.to(flow_dtype).solve(torch.ones(4, 3, dtype=dtype))


def test_integers_for_a_flow_without_parameters() -> None:
    class Decay(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return -z

    with pytest.raises(ValueError, match=r"torch\.int64"):
        CNF(2, field=Decay()).solve(torch.ones(4, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 3)), [[0.0, 0.0, 0.0]], None, "data"], ids=["array", "list", "None", "text"]
)
def test_states_that_are_no_tensor(flow: CNF, wrong: object) -> None:
    with pytest.raises((TypeError, ValueError), match="tensor"):
        flow.solve(wrong)  # type: ignore[arg-type]


# --- contexts ----------------------------------------------------------------------------------


def test_context_for_a_flow_without(flow: CNF) -> None:
    with pytest.raises(ValueError, match="takes no context"):
        flow(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="takes no context"):
        flow.solve(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="takes no context"):
        objective(flow, torch.zeros(4, 3), torch.zeros(4, 2))


def test_missing_context(conditional: CNF) -> None:
    message = r"expected a context of shape \(\*, 2\), got None"
    with pytest.raises(ValueError, match=message):
        conditional()
    with pytest.raises(ValueError, match=message):
        conditional.solve(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=message):
        objective(conditional, torch.zeros(4, 3))


@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (2, 5), ()], ids=str)
def test_context_of_the_wrong_size(conditional: CNF, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a context of shape \(\*, 2\), got \("):
        conditional(torch.zeros(shape))


def test_context_for_another_batch(conditional: CNF) -> None:
    with pytest.raises(ValueError, match=r"context.*\(5, 2\)"):
        conditional.solve(torch.zeros(4, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"context|broadcast|shape"):
        conditional(torch.zeros(5, 2)).log_prob(torch.zeros(4, 3))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_context(conditional: CNF, bad: float) -> None:
    context = torch.zeros(4, 2)
    context[1, 0] = bad
    with pytest.raises(ValueError, match=r"context.* NaN or infinity"):
        conditional.solve(torch.zeros(4, 3), context)


def test_context_of_the_wrong_dtype(conditional: CNF) -> None:
    with pytest.raises(ValueError, match=r"context.*torch\.float64|torch\.float64.*context"):
        conditional.solve(torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.float64))


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtol", "atol", "adjoint_rtol", "adjoint_atol"])
@pytest.mark.parametrize("value", [0.0, -1e-5, NAN, INF])
def test_impossible_tolerances(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Solver(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=name):
        CNF(2, solver={name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dopri6"}, "unknown method 'dopri6': choose one of dopri8, dopri5"),
        ({"method": "tsit5"}, "unknown method 'tsit5'"),
        ({"gradient": "magic"}, "unknown gradient 'magic': choose one of backprop, adjoint"),
        ({"samples": "some"}, "unknown samples 'some': choose one of dense, exact"),
        ({"on_budget": "warn"}, "unknown on_budget 'warn': choose one of error, stop"),
        ({"adjoint_norm": "half"}, "unknown adjoint_norm 'half': choose one of seminorm, full"),
        ({"first_step": 0.0}, "first_step > 0"),
        ({"max_step": 0.0}, "max_step > 0"),
        ({"max_step": NAN}, "max_step > 0"),
        ({"min_step": -0.1}, "0 <= min_step <= max_step"),
        ({"min_step": NAN}, "0 <= min_step <= max_step"),
        ({"min_step": 0.2, "max_step": 0.1}, "0 <= min_step <= max_step"),
        ({"max_nfe": 0}, "max_nfe >= 1"),
        ({"max_nfe": -3}, "max_nfe >= 1"),
        ({"method": "rk4"}, "'rk4' takes equal steps: give n_steps >= 1, got None"),
        ({"method": "rk4", "n_steps": 0}, "give n_steps >= 1, got 0"),
        ({"method": "dopri5", "n_steps": 10}, "'dopri5' chooses its own steps: leave n_steps out.*rk4"),
        ({"gradient": "adjoint", "on_budget": "stop"}, "on_budget='stop' needs gradient='backprop'"),
        ({"engine": "steam"}, "unknown engine 'steam': choose one of pycnf, torchdiffeq"),
        ({"method": "explicit_adams", "n_steps": 10, "samples": "exact"}, "needs equal steps"),
    ],
    ids=str,
)
def test_impossible_solvers(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Solver(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        CNF(2, eval_solver=settings)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.kind == "fixed"])
def test_fixed_methods_need_a_number_of_steps(method: str) -> None:
    with pytest.raises(ValueError, match="n_steps"):
        Solver(method=method)


def test_unknown_setting() -> None:
    with pytest.raises(TypeError, match="tolerance"):
        Solver(tolerance=1e-4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "features >= 1"),
        ({"features": 2, "blocks": 0}, "blocks >= 1"),
        ({"features": 2, "context": -1}, "context >= 0"),
        ({"features": 2, "hidden": ()}, "hidden widths >= 1"),
        ({"features": 2, "hidden": (0,)}, "hidden widths >= 1"),
        ({"features": 2, "T": 0.0}, "end time T > 0, got 0"),
        ({"features": 2, "T": -1.0}, "end time T > 0"),
        ({"features": 2, "T": NAN}, "end time T > 0"),
        ({"features": 2, "T": INF}, "end time T > 0"),
        ({"features": 2, "activation": "gelu"}, "unknown activation 'gelu': choose one of"),
        ({"features": 2, "time": "late"}, "unknown time conditioning 'late': choose one of"),
        ({"features": 2, "divergence": "some"}, "unknown divergence 'some': choose exact"),
        ({"features": 2, "eval_divergence": "some"}, "unknown divergence 'some': choose exact"),
        ({"features": 2, "divergence": "hutchinson-0"}, "probes >= 1"),
        ({"features": 3, "field": Sine(), "blocks": 2}, r"2 torch.nn.Module\(s\), one a block, got 1"),
        ({"features": 3, "field": [Sine()] * 3, "blocks": 2}, r"2 torch.nn.Module\(s\), one a block, got 3"),
        ({"features": 3, "field": lambda: "no module"}, "torch.nn.Module"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_impossible_flows(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CNF(**settings)  # type: ignore[arg-type]


def test_degree_that_interpolates() -> None:
    with pytest.raises(ValueError, match="degree 3 interpolates the 4 sampled states"):
        TPR(degree=3, times=2)


def test_something_that_is_no_regularizer(flow: CNF) -> None:
    with pytest.raises(TypeError, match="expected regularizers such as TPR"):
        objective(flow, torch.zeros(4, 3), regularizers=["tpr"])  # type: ignore[list-item]


# --- times -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "times",
    [
        [0.5, 0.25],
        [0.25, 0.25],
        [-0.5],
        [0.0, 0.5],
        [0.5, 1.0],
        [1.5],
        [NAN],
        [0.2, NAN, 0.4],
    ],
    ids=str,
)
def test_impossible_times(flow: CNF, times: list[float], reverse: bool) -> None:
    with pytest.raises(ValueError, match="expected times in order strictly between"):
        flow.solve(torch.zeros(4, 3), times=times, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("times", [[[0.1, 0.2]], 0.5], ids=str)
def test_times_of_the_wrong_shape(flow: CNF, times: object, reverse: bool) -> None:
    with pytest.raises(ValueError, match=r"times of shape \(K,\)"):
        flow.solve(torch.zeros(4, 3), times=times, reverse=reverse)  # type: ignore[arg-type]


def test_no_times_are_no_error(flow: CNF) -> None:
    assert len(flow.solve(torch.zeros(4, 3), times=[]).blocks[0].ts) == 2


@pytest.mark.parametrize(("t0", "t1"), [(0.5, 0.5), (0.0, NAN), (0.0, INF)])
def test_impossible_ends(t0: float, t1: float) -> None:
    with pytest.raises(ValueError, match="two different finite end times"):
        Solver().integrate(lambda t, y: y, torch.ones(2, 1), t0, t1)


# --- fields ------------------------------------------------------------------------------------


class Returns(nn.Module):
    """A field that returns whatever a function makes of z."""

    def __init__(self, make: object) -> None:
        super().__init__()
        self.make = make

    def forward(self, t: Tensor, z: Tensor) -> object:
        return self.make(z) if callable(self.make) else self.make


WRONG = {
    "a column too few": (lambda z: z[:, :-1], r"shaped like z, \(4, 3\), got \(4, 2\)"),
    "a column too many": (
        lambda z: torch.cat([z, z[:, :1]], dim=1),
        r"shaped like z, \(4, 3\), got \(4, 4\)",
    ),
    "one row": (lambda z: z[:1], r"shaped like z, \(4, 3\), got \(1, 3\)"),
    "one number a row": (lambda z: z.sum(1), r"shaped like z, \(4, 3\), got \(4,\)"),
    "None": (None, "shaped like z, .*got NoneType"),
    "a pair": (lambda z: (z, z), "shaped like z, .*got tuple"),
    "a number": (0.5, "shaped like z, .*got float"),
}


@pytest.mark.parametrize("divergence", ["exact", "exact-reverse", "hutchinson", None])
@pytest.mark.parametrize("what", WRONG)
def test_fields_that_return_something_else(what: str, divergence: str | None) -> None:
    make, message = WRONG[what]
    flow = CNF(3, field=Returns(make))
    with pytest.raises(ValueError, match=message):
        flow.solve(torch.zeros(4, 3), divergence=divergence, density=divergence is not None)


def test_perceptron_for_another_dimension() -> None:
    flow = CNF(3, field=Wave(2)).double()
    with pytest.raises((ValueError, RuntimeError)):
        flow.solve(torch.zeros(4, 3).double())


class Explosion(nn.Module):
    """v = z^2 blows up at t = 1 / z0."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z.square()


class Missing(nn.Module):
    """v = NaN from some time on."""

    def __init__(self, since: float) -> None:
        super().__init__()
        self.since = since

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.where(t >= self.since, NAN, 1.0) * z


class Jump(nn.Module):
    """From t = 1/2 on, a push towards 0 from both sides, too hard for any step to cross."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.where(t > 0.5, -1e14, 0.0) * torch.sign(z)


FAILING = {
    "explodes": (Explosion(), "blown up|non-finite|underflow", 0.0, 0.51),
    "is NaN": (Missing(0.0), "NaN", 0.0, 0.0),
    "is NaN later": (Missing(0.5), "NaN", 0.0, 0.5),
    "is discontinuous": (Jump(), "discontinuous|stiff", 0.4, 0.6),
}


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("what", FAILING)
def test_failing_solves(what: str, method: str) -> None:
    field, cause, earliest, latest = FAILING[what]
    flow = CNF(2, field=field, eval_solver=Solver(method=method, max_nfe=6000)).eval()
    with pytest.raises(SolveError, match=cause) as caught:
        flow().log_prob(torch.full((4, 2), 2.0).double())
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert error.method == method
    assert earliest <= error.t <= latest
    assert error.nfe > 0
    message = str(error)
    assert message.startswith(f"{method} failed at t = ")
    assert "Try: " in message
    assert "\n" not in message
    assert len(message) < 500
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.method, copy.t, copy.nfe) == (message, method, error.t, error.nfe)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_failing_objective(gradient: str) -> None:
    flow = CNF(2, field=Wave(), solver=Solver(max_nfe=5, gradient=gradient))  # type: ignore[arg-type]
    with pytest.raises(SolveError, match=r"the budget of max_nfe = 5 evaluations is spent.*on_budget='stop'"):
        objective(flow, torch.zeros(4, 2).double(), regularizers=[TPR()])


def test_weights_that_became_nan_are_told_apart_from_bad_data(flow: CNF) -> None:
    with torch.no_grad():
        next(flow.parameters()).fill_(NAN)
    with pytest.raises(SolveError, match="the field returns NaN"):
        flow.solve(torch.zeros(4, 3))


def test_scipy_without_adjoint() -> None:
    flow = CNF(2, hidden=(4,), solver=Solver(method="scipy_solver"))
    with pytest.raises(ValueError, match=r"take gradient='adjoint' or solve under torch\.no_grad"):
        objective(flow, torch.zeros(4, 2))
    with torch.no_grad():
        assert flow.solve(torch.zeros(4, 2)).log_prob.shape == (4,)


def test_configuration_of_a_users_field() -> None:
    with pytest.raises(ValueError, match="field of your own"):
        _ = CNF(3, field=Sine()).config
