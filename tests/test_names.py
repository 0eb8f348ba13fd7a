"""Names that others rely on, and flows that are written down, copied and rebuilt."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
import pickle

import pytest
import torch

import pycnf
from pycnf import CNF, TPR, FlowDistribution, FlowSolution, Solution, Solver, SolveStats
from pycnf.solve import METHODS

PUBLIC = {
    "CNF",
    "Exact",
    "FlowDistribution",
    "FlowSolution",
    "Hutchinson",
    "MLP",
    "Regularizer",
    "Solution",
    "SolveError",
    "SolveStats",
    "SolveWarning",
    "Solver",
    "TPR",
    "objective",
}


def test_public_names() -> None:
    names = {name for name in dir(pycnf) if not name.startswith("_")}
    assert names >= PUBLIC
    assert isinstance(pycnf.__version__, str)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_described(name: str) -> None:
    assert (getattr(pycnf, name).__doc__ or "").strip()


@pytest.mark.parametrize(
    ("of", "names"),
    [
        (
            CNF.__init__,
            [
                "features",
                "hidden",
                "blocks",
                "context",
                "field",
                "activation",
                "time",
                "T",
                "divergence",
                "solver",
                "eval_divergence",
                "eval_solver",
            ],
        ),
        (CNF.solve, ["x", "context", "times", "reverse", "solver", "divergence"]),
        (CNF.forward, ["context"]),
        (TPR, ["weight", "degree", "times", "law", "channels", "per_dimension"]),
        (
            Solver,
            [
                "method",
                "rtol",
                "atol",
                "gradient",
                "samples",
                "n_steps",
                "max_nfe",
                "on_budget",
                "min_step",
                "max_step",
                "first_step",
                "adjoint_rtol",
                "adjoint_atol",
                "adjoint_norm",
            ],
        ),
        (pycnf.MLP, ["features", "hidden", "context", "activation", "time"]),
        (pycnf.Hutchinson, ["probes", "noise"]),
        (pycnf.objective, ["flow", "x", "context", "regularizers"]),
        (FlowDistribution.rsample, ["sample_shape"]),
    ],
    ids=["CNF", "solve", "forward", "TPR", "Solver", "MLP", "Hutchinson", "objective", "rsample"],
)
def test_names_of_arguments(of: object, names: list[str]) -> None:
    assert set(inspect.signature(of).parameters) >= set(names)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("of", "names"),
    [
        (
            CNF(2, (4,)),
            ["features", "context", "T", "config", "blocks", "fields", "solver", "eval_solver", "solve"],
        ),
        (
            CNF(2, (4,))(),
            ["log_prob", "sample", "rsample", "rsample_and_log_prob", "expand", "batch_shape", "event_shape"],
        ),
        (SolveStats(), ["nfe", "nfe_backward", "accepted", "rejected", "min_step", "max_step", "stopped"]),
        (FlowSolution((), False), ["blocks", "reverse", "stats"]),
    ],
    ids=["CNF", "distribution", "stats", "solution"],
)
def test_names_of_attributes(of: object, names: list[str]) -> None:
    assert all(hasattr(of, name) for name in names)
    assert {"z", "logp", "log_prob", "stats"} <= set(dir(FlowSolution))
    assert {"ts", "z", "logp", "stats"} <= set(Solution.__dataclass_fields__)


def test_names_of_methods() -> None:
    assert set(METHODS) == {
        "dopri8",
        "dopri5",
        "bosh3",
        "fehlberg2",
        "adaptive_heun",
        "euler",
        "midpoint",
        "heun2",
        "heun3",
        "rk4",
        "explicit_adams",
        "implicit_adams",
        "fixed_adams",
        "scipy_solver",
    }
    for name, order in {
        "dopri8": 8,
        "dopri5": 5,
        "bosh3": 3,
        "fehlberg2": 2,
        "adaptive_heun": 2,
        "rk4": 4,
    }.items():
        assert METHODS[name].order == order


# --- configuration, copies ---------------------------------------------------------------------

SETTINGS = [
    {"time": time, "activation": activation, "context": context, "blocks": blocks, "hidden": hidden}
    for (time, activation), (context, blocks, hidden) in zip(
        itertools.product(["concat", "concatsquash", "none"], ["tanh", "softplus"]),
        itertools.cycle([(0, 1, (8,)), (2, 2, (6, 5)), (0, 3, [4, 4, 4])]),
        strict=False,
    )
]
SOLVERS = {
    "solver": Solver(method="bosh3", rtol=1e-3, atol=1e-2, gradient="adjoint", max_nfe=10_000),
    "eval_solver": Solver(method="rk4", n_steps=8),
    "divergence": "hutchinson-rademacher-2",
    "T": 0.5,
}


def data(flow: CNF) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = torch.randn(7, flow.features)
    return x, torch.randn(7, flow.context) if flow.context else None


@pytest.mark.parametrize("settings", [*SETTINGS, *({**s, **SOLVERS} for s in SETTINGS[:2])], ids=str)
def test_configuration_and_weights_rebuild_a_flow(settings: dict[str, object]) -> None:
    flow = CNF(3, **settings).eval()  # type: ignore[arg-type]
    config = json.loads(json.dumps(flow.config, allow_nan=False))
    again = CNF(**config).eval()
    again.load_state_dict(flow.state_dict())
    assert again.config == flow.config
    assert again.solver == flow.solver
    assert again.eval_solver == flow.eval_solver
    assert (again.divergence, again.eval_divergence) == (flow.divergence, flow.eval_divergence)
    x, context = data(flow)
    assert torch.equal(again(context).log_prob(x), flow(context).log_prob(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_copies_of_a_flow(settings: dict[str, object], how: str) -> None:
    flow = CNF(3, **settings).eval()  # type: ignore[arg-type]
    x, context = data(flow)
    want = flow(context).log_prob(x)
    if how == "deepcopy":
        again = copy.deepcopy(flow)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(flow))
    else:
        buffer = io.BytesIO()
        torch.save(flow, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(context).log_prob(x), want)
    with torch.no_grad():
        next(again.parameters()).add_(1.0)
    assert torch.equal(flow(context).log_prob(x), want), "a copy shares nothing"


def test_copies_after_a_solve() -> None:
    flow = CNF(2, (4,)).eval()
    flow.solve(torch.zeros(3, 2))
    assert copy.deepcopy(flow).config == flow.config
    assert pickle.loads(pickle.dumps(flow())).log_prob(torch.zeros(3, 2)).shape == (3,)


def test_moving_a_flow_between_precisions() -> None:
    flow = CNF(2, (4,)).eval()
    x = torch.randn(5, 2)
    single = flow().log_prob(x)
    double = flow.double()().log_prob(x.double())
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=1e-4)


def test_state_dict_holds_the_weights_only() -> None:
    flow = CNF(2, (4, 4), blocks=2, time="concat")
    assert len(flow.state_dict()) == len(list(flow.parameters())) == 2 * 3 * 3
    assert all(key.startswith("fields.") for key in flow.state_dict())
