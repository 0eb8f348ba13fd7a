"""Pictures for variational auto-encoders: MNIST, Omniglot, Frey Faces and Caltech 101 Silhouettes, divided."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycnf.data.catalog import Description, data_folders
from pycnf.data.checks import DataError, list_some
from pycnf.data.files import read_numpy
from pycnf.images.files import Read
from pycnf.images.sets import SOURCES as IMAGES

Array = NDArray[Any]
Paths = tuple[Path, ...]


@dataclass(frozen=True, eq=False, repr=False)
class PictureSet:
    """Hold pictures with pixels in [0, 1], divided.

    Attributes:
        name: Name of the set.
        shape: Height and width.
        train: Training pictures (N, pixels), float32, pixels row by row.
        validation: Validation pictures (M, pixels).
        test: Test pictures (K, pixels).
        dynamic: Whether the training pixels are probabilities of white, drawn anew at every step; validation and test
            pictures are then drawn once.
        source: Where the pictures come from.
        notes: What was done to them.

    Raises:
        ValueError: When a part has no pictures, another number of pixels, or values outside [0, 1].
    """

    name: str
    shape: tuple[int, int]
    train: Tensor
    validation: Tensor
    test: Tensor
    dynamic: bool = False
    source: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        pixels = self.shape[0] * self.shape[1]
        for part in ("train", "validation", "test"):
            x = getattr(self, part)
            if x.ndim != 2 or x.shape[1] != pixels or len(x) == 0:
                raise ValueError(f"expected {part} of shape (N, {pixels}), N >= 1, got {tuple(x.shape)}")
            if not (x.min() >= 0 and x.max() <= 1):
                raise ValueError(f"expected {part} with pixels in [0, 1], got {x.min():g} to {x.max():g}")

    def __repr__(self) -> str:
        sizes = f"train={len(self.train)}, validation={len(self.validation)}, test={len(self.test)}"
        return f"PictureSet({self.name!r}, shape={self.shape}, {sizes})"


Reader = Callable[[Paths, int], PictureSet]


@dataclass(frozen=True)
class Source:
    """Describe where a set of pictures can be read from.

    Attributes:
        summary: What it is.
        license: License of the pictures.
        address: Public address.
        shape: Height and width.
        rows: Number of pictures.
        layouts: Files it can be read from, the preferred ones first, each with the function that reads them.
    """

    summary: str
    license: str
    address: str
    shape: tuple[int, int]
    rows: int
    layouts: tuple[tuple[tuple[str, ...], Reader], ...]


def load_pictures(name: str, *, data_dir: str | os.PathLike[str] | None = None, seed: int = 0) -> PictureSet:
    """Load a set of pictures by name.

    Args:
        name: A name in ``SOURCES``.
        data_dir: Folder with its files; by default that of the environment variable PYCNF_DATA, and the user's cache.
        seed: Seed of the division, where the files do not divide it, and of the pixels that are drawn once.

    Returns:
        The set, divided as in the literature (``notes`` tells where not).

    Raises:
        DataError: When there is no such set, its files are not found, or they are damaged; the message says what to do.
    """
    found = _find(name, data_dir)
    if found is not None:
        paths, read = found
        return read(paths, seed)
    source, folders = SOURCES[name], data_folders(data_dir)
    wanted = " or ".join(" and ".join(files) for files, _ in source.layouts[:2])
    places = " or ".join(f"{folder}{'' if folder.is_dir() else ' (no such folder)'}" for folder in folders)
    raise DataError(
        f"{name}: found no {wanted} in {places}; get it from {source.address} and put it there, or name a folder that "
        "has it by data_dir or the environment variable PYCNF_DATA"
    )


def describe_pictures(name: str, data_dir: str | os.PathLike[str] | None = None) -> Description:
    """Describe a set of pictures and say whether and where it is present.

    Raises:
        DataError: When there is no such set.
    """
    found, source = _find(name, data_dir), SOURCES[name]
    return Description(
        name=name,
        kind="benchmark",
        features=source.shape[0] * source.shape[1],
        rows=source.rows,
        summary=source.summary,
        license=source.license,
        source=source.address,
        present=found is not None,
        path=found[0][0] if found else None,
        fetchable=False,
    )


def _find(name: str, data_dir: str | os.PathLike[str] | None) -> tuple[Paths, Reader] | None:
    if name not in SOURCES:
        raise DataError(f"no set of pictures is called {name!r}; there are {', '.join(SOURCES)}")
    for folder in data_folders(data_dir):
        for files, read in SOURCES[name].layouts:
            paths = tuple(folder / file for file in files)
            if all(path.is_file() for path in paths):
                return paths, read
    return None


def area_resample(images: Array, size: int) -> Array:
    r"""Shrink square pictures by averaging: a pixel of the result is the mean over the area that it covers.

    y = A x A^T, where A (size, n) holds the shares of the old rows in the new ones.

    Args:
        images: Pictures (N, n, n).
        size: New height and width, at most n.

    Returns:
        Pictures (N, size, size), float32, with the same mean.

    >>> bool(np.allclose(area_resample(np.eye(4)[None], 2), np.eye(2) / 2))
    True
    """
    n = images.shape[-1]
    edges, old = np.linspace(0, n, size + 1), np.arange(n)
    covered = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    shares = (np.clip(covered, 0, None) * (size / n)).astype(np.float32)
    parts = [shares @ images[i : i + 1000].astype(np.float32) @ shares.T for i in range(0, len(images), 1000)]
    return np.concatenate(parts)


def _mnist(read: Callable[[Paths], Read]) -> Reader:
    """Make pictures of the levels that a reader of images gives."""

    def read_pictures(paths: Paths, seed: int) -> PictureSet:
        levels = read(paths)
        held = _share(len(levels.train), 1 / 6)
        parts = tuple(part.astype(np.float32) / 255 for part in (*np.split(levels.train, [-held]), levels.test))
        return _divided("mnist", (28, 28), parts, seed, notes="the last sixth of the training pictures validates")

    return read_pictures


def _read_omniglot_mat(paths: Paths, seed: int) -> PictureSet:
    content = _read_mat(paths[0], ("data", "testdata"))
    whole, test = (content[key].T.reshape(-1, 28, 28).transpose(0, 2, 1) for key in ("data", "testdata"))
    whole = whole[np.random.default_rng(seed).permutation(len(whole))]
    held = _share(len(whole), 1345 / 24345)
    return _divided("omniglot", (28, 28), (whole[:-held], whole[-held:], test), seed, notes="the published pictures")


def _read_omniglot(paths: Paths, seed: int) -> PictureSet:
    drawings = [_checked(read_numpy(path, "images"), (20, 105, 105), str(path)) for path in paths]
    ink = ~np.concatenate(drawings).reshape(-1, 105, 105).astype(bool)
    ink = ink[np.random.default_rng(seed).permutation(len(ink))]
    tests, held = _share(len(ink), 8070 / 32460), _share(len(ink), 1345 / 32460)
    small = area_resample(ink, 28).clip(0, 1)  # averages may pass 1 by rounding
    parts = (small[: -tests - held], small[-tests - held : -tests], small[-tests:])
    notes = "the original drawings, area-averaged to 28 x 28; sizes as in the literature, another division"
    return _divided("omniglot", (28, 28), parts, seed, notes=notes)


def _read_frey_mat(paths: Paths, seed: int) -> PictureSet:
    return _finish_frey(_read_mat(paths[0], ("ff",))["ff"].T.reshape(-1, 28, 20), str(paths[0]), seed)


def _read_frey(paths: Paths, seed: int) -> PictureSet:
    return _finish_frey(read_numpy(paths[0], "images"), str(paths[0]), seed)


def _finish_frey(faces: Array, where: str, seed: int) -> PictureSet:
    x = _checked(faces, (28, 20), where)[np.random.default_rng(seed).permutation(len(faces))] / 255
    held = _share(len(x), 200 / 1965)
    parts = (x[: -2 * held], x[-2 * held : -held], x[-held:])
    return _divided("freyfaces", (28, 20), parts, None, notes="shuffled, then divided as in the literature")


def _read_caltech_split(paths: Paths, seed: int) -> PictureSet:
    keys = ("train_data", "val_data", "test_data")
    content = _read_mat(paths[0], keys)
    parts = tuple(_silhouettes(content[key], f"{paths[0]}: {key}") for key in keys)
    return _divided("caltech", (28, 28), parts, None, notes="the published division")


def _read_caltech(paths: Paths, seed: int) -> PictureSet:
    x = _silhouettes(_read_mat(paths[0], ("X",))["X"], str(paths[0]))
    x = x[np.random.default_rng(seed).permutation(len(x))]
    train, held = _share(len(x), 4100 / 8671), _share(len(x), 2264 / 8671)
    parts = (x[:train], x[train : train + held], x[train + held :])
    return _divided("caltech", (28, 28), parts, None, notes="sizes of the published division, pictures shuffled")


def _silhouettes(x: Array, where: str) -> Array:
    """Turn columns in which ink is 0 into pictures in which it is 1."""
    if x.ndim != 2 or x.shape[1] != 784:
        raise DataError(f"{where}: expected silhouettes of shape (N, 784), got {x.shape}")
    return 1.0 - x.reshape(-1, 28, 28).transpose(0, 2, 1)


def _divided(
    name: str, shape: tuple[int, int], parts: tuple[Array, ...], seed: int | None, *, notes: str
) -> PictureSet:
    """Make a set of its parts; with a seed the pixels are probabilities, drawn once for validation and test."""
    flat = [np.ascontiguousarray(part.reshape(len(part), -1), dtype=np.float32) for part in parts]
    if seed is not None:
        rng = np.random.default_rng([seed, 1])
        flat[1:] = [(rng.random(part.shape, dtype=np.float32) < part).astype(np.float32) for part in flat[1:]]
    train, validation, test = (torch.from_numpy(part) for part in flat)
    address = SOURCES[name].address
    return PictureSet(name, shape, train, validation, test, seed is not None, source=address, notes=notes)


def _share(rows: int, fraction: float) -> int:
    return max(1, round(rows * fraction))


def _checked(images: Array, shape: tuple[int, ...], where: str) -> Array:
    if images.ndim != 1 + len(shape) or images.shape[1:] != shape or len(images) == 0:
        raise DataError(f"{where}: expected pictures of shape {('N', *shape)}, got {images.shape}")
    return images


def _read_mat(path: Path, keys: tuple[str, ...]) -> Mapping[str, Array]:
    from scipy.io import loadmat

    try:
        content: Mapping[str, Array] = loadmat(path)
    except Exception as err:  # SciPy raises many kinds for a damaged file
        raise DataError(f"{path}: not a MATLAB file of version 4 to 7.2, or damaged: {err}") from err
    missing = [key for key in keys if key not in content]
    if missing:
        raise DataError(f"{path}: there is no array {list_some(missing)} in it")
    return content


SOURCES: dict[str, Source] = {
    "mnist": Source(
        "handwritten digits, dynamically binarized",
        IMAGES["mnist"].license,
        IMAGES["mnist"].address,
        (28, 28),
        70_000,
        tuple((files, _mnist(read)) for files, read in IMAGES["mnist"].layouts),
    ),
    "omniglot": Source(
        "handwritten characters of 50 alphabets, dynamically binarized",
        "MIT",
        "https://github.com/yburda/iwae (datasets/OMNIGLOT) or https://github.com/brendenlake/omniglot",
        (28, 28),
        32_460,
        (
            (("chardata.mat",), _read_omniglot_mat),
            (("omniglot_images_background.npz", "omniglot_images_evaluation.npz"), _read_omniglot),
        ),
    ),
    "freyfaces": Source(
        "frames of a face, 256 gray levels",
        "none stated",
        "https://cs.nyu.edu/~roweis/data/frey_rawface.mat",
        (28, 20),
        1965,
        ((("frey_rawface.mat",), _read_frey_mat), (("freyfaces.npz",), _read_frey)),
    ),
    "caltech": Source(
        "silhouettes of objects, black and white",
        "none stated",
        "https://people.cs.umass.edu/~marlin/data.shtml",
        (28, 28),
        8671,
        (
            (("caltech101_silhouettes_28_split1.mat",), _read_caltech_split),
            (("caltech101_silhouettes_28.mat",), _read_caltech),
        ),
    ),
}
"""The sets by name."""


__all__ = ["SOURCES", "PictureSet", "Source", "area_resample", "describe_pictures", "load_pictures"]
