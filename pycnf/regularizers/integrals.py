r"""Integrals along the trajectories: kinetic energy, Jacobian norm, path derivatives.

Each is int_0^T r(t, z(t)) dt, averaged over the batch, by a quadrature rule at times of the solver's dense output:

    T sum_i w_i mean_B r(t_i, z(t_i)).

The integrand calls the field at these times only. It is no channel of the solve, so it never enters the step control,
and any method and gradient mode will do; what samples cost there, they cost here (:class:`~pycnf.solve.Solver`).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pycnf.regularizers.base import Regularizer, bound_field, check_choice
from pycnf.regularizers.times import LAWS, TimeLaw, draw_times, quadrature_weights
from pycnf.solution import BoundVelocity, Solution

Integrand = Callable[[Tensor, Tensor], Tensor]
Noise = Literal["gaussian", "rademacher"]


@dataclass(frozen=True)
class PathIntegral(Regularizer):
    """Penalize the integral of something along the trajectories, averaged over the batch.

    Args:
        weight: Factor of the penalty.
        times: Number n >= 1 of times.
        law: Law of the times (:func:`~pycnf.regularizers.times.draw_times`), and with it the quadrature rule.
    """

    times: int = 4
    law: TimeLaw = "gauss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.times < 1:
            raise ValueError(f"expected times >= 1, got {self.times}")
        check_choice("law", self.law, LAWS)

    @abc.abstractmethod
    def integrand(self, field: BoundVelocity, z: Tensor) -> Integrand:
        """Return the integrand of one solve: scalar t and states (B, D) to values (B,).

        Args:
            field: Velocity of the block.
            z: A batch like those to come, (B, D).
        """

    @property
    def evaluations(self) -> int:
        """Calls of the field that one penalty makes."""
        return self.times

    def sample_times(self) -> Tensor:
        """Draw the n times as sorted fractions of T."""
        return draw_times(self.law, self.times)

    def penalty(self, solution: Solution) -> Tensor:
        """Return the integral over one block, a scalar; 0 for a solve that the evaluation budget stopped."""
        z = solution.z.reshape(len(solution.ts), -1, solution.z.shape[-1])
        total = torch.zeros((), dtype=z.dtype, device=z.device)
        if solution.stats.stopped:
            return total
        integrand = self.integrand(bound_field(solution), z[0])
        weights = quadrature_weights(self.law, self.times).tolist()
        for weight, t, state in zip(weights, solution.ts[1:-1].to(z), z[1:-1], strict=True):
            total = total + weight * integrand(t, state).mean()
        return total * (solution.ts[-1] - solution.ts[0]).abs().to(z)


@dataclass(frozen=True)
class Kinetic(PathIntegral):
    r"""Penalize the kinetic energy of the flow.

        E = mean_B int_0^T ‖v(t, z(t))‖² dt,

    summed over the D dimensions, so that it stands beside a likelihood in nats. Among all flows that carry one
    density to another the least energy belongs to straight lines at constant speed.

    Args:
        weight: Factor of E.
        times: Number n of times; one penalty makes n calls of the field, which the solve's statistics leave out.
        law: Law of the times.

    References:
        Finlay et al., How to train your neural ODE: the world of Jacobian and kinetic regularization, ICML 2020.
        Benamou & Brenier, A computational fluid mechanics solution to the Monge-Kantorovich mass transfer problem,
        Numer. Math. 84, 2000.
    """

    name: ClassVar[str] = "kinetic"

    weight: float = 0.01

    def integrand(self, field: BoundVelocity, z: Tensor) -> Integrand:
        """Return (t, z) -> ‖v(t, z)‖²."""
        return lambda t, z: field(t, z).pow(2).sum(-1)


@dataclass(frozen=True)
class Jacobian(PathIntegral):
    r"""Penalize the Frobenius norm of the field's Jacobian J along the trajectories.

        F = mean_B int_0^T (1/m) sum_k ‖e_k^T J‖² dt,    E[e_k e_k^T] = I,

    an unbiased estimate of mean_B int ‖J‖² dt with probes e_k (B x D) that are drawn once per solve.

    Args:
        weight: Factor of F.
        times: Number n of times; one penalty makes n calls of the field, which the solve's statistics leave out,
            and pulls m cotangents back through each.
        law: Law of the times.
        probes: Number m of probes.
        noise: ``"gaussian"`` or ``"rademacher"`` (signs).
        exact: Pull the D unit vectors back in place of probes: the norm itself, for small D.

    References:
        Finlay et al., ICML 2020. Hutchinson, Commun. Stat. Simul. Comput. 18, 1989.
    """

    name: ClassVar[str] = "jacobian"

    weight: float = 0.01
    probes: int = 1
    noise: Noise = "gaussian"
    exact: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 1:
            raise ValueError(f"expected probes >= 1, got {self.probes}")
        check_choice("noise", self.noise, ("gaussian", "rademacher"))

    def integrand(self, field: BoundVelocity, z: Tensor) -> Integrand:
        """Draw the probes and return (t, z) -> (1/m) sum_k ‖e_k^T J‖²."""
        probes, graph = self._draw(z), torch.is_grad_enabled()

        def norm(t: Tensor, z: Tensor) -> Tensor:
            with torch.enable_grad():
                z = z if z.requires_grad else z.detach().requires_grad_()
                v = field(t, z)
                square = torch.zeros_like(z[:, 0])
                for probe in probes if v.requires_grad else ():
                    cotangent = probe.expand_as(v)
                    (pulled,) = torch.autograd.grad(
                        v, z, cotangent, create_graph=graph, retain_graph=True, allow_unused=True
                    )
                    square = square if pulled is None else square + pulled.pow(2).sum(-1)
                return square if self.exact else square / self.probes

        return norm

    def _draw(self, z: Tensor) -> Tensor:
        if self.exact:
            return torch.eye(z.shape[1], dtype=z.dtype, device=z.device).unsqueeze(1)
        shape = (self.probes, *z.shape)
        if self.noise == "gaussian":
            return torch.randn(shape, dtype=z.dtype, device=z.device)
        return torch.randint(0, 2, shape, device=z.device).to(z.dtype) * 2 - 1


@dataclass(frozen=True)
class Derivative(PathIntegral):
    r"""Penalize the total derivative of order K of the trajectories with respect to time.

        R_K = mean_B int_0^T ‖d^K z / dt^K‖² dt,

    summed over the D dimensions. With the operator d/dt = ∂/∂t + (v · ∇) along the flow, z' = v and each further
    derivative is one forward-mode derivative of the one before, in the direction (1, v). R_K = 0 exactly when every
    trajectory is a polynomial of degree below K; K = 1 is the kinetic energy.

    Args:
        weight: Factor of R_K.
        times: Number n of times; one penalty makes n K calls of the field, which the solve's statistics leave out.
            Nested forward derivatives double the work with each order: a penalty costs as much as n (2^K - 1)
            evaluations of the velocity.
        law: Law of the times.
        order: Order K >= 1.

    References:
        Kelly, Bettencourt, Johnson & Duvenaud, Learning differential equations that are easy to solve, NeurIPS 2020.
    """

    name: ClassVar[str] = "derivative"

    weight: float = 0.01
    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order < 1:
            raise ValueError(f"expected order >= 1, got {self.order}")

    @property
    def evaluations(self) -> int:
        """Calls of the field that one penalty makes."""
        return self.times * self.order

    def integrand(self, field: BoundVelocity, z: Tensor) -> Integrand:
        """Return (t, z) -> ‖d^K z / dt^K‖²."""
        return lambda t, z: path_derivative(field, t, z, self.order).pow(2).sum(-1)


def path_derivative(field: Callable[[Tensor, Tensor], Tensor], t: Tensor, z: Tensor, order: int) -> Tensor:
    r"""Return d^K z / dt^K along dz/dt = v(t, z), shape (B, D).

    Args:
        field: Velocity v: scalar t and z (B, D) to (B, D).
        t: Time, a scalar.
        z: States (B, D).
        order: Order K >= 1; K = 1 is the velocity.

    Raises:
        RuntimeError: When the field cannot be differentiated in forward mode.

    >>> z, one = torch.randn(5, 2).double(), torch.tensor(1.0).double()
    >>> third = path_derivative(lambda t, z: 2 * z, one, z, 3)
    >>> bool(torch.allclose(third, 8 * z))
    True
    """
    if order == 1:
        return field(t, z)

    def below(t: Tensor, z: Tensor) -> Tensor:
        return path_derivative(field, t, z, order - 1)

    direction = (torch.ones_like(t), field(t, z))
    try:
        return torch.func.jvp(below, (t, z), direction)[1]
    except (NotImplementedError, RuntimeError) as err:
        if any(word in str(err) for word in ("forward AD", "forward-mode", "functorch")):
            raise RuntimeError(
                f"the field cannot be differentiated in forward mode, which path derivatives need ({err})"
            ) from err
        raise


__all__ = ["Derivative", "Jacobian", "Kinetic", "PathIntegral", "path_derivative"]
