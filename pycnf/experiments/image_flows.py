"""Densities of images as an experiment: a multiscale flow, tested with many probes and a standard error beside it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pycnf import images
from pycnf.diagnostics.truth import TRUTH, in_float64
from pycnf.divergence import parse_divergence
from pycnf.experiments.setup import Setup
from pycnf.experiments.sweep import Solved, sweep
from pycnf.experiments.workloads import Row, Settings, Workload, check_batches, divergence_for, seeded, test_row
from pycnf.flow import FlowSolution
from pycnf.images.flow import Dequantization, ImageFlow
from pycnf.images.pieces import bits_per_dim
from pycnf.images.sets import ImageSet
from pycnf.scale import log_prob
from pycnf.solution import SolveError, SolveStats
from pycnf.solve import Solver
from pycnf.training import FitResult, fit
from pycnf.training.batches import preserved_rng, seed_all
from pycnf.training.evaluation import summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STREAM = 5  # of the noise of tests, which is the same for all arms
SHOWN = 50  # samples in a figure
BEYOND = 1e-3  # tolerance of the truth in a sweep, as a part of the tightest tolerance


@dataclass(frozen=True, kw_only=True)
class Images(Workload):
    """Estimate the density of images by a multiscale flow (:class:`~pycnf.images.flow.ImageFlow`).

    ``hidden`` and ``blocks`` of the setup are the channels of the convolutions and the blocks of a stage. Tests draw
    the noise of the levels, and above 100 dimensions that of the divergence's probes, from seeds of their own: arms
    are tested with the same noise.

    Attributes:
        shrink: Factor by which height and width are divided.
        scales: Number of scales, None for as many as the images allow.
        dequantization: Noise of the levels, "uniform" or "variational" (:class:`~pycnf.images.flow.ImageFlow`).
        warmup: Training steps in which the learning rate rises linearly.
        probes: Probes of the divergence in one solve of the test.
        repeats: Solves of the test, each with noise of its own.
        validation_rows: Validation images, the first ones; None for all.
        test_rows: Test images, the first ones; None for all.
    """

    kind: ClassVar[str] = "images"
    measures: ClassVar[Mapping[str, str]] = {
        "bits_per_dim": "bits/dim",
        "bits_per_dim_se": "its standard error",
        "noise_se": "share of noise in that of the NLL (nats)",
    }
    note: ClassVar[str] = (
        "NLL: a bound on that of the levels, in nats an image; its standard error over images holds what the noise of "
        "the levels and of the divergence's probes adds."
    )

    shrink: int = 1
    scales: int | None = None
    dequantization: Dequantization = "uniform"
    warmup: int = 0
    probes: int = 10
    repeats: int = 4
    validation_rows: int | None = None
    test_rows: int | None = None

    def __post_init__(self) -> None:
        if self.dequantization not in ("uniform", "variational"):
            raise ValueError(f"unknown dequantization {self.dequantization!r}: choose uniform or variational")

    def describe(self) -> Row:
        found = super().describe()
        if self.dequantization == "uniform":
            del found["workload"]["dequantization"]  # what a record without an entry has
        return found

    def present(self, name: str, data_dir: Path | None) -> bool:
        return images.describe(name, data_dir).present

    def load(self, name: str, data_dir: Path | None) -> ImageSet:
        whole = images.load(name, data_dir=data_dir)
        validation, test = whole.validation[: self.validation_rows], whole.test[: self.test_rows]
        labels = whole.labels | {
            "validation": whole.labels["validation"][: len(validation)],
            "test": whole.labels["test"][: len(test)],
        }
        return dataclasses.replace(whole, validation=validation, test=test, labels=labels).shrink(self.shrink)

    def setup(self, name: str, settings: Settings, data: ImageSet | None = None) -> Setup:
        setup = Setup(**settings)
        return setup if data is None else check_batches(setup, len(data.train), name)

    def build(self, data: ImageSet, setup: Setup, seed: int) -> ImageFlow:
        return seeded(
            lambda: ImageFlow(
                data.shape,
                setup.hidden,
                setup.blocks,
                scales=self.scales,
                dequantization=self.dequantization,
                eval_divergence=divergence_for(data.features, 1),
                **setup.flow_settings(),
            ),
            seed,
        )

    def fit(self, model: ImageFlow, data: ImageSet, setup: Setup, **options: Any) -> FitResult:
        if self.warmup:
            options["callbacks"] = (*options.get("callbacks", ()), warmup(setup.lr, self.warmup))
        train, validation = data.rows("train"), data.rows("validation")
        return fit(model, train, validation, data_name=data.name, **setup.training(), **options)

    def test(self, model: ImageFlow, data: ImageSet, setup: Setup) -> Row:
        began, device = time.perf_counter(), next(model.parameters()).device
        divergence = divergence_for(data.features, self.probes)
        model.eval_divergence = parse_divergence(divergence)
        rows, found = data.rows("test"), []
        with preserved_rng(device):
            for repeat in range(self.repeats):
                seed_all(0, repeat, stream=STREAM, device=device)
                found.append(log_prob(model, rows, batch_size=setup.test_batch_size, warm_start=setup.warm_start))
        values = torch.stack([one.values.double() for one in found])
        stats = sum((one.stats for one in found), SolveStats())
        batched = dataclasses.replace(
            found[0], values=values.mean(0), stats=stats, batches=sum(one.batches for one in found)
        )
        summary = summarize(batched, setup.test_batch_size, model.eval_solver, time.perf_counter() - began)
        return test_row(summary, divergence) | {
            "repeats": self.repeats,
            "noise_se": noise_error(values),
            "bits_per_dim": bits_per_dim(summary.nll, data.features),
            "bits_per_dim_se": bits_per_dim(summary.nll_se, data.features),
        }

    def sweep(
        self, model: ImageFlow, data: ImageSet, setup: Setup, tolerances: Sequence[float], rows: int, truth_rows: int
    ) -> list[Row]:
        """Sweep in float64, on rows whose truth is a solve at a much tighter tolerance with the same noise."""
        if not setup.adaptive or not tolerances:
            return []
        double, device = in_float64(model), next(model.parameters()).device
        double.eval_divergence = parse_divergence(divergence_for(data.features, 1))
        x = data.rows("test")[:rows].double()

        def solve(solver: Solver) -> Solved:
            found: list[FlowSolution] = []
            with preserved_rng(device):
                seed_all(0, 0, stream=STREAM, device=device)
                for batch in x.split(setup.test_batch_size):
                    first_steps = found[-1].openings if found and setup.warm_start else None
                    found.append(double.solve(batch.to(device), solver=solver, first_steps=first_steps))
            stats = sum((solution.stats for solution in found), SolveStats())
            return torch.cat([solution.log_prob for solution in found]), stats, len(found)

        return sweep(solve, model.eval_solver, tolerances, tight(solve, tolerances), len(x))

    def figures(self, model: ImageFlow, data: ImageSet) -> dict[str, Figure]:
        from pycnf.plots_images import sample_grid

        return {"samples": sample_grid(model, SHOWN)}


def tight(solve: Callable[[Solver], Solved], tolerances: Sequence[float]) -> Tensor | None:
    """Return log p (N,) solved at a much tighter tolerance than these; None where that fails."""
    tolerance = BEYOND * min(tolerances)
    try:
        with torch.no_grad():
            truth: Tensor = solve(dataclasses.replace(TRUTH, rtol=tolerance, atol=tolerance))[0]
    except SolveError:
        return None
    return truth


def noise_error(values: Tensor) -> float:
    r"""Return the share of noise in the standard error of a mean over rows.

    sqrt(sum_i s_i^2 / R) / N, with s_i the standard deviation of a row over the repeats.

    Args:
        values: Repeated values, shape (R, N).

    Returns:
        The standard error; NaN for fewer than two repeats, which cannot tell it.

    >>> noise_error(torch.ones(4, 10)), noise_error(torch.ones(1, 10))
    (0.0, nan)
    """
    repeats, rows = values.shape
    return math.nan if repeats < 2 else (values.var(dim=0).sum() / repeats).sqrt().item() / rows


def warmup(lr: float, steps: int) -> Any:
    """Return a Lightning callback that lets the learning rate rise linearly to its value in so many steps."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    class Warmup(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self._set(trainer)

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self._set(trainer)

        def _set(self, trainer: Trainer) -> None:
            if trainer.global_step < steps:
                for group in trainer.optimizers[0].param_groups:
                    group["lr"] = lr * (trainer.global_step + 1) / steps

    return Warmup()


__all__ = ["Images", "noise_error", "tight", "warmup"]
