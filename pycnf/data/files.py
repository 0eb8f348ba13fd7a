"""Read a user's own table from .csv, .tsv, .npy, .npz or .parquet."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycnf.data.checks import (
    Array,
    DataError,
    check_matrix,
    check_rows,
    default_columns,
    list_some,
    warn_discrete,
)
from pycnf.data.dataset import Dataset, Splits, split_shuffled

SUFFIXES = (".csv", ".tsv", ".npy", ".npz", ".parquet")
"""File formats that can be read."""

_VALIDATION_KEYS = ("validation", "val", "valid")
Table = tuple[Array, tuple[str, ...]]


def import_extra(module: str, requirement: str) -> Any:
    """Import an optional package where it is used.

    Args:
        module: Name of the module.
        requirement: What to install to have it.

    Returns:
        The module.

    Raises:
        DataError: If it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise DataError(f"{module} is needed for this and is missing: pip install '{requirement}'") from err


def load_file(path: Path, seed: int = 0, *, drop_bad_rows: bool = False) -> Dataset:
    """Read a table from a file, divide it and standardize it with its training rows.

    The rows are shuffled and divided into about 80 % training, 10 % validation and 10 % test rows. An .npz
    file with the arrays "train", "validation" (or "val") and "test" keeps its own division.

    Args:
        path: A file of one of the formats in `SUFFIXES`.
        seed: Seed of the shuffle.
        drop_bad_rows: Leave rows with NaN or infinity out with a warning instead of refusing the table.

    Returns:
        The set, named after the file.

    Raises:
        DataError: If the file is missing, empty or damaged, or its table cannot be used.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown format {suffix or '(no suffix)'!r}; expected {list_some(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    where = path.name
    splits = _read_divided(path, where, drop_bad_rows) if suffix == ".npz" else None
    if splits is not None:
        warn_discrete(splits.parts[0], splits.columns, where)
    else:
        x, columns = _read_table(path, where)
        x = check_rows(x, columns, where, drop_bad_rows=drop_bad_rows)
        warn_discrete(x, columns, where)
        splits = split_shuffled(x, columns, seed, where, notes=f"shuffled with seed {seed}, divided 80/10/10")
    return splits.finish(where, str(path))


def read_numpy(path: Path, key: str | None = None) -> NDArray[Any]:
    """Read an array from .npy, or one array from .npz, without unpickling anything.

    Args:
        path: The file.
        key: Name of the array in an .npz file.

    Returns:
        The array.

    Raises:
        DataError: If the file is missing, damaged, holds Python objects, or lacks the array.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if key is None:
                return np.asarray(loaded)
            return np.asarray(loaded[key])
    except KeyError as err:
        raise DataError(f"{path}: there is no array {key!r} in it") from err
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err}") from err
    except Exception as err:  # NumPy, zipfile and zlib raise many kinds
        if "Object arrays" in str(err):
            raise DataError(f"{path}: holds Python objects; save it as an array of numbers") from err
        raise DataError(f"{path}: not a NumPy file, or damaged: {err or type(err).__name__}") from err


def read_frame(path: Path, read: Callable[[], Any]) -> Any:
    """Run one of pandas' readers and name the file in whatever goes wrong.

    Args:
        path: The file, for the messages.
        read: Function without arguments that returns a DataFrame.

    Returns:
        The frame.

    Raises:
        DataError: If it cannot be read or has no rows.
    """
    try:
        frame = read()
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err}") from err
    except ImportError as err:
        raise DataError(f"pyarrow is needed for {path.name}: pip install 'pycnf[tables]'") from err
    except Exception as err:  # pandas and pyarrow raise many kinds
        raise DataError(f"{path}: not a table, or damaged: {err or type(err).__name__}") from err
    if frame.empty:
        raise DataError(f"{path}: the table has no rows")
    return frame


def _read_divided(path: Path, where: str, drop_bad_rows: bool) -> Splits | None:
    """Read an .npz file that is divided already; None if it is not."""
    keys = _keys(path)
    if "train" not in keys:
        return None
    validation = next((key for key in _VALIDATION_KEYS if key in keys), None)
    if validation is None or "test" not in keys:
        raise DataError(f"{path}: needs 'validation' and 'test' beside 'train'; it has {list_some(keys)}")
    columns = _column_names(path, keys, check_matrix(read_numpy(path, "train"), f"{where} (train)").shape[1])

    def read_part(key: str) -> Array:
        x = check_matrix(read_numpy(path, key), f"{where} ({key})")
        if x.shape[1] != len(columns):
            raise DataError(f"{where}: 'train' has {len(columns)} columns, {key!r} has {x.shape[1]}")
        return check_rows(x, columns, f"{where} ({key})", drop_bad_rows=drop_bad_rows)

    parts = (read_part("train"), read_part(validation), read_part("test"))
    return Splits(parts, columns, statistics="train", notes="divided as in the file")


def _read_table(path: Path, where: str) -> Table:
    """Read an undivided table and the names of its columns."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        x = check_matrix(read_numpy(path), where)
        return x, default_columns(x.shape[1])
    if suffix == ".npz":
        keys = _keys(path)
        arrays = [key for key in keys if key != "columns"]
        candidates = [key for key in ("x", "X", "data") if key in keys] or arrays
        if len(candidates) != 1:
            raise DataError(
                f"{path}: which array is the table? It has {list_some(keys) or 'none'}; name it 'x', or save "
                "'train', 'validation' and 'test'"
            )
        x = check_matrix(read_numpy(path, candidates[0]), where)
        return x, _column_names(path, keys, x.shape[1])
    pandas = import_extra("pandas", "pycnf")
    if suffix == ".parquet":
        import_extra("pyarrow", "pycnf[tables]")
        return _numbers(read_frame(path, lambda: pandas.read_parquet(path)), where)
    separator, named = _sniff(path)
    options: dict[str, Any] = {"sep": separator, "header": 0 if named else None, "low_memory": False}
    frame = read_frame(path, lambda: pandas.read_csv(path, skipinitialspace=True, **options))
    if not named:
        frame.columns = default_columns(len(frame.columns))
    return _numbers(frame, where)


def _keys(path: Path) -> list[str]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return list(archive.files)
    except Exception as err:
        raise DataError(f"{path}: not an .npz file, or damaged: {err or type(err).__name__}") from err


def _column_names(path: Path, keys: list[str], features: int) -> tuple[str, ...]:
    """Read the array "columns" of an .npz file, or make names up."""
    if "columns" not in keys:
        return default_columns(features)
    names = tuple(str(name) for name in read_numpy(path, "columns").ravel())
    if len(names) != features:
        raise DataError(f"{path}: 'columns' names {len(names)} columns, the table has {features}")
    return names


def _sniff(path: Path) -> tuple[str, bool]:
    """Find out from the first line what separates the columns, and whether it names them."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            line = next((line for line in file if line.strip()), "")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: not a text file: {err}") from err
    if path.suffix.lower() == ".tsv":
        separator = "\t"
    else:
        separator = next((mark for mark in (",", ";", "\t") if mark in line), ",")
    cells = next(csv.reader([line.strip("\r\n")], delimiter=separator), [])
    return separator, not all(_is_number(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(frame: Any, where: str) -> Table:
    """Turn a DataFrame into an array, or say which columns are not numbers."""
    pandas = import_extra("pandas", "pycnf")
    columns = tuple(str(name) for name in frame.columns)
    complaints = []
    for j, name in enumerate(columns):
        cells = frame.iloc[:, j]
        if pandas.api.types.is_numeric_dtype(cells) and not pandas.api.types.is_complex_dtype(cells):
            continue
        bad = pandas.to_numeric(cells.astype(str), errors="coerce").isna() & cells.notna()
        rows = np.flatnonzero(bad.to_numpy())
        if not rows.size:  # dates and the like, whose text is a number only by accident
            complaints.append(f"'{name}' is of type {cells.dtype}")
            continue
        share = "every row" if rows.size == len(cells) else f"{rows.size:,} of {len(cells):,} rows"
        first = f"row {rows[0] + 1}: {str(cells.iloc[rows[0]])[:30]!r}"
        complaints.append(f"'{name}' holds text in {share} ({first})")
    if complaints:
        raise DataError(
            f"{where}: every column must hold numbers, but {list_some(complaints)}; "
            "repair the cells, or remove or encode the columns"
        )
    return check_matrix(frame.to_numpy(dtype=np.float64, na_value=np.nan), where), columns
