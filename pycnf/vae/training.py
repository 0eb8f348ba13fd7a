"""Train a variational auto-encoder with the machinery that trains flows: same loop, run folder, resume and records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pycnf.records import read_json, write_json
from pycnf.regularizers import Regularizer, check_regularizers, describe_regularizers
from pycnf.training.batches import Rows, check_rows, fingerprint
from pycnf.training.evaluation import Evaluation
from pycnf.training.folder import CONFIG, WEIGHTS, Row, RunFolder, load_weights, make_folder, write_weights
from pycnf.training.options import OptimizerName, TrainingOptions, resolve_device
from pycnf.training.results import FitResult
from pycnf.vae.bounds import Bound, evaluate_vae, evidence_bound
from pycnf.vae.model import VAE
from pycnf.vae.pictures import PictureSet
from pycnf.vae.posteriors import SolvePlan


class VAETask:
    """Maximize the evidence lower bound, the weight of its divergence rising linearly from 0 to 1 at first.

    Args:
        vae: The model.
        regularizers: Regularizers of the posterior's solves.
        warmup: Training steps of the rise.
        dynamic: Whether training pixels are probabilities, drawn at every step.
    """

    columns: tuple[str, ...] = ("reconstruction", "kl", "beta")

    def __init__(self, vae: VAE, regularizers: Sequence[Regularizer], warmup: int, dynamic: bool) -> None:
        self.model, self.regularizers, self.settled, self.dynamic = vae, tuple(regularizers), warmup, dynamic

    def objective(self, batch: Rows, step: int, factors: Sequence[float], first_steps: Sequence[float] | None) -> Bound:
        """Return the negative bound of a batch plus penalties (:func:`~pycnf.vae.bounds.evidence_bound`)."""
        x = torch.bernoulli(batch[0]) if self.dynamic else batch[0]
        beta = min(1.0, (step + 1) / self.settled) if self.settled else 1.0
        return evidence_bound(self.model, x, beta=beta, plan=SolvePlan(self.regularizers, factors, first_steps))

    def evaluate(self, rows: Rows, batch_size: int, *, warm_start: bool) -> Evaluation:
        """Return the negative bound of held-out pictures."""
        return evaluate_vae(self.model, rows[0], batch_size=batch_size, warm_start=warm_start)

    def describe(self) -> Row:
        """Return method and tolerances of the posterior's training solver."""
        flow = self.model.posterior.flow
        return (
            {} if flow is None else {"method": flow.solver.method, "rtol": flow.solver.rtol, "atol": flow.solver.atol}
        )


def train_vae(
    vae: VAE,
    pictures: PictureSet,
    *,
    regularizers: Sequence[Regularizer] | Regularizer | None = (),
    epochs: int = 2000,
    max_steps: int | None = None,
    warmup: int = 100,
    patience: int = 35,
    batch_size: int = 100,
    eval_batch_size: int | None = None,
    lr: float = 5e-4,
    optimizer: OptimizerName = "adamax",
    weight_decay: float = 0.0,
    clip: float | None = None,
    warm_start: bool = True,
    seed: int = 0,
    device: str = "auto",
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | str = True,
    callbacks: Sequence[Any] = (),
) -> FitResult:
    r"""Train a variational auto-encoder by its evidence lower bound.

    The model is trained in place and comes back with the weights of the best validation bound, in evaluation mode.
    It is validated after every epoch; training stops after ``patience`` epochs without a new best, counted from the end
    of the warm-up. Run folder, exact resume, interrupts and records are those of :func:`~pycnf.training.loop.fit`; its
    ``nll`` stands for the negative bound, and ``reconstruction``, ``kl`` and ``beta`` join the training rows.

    Args:
        vae: The model.
        pictures: Pictures for training and validation.
        regularizers: Penalties on the posterior's solves, each with its weight.
        epochs: Epochs at most.
        max_steps: Steps at most, in place of ``epochs``.
        warmup: Epochs in which the weight of the divergence rises from 0 to 1.
        patience: Epochs without a new best bound after which training stops.
        batch_size: Pictures of one step.
        eval_batch_size: Pictures of one batch in validation; None for ``batch_size``.
        lr: Learning rate.
        optimizer: "adamax", "adam" or "adamw".
        weight_decay: Weight decay.
        clip: Largest norm of the gradient.
        warm_start: Start each solve with the step that the last one suggests.
        seed: Seed of the order of the pictures, the drawn pixels, the latent samples, probes and sampled times.
        device: "auto", "cpu", "cuda" or "cuda:N".
        output: Run folder.
        resume: Go on with the run in ``output``.
        overwrite: Delete the run in ``output`` and start anew.
        progress: Show a progress bar; a string is its label.
        callbacks: Further Lightning callbacks.

    Returns:
        The result (:class:`~pycnf.training.results.FitResult`).

    Raises:
        ValueError: Pictures, options or folder are not usable; nothing was touched.
        TrainingError: A solve failed or the loss became NaN or infinite.
        TrainingInterrupted: Ctrl-C; it carries the result so far.

    >>> x = torch.rand(32, 4).round()
    >>> vae = VAE((2, 2), latent=1, networks="dense", widths=(4,), posterior={"kind": "gaussian"})
    >>> dots = PictureSet("dots", (2, 2), x, x, x)
    >>> train_vae(vae, dots, max_steps=4, warmup=0, batch_size=16, device="cpu", progress=False).steps
    4
    """
    if pictures.shape != vae.shape:
        raise ValueError(f"expected pictures of shape {vae.shape}, got {pictures.name} of shape {pictures.shape}")
    if warmup < 0 or epochs < 1:
        raise ValueError(f"expected epochs >= 1 and warmup >= 0, got {epochs} and {warmup}")
    dtype = next(vae.parameters()).dtype
    rows: Rows = (check_rows("train", pictures.train, vae.features, dtype), None)
    held_out: Rows = (check_rows("validation", pictures.validation, vae.features, dtype), None)
    if not 1 <= batch_size <= len(rows[0]):
        raise ValueError(f"expected 1 <= batch_size <= {len(rows[0])}, the training pictures, got {batch_size}")
    epoch = len(rows[0]) // batch_size
    options = TrainingOptions(
        max_steps=epochs * epoch if max_steps is None else max_steps,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        lr=lr,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule="plateau",
        patience=patience,
        lr_drops=0,
        validate_every=epoch,
        warm_start=warm_start,
        clip=clip,
        seed=seed,
        device=device,
    )
    task = VAETask(vae, check_regularizers(regularizers), warmup * epoch, pictures.dynamic)
    folder = None
    if output is not None:
        config = _describe(task, options, pictures, rows, held_out)
        folder = RunFolder(output, config, resume=resume, overwrite=overwrite)
    elif resume or overwrite:
        raise ValueError("resume and overwrite need the run folder: pass output=...")
    label = progress if isinstance(progress, str) else "training"

    from pycnf.training.run import Run  # brings Lightning along, which takes seconds to import

    where = resolve_device(device)
    run = Run(task, rows, held_out, options, where, folder, label if progress else None, tuple(callbacks))
    return run.execute(pictures.name)


def save_vae(vae: VAE, folder: str | Path) -> None:
    """Write a model into a folder: weights as ``model.safetensors``, how it is built as ``config.json``.

    Raises:
        OSError: A file could not be written; an earlier one is unchanged.
    """
    folder = make_folder(folder)
    write_json(folder / CONFIG, {"vae": vae.config})
    write_weights(folder / WEIGHTS, vae.state_dict())


def load_vae(folder: str | Path) -> VAE:
    """Read a model that :func:`save_vae` or a training run has written, in evaluation mode.

    Raises:
        FileNotFoundError: The folder or one of the files is missing.
        ValueError: A file is damaged, or the weights do not fit the model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("vae"), dict):
        raise ValueError(f"{folder / CONFIG} does not describe a variational auto-encoder: it has no entry 'vae'")
    try:
        vae = VAE(**config["vae"])
    except (TypeError, ValueError) as err:
        raise ValueError(f"{folder / CONFIG} does not describe a model of this version: {err}") from err
    load_weights(folder / WEIGHTS, vae, cast=True)
    return vae.eval()


def _describe(task: VAETask, options: TrainingOptions, pictures: PictureSet, rows: Rows, held_out: Rows) -> Row:
    return {
        "vae": task.model.config,
        "training": asdict(options) | {"warmup_steps": task.settled},
        "regularizers": describe_regularizers(task.regularizers),
        "data": {
            "name": pictures.name,
            "dynamic": pictures.dynamic,
            "train_rows": len(rows[0]),
            "train": fingerprint(rows),
            "validation_rows": len(held_out[0]),
            "validation": fingerprint(held_out),
        },
    }


__all__ = ["VAETask", "load_vae", "save_vae", "train_vae"]
