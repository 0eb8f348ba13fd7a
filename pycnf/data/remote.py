"""Download the benchmark tables from their public sources."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pycnf.data.catalog import download_folder, get_entry, names
from pycnf.data.checks import DataError, list_some
from pycnf.data.files import import_extra


@dataclass(frozen=True)
class Archive:
    """Describe a file to download.

    Attributes:
        url: Address.
        checksum: Algorithm and digest, "algorithm:digest".
        file: Name of the file in the data folder.
        megabytes: Size, for the reader.
        members: Files in the archive, and where the data folder has them.
    """

    url: str
    checksum: str
    file: str
    megabytes: int
    members: tuple[tuple[str, str], ...]


ARCHIVES: dict[str, Archive] = {
    "maf": Archive(
        url="https://zenodo.org/records/1161203/files/data.tar.gz?download=1",
        checksum="md5:9b9c9b0375315ad270eba4ce80c093ab",
        file="maf_data.tar.gz",
        megabytes=857,
        members=tuple(
            (file, file)
            for file in (
                "gas/ethylene_CO.pickle",
                "hepmass/1000_train.csv",
                "hepmass/1000_test.csv",
                "miniboone/data.npy",
                "BSDS300/BSDS300.hdf5",
            )
        ),
    ),
    "uci-power": Archive(
        url="https://archive.ics.uci.edu/static/public/235/individual+household+electric+power+consumption.zip",
        checksum="sha256:9f84b46ade8a2d8e1286ec4b2b6c2987a45a755c59f263be3b3b3d10dfbda3ff",
        file="uci_power.zip",
        megabytes=21,
        members=(("household_power_consumption.txt", "power/household_power_consumption.txt"),),
    ),
}
"""The archives by name."""


def fetch(name: str, data_dir: str | os.PathLike[str] | None = None, progressbar: bool = True) -> tuple[Path, ...]:
    """Download a set and put its files where `load` finds them.

    The archive is checked against its checksum and stays in the folder, so that a further set of the same
    archive needs no download. Files appear complete or not at all.

    Args:
        name: Name of a set with a public archive.
        data_dir: Folder to write to; by default PYCNF_DATA, else the user's cache.
        progressbar: Show the progress of the download.

    Returns:
        The files of the set.

    Raises:
        DataError: If there is no such set, nothing to download for it, the download fails, its checksum is
            wrong, or the folder cannot be written.
    """
    entry = get_entry(name)
    if entry.archive is None:
        if entry.kind in ("toy", "embedded"):
            how = "drawn" if entry.kind == "toy" else "part of the package"
            raise DataError(f"{name} needs no download: it is {how}")
        with_archive = list_some([other for other in names() if get_entry(other).archive])
        raise DataError(
            f"{name} has no archive to download (those that have: {with_archive}); "
            f"it is read from a folder that holds {entry.layouts[0].files[0]}, see {entry.source}"
        )
    archive = ARCHIVES[entry.archive]
    wanted = {file for layout in entry.layouts for file in layout.files}
    members = {member: target for member, target in archive.members if target in wanted}
    folder = download_folder(data_dir)
    targets = tuple(folder / target for target in members.values())
    if all(target.is_file() for target in targets):
        return targets
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise DataError(f"cannot write to the data folder {folder}: {err}") from err
    extract(download(archive, folder, progressbar=progressbar), members, folder)
    return targets


def download(archive: Archive, folder: Path, *, progressbar: bool = True) -> Path:
    """Download an archive, unless it is there already with the right checksum.

    Args:
        archive: What to download.
        folder: Where to.
        progressbar: Show the progress.

    Returns:
        The file.

    Raises:
        DataError: If the download fails or the checksum is wrong; nothing is left behind then.
    """
    pooch = import_extra("pooch", "pycnf")
    progressbar = progressbar and importlib.util.find_spec("tqdm") is not None
    failed = f"the download of {archive.url} failed"
    manual = f"to do it by hand, put it at {folder / archive.file} and try again"
    try:
        downloader = pooch.HTTPDownloader(progressbar=progressbar, timeout=60)
        path = pooch.retrieve(archive.url, archive.checksum, archive.file, folder, downloader=downloader)
    except ValueError as err:
        raise DataError(f"{failed}: its checksum is not {archive.checksum}; try again, or {manual}") from err
    except OSError as err:  # what requests raises is an OSError, too
        advice = f"check the connection and the space in {folder}; {manual}"
        raise DataError(f"{failed}: {_cause(err)}; {advice}") from err
    return Path(path)


def _cause(err: BaseException) -> str:
    """Return the innermost reason of a failed request, which is the readable one."""
    while err.__context__ is not None:
        err = err.__context__
    return str(err) or type(err).__name__


def extract(archive: Path, members: dict[str, str], folder: Path) -> None:
    """Take files out of a .zip or .tar.gz archive.

    A file is written beside its place and moved there when it is complete.

    Args:
        archive: The archive.
        members: Where in the folder to put each file, by the end of its path in the archive.
        folder: The data folder.

    Raises:
        DataError: If the archive is damaged, lacks a file, or a file cannot be written.
    """
    missing = dict(members)
    try:
        for path, file in _open_members(archive, tuple(members)):
            target = folder / missing.pop(path)
            _place(file, target)
            if not missing:
                break
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as err:
        raise DataError(f"{archive}: the archive is damaged ({err}); delete it and fetch again") from err
    except OSError as err:
        raise DataError(f"cannot extract {archive} to {folder}: {err}") from err
    if missing:
        raise DataError(f"{archive}: there is no {list_some(list(missing))} in the archive")


def _open_members(archive: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, IO[bytes]]]:
    """Open the wanted members one after the other, each given by the end of its path."""

    def match(path: str) -> str | None:
        return next((end for end in wanted if path == end or path.endswith(f"/{end}")), None)

    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as bundle:
            for path in bundle.namelist():
                if (end := match(path)) is not None:
                    with bundle.open(path) as file:
                        yield end, file
        return
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            if member.isfile() and (end := match(member.name)) is not None:
                opened = tar.extractfile(member)
                if opened is not None:
                    with opened:
                        yield end, opened


def _place(file: IO[bytes], target: Path) -> None:
    """Copy a stream to a new file beside its place, then move it there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
