"""Hold a table that is divided into training, validation and test rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycnf.data.checks import (
    MIN_ROWS,
    PARTS,
    Array,
    DataError,
    Parts,
    check_columns,
    check_parts,
    check_rows,
)

Statistics = Literal["train", "train+validation", "all", "none"]
"""The rows whose mean and standard deviation standardize a table."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Hold a table of N rows and D columns, standardized and divided.

    The rows are standardized column by column, x = (original - shift) / scale.

    Attributes:
        name: Name of the set.
        train: Training rows, float32, shape (N, D).
        validation: Validation rows, float32, shape (M, D).
        test: Test rows, float32, shape (K, D).
        columns: The D column names.
        source: Where the numbers come from.
        notes: What was done to them, and what to keep in mind.
        shift: Shift of the standardization in original units, float64, shape (D,).
        scale: Scale of the standardization in original units, float64, shape (D,).
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    columns: tuple[str, ...]
    source: str
    notes: str = ""
    shift: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    scale: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            object.__setattr__(self, name, getattr(self, name).expand(len(self.columns)).clone())
        for part in PARTS:
            x = getattr(self, part)
            if x.ndim != 2 or x.shape[1] != len(self.columns):
                raise ValueError(f"expected {part} of shape (*, {len(self.columns)}), got {tuple(x.shape)}")

    @property
    def features(self) -> int:
        """Number D of columns."""
        return len(self.columns)

    def restore(self, x: Tensor) -> Tensor:
        """Return standardized rows to the original units, x · scale + shift.

        Args:
            x: Standardized rows, shape ``(*, D)``.

        Returns:
            Rows in original units, shape ``(*, D)``, in the type and on the device of x.
        """
        return x * self.scale.to(x) + self.shift.to(x)

    def __repr__(self) -> str:
        sizes = f"train={len(self.train)}, validation={len(self.validation)}, test={len(self.test)}"
        return f"Dataset({self.name!r}, features={self.features}, {sizes})"


@dataclass(frozen=True, eq=False)
class Splits:
    """Hold the three parts of a table in original units, and the policy that standardizes them.

    Attributes:
        parts: Training, validation and test rows, shape ``(*, D)`` each.
        columns: The D column names.
        statistics: Rows that give the mean and the standard deviation.
        ddof: 0 divides the sum of squares by the number n of rows, 1 by n - 1.
        notes: What was done to the numbers.
    """

    parts: Parts
    columns: tuple[str, ...]
    statistics: Statistics = "train"
    ddof: int = 0
    notes: str = ""

    def finish(self, name: str, source: str) -> Dataset:
        """Check the parts, standardize them and turn them into tensors.

        Args:
            name: Name of the set, also for the messages.
            source: Where the numbers come from.

        Returns:
            The set, in float32.

        Raises:
            DataError: If a row is not finite, a column is constant, or there are too few rows.
        """
        check_parts(self.parts, name)
        for part, x in zip(PARTS, self.parts, strict=True):
            check_rows(x, self.columns, f"{name} ({part})")
        check_columns(self.parts[0], self.columns, name)
        shift, scale = self._moments()
        train, validation, test = (
            torch.from_numpy(np.ascontiguousarray((x - shift) / scale, dtype=np.float32)) for x in self.parts
        )
        return Dataset(
            name=name,
            train=train,
            validation=validation,
            test=test,
            columns=self.columns,
            source=source,
            notes=self.notes,
            shift=torch.from_numpy(shift),
            scale=torch.from_numpy(scale),
        )

    def _moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute the shift and the scale, shape (D,) each."""
        if self.statistics == "none":
            return np.zeros(len(self.columns)), np.ones(len(self.columns))
        used = {"train": 1, "train+validation": 2, "all": 3}[self.statistics]
        x = np.concatenate(self.parts[:used])
        return x.mean(axis=0, dtype=np.float64), x.std(axis=0, ddof=self.ddof, dtype=np.float64)


def split_tail(x: Array, where: str) -> Parts:
    """Cut off the last tenth of the rows as test rows, and the last tenth of the rest as validation rows.

    Args:
        x: Table, shape (N, D).
        where: What the table was read from, for the message.

    Returns:
        Training, validation and test rows.

    Raises:
        DataError: If the table has fewer than 20 rows.
    """
    if len(x) < MIN_ROWS:
        raise DataError(f"{where}: too few rows, {len(x)}; at least {MIN_ROWS} are needed to divide them")
    tests = int(0.1 * len(x))
    rest, test = x[:-tests], x[-tests:]
    validations = int(0.1 * len(rest))
    return rest[:-validations], rest[-validations:], test


def split_shuffled(x: Array, columns: Sequence[str], seed: int, where: str, *, notes: str = "") -> Splits:
    """Shuffle the rows and divide them into about 80 % training, 10 % validation and 10 % test rows.

    Args:
        x: Table, shape (N, D).
        columns: The D column names.
        seed: Seed of the shuffle.
        where: What the table was read from, for the message.
        notes: What was done to the numbers before.

    Returns:
        The parts, to be standardized with the training rows.

    Raises:
        DataError: If the table has fewer than 20 rows.
    """
    order = np.random.default_rng(seed).permutation(len(x))
    return Splits(split_tail(x[order], where), tuple(columns), statistics="train", notes=notes)
