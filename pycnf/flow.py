r"""Continuous normalizing flows: a chain of fields, its densities, its samples and its training objective.

Data sit at t = 0 and the base density N(0, I) at t = T. Along dz/dt = v(t, z) the log-density changes by
d log p / dt = -div v, so that log p(x) = log N(z(T); 0, I) + int_0^T div v dt. A flow of several blocks
applies one after another, each with its own field and clock.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pycnf.compiled import Compile
from pycnf.divergence import Divergence, parse_divergence
from pycnf.fields import MLP, TimeConditioning
from pycnf.joint import StateDynamics, accepted_steps, channel_norm, joint_dynamics, state_dynamics
from pycnf.products import PRECISIONS
from pycnf.solution import Solution, SolveStats
from pycnf.solve import METHODS, Solver
from pycnf.stepper import Attempt, Watch

FlowObserver = Callable[[int, Attempt], None]


@dataclass(frozen=True)
class FlowSolution:
    """Hold a solve through all blocks of a flow.

    Attributes:
        blocks: One :class:`~pycnf.solution.Solution` a block, in the order in which they were solved.
        reverse: Whether the solve ran from the base density to the data.
    """

    blocks: tuple[Solution, ...]
    reverse: bool

    @property
    def z(self) -> Tensor:
        """Final states, shape ``(*batch, D)``."""
        return self.blocks[-1].z[-1]

    @property
    def logp(self) -> Tensor:
        """Change of the log-density along the whole solve, -int div v dt, shape ``(*batch,)``."""
        parts = [block.logp[-1] for block in self.blocks if block.logp is not None]
        if not parts:
            raise ValueError("this solve left the density out: solve with density=True")
        return torch.stack(parts).sum(0)

    @property
    def log_prob(self) -> Tensor:
        """Log-density of the flow at the data end of the solve, in nats, shape ``(*batch,)``."""
        if self.reverse:
            return standard_normal_log_prob(self.blocks[0].z[0]) + self.logp
        return standard_normal_log_prob(self.z) - self.logp

    @property
    def openings(self) -> tuple[float, ...]:
        """First steps with which a like solve can start, one a block (:class:`~pycnf.solution.SolveStats`)."""
        return tuple(block.stats.opening for block in self.blocks)

    @property
    def stats(self) -> SolveStats:
        """Counts summed over the blocks, including the backward calls made so far."""
        return sum((block.stats for block in self.blocks), SolveStats())


class CNF(nn.Module):
    r"""Model a density on R^D by a continuous normalizing flow.

    ``flow(context)`` is a ``torch.distributions.Distribution`` with ``log_prob``, ``sample`` and ``rsample``.
    ``flow.train()`` and ``flow.eval()`` choose between the two solvers and divergences, as they choose the
    behavior of any torch module; :func:`~pycnf.training.loop.fit` leaves a flow in evaluation mode.

    Args:
        features: Dimension D of the data.
        hidden: Hidden widths of each block's :class:`~pycnf.fields.MLP`.
        blocks: Number of blocks.
        context: Dimension C of a context c, for a conditional density p(x | c); 0 for none.
        field: Fields to use in place of the MLP: a module for one block, a sequence of modules (one a block),
            or a function that builds one. Each maps (t, z) -> v, or (t, z, context) -> v where ``context > 0``.
        activation: Activation of the MLP.
        time: Time conditioning of the MLP.
        T: End time of each block, > 0.
        divergence: Divergence in training mode (:func:`~pycnf.divergence.parse_divergence`).
        solver: Solver in training mode, a :class:`~pycnf.solve.Solver` or its settings.
        eval_divergence: Divergence in evaluation mode.
        eval_solver: Solver in evaluation mode.
        compile: Whether to evaluate perceptrons by compiled code (``pycnf.compiled``), which differs from torch's by
            rounding: ``"auto"`` does so on a CPU where a C++ compiler is found, True also tries ``torch.compile`` on
            other devices and warns once where it cannot be done, False never does.
        precision: Precision of the matrix products of a perceptron and its divergence, ``"float32"``, ``"tf32"`` or
            ``"bfloat16"`` (``pycnf.products`` says when not to); states and log-densities keep their own.

    Raises:
        ValueError: On impossible sizes or settings.

    References:
        Chen et al., Neural ordinary differential equations, NeurIPS 2018. Grathwohl et al., FFJORD, ICLR 2019.

    >>> flow = CNF(2, hidden=(16,))
    >>> x = flow().sample((8,))
    >>> flow().log_prob(x).shape == (8,)
    True
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64, 64),
        blocks: int = 1,
        *,
        context: int = 0,
        field: nn.Module | Sequence[nn.Module] | Callable[[], nn.Module] | None = None,
        activation: str = "tanh",
        time: TimeConditioning = "concat",
        T: float = 1.0,
        divergence: str | Divergence = "exact",
        solver: Solver | Mapping[str, Any] | None = None,
        eval_divergence: str | Divergence = "exact",
        eval_solver: Solver | Mapping[str, Any] | None = None,
        compile: Compile = "auto",
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if features < 1 or blocks < 1 or context < 0:
            raise ValueError(
                f"expected features >= 1, blocks >= 1 and context >= 0, got {features}, {blocks} and {context}"
            )
        if not (T > 0 and math.isfinite(T)):
            raise ValueError(f"expected a finite end time T > 0, got {T}")
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
        self.compiled, self.precision = compile, precision
        self.features, self.context, self.T = features, context, float(T)
        self.divergence, self.eval_divergence = (
            parse_divergence(divergence),
            parse_divergence(eval_divergence),
        )
        self.solver = _as_solver(solver, tolerance=1e-4)
        self.eval_solver = _as_solver(eval_solver, tolerance=1e-5)
        self._shape = {"hidden": list(hidden), "activation": activation, "time": time}
        if field is None:
            self._custom = False
            modules: list[nn.Module] = [
                MLP(features, hidden, context=context, activation=activation, time=time) for _ in range(blocks)
            ]
        else:
            self._custom = True
            modules = _as_modules(field, blocks)
        if precision != "float32" and any(type(module) is not MLP for module in modules):
            raise ValueError(f"precision={precision!r} is for perceptrons: take torch.autocast in a field of your own")
        self.fields = nn.ModuleList(modules)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.fields)

    @property
    def config(self) -> dict[str, Any]:
        """Settings that rebuild this flow by ``CNF(**flow.config)``, ready for JSON.

        Raises:
            ValueError: For a flow with fields of the user's own, which no configuration can rebuild.
        """
        if self._custom:
            raise ValueError(
                "a flow with a field of your own cannot be written as configuration: keep its code and state_dict"
            )
        return {
            "features": self.features,
            **self._shape,
            "blocks": self.blocks,
            "context": self.context,
            "T": self.T,
            "divergence": str(self.divergence),
            "solver": self.solver.to_dict(),
            "eval_divergence": str(self.eval_divergence),
            "eval_solver": self.eval_solver.to_dict(),
            "compile": self.compiled,
            "precision": self.precision,
        }

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """Return the density p(x), or p(x | context) for a context of shape ``(*batch, C)``."""
        self._check_context(context)
        return FlowDistribution(self, context)

    def solve(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        times: Tensor | Sequence[float] | None = None,
        reverse: bool = False,
        density: bool = True,
        solver: Solver | None = None,
        divergence: str | Divergence | None = None,
        first_steps: Sequence[float] | None = None,
        observer: FlowObserver | None = None,
    ) -> FlowSolution:
        """Carry states through the flow, from data to base density or, with ``reverse``, back.

        Args:
            x: States at the start, shape ``(*batch, D)``.
            context: Context (C,) or ``(*batch, C)`` of a conditional flow.
            times: Interior times in (0, T) at which each block's states are wanted, in increasing order.
            reverse: Solve from T to 0 through the blocks in reverse order (sampling).
            density: Whether to carry the log-density along; False is cheaper.
            solver: Solver for this call; None for the one of the current mode.
            divergence: Divergence for this call; None for the one of the current mode.
            first_steps: First step of each block, in the order in which they are solved, in place of the solver's
                choice: the ``openings`` of a solve of similar states save an evaluation and the short step that a
                cautious choice costs. NaN leaves a block's to the solver.
            observer: Function (i, attempt) that is shown every step tried in block i of the solution's ``blocks``
                (:meth:`Solver.integrate <pycnf.solve.Solver.integrate>`).

        Returns:
            The states, log-densities and statistics (:class:`FlowSolution`).

        Raises:
            ValueError: On wrong shapes or dtypes, or non-finite states.
            SolveError: When a solve fails.
        """
        sampled = None if times is None else torch.as_tensor(times, dtype=torch.float64)
        plan = [sampled] * self.blocks
        return self.solve_blocks(
            x,
            context,
            plan,
            reverse=reverse,
            density=density,
            solver=solver,
            divergence=divergence,
            first_steps=first_steps,
            observer=observer,
        )

    def solve_blocks(
        self,
        x: Tensor,
        context: Tensor | None,
        times: Sequence[Tensor | None],
        *,
        reverse: bool = False,
        density: bool = True,
        solver: Solver | None = None,
        divergence: str | Divergence | None = None,
        first_steps: Sequence[float] | None = None,
        observer: FlowObserver | None = None,
        ends: Sequence[float] | None = None,
        watched: bool = False,
    ) -> FlowSolution:
        """Solve with interior times, and where wanted end times, of each block's own (see :meth:`solve`)."""
        self.check_states(x)
        self._check_context(context)
        solver = solver or (self.solver if self.training else self.eval_solver)
        chosen = parse_divergence(divergence or (self.divergence if self.training else self.eval_divergence))
        batch = x.shape[:-1]
        z = x.reshape(-1, self.features)
        if context is not None:
            try:
                context = context.expand(*batch, self.context).reshape(-1, self.context)
            except RuntimeError as err:
                raise ValueError(
                    f"a context of shape {tuple(context.shape)} does not fit states of shape {tuple(x.shape)}"
                ) from err
        norm = channel_norm(self.features)
        solutions: list[Solution] = []
        fields = self.fields[::-1] if reverse else self.fields
        openings = [math.nan] * self.blocks if first_steps is None else first_steps
        for field, inner, end, opening in zip(fields, times, ends or [self.T] * self.blocks, openings, strict=True):
            t0, t1 = (end, 0.0) if reverse else (0.0, end)
            inner = inner if inner is None or not reverse else inner.flip(0)
            if density:
                bound = chosen.bind(field, z, context)
                y0 = torch.cat([z, torch.zeros_like(z[:, :1])], dim=1)
                dynamics: Callable[[Tensor, Tensor], Tensor] = joint_dynamics(
                    bound, compile=self.compiled, precision=self.precision
                )
                tensors = bound.tensors
            else:
                y0, tensors = z, (*field.parameters(), *(() if context is None else (context,)))
                dynamics = state_dynamics(field, z, context, compile=self.compiled)
            show = None if observer is None else functools.partial(observer, len(solutions))
            watch = Watch() if watched else None
            opened = solver if math.isnan(opening) else dataclasses.replace(solver, first_step=opening)
            ts, ys, stats = opened.integrate(
                dynamics, y0, t0, t1, times=inner, norm=norm, tensors=tensors, observer=show, watch=watch
            )
            states = ys[..., : self.features]
            logp = ys[..., self.features].reshape(len(ts), *batch) if density else None
            steps = None if watch is None else accepted_steps(watch, solver.method)
            states = states.reshape(len(ts), *batch, self.features)
            bound_field = StateDynamics(field, context)
            solutions.append(Solution(ts, states, logp, stats, steps, bound_field, _tolerance(solver)))
            z = ys[-1, :, : self.features]
        return FlowSolution(tuple(solutions), reverse)

    def check_states(self, x: Tensor) -> None:
        """Check the shape, the dtype and the values of states.

        Raises:
            TypeError: When x is no tensor.
            ValueError: When its shape or dtype does not fit, or it holds NaN or infinity.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"expected states as a torch tensor of shape (*, {self.features}), got {type(x).__name__}")
        if x.ndim < 1 or x.shape[-1] != self.features or x.numel() == 0:
            raise ValueError(f"expected states of shape (*, {self.features}), at least one, got {tuple(x.shape)}")
        dtype = next((p.dtype for p in self.parameters()), x.dtype if x.is_floating_point() else torch.float32)
        if x.dtype != dtype:
            raise ValueError(
                f"expected {dtype} like the flow's parameters, got {x.dtype}: convert the data with x.to({dtype}) "
                "or the flow with flow.double() or flow.float()"
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).any(-1).sum())
            raise ValueError(f"{bad} of {x.numel() // self.features} states hold NaN or infinity: clean the data first")

    def _check_context(self, context: Tensor | None) -> None:
        if self.context == 0 and context is not None:
            raise ValueError("this flow takes no context: build it with CNF(..., context=C) for p(x | context)")
        if context is None:
            if self.context:
                raise ValueError(f"expected a context of shape (*, {self.context}), got None")
            return
        if context.shape[-1:] != (self.context,):
            raise ValueError(f"expected a context of shape (*, {self.context}), got {tuple(context.shape)}")
        dtype = next((p.dtype for p in self.parameters()), context.dtype)
        if context.dtype != dtype:
            raise ValueError(f"expected a context of {dtype} like the flow's parameters, got {context.dtype}")
        if not torch.isfinite(context).all():
            raise ValueError("the context holds NaN or infinity: clean the data first")


class FlowDistribution(torch.distributions.Distribution):
    """Present a flow, given its context, as a distribution with exact densities and reparametrized samples.

    ``log_prob`` and samples use the solver and divergence of the flow's current mode (training or evaluation).

    Args:
        flow: The flow.
        context: Context of shape ``(*batch, C)``, or None.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: CNF, context: Tensor | None) -> None:
        self.flow, self.context = flow, context
        batch_shape = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, torch.Size([flow.features]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(value) in nats, shape ``(*batch,)``, for values of shape ``(*batch, D)``."""
        self.flow.check_states(value)
        try:
            batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        except RuntimeError as err:
            raise ValueError(
                f"values of shape {tuple(value.shape)} do not fit a density with contexts of batch shape "
                f"{tuple(self.batch_shape)}"
            ) from err
        value = value.expand(*batch, value.shape[-1])
        return self.flow.solve(value, self.context).log_prob

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples of shape ``(*sample_shape, *batch, D)``, differentiable with respect to the flow."""
        return self._draw(sample_shape, density=False).z

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw samples and their log-densities in one solve, shapes ``(*sample_shape, *batch, D)`` and without D."""
        solution = self._draw(sample_shape, density=True)
        return solution.z, solution.log_prob

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """Repeat the density over a larger batch shape."""
        if self.context is None:
            expanded = FlowDistribution(self.flow, None)
            expanded._batch_shape = torch.Size(batch_shape)
            return expanded
        return FlowDistribution(self.flow, self.context.expand(*batch_shape, self.flow.context))

    def _draw(self, sample_shape: Sequence[int], *, density: bool) -> FlowSolution:
        like = next(self.flow.parameters(), torch.zeros(()))
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=like.dtype, device=like.device)
        return self.flow.solve(noise, self.context, reverse=True, density=density)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Return log N(z; 0, I) in nats, shape ``(*batch,)``, for z of shape ``(*batch, D)``."""
    return -0.5 * (z.pow(2).sum(-1) + z.shape[-1] * math.log(2 * math.pi))


def _as_solver(solver: Solver | Mapping[str, Any] | None, *, tolerance: float) -> Solver:
    if isinstance(solver, Solver):
        return solver
    return Solver(**{"rtol": tolerance, "atol": tolerance, **(solver or {})})


def _tolerance(solver: Solver) -> tuple[float, float] | None:
    method = METHODS[solver.method]
    factor = method.tolerance_factor
    return None if method.kind == "fixed" else (factor * solver.rtol, factor * solver.atol)


def _as_modules(field: nn.Module | Sequence[nn.Module] | Callable[[], nn.Module], blocks: int) -> list[nn.Module]:
    if isinstance(field, nn.Module) and not isinstance(field, nn.ModuleList):
        modules = [field]
    elif callable(field) and not isinstance(field, nn.ModuleList):
        modules = [field() for _ in range(blocks)]
    else:
        modules = list(field)
    if len(modules) != blocks or not all(isinstance(m, nn.Module) for m in modules):
        raise ValueError(
            f"expected field to give {blocks} torch.nn.Module(s), one a block, got {len(modules)}: pass a module "
            "for one block, a sequence of modules, or a function that builds one"
        )
    return modules


__all__ = [
    "CNF",
    "FlowDistribution",
    "FlowSolution",
    "standard_normal_log_prob",
]
