"""What a solve moves: states alone or together with their log-density, and the norm of its step control."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycnf.divergence import BoundField, LinearizedField, call_field
from pycnf.dynamics import Pullback
from pycnf.solution import Steps
from pycnf.stepper import Watch
from pycnf.tableau import tableau


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


def joint_dynamics(bound: BoundField) -> JointDynamics:
    """Return the joint dynamics of a bound field, with its written-out pullback where it has one."""
    pullable = isinstance(bound, LinearizedField) and bound.pullable
    return _PullableDynamics(bound) if pullable else JointDynamics(bound)


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
