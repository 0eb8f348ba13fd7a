"""Right-hand sides dy/dt = f(t, y) and how gradients are pulled back through one evaluation of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pycnf.tableau import Tableau

Pullback = Callable[[Tensor, list[Tensor]], Tensor]


class Dynamics(Protocol):
    """Evaluate dy/dt, and on demand together with its pullback.

    ``linearize(t, y)`` returns f and a function (g, grads) -> g^T df/dy that adds g^T df/dtheta_i to grads[i]
    for the ``tensors`` theta_i.
    """

    @property
    def tensors(self) -> Sequence[Tensor]: ...

    def __call__(self, t: Tensor, y: Tensor) -> Tensor: ...

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Pullback]: ...


StepPullback = Callable[[Tensor, Tensor, list[Tensor]], Tensor]


@runtime_checkable
class SteppingDynamics(Dynamics, Protocol):
    """Evaluate all stages of a Runge-Kutta step at once.

    ``step(t, h, y, slope, tableau)`` returns the slopes (s, N), the first of which is given, the last stage (N,) and a
    function (g, glast, grads) -> gy: from the gradients of the slopes (s, N), those of later ones passed on to earlier
    ones in place, and of the last stage, to the share of y that comes through the stages; it adds to ``grads`` too.
    """

    def step(
        self, t: float, h: float, y: Tensor, slope: Tensor, tableau: Tableau
    ) -> tuple[Tensor, Tensor, StepPullback]: ...


def check_closure(value: Tensor, known: Sequence[Tensor]) -> None:
    """Refuse a right-hand side that depends on tensors whose gradients would be lost.

    Raises:
        ValueError: When its graph ends in a tensor that wants a gradient and is not among those known.
    """
    leaves = {id(tensor) for tensor in known}
    inner = {tensor.grad_fn for tensor in known}
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node in inner:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in leaves:
            raise ValueError(
                f"the right-hand side depends on a tensor of shape {tuple(variable.shape)} that wants a gradient and "
                "is no parameter of the field: register it as a parameter, hand it over as context, or name it in "
                "tensors="
            )
        waiting += [following for following, _ in node.next_functions]


class AutogradDynamics:
    """Give any right-hand side a pullback by automatic differentiation of one evaluation."""

    def __init__(self, func: Callable[[Tensor, Tensor], Tensor], tensors: Sequence[Tensor]) -> None:
        self.func, self.tensors, self.checked = func, tensors, False

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the right-hand side."""
        return self.func(t, y)

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Pullback]:
        """Evaluate the right-hand side and return its pullback (see :class:`Dynamics`)."""
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            value = self.func(t, point)
        if not self.checked:
            self.checked = True
            check_closure(value, [point, *self.tensors])
        wanted = [i for i, tensor in enumerate(self.tensors) if tensor.requires_grad]

        def pullback(g: Tensor, grads: list[Tensor]) -> Tensor:
            if not value.requires_grad:
                return torch.zeros_like(point)
            inputs = [point, *(self.tensors[i] for i in wanted)]
            gy, *rest = torch.autograd.grad(value, inputs, g, allow_unused=True, retain_graph=True)
            for i, grad in zip(wanted, rest, strict=True):
                if grad is not None:
                    grads[i] += grad
            return torch.zeros_like(point) if gy is None else gy

        return value.detach(), pullback


__all__ = ["AutogradDynamics", "Dynamics", "Pullback", "StepPullback", "SteppingDynamics", "check_closure"]
