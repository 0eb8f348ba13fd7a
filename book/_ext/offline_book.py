"""Sphinx extension: a book that reads without a network, each page with its notebook, each figure with a text."""

from __future__ import annotations

import contextlib
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from jupyter_cache import get_cache
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# Scripts, styles, images and frames that a browser would fetch from elsewhere; links are none of them.
FETCHED = re.compile(r"""<(?:script|link|img|iframe|source|video)\b[^>]*?\s(?:src|href)=["'](?:https?:)?//[^"']+""")
# MathJax's other ready-made combinations. The book uses tex-chtml.js and the parts that it may load later.
UNUSED = ("tex-chtml-*", "tex-mml-*", "tex-svg*", "mml-*", "latest.js", "node-main.js")

# Matplotlib writes each text of a figure as a comment into its SVG. Numbers at ticks say nothing by themselves.
WRITTEN = re.compile(r"<!-- (.+?) -->")
TICK = re.compile(r"\$?\\mathdefault|[-−+.,·×%\d\s{}^$]*$")


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
    """Put the executed notebook of a page beside its source, where the theme's download button finds it."""
    executed = Path(app.outdir).parent / "jupyter_execute" / f"{pagename}.ipynb"
    if doctree is None or app.builder.format != "html" or not executed.exists():
        return
    target = Path(app.outdir) / "_sources" / f"{pagename}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(with_outputs(executed, app.env.mystnb_config.execution_cache_path), target)
    context["ipynb_source"] = f"{pagename}.ipynb"


def with_outputs(path: Path, cache: str) -> nbformat.NotebookNode:
    """Read a notebook; MyST-NB leaves the outputs out that it had in its cache, so they are taken from there."""
    notebook = nbformat.read(path, as_version=4)
    if not any(cell.get("execution_count") for cell in notebook.cells):
        with contextlib.suppress(KeyError):  # not executed at all
            _, notebook = get_cache(cache).merge_match_into_notebook(notebook)
    return notebook


def describe_figure(path: Path) -> str:
    """Return what is written in a figure, an SVG of Matplotlib: titles, labels of axes, names of lines."""
    written = dict.fromkeys(WRITTEN.findall(path.read_text(encoding="utf-8")))
    texts = [re.sub(r"[$\\{}]", "", text).replace("mathrm", "").strip() for text in written if not TICK.match(text)]
    return "; ".join(text for text in dict.fromkeys(texts) if len(text) > 1)


def name_figures(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Let a text stand for each figure that a cell has drawn, unless the cell gives one (mystnb: image: alt)."""
    for image in doctree.findall(nodes.image):
        path = Path(app.srcdir) / image["uri"]
        if image.get("alt", image["uri"]) in ("", image["uri"]) and path.suffix == ".svg" and path.is_file():
            section = image.parent
            while section is not None and not isinstance(section, nodes.section):
                section = section.parent
            title = section.next_node(nodes.title).astext() if section is not None else docname
            image["alt"] = f"Figure of “{title}”: {describe_figure(path)}"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_config_value("comments_config", {}, "env")  # Jupyter Book sets it with or without sphinx_comments
    app.connect("html-page-context", offer_notebook, priority=500)  # the theme adds its buttons at 501
    app.connect("doctree-resolved", name_figures)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", refuse_network)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
