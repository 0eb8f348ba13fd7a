"""Sphinx extension: a book that reads without a network, each page with its notebook to download."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# Scripts, styles, images and frames that a browser would fetch from elsewhere; links are none of them.
FETCHED = re.compile(r"""<(?:script|link|img|iframe|source|video)\b[^>]*?\s(?:src|href)=["'](?:https?:)?//[^"']+""")
# MathJax's other ready-made combinations. The book uses tex-chtml.js and the parts that it may load later.
UNUSED = ("tex-chtml-*", "tex-mml-*", "tex-svg*", "mml-*", "latest.js", "node-main.js")


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Copy MathJax and its fonts beside the pages."""
    if exception is not None or app.builder.format != "html":
        return
    package = find_spec("sphinx-mathjax-offline")
    if package is None or package.origin is None:
        raise ExtensionError("sphinx-mathjax-offline is not installed: pip install 'pycnf[book]'")
    shutil.copytree(
        Path(package.origin).parent / "static" / "mathjax",
        Path(app.outdir) / "_static" / "mathjax",
        ignore=shutil.ignore_patterns(*UNUSED),
        dirs_exist_ok=True,
    )


def refuse_network(app: Sphinx, exception: Exception | None) -> None:
    """Fail the build if a page fetches anything from another place.

    Raises:
        ExtensionError: Naming each page and what it fetches.
    """
    if exception is not None or app.builder.format != "html":
        return
    found = [
        f"{page.relative_to(app.outdir)}: {match.group()}"
        for page in sorted(Path(app.outdir).rglob("*.html"))
        for match in FETCHED.finditer(page.read_text(encoding="utf-8"))
        if 'rel="canonical"' not in match.group()
    ]
    if found:
        raise ExtensionError("These pages do not read without a network:\n" + "\n".join(found))


def offer_notebook(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Copy the executed notebook of a page beside its source, where the theme's download button finds it."""
    executed = Path(app.outdir).parent / "jupyter_execute" / f"{pagename}.ipynb"
    if doctree is None or app.builder.format != "html" or not executed.exists():
        return
    target = Path(app.outdir) / "_sources" / f"{pagename}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(executed, target)
    context["ipynb_source"] = f"{pagename}.ipynb"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_config_value("comments_config", {}, "env")  # Jupyter Book sets it with or without sphinx_comments
    app.connect("html-page-context", offer_notebook, priority=500)  # the theme adds its buttons at 501
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", refuse_network)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
