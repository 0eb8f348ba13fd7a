"""Read small public tables that stand in for benchmark tables that are not at hand.

They go by their own names: results on them must not be reported as results on GAS or HEPMASS.
"""

from __future__ import annotations

import numpy as np

from pycnf.data.checks import check_matrix, default_columns
from pycnf.data.dataset import Splits, split_shuffled
from pycnf.data.files import read_numpy
from pycnf.data.tables import Paths


def _read(paths: Paths, seed: int, kept: list[int] | None, notes: str, noise: float = 0.0) -> Splits:
    """Read the array "x", keep some columns, add uniform noise, shuffle and divide."""
    (path,) = paths
    x = check_matrix(read_numpy(path, key="x"), str(path))
    kept = list(range(x.shape[1])) if kept is None else kept
    names = default_columns(x.shape[1])
    x = x[:, kept]
    if noise:
        x = x + noise * np.random.default_rng([seed, 1]).random(x.shape)
    return split_shuffled(x, [names[j] for j in kept], seed, str(path), notes=notes)


def read_gas_drift(paths: Paths, seed: int) -> Splits:
    """Read eight of the sixteen sensor columns of the gas sensor array drift set."""
    return _read(paths, seed, list(range(1, 16, 2)), "a sibling of GAS, not GAS")


def read_higgs(paths: Paths, seed: int) -> Splits:
    """Read 24 of the 28 columns of HIGGS: all but the four discrete ones."""
    kept = [j for j in range(28) if j not in (8, 12, 16, 20)]
    return _read(paths, seed, kept, "stands in for HEPMASS, not HEPMASS; without the four discrete columns")


def read_magic(paths: Paths, seed: int) -> Splits:
    """Read the ten columns of the MAGIC gamma telescope set."""
    return _read(paths, seed, None, "both classes")


def read_satimage(paths: Paths, seed: int) -> Splits:
    """Read the 36 gray levels of the Landsat satellite set, with uniform noise of one level."""
    return _read(paths, seed, None, "all classes; uniform noise of one gray level", noise=1.0)
