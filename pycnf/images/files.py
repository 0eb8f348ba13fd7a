"""Read images from files as they are published: IDX, NumPy archives, and the pickled batches of CIFAR10."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pycnf.data.checks import DataError
from pycnf.data.files import read_numpy
from pycnf.data.pickles import SafeUnpickler

Levels = NDArray[np.uint8]
Values = NDArray[Any]
Paths = tuple[Path, ...]


class Read(NamedTuple):
    """Hold the published division: images (N, C, H, W) and their classes (N,), for training and for testing."""

    train: Levels
    train_labels: NDArray[np.int64]
    test: Levels
    test_labels: NDArray[np.int64]


def read_idx(path: Path) -> Levels:
    """Read an array of bytes from an IDX file, packed by gzip or not.

    The format: two zero bytes, the type (8: unsigned bytes), the number of axes, their sizes as big-endian 32-bit
    integers, the values.

    Args:
        path: The file.

    Returns:
        The array.

    Raises:
        DataError: If the file is missing or damaged, or holds something else.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as err:
        raise DataError(f"{path}: cannot be read, or damaged: {err}") from err
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{path}: not an IDX file of bytes, it begins with {data[:4].hex(' ') or 'nothing'}")
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != np.prod(shape):
        raise DataError(f"{path}: damaged, it announces {shape} bytes and holds {values.size}")
    return values.reshape(shape)


def read_idx_set(paths: Paths) -> Read:
    """Read a set of four IDX files: training images and labels, test images and labels."""
    train, train_labels, test, test_labels = (read_idx(path) for path in paths)
    return _checked(train[:, None], train_labels, test[:, None], test_labels, (1, 28, 28), paths[0].parent)


def read_npz_set(paths: Paths) -> Read:
    """Read MNIST from an archive with the arrays train, train_labels, test and test_labels, or x_train, y_train, ..."""
    try:
        train = read_numpy(paths[0], "train")
        names = ("train_labels", "test", "test_labels")
    except DataError:
        train = read_numpy(paths[0], "x_train")
        names = ("y_train", "x_test", "y_test")
    train_labels, test, test_labels = (read_numpy(paths[0], name) for name in names)
    return _checked(train[:, None], train_labels, test[:, None], test_labels, (1, 28, 28), paths[0])


def read_cifar10(paths: Paths) -> Read:
    """Read CIFAR10 from its five training batches and its test batch, written by Python 2's pickle."""
    batches = [_read_batch(path) for path in paths]
    *images, test = (data.reshape(-1, 3, 32, 32) for data, _ in batches)
    *labels, test_labels = (labels for _, labels in batches)
    train, train_labels = np.concatenate(images), np.concatenate(labels)
    return _checked(train, train_labels, test, test_labels, (3, 32, 32), paths[0].parent)


def _read_batch(path: Path) -> tuple[Levels, NDArray[np.int64]]:
    try:
        with path.open("rb") as file:
            batch: Any = SafeUnpickler(file, encoding="latin1").load()
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err}") from err
    except Exception as err:  # a damaged pickle can raise anything
        raise DataError(f"{path}: not a batch of CIFAR10, or damaged: {err or type(err).__name__}") from err
    try:
        data, labels = np.asarray(batch["data"]), np.asarray(batch["labels"], dtype=np.int64)
    except (KeyError, TypeError, ValueError) as err:
        raise DataError(f"{path}: a pickle, but without the data and labels of a batch of CIFAR10 ({err})") from err
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(f"{path}: expected bytes of shape (N, 3072), got {data.dtype} of {data.shape}")
    return data, labels


def _checked(
    train: Values, train_labels: Values, test: Values, test_labels: Values, shape: tuple[int, int, int], where: Path
) -> Read:
    for x, labels in ((train, train_labels), (test, test_labels)):
        if x.dtype != np.uint8 or x.shape[1:] != shape:
            raise DataError(f"{where}: expected bytes, images of shape {shape}, got {x.dtype} of shape {x.shape[1:]}")
        if labels.shape != (len(x),):
            raise DataError(f"{where}: expected one label for each of {len(x)} images, got an array of {labels.shape}")
    return Read(train, train_labels.astype(np.int64), test, test_labels.astype(np.int64))


__all__ = ["Paths", "Read", "read_cifar10", "read_idx", "read_idx_set", "read_npz_set"]
