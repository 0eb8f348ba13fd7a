"""torchdiffeq's solvers, with their calls and steps counted and their assertions explained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torchdiffeq
from torch import Tensor

from pycnf.stepper import Progress, StepError, explain_failure, rms

if TYPE_CHECKING:
    from pycnf.solve import Solver

Norm = Callable[[Tensor], Tensor]


def integrate(
    func: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    ts: Tensor,
    solver: Solver,
    factor: float,
    norm: Norm,
    tensors: Sequence[Tensor],
    progress: Progress,
    *,
    adjoint: bool,
) -> Tensor:
    """Integrate with torchdiffeq and return the states at ts, shape (K, *y0.shape).

    Args:
        func: Right-hand side.
        y0: Start.
        ts: Times (K,), the start first and the end last.
        solver: Settings.
        factor: Factor of both tolerances (:class:`pycnf.solve.Method`).
        norm: Norm of the step control.
        tensors: What ``func`` closes over and may want gradients.
        progress: Counts and position, updated as the solve goes.
        adjoint: Whether to differentiate by the adjoint equation.

    Raises:
        StepError: When the solve cannot go on.
    """
    counted = _Counted(func, solver, progress)
    if solver.kind == "adaptive":
        # torchdiffeq loses track of its stops when a step lands on one by itself, as steps do on round numbers
        ts = torch.cat([ts[:1], torch.nextafter(ts[1:], ts[:1])])
    step = float((ts[-1] - ts[0]).abs()) / (solver.n_steps or 1)
    options = _options(solver, ts if solver.samples == "exact" else ts[-1:], step)
    if solver.kind == "fixed" and len(ts) == 2:
        options["interp"] = "linear"  # the end of a step needs no interpolation, and so no call for it
    if solver.kind == "adaptive":
        options["norm"] = torch.no_grad()(norm)
    common: dict[str, Any] = {
        "rtol": factor * solver.rtol,
        "atol": factor * solver.atol,
        "method": solver.method,
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following arguments have no effect", UserWarning)
            if not adjoint:
                ys = torchdiffeq.odeint(counted, y0, ts, options=options, **common)
            else:
                # torchdiffeq turns a solve that runs backwards around, but not the options of its adjoint
                adjoint_options = _options(solver, ts if ts[-1] > ts[0] else -ts, step)
                if solver.kind == "adaptive":
                    full = solver.adjoint_norm == "full"
                    adjoint_options["norm"] = _full_norm(norm) if full else "seminorm"
                ys = torchdiffeq.odeint_adjoint(
                    counted,
                    y0,
                    ts,
                    options=options,
                    adjoint_rtol=factor * (solver.adjoint_rtol or solver.rtol),
                    adjoint_atol=factor * (solver.adjoint_atol or solver.atol),
                    adjoint_options=adjoint_options,
                    adjoint_params=tuple(tensor for tensor in tensors if tensor.requires_grad),
                    **common,
                )
    except AssertionError as err:
        progress.ratio = math.nan if counted.blown_up() else 1.0
        raise StepError("underflow" if "underflow" in str(err) else "non-finite") from err
    except StepError as err:
        if err.cause != "budget" or solver.on_budget == "error" or counted.y is None:
            raise
        progress.stats.stopped = True
        return torch.stack([y0, counted.y])
    counted.finish()
    if solver.kind != "adaptive" and (len(ys) != len(ts) or not torch.isfinite(ys[-1]).all()):
        progress.ratio = math.nan
        raise StepError("non-finite")
    return ys


def _options(solver: Solver, stops: Tensor, step: float) -> dict[str, Any]:
    if solver.kind == "scipy":
        return {"solver": solver.scipy_method, "max_step": solver.max_step}
    if solver.kind == "fixed":
        grid = {"grid_constructor": _FixedGrid(step, exact=len(stops) > 1), "interp": "cubic"}
        # torchdiffeq's explicit Adams methods go up to order 11, unstable at any useful step; 5 means order 4
        return grid | ({"max_order": 5} if solver.method == "explicit_adams" else {})
    options: dict[str, Any] = {"step_t": stops, "min_step": solver.min_step, "max_step": solver.max_step}
    if solver.first_step is not None:
        options["first_step"] = solver.first_step
    return options


class _Counted:
    """Wrap a right-hand side: count its calls and steps, hold the last accepted state, enforce the budget."""

    def __init__(self, func: Callable[[Tensor, Tensor], Tensor], solver: Solver, progress: Progress) -> None:
        self.func, self.solver, self.progress = func, solver, progress
        self.backward = False
        self.y: Tensor | None = None
        self.pending: float | None = None
        if solver.kind != "scipy":
            self.callback_step = self._on_step
        if solver.kind == "adaptive":
            self.callback_accept_step = self._on_accept
            self.callback_reject_step = self._on_reject

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        stats = self.progress.stats
        if self.backward:
            self._spend_backward(y)
        else:
            self.progress.spend()
            if stats.nfe == 2 and self.solver.kind == "adaptive" and self.solver.first_step is None:
                with torch.no_grad():  # this call only serves the choice of the first step
                    return self.func(t, y)
        return self.func(t, y)

    def blown_up(self) -> bool:
        """Whether the field is non-finite at the last accepted state."""
        if self.y is None or not self.progress.step > 0:  # a NaN error sends the step straight to 0
            return True
        with torch.no_grad():
            value = self.func(torch.tensor(self.progress.t).to(self.y), self.y)
        return not bool(torch.isfinite(value).all())

    def finish(self) -> None:
        """Count the last step of a fixed grid and, from now on, calls as backward; let go of the state."""
        if self.pending is not None:
            self.progress.stats.accept(self.pending)
        self.backward, self.y, self.pending = True, None, None

    def _spend_backward(self, y: Tensor) -> None:
        stats, budget = self.progress.stats, self.progress.max_nfe
        if not torch.isfinite(y).all():
            raise explain_failure("non-finite", self.solver.method, self.progress, backward=True)
        if budget is not None and stats.nfe_backward >= budget:
            raise explain_failure("budget", self.solver.method, self.progress, backward=True)
        stats.nfe_backward += 1

    def _on_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.progress.t, self.progress.step, self.y = float(t), float(dt), y
        if self.solver.kind == "fixed":  # which says when a step begins, not when it is done
            if self.pending is not None:
                self.progress.stats.accept(self.pending)
            self.pending = abs(float(dt))

    def _on_accept(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.progress.stats.accept(abs(float(dt)))

    def _on_reject(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.progress.stats.rejected += 1


class _FixedGrid:
    """Lay equal steps over a span of time, with every sampled time on the grid where that is asked for."""

    def __init__(self, step: float, *, exact: bool) -> None:
        self.step, self.exact = step, exact

    def __call__(self, func: Any, y0: Tensor, ts: Tensor) -> Tensor:
        span = float((ts[-1] - ts[0]).abs())
        count = max(1, math.ceil(span / self.step - 1e-9))
        grid = torch.linspace(float(ts[0]), float(ts[-1]), count + 1, dtype=ts.dtype, device=ts.device)
        grid[0], grid[-1] = ts[0], ts[-1]
        if self.exact and len(ts) > 2:
            apart = (grid[1:-1, None] - ts[1:-1]).abs().amin(1) > 1e-9 * span
            grid = torch.cat([grid[:1], grid[1:-1][apart], ts[1:]]).unique()
            grid = grid if ts[-1] > ts[0] else grid.flip(0)
        return grid


def _full_norm(norm: Norm) -> Callable[[tuple[Tensor, ...]], Tensor]:
    def full(state: tuple[Tensor, ...]) -> Tensor:
        t, y, adj_y, *adj_params = state
        return torch.stack([t.abs(), norm(y), norm(adj_y), *(rms(p) for p in adj_params)]).max()

    return full
