"""Run again what made a recorded result: ``make rerun RECORD=results/power/comparison.json``.

A record holds the command that made it. A record with a folder ``runs`` beside it was made run by run, maybe by
several commands: all of them are run again. Scripts are those of ``benchmarks/``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file: most hold one, some a list."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, list) else [content]


def made_by(path: Path) -> list[str]:
    """Return the distinct commands that made a record and the runs it gathers, the oldest first."""
    runs = sorted((path.parent / "runs").glob("*.json"))
    found = [record for file in [path, *runs] for record in read_records(file)]
    return list(dict.fromkeys(record["command"] for record in sorted(found, key=lambda record: record["date"])))


def runnable(command: str, path: Path) -> tuple[list[str], Path | None]:
    """Return a recorded command as arguments for this interpreter, and the folder its files are to be taken from.

    Args:
        command: What was recorded, such as ``pycnf compare --data power``.
        path: The record. What was not told where to write goes to a folder below ``runs/``.

    Raises:
        ValueError: When it is neither a pycnf command nor a script of ``benchmarks/``.
    """
    words = shlex.split(command)
    if words[0] == "python" and len(words) > 1 and (script := ROOT / "benchmarks" / Path(words[1]).name).is_file():
        return [sys.executable, str(script.relative_to(ROOT)), *words[2:]], None
    if words[0] != "pycnf":
        raise ValueError(f"cannot run {command!r} again: it is neither a pycnf command nor a script of benchmarks/")
    words = [sys.executable, "-m", "pycnf", *words[1:], *(["--overwrite"] * ("--overwrite" not in words))]
    if {"--output", "-o"} & set(words):
        return words, None
    taken = Path("runs") / f"rerun-{path.parent.name}"
    return [*words, "--output", taken.as_posix()], taken


def rerun(path: Path) -> None:
    """Run the commands of a record one after the other, and put what they write in its place."""
    for command in made_by(path):
        words, taken = runnable(command, path)
        print(f"$ {command}", flush=True)
        subprocess.run(words, cwd=ROOT, check=True)
        for old in path.parent.iterdir() if taken else ():
            if (new := ROOT / taken / old.name).is_file():
                shutil.copyfile(new, old)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the commands of one record, or show those of all."""
    parser = argparse.ArgumentParser(description="Run again what made a recorded result.")
    parser.add_argument("record", nargs="?", type=Path, help="a .json file below results/; without one, all are shown")
    chosen = parser.parse_args(arguments).record
    if chosen is not None:
        if not chosen.is_file():
            parser.error(f"there is no record {chosen}")
        rerun(chosen.resolve())
        return
    for path in sorted((ROOT / "results").rglob("*.json")):
        if path.parent.name != "runs":
            print(f"{path.relative_to(ROOT)}\n" + "\n".join(f"    {command}" for command in made_by(path)))


if __name__ == "__main__":
    main()
