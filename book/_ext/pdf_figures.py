"""Sphinx extension: figures of the PDF. Cells draw SVG, which LaTeX does not read; rsvg-convert makes PDF of it."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms.images import ImageConverter

PROGRAM = "rsvg-convert"


class FigureConverter(ImageConverter):
    """Convert figures from SVG to PDF, which keeps them vectors."""

    conversion_rules = [("image/svg+xml", "application/pdf")]  # noqa: RUF012 - as Sphinx declares it

    def is_available(self) -> bool:
        return shutil.which(PROGRAM) is not None

    def convert(self, _from: Any, _to: Any) -> bool:
        """Convert one file.

        Raises:
            ExtensionError: The program failed; the message is its own.
        """
        call = [PROGRAM, "--format=pdf", f"--output={_to}", str(_from)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExtensionError(f"{PROGRAM} cannot convert {_from}: {done.stderr.strip()}")
        return True


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_post_transform(FigureConverter)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
