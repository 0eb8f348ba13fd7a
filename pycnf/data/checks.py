"""Check tables before a density is fitted to them, and say plainly what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Parts = tuple[Array, Array, Array]
PARTS = ("train", "validation", "test")
MIN_ROWS = 20
"""Fewest rows that can be divided into training, validation and test rows."""


class DataError(ValueError):
    """Data that cannot be used; the message says what is wrong, where, and what to do about it."""


def default_columns(features: int) -> tuple[str, ...]:
    """Name columns that carry no name of their own.

    >>> default_columns(2)
    ('x0', 'x1')
    """
    return tuple(f"x{j}" for j in range(features))


def list_some(words: Sequence[str], limit: int = 5) -> str:
    """Join words with commas, and count those beyond the limit.

    >>> list_some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    shown = ", ".join(words[:limit])
    return shown if len(words) <= limit else f"{shown} and {len(words) - limit} more"


def check_matrix(x: NDArray[np.generic], where: str) -> NDArray[np.float64]:
    """Check that an array is a table of real numbers.

    Args:
        x: Array of any shape and type.
        where: What the array was read from, for the messages.

    Returns:
        The table, shape (N, D), in float64.

    Raises:
        DataError: If the array is not two-dimensional, is empty, or does not hold real numbers.
    """
    if x.dtype.kind not in "fiub":
        raise DataError(f"{where}: expected an array of real numbers, got dtype {x.dtype}")
    if x.ndim != 2:
        advice = "; reshape(-1, 1) makes it one column" if x.ndim == 1 else "; flatten each sample into a row"
        raise DataError(f"{where}: expected a table of shape (rows, columns), got {x.shape}{advice}")
    if x.size == 0:
        raise DataError(f"{where}: the table is empty, its shape is {x.shape}")
    return x.astype(np.float64, copy=False)


def check_rows(x: Array, columns: Sequence[str], where: str, *, drop_bad_rows: bool = False) -> Array:
    """Refuse, or leave out, the rows that hold NaN or infinity.

    Args:
        x: Table, shape (N, D).
        columns: The D column names.
        where: What the table was read from, for the messages.
        drop_bad_rows: Leave such rows out with a warning instead of refusing the table.

    Returns:
        The table without its bad rows, shape (M, D) with M ≤ N.

    Raises:
        DataError: If there are such rows and they are not to be dropped.
    """
    finite = np.isfinite(x)
    good = finite.all(axis=1)
    if good.all():
        return x
    counts = (~finite).sum(axis=0)
    bad = [f"'{columns[j]}' ({counts[j]:,})" for j in np.flatnonzero(counts).tolist()]
    rows = f"{int((~good).sum()):,} of {len(x):,} rows"
    found = f"{where}: {rows} hold NaN or infinity, in columns {list_some(bad)}"
    if not drop_bad_rows:
        raise DataError(f"{found}; repair them, or leave these rows out with drop_bad_rows=True")
    warnings.warn(f"{found}; these rows were left out", stacklevel=4)
    return x[good]


def check_parts(parts: Parts, where: str) -> None:
    """Check that the three parts of a table fit together and are large enough.

    Args:
        parts: Training, validation and test rows.
        where: What the table was read from, for the messages.

    Raises:
        DataError: If their numbers of columns differ, a part has no rows, or there are not more training rows
            than columns (the likelihood of as many points as dimensions has no maximum).
    """
    named = dict(zip(PARTS, parts, strict=True))
    if len({x.shape[1] for x in parts}) > 1:
        shapes = ", ".join(f"{name} {x.shape}" for name, x in named.items())
        raise DataError(f"{where}: the parts have different numbers of columns: {shapes}")
    for name, x in named.items():
        if len(x) == 0:
            raise DataError(f"{where}: too few rows, none is left for {name}")
    rows, features = parts[0].shape
    if rows <= features:
        raise DataError(
            f"{where}: too few rows, {rows:,} training rows for {features} columns; "
            "a density needs more rows than columns, and preferably a hundred times as many"
        )
    if rows < 10 * features:
        warnings.warn(
            f"{where}: {rows:,} training rows for {features} columns are few; expect overfitting",
            stacklevel=5,
        )


def check_columns(train: Array, columns: Sequence[str], where: str) -> None:
    """Refuse constant columns, and warn of columns that repeat another one.

    Both put all the mass on a set of volume zero, where no density exists and the likelihood has no bound.

    Args:
        train: Training rows, shape (N, D).
        columns: The D column names.
        where: What the table was read from, for the messages.

    Raises:
        DataError: If a column holds one value only.
    """
    low, high = train.min(axis=0), train.max(axis=0)
    constant = [f"'{columns[j]}' (always {low[j]:g})" for j in np.flatnonzero(low == high).tolist()]
    if constant:
        raise DataError(f"{where}: constant columns have no density: {list_some(constant)}; remove them")
    pairs = [f"'{columns[j]}' = '{columns[i]}'" for i, j in _repeated(train)]
    if pairs:
        warnings.warn(
            f"{where}: columns repeat another one up to shift and scale: {list_some(pairs)}; "
            "their joint density is unbounded, remove one of each pair",
            stacklevel=5,
        )


def _repeated(x: Array) -> list[tuple[int, int]]:
    """Find the pairs of columns that agree up to shift and scale; candidates come from the first rows."""
    head = _standardized(x[:10_000])
    correlation = np.abs(head.T @ head) / len(head)
    candidates = np.argwhere(np.triu(correlation > 1 - 1e-9, k=1))
    pairs = []
    for i, j in candidates:
        a, b = _standardized(x[:, [i, j]]).T
        if min(np.abs(a - b).max(), np.abs(a + b).max()) < 1e-5:
            pairs.append((int(i), int(j)))
    return pairs


def _standardized(x: Array) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    x = x - x.mean(axis=0)
    return x / np.maximum(x.std(axis=0), np.finfo(np.float64).tiny)


def warn_discrete(x: Array, columns: Sequence[str], where: str, share: float = 0.1) -> None:
    """Warn of columns in which one value fills a large share of the rows, and of one that counts rows.

    A continuous density grows without bound at a value that repeats. Uniform noise of one unit of the last
    digit (dequantization) makes such a column continuous.

    Args:
        x: Table, shape (N, D).
        columns: The D column names.
        where: What the table was read from, for the message.
        share: Share of the rows from which on one value counts as repeated.
    """
    if len(x) > 1 and (steps := np.flatnonzero((np.diff(x, axis=0) == 1).all(axis=0))).size:
        counting = [f"'{columns[j]}'" for j in steps.tolist()]
        warnings.warn(
            f"{where}: column {list_some(counting)} counts the rows; if it is an index, remove it",
            stacklevel=4,
        )
    head = x[:20_000]
    frequent = []
    for j, name in enumerate(columns):
        _, counts = np.unique(head[:, j], return_counts=True)
        if counts.max() > 1 and counts.max() > share * len(head):
            frequent.append(f"'{name}' ({counts.size:,} distinct values)")
    if frequent:
        warnings.warn(
            f"{where}: one value fills more than {share:.0%} of the rows of columns {list_some(frequent)}; "
            "a continuous density is unbounded there, add uniform noise of one unit or remove the column",
            stacklevel=4,
        )
