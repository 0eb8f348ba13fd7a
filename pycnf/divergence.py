r"""Divergences: the value of a field and its divergence in one pass.

The log-density of a flow changes by d log p / dt = -div v = -tr(dv/dz). A divergence is bound to a field, a
batch and a context once per solve; what it draws (Hutchinson's probes) is fixed for that solve, since an
adaptive solver needs a right-hand side that does not change between its calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pycnf.convolution import ConvNet
from pycnf.convolution_tangents import ConvolutionPass
from pycnf.dynamics import check_closure
from pycnf.fields import MLP
from pycnf.tangents import OnePass, Pullback


class BoundField(Protocol):
    """Evaluate (t, z) -> (v, div v) for one solve; ``tensors`` are what it closes over and may want gradients."""

    tensors: tuple[Tensor, ...]

    def __call__(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class LinearizedField(BoundField, Protocol):
    """Evaluate as a :class:`BoundField`, with a reverse pass that is written out where ``pullable``.

    ``linearize(t, z)`` returns v, div v and a function (gv, gdiv, grads) -> gz that adds to ``grads`` the gradients of
    the tensors ``prepared``, from which automatic differentiation goes on, once per solve.
    """

    pullable: bool
    prepared: tuple[Tensor, ...]

    def linearize(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Pullback]: ...


class Divergence(Protocol):
    """Bind to a field for one solve."""

    def bind(self, field: nn.Module, z: Tensor, context: Tensor | None) -> BoundField:
        """Return the evaluator of v and div v for a batch like z, shape (B, D)."""
        ...


@dataclass(frozen=True)
class Exact:
    r"""Compute div v = sum_i dv_i / dz_i exactly.

    Every mode costs one call of the field per evaluation. ``"auto"`` takes what is written out for a shipped field, an
    :class:`~pycnf.fields.MLP` or a :class:`~pycnf.convolution.ConvNet`, differentiable once; or by a field's class of
    your own in a method ``one_pass(z, context, probes)`` that returns a :class:`BoundField` (probes (m, B, D), None for
    the exact divergence); and ``"reverse"`` for any other field, which pulls D cotangents back, one after another.
    ``"forward"`` pushes the D unit tangents through the field together (``torch.func``): often faster, but it rests on
    torch's forward-mode formulas, and some of them (layer normalization among them) have wrong derivatives of their
    own, so check gradients before you train with it.

    Args:
        mode: How the divergence is formed.

    >>> z = torch.randn(5, 3)
    >>> v, div = Exact().bind(MLP(3), z, None)(torch.tensor(0.0), z)
    >>> v.shape == (5, 3) and div.shape == (5,)
    True
    """

    mode: Literal["auto", "forward", "reverse"] = "auto"

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "forward", "reverse"):
            raise ValueError(f"unknown mode {self.mode!r}: choose auto, forward or reverse")

    def bind(self, field: nn.Module, z: Tensor, context: Tensor | None) -> BoundField:
        """Bind to a field for one solve (see :class:`Divergence`)."""
        if self.mode == "auto" and (shipped := _one_pass(field, z, context, None)) is not None:
            return shipped
        return _Forward(field, context) if self.mode == "forward" else _Reverse(field, context, None)

    def __str__(self) -> str:
        return "exact" if self.mode == "auto" else f"exact-{self.mode}"


@dataclass(frozen=True)
class Hutchinson:
    r"""Estimate div v = tr J by (1/m) sum_k e_k^T J e_k with E[e e^T] = I, unbiased.

    The probes e_k are drawn once per solve. The variance of one probe is 2 ‖S‖² (Frobenius norm) for Gaussian noise and
    2 (‖S‖² - sum_i S_ii²) for Rademacher noise, with S the symmetric part of J; m probes divide it by m.

    Args:
        probes: Number m of probes.
        noise: ``"gaussian"`` or ``"rademacher"`` (signs; the smaller variance, exact on diagonal Jacobians).

    Raises:
        ValueError: On fewer than one probe or an unknown noise.

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
        splines, Commun. Stat. Simul. Comput. 18, 1989. Grathwohl et al., FFJORD, ICLR 2019.
    """

    probes: int = 1
    noise: Literal["gaussian", "rademacher"] = "gaussian"

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"expected probes >= 1, got {self.probes}")
        if self.noise not in ("gaussian", "rademacher"):
            raise ValueError(f"unknown noise {self.noise!r}: choose gaussian or rademacher")

    def bind(self, field: nn.Module, z: Tensor, context: Tensor | None) -> BoundField:
        """Draw the probes and bind to a field for one solve (see :class:`Divergence`)."""
        shape = (self.probes, *z.shape)
        if self.noise == "gaussian":
            eps = torch.randn(shape, dtype=z.dtype, device=z.device)
        else:
            eps = torch.randint(0, 2, shape, device=z.device).to(z.dtype) * 2 - 1
        return _one_pass(field, z, context, eps) or _Reverse(field, context, eps)

    def __str__(self) -> str:
        return f"hutchinson-{self.noise}" + (f"-{self.probes}" if self.probes > 1 else "")


def parse_divergence(spec: str | Divergence) -> Divergence:
    """Return the divergence named by ``"exact[-mode]"`` or ``"hutchinson[-noise][-probes]"``.

    >>> parse_divergence("hutchinson-rademacher-4") == Hutchinson(4, "rademacher")
    True
    """
    if not isinstance(spec, str):
        return spec
    if exact := re.fullmatch(r"exact(?:-(\w+))?", spec.lower()):
        return Exact(exact[1] or "auto")  # type: ignore[arg-type]  # checked by Exact itself
    if estimate := re.fullmatch(r"hutchinson(?:-([a-z]+))?(?:-(\d+))?", spec.lower()):
        return Hutchinson(int(estimate[2] or 1), estimate[1] or "gaussian")  # type: ignore[arg-type]  # likewise
    raise ValueError(
        f"unknown divergence {spec!r}: choose exact, exact-forward, exact-reverse, hutchinson, hutchinson-rademacher, "
        "or with a number of probes such as hutchinson-gaussian-8"
    )


def call_field(field: nn.Module, t: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
    """Evaluate a field and check the shape of what it returns.

    Raises:
        ValueError: When the field does not return velocities shaped like z.
    """
    v = field(t, z) if context is None else field(t, z, context)
    if not isinstance(v, Tensor) or v.shape != z.shape:
        got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"the field must return velocities shaped like z, {tuple(z.shape)}, got {got}")
    return v


def _one_pass(field: nn.Module, z: Tensor, context: Tensor | None, probes: Tensor | None) -> BoundField | None:
    """Bind a field that forms v and div v in one pass; None for any other, a subclass of such a field included."""
    if type(field) is MLP:
        return OnePass(field, z, context, probes)
    if type(field) is ConvNet:
        return ConvolutionPass(field, z, context, probes)
    bind = vars(type(field)).get("one_pass")
    return None if bind is None else bind(field, z, context, probes)


def _closed_over(field: nn.Module, context: Tensor | None) -> tuple[Tensor, ...]:
    return (*field.parameters(), *(() if context is None else (context,)))


class _Forward:
    """Push the D unit tangents through any field together, in one call of it."""

    def __init__(self, field: nn.Module, context: Tensor | None) -> None:
        self.field, self.context = field, context
        self.tensors = _closed_over(field, context)

    def __call__(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        def value(z: Tensor) -> Tensor:
            return call_field(self.field, t, z, self.context)

        def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
            v, moved = torch.func.jvp(value, (z,), (tangent,))  # type: ignore[misc]  # two without has_aux
            return v, (tangent * moved).sum(-1)

        basis = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).unsqueeze(1).expand(-1, *z.shape)
        try:
            v, diagonal = torch.func.vmap(push, out_dims=(None, 0), randomness="same")(basis)  # type: ignore[arg-type]
        except (NotImplementedError, RuntimeError) as err:
            if any(word in str(err) for word in ("forward AD", "forward-mode", "vmap", "functorch")):
                raise RuntimeError(
                    f"{type(self.field).__name__} cannot be differentiated in forward mode ({err}): "
                    "take divergence=Exact(mode='reverse')"
                ) from err
            raise
        return v, diagonal.sum(0)


class _Reverse:
    """Pull cotangents back through any field, one after another, after one call of it.

    With probes (m, B, D) the result is the mean of e^T J e, without it is the sum over the D unit vectors.
    """

    def __init__(self, field: nn.Module, context: Tensor | None, probes: Tensor | None) -> None:
        self.field, self.context, self.probes = field, context, probes
        self.unchecked = torch.is_grad_enabled()
        self.tensors = _closed_over(field, context)

    def __call__(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        wanted = z.requires_grad or any(tensor.requires_grad for tensor in self.tensors)
        graph = torch.is_grad_enabled() and wanted
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            v = call_field(self.field, t, z, self.context)
            if self.unchecked and not wanted:
                check_closure(v, [z])
            self.unchecked = False
            div = torch.zeros_like(z[:, 0])
            probes = torch.eye(z.shape[1]).to(z).unsqueeze(1) if self.probes is None else self.probes
            for probe in probes if v.requires_grad else ():
                cotangent = probe.expand_as(v)
                (pulled,) = torch.autograd.grad(
                    v, z, cotangent, create_graph=graph, retain_graph=True, allow_unused=True
                )
                div = div if pulled is None else div + (pulled * probe).sum(-1)
        div = div if self.probes is None else div / len(self.probes)
        return (v, div) if graph else (v.detach(), div.detach())


__all__ = ["BoundField", "Divergence", "Exact", "Hutchinson", "LinearizedField", "call_field", "parse_divergence"]
