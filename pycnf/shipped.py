"""Small trained flows that come with the package: something real to play with in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pycnf.flow import CNF
from pycnf.records import read_json
from pycnf.training.folder import load_flow

FOLDER = Path(__file__).with_name("weights")
CARDS = "models.json"


def models() -> dict[str, dict[str, Any]]:
    """Return the shipped models by name, each with what is known of it.

    Returns:
        For each name: data (of ``pycnf.data.load``), regularizer, seed, steps, rtol and atol (training), test_rtol
        and test_atol, nll and nll_se (held-out, in nats), nfe_train and nfe_test (evaluations of a batch of
        test_batch_size rows).

    >>> models()["power-tpr"]["regularizer"]
    'tpr:weight=5'
    """
    return dict(read_json(FOLDER / CARDS))


def load(name: str) -> CNF:
    """Return a shipped model, in evaluation mode.

    The rows of its data are standardized; ``pycnf.data.load(models()[name]["data"])`` gives them and turns samples
    back (:meth:`~pycnf.data.dataset.Dataset.restore`).

    Args:
        name: A name that :func:`models` lists: DATA-none, or DATA-REGULARIZER.

    Raises:
        ValueError: There is no such model.

    >>> flow = load("moons-none")
    >>> flow().sample((5,)).shape == (5, 2)
    True
    """
    if name not in models():
        raise ValueError(f"no model is called {name!r}: choose one of {', '.join(models())}, or load_flow(folder)")
    return load_flow(FOLDER / name)


__all__ = ["CARDS", "FOLDER", "load", "models"]
