"""Sphinx extension: what the PDF needs beside the pages, its figures and the macros of its formulas.

Cells draw SVG, which LaTeX does not read; rsvg-convert makes PDF of it. The macros are those of MathJax, which the
configuration holds.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
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


def write_macros(macros: Mapping[str, str | Sequence[Any]]) -> str:
    """Return macros of MathJax as LaTeX: a name stands for a text, or for a text and a number of arguments.

    >>> print(write_macros({"tr": "\\\\operatorname{tr}", "norm": ["|#1|", 1]}))
    \\providecommand{\\tr}{}\\renewcommand{\\tr}{\\operatorname{tr}}
    \\providecommand{\\norm}{}\\renewcommand{\\norm}[1]{|#1|}
    """
    lines = []
    for name, given in macros.items():
        text, count = (given, 0) if isinstance(given, str) else (given[0], given[1])
        arguments = f"[{count}]" if count else ""
        lines.append(rf"\providecommand{{\{name}}}{{}}\renewcommand{{\{name}}}{arguments}{{{text}}}")
    return "\n".join(lines)


def add_macros(app: Sphinx, config: Config) -> None:
    """Define the macros in the preamble."""
    macros = (config.mathjax3_config or {}).get("tex", {}).get("macros", {})
    elements = dict(config.latex_elements)
    elements["preamble"] = elements.get("preamble", "") + "\n" + write_macros(macros)
    config.latex_elements = elements


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_post_transform(FigureConverter)
    app.connect("config-inited", add_macros)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
