"""Cross-checks: pycnf's solves of a flow against a reference that shares no stepper with them.

Two questions are answered. Does a tight solve agree with the reference to a stated bound? And what does every method
achieve for its evaluations at each tolerance?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pycnf.diagnostics.truth import TRUTH, in_float64
from pycnf.diagnostics.work import fit_order
from pycnf.flow import CNF, FlowSolution
from pycnf.julia import JULIA_METHODS
from pycnf.reference import SCIPY_METHODS, TOLERANCE, Backend, choose_backend, reference_solve
from pycnf.solution import Solution
from pycnf.solve import METHODS, Solver

BOUND = 1e-9
DEFAULT_METHODS = ("bosh3", "dopri5", "dopri8")
DEFAULT_TOLERANCES = (1e-4, 1e-6, 1e-8, 1e-10)
DEFAULT_STEPS = (4, 8, 16, 32)
ORDERS = {
    **{name: method.order for name, method in METHODS.items() if method.kind != "scipy"},
    **SCIPY_METHODS,
    **JULIA_METHODS,
}
"""Order of every method that can be swept, 0 where it varies: pycnf's, SciPy's and Julia's."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """Hold how one solve deviates from the reference, over all rows.

    Attributes:
        method: Name of the method.
        software: Whose method it is: ``"pycnf"``, ``"SciPy"`` or ``"Julia"``.
        order: Order of the method, 0 where it varies.
        tolerance: rtol = atol, None for a method with equal steps.
        n_steps: Number of equal steps per block, None for a method that chooses its steps.
        nfe: Evaluations, all blocks together.
        accepted: Accepted steps.
        rejected: Rejected steps.
        max_z: Largest difference of a component of z.
        rms_z: Root mean square difference of the components of z.
        max_logp: Largest difference of log p, in nats.
        rms_logp: Root mean square difference of log p, in nats.
    """

    method: str
    software: str
    order: int
    tolerance: float | None
    n_steps: int | None
    nfe: int
    accepted: int
    rejected: int
    max_z: float
    rms_z: float
    max_logp: float
    rms_logp: float

    @property
    def worst(self) -> float:
        """Largest difference of z or log p."""
        return max(self.max_z, self.max_logp)

    @property
    def label(self) -> str:
        """Name of the method, with whose it is where it is not pycnf's."""
        return self.method if self.software == "pycnf" else f"{self.method} ({self.software})"


@dataclass(frozen=True, kw_only=True)
class Crosscheck:
    """Hold the result of :func:`crosscheck`.

    Attributes:
        backend: What the reference came from: ``"closed-form"``, ``"scipy"`` or ``"julia"``.
        reference_nfe: Evaluations of the reference.
        agreement: Deviation of pycnf's tight solve, over all times and blocks; it is held against the bound.
        bound: Largest difference of z and of log p that is accepted.
        sweep: Deviations at the end, method by method.
        orders: Order seen of every method (``observed_order``).
        rows: Number of rows.
    """

    backend: str
    reference_nfe: int
    agreement: Deviation
    bound: float
    sweep: tuple[Deviation, ...]
    orders: dict[str, float | None]
    rows: int

    @property
    def passed(self) -> bool:
        """Whether the tight solve agrees with the reference to the bound."""
        return self.agreement.worst <= self.bound  # a NaN does not

    def summary(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {**asdict(self), "passed": self.passed}


def crosscheck(
    flow: CNF,
    x: Tensor,
    context: Tensor | None = None,
    *,
    backend: Backend = "auto",
    methods: Sequence[str] = DEFAULT_METHODS,
    tolerances: Sequence[float] = DEFAULT_TOLERANCES,
    n_steps: Sequence[int] = DEFAULT_STEPS,
    bound: float = BOUND,
    reference: FlowSolution | None = None,
    timeout: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Crosscheck:
    """Compare solves of a flow with a reference, in float64.

    The tight solve (dopri8 at 1e-12, a step ending at every sampled time) is compared at T/4, T/2, 3T/4 and T of every
    block; the methods are compared at the end of the flow.

    Args:
        flow: The flow; its weights are converted to float64.
        x: States (B, D).
        context: Context (B, C) of a conditional flow.
        backend: Where the reference comes from (:func:`pycnf.reference.choose_backend`).
        methods: Methods to sweep, among ``ORDERS``: pycnf's, SciPy's and Julia's.
        tolerances: rtol = atol of the methods that choose their steps.
        n_steps: Numbers of steps per block of the methods with equal steps.
        bound: Largest difference that :attr:`Crosscheck.passed` accepts.
        reference: Reference computed earlier, sampled at T/4, T/2, 3T/4 of every block.
        timeout: Seconds that one solve in Julia may take; None for no limit.
        say: Told what is done next.

    Returns:
        The comparison.

    Raises:
        ValueError: On an unknown method, or a backend that cannot solve this flow.
        SolveError: When a solve fails.
        JuliaUnavailable: When Julia was asked for and is not there.

    >>> flow = CNF(2, hidden=(8,))
    >>> found = crosscheck(flow, torch.randn(4, 2), backend="scipy", methods=("dopri5",), tolerances=(1e-4, 1e-8))
    >>> found.passed and found.sweep[1].nfe > found.sweep[0].nfe
    True
    """
    for name in methods:
        if name not in ORDERS:
            raise ValueError(f"unknown method {name!r}: choose among {', '.join(ORDERS)}")
    if not bound > 0:
        raise ValueError(f"expected bound > 0, got {bound}")
    double = in_float64(flow).cpu()
    x = x.detach().cpu().double()
    context = None if context is None else context.detach().cpu().double()
    inner = [flow.T * fraction for fraction in (0.25, 0.5, 0.75)]
    if reference is None:
        backend = choose_backend(flow, backend)
        say(f"reference by {backend}")
        reference = reference_solve(double, x, inner, context=context, backend=backend, timeout=timeout)
    with torch.no_grad():
        tight = double.solve(x, context, times=inner, solver=TRUTH, divergence="exact")
    agreement = _compare(tight, reference, "dopri8", "pycnf", 1e-12, None, everywhere=True)
    sweep = []
    for name in methods:
        say(name)
        fixed = name in METHODS and METHODS[name].kind == "fixed"
        for setting in n_steps if fixed else tolerances:
            tolerance, steps = (None, int(setting)) if fixed else (float(setting), None)
            found, software = _solve(double, x, context, name, tolerance, steps, timeout)
            sweep.append(_compare(found, reference, name, software, tolerance, steps))
    orders = {name: observed_order([row for row in sweep if row.method == name]) for name in methods}
    return Crosscheck(
        backend=backend,
        reference_nfe=reference.stats.nfe,
        agreement=agreement,
        bound=bound,
        sweep=tuple(sweep),
        orders=orders,
        rows=x[..., 0].numel(),
    )


def observed_order(rows: Sequence[Deviation]) -> float | None:
    """Return the order p of the fit error ~ nfe^-p to the largest deviations of one method's solves.

    Args:
        rows: Solves of one method.

    Returns:
        The order (``pycnf.diagnostics.work.fit_order``), None where too few errors stand above rounding.
    """
    order = fit_order((row.nfe, row.worst) for row in rows)
    return None if math.isnan(order) else order


def _solve(
    flow: CNF,
    x: Tensor,
    context: Tensor | None,
    name: str,
    tolerance: float | None,
    n_steps: int | None,
    timeout: float | None,
) -> tuple[FlowSolution, str]:
    """Solve by one method at one setting, and say whose method it is."""
    if name in METHODS:
        control: dict[str, Any] = {"n_steps": n_steps} if tolerance is None else {"rtol": tolerance, "atol": tolerance}
        with torch.no_grad():
            return flow.solve(x, context, solver=Solver(method=name, **control), divergence="exact"), "pycnf"
    tolerance = TOLERANCE if tolerance is None else tolerance
    backend: Backend = "scipy" if name in SCIPY_METHODS else "julia"
    found = reference_solve(
        flow, x, context=context, backend=backend, method=name, rtol=tolerance, atol=tolerance, timeout=timeout
    )
    return found, "SciPy" if backend == "scipy" else "Julia"


def _compare(
    found: FlowSolution,
    reference: FlowSolution,
    method: str,
    software: str,
    tolerance: float | None,
    n_steps: int | None,
    *,
    everywhere: bool = False,
) -> Deviation:
    """Measure the deviation at the end, or at all sampled times of all blocks."""
    if everywhere:
        pairs = list(zip(found.blocks, reference.blocks, strict=True))
        for mine, theirs in pairs:
            if mine.ts.shape != theirs.ts.shape or not torch.allclose(mine.ts, theirs.ts, rtol=0, atol=1e-12):
                raise ValueError(
                    f"expected a reference at the times {mine.ts.tolist()} of every block, got {theirs.ts.tolist()}"
                )
        z = torch.cat([(mine.z - theirs.z).flatten() for mine, theirs in pairs])
        logp = torch.cat([(_logp(mine) - _logp(theirs)).flatten() for mine, theirs in pairs])
    else:
        z, logp = (found.z - reference.z).flatten(), (found.logp - reference.logp).flatten()
    stats = found.stats
    return Deviation(
        method=method,
        software=software,
        order=ORDERS[method],
        tolerance=tolerance,
        n_steps=n_steps,
        nfe=stats.nfe,
        accepted=stats.accepted,
        rejected=stats.rejected,
        max_z=float(z.abs().max()),
        rms_z=float(z.square().mean().sqrt()),
        max_logp=float(logp.abs().max()),
        rms_logp=float(logp.square().mean().sqrt()),
    )


def _logp(block: Solution) -> Tensor:
    if block.logp is None:
        raise ValueError("the reference left the density out")
    return block.logp


__all__ = ["BOUND", "ORDERS", "Crosscheck", "Deviation", "crosscheck", "observed_order"]
