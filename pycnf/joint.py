"""What a solve moves: states alone or together with their log-density, and the norm of its step control."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycnf.compiled import Compile, Compiled, compile_bound
from pycnf.divergence import BoundField, LinearizedField, call_field
from pycnf.dynamics import Pullback, StepPullback
from pycnf.fields import MLP
from pycnf.native import Native
from pycnf.solution import Steps
from pycnf.stepper import Watch
from pycnf.tableau import Tableau, tableau
from pycnf.tangents import OnePass


class JointDynamics:
    """Move (z, log p) together: d(z, log p)/dt = (v, -div v)."""

    def __init__(self, bound: BoundField) -> None:
        self.bound = bound

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        v, div = self.bound(t, y[:, :-1])
        return torch.cat([v, -div.unsqueeze(1)], dim=1)


class _PullableDynamics(JointDynamics):
    """Move (z, log p) together, with the pullback that the field has at hand."""

    bound: LinearizedField

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.bound.prepared

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Pullback]:
        v, div, pull = self.bound.linearize(t, y[:, :-1])

        def pullback(g: Tensor, grads: list[Tensor]) -> Tensor:
            return functional.pad(pull(g[:, :-1], -g[:, -1], grads), (0, 1))

        return torch.cat([v, -div.unsqueeze(1)], dim=1), pullback


class StateDynamics:
    """Move the states alone: dz/dt = v(t, z), the context bound."""

    def __init__(self, field: nn.Module, context: Tensor | None) -> None:
        self.field, self.context = field, context

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the velocity (B, D) at scalar t and states z (B, D)."""
        return call_field(self.field, t, z, self.context)

    def parameters(self) -> Iterator[Tensor]:
        """Return the parameters of the field."""
        return self.field.parameters()


class _CompiledDynamics:
    """Evaluate by compiled code, and where a graph is recorded by what it was made from."""

    def __init__(self, plain: Callable[[Tensor, Tensor], Tensor], compiled: Compiled) -> None:
        self.plain, self.compiled, self.tensors = plain, compiled, compiled.prepared

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (y.requires_grad or any(tensor.requires_grad for tensor in self.tensors)):
            return self.plain(t, y)
        return self.compiled.forward(t, y)

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Pullback]:
        return self.compiled.forward(t, y), functools.partial(self.compiled.backward, t, y)


class _SteppingDynamics(_CompiledDynamics):
    """Take whole steps, too."""

    compiled: Native

    def step(
        self, t: float, h: float, y: Tensor, slope: Tensor, tableau: Tableau
    ) -> tuple[Tensor, Tensor, StepPullback]:
        return self.compiled.step(t, h, y, slope, tableau)


def joint_dynamics(
    bound: BoundField, *, compile: Compile = False, precision: str = "float32"
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the joint dynamics of a bound field, with its pullback written out where it has one.

    Args:
        bound: The field.
        compile: Whether to take compiled code (:func:`pycnf.compiled.compile_bound`).
        precision: Precision of the matrix products of a perceptron (:mod:`pycnf.products`).
    """
    if isinstance(bound, OnePass):
        bound.round_to(precision)
    pullable = isinstance(bound, LinearizedField) and bound.pullable
    plain = _PullableDynamics(bound) if pullable else JointDynamics(bound)
    return _prefer(compile_bound(bound, compile), plain)


def state_dynamics(
    field: nn.Module, z: Tensor, context: Tensor | None, *, compile: Compile = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the dynamics of the states alone.

    Args:
        field: The field.
        z: A batch like those to come, (B, D).
        context: Context (B, C) or None.
        compile: Whether to take compiled code (:func:`pycnf.compiled.compile_bound`).
    """
    plain, compiled = StateDynamics(field, context), None
    if compile and type(field) is MLP:
        compiled = compile_bound(OnePass(field, z, context, None), compile, density=False)
    return _prefer(compiled, plain)


def _prefer(compiled: Compiled | None, plain: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    if compiled is None:
        return plain
    return (_SteppingDynamics if isinstance(compiled, Native) else _CompiledDynamics)(plain, compiled)


def channel_norm(features: int) -> Callable[[Tensor], Tensor]:
    """Return the step control's norm: the larger root mean square of the state and of the log-density."""

    def norm(y: Tensor) -> Tensor:
        if y.shape[-1] == features:
            return torch.linalg.vector_norm(y) / math.sqrt(y.numel())
        y = y.reshape(-1, features + 1)
        z = torch.linalg.vector_norm(y[:, :features]) / math.sqrt(len(y) * features)
        return torch.maximum(z, torch.linalg.vector_norm(y[:, features]) / math.sqrt(len(y)))

    return norm


def accepted_steps(watch: Watch, method: str) -> Steps:
    """Return what was watched of a solve as its accepted steps."""
    tab, values = tableau(method), watch.values
    if values is None:
        raise ValueError("expected a watch that an integration has filled")
    error, slope_change, stage_change = values.unbind(1)
    return Steps(
        error.new_tensor(watch.t, dtype=torch.float64),
        error.new_tensor(watch.h, dtype=torch.float64),
        error,
        torch.stack(watch.scales) if watch.scales else torch.ones_like(error),
        slope_change if tab.paired else None,
        stage_change if tab.paired else None,
        tab.order,
    )


__all__ = ["JointDynamics", "StateDynamics", "accepted_steps", "channel_norm", "joint_dynamics"]
