"""Truths about compiled evaluation: what it computes, what it keeps, and what happens without a compiler."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import Sine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pycnf import CNF, TPR, SolveError, Solver, SolveWarning, native, objective
from pycnf.compiled import WIDEST, Traced, compile_bound
from pycnf.divergence import Divergence, Exact, Hutchinson
from pycnf.fields import ACTIVATIONS, MLP
from pycnf.joint import JointDynamics, joint_dynamics, state_dynamics
from pycnf.solve import METHODS

ROOT = Path(__file__).resolve().parents[1]
TIGHT = {"atol": 1e-12, "rtol": 1e-10}

needs_compiler = pytest.mark.skipif(native.load(quiet=True) is None, reason="no C++ compiler was found")


def pulled(dynamics: object, t: Tensor, y: Tensor, g: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """dy/dt at (t, y), and the gradients of <g, dy/dt> with respect to y and to what the dynamics close over."""
    tensors = dynamics.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        value, pull = dynamics.linearize(t, y)  # type: ignore[attr-defined]
        grads = [torch.zeros_like(tensor) for tensor in tensors]
        gy = pull(g, grads)
    wanted = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
    outer = [tensors[i] for i in wanted], inputs, [grads[i] for i in wanted]
    return [value, gy, *torch.autograd.grad(*outer, retain_graph=True, materialize_grads=True)]


def case(
    hidden: tuple[int, ...],
    time: str,
    activation: str,
    context: int,
    divergence: Divergence,
    rows: int,
    features: int = 3,
) -> tuple[MLP, Tensor | None, object, Tensor, Tensor]:
    """A field, its context, its bound divergence, states (z, log p) and cotangents, in float64."""
    field = MLP(features, hidden, time=time, activation=activation, context=context).double()  # type: ignore[arg-type]
    z = torch.randn(rows, features).double()
    c = torch.randn(rows, context).double().requires_grad_() if context else None
    y = torch.cat([z, torch.randn(rows, 1).double()], dim=1)
    return field, c, divergence.bind(field, z, c), y, torch.randn_like(y)


# --- what is computed ------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(2)], ids=str)
@pytest.mark.parametrize("time", ["concat", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(5,), (7, 20), (33, 8, 16), (4, 3, 5, 4)], ids=str)
def test_native_code_equals_what_is_written_out(
    hidden: tuple[int, ...], activation: str, time: str, divergence: Divergence
) -> None:
    """Values, and gradients with respect to states, parameters and context, for batches of any size."""
    t = torch.tensor(0.37, dtype=torch.float64)
    for context, rows in itertools.product([0, 2], [1, 6, 133]):
        field, c, bound, y, g = case(hidden, time, activation, context, divergence, rows)
        inputs = [*field.parameters(), *(() if c is None else (c,))]
        plain, compiled = joint_dynamics(bound), joint_dynamics(bound, compile=True)  # type: ignore[arg-type]
        assert isinstance(compiled.compiled, native.Native)  # type: ignore[attr-defined]
        for got, want in zip(pulled(compiled, t, y, g, inputs), pulled(plain, t, y, g, inputs), strict=True):
            torch.testing.assert_close(got, want, **TIGHT)


@needs_compiler
@pytest.mark.parametrize("context", [0, 2])
def test_native_code_of_states_alone(context: int) -> None:
    field, c, _, y, g = case((9, 12, 5), "concat", "silu", context, Exact(), 19)
    z, g, t = y[:, :-1], g[:, :-1].contiguous(), torch.tensor(0.2, dtype=torch.float64)
    inputs = [*field.parameters(), *(() if c is None else (c,))]
    start = z.clone().requires_grad_()
    want = field(t, start, c)
    got = pulled(state_dynamics(field, z, c, compile=True), t, z, g, inputs)
    for a, b in zip(got, [want, *torch.autograd.grad(want, [start, *inputs], g)], strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_native_code_are_exact_to_rounding(activation: str) -> None:
    """v = h(z) and div v = h'(z) of a perceptron of one unit: in float32 as close to float64 as torch's."""
    field = MLP(1, (1,), activation=activation, time="none")
    with torch.no_grad():
        for layer in field.layers:
            layer.weight.fill_(1.0)
            layer.bias.fill_(0.0)
    z = torch.cat([torch.linspace(-30, 30, 20_001), torch.logspace(-12, 1.5, 2_000), torch.tensor([-200.0, 200.0])])
    y, bound = torch.stack([z, torch.zeros_like(z)], dim=1), Exact().bind(field, z.unsqueeze(1), None)
    a = z.double().requires_grad_()
    h = ACTIVATIONS[activation].value(a)
    (slope,) = torch.autograd.grad(h.sum(), a)
    want, worst = torch.stack([h.detach(), -slope], dim=1), []
    for compile in (False, True):
        with torch.no_grad():
            got = joint_dynamics(bound, compile=compile)(torch.tensor(0.0), y).double()
        worst.append(((got - want).abs() / (1e-3 + want.abs())).amax(0))
    assert (worst[1] <= 1.5 * worst[0] + torch.finfo(torch.float32).eps).all()


@needs_compiler
@pytest.mark.parametrize("engine", ["pycnf", "torchdiffeq", "adjoint"])
def test_flows_do_not_change_when_compiled(engine: str) -> None:
    """Losses, gradients, samples and counts, in every mode of differentiation."""
    settings = {"gradient": "adjoint"} if engine == "adjoint" else {"engine": engine}
    flow = CNF(2, (12, 10, 8), blocks=2, context=1, solver={"rtol": 1e-7, "atol": 1e-7, **settings}).double()
    x, c, found = torch.randn(30, 2).double(), torch.randn(30, 1).double(), []
    for compile in (False, True):
        flow.compiled = compile
        torch.manual_seed(3)
        flow.zero_grad()
        loss = objective(flow, x, c, TPR(weight=1.0)).loss + flow(c).rsample().pow(2).mean()
        loss.backward()
        with torch.no_grad():
            samples, log_prob = flow(c).rsample_and_log_prob()
        grads = [p.grad.clone() for p in flow.parameters() if p.grad is not None]
        found.append([loss.detach(), samples, log_prob, *grads])
    assert len(found[0]) > 3
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)


@needs_compiler
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.kind == "adaptive"])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_whole_steps_are_those_of_every_method(method: str, gradient: str) -> None:
    """States at sampled times, what is watched, gradients and counts, also of a solve that its budget stops."""
    solver = Solver(method=method, rtol=1e-5, atol=1e-5, gradient=gradient)  # type: ignore[arg-type]
    short = replace(solver, max_nfe=20, on_budget="stop")
    flow, x, found = CNF(2, (12, 10, 8)).double(), torch.randn(30, 2).double(), []
    for compile, settings in itertools.product((False, True), (solver, short)):
        flow.compiled = compile
        flow.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolveWarning)
            solution = flow.solve_blocks(x, None, [torch.tensor([0.3, 0.8])], solver=settings, watched=True)
        block = solution.blocks[0]
        loss = block.z.pow(2).sum() + solution.log_prob.sum() + block.steps.error.pow(2).sum()  # type: ignore[union-attr]
        loss.backward()
        counts = torch.tensor([solution.stats.nfe, solution.stats.nfe_backward, solution.stats.accepted])
        found.append([counts, block.z.detach(), *(p.grad.clone() for p in flow.parameters() if p.grad is not None)])
    for plain, compiled in zip(found[:2], found[2:], strict=True):
        for got, want in zip(compiled, plain, strict=True):
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


@needs_compiler
def test_threads_share_the_rows() -> None:
    field, _, bound, y, g = case((40, 40, 40), "concat", "tanh", 0, Exact(), 333)
    t, found, before = torch.tensor(0.1, dtype=torch.float64), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dynamics = joint_dynamics(bound, compile=True)  # type: ignore[arg-type]
            found.append(pulled(dynamics, t, y, g, list(field.parameters())))
    finally:
        torch.set_num_threads(before)
    for got in found[1:]:
        for a, b in zip(got, found[0], strict=True):
            torch.testing.assert_close(a, b, **TIGHT)


@needs_compiler
def test_a_field_that_blows_up_fails_as_always() -> None:
    flow = CNF(2, (8,), compile=True)
    with torch.no_grad():
        flow.fields[0].layers[0].bias.fill_(float("nan"))
    with pytest.raises(SolveError, match="NaN or infinity"):
        flow().log_prob(torch.zeros(3, 2))


@needs_compiler
def test_derivatives_of_derivatives_are_refused_as_always() -> None:
    flow = CNF(2, (8,), compile=True)
    x = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(flow().log_prob(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "flow",
    [
        CNF(2, (8,), time="concatsquash", compile=True),
        CNF(2, (WIDEST + 1,), compile=True),
        CNF(3, field=Sine(), compile=True).double(),
        CNF(2, (8,), divergence="exact-reverse", compile=True),
        CNF(2, (8,), precision="bfloat16", compile=True),
    ],
    ids=["moving matrices", "wide", "own field", "own divergence", "other precision"],
)
def test_what_is_not_compiled_is_evaluated_as_always(flow: CNF) -> None:
    x = torch.randn(5, flow.features, dtype=next(flow.parameters()).dtype)
    bound = flow.divergence.bind(flow.fields[0], x, None)
    if isinstance(flow.precision, str) and flow.precision != "float32":
        bound.round_to(flow.precision)
    assert compile_bound(bound, True) is None
    got = flow().log_prob(x)
    flow.compiled = False
    torch.testing.assert_close(got, flow().log_prob(x), atol=0.0, rtol=0.0)


# --- what is kept -----------------------------------------------------------------------------------


@needs_compiler
def test_one_build_serves_every_flow_and_solve() -> None:
    before = sorted(native.cache_folder().iterdir())
    code = native.load()
    for features, hidden, rows, tolerance in [(2, (8,), 1, 1e-3), (5, (16, 3), 70, 1e-6), (3, (9, 9, 9), 257, 1e-4)]:
        flow = CNF(features, hidden, T=0.1 * features, compile=True, solver={"rtol": tolerance, "atol": tolerance})
        flow().log_prob(torch.randn(rows, features)).sum().backward()
    assert native.load() is code
    assert sorted(native.cache_folder().iterdir()) == before


@needs_compiler
@pytest.mark.slow
def test_code_is_compiled_once_for_a_folder(tmp_path: Path) -> None:
    first = native.build(tmp_path)
    made = first.stat().st_mtime_ns
    assert native.build(tmp_path) == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


@needs_compiler
def test_a_compiled_flow_is_copied_and_saved_like_any_other() -> None:
    flow, x = CNF(2, (8, 8), compile=True), torch.randn(4, 2)
    want = flow().log_prob(x)
    assert flow.state_dict().keys() == CNF(2, (8, 8)).state_dict().keys()
    rebuilt = CNF(**flow.config)
    rebuilt.load_state_dict(flow.state_dict())
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), rebuilt):
        assert other.compiled is True
        torch.testing.assert_close(other().log_prob(x), want, atol=0.0, rtol=0.0)


@needs_compiler
def test_the_pullback_keeps_the_states_alone() -> None:
    """Of one recorded evaluation no more stays than the state that it was made at."""
    _, _, bound, y, _ = case((64, 64, 64), "concat", "tanh", 0, Exact(), 50)
    dynamics = joint_dynamics(bound, compile=True)  # type: ignore[arg-type]
    with torch.no_grad():
        _, pull = dynamics.linearize(torch.tensor(0.0, dtype=torch.float64), y)  # type: ignore[attr-defined]
    kept = [value for value in pull.args if isinstance(value, Tensor)]
    assert sum(tensor.numel() for tensor in kept) == 1 + y.numel()


# --- without a compiler --------------------------------------------------------------------------------

SCRIPT = """
import torch, warnings, pycnf
flow, x = pycnf.CNF(2, (8, 8)), torch.randn(4, 2)
want = flow().log_prob(x)
for compile in ("auto", True):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flow.compiled = compile
        for _ in range(3):
            assert torch.equal(flow().log_prob(x), want)
            assert torch.equal(pycnf.CNF(**flow.config).train().fields[0].layers[0].bias.new_zeros(1), torch.zeros(1))
            pycnf.CNF(2, (4,), compile=compile)().sample((2,))
    print(*[str(w.message) for w in caught if w.category is RuntimeWarning], sep="\\n", end="|")
"""


@pytest.mark.parametrize(
    ("compiler", "cause"),
    [("/nonexistent", "CXX names /nonexistent, which is no program"), ("false", "does not compile")],
)
def test_one_warning_where_nothing_can_be_compiled(tmp_path: Path, compiler: str, cause: str) -> None:
    environment = os.environ | {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    quiet, warned, _ = done.stdout.split("|")
    assert quiet.strip() == ""
    assert len(warned.strip().splitlines()) == 1
    assert cause in warned
    assert "without compiled code" in warned


# --- torch.compile --------------------------------------------------------------------------------------


class CountGraphs:
    """Backend of ``torch.compile`` that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


class TracedDynamics:
    """Joint dynamics by ``torch.compile``, as a flow takes them on devices other than the CPU."""

    def __init__(self, bound: object, backend: CountGraphs) -> None:
        self.traced = Traced(bound, backend)  # type: ignore[arg-type]
        self.tensors = self.traced.prepared

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.traced.forward(t, y)

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor, list[Tensor]], Tensor]]:
        return self.traced.forward(t, y), lambda g, grads: self.traced.backward(t, y, g, grads)


@pytest.mark.slow
@pytest.mark.parametrize(("divergence", "context"), [(Exact(), 0), (Hutchinson(2), 2)], ids=str)
def test_two_graphs_serve_every_solve_of_a_field(divergence: Divergence, context: int) -> None:
    """Times, step sizes, numbers of evaluations and sizes of batches are not compiled in; results do not change."""
    field, backend = MLP(3, (5, 6), context=context).double(), CountGraphs()
    inputs = list(field.parameters())
    for rows, tolerance, end in itertools.product([7, 64, 33], [1e-3, 1e-6], [0.5, -1.0]):
        z = torch.randn(rows, 3).double()
        c = torch.randn(rows, context).double() if context else None
        bound = divergence.bind(field, z, c)
        y, solver, found = torch.cat([z, torch.zeros(rows, 1)], 1), Solver(rtol=tolerance, atol=tolerance), []
        for dynamics in (TracedDynamics(bound, backend), joint_dynamics(bound)):
            tensors = dynamics.tensors  # type: ignore[union-attr]
            _, ys, stats = solver.integrate(dynamics, y, 0.0, end, tensors=tensors)
            found.append([ys, *torch.autograd.grad(ys[-1].pow(2).sum(), inputs, retain_graph=True)])
            assert stats.nfe > 6
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, **TIGHT)
    assert backend.graphs == 2


# --- the host -------------------------------------------------------------------------------------------


class CountReads(TorchDispatchMode):
    """Count how often a number is read back from a tensor, for which a device would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))  # type: ignore[operator,misc]


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=needs_compiler)])
def test_the_host_waits_once_a_step(compile: bool) -> None:
    """Of a training step only the norm of each step's error is read, and a constant for checks and the first step."""
    counts = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        flow = CNF(2, (8, 8), compile=compile, solver={"rtol": tolerance, "atol": tolerance})
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for parameter in flow.parameters():
                nn.init.normal_(parameter)
        with CountReads() as counter:
            result = objective(flow, torch.linspace(-1, 1, 20).reshape(10, 2))
            result.loss.backward()
        stats = result.solution.stats
        counts.append((stats.accepted + stats.rejected, counter.reads))
    steps, reads = zip(*counts, strict=True)
    assert steps[0] < steps[1] < steps[2]
    assert reads[0] - steps[0] == reads[1] - steps[1] == reads[2] - steps[2] <= 8


def test_plain_dynamics_are_those_without_compiling() -> None:
    _, _, bound, _, _ = case((5,), "concat", "tanh", 0, Exact(), 3)
    assert isinstance(joint_dynamics(bound), JointDynamics)  # type: ignore[arg-type]
