"""Variational auto-encoders as an experiment: the bound, the likelihood by importance weights, evaluations a solve."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pycnf.experiments.image_flows import STREAM, tight
from pycnf.experiments.setup import Setup
from pycnf.experiments.sweep import Solved, sweep
from pycnf.experiments.workloads import Row, Settings, Workload, check_batches, divergence_for, seeded, test_row
from pycnf.flow import standard_normal_log_prob
from pycnf.images.pieces import bits_per_dim
from pycnf.solution import SolveStats
from pycnf.solve import Solver
from pycnf.training import FitResult
from pycnf.training.batches import preserved_rng, seed_all
from pycnf.vae.bounds import evaluate_vae, importance_likelihood
from pycnf.vae.model import VAE
from pycnf.vae.networks import NetworkKind
from pycnf.vae.pictures import PictureSet, describe_pictures, load_pictures
from pycnf.vae.posteriors import SolvePlan
from pycnf.vae.training import train_vae

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 20  # pictures that a figure reconstructs
OF_FIT = ("batch_size", "eval_batch_size", "lr", "optimizer", "weight_decay", "clip", "warm_start", "max_steps")


@dataclass(frozen=True, kw_only=True)
class AutoEncoders(Workload):
    """Train a variational auto-encoder whose posterior is a flow of low-rank updates (``pycnf.vae``).

    The flow's settings are those of the setup; "nll" stands for the negative evidence lower bound, and evaluations
    are those of one posterior solve. Arms are tested with the same noise.

    Attributes:
        networks: Kind of encoder and decoder.
        widths: Their widths.
        pixels: Distribution of the pixels.
        latent: Dimension of the latent state.
        rank: Rank of the per-sample updates.
        epochs: Epochs at most, where ``max_steps`` is not given.
        warmup: Epochs in which the weight of the divergence rises from 0 to 1.
        patience: Epochs without a new best bound after which training stops.
        probes: Probes of the divergence in tests, for more than 100 latent dimensions.
        validation_rows: Validation pictures, the first ones; None for all.
        test_rows: Test pictures, the first ones; None for all.
        importance_samples: Samples a picture of the likelihood by importance weights.
        importance_rows: Test pictures for it, the first ones; None for all.
    """

    kind: ClassVar[str] = "vae"
    measures: ClassVar[Mapping[str, str]] = {
        "importance_nll": "importance-weighted NLL (nats)",
        "effective": "effective samples",
        "bits_per_dim": "bound (bits/dim)",
    }
    note: ClassVar[str] = "NLL: the negative evidence lower bound. NFE: of the solve of a batch's posterior."

    networks: NetworkKind = "conv"
    widths: tuple[int, ...] = (32, 256)
    pixels: str = "bernoulli"
    latent: int = 64
    rank: int = 20
    epochs: int = 2000
    warmup: int = 100
    patience: int = 35
    probes: int = 10
    validation_rows: int | None = None
    test_rows: int | None = None
    importance_samples: int = 500
    importance_rows: int | None = None

    def present(self, name: str, data_dir: Path | None) -> bool:
        return describe_pictures(name, data_dir).present

    def load(self, name: str, data_dir: Path | None) -> PictureSet:
        whole = load_pictures(name, data_dir=data_dir)
        validation, test = whole.validation[: self.validation_rows], whole.test[: self.test_rows]
        return dataclasses.replace(whole, validation=validation, test=test)

    def setup(self, name: str, settings: Settings, data: PictureSet | None = None) -> Setup:
        setup = Setup(**{"schedule": "plateau", **settings})
        if data is None:
            return setup
        setup = check_batches(setup, len(data.train), name)
        epoch = len(data.train) // setup.batch_size
        steps = settings.get("max_steps", self.epochs * epoch)
        return dataclasses.replace(setup, max_steps=steps, validate_every=epoch)

    def build(self, data: PictureSet, setup: Setup, seed: int) -> VAE:
        posterior = {
            "kind": "cnf",
            "hidden": list(setup.hidden),
            "blocks": setup.blocks,
            "rank": self.rank,
            "activation": setup.activation,
            "T": setup.T,
            "divergence": setup.divergence,
            "solver": setup.solver().to_dict(),
            "eval_divergence": divergence_for(self.latent, self.probes),
            "eval_solver": setup.test_solver().to_dict(),
        }
        shape: dict[str, Any] = {
            "latent": self.latent,
            "networks": self.networks,
            "widths": self.widths,
            "pixels": self.pixels,
        }
        return seeded(lambda: VAE(data.shape, posterior=posterior, **shape), seed)

    def fit(self, model: VAE, data: PictureSet, setup: Setup, **options: Any) -> FitResult:
        shared = {name: value for name, value in setup.training().items() if name in OF_FIT}
        return train_vae(
            model, data, epochs=self.epochs, warmup=self.warmup, patience=self.patience, **shared, **options
        )

    def test(self, model: VAE, data: PictureSet, setup: Setup) -> Row:
        device, size = next(model.parameters()).device, setup.test_batch_size
        with preserved_rng(device):
            seed_all(0, 0, stream=STREAM, device=device)
            bound = evaluate_vae(model, data.test, batch_size=size, warm_start=setup.warm_start)
        weighted = importance_likelihood(model, data.test[: self.importance_rows], samples=self.importance_samples)
        return test_row(bound, str(_flow(model).eval_divergence)) | {
            "bits_per_dim": bits_per_dim(bound.nll, model.features),
            "bits_per_dim_se": bits_per_dim(bound.nll_se, model.features),
            "importance_nll": weighted.nll,
            "importance_nll_se": weighted.nll_se,
            "importance_noise_se": weighted.sampling_se,
            "importance_bits_per_dim": weighted.bits_per_dim,
            "importance_bound": weighted.bound,
            "importance_rows": weighted.rows,
            "importance_samples": weighted.samples,
            "effective": weighted.effective,
        }

    def sweep(
        self, model: VAE, data: PictureSet, setup: Setup, tolerances: Sequence[float], rows: int, truth_rows: int
    ) -> list[Row]:
        """Sweep the bound in float64, whose truth is a solve at a much tighter tolerance with the same noise."""
        if not setup.adaptive or not tolerances:
            return []
        double, device = copy.deepcopy(model).double().eval(), next(model.parameters()).device
        x = data.test[:rows].double()

        def solve(solver: Solver) -> Solved:
            _flow(double).eval_solver = solver
            bounds, stats, plan, solves = [], SolveStats(), SolvePlan(), 0
            with preserved_rng(device):
                seed_all(0, 0, stream=STREAM, device=device)
                for batch in x.to(device).split(setup.test_batch_size):
                    drawn = double.posterior(double.encode(batch), (), plan)
                    likelihood = double.pixels.log_prob(batch, double.decode(drawn.z))
                    bounds.append(likelihood + standard_normal_log_prob(drawn.z) - drawn.log_q)
                    solution = drawn.penalized.solution
                    stats, solves = stats + solution.stats, solves + 1
                    plan = SolvePlan(first_steps=solution.openings if setup.warm_start else None)
            return torch.cat(bounds), stats, solves

        return sweep(solve, setup.test_solver(), tolerances, tight(solve, tolerances), len(x))

    def figures(self, model: VAE, data: PictureSet) -> dict[str, Figure]:
        from pycnf.plots_vae import reconstruction_grid, sample_grid

        return {"samples": sample_grid(model), "reconstructions": reconstruction_grid(model, data.test[:SHOWN])}


def _flow(model: VAE) -> Any:
    """Return the flow of the posterior, which is always there."""
    return model.posterior.flow


__all__ = ["AutoEncoders"]
