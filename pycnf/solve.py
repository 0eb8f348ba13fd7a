"""Solve initial value problems: methods, tolerances, gradient modes, sampled times and exact statistics.

This is the door to the solvers: :mod:`pycnf.wrapped` calls torchdiffeq's, :mod:`pycnf.stepper` takes the same
adaptive steps faster, :mod:`pycnf.backprop` differentiates through them and :mod:`pycnf.adjoint` by a second solve.
It integrates any ``dy/dt = func(t, y)`` on a matrix state ``y`` of shape (B, C); what the columns mean is the
business of :mod:`pycnf.flow`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pycnf import adjoint, backprop, stepper, wrapped
from pycnf.dynamics import AutogradDynamics
from pycnf.solution import SolveStats, SolveWarning

Dynamics = Callable[[Tensor, Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """Describe a solver method.

    Attributes:
        kind: ``"adaptive"`` (steps chosen from rtol and atol), ``"fixed"`` (``n_steps`` equal steps) or
            ``"scipy"`` (SciPy's adaptive solvers, forward only).
        order: Order p of the global error O(h^p); 0 where the method varies its order.
        multistep: Whether the method needs equal steps throughout.
        tolerance_factor: What rtol and atol are multiplied by. Fehlberg's 1(2) pair was built to make its
            first-order error tiny, so its embedded estimate understates the error of the second-order
            solution it advances, up to some 500-fold at every tolerance (a rotation); a hundredth of the
            tolerance mends that.
    """

    kind: Literal["adaptive", "fixed", "scipy"]
    order: int
    multistep: bool = False
    tolerance_factor: float = 1.0


METHODS: dict[str, Method] = {
    "dopri8": Method("adaptive", 8),
    "dopri5": Method("adaptive", 5),
    "bosh3": Method("adaptive", 3),
    "fehlberg2": Method("adaptive", 2, tolerance_factor=0.01),
    "adaptive_heun": Method("adaptive", 2),
    "euler": Method("fixed", 1),
    "midpoint": Method("fixed", 2),
    "heun2": Method("fixed", 2),
    "heun3": Method("fixed", 3),
    "rk4": Method("fixed", 4),
    "explicit_adams": Method("fixed", 4, multistep=True),
    "implicit_adams": Method("fixed", 0, multistep=True),
    "fixed_adams": Method("fixed", 0, multistep=True),
    "scipy_solver": Method("scipy", 0),
}


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Hold the settings of a solve.

    A step of an adaptive method is accepted when its embedded error estimate e satisfies
    ``norm(e / (atol + rtol * max(|y0|, |y1|))) <= 1``. The solve ends exactly at its end time: the last step
    is shortened, instead of stepping past the end and interpolating back, which costs no more calls and is up
    to a thousand times more accurate.

    Args:
        method: A name in ``METHODS``.
        rtol: Relative tolerance, > 0 (adaptive and SciPy methods).
        atol: Absolute tolerance, in units of the state, > 0 (adaptive and SciPy methods).
        gradient: ``"backprop"`` differentiates through the solver's own steps, whose sizes are held fixed
            (memory grows with the number of evaluations). ``"checkpoint"`` gives the same gradient to rounding from
            the accepted steps alone: their stages are evaluated again in the backward pass, one step at a time
            (adaptive methods of the engine ``"pycnf"`` and fields that repeat themselves; memory for one step's
            stages and two states a step; one more call for each stage of an accepted step). ``"adjoint"`` solves the
            adjoint equation backwards (constant memory; gradient correct to tolerance; calls of its own). Rule of
            thumb (``benchmarks/gradient_modes.py`` measures it): ``"backprop"`` where its memory suffices, else
            ``"checkpoint"``, whose memory hardly grows with the number of evaluations, else ``"adjoint"``, which
            holds the least for wide layers (small perceptrons in compiled code keep next to nothing anyway).
        samples: How states at sampled times are taken from an adaptive solve: ``"dense"`` from the step's
            interpolating polynomial (no extra calls), ``"exact"`` by ending a step there (as accurate as the
            end state; extra steps).
        n_steps: Number of equal steps (fixed-step methods only, required there). Interior samples then come
            from cubic Hermite interpolation, one extra call for each sample and one for the end, or with
            ``"exact"`` from extra grid points.
        max_nfe: Budget of forward calls per solve (per block of a flow); None for no limit. The backward solve
            of the adjoint has the same budget and always raises at its end; checkpoints never need more.
        on_budget: ``"error"`` raises :class:`~pycnf.solution.SolveError` at the budget, ``"stop"`` returns the last
            accepted state with ``stats.stopped = True`` and a :class:`~pycnf.solution.SolveWarning`; not with
            ``gradient="adjoint"``.
        min_step: Smallest step, in units of t: steps this small are accepted whatever their error.
        max_step: Largest step, in units of t.
        first_step: First step, in units of t; None lets the method choose (one extra call). The backward solve of the
            adjoint goes on with the step at which the forward solve arrived.
        adjoint_rtol: Relative tolerance of the backward solve; None for ``rtol``.
        adjoint_atol: Absolute tolerance of the backward solve, for the states and for the loss's gradients with
            respect to them, which are small where the loss is a mean over many rows; None for ``atol``.
        adjoint_norm: ``"seminorm"`` leaves the parameter gradients out of the backward step control (Kidger
            et al. 2021), ``"full"`` keeps them in.
        scipy_method: Method of ``scipy.integrate.solve_ivp`` for ``method="scipy_solver"``.
        engine: ``"pycnf"`` takes adaptive steps with ``pycnf.stepper``, ``"torchdiffeq"`` with torchdiffeq: the
            same steps to rounding, slower, with ``"backprop"`` differentiable more than once. Its adjoint starts
            anew at every sampled time, where that of ``"pycnf"`` goes on (unless ``samples="exact"`` ends a step
            there). Fixed-step and SciPy methods are torchdiffeq's in any case.

    Raises:
        ValueError: On an unknown name or an impossible setting, with what is possible.

    References:
        Chen, torchdiffeq, https://github.com/rtqichen/torchdiffeq. Hairer, Norsett & Wanner, Solving Ordinary
        Differential Equations I, sections II.4 and II.6. Kidger, Chen & Lyons, "Hey, that's not an ODE":
        faster ODE adjoints via seminorms, ICML 2021.

    >>> y0 = torch.ones(1, 1, dtype=torch.float64)
    >>> ts, ys, stats = Solver(rtol=1e-8, atol=1e-8).integrate(lambda t, y: -y, y0, 0.0, 1.0)
    >>> bool((ys[-1] - torch.exp(-ts[-1])).abs() < 1e-7) and stats.nfe > 0
    True
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    gradient: Literal["backprop", "adjoint", "checkpoint"] = "backprop"
    samples: Literal["dense", "exact"] = "dense"
    n_steps: int | None = None
    max_nfe: int | None = None
    on_budget: Literal["error", "stop"] = "error"
    min_step: float = 0.0
    max_step: float = math.inf
    first_step: float | None = None
    adjoint_rtol: float | None = None
    adjoint_atol: float | None = None
    adjoint_norm: Literal["seminorm", "full"] = "seminorm"
    scipy_method: str = "DOP853"
    engine: Literal["pycnf", "torchdiffeq"] = "pycnf"

    def __post_init__(self) -> None:
        _choose("method", self.method, tuple(METHODS))
        _choose("gradient", self.gradient, ("backprop", "adjoint", "checkpoint"))
        _choose("samples", self.samples, ("dense", "exact"))
        _choose("on_budget", self.on_budget, ("error", "stop"))
        _choose("adjoint_norm", self.adjoint_norm, ("seminorm", "full"))
        _choose("engine", self.engine, ("pycnf", "torchdiffeq"))
        for name in ("rtol", "atol", "adjoint_rtol", "adjoint_atol", "first_step", "max_step"):
            value = getattr(self, name)
            if value is not None and not (value > 0):
                raise ValueError(f"expected {name} > 0, got {value}")
        for name in ("rtol", "atol", "adjoint_rtol", "adjoint_atol"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"expected a finite {name}, got {value}")
        if not 0 <= self.min_step <= self.max_step:
            raise ValueError(f"expected 0 <= min_step <= max_step, got {self.min_step} and {self.max_step}")
        if self.max_nfe is not None and self.max_nfe < 1:
            raise ValueError(f"expected max_nfe >= 1 or None, got {self.max_nfe}")
        if self.kind == "fixed" and (self.n_steps is None or self.n_steps < 1):
            raise ValueError(
                f"method {self.method!r} takes equal steps: give n_steps >= 1, got {self.n_steps}; "
                f"for steps chosen from rtol and atol take one of {_names('adaptive')}"
            )
        if self.kind != "fixed" and self.n_steps is not None:
            raise ValueError(
                f"method {self.method!r} chooses its own steps: leave n_steps out, or take one of {_names('fixed')}"
            )
        if self.gradient == "adjoint" and self.on_budget == "stop":
            raise ValueError(
                "on_budget='stop' needs gradient='backprop' or 'checkpoint': the adjoint does not start from a "
                "shortened solve"
            )
        if self.gradient == "checkpoint" and not self._own:
            raise ValueError(
                "gradient='checkpoint' needs an adaptive method and engine='pycnf', got method "
                f"{self.method!r} and engine {self.engine!r}: take 'backprop' or 'adjoint'"
            )
        if METHODS[self.method].multistep and self.samples == "exact":
            raise ValueError(f"method {self.method!r} needs equal steps: take samples='dense'")

    @property
    def kind(self) -> str:
        """Say whether the method is ``"adaptive"``, ``"fixed"`` or ``"scipy"``."""
        return METHODS[self.method].kind

    @property
    def _own(self) -> bool:
        return self.kind == "adaptive" and self.engine == "pycnf"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, ready for JSON, plus method, rtol and atol."""
        keep = ("method", "rtol", "atol")
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.name in keep or getattr(self, f.name) != f.default
        }

    def integrate(
        self,
        func: Dynamics,
        y0: Tensor,
        t0: float,
        t1: float,
        *,
        times: Tensor | Sequence[float] | None = None,
        norm: Norm | None = None,
        tensors: Sequence[Tensor] = (),
        observer: stepper.Observer | None = None,
        watch: stepper.Watch | None = None,
    ) -> tuple[Tensor, Tensor, SolveStats]:
        """Integrate dy/dt = func(t, y) from t0 to t1 (backwards when t1 < t0).

        Args:
            func: Right-hand side: scalar t and y of shape (B, C) to dy/dt of shape (B, C).
            y0: State at t0, shape (B, C).
            t0: Start time.
            t1: End time, different from t0.
            times: Interior times at which the state is wanted, strictly between t0 and t1, in order.
            norm: Norm of the step control, from an array like y to a scalar; None for the root mean square.
            tensors: Tensors that ``func`` closes over and that want gradients; the adjoint needs to know them.
            observer: Function that is shown every step tried (:class:`pycnf.stepper.Attempt`), detached from
                gradients; adaptive methods of the engine ``"pycnf"`` only.
            watch: What to fill with the accepted steps, differentiable (:class:`pycnf.stepper.Watch`); under the
                same condition.

        Returns:
            Times ``ts`` (K,) float64 with t0 first and t1 last, states ``ys`` (K, B, C) and the statistics.
            After a soft stop ``ts`` is (t0, time reached).

        Raises:
            ValueError: On impossible times, a non-finite start, or an observer or a watch that would see nothing.
            SolveError: When the solve fails.
        """
        ts = _time_grid(t0, t1, times, y0.device)
        if not torch.isfinite(y0).all():
            raise ValueError("the initial state holds NaN or infinity: clean the data first")
        differentiate = torch.is_grad_enabled() and (y0.requires_grad or any(x.requires_grad for x in tensors))
        if self.kind == "scipy" and differentiate and self.gradient == "backprop":
            raise ValueError(
                "scipy_solver cannot be differentiated: take gradient='adjoint' or solve under torch.no_grad()"
            )
        backward = differentiate and self.gradient == "adjoint"
        if (observer is not None or watch is not None) and (backward or not self._own):
            raise ValueError(
                "only an adaptive method with engine='pycnf' and gradient='backprop' or 'checkpoint' shows its steps "
                f"to observers and to regularizers of the solver's error, got method {self.method!r}, engine "
                f"{self.engine!r} and gradient {self.gradient!r}"
            )
        norm, progress = norm or stepper.rms, stepper.Progress(SolveStats(), float(ts[0]), max_nfe=self.max_nfe)
        try:
            if not self._own:
                factor = METHODS[self.method].tolerance_factor
                ys = wrapped.integrate(func, y0, ts, self, factor, norm, tensors, progress, adjoint=backward)
            else:
                times, control = ts.tolist(), self._control(ts.tolist(), norm, observer)
                dynamics: Any = func if hasattr(func, "linearize") else AutogradDynamics(func, tensors)
                if backward:
                    back, full = self._backward_control(control, times), self.adjoint_norm == "full"
                    ys = adjoint.integrate(dynamics, y0, times, control, progress, back, full_norm=full)
                else:
                    again = self.gradient == "checkpoint"
                    ys = backprop.integrate(dynamics, y0, times, control, progress, watch, checkpoint=again)
        except stepper.StepError as err:
            raise stepper.explain_failure(err.cause, self.method, progress) from err.__cause__
        if progress.stats.stopped:
            ts = ts.new_tensor([float(ts[0]), progress.t])
            warnings.warn(
                f"solve stopped at t = {progress.t:.6g} by max_nfe = {self.max_nfe}: its result is not that of the "
                "full solve",
                SolveWarning,
                stacklevel=3,
            )
        return ts, ys, progress.stats

    def _control(self, times: list[float], norm: Norm, observer: stepper.Observer | None) -> stepper.StepControl:
        factor = METHODS[self.method].tolerance_factor
        return stepper.StepControl(
            method=self.method,
            rtol=factor * self.rtol,
            atol=factor * self.atol,
            norm=norm,
            stops=tuple(times[1:] if self.samples == "exact" else times[-1:]),
            first_step=self.first_step,
            min_step=self.min_step,
            max_step=self.max_step,
            soft_stop=self.on_budget == "stop",
            observer=observer,
        )

    def _backward_control(self, control: stepper.StepControl, times: list[float]) -> stepper.StepControl:
        factor = METHODS[self.method].tolerance_factor
        return replace(
            control,
            rtol=factor * (self.adjoint_rtol or self.rtol),
            atol=factor * (self.adjoint_atol or self.atol),
            stops=tuple(times[-2::-1] if self.samples == "exact" else times[:1]),
            first_step=None,
            soft_stop=False,
        )


def _choose(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")


def _names(kind: str) -> str:
    return ", ".join(name for name, method in METHODS.items() if method.kind == kind)


def _time_grid(t0: float, t1: float, times: Tensor | Sequence[float] | None, device: torch.device) -> Tensor:
    if not (math.isfinite(t0) and math.isfinite(t1)) or t0 == t1:
        raise ValueError(f"expected two different finite end times, got {t0} and {t1}")
    ends = torch.tensor([t0, t1], dtype=torch.float64)
    if times is None:
        return ends.to(device)
    inner = torch.as_tensor(times, dtype=torch.float64).detach().cpu()
    if inner.ndim != 1:
        raise ValueError(f"expected times of shape (K,), got {tuple(inner.shape)}")
    ts = torch.cat([ends[:1], inner, ends[1:]])
    steps = (ts[1:] - ts[:-1]) * math.copysign(1.0, t1 - t0)
    if not (steps > 0).all():
        raise ValueError(f"expected times in order strictly between {t0:g} and {t1:g}, got {inner.tolist()}")
    return ts.to(device)


__all__ = ["METHODS", "Method", "Solver"]
