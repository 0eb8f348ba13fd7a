"""One run of an experiment: train a model with one regularizer and one seed, then test it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from pycnf.experiments.setup import Setup
from pycnf.experiments.workloads import TABLES, Row, Workload
from pycnf.records import run_record, write_json
from pycnf.regularizers import Regularizer, describe_regularizers
from pycnf.solution import SolveError
from pycnf.training import FitResult, TrainingError
from pycnf.training.batches import fingerprint
from pycnf.training.folder import CHECKPOINT
from pycnf.training.options import resolve_device

FAILURES = (SolveError, TrainingError)
SWEEP_ROWS = 5000  # test rows on which the effect of the tolerance is measured
TRUTH_ROWS = 1000  # rows of these at which the error of log p is measured
CURVE_POINTS = 50
END = 200  # training steps that count as the end of training
DATA_CARD = "data.json"


def train_and_test(
    data: Any,
    regularizers: Sequence[Regularizer],
    seed: int,
    setup: Setup,
    *,
    work: Workload = TABLES,
    label: str | None = None,
    folder: Path | None = None,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    progress: bool | str = True,
    callbacks: Sequence[Any] = (),
    test_tolerances: Sequence[float] = (),
    sweep_rows: int = SWEEP_ROWS,
    truth_rows: int = TRUTH_ROWS,
    command: str | None = None,
    loaded_from: str | None = None,
    figures: Path | None = None,
) -> Row:
    """Train a model on a data set and test it on the held-out rows: by default a flow, with the exact divergence.

    Two runs with the same seed and setup start from the same weights and see the same batches, whatever their
    regularizers.

    Args:
        data: The data set, as the workload loads it.
        regularizers: Regularizers of training.
        seed: Seed of the initial weights and of everything random in training.
        setup: Model, solvers and training.
        work: What is trained, and how it is tested.
        label: Name of the arm; None for the regularizers.
        folder: Run folder, see :func:`~pycnf.training.loop.fit`.
        resume: Go on with the run in the folder; "auto" does so where it can be done, and starts anew elsewhere.
        overwrite: Delete the run in the folder and start anew.
        progress: Show a progress bar; a string is its label.
        callbacks: Further Lightning callbacks of training.
        test_tolerances: Tolerances (rtol = atol) at which the test is repeated in float64
            (:func:`~pycnf.experiments.sweep.sweep_tolerances`).
        sweep_rows: Test rows, the first ones, on which it is.
        truth_rows: Rows of these at which the error of log p is measured.
        command: Command to record; None for that of this process.
        loaded_from: Name or path from which the data were loaded; the run folder keeps it.
        figures: Draw what the model has learned, as ``FIGURE-NAME.png`` beside this path, which ends in NAME; None
            draws nothing.

    Returns:
        The row of a comparison (see :class:`~pycnf.experiments.results.ComparisonResult`), with "status" "finished".

    Raises:
        ValueError: Setup, data or folder do not fit.
        SolveError: The solve of the test failed.
        TrainingError: Training failed.
        TrainingInterrupted: Ctrl-C.
    """
    model = work.build(data, setup, seed)
    options: Row = {
        "regularizers": list(regularizers),
        "seed": seed,
        "device": setup.device,
        "output": folder,
        "progress": progress,
        "callbacks": tuple(callbacks),
    }
    begin = functools.partial(work.fit, model, data, setup, **options)
    result = _fit(begin, folder, resume=resume, overwrite=overwrite)
    if folder is not None:
        write_json(folder / DATA_CARD, work.card(data) | {"load": loaded_from or data.name})
    model.to(resolve_device(setup.device))
    if figures is not None:
        _draw(work.figures(model, data), figures)
    rows = result.rows("train")
    row = identify(data, regularizers, seed, setup, label=label, command=command)
    return row | {
        "status": "finished",
        **work.test(model, data, setup),
        "nll_validation": result.nll,
        "nfe_train": result.nfe_train,
        "nfe_train_last": result.nfe_train_last,
        f"nfe_train_last_{END}": _mean(rows[-END:], "nfe"),
        "nfe_backward": result.nfe_backward,
        "nfe_backward_last": result.nfe_backward_last,
        f"nfe_backward_last_{END}": _mean(rows[-END:], "nfe_backward"),
        "accepted_train": _mean(rows, "accepted"),
        "rejected_train": _mean(rows, "rejected"),
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped": result.stopped,
        "seconds": result.seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tolerances": work.sweep(model, data, setup, test_tolerances, sweep_rows, truth_rows),
        "curve": thin(result),
        "validation": validations(result),
    }


def identify(
    data: Any,
    regularizers: Sequence[Regularizer],
    seed: int,
    setup: Setup,
    *,
    label: str | None = None,
    command: str | None = None,
) -> Row:
    """Return what is known of a run before it is made, with the keys of its results set to None."""
    name = describe_regularizers(regularizers)
    device = resolve_device(setup.device)
    measured = ("nll", "nll_se", "nfe_train", "nfe_train_last", "nfe_backward", "nfe_test", "test_divergence")
    fields = {
        "data": data.name,
        "regularizer": name,
        "arm": label or name,
        "seed": seed,
        "method": setup.method,
        "rtol": setup.rtol,
        "atol": setup.atol,
        "test_rtol": setup.test_rtol,
        "test_atol": setup.test_atol,
        "gradient": setup.gradient,
        "divergence": setup.divergence,
        "batch_size": setup.batch_size,
        "test_batch_size": setup.test_batch_size,
        "train_rows": len(data.train),
        "test_rows": len(data.test),
        "notes": data.notes,
        **dict.fromkeys((*measured, "accepted", "rejected", "steps", "seconds")),
    }
    extra = {} if command is None else {"command": command}
    return run_record(device=device, **fields, **extra)


def data_fingerprint(data: Any) -> str:
    """Return hex digits of the training, validation and test rows, to tell whether two runs saw the same data."""
    return "-".join(fingerprint((part, None)) for part in (data.train, data.validation, data.test))


def thin(result: FitResult) -> dict[str, list[float]]:
    """Average the training curve over at most 50 equal stretches of steps."""
    rows = result.rows("train")
    size = max(1, math.ceil(len(rows) / CURVE_POINTS))
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    names = ("step", "nll", "nfe", "nfe_backward")
    return {name: [float(f"{_mean(part, name):.6g}") for part in parts] for name in names}


def validations(result: FitResult) -> dict[str, list[float]]:
    """Return at most 50 validations: step, nll, and the seconds that training had taken until then."""
    train, rows = result.rows("train"), result.rows("validation")
    spent = accumulate(row["seconds"] for row in train)
    clock = {row["step"]: seconds for row, seconds in zip(train, spent, strict=True)}
    kept = rows[:: -(-len(rows) // CURVE_POINTS) or 1]
    return {
        "step": [row["step"] for row in kept],
        "nll": [float(f"{row['nll']:.6g}") for row in kept],
        "seconds": [float(f"{clock.get(row['step'], 0.0):.6g}") for row in kept],
    }


def digest(configuration: Mapping[str, Any]) -> str:
    """Return eight hex digits that tell configurations of runs apart."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:8]


def _fit(
    begin: Callable[..., FitResult], folder: Path | None, *, resume: bool | Literal["auto"], overwrite: bool
) -> FitResult:
    if resume == "auto":
        begun = folder is not None and (folder / CHECKPOINT).is_file()
        try:
            return begin(resume=begun)
        except ValueError:  # a damaged checkpoint, or one of other settings: start anew
            if folder is None:
                raise
            resume, overwrite = False, True
    return begin(resume=resume, overwrite=overwrite)


def _draw(drawn: Mapping[str, Any], path: Path) -> None:
    from pycnf.plots import save_figure

    for name, figure in drawn.items():
        save_figure(figure, path.with_name(f"{name}-{path.name}.png"))


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows) if rows else math.nan


__all__ = [
    *("FAILURES", "data_fingerprint", "digest", "identify"),
    *("thin", "train_and_test", "validations"),
]
