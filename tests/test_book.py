"""The book as it is read: its pages as files, and as a browser shows them.

The checks run on the book that ``make book`` has left in ``_build/html``, or in the folder that ``PYCNF_BOOK`` names.
Those that open a browser are marked ``book``; ``make check-book`` runs them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import types
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "book"
BUILT = Path(os.environ.get("PYCNF_BOOK", ROOT / "_build" / "html"))


def contents(part: dict[str, Any] | None = None) -> list[str]:
    """Names of the pages in their order."""
    part = part or yaml.safe_load((SOURCES / "_toc.yml").read_text(encoding="utf-8"))
    own = [part[key] for key in ("root", "file") if key in part]
    below = [child for key in ("parts", "chapters", "sections") for child in part.get(key, [])]
    return [name.removesuffix(".md") for name in own] + [name for child in below for name in contents(child)]


PAGES = contents()
EXECUTED = [name for name in PAGES if "{code-cell}" in (SOURCES / f"{name}.md").read_text(encoding="utf-8")]
OTHERS = ["genindex", "search"]  # made by the builder


# --- public names ------------------------------------------------------------------------------

ROOMS = ("data", "diagnostics", "experiments", "images", "regularizers", "training", "vae")
PACKAGES = ["pycnf", *(f"pycnf.{name}" for name in ROOMS)]
MODULES = [
    f"pycnf.{name}"
    for name in (
        "shipped",
        "plots_animation",
        "plots_diagnostics",
        "plots_flows",
        "plots_fronts",
        "plots_images",
        "plots_vae",
    )
]


def documented() -> list[str]:
    """Full names of what the API page describes."""
    text = (SOURCES / "api.md").read_text(encoding="utf-8")
    return re.findall(r"^\.\. (?:auto\w+|py:\w+):: (pycnf[\w.]+)", text, re.MULTILINE)


def find(name: str) -> Any:
    """What a full name stands for."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        if importlib.util.find_spec(".".join(parts[: i - 1]) or "pycnf") is None:
            continue
        try:
            found: Any = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[i:], found)
    raise ModuleNotFoundError(name)


def public(module: types.ModuleType) -> list[str]:
    """Names that a package offers: those it imports from its modules, or that a module defines."""
    found = []
    for name, value in vars(module).items():
        defined = str(getattr(value, "__module__", "")).startswith("pycnf")
        constant = name.isupper() and module.__name__ in PACKAGES
        if not name.startswith("_") and not inspect.ismodule(value) and (defined or constant):
            own = module.__name__ in PACKAGES or value.__module__ == module.__name__
            found += [name] if own else []
    return found


@pytest.mark.parametrize("name", PACKAGES + MODULES)
def test_public_names_have_a_reference(name: str) -> None:
    module = importlib.import_module(name)
    described = documented()
    objects = [find(path) for path in described]
    names = public(module)
    assert names, f"{name} offers nothing"
    missing = [each for each in names if not any(getattr(module, each) is known for known in objects)]
    assert missing == [], f"book/api.md lacks these names of {name}"


def test_the_reference_names_each_thing_once() -> None:
    described = documented()
    assert sorted(described) == sorted(set(described))


# --- tools of the book -------------------------------------------------------------------------


def tool(name: str) -> types.ModuleType:
    """A module of book/_ext."""
    spec = importlib.util.spec_from_file_location(name, SOURCES / "_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_record_can_be_made_again() -> None:
    rerun = tool("rerun")
    for path in (ROOT / "results").rglob("*.json"):
        if path.parent.name != "runs":
            commands = rerun.made_by(path)
            assert commands
            for command in commands:
                words, taken = rerun.runnable(command, path)
                script = words[1] == "-m" or (ROOT / words[1]).is_file()
                assert script, command
                assert ("--output" in words) >= (taken is not None)


def test_records_are_made_again_beside_the_old_ones() -> None:
    words, taken = tool("rerun").runnable("pycnf compare --data power", ROOT / "results" / "power" / "comparison.json")
    assert " ".join(words[1:]) == "-m pycnf compare --data power --overwrite --output runs/rerun-power"
    assert taken == Path("runs/rerun-power")
    with pytest.raises(ValueError, match="neither a pycnf command"):
        tool("rerun").runnable("rm -r results", ROOT / "results" / "power" / "comparison.json")


def test_a_decision_needs_its_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas", reason="pandas comes with the extra book")
    for folder in (SOURCES / "_ext", ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    decisions = importlib.import_module("decisions").Decisions()
    decisions.add("a", "`b`", "c", "page", holds=True)
    decisions.add("d", "e", "not recorded", "page")
    assert decisions.markdown().splitlines()[2:] == [
        "| a | `b` | c | {doc}`page` |",
        "| d | e | not recorded | {doc}`page` |",
    ]
    with pytest.raises(AssertionError, match="f: g is not supported by what was measured, h"):
        decisions.add("f", "g", "h", "page", holds=False)


def test_formulas_of_the_pdf_have_the_macros_of_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx", reason="sphinx comes with the extra book")
    monkeypatch.syspath_prepend(str(SOURCES / "_ext"))
    written = importlib.import_module("pdf_book").write_macros({"div": r"\operatorname{div}", "norm": ["|#1|", 1]})
    assert written.splitlines() == [
        r"\providecommand{\div}{}\renewcommand{\div}{\operatorname{div}}",
        r"\providecommand{\norm}{}\renewcommand{\norm}[1]{|#1|}",
    ]


def test_figures_are_described_by_what_is_written_in_them(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="sphinx comes with the extra book")
    from pycnf.plots import house_figure

    with house_figure(1, "Title of it") as (figure, axes):
        axes[0].plot([1e-3, 1.0], [1.0, 2.0], label="a line")
        axes[0].set(xlabel=r"time $t$ (s)", ylabel=r"$\log p$ (nats)", xscale="log")
        axes[0].legend()
    figure.savefig(tmp_path / "figure.svg")
    text = tool("offline_book").describe_figure(tmp_path / "figure.svg")
    assert set(text.split("; ")) == {"time t (s)", "log p (nats)", "a line", "Title of it"}


# --- pages as files ----------------------------------------------------------------------------


class Page(HTMLParser):
    """What the checks need to know of a page."""

    CODE = ("pre", "code", "script", "style")
    EMPTY = ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.images: list[dict[str, str]] = []
        self.fetched: list[str] = []
        self.classes: set[str] = set()
        self.text: list[str] = []
        self.style: list[str] = []
        self._open: list[tuple[str, bool]] = []  # tags, and whether what is in them is no prose
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        known = {key: value or "" for key, value in attrs}
        classes = set(known.get("class", "").split())
        self.classes |= classes
        self.ids |= {known[key] for key in ("id", "name") if key in known and not (tag == "meta" and key == "name")}
        if tag == "a" and "href" in known:
            self.links.append(known["href"])
        if tag == "img":
            self.images.append(known)
        if tag in ("script", "iframe", "source", "video", "audio", "embed") and "src" in known:
            self.fetched.append(known["src"])
        if tag == "link" and "canonical" not in known.get("rel", ""):
            self.fetched.append(known.get("href", ""))
        self.style.append(known.get("style", ""))
        if tag not in self.EMPTY:
            quiet = tag in self.CODE or "math" in classes or bool(self._open and self._open[-1][1])
            self._open.append((tag, quiet))

    def handle_endtag(self, tag: str) -> None:
        while any(name == tag for name, _ in self._open) and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "style":
            self.style.append(data)
        if not (self._open and self._open[-1][1]):
            self.text.append(data)


@functools.cache
def read(path: Path) -> Page:
    return Page(path)


def built(name: str) -> Path:
    """File of a page that is built and not older than its source; else the test is skipped."""
    path, source = BUILT / f"{name}.html", SOURCES / f"{name}.md"
    if not (BUILT / "index.html").is_file():
        pytest.skip("there is no book: run `make book`")
    if source.is_file() and (not path.is_file() or path.stat().st_mtime < source.stat().st_mtime):
        pytest.skip(f"book/{name}.md is newer than its page: run `make book`")
    return path


def local(address: str) -> bool:
    """Whether an address belongs to the book."""
    parts = urlsplit(address)
    return not parts.scheme and not parts.netloc


@pytest.mark.parametrize("name", PAGES + OTHERS)
def test_links_lead_somewhere(name: str) -> None:
    path = built(name)
    broken = []
    for link in filter(local, read(path).links):
        parts = urlsplit(link)
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.is_file():
            broken.append(f"{link}: no such file")
        elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).ids:
            broken.append(f"{link}: no such anchor")
    assert sorted(set(broken)) == []


@pytest.mark.parametrize("name", PAGES + OTHERS)
def test_images_are_there_and_say_what_they_show(name: str) -> None:
    path = built(name)
    for image in read(path).images:
        source, text = image.get("src", ""), image.get("alt", "").strip()
        if not source.startswith("data:"):
            assert local(source), f"{source} comes from elsewhere"
            assert (path.parent / unquote(source)).is_file(), f"there is no {source}"
        assert text, f"no text stands for {source}"
        assert "_images/" not in text, f"only its path stands for {source}: give the cell or the image an alt text"


LEFT = {
    "mathematics": r"\$\$|(?<!\\)\\(?:frac|norm|mathrm|begin|sum|int)\b",
    "a role": r"\{(?:doc|ref|eq|term|cite(?::\w+)?|prf:ref|numref|glue(?::\w+)?|abbr)\}`?",
    "a directive": r"^\s*(?:```|:::|~~~)",
    "a reference": r"\?\?\?|\[\?\]",
}


@pytest.mark.parametrize("name", PAGES)
def test_no_markup_is_left(name: str) -> None:
    page = read(built(name))
    text = "\n".join(page.text)
    for what, pattern in LEFT.items():
        found = re.search(pattern, text, re.MULTILINE)
        assert found is None, f"{what} was not rendered: …{text[max(found.start() - 60, 0) : found.end() + 60]}…"
    assert not {"problematic", "system-message"} & page.classes, "the builder marked an error"


@pytest.mark.parametrize("name", EXECUTED)
def test_pages_can_be_downloaded_as_notebooks(name: str) -> None:
    page = read(built(name))
    link = f"_sources/{name}.ipynb"
    assert link in page.links, "the page does not offer its notebook"
    notebook = json.loads((BUILT / link).read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["execution_count"] for cell in code if "".join(cell["source"]).strip())
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]


@pytest.mark.parametrize("name", PAGES + OTHERS)
def test_pages_ask_for_nothing_from_the_network(name: str) -> None:
    page = read(built(name))
    assert [address for address in page.fetched if not local(address)] == []
    assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)'\"]+", "\n".join(page.style)) == []


def test_styles_ask_for_nothing_from_the_network() -> None:
    built("index")
    styles = list(BUILT.rglob("*.css"))
    assert styles
    for path in styles:
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"(?:url\(|@import\s)\s*['\"]?(?:https?:)?//[^)'\"]+", text)
        assert found == [], f"{path.relative_to(BUILT)} fetches from elsewhere"


def test_every_page_was_executed() -> None:
    path = built("status")
    if any((BUILT / f"{name}.html").stat().st_mtime < (SOURCES / f"{name}.md").stat().st_mtime for name in EXECUTED):
        pytest.skip("some pages are newer than the book: run `make book`")
    text = path.read_text(encoding="utf-8")
    rows = re.findall(r"<tr\b.*?</tr>", text, re.DOTALL)
    for name in EXECUTED:
        row = [row for row in rows if f'href="{name}.html"' in row or (name == "status" and 'href="#"' in row)]
        assert len(row) == 1, f"{name} is not in the table of executions"
        assert "✅" in row[0], f"{name} was not executed"


# --- pages in a browser ------------------------------------------------------------------------

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
# Breaches that are not ours to mend: rule of axe-core, element.
EXCUSED = {("aria-required-children", ".citation-list")}  # docutils gives its references another role than list items
ASKED = {"resultTypes": ["violations"], "preload": False}  # styles are in the pages; a file cannot fetch another
UNFOLD = """() => {
    const still = document.createElement("style");
    still.textContent = "*, *::before, *::after { transition: none !important; animation: none !important }";
    document.head.append(still);  // colors are checked when they have arrived
    document.querySelectorAll("article details").forEach(part => part.open = true);
    document.querySelectorAll("article .toggle-hidden").forEach(part => part.classList.remove("toggle-hidden"));
}"""
TYPESET = """async () => {
    if (!document.querySelector(".math")) return {wanted: 0, made: 0, errors: []};
    for (let i = 0; i < 200 && !(window.MathJax && MathJax.startup && MathJax.startup.promise); i++)
        await new Promise(done => setTimeout(done, 50));
    await MathJax.startup.promise;
    const errors = [...document.querySelectorAll("mjx-merror, [data-mjx-error]")];
    return {
        wanted: document.querySelectorAll("span.math, div.math").length,
        made: [...document.querySelectorAll("span.math, div.math")].filter(part => part.querySelector("mjx-container"))
            .length,
        errors: errors.map(part => part.getAttribute("data-mjx-error") || part.textContent),
    };
}"""
BROKEN = """async () => {
    const images = [...document.images];
    await Promise.all(images.map(image => image.decode().catch(() => null)));
    return images.filter(image => !image.complete || image.naturalWidth === 0).map(image => image.src);
}"""
WIDER = """() => {
    const root = document.documentElement, width = root.clientWidth;
    if (Math.max(root.scrollWidth, document.body.scrollWidth) <= width + 1) return [];
    const hidden = part => {
        for (let up = part.parentElement; up && up !== document.body; up = up.parentElement)
            if (["auto", "scroll", "hidden", "clip"].includes(getComputedStyle(up).overflowX)) return true;
        return false;
    };
    const found = [...document.querySelectorAll("body *")]
        .filter(part => part.getBoundingClientRect().right > width + 1 && !hidden(part));
    return [`${root.scrollWidth} > ${width}`].concat(found.slice(0, 5).map(part =>
        `${part.tagName.toLowerCase()}.${part.className} to ${Math.round(part.getBoundingClientRect().right)}: ` +
        part.textContent.trim().slice(0, 60)));
}"""

BEYOND = """() => {
    const edge = document.querySelector("article").getBoundingClientRect().right + 1;
    return [...document.querySelectorAll("article span.math")]
        .filter(part => !part.closest("table") && part.getBoundingClientRect().right > edge)
        .map(part => part.textContent.slice(0, 60));
}"""  # tables may be scrolled, and formulas in lines of their own


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser: that of the system, or one that playwright has installed."""
    built("index")
    why = "the book is not rendered: playwright is not installed (`make check-book` installs it)"
    playwright = pytest.importorskip("playwright.sync_api", reason=why)
    pytest.importorskip("axe_playwright_python.sync_playwright", reason=why)
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as run:
        if found is None and not Path(run.chromium.executable_path).is_file():
            pytest.skip("no browser is found: install Chromium, or `.venv/bin/playwright install chromium`")
        opened = run.chromium.launch(executable_path=found, args=["--disable-gpu", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


@pytest.mark.book
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_pages_in_a_browser(browser: Any, name: str, width: str, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    path = built(name)
    across, high = WIDTHS[width]
    view = browser.new_context(viewport={"width": across, "height": high}, color_scheme=scheme)
    try:
        view.set_default_timeout(120_000)
        page, said, asked = view.new_page(), [], []
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.resolve().as_uri(), wait_until="load")
        math = page.evaluate(TYPESET)
        page.evaluate(UNFOLD)
        wrong = {
            "mathematics with errors": math["errors"],
            "formulas that are not typeset": [] if math["made"] == math["wanted"] else [math],
            "broken images": page.evaluate(BROKEN),
            "wider than the page": page.evaluate(WIDER),
            "formulas beyond the text": page.evaluate(BEYOND),
            "scheme": [] if page.evaluate("document.documentElement.dataset.theme") == scheme else [scheme],
            "accessibility": violations(Axe().run(page, options=ASKED).response),
            "messages in the console": said,
            "requests to elsewhere": [url for url in asked if not url.startswith(("file:", "data:", "blob:"))],
        }
    finally:
        view.close()
    if any(wrong.values()):
        lines = [f"{what}: {one}" for what, found in wrong.items() for one in found]
        pytest.fail(f"{name}, {width}, {scheme}:\n" + "\n".join(lines), pytrace=False)


def violations(response: dict[str, Any]) -> list[str]:
    """Serious and critical breaches of axe-core's rules, each with the first elements that breach it."""
    found = []
    for rule in response["violations"]:
        nodes = [(" ".join(map(str, node["target"])), node["html"][:120]) for node in rule["nodes"]]
        places = [f"{where} {what}" for where, what in nodes if (rule["id"], where) not in EXCUSED]
        if rule["impact"] in ("serious", "critical") and places:
            found.append(f"{rule['id']} ({len(places)}): {rule['help']}: " + " | ".join(places[:4]))
    return found
