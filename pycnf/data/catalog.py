"""List the sets that go by a name, and find their files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pycnf.data import substitutes, tables
from pycnf.data.checks import DataError
from pycnf.data.dataset import Splits
from pycnf.data.files import import_extra
from pycnf.data.toy import SIZES, TOYS

Kind = Literal["toy", "embedded", "benchmark", "substitute"]
Reader = Callable[[tuple[Path, ...], int], Splits]


@dataclass(frozen=True)
class Layout:
    """Name the files a set can be read from, relative to a data folder, and the function that reads them."""

    files: tuple[str, ...]
    read: Reader


@dataclass(frozen=True)
class Entry:
    """Describe a set that goes by a name.

    Attributes:
        name: Name of the set.
        kind: "toy" (drawn), "embedded" (comes with the package), "benchmark" (one of MAF's tables) or
            "substitute" (stands in for a benchmark table).
        features: Number of columns.
        rows: Number of rows in all three parts.
        summary: What it is.
        license: License of the data.
        source: Public address.
        layouts: Files it can be read from, the preferred ones first.
        archive: Name of the archive `fetch` downloads, None if there is none.
    """

    name: str
    kind: Kind
    features: int
    rows: int
    summary: str
    license: str
    source: str
    layouts: tuple[Layout, ...] = ()
    archive: str | None = None


@dataclass(frozen=True)
class Description:
    """Describe a set and say whether and where it is present.

    Attributes:
        name: Name of the set.
        kind: "toy", "embedded", "benchmark" or "substitute".
        features: Number of columns.
        rows: Number of rows in all three parts of the complete set.
        summary: What it is.
        license: License of the data.
        source: Public address.
        present: Whether `load` can read it now.
        path: The first of its files, None for sets without a file.
        fetchable: Whether `fetch` can download it.
    """

    name: str
    kind: Kind
    features: int
    rows: int
    summary: str
    license: str
    source: str
    present: bool
    path: Path | None
    fetchable: bool


_UCI = "https://archive.ics.uci.edu/dataset"
_MAF = "https://doi.org/10.5281/zenodo.1161203"
_CC_BY = "CC BY 4.0"


def _one(file: str, read: Reader) -> Layout:
    return Layout((file,), read)


_TOYS = [
    Entry(name, "toy", 2, sum(SIZES), summary, "none needed", "drawn with NumPy") for name, (_, summary) in TOYS.items()
]
_TABLES = [
    Entry(
        "power",
        "embedded",
        6,
        50_000,
        "household electric power, 50,000 rows of POWER",
        _CC_BY,
        "https://doi.org/10.24432/C58K54",
        (Layout((), tables.read_power_subset),),
    ),
    Entry(
        "power-full",
        "benchmark",
        6,
        2_049_280,
        "POWER: household electric power, every minute of four years",
        _CC_BY,
        f"{_UCI}/235",
        (
            _one("power/data.npy", tables.read_power),
            _one("power/household_power_consumption.txt", tables.read_power_text),
            _one("household_power_consumption.txt", tables.read_power_text),
            _one("power_household.npz", tables.read_power_columns),
        ),
        archive="uci-power",
    ),
    Entry(
        "gas",
        "benchmark",
        8,
        1_052_065,
        "GAS: chemical sensors exposed to mixtures of ethylene and CO",
        _CC_BY,
        f"{_UCI}/322",
        (_one("gas/ethylene_CO.pickle", tables.read_gas),),
        archive="maf",
    ),
    Entry(
        "hepmass",
        "benchmark",
        21,
        525_123,
        "HEPMASS: simulated particle collisions, signal only",
        _CC_BY,
        f"{_UCI}/347",
        (Layout(("hepmass/1000_train.csv", "hepmass/1000_test.csv"), tables.read_hepmass),),
        archive="maf",
    ),
    Entry(
        "miniboone",
        "benchmark",
        43,
        36_488,
        "MINIBOONE: neutrino events of the MiniBooNE experiment",
        _CC_BY,
        f"{_UCI}/199",
        (
            _one("miniboone/data.npy", tables.read_miniboone),
            _one("miniboone_head1523.npy", tables.read_miniboone_head),
        ),
        archive="maf",
    ),
    Entry(
        "bsds300",
        "benchmark",
        63,
        1_300_000,
        "BSDS300: 8 × 8 patches of natural images without their mean",
        "non-commercial research and education only",
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/",
        (
            _one("BSDS300/BSDS300.hdf5", tables.read_bsds300),
            _one("bsds300_patches.npz", tables.read_bsds300_patches),
        ),
        archive="maf",
    ),
    Entry(
        "gas-drift",
        "substitute",
        8,
        6_697,
        "chemical sensors; stands in for GAS",
        _CC_BY,
        f"{_UCI}/270",
        (_one("gas_drift16.npz", substitutes.read_gas_drift),),
    ),
    Entry(
        "higgs",
        "substitute",
        24,
        7_500,
        "simulated particle collisions; stands in for HEPMASS",
        _CC_BY,
        f"{_UCI}/280",
        (_one("higgs_7500.npz", substitutes.read_higgs),),
    ),
    Entry(
        "magic",
        "substitute",
        10,
        19_020,
        "MAGIC gamma telescope images",
        _CC_BY,
        f"{_UCI}/159",
        (_one("magic.npz", substitutes.read_magic),),
    ),
    Entry(
        "satimage",
        "substitute",
        36,
        6_435,
        "Landsat satellite image neighborhoods",
        _CC_BY,
        f"{_UCI}/146",
        (_one("satimage.npz", substitutes.read_satimage),),
    ),
]
ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _TOYS + _TABLES}
"""The sets by name."""


def names(kind: Kind | None = None) -> tuple[str, ...]:
    """List the names of the sets that `load` knows.

    >>> "moons" in names("toy") and "power" in names()
    True

    Args:
        kind: List only "toy", "embedded", "benchmark" or "substitute" sets.

    Returns:
        The names, toys first.
    """
    return tuple(name for name, entry in ENTRIES.items() if kind in (None, entry.kind))


def get_entry(name: str) -> Entry:
    """Look a set up by name.

    Raises:
        DataError: If there is no such set; the message has the most similar names.
    """
    if name in ENTRIES:
        return ENTRIES[name]
    similar = difflib.get_close_matches(name.lower(), ENTRIES, n=3)
    guess = f"did you mean {' or '.join(similar)}? " if similar else ""
    raise DataError(f"no data set is called {name!r}; {guess}There are: {', '.join(ENTRIES)}")


def describe(name: str, data_dir: str | os.PathLike[str] | None = None) -> Description:
    """Describe a set and say whether and where it is present.

    >>> describe("power").present
    True

    Args:
        name: Name of the set.
        data_dir: Folder to look in; see `data_folders`.

    Returns:
        The description.

    Raises:
        DataError: If there is no such set.
    """
    entry = get_entry(name)
    found = find_files(entry, data_dir) if needs_files(entry) else None
    return Description(
        name=entry.name,
        kind=entry.kind,
        features=entry.features,
        rows=entry.rows,
        summary=entry.summary,
        license=entry.license,
        source=entry.source,
        present=found is not None or not needs_files(entry),
        path=found[1][0] if found else None,
        fetchable=entry.archive is not None,
    )


def needs_files(entry: Entry) -> bool:
    """Tell whether a set is read from files of the user, rather than drawn or part of the package."""
    return entry.kind in ("benchmark", "substitute")


def download_folder(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder `fetch` writes to: `data_dir`, else PYCNF_DATA, else the user's cache."""
    return data_folders(data_dir)[0]


def data_folders(data_dir: str | os.PathLike[str] | None = None) -> tuple[Path, ...]:
    """List the folders in which files are looked for.

    Args:
        data_dir: If given, the only one. Otherwise the folder that the environment variable PYCNF_DATA
            names, and the user's cache.

    Returns:
        The folders, whether or not they exist.
    """
    if data_dir is not None:
        return (Path(data_dir).expanduser(),)
    cache = Path(import_extra("pooch", "pycnf").os_cache("pycnf"))
    named = os.environ.get("PYCNF_DATA")
    return (Path(named).expanduser(), cache) if named else (cache,)


def find_files(entry: Entry, data_dir: str | os.PathLike[str] | None = None) -> tuple[Layout, tuple[Path, ...]] | None:
    """Find the files of a set, in a data folder or in its subfolder `data` (where MAF's archive puts them).

    Returns:
        The layout that was found and its files, or None.
    """
    for folder in data_folders(data_dir):
        for layout in entry.layouts:
            for root in (folder, folder / "data"):
                paths = tuple(root / file for file in layout.files)
                if paths and all(path.is_file() for path in paths):
                    return layout, paths
    return None
