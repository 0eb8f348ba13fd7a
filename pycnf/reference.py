"""Reference solves in float64 by software that shares no stepper with pycnf: closed forms, SciPy and Julia.

A reference answers what a solve of (z, log p) should have given. Closed forms come from the field itself
(:class:`ClosedForm`); SciPy steps the field of torch, with the divergence by reverse-mode differentiation; Julia
evaluates the shipped :class:`~pycnf.fields.MLP` and its divergence with code of its own (:mod:`pycnf.julia`).
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, overload, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from pycnf.divergence import Exact
from pycnf.fields import MLP
from pycnf.flow import CNF, FlowSolution
from pycnf.julia import JULIA_METHODS, JuliaError, JuliaUnavailable, shared_worker
from pycnf.solution import Solution, SolveError, SolveStats

Backend = Literal["auto", "closed-form", "scipy", "julia"]
SCIPY_METHODS = {"DOP853": 8, "Radau": 5, "RK45": 5, "RK23": 3, "BDF": 0, "LSODA": 0}
"""SciPy's methods and their orders, 0 where it varies."""
TOLERANCE = 1e-13


@runtime_checkable
class ClosedForm(Protocol):
    """Offer the flow map of a field and its log-density in closed form."""

    def closed_form(self, t: Tensor, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Return z(t) of shape (B, D) and log p(t) - log p(0) of shape (B,) for states z at time 0 and scalar t."""
        ...


@overload
def reference_solve(  # type: ignore[overload-overlap]  # a flow is a module too, and comes first
    target: CNF,
    x: Tensor,
    times: Tensor | Sequence[float] | None = ...,
    *,
    context: Tensor | None = ...,
    backend: Backend = ...,
    method: str | None = ...,
    rtol: float = ...,
    atol: float = ...,
    reverse: bool = ...,
    timeout: float | None = ...,
) -> FlowSolution: ...


@overload
def reference_solve(
    target: nn.Module,
    x: Tensor,
    times: Tensor | Sequence[float] | None = ...,
    *,
    context: Tensor | None = ...,
    T: float = ...,
    backend: Backend = ...,
    method: str | None = ...,
    rtol: float = ...,
    atol: float = ...,
    reverse: bool = ...,
    timeout: float | None = ...,
) -> Solution: ...


def reference_solve(
    target: nn.Module,
    x: Tensor,
    times: Tensor | Sequence[float] | None = None,
    *,
    context: Tensor | None = None,
    T: float | None = None,
    backend: Backend = "auto",
    method: str | None = None,
    rtol: float = TOLERANCE,
    atol: float = TOLERANCE,
    reverse: bool = False,
    timeout: float | None = None,
) -> Solution | FlowSolution:
    r"""Solve dz/dt = v, d log p / dt = -div v in float64 without pycnf's solvers.

    The weights are converted to float64 and left where they are; the whole batch is solved as one system, and a step
    ends at every sampled time. The statistics count calls for the whole batch; Julia counts its own, SciPy tells
    rejected steps of its explicit Runge-Kutta methods only.

    Args:
        target: A flow, or one field v(t, z).
        x: States at the start, shape ``(*batch, D)``.
        times: Interior times in (0, T), increasing, at which (each block's) states are wanted.
        context: Context ``(C,)`` or ``(*batch, C)`` where the field takes one.
        T: End time of a field, 1 if not given; a flow has its own.
        backend: ``"closed-form"``, ``"scipy"``, ``"julia"``, or ``"auto"`` (:func:`choose_backend`).
        method: Method of the backend: one of ``SCIPY_METHODS`` (DOP853 if not given, Radau for stiff fields) or
            ``JULIA_METHODS`` (Vern9 if not given).
        rtol: Relative tolerance.
        atol: Absolute tolerance, in units of the state.
        reverse: Solve from T to 0, through the blocks in reverse order.
        timeout: Seconds that Julia may take for a block; None for no limit.

    Returns:
        For a flow a :class:`~pycnf.flow.FlowSolution`, as ``flow.solve`` returns, for a field a
        :class:`~pycnf.solution.Solution`; float64 tensors on the CPU, without gradients.

    Raises:
        ValueError: On impossible arguments, or a backend that cannot solve this field.
        SolveError: When the solve fails.
        JuliaUnavailable: When Julia was asked for and is not there.

    >>> flow = CNF(2, hidden=(8,)).double().eval()
    >>> x = torch.randn(4, 2, dtype=torch.float64)
    >>> bool((reference_solve(flow, x, backend="scipy").log_prob - flow().log_prob(x)).abs().max() < 1e-3)
    True
    """
    if isinstance(target, CNF) and T is not None:
        raise ValueError("a flow has its own end time: leave T out")
    chosen = choose_backend(target, backend, reverse=reverse)
    tolerances = _positive(rtol, "rtol"), _positive(atol, "atol")
    control = _Control(_choose_method(chosen, method), *tolerances, timeout)
    fields = list(target.fields) if isinstance(target, CNF) else [target]
    end = target.T if isinstance(target, CNF) else 1.0 if T is None else float(T)
    batch, z, context = _check(target, x, context)
    grid = _time_grid(end, times, reverse=reverse)
    solutions = []
    for field in fields[::-1] if reverse else fields:
        double = copy.deepcopy(field).cpu().double().eval().requires_grad_(False)
        solution = _SOLVES[chosen](_Problem(double, z, context, grid), control)
        z = solution.z[-1]
        logp = None if solution.logp is None else solution.logp.unflatten(1, batch)
        solutions.append(Solution(solution.ts, solution.z.unflatten(1, batch), logp, solution.stats))
    return FlowSolution(tuple(solutions), reverse) if isinstance(target, CNF) else solutions[0]


def choose_backend(target: nn.Module, backend: Backend = "auto", *, reverse: bool = False) -> Backend:
    """Return the backend that a reference solve of a flow or field uses.

    ``"auto"`` means the closed form where every field offers one, else Julia where it is installed and every field
    is an :class:`~pycnf.fields.MLP`, else SciPy.

    Args:
        target: A flow or a field.
        backend: What was asked for.
        reverse: Whether the solve runs from T to 0, which closed forms do not.

    Raises:
        ValueError: The backend is unknown or cannot solve this field.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(get_args(Backend))}")
    fields = list(target.fields) if isinstance(target, CNF) else [target]
    closed = all(isinstance(field, ClosedForm) for field in fields)
    if backend == "closed-form" and (not closed or reverse):
        cause = "it solves from 0 to T only" if closed else "the field has no method closed_form(t, z)"
        raise ValueError(f"no closed form: {cause}; take backend='scipy'")
    shipped = all(type(field) is MLP for field in fields)
    if backend == "julia" and not shipped:
        raise ValueError("Julia evaluates pycnf.fields.MLP only, not a field of your own: take backend='scipy'")
    if backend != "auto":
        return backend
    if closed and not reverse:
        return "closed-form"
    return "julia" if shipped and _julia_is_there() else "scipy"


_absent = False  # found so once, it is not looked for again


def _julia_is_there() -> bool:
    global _absent
    from importlib.util import find_spec

    if _absent or find_spec("juliacall") is None:
        return False
    try:
        shared_worker().start()
    except (JuliaUnavailable, JuliaError):
        _absent = True
    return not _absent


@dataclass(frozen=True)
class _Control:
    method: str
    rtol: float
    atol: float
    timeout: float | None


@dataclass(frozen=True)
class _Problem:
    """One field in float64, states (B, D) and context (B, C) at the first of the times (K,)."""

    field: nn.Module
    z: Tensor
    context: Tensor | None
    ts: Tensor


def _solve_closed(problem: _Problem, control: _Control) -> Solution:
    context = () if problem.context is None else (problem.context,)
    form: Any = problem.field
    with torch.no_grad():
        pairs = [form.closed_form(t, problem.z, *context) for t in problem.ts]
    for z, logp in pairs:
        if z.shape != problem.z.shape or logp.shape != problem.z.shape[:1]:
            raise ValueError(
                f"closed_form must return shapes {tuple(problem.z.shape)} and {tuple(problem.z.shape[:1])}, "
                f"got {tuple(z.shape)} and {tuple(logp.shape)}"
            )
    z, logp = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    return Solution(problem.ts, z, logp, SolveStats())


def _solve_scipy(problem: _Problem, control: _Control) -> Solution:
    from scipy import integrate, sparse

    shape = (len(problem.z), problem.z.shape[1] + 1)
    bound = Exact("reverse").bind(problem.field, problem.z, problem.context)
    stats = SolveStats()

    def dynamics(t: float, flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        stats.nfe += 1
        with torch.no_grad():
            v, div = bound(torch.tensor(t, dtype=torch.float64), torch.from_numpy(flat.reshape(shape)[:, :-1].copy()))
        return torch.cat([v, -div.unsqueeze(1)], dim=1).numpy().ravel()

    options: dict[str, Any] = {"method": control.method, "rtol": control.rtol, "atol": control.atol}
    if control.method in ("Radau", "BDF"):  # samples do not see each other
        options["jac_sparsity"] = sparse.kron(sparse.identity(shape[0]), np.ones((shape[1], shape[1])))
    stages = getattr(getattr(integrate, control.method), "n_stages", None)
    y = torch.cat([problem.z, torch.zeros_like(problem.z[:, :1])], dim=1).numpy().ravel()
    states = [y]
    for t0, t1 in itertools.pairwise(problem.ts.tolist()):
        before = stats.nfe
        part = integrate.solve_ivp(dynamics, (t0, t1), y, **options)
        if not part.success or not np.isfinite(part.y[:, -1]).all():
            advice = "a looser tolerance, or method='Radau' if the field is stiff"
            cause = part.message if not part.success else "the states are no longer finite"
            step = abs(float(np.diff(part.t)[-1])) if len(part.t) > 1 else float("nan")
            raise SolveError(
                cause.rstrip("."),
                advice,
                method=f"SciPy's {control.method}",
                t=float(part.t[-1]),
                step=step,
                nfe=stats.nfe,
            )
        for step in np.abs(np.diff(part.t)):
            stats.accept(float(step))
        if isinstance(stages, int):  # two calls choose the first step, then each attempt costs the stages
            stats.rejected += (stats.nfe - before - 2) // stages - (len(part.t) - 1)
        y = part.y[:, -1]
        states.append(y)
    joint = torch.from_numpy(np.stack(states).reshape(-1, *shape))
    return Solution(problem.ts, joint[..., :-1].contiguous(), joint[..., -1].contiguous(), stats)


def _solve_julia(problem: _Problem, control: _Control) -> Solution:
    message, arrays = describe_problem(problem.field, problem.z, problem.context)
    ts = problem.ts.tolist()
    ends = {"T": max(ts), "exact": True, "reverse": ts[0] > ts[-1]}
    message |= ends | {"command": "solve", "method": control.method, "rtol": control.rtol, "atol": control.atol}
    arrays["times"] = np.array(ts[1:-1])
    try:
        counts, values = shared_worker().call(message, arrays, timeout=control.timeout)
    except JuliaError as err:
        ended = re.search(r"ended at t = (\S+) with (\w+)", str(err))
        if ended is None:
            raise
        cause, advice = f"it ended with {ended[2]}", "a looser tolerance, or method='Rodas5P' if the field is stiff"
        t = float(ended[1])
        method = f"Julia's {control.method}"
        raise SolveError(cause, advice, method=method, t=t, step=float("nan"), nfe=0) from err
    stats = SolveStats(nfe=counts["nf"], rejected=counts["nreject"])
    for step in np.abs(np.diff(values["steps"])):
        stats.accept(float(step))
    stats.accepted = counts["naccept"]
    z, logp = (torch.from_numpy(np.ascontiguousarray(values[name])) for name in ("z", "logp"))
    return Solution(problem.ts, z, logp, stats)


@dataclass(frozen=True)
class StepErrors:
    """Hold the true local errors of the S accepted steps of a solve.

    Attributes:
        t: Times at which the steps start, (S,).
        h: Their sizes, (S,).
        z: Error of the state in which each step ends, (S, B, D).
        logp: Error of log p there, in nats, (S, B).
    """

    t: Tensor
    h: Tensor
    z: Tensor
    logp: Tensor


def julia_local_errors(
    field: nn.Module,
    x: Tensor,
    *,
    context: Tensor | None = None,
    T: float = 1.0,
    method: str = "Tsit5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    timeout: float | None = None,
) -> StepErrors:
    """Solve a field with one of Julia's methods and measure, in Julia, the true local error of each accepted step.

    Julia solves each step again from its own start with Vern9 at 1e-13; nothing of torch takes part. The counterpart
    for pycnf's own steps is :func:`~pycnf.diagnostics.steps.local_errors`.

    Args:
        field: An :class:`~pycnf.fields.MLP`, such as a block of ``flow.fields``.
        x: States at the start, shape (B, D).
        context: Context (C,) or (B, C) where the field takes one.
        T: End time.
        method: One of ``JULIA_METHODS``.
        rtol: Relative tolerance.
        atol: Absolute tolerance, in units of the state.
        timeout: Seconds that Julia may take; None for no limit.

    Returns:
        The errors, float64 tensors on the CPU.

    Raises:
        ValueError: On impossible arguments or another field.
        JuliaUnavailable: When Julia is not there.
        JuliaError: When the solve fails.
    """
    chosen, tolerances = _choose_method("julia", method), (_positive(rtol, "rtol"), _positive(atol, "atol"))
    _, z, context = _check(field, x, context)
    message, arrays = describe_problem(field, z, context)
    message |= {"command": "local_errors", "T": _positive(T, "T"), "method": chosen}
    message |= dict(zip(("rtol", "atol"), tolerances, strict=True))
    _, found = shared_worker().call(message, arrays, timeout=timeout)
    return StepErrors(*(torch.from_numpy(np.ascontiguousarray(found[name])) for name in ("t", "h", "z", "logp")))


def describe_problem(
    field: nn.Module, z: Tensor, context: Tensor | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Describe an MLP and its states in words and arrays, as the Julia package reads them.

    Args:
        field: An :class:`~pycnf.fields.MLP`.
        z: States (B, D).
        context: Context (B, C) or None.

    Returns:
        ``activation`` and ``time``; and the arrays ``parameters`` (layer after layer the weight row by row, the bias
        and the vectors of the time conditioning), ``sizes`` (widths of inputs, hidden layers and outputs) and
        ``inputs`` (D + C, B).

    Raises:
        ValueError: For another field.
    """
    if not isinstance(field, MLP):
        raise ValueError(f"expected a pycnf.fields.MLP, got {type(field).__name__}")
    layers: list[Any] = list(field.layers)
    time = layers[0].time
    names = {"none": (), "concat": ("time_weight",), "concatsquash": ("gate_weight", "gate_bias", "shift_weight")}
    parts = [getattr(layer, name) for layer in layers for name in ("weight", "bias", *names[time])]
    inputs = z if context is None else torch.cat([z, context], dim=1)
    arrays = {
        "parameters": torch.cat([part.detach().double().cpu().flatten() for part in parts]).numpy(),
        "sizes": np.array([layers[0].weight.shape[1], *(len(layer.bias) for layer in layers)], dtype=np.int64),
        "inputs": np.ascontiguousarray(inputs.detach().double().cpu().numpy().T),
    }
    return {"activation": field.activation, "time": time}, arrays


_SOLVES = {"closed-form": _solve_closed, "scipy": _solve_scipy, "julia": _solve_julia}
_METHODS: dict[str, dict[str, int]] = {"scipy": SCIPY_METHODS, "julia": JULIA_METHODS}
_DEFAULTS = {"closed-form": "", "scipy": "DOP853", "julia": "Vern9"}


def _choose_method(backend: str, method: str | None) -> str:
    if method is None:
        return _DEFAULTS[backend]
    if backend not in _METHODS:
        raise ValueError("a closed form has no method: leave it out")
    if method not in _METHODS[backend]:
        raise ValueError(f"unknown method {method!r} of {backend}: choose one of {', '.join(_METHODS[backend])}")
    return method


def _positive(value: float, name: str) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"expected a finite {name} > 0, got {value}")
    return float(value)


def _check(target: nn.Module, x: Tensor, context: Tensor | None) -> tuple[torch.Size, Tensor, Tensor | None]:
    """Return the batch shape, the states (B, D) and the context (B, C), in float64 on the CPU."""
    features, width = getattr(target, "features", None), getattr(target, "context", None)
    if x.ndim < 1 or x.numel() == 0 or (isinstance(features, int) and x.shape[-1] != features):
        wanted = features if isinstance(features, int) else "D"
        raise ValueError(f"expected states of shape (*, {wanted}), at least one, got {tuple(x.shape)}")
    given = 0 if context is None else context.shape[-1]
    if isinstance(width, int) and given != width:
        raise ValueError(f"expected a context of size {width} (0: none), got {given}")
    if not torch.isfinite(x).all():
        raise ValueError("the states hold NaN or infinity: clean the data first")
    batch = x.shape[:-1]
    if context is not None:
        context = context.detach().cpu().double().expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])
    return batch, x.detach().cpu().double().reshape(-1, x.shape[-1]), context


def _time_grid(end: float, times: Tensor | Sequence[float] | None, *, reverse: bool) -> Tensor:
    inner = torch.as_tensor([] if times is None else times, dtype=torch.float64).detach().cpu()
    ts = torch.cat([torch.zeros(1, dtype=torch.float64), inner.reshape(-1), torch.tensor([end], dtype=torch.float64)])
    if inner.ndim != 1 or not torch.isfinite(ts).all() or not (ts.diff() > 0).all():
        raise ValueError(f"expected increasing times strictly between 0 and {end:g}, got {inner.tolist()}")
    return ts.flip(0) if reverse else ts


__all__ = [
    *("SCIPY_METHODS", "Backend", "ClosedForm", "StepErrors"),
    *("choose_backend", "describe_problem", "julia_local_errors", "reference_solve"),
]
