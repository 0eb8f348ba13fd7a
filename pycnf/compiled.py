"""Compiled evaluation: by code of our own on a CPU (:mod:`pycnf.native`), by ``torch.compile`` on other devices."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pycnf import native
from pycnf.products import PRECISIONS
from pycnf.tangents import Form, OnePass

Compile = bool | Literal["auto"]
WIDEST = 256  # width of a layer up to which our own code has been faster than torch's matrix products


class Compiled(Protocol):
    """Evaluate the dynamics of one solve without a graph, and pull gradients back.

    ``prepared`` are the tensors that ``backward`` adds gradients for.
    """

    prepared: tuple[Tensor, ...]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt at scalar t and y (B, C)."""
        ...

    def backward(self, t: Tensor, y: Tensor, g: Tensor, grads: list[Tensor]) -> Tensor:
        """Return the gradient of y, given that of dy/dt, and add those of ``prepared`` to ``grads``."""
        ...


class Traced:
    """Evaluate the joint dynamics by what ``torch.compile`` makes of them.

    Times are arguments and the size of a batch is a symbol, so that a perceptron is compiled once, whatever solves it
    and on whatever batches. The pullback evaluates again what it needs: nothing but a result outlives a call, and that
    is copied, as CUDA graphs write over it; arguments are, because a view is compiled for what it is a view of.

    Args:
        bound: The perceptron.
        backend: Backend of ``torch.compile``.

    Attributes:
        prepared: As in :class:`Compiled`.
    """

    def __init__(self, bound: OnePass, backend: str | Callable[..., Any] = "inductor") -> None:
        self.prepared = bound.prepared
        self._tensors = [tensor.detach() for tensor in bound.prepared]
        self._evaluate, self._pull = _trace(bound.form, bound.z.device.type, backend)

    @torch.no_grad()
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return (v, -div v), shape (B, D + 1), at scalar t and y (B, D + 1)."""
        return self._evaluate(t, y.clone(), self._tensors).clone()

    @torch.no_grad()
    def backward(self, t: Tensor, y: Tensor, g: Tensor, grads: list[Tensor]) -> Tensor:
        """Return the gradient of y, given that of :meth:`forward`, and add those of ``prepared`` to ``grads``."""
        gy, parts = self._pull(t, y.clone(), g.clone(), self._tensors)
        torch._foreach_add_(grads, parts)
        return gy.clone()


@functools.cache
def _trace(form: Form, device: str, backend: str | Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compile the evaluation of a form and its pullback, once a process."""

    def evaluate(t: Tensor, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        v, div, _ = form.forward(t, y[:, :-1], tensors)
        return torch.cat([v, -div.unsqueeze(1)], dim=1)

    def pull(t: Tensor, y: Tensor, g: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        z, grads = y[:, :-1], [torch.zeros_like(tensor) for tensor in tensors]
        _, _, saved = form.forward(t, z, tensors)
        gz = form.backward(t, z, tensors, saved, g[:, :-1], -g[:, -1], grads)
        return F.pad(gz, (0, 1)), grads

    settings: dict[str, Any] = {"dynamic": True, "backend": backend}
    if device == "cuda" and backend == "inductor":
        settings["mode"] = "reduce-overhead"
    return torch.compile(evaluate, **settings), torch.compile(pull, **settings)


@functools.cache
def _traceable(device: str) -> bool:
    """Tell whether ``torch.compile`` works for a device here; where not, warn, once a process."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as err:  # whatever it lacks: a compiler, Triton, a Python that it knows
        cause = (str(err).strip().splitlines() or [type(err).__name__])[0]
        message = f"torch.compile does not work here ({cause}); flows are evaluated without it, which is as exact"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True


def compile_bound(bound: object, compile: Compile, *, density: bool = True) -> Compiled | None:
    """Return the compiled evaluation of a bound field for one solve, None where there is none or nothing to gain.

    There is nothing to gain for other fields than perceptrons whose matrices are the same at all times, for layers
    wider than ``WIDEST`` on a CPU, and for states alone on other devices.

    Args:
        bound: The field, bound to its context and probes.
        compile: Whether to compile: True warns where it cannot be done, ``"auto"`` compiles on a CPU alone and says
            nothing, False does not.
        density: Whether the state holds log p.
    """
    if not compile or not isinstance(bound, OnePass) or not bound.pullable:
        return None
    device, exact = bound.z.device.type, bound.rule.products == PRECISIONS["float32"]
    if device != "cpu":
        return Traced(bound) if compile is True and density and _traceable(device) else None
    fits = len(bound.sizes) <= native.DEEPEST and max(bound.sizes) <= WIDEST
    known = bound.field.activation in native.ACTIVATIONS and bound.z.dtype in (torch.float32, torch.float64)
    if not (fits and known and exact):
        return None
    code = native.load(quiet=compile == "auto")
    return None if code is None else native.Native(bound, code, density=density)


__all__ = ["WIDEST", "Compile", "Compiled", "Traced", "compile_bound"]
