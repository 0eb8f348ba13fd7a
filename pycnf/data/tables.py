"""Read the five tables of the MAF benchmark, with the preprocessing that defines them.

The published numbers on POWER, GAS, HEPMASS, MINIBOONE and BSDS300 refer to the tables as Papamakarios,
Pavlakou and Murray prepared them for masked autoregressive flows (MAF). Every choice below is the one of
their program, also where another one may seem more natural: otherwise log-likelihoods could not be compared.

References:
    Papamakarios, Pavlakou and Murray, Masked Autoregressive Flow for Density Estimation, NeurIPS 2017;
    program: github.com/gpapamak/maf; data: doi.org/10.5281/zenodo.1161203.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycnf.data.checks import MIN_ROWS, PARTS, Array, DataError, check_matrix, default_columns, list_some
from pycnf.data.dataset import Splits, split_tail
from pycnf.data.files import import_extra, read_frame, read_numpy
from pycnf.data.pickles import read_frame_pickle

Paths = tuple[Path, ...]

POWER_COLUMNS = (
    "global_active_power",
    "voltage",
    "sub_metering_1",
    "sub_metering_2",
    "sub_metering_3",
    "minute_of_day",
)


def read_power_subset(paths: Paths, seed: int) -> Splits:
    """Read the 50,000 rows of POWER that come with the package.

    Args:
        paths: Not used.
        seed: Seed of the uniform noise of one unit of the last digit.

    Returns:
        40,000 training, 5,000 validation and 5,000 test rows, standardized with the first two.
    """
    rng = np.random.default_rng(seed)
    with (
        resources.files("pycnf.data").joinpath("power_50k.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as z,
    ):
        train, validation, test = (
            z[key] * z["scale"] + z["noise"] * rng.random(z[key].shape) for key in ("train", "val", "test")
        )
    return Splits(
        (train, validation, test),
        POWER_COLUMNS,
        statistics="train+validation",
        notes="a random subset of POWER, CC BY 4.0; uniform noise of one unit of the last digit",
    )


def read_power(paths: Paths, seed: int) -> Splits:
    """Read POWER as MAF's array: seven measurements and the minute of the day.

    Args:
        paths: The array, shape (N, 8).
        seed: Not used; MAF's own seed 42 is part of the benchmark.

    Returns:
        Six columns; shuffled, with uniform noise of one unit of the last digit in all but the last column;
        standardized with training and validation rows.
    """
    (path,) = paths
    x = check_matrix(read_numpy(path), str(path))
    if x.shape[1] != 8:
        raise DataError(f"{path}: expected the 8 columns of MAF's POWER array, got {x.shape[1]}")
    return _prepare_power(x, str(path))


def read_power_text(paths: Paths, seed: int) -> Splits:
    """Read POWER from the text file of the UCI repository, without the rows that lack measurements."""
    (path,) = paths
    pandas = import_extra("pandas", "pycnf")
    measured = ["Global_active_power", "Global_reactive_power", "Voltage", "Global_intensity"]
    measured += [f"Sub_metering_{j}" for j in (1, 2, 3)]
    options = {"sep": ";", "na_values": ["?"], "usecols": ["Time", *measured], "low_memory": False}
    frame = read_frame(path, lambda: pandas.read_csv(path, **options)).dropna()
    try:
        codes, times = pandas.factorize(frame["Time"])
        minutes = np.array([60 * int(time[:2]) + int(time[3:5]) for time in times])[codes]
        x = np.column_stack([frame[measured].to_numpy(dtype=np.float64), minutes])
    except (TypeError, ValueError) as err:
        raise DataError(f"{path}: not the text file of UCI data set 235: {err}") from err
    return _prepare_power(x, str(path))


def read_power_columns(paths: Paths, seed: int) -> Splits:
    """Read POWER from integer columns: the minute of the day, then the seven measurements."""
    (path,) = paths
    columns = read_numpy(path, key="columns")
    if columns.ndim != 2 or len(columns) != 8:
        raise DataError(f"{path}: expected 'columns' of shape (8, N), got {columns.shape}")
    units = np.array([1e-3, 1e-3, 1e-2, 1e-1, 1, 1, 1, 1])
    return _prepare_power(columns[[1, 2, 3, 4, 5, 6, 7, 0]].T * units, str(path))


def _prepare_power(x: NDArray[np.float64], where: str) -> Splits:
    rng = np.random.RandomState(42)
    order = np.arange(len(x))
    rng.shuffle(order)
    voltage, power, meters = rng.rand(len(x), 1), rng.rand(len(x), 1), rng.rand(len(x), 3)
    x = x[order][:, [0, 2, 4, 5, 6, 7]]
    x[:, :5] += np.hstack([0.001 * power, 0.01 * voltage, meters])
    return Splits(
        split_tail(x, where),
        POWER_COLUMNS,
        statistics="train+validation",
        notes="MAF's preprocessing: shuffled with seed 42, uniform noise of one unit of the last digit",
    )


def read_gas(paths: Paths, seed: int) -> Splits:
    """Read GAS: sensors of which no two have a correlation above 0.98.

    As long as a sensor has a correlation above 0.98 with another one, the first such sensor is left out.

    Args:
        paths: The pickled table, with columns "Time", "Meth", "Eth" and the sensors.
        seed: Not used.

    Returns:
        The sensors that remain, in the order of the file, standardized with all rows.
    """
    (path,) = paths
    table = read_frame_pickle(path)
    missing = [name for name in ("Time", "Meth", "Eth") if name not in table]
    if missing:
        raise DataError(f"{path}: expected the columns of the GAS set, {list_some(missing)} is missing")
    names = [name for name in table if name not in ("Time", "Meth", "Eth")]
    x = np.column_stack([table[name] for name in names])
    similar = np.asarray(np.corrcoef(x, rowvar=False) > 0.98)
    kept = list(range(len(names)))
    while (twins := np.flatnonzero(similar[np.ix_(kept, kept)].sum(axis=1) > 1)).size:
        del kept[twins[0]]
    columns = tuple(names[j] for j in kept)
    return Splits(
        split_tail(x[:, kept], str(path)),
        columns,
        statistics="all",
        ddof=1,
        notes="MAF's preprocessing: no two sensors with a correlation above 0.98, order of the file",
    )


def read_hepmass(paths: Paths, seed: int) -> Splits:
    """Read HEPMASS: signal events, without the features whose smallest value occurs more than five times.

    Args:
        paths: The training and the test file; the class comes first, the test file ends with a column more.
        seed: Not used.

    Returns:
        Validation rows from the end of the training file; standardized with training and validation rows.
    """
    train_path, test_path = paths
    train_frame, test_frame = (_read_signal(path) for path in paths)
    if len(test_frame.columns) > len(train_frame.columns):
        test_frame = test_frame.drop(columns=test_frame.columns[-1])
    names = [str(name) for name in train_frame.columns]
    if [str(name) for name in test_frame.columns] != names:
        raise DataError(f"{test_path}: its columns are not those of {train_path.name}")
    x, test = train_frame.to_numpy(dtype=np.float64), test_frame.to_numpy(dtype=np.float64)
    if len(x) < MIN_ROWS:
        raise DataError(f"{train_path}: too few rows, {len(x)} of class 1")
    kept = _continuous(x)
    validations = int(0.1 * len(x))
    return Splits(
        (x[:-validations, kept], x[-validations:, kept], test[:, kept]),
        tuple(name for name, keep in zip(names, kept, strict=True) if keep),
        statistics="train+validation",
        ddof=1,
        notes="MAF's preprocessing: class 1 only, features whose smallest value occurs at most five times",
    )


def _read_signal(path: Path) -> Any:
    """Read the rows of class 1, without the class, as a DataFrame; cells beyond the header are cut."""
    pandas = import_extra("pandas", "pycnf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pandas.errors.ParserWarning)
        frame = read_frame(path, lambda: pandas.read_csv(path, index_col=False))
    first = frame.columns[0]
    return frame[frame[first] == 1].drop(columns=first)


def _continuous(x: NDArray[np.float64], limit: int = 5) -> NDArray[np.bool_]:
    """Tell which features, standardized, take their smallest value at most `limit` times."""
    with np.errstate(invalid="ignore", divide="ignore"):
        x = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
    return (x == x.min(axis=0)).sum(axis=0) <= limit


def read_miniboone(paths: Paths, seed: int) -> Splits:
    """Read MINIBOONE as MAF's array, from which outliers and repeating features have been removed.

    Args:
        paths: The array, shape (N, 43).
        seed: Not used.

    Returns:
        Rows in the order of the file, standardized with training and validation rows.
    """
    (path,) = paths
    x = check_matrix(read_numpy(path), str(path))
    if x.shape[1] != 43:
        raise DataError(f"{path}: expected the 43 columns of MAF's MINIBOONE array, got {x.shape[1]}")
    return Splits(
        split_tail(x, str(path)),
        default_columns(43),
        statistics="train+validation",
        notes="MAF's preprocessing, rows in the order of the file",
    )


def read_miniboone_head(paths: Paths, seed: int) -> Splits:
    """Read the first rows of MINIBOONE, enough to try a program but not to train a model."""
    splits = read_miniboone(paths, seed)
    rows = sum(len(x) for x in splits.parts)
    return replace(splits, notes=f"only the first {rows:,} rows of MINIBOONE: no result on the benchmark")


def read_bsds300(paths: Paths, seed: int) -> Splits:
    """Read BSDS300 as MAF's file: 8 × 8 patches without their mean and without the last pixel.

    Args:
        paths: The HDF5 file with the arrays "train", "validation" and "test", shape (*, 63).
        seed: Not used.

    Returns:
        The three arrays as they are.
    """
    (path,) = paths
    h5py = import_extra("h5py", "pycnf[tables]")
    try:
        with h5py.File(path, "r") as file:
            train, validation, test = (np.asarray(file[part]) for part in PARTS)
    except KeyError as err:
        raise DataError(f"{path}: expected the arrays train, validation and test: {err}") from err
    except OSError as err:
        raise DataError(f"{path}: not an HDF5 file, or damaged: {err}") from err
    for x in (train, validation, test):
        if x.ndim != 2 or x.shape[1] != 63:
            raise DataError(f"{path}: expected patches of shape (*, 63), got {x.shape}")
    notes = "MAF's patches, not standardized"
    return Splits((train, validation, test), default_columns(63), statistics="none", notes=notes)


def read_bsds300_patches(paths: Paths, seed: int) -> Splits:
    """Read 8 × 8 patches of gray levels and prepare them as BSDS300.

    Uniform noise makes the levels 0, ..., 255 continuous on [0, 1]; then every patch loses its mean, and the
    last pixel, which is now minus the sum of the others.

    Args:
        paths: The archive with the arrays "train", "val" and "test" of bytes, shape (*, 64).
        seed: Seed of the noise.

    Returns:
        Patches, shape (*, 63), not standardized.
    """
    (path,) = paths
    rng = np.random.default_rng(seed)

    def read_part(key: str) -> Array:
        levels = read_numpy(path, key=key)
        if levels.ndim != 2 or levels.shape[1] != 64:
            raise DataError(f"{path}: expected {key!r} of shape (*, 64), got {levels.shape}")
        x = (levels + rng.random(levels.shape, dtype=np.float32)) / 256
        return (x - x.mean(axis=1, keepdims=True))[:, :63]

    parts = (read_part("train"), read_part("val"), read_part("test"))
    notes = "other random patches of the same images than MAF's, same preparation; non-commercial research only"
    return Splits(parts, default_columns(63), statistics="none", notes=notes)
