"""Sets of images by name: MNIST, Fashion-MNIST and CIFAR10, with their published division."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pycnf.data.catalog import Description, data_folders, download_folder
from pycnf.data.checks import DataError, list_some
from pycnf.data.remote import Archive, download, extract
from pycnf.images.files import Paths, Read, read_cifar10, read_idx_set, read_npz_set

Part = Literal["train", "validation", "test"]
HELD_OUT = 10  # one in so many training images validates


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Hold images of shape (C, H, W) whose pixels are levels 0 to 255, divided.

    Attributes:
        name: Name of the set.
        train: Training images (N, C, H, W), uint8.
        validation: Validation images (M, C, H, W), uint8.
        test: Test images (K, C, H, W), uint8.
        labels: Class of every image of a part, int64, by the name of the part.
        source: Where the images come from.
        notes: How they were divided, and what was done to them.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    labels: dict[Part, Tensor]
    source: str
    notes: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def features(self) -> int:
        """Number D = C H W of pixels and channels of an image."""
        return self.train[0].numel()

    def rows(self, part: Part) -> Tensor:
        """Return a part as flat images (N, D), float32, as :class:`~pycnf.images.flow.ImageFlow` takes them."""
        images: Tensor = getattr(self, part)
        return images.flatten(1).float()

    def shrink(self, factor: int) -> ImageSet:
        """Return smaller images: a pixel is the mean of a square of ``factor`` x ``factor`` pixels, rounded.

        Raises:
            ValueError: When height or width is no multiple of the factor.
        """
        _, height, width = self.shape
        if factor < 1 or height % factor or width % factor:
            raise ValueError(f"expected a factor that divides {height} and {width}, got {factor}")
        train, validation, test = (
            functional.avg_pool2d(part.float(), factor).round().to(torch.uint8)
            for part in (self.train, self.validation, self.test)
        )
        notes = f"{self.notes}; means of {factor} x {factor} pixels"
        return replace(self, train=train, validation=validation, test=test, notes=notes)

    def __repr__(self) -> str:
        sizes = f"train={len(self.train)}, validation={len(self.validation)}, test={len(self.test)}"
        return f"ImageSet({self.name!r}, shape={self.shape}, {sizes})"


@dataclass(frozen=True)
class Source:
    """Describe where a set can be read from.

    Attributes:
        summary: What it is.
        license: License of the images.
        address: Public address.
        shape: Shape (C, H, W) of the images.
        rows: Number of images.
        layouts: Files it can be read from, relative to a data folder, and the function that reads them; the preferred
            ones first.
        archives: What is downloaded; an archive without members is a file to keep as it is.
    """

    summary: str
    license: str
    address: str
    shape: tuple[int, int, int]
    rows: int
    layouts: tuple[tuple[tuple[str, ...], Callable[[Paths], Read]], ...]
    archives: tuple[Archive, ...]


_IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_CIFAR = tuple(f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"))
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_FASHION_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)


def _idx_layouts(*folders: str) -> tuple[tuple[tuple[str, ...], Callable[[Paths], Read]], ...]:
    return tuple(
        (tuple(f"{folder}/{name}{suffix}" for name in _IDX), read_idx_set)
        for folder in folders
        for suffix in (".gz", "")
    )


SOURCES: dict[str, Source] = {
    "mnist": Source(
        "handwritten digits, 28 x 28",
        "CC BY-SA 3.0",
        "http://yann.lecun.com/exdb/mnist/",
        (1, 28, 28),
        70_000,
        ((("mnist.npz",), read_npz_set), *_idx_layouts("mnist", "MNIST/raw")),
        (
            Archive(
                "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
                "sha256:731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
                "mnist.npz",
                11,
                (),
            ),
        ),
    ),
    "fashion-mnist": Source(
        "articles of clothing, 28 x 28",
        "MIT",
        "https://github.com/zalandoresearch/fashion-mnist",
        (1, 28, 28),
        70_000,
        _idx_layouts("fashion-mnist", "FashionMNIST/raw"),
        tuple(
            Archive(
                f"{_FASHION}/{name}.gz", f"md5:{md5}", f"fashion-mnist/{name}.gz", 26 if "train-im" in name else 4, ()
            )
            for name, md5 in zip(_IDX, _FASHION_MD5, strict=True)
        ),
    ),
    "cifar10": Source(
        "color photographs of ten classes, 32 x 32",
        "none stated",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        (3, 32, 32),
        60_000,
        ((_CIFAR, read_cifar10),),
        (
            Archive(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "md5:c58f30108f718f92721af3b95e74349a",
                "cifar-10-python.tar.gz",
                170,
                tuple((file, file) for file in _CIFAR),
            ),
        ),
    ),
}
"""The sets by name."""


def load(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> ImageSet:
    """Load a set of images by name.

    Args:
        name: A name in :data:`SOURCES`.
        data_dir: Folder with its files; by default that of the environment variable PYCNF_DATA, and the user's cache.

    Returns:
        The set: the published test images, and the published training images, the last tenth of which validates.

    Raises:
        DataError: When there is no such set, its files are not found, or they are damaged; the message says what to do.
    """
    source = _get(name)
    found = _find(source, data_dir)
    if found is None:
        wanted = list_some(source.layouts[0][0], 2)
        folders = data_folders(data_dir)
        places = " or ".join(f"{folder}{'' if folder.is_dir() else ' (no such folder)'}" for folder in folders)
        raise DataError(
            f"{name}: found no {wanted} in {places}; fetch it with: pycnf data fetch {name}, or name a folder that has "
            "it by data_dir or the environment variable PYCNF_DATA"
        )
    paths, read = found
    return _divide(name, read(paths), source.address)


def fetch(name: str, data_dir: str | os.PathLike[str] | None = None, progressbar: bool = True) -> tuple[Path, ...]:
    """Download a set of images, check it, and put its files where :func:`load` finds them.

    Args:
        name: A name in :data:`SOURCES`.
        data_dir: Folder to write to; by default PYCNF_DATA, else the user's cache.
        progressbar: Show the progress of the download.

    Returns:
        The files of the set.

    Raises:
        DataError: If there is no such set, the download fails, or the folder cannot be written.
    """
    folder, paths = download_folder(data_dir), list[Path]()
    for archive in _get(name).archives:
        own = [folder / target for _, target in archive.members] or [folder / archive.file]
        if not all(path.is_file() for path in own):
            target = (folder / archive.file).parent
            try:
                target.mkdir(parents=True, exist_ok=True)
            except OSError as err:
                raise DataError(f"cannot write to the data folder {target}: {err}") from err
            got = download(replace(archive, file=Path(archive.file).name), target, progressbar=progressbar)
            if archive.members:
                extract(got, dict(archive.members), folder)
        paths += own
    return tuple(paths)


def describe(name: str, data_dir: str | os.PathLike[str] | None = None) -> Description:
    """Describe a set of images and say whether and where it is present.

    Raises:
        DataError: If there is no such set.
    """
    source, found = _get(name), _find(_get(name), data_dir)
    return Description(
        name=name,
        kind="benchmark",
        features=int(np.prod(source.shape)),
        rows=source.rows,
        summary=source.summary,
        license=source.license,
        source=source.address,
        present=found is not None,
        path=found[0][0] if found else None,
        fetchable=True,
    )


def _get(name: str) -> Source:
    if name not in SOURCES:
        raise DataError(f"no set of images is called {name!r}; there are {', '.join(SOURCES)}")
    return SOURCES[name]


def _find(source: Source, data_dir: str | os.PathLike[str] | None) -> tuple[Paths, Callable[[Paths], Read]] | None:
    for folder in data_folders(data_dir):
        for files, read in source.layouts:
            paths = tuple(folder / file for file in files)
            if all(path.is_file() for path in paths):
                return paths, read
    return None


def _divide(name: str, read: Read, address: str) -> ImageSet:
    rest = len(read.train) - max(1, len(read.train) // HELD_OUT)
    train, test = torch.from_numpy(read.train.copy()), torch.from_numpy(read.test.copy())
    known, unseen = torch.from_numpy(read.train_labels), torch.from_numpy(read.test_labels)
    labels: dict[Part, Tensor] = {"train": known[:rest], "validation": known[rest:], "test": unseen}
    notes = "published test images; the last tenth of the published training images validates"
    return ImageSet(name, train[:rest], train[rest:], test, labels, address, notes)


__all__ = ["SOURCES", "ImageSet", "Source", "describe", "fetch", "load"]
