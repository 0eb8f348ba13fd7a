"""Rows wherever they are, in memory or in a file, read part by part in the precision that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

AT_A_TIME = 2**16  # rows read at once to look for NaN and infinity


class RowSource(Protocol):
    """Give rows by slices and by arrays of increasing row numbers, as arrays in memory, in files and in HDF5 do."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Rows:
    """Read parts of a table, which may be larger than the memory, as tensors.

    Args:
        name: What the table is called, for messages.
        values: Rows (N, width): a tensor, an array, a memory-mapped array, anything else that is sliced like one, or
            the path of a .npy file.
        width: Number of columns wanted.
        dtype: Type of the tensors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Damaged file, wrong shape, no rows, no floating-point numbers, or NaN or infinity in them: the
            whole table is read once to make sure.

    >>> table = Rows("rows", np.ones((5, 2)), 2, torch.float32)
    >>> len(table), table[1:4].shape == (3, 2), table[1:4].dtype
    (5, True, torch.float32)
    """

    def __init__(self, name: str, values: RowSource | str | Path, width: int, dtype: torch.dtype) -> None:
        if isinstance(values, (str, Path)):
            values = open_rows(values)
        elif not hasattr(values, "shape"):
            values = np.asarray(values)
        self.name, self.values, self.dtype = name, values, dtype
        shape = tuple(values.shape)
        if len(shape) != 2 or shape[1] != width:
            raise ValueError(f"expected {name} of shape (N, {width}), got {shape}")
        if shape[0] == 0:
            raise ValueError(f"expected {name} to have at least one row, got shape {shape}")
        first = values[:1]
        kind = first.dtype if isinstance(first, Tensor) else np.asarray(first).dtype
        if not (kind.is_floating_point if isinstance(kind, torch.dtype) else kind.kind == "f"):
            raise ValueError(
                f"expected {name} to hold floating-point numbers, got {kind}: convert real measurements to them, and "
                "add noise to counts or levels (dequantization) first"
            )
        self._check_finite()

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def __getitem__(self, index: Any) -> Tensor:
        """Return the rows of a slice or of an array of row numbers."""
        part = self.values[index]
        if not isinstance(part, Tensor):
            part = np.asarray(part)
            part = torch.from_numpy(np.array(part, dtype=np.float32 if part.dtype == np.float32 else np.float64))
        return part.detach().to(self.dtype)

    def _check_finite(self) -> None:
        bad: list[int] = []
        for part in cut(len(self), AT_A_TIME):
            wrong = ~torch.isfinite(self[part]).all(1)
            if bool(wrong.any()):
                bad += (part.start + wrong.nonzero()[:, 0]).tolist()
        if bad:
            named = ", ".join(f"{row:,}" for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise ValueError(
                f"expected finite numbers, but {self.name} holds NaN or infinity in {self.dtype} in {len(bad):,} of "
                f"{len(self):,} rows: {named} (counted from 0). Clean the data first"
            )


class Standardized:
    """Give rows in the units of a flow, (x - shift) / scale, part by part.

    Args:
        values: Rows (N, D) in the units of the data.
        shift: Shift of each column.
        scale: Scale of each column.

    >>> Standardized(np.full((2, 1), 7.0), [3.0], [2.0])[:1].item()
    2.0
    """

    def __init__(self, values: RowSource, shift: Sequence[float], scale: Sequence[float]) -> None:
        self.values, self.shift, self.scale = values, np.asarray(shift), np.asarray(scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the table."""
        return tuple(self.values.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return the rows of a slice or of an array of row numbers, in float64."""
        part: np.ndarray = (np.asarray(self.values[index], dtype=np.float64) - self.shift) / self.scale
        return part


def open_rows(path: str | Path) -> np.ndarray:
    """Map a .npy file into memory, so that only what is used of it is read.

    Args:
        path: The file.

    Returns:
        The array, read-only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a .npy file, damaged, or holds no real numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        rows: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as err:
        raise ValueError(f"{path} is not a .npy file of numbers, or damaged ({err}): numpy.save writes one") from err
    if rows.dtype.kind not in "fiub":
        raise ValueError(f"expected real numbers in {path}, got an array of {rows.dtype}")
    return rows


def cut(rows: int, size: int) -> list[slice]:
    """Cut so many rows into slices of a size, the last one perhaps smaller."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


__all__ = ["RowSource", "Rows", "Standardized", "cut", "open_rows"]
