r"""Approximate posteriors q(z | x): a Gaussian, and flows of it whose parameters the encoder emits.

Every posterior draws z_0 ~ N(m(x), s(x)^2) and carries it to z, with log q(z | x) = log N(z_0) - log |det dz/dz_0|.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn import functional as F

from pycnf.flow import CNF, FlowSolution
from pycnf.objective import Penalized, solve_penalized
from pycnf.regularizers import Regularizer
from pycnf.solve import Solver
from pycnf.vae.amortized import LowRankMLP

MIN_SCALE = 1e-4


@dataclass(frozen=True)
class SolvePlan:
    """Say what is wanted of a posterior's solve.

    Attributes:
        regularizers: Regularizers of every block.
        factors: Factor of each one's weight, 1 by default.
        first_steps: First step of each block (:meth:`CNF.solve <pycnf.flow.CNF.solve>`).
    """

    regularizers: Sequence[Regularizer] = ()
    factors: Sequence[float] | None = None
    first_steps: Sequence[float] | None = None


PLAIN = SolvePlan()


@dataclass(frozen=True)
class Draw:
    """Hold samples of a posterior.

    Attributes:
        z: Samples, shape ``(*samples, *batch, D)``.
        log_q: Their log-density log q(z | x) in nats, without the last axis.
        penalized: The solve that carried them and what regularizers make of it; of no blocks for posteriors that
            need none.
    """

    z: Tensor
    log_q: Tensor
    penalized: Penalized


class Posterior(nn.Module, abc.ABC):
    """Draw z_0 from a Gaussian N(m(x), s(x)^2); a subclass carries it on.

    Args:
        features: Number H of the encoder's features.
        latent: Dimension D of z.

    Attributes:
        flow: The flow that carries, None where there is none to be solved.
    """

    flow: CNF | None

    def __init__(self, features: int, latent: int) -> None:
        super().__init__()
        self.features, self.latent, self.flow = features, latent, None
        self.mean, self.scale = nn.Linear(features, latent), nn.Linear(features, latent)

    def base(self, h: Tensor) -> Distribution:
        """Return the Gaussian of z_0 for features h of shape ``(*batch, H)``."""
        return Independent(Normal(self.mean(h), F.softplus(self.scale(h)) + MIN_SCALE), 1)

    def forward(self, h: Tensor, samples: Sequence[int] = (), plan: SolvePlan = PLAIN) -> Draw:
        """Draw samples with their densities.

        Args:
            h: Features, shape ``(*batch, H)``.
            samples: Shape of the samples for each member of the batch.
            plan: What is wanted of the solve.
        """
        base = self.base(h)
        z = base.rsample(torch.Size(samples))
        drawn = Draw(z, base.log_prob(z), Penalized(z.new_zeros(()), {}, {}, FlowSolution((), False)))
        return self.carry(drawn, h, plan)

    @abc.abstractmethod
    def carry(self, drawn: Draw, h: Tensor, plan: SolvePlan) -> Draw:
        """Carry draws of the Gaussian on to those of the posterior."""


class GaussianPosterior(Posterior):
    """Take the Gaussian as it is: q(z | x) = N(m(x), s(x)^2)."""

    def carry(self, drawn: Draw, h: Tensor, plan: SolvePlan) -> Draw:
        return drawn


class PlanarPosterior(Posterior):
    r"""Carry z_0 through K planar maps z + u tanh(w^T z + b) whose u, w and b the encoder emits.

    u is moved along w so that w^T u > -1, which makes the map invertible.

    Args:
        features: Number H of the encoder's features.
        latent: Dimension D of z.
        maps: Number K of maps.

    References:
        Rezende & Mohamed, Variational inference with normalizing flows, ICML 2015, section 4.1 and appendix A.
    """

    def __init__(self, features: int, latent: int, maps: int = 16) -> None:
        super().__init__(features, latent)
        if maps < 1:
            raise ValueError(f"expected maps >= 1, got {maps}")
        self.maps = maps
        self.numbers = nn.Linear(features, maps * (2 * latent + 1))

    def carry(self, drawn: Draw, h: Tensor, plan: SolvePlan) -> Draw:
        z, log_q = drawn.z, drawn.log_q
        for numbers in self.numbers(h).unflatten(-1, (self.maps, -1)).unbind(-2):
            u, w, b = numbers.split([self.latent, self.latent, 1], dim=-1)
            wu = (w * u).sum(-1, keepdim=True)
            u = u + (F.softplus(wu) - 1 - wu) * w / w.square().sum(-1, keepdim=True)
            y = torch.tanh((w * z).sum(-1, keepdim=True) + b)
            z = z + u * y
            log_q = log_q - torch.log1p((1 - y.square()) * (w * u).sum(-1, keepdim=True)).squeeze(-1)
        return replace(drawn, z=z, log_q=log_q)


class AutoregressivePosterior(Posterior):
    r"""Carry z_0 through K inverse autoregressive maps z_i <- m_i + s_i z_i, where m_i and s_i see z_1, ..., z_{i-1}.

    The order of the components is reversed from one map to the next. The masked networks are zuko's.

    Args:
        features: Number H of the encoder's features, all of which condition every map.
        latent: Dimension D of z.
        maps: Number K of maps.
        hidden: Widths of the masked networks.

    Raises:
        ImportError: zuko is not installed.

    References:
        Kingma et al., Improved variational inference with inverse autoregressive flow, NeurIPS 2016. Rozet et al.,
        Zuko: normalizing flows in PyTorch, https://github.com/probabilists/zuko.
    """

    def __init__(self, features: int, latent: int, maps: int = 4, hidden: Sequence[int] = (320, 320)) -> None:
        super().__init__(features, latent)
        try:
            from zuko.flows.autoregressive import MaskedAutoregressiveTransform
        except ImportError as err:
            raise ImportError("zuko is needed for this posterior and is missing: pip install 'pycnf[vae]'") from err
        orders = (torch.arange(latent), torch.arange(latent).flip(0))
        self.maps = nn.ModuleList(
            MaskedAutoregressiveTransform(latent, features, order=orders[i % 2], hidden_features=tuple(hidden))
            for i in range(maps)
        )

    def carry(self, drawn: Draw, h: Tensor, plan: SolvePlan) -> Draw:
        z, log_q = drawn.z, drawn.log_q
        for transform in self.maps:
            z, log_det = transform(h).call_and_ladj(z)
            log_q = log_q - log_det
        return replace(drawn, z=z, log_q=log_q)


class CNFPosterior(Posterior):
    r"""Carry z_0 through a continuous normalizing flow whose weights the encoder changes by low-rank updates.

    dz/dt = v(t, z; c(x)) from z(0) = z_0 to z = z(T); log q(z | x) = log N(z_0) - int_0^T div v dt. The updates are
    zero at first, so that training starts from one flow for all x.

    Args:
        features: Number H of the encoder's features.
        latent: Dimension D of z.
        hidden: Hidden widths of each block's :class:`~pycnf.vae.amortized.LowRankMLP`.
        blocks: Number of blocks.
        rank: Rank of the updates.
        activation: Activation of the fields.
        T: End time of each block.
        divergence: Divergence in training mode.
        solver: Solver in training mode, or its settings.
        eval_divergence: Divergence in evaluation mode.
        eval_solver: Solver in evaluation mode, or its settings.

    References:
        Grathwohl et al., FFJORD, ICLR 2019, section 4.2.
    """

    flow: CNF

    def __init__(
        self,
        features: int,
        latent: int,
        hidden: Sequence[int] = (256, 256),
        blocks: int = 1,
        rank: int = 20,
        activation: str = "softplus",
        T: float = 0.5,
        divergence: str = "hutchinson",
        solver: Solver | Mapping[str, Any] | None = None,
        eval_divergence: str = "exact",
        eval_solver: Solver | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(features, latent)
        fields = [
            LowRankMLP(latent, hidden, rank, activation=activation, block=i, blocks=blocks) for i in range(blocks)
        ]
        first = fields[0]
        self.flow = CNF(
            latent,
            blocks=blocks,
            context=first.context,
            field=fields,
            T=T,
            divergence=divergence,
            solver=solver,
            eval_divergence=eval_divergence,
            eval_solver=eval_solver,
        )
        self.updates = nn.Linear(features, first.context)
        with torch.no_grad():
            for parameter in self.updates.parameters():
                parameter.unflatten(0, (blocks, first.numbers))[:, : first.silent] = 0

    def carry(self, drawn: Draw, h: Tensor, plan: SolvePlan) -> Draw:
        wanted = (plan.regularizers, plan.factors, plan.first_steps)
        penalized = solve_penalized(self.flow, drawn.z, self.updates(h), *wanted)
        solution = penalized.solution
        return Draw(solution.z, drawn.log_q + solution.logp, penalized)


POSTERIORS: dict[str, Callable[..., Posterior]] = {
    "gaussian": GaussianPosterior,
    "planar": PlanarPosterior,
    "iaf": AutoregressivePosterior,
    "cnf": CNFPosterior,
}


def build_posterior(kind: str, features: int, latent: int, **settings: Any) -> Posterior:
    """Build a posterior by name: ``"gaussian"``, ``"planar"``, ``"iaf"`` or ``"cnf"``.

    Raises:
        ValueError: On an unknown name or unknown settings.

    >>> build_posterior("planar", 16, 2, maps=3)(torch.randn(5, 16)).z.shape == (5, 2)
    True
    """
    if kind not in POSTERIORS:
        raise ValueError(f"unknown posterior {kind!r}: choose one of {', '.join(POSTERIORS)}")
    try:
        return POSTERIORS[kind](features, latent, **settings)
    except TypeError as err:
        raise ValueError(f"the settings of posterior {kind!r} do not fit: {err}") from err


__all__ = [
    *("POSTERIORS", "AutoregressivePosterior", "CNFPosterior", "Draw", "GaussianPosterior", "PlanarPosterior"),
    *("Posterior", "SolvePlan", "build_posterior"),
]
