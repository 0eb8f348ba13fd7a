"""Truths about the repository itself: its layers, its versions, its records and its README."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pycnf"

# Each module or folder of pycnf and its floor. Imports go down or stay on a floor, never up.
FLOORS = {
    "convolution": 0,
    "fields": 0,
    "solution": 0,
    "tableau": 0,
    "dynamics": 0,
    "stepper": 0,
    "backprop": 0,
    "adjoint": 0,
    "wrapped": 0,
    "solve": 0,
    "records": 0,
    "julia_worker": 0,
    "convolution_tangents": 1,
    "products": 0,
    "tangents": 1,
    "divergence": 1,
    "native": 1,
    "compiled": 1,
    "joint": 2,
    "regularizers": 2,
    "flow": 3,
    "images": 3,
    "rows": 3,
    "workers": 3,
    "scale": 4,
    "objective": 3,
    "julia": 4,
    "reference": 4,
    "crosscheck": 5,
    "training": 4,
    "diagnostics": 5,
    "experiments": 5,
    "plots": 5,
    "plots_animation": 5,
    "plots_diagnostics": 5,
    "plots_flows": 5,
    "plots_fronts": 5,
    "plots_images": 5,
    "shipped": 5,
    "vae": 5,
    "plots_vae": 5,
    "cli": 6,
    "__main__": 7,
}
INDEPENDENT = {"data"}  # imported from anywhere, imports nothing of pycnf
LONGEST = 500  # lines

RECORD_KEYS = {"command", "versions", "device", "date"}
ARM_KEYS = {
    *(
        "data",
        "regularizer",
        "seed",
        "rtol",
        "atol",
        "nll",
        "nfe_train",
        "nfe_backward",
        "nfe_test",
        "seconds",
    ),
    *("device", "versions", "command"),
}
HEAVY = ("matplotlib", "lightning", "pandas", "pyarrow", "h5py", "pooch", "juliacall", "tensorboardX")


def module_files() -> dict[str, Path]:
    """Dotted name of every module of the package, and its file."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = module_files()


class Imports(ast.NodeVisitor):
    """Modules of the package that one module imports, at its top or inside functions."""

    def __init__(self, name: str, path: Path) -> None:
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.found: set[str] = set()
        self.visit(ast.parse(path.read_text(encoding="utf-8")))
        self.found.discard(name)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):  # for annotations only: nothing is imported
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names if alias.name in MODULES}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            if f"{base}.{alias.name}" in MODULES:
                self.found.add(f"{base}.{alias.name}")
            elif base in MODULES:
                self.found.add(base)


IMPORTS = {name: Imports(name, path).found for name, path in MODULES.items()}


def room(module: str) -> str:
    """First name below pycnf, or pycnf itself."""
    return module.split(".")[1] if "." in module else module


@pytest.mark.parametrize("name", MODULES)
def test_modules_stay_short(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{name} has {lines} lines, more than {LONGEST}: split it"


def test_imports_have_no_cycle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as err:
        pytest.fail("import cycle: " + " -> ".join(err.args[1]))


@pytest.mark.parametrize("name", [name for name in MODULES if "." in name])
def test_imports_go_down(name: str) -> None:
    own = room(name)
    assert own in FLOORS or own in INDEPENDENT, f"{name} has no floor: give it one in FLOORS"
    for imported in sorted(IMPORTS[name]):
        other = room(imported)
        if other == own:
            continue
        assert other != "pycnf" or own in ("cli", "__main__"), f"{name} imports the package itself: name the module"
        assert own not in INDEPENDENT, f"{name} stands alone, but imports {imported}"
        if other in FLOORS:
            assert FLOORS[other] <= FLOORS[own], f"{name} imports {imported}, which stands above it"


def test_import_is_light() -> None:
    code = f"import sys, pycnf; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [], "import pycnf imports these; import them where they are used"
    assert done.stderr == "", "import pycnf speaks"


def pyproject() -> dict[str, object]:
    """Project table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_versions_agree() -> None:
    version = pyproject()["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    entries = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert str(citation["version"]) == version
    assert entries[0] == version


def test_extras_that_others_rely_on_exist() -> None:
    assert {"dev", "book", "julia"} <= set(pyproject()["optional-dependencies"])


def records() -> list[Path]:
    """Every recorded result."""
    return sorted((ROOT / "results").rglob("*.json"))


@pytest.mark.parametrize("path", records(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_records_say_how_they_were_made(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for record in content if isinstance(content, list) else [content]:
        assert set(record) >= RECORD_KEYS, f"lacks {sorted(RECORD_KEYS - set(record))}"
        assert {"seed", "seeds"} & set(record), "lacks seed"
        for arm in record.get("arms", []):
            assert set(arm) >= ARM_KEYS, f"an arm lacks {sorted(ARM_KEYS - set(arm))}"


def test_every_page_of_the_book_is_in_its_contents() -> None:
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    listed = {contents["root"]}
    parts = [contents]
    while parts:
        part = parts.pop()
        listed |= {part["file"]} if "file" in part else set()
        parts += [child for key in ("parts", "chapters", "sections") for child in part.get(key, [])]
    pages = {path.relative_to(ROOT / "book").with_suffix("").as_posix() for path in (ROOT / "book").rglob("*.md")}
    assert {Path(name).with_suffix("").as_posix() if name.endswith(".md") else name for name in listed} == pages


def readme_blocks(language: str) -> list[str]:
    """Code blocks of the README in one language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_readme_python_compiles() -> None:
    blocks = readme_blocks("python")
    assert blocks, "the README shows no Python"
    for block in blocks:
        compile(block, "README.md", "exec")


def test_readme_tables_are_those_of_the_records() -> None:
    call = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_readme_python_runs(tmp_path: Path) -> None:
    code = "\n".join(readme_blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_readme_commands_exist() -> None:
    lines = [
        line.strip().removeprefix("$ ")
        for block in readme_blocks("(?:bash|console|shell|sh)")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines = [line.removeprefix(".venv/bin/") for line in lines]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("pycnf ")]
    assert commands, "the README shows no pycnf command"
    environment = os.environ | {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    for _, *arguments in commands:
        words = [word for word in arguments if not word.startswith("-")]
        names = words[: 2 if words[:1] in (["data"], ["bench"], ["experiment"]) else 1]
        call = [sys.executable, "-c", "from pycnf.cli import main; main()", *names, "--help"]
        done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, f"pycnf {' '.join(names)}: {done.stderr}"
        for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", done.stdout), f"pycnf {' '.join(names)} has no {option}"
