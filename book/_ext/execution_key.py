"""Remove a build of the book that was executed with other sources than the present ones.

Run as ``python book/_ext/execution_key.py _build``. The key covers what the numbers on the pages come from
beside the pages' own code: the package, the recorded results, the interpreter and the numerical libraries.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "torchdiffeq", "numpy", "scipy", "matplotlib")


def execution_key() -> str:
    """Return a digest of everything that the pages execute."""
    digest = hashlib.sha256(sys.version.encode())
    for name in LIBRARIES:
        digest.update(f"{name}=={version(name)}".encode())
    for folder in ("pycnf", "julia", "results", "benchmarks", "book/_ext"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main(build: Path) -> None:
    """Empty the build folder if its key is not the present one, and leave the present one there."""
    marker, key = build / "execution-key", execution_key()
    if build.exists() and (not marker.exists() or marker.read_text() != key):
        print(f"The sources changed: the pages in {build} are executed anew.")
        shutil.rmtree(build)
    build.mkdir(parents=True, exist_ok=True)
    marker.write_text(key)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
