"""Rows for training: checked once at the door, then cut into batches that depend on (seed, step) alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor | None]


def check_rows(name: str, values: Any, features: int, dtype: torch.dtype) -> Tensor:
    """Return a table as a detached tensor of the flow's dtype on the CPU or where it already is.

    Floating-point values of another precision are converted, so a float64 array may be given to a float32
    flow; integers are refused, because a density over them is a mistake unless they were dequantized.

    Args:
        name: What the table is called, for messages.
        values: Torch tensor, or anything numpy makes an array of, shape (N, features).
        features: Number of columns wanted.
        dtype: Type of the flow's parameters.

    Returns:
        Tensor of shape (N, features).

    Raises:
        ValueError: Wrong shape, no rows, not floating point, NaN or infinity.
    """
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype == object or array.dtype.kind not in "fiub":
            raise ValueError(f"expected {name} to hold real numbers, got an array of {array.dtype}")
        values = torch.from_numpy(np.ascontiguousarray(array))
    if values.ndim != 2 or values.shape[1] != features:
        raise ValueError(f"expected {name} of shape (N, {features}), got {tuple(values.shape)}")
    if not values.is_floating_point():
        raise ValueError(
            f"expected {name} to hold floating-point numbers, got {values.dtype}: convert real measurements "
            "with .float(), and add noise to counts or levels (dequantization) first"
        )
    if len(values) == 0:
        raise ValueError(f"expected {name} to have at least one row, got shape {tuple(values.shape)}")
    values = values.detach().to(dtype)
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        count = int((~finite).sum())
        raise ValueError(
            f"expected finite numbers, but {name} holds {count} NaN or infinite in {dtype}, the first at "
            f"row {row}, column {column}: clean the data first"
        )
    return values.contiguous()


def check_context(name: str, context: Any, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
    """Return the context of a table, checked against the flow: none for a flow without context.

    Args:
        name: What the context is called, for messages.
        context: None, or values of shape (rows, width).
        rows: Number of rows of the table it belongs to.
        width: Number of context features of the flow, 0 for a flow without.
        dtype: Type of the flow's parameters.

    Raises:
        ValueError: Missing, not wanted, or of the wrong shape or content.
    """
    if width == 0:
        if context is not None:
            raise ValueError(f"{name} was given, but the flow has no context: make it with CNF(..., context=...)")
        return None
    if context is None:
        raise ValueError(f"the flow has context={width}: expected {name} of shape ({rows}, {width}), got None")
    checked = check_rows(name, context, width, dtype)
    if len(checked) != rows:
        raise ValueError(f"expected {name} of shape ({rows}, {width}), got {tuple(checked.shape)}")
    return checked


def fingerprint(rows: Rows) -> str:
    """Return 16 hex digits of the SHA-256 of the values, to tell whether two runs saw the same data."""
    digest = hashlib.sha256()
    for part in rows:
        if part is not None:
            digest.update(part.cpu().numpy().data)
    return digest.hexdigest()[:16]


class Batches:
    """Yield shuffled batches for ever; batch s is a function of (seed, s) and needs no saved state.

    Epoch e visits the rows in the order of a permutation drawn from (seed, e). Rows that do not fill a batch
    at the end of an epoch are left out of it; the next permutation mixes them in again. Each batch is one
    indexing operation on tensors that are already on the device.

    Args:
        rows: Table (N, D) and context (N, C) or None, on the device of training.
        batch_size: Rows per batch, at most N.
        seed: Seed of the permutations.
        start: Number of the first batch.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int, start: int = 0) -> None:
        self.rows, self.batch_size, self.seed, self.start = rows, batch_size, seed, start

    def __iter__(self) -> Iterator[Rows]:
        """Yield (x of shape (batch_size, D), context of shape (batch_size, C) or None)."""
        table, context = self.rows
        per_epoch = len(table) // self.batch_size
        step, epoch, order = self.start, -1, torch.empty(0, dtype=torch.long)
        while True:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(mix(self.seed, epoch, stream=1))
                order = torch.randperm(len(table), generator=generator).to(table.device)
            first = step % per_epoch * self.batch_size
            index = order[first : first + self.batch_size]
            yield table[index], None if context is None else context[index]
            step += 1


def mix(seed: int, index: int, *, stream: int) -> int:
    """Return 32 well-mixed bits for (seed, stream, index)."""
    return int(np.random.SeedSequence([seed, stream, index]).generate_state(1)[0])


def seed_all(seed: int, index: int, *, stream: int, device: torch.device) -> None:
    """Seed the generators of torch (CPU and ``device``), numpy and Python for one step."""
    bits = mix(seed, index, stream=stream)
    torch.default_generator.manual_seed(bits)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(bits)
    np.random.seed(bits)
    random.seed(bits)


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Put the generators of torch, numpy and Python back as they were on leaving."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
