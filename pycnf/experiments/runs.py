"""One run of an experiment: train a flow with one regularizer and one seed, then test it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycnf.data import Dataset
from pycnf.experiments.setup import Setup
from pycnf.flow import CNF
from pycnf.records import run_record, write_json
from pycnf.regularizers import Regularizer, describe_regularizers
from pycnf.solution import SolveError
from pycnf.training import FitResult, TrainingError, evaluate, fit
from pycnf.training.options import resolve_device

Row = dict[str, Any]

FAILURES = (SolveError, TrainingError)
SWEEP_ROWS = 5000  # test rows on which the effect of the tolerance is measured
CURVE_POINTS = 50
DATA_CARD = "data.json"


def train_and_test(
    data: Dataset,
    regularizers: Sequence[Regularizer],
    seed: int,
    setup: Setup,
    *,
    label: str | None = None,
    folder: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | str = True,
    test_tolerances: Sequence[float] = (),
    command: str | None = None,
    loaded_from: str | None = None,
) -> Row:
    """Train a flow on a data set and test it on the held-out rows with the exact divergence.

    Two runs with the same seed and setup start from the same weights and see the same batches, whatever their
    regularizers.

    Args:
        data: The data set.
        regularizers: Regularizers of training.
        seed: Seed of the initial weights and of everything random in training.
        setup: Model, solvers and training.
        label: Name of the arm; None for the regularizers.
        folder: Run folder, see :func:`~pycnf.training.loop.fit`.
        resume: Go on with the run in the folder.
        overwrite: Delete the run in the folder and start anew.
        progress: Show a progress bar; a string is its label.
        test_tolerances: Tolerances (rtol = atol) at which the test is repeated, on at most 5,000 rows.
        command: Command to record; None for that of this process.
        loaded_from: Name or path from which the data were loaded; the run folder keeps it.

    Returns:
        The row of a comparison (see :class:`~pycnf.experiments.ComparisonResult`), with "status" "finished".

    Raises:
        ValueError: Setup, data or folder do not fit.
        SolveError: The solve of the test failed.
        TrainingError: Training failed.
        TrainingInterrupted: Ctrl-C.
    """
    flow = setup.build(data.features, seed)
    result = fit(
        flow,
        data.train,
        data.validation,
        regularizers=list(regularizers),
        **setup.training(),
        seed=seed,
        device=setup.device,
        output=folder,
        resume=resume,
        overwrite=overwrite,
        data_name=data.name,
        progress=progress,
    )
    if folder is not None:
        write_json(folder / DATA_CARD, describe_data(data) | {"load": loaded_from or data.name})
    flow.to(resolve_device(setup.device))
    test = evaluate(flow, data.test, batch_size=setup.test_batch_size)
    rows = result.rows("train")
    row = identify(data, regularizers, seed, setup, label=label, command=command)
    return row | {
        "status": "finished",
        "nll": test.nll,
        "nll_se": test.nll_se,
        "nll_validation": result.nll,
        "nfe_train": result.nfe_train,
        "nfe_train_last": result.nfe_train_last,
        "nfe_backward": result.nfe_backward,
        "nfe_backward_last": result.nfe_backward_last,
        "nfe_test": test.nfe,
        "accepted": test.accepted,
        "rejected": test.rejected,
        "accepted_train": _mean(rows, "accepted"),
        "rejected_train": _mean(rows, "rejected"),
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped": result.stopped,
        "seconds": result.seconds,
        "seconds_test": test.seconds,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "tolerances": _sweep(flow, data, setup, test_tolerances),
        "curve": thin(result),
    }


def identify(
    data: Dataset,
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
    measured = ("nll", "nll_se", "nfe_train", "nfe_train_last", "nfe_backward", "nfe_test")
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
        "test_divergence": "exact",
        "batch_size": setup.batch_size,
        "test_batch_size": setup.test_batch_size,
        "train_rows": len(data.train),
        "test_rows": len(data.test),
        **dict.fromkeys((*measured, "accepted", "rejected", "steps", "seconds")),
    }
    extra = {} if command is None else {"command": command}
    return run_record(device=device, **fields, **extra)


def describe_data(data: Dataset) -> Row:
    """Return what turns a flow's samples back into the original units, and where the data come from."""
    names = ("name", "source", "notes", "columns", "shift", "scale")
    return {name: getattr(data, name) for name in names}


def thin(result: FitResult) -> dict[str, list[float]]:
    """Average the training curve over at most 50 equal stretches of steps."""
    rows = result.rows("train")
    size = max(1, math.ceil(len(rows) / CURVE_POINTS))
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    names = ("step", "nll", "nfe", "nfe_backward")
    return {name: [float(f"{_mean(part, name):.6g}") for part in parts] for name in names}


def _sweep(flow: CNF, data: Dataset, setup: Setup, tolerances: Sequence[float]) -> list[Row]:
    if not setup.adaptive:
        return []
    rows = []
    for tolerance in tolerances:
        solver = dataclasses.replace(setup.test_solver(), rtol=tolerance, atol=tolerance)
        row: Row = {"rtol": tolerance, "atol": tolerance}
        try:
            found = evaluate(flow, data.test[:SWEEP_ROWS], batch_size=setup.test_batch_size, solver=solver)
        except SolveError as err:
            rows.append(row | {"nll": None, "nfe": None, "error": str(err)})
            continue
        names = ("nll", "nll_se", "rows", "nfe", "accepted", "rejected", "seconds")
        rows.append(row | {name: getattr(found, name) for name in names})
    return rows


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows) if rows else math.nan


__all__ = ["FAILURES", "Row", "describe_data", "identify", "thin", "train_and_test"]
