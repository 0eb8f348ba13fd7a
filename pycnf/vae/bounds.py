r"""The evidence lower bound that trains a variational auto-encoder, and the likelihood by importance weights."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pycnf.flow import standard_normal_log_prob
from pycnf.images.pieces import bits_per_dim
from pycnf.objective import Objective
from pycnf.scale import evaluation_mode
from pycnf.solution import SolveStats
from pycnf.training.batches import preserved_rng, seed_all
from pycnf.training.evaluation import Evaluation
from pycnf.vae.model import VAE
from pycnf.vae.posteriors import PLAIN, Draw, SolvePlan


@dataclass(frozen=True)
class Bound(Objective):
    """Hold the training objective of one batch of pictures.

    ``nll`` is the negative evidence lower bound, reconstruction + kl, whatever beta is.

    Attributes:
        reconstruction: Mean of -log p(x | z), in nats.
        kl: Mean of log q(z | x) - log p(z), in nats, an estimate of the divergence.
        beta: Weight of ``kl`` in the loss.
    """

    reconstruction: Tensor
    kl: Tensor
    beta: Tensor


def evidence_bound(
    vae: VAE,
    x: Tensor,
    *,
    beta: float = 1.0,
    plan: SolvePlan = PLAIN,
) -> Bound:
    r"""Return the objective mean(-log p(x | z) + beta (log q(z | x) - log p(z))) + sum of weight * penalty, z ~ q.

    Args:
        vae: The model.
        x: Pictures (B, pixels).
        beta: Weight of the divergence, below 1 in the warm-up.
        plan: Regularizers of the posterior's solve, and the steps it starts with.

    References:
        Kingma & Welling, Auto-encoding variational Bayes, ICLR 2014. Sonderby et al., Ladder variational autoencoders,
        NeurIPS 2016 (the warm-up).

    >>> vae = VAE((2, 2), latent=1, networks="dense", widths=(4,), posterior={"kind": "gaussian"})
    >>> found = evidence_bound(vae, torch.ones(8, 4), beta=0.5)
    >>> bool(torch.isclose(found.loss, found.reconstruction + 0.5 * found.kl))
    True
    """
    drawn = vae.posterior(vae.encode(x), (), plan)
    reconstruction, kl = (part.mean() for part in _terms(vae, x, drawn))
    found = drawn.penalized
    loss, weight = reconstruction + beta * kl + found.total, reconstruction.new_tensor(beta)
    nll = (reconstruction + kl).detach()
    return Bound(
        loss, nll, found.penalties, found.weights, found.solution, reconstruction.detach(), kl.detach(), weight
    )


def evaluate_vae(vae: VAE, x: Tensor, *, batch_size: int = 100, warm_start: bool = True) -> Evaluation:
    """Compute the mean negative evidence lower bound of pictures in evaluation mode, one posterior sample each.

    Args:
        vae: The model.
        x: Pictures (N, pixels).
        batch_size: Pictures of one solve; the hardest of them sets its steps.
        warm_start: Start the solve of each batch with the step that the one before suggests.

    Returns:
        The evaluation: ``nll`` is the bound in nats, ``nfe`` counts the evaluations of one batch's posterior solve.
    """
    began, device = time.perf_counter(), next(vae.parameters()).device
    bounds, stats, plan = list[Tensor](), SolveStats(), PLAIN
    parts = x.split(batch_size)
    with evaluation_mode(vae), torch.no_grad():
        for part in parts:
            pictures = part.to(device)
            drawn = vae.posterior(vae.encode(pictures), (), plan)
            reconstruction, kl = _terms(vae, pictures, drawn)
            bounds.append((reconstruction + kl).double())
            solution = drawn.penalized.solution
            stats, plan = stats + solution.stats, SolvePlan(first_steps=solution.openings if warm_start else None)
    values, flow = torch.cat(bounds), vae.posterior.flow
    return Evaluation(
        nll=values.mean().item(),
        nll_se=values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan,
        rows=len(values),
        batch_size=batch_size,
        nfe=stats.nfe / len(parts),
        accepted=stats.accepted / len(parts),
        rejected=stats.rejected / len(parts),
        seconds=time.perf_counter() - began,
        method="none" if flow is None else flow.eval_solver.method,
        rtol=math.nan if flow is None else flow.eval_solver.rtol,
        atol=math.nan if flow is None else flow.eval_solver.atol,
    )


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Hold the result of :func:`importance_likelihood`; all values are means over the pictures, in nats.

    Attributes:
        nll: Negative log-likelihood by importance weights, an upper bound in expectation that falls with ``samples``.
        nll_se: Standard error of ``nll`` over the pictures.
        sampling_se: Share of that error which the finite number of samples causes (first-order estimate).
        bound: Negative evidence lower bound of the same samples, never below ``nll``.
        bound_se: Standard error of ``bound`` over the pictures.
        effective: Effective number of samples, (sum w)^2 / sum w^2, at most ``samples``.
        samples: Samples a picture.
        rows: Number of pictures.
        pixels: Pixels of a picture.
        nfe: Function evaluations of one solve of the posterior.
        seconds: Wall-clock time.
    """

    nll: float
    nll_se: float
    sampling_se: float
    bound: float
    bound_se: float
    effective: float
    samples: int
    rows: int
    pixels: int
    nfe: float
    seconds: float

    @property
    def bits_per_dim(self) -> float:
        """``nll`` in bits a pixel."""
        return bits_per_dim(self.nll, self.pixels)


def importance_likelihood(vae: VAE, x: Tensor, *, samples: int = 500, chunk: int = 500, seed: int = 0) -> Likelihood:
    r"""Estimate -log p(x) = -log E_q[w] with w = p(x | z) p(z) / q(z | x) by the mean weight of k samples a picture.

    The logarithm of the mean is at least the mean of the logarithm, so the estimate is never worse than the bound of
    the same samples. Pictures are taken one at a time: the samples of one share their posterior's weights, whose exact
    divergence is then nearly free.

    Args:
        vae: The model, taken in evaluation mode.
        x: Pictures (N, pixels).
        samples: Samples k a picture.
        chunk: Samples of one solve.
        seed: Seed; the samples of picture i depend on (seed, i, chunk) alone.

    Raises:
        ValueError: When ``samples`` or ``chunk`` is below 1.

    References:
        Burda et al., Importance weighted autoencoders, ICLR 2016.

    >>> vae = VAE((2, 2), latent=1, networks="dense", widths=(4,), posterior={"kind": "gaussian"})
    >>> found = importance_likelihood(vae, torch.ones(3, 4), samples=20)
    >>> found.nll <= found.bound and 1 <= found.effective <= 20
    True
    """
    if samples < 1 or chunk < 1:
        raise ValueError(f"expected samples >= 1 and chunk >= 1, got {samples} and {chunk}")
    began, device = time.perf_counter(), next(vae.parameters()).device
    rows, nfe, solves = [], 0, 0
    with evaluation_mode(vae), torch.no_grad(), preserved_rng(device):
        for i, picture in enumerate(x):
            seed_all(seed, i, stream=4, device=device)
            picture = picture.to(device)
            features = vae.encode(picture.unsqueeze(0)).squeeze(0)
            parts = []
            for n in _chunks(samples, chunk):
                drawn = vae.posterior(features, (n,))
                reconstruction, kl = _terms(vae, picture, drawn)
                parts.append(-(reconstruction + kl).double())
                nfe, solves = nfe + drawn.penalized.solution.stats.nfe, solves + 1
            rows.append(torch.cat(parts))
    log_w = torch.stack(rows)
    log_mean = torch.logsumexp(log_w, dim=1) - math.log(samples)
    w = torch.exp(log_w - log_mean.unsqueeze(1))
    spread = w.var(dim=1) / samples if samples > 1 else torch.full_like(log_mean, math.nan)
    return Likelihood(
        nll=-log_mean.mean().item(),
        nll_se=_standard_error(log_mean),
        sampling_se=spread.sum().sqrt().item() / len(x),
        bound=-log_w.mean().item(),
        bound_se=_standard_error(log_w.mean(1)),
        effective=(samples**2 / w.square().sum(1)).mean().item(),
        samples=samples,
        rows=len(x),
        pixels=vae.features,
        nfe=nfe / solves,
        seconds=time.perf_counter() - began,
    )


def _terms(vae: VAE, x: Tensor, drawn: Draw) -> tuple[Tensor, Tensor]:
    """Return -log p(x | z) and log q(z | x) - log p(z) of each sample."""
    raw = vae.decode(drawn.z)
    return -vae.pixels.log_prob(x.expand(*drawn.z.shape[:-1], -1), raw), drawn.log_q - standard_normal_log_prob(drawn.z)


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _standard_error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


__all__ = ["Bound", "Likelihood", "evaluate_vae", "evidence_bound", "importance_likelihood"]
