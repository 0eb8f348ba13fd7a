"""Load a set by name or by path."""

from __future__ import annotations

import os
from pathlib import Path

from pycnf.data.catalog import ENTRIES, Entry, data_folders, find_files, get_entry, needs_files
from pycnf.data.checks import DataError
from pycnf.data.dataset import Dataset
from pycnf.data.files import SUFFIXES, load_file
from pycnf.data.toy import load_toy


def load(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    drop_bad_rows: bool = False,
) -> Dataset:
    """Load a set by name, or a table of one's own by path.

    >>> data = load("power")
    >>> data.features, len(data.train)
    (6, 40000)

    Args:
        name_or_path: A name that `names` lists, or the path of a .csv, .tsv, .npy, .npz or .parquet file.
        data_dir: Folder with the files of the benchmark tables; by default the folder that the environment
            variable PYCNF_DATA names, and the user's cache.
        seed: Seed of what is drawn: a toy's points, the noise that makes integers continuous, the shuffle of
            one's own table. MAF's tables bring their own division and seed, which this does not change.
        drop_bad_rows: Leave rows of one's own table that hold NaN or infinity out with a warning, instead of
            refusing the table.

    Returns:
        The set, divided and standardized as its source prescribes.

    Raises:
        DataError: If it cannot be found or used; the message says why, and what to do.
    """
    if seed < 0:
        raise DataError(f"expected a seed ≥ 0, got {seed}")
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and text in ENTRIES:
        return _load_entry(ENTRIES[text], data_dir, seed)
    path = Path(text).expanduser()
    looks_like_path = path.suffix.lower() in SUFFIXES or os.sep in text or path.is_file()
    if looks_like_path or not isinstance(name_or_path, str):
        return load_file(path, seed, drop_bad_rows=drop_bad_rows)
    return _load_entry(get_entry(text), data_dir, seed)  # which says what names there are


def _load_entry(entry: Entry, data_dir: str | os.PathLike[str] | None, seed: int) -> Dataset:
    if entry.kind == "toy":
        return load_toy(entry.name, seed)
    if not needs_files(entry):
        return entry.layouts[0].read((), seed).finish(entry.name, entry.source)
    found = find_files(entry, data_dir)
    if found is None:
        raise DataError(_not_found(entry, data_dir))
    layout, paths = found
    return layout.read(paths, seed).finish(entry.name, f"{entry.source} (read from {' and '.join(layout.files)})")


def _not_found(entry: Entry, data_dir: str | os.PathLike[str] | None) -> str:
    """Say where the files of a set were looked for and how to get them."""
    files = " or ".join(" and ".join(layout.files) for layout in entry.layouts)
    folders = [f"{folder}{'' if folder.is_dir() else ' (no such folder)'}" for folder in data_folders(data_dir)]
    get = (
        f"fetch it with: pycnf data fetch {entry.name}" if entry.archive is not None else f"get it from {entry.source}"
    )
    elsewhere = "or name a folder that has it by data_dir or the environment variable PYCNF_DATA"
    return f"{entry.name}: found no {files} in {' or '.join(folders)}; {get}, {elsewhere}"
