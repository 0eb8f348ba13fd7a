"""Train a flow by maximum likelihood: ``fit`` and the checks at its door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pycnf.flow import CNF
from pycnf.regularizers import Regularizer, check_regularizers, describe_regularizers
from pycnf.training.batches import Rows, check_context, check_rows, fingerprint
from pycnf.training.folder import Row, RunFolder, describe_flow
from pycnf.training.options import OptimizerName, ScheduleName, TrainingOptions, resolve_device
from pycnf.training.results import FitResult
from pycnf.training.task import FlowTask


def fit(
    flow: CNF,
    train: Any,
    validation: Any = None,
    *,
    regularizers: Sequence[Regularizer] | Regularizer | None = (),
    train_context: Any = None,
    validation_context: Any = None,
    max_steps: int = 10_000,
    batch_size: int = 1000,
    eval_batch_size: int | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    optimizer: OptimizerName = "adam",
    schedule: ScheduleName = "auto",
    patience: int = 20,
    lr_drops: int = 2,
    validate_every: int = 200,
    warm_start: bool = True,
    clip: float | None = None,
    seed: int = 0,
    device: str = "auto",
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    data_name: str | None = None,
    progress: bool | str = True,
    callbacks: Sequence[Any] = (),
) -> FitResult:
    r"""Train a flow by maximum likelihood, minimizing -mean log p(x) + sum of weight * penalty.

    The flow is trained in place. It comes back with the weights of the lowest held-out NLL (the last ones
    without validation data), in evaluation mode, on the device where it was. The global random generators are
    left as they were. The options are explained in :class:`~pycnf.training.options.TrainingOptions`.

    With ``output`` the run keeps a folder: ``config.json`` (what was asked for), ``metrics.csv`` and
    ``tensorboard/`` (curves), ``model.safetensors`` (best weights, see
    :func:`~pycnf.training.folder.load_flow`), ``last.ckpt`` (the state to resume from), ``record.json`` (what it
    came to, when, where, with which versions). A resumed run continues exactly: on the same machine its weights
    equal, bit by bit, those of a run never stopped.

    On the first Ctrl-C the step in progress is finished and the state saved; a second one stops at once.

    Args:
        flow: The flow.
        train: Training rows x, shape (N, D): a torch tensor or anything numpy makes an array of. Converted to
            the precision of the flow's parameters; integers are refused.
        validation: Held-out rows, shape (M, D).
        regularizers: Penalties to add, each with its weight.
        train_context: Context c of the training rows, shape (N, C), for a flow with context.
        validation_context: Context of the held-out rows, shape (M, C).
        max_steps: Steps at most.
        batch_size: Rows per step, at most N.
        eval_batch_size: Rows per batch in validation.
        lr: Learning rate at the start.
        weight_decay: Weight decay.
        optimizer: "adam", "adamw" or "adamax".
        schedule: "auto", "plateau", "cosine" or "constant".
        patience: Validations without improvement before the learning rate drops.
        lr_drops: Drops before the run stops.
        validate_every: Steps between two validations, and between two checkpoints.
        warm_start: Start each solve with the step that the last one suggests.
        clip: Largest norm of the gradient.
        seed: Seed of the order of the rows, the divergence probes and the sampled times. (The initial weights
            come with the flow: call ``torch.manual_seed`` before building it.)
        device: "auto", "cpu", "cuda" or "cuda:N".
        output: Run folder.
        resume: Go on with the run in ``output``; more ``max_steps`` may be asked for.
        overwrite: Delete the run in ``output`` and start anew.
        data_name: Name of the data, for the records.
        progress: Show a progress bar; a string is its label.
        callbacks: Further Lightning callbacks.

    Returns:
        The result (:class:`~pycnf.training.results.FitResult`).

    Raises:
        ValueError: Data, options or folder are not usable; nothing was touched.
        TrainingError: A solve failed or the loss became NaN or infinite. The flow has the best weights so
            far; the last checkpoint is kept.
        TrainingInterrupted: Ctrl-C; a KeyboardInterrupt that carries the result so far.
        OSError: A file could not be written; earlier files stay readable.

    References:
        Huang and Yeh, Accelerating continuous normalizing flow with trajectory polynomial regularization,
        AAAI 2021 (the plateau schedule).

    Example:
        >>> import torch
        >>> flow = CNF(2, hidden=(8,))
        >>> x = 3 + torch.randn(64, 2)
        >>> result = fit(flow, x, x, max_steps=4, batch_size=32, device="cpu", progress=False)
        >>> result.steps, len(result.rows("validation"))
        (4, 1)
    """
    options = TrainingOptions(
        max_steps=max_steps,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        lr=lr,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        patience=patience,
        lr_drops=lr_drops,
        validate_every=validate_every,
        warm_start=warm_start,
        clip=clip,
        seed=seed,
        device=device,
    )
    where = resolve_device(device)
    terms = check_regularizers(regularizers)
    rows = _check_data("train", flow, train, train_context)
    held_out = None if validation is None else _check_data("validation", flow, validation, validation_context)
    if validation is None and validation_context is not None:
        raise ValueError("validation_context was given without validation")
    options = _resolve(options, len(rows[0]), held_out is not None)
    folder = None
    if output is not None:
        config = _describe(flow, terms, options, rows, held_out, data_name)
        folder = RunFolder(output, config, resume=resume, overwrite=overwrite)
    elif resume or overwrite:
        raise ValueError("resume and overwrite need the run folder: pass output=...")
    label = progress if isinstance(progress, str) else "training"

    from pycnf.training.run import Run  # brings Lightning along, which takes seconds to import

    task = FlowTask(flow, terms)
    run = Run(task, rows, held_out, options, where, folder, label if progress else None, tuple(callbacks))
    return run.execute(data_name)


def _check_data(name: str, flow: CNF, values: Any, context: Any) -> Rows:
    weight = next((p for p in flow.parameters() if p.requires_grad), None)
    if weight is None:
        raise ValueError("the flow has no parameters to train")
    table = check_rows(name, values, flow.features, weight.dtype)
    return table, check_context(f"{name}_context", context, len(table), flow.context, weight.dtype)


def _resolve(options: TrainingOptions, rows: int, validated: bool) -> TrainingOptions:
    if options.batch_size > rows:
        raise ValueError(
            f"batch_size {options.batch_size} is larger than the {rows} training rows: choose at most {rows}"
        )
    if options.schedule == "plateau" and not validated:
        raise ValueError("schedule 'plateau' needs validation data: pass them, or choose 'cosine' or 'constant'")
    if options.schedule == "auto":
        return replace(options, schedule="plateau" if validated else "cosine")
    return options


def _describe(
    flow: CNF,
    terms: Sequence[Regularizer],
    options: TrainingOptions,
    rows: Rows,
    held_out: Rows | None,
    data_name: str | None,
) -> Row:
    data: Row = {
        "name": data_name,
        "features": flow.features,
        "train_rows": len(rows[0]),
        "train": fingerprint(rows),
    }
    if held_out is not None:
        data |= {"validation_rows": len(held_out[0]), "validation": fingerprint(held_out)}
    training = options.to_dict()
    return {
        "flow": describe_flow(flow),
        "training": training,
        "regularizers": describe_regularizers(terms),
        "data": data,
    }
