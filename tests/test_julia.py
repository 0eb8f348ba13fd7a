"""Truths about everything around Julia, none of which needs Julia: the bridge, its errors, packaging, the sources.

The conversations are held with a stand-in process that speaks the protocol through the shipped code of the worker, and
does no mathematics.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pycnf import julia, julia_worker
from pycnf.julia import JuliaError, JuliaUnavailable, JuliaWorker

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "julia" / "PyCNFReference"
SOURCES = sorted(PACKAGE.rglob("*.jl"))
posix = pytest.mark.skipif(os.name != "posix", reason="processes and signals of POSIX")

STAND_IN = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import julia_worker

def handle(message, arrays):
    command = message["command"]
    if command == "echo":
        return message, arrays
    if command == "who":
        return {{"pid": os.getpid(), "offline": os.environ["PYTHON_JULIAPKG_OFFLINE"]}}, {{}}
    if command == "sleep":
        time.sleep(60)
    if command == "print":
        print("said on stdout", flush=True)
        os.write(1, b"written to stdout\\n")
        return {{}}, {{}}
    if command == "fail":
        raise ValueError("Vern9 ended at t = 0.25 with MaxIters\\nStacktrace:\\n [1] somewhere")
    if command == "crash":
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if command == "exit":
        os._exit(3)
    raise ValueError("unknown command " + command)

julia_worker.serve(lambda: ({greeting!r}, handle))
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            return stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def group(leader: int) -> list[int]:
    """Processes of a group that run (where /proc tells)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether a condition becomes true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def stand_in(folder: Path, greeting: dict[str, object] | None = None) -> list[str]:
    """Command of a stand-in process."""
    script = folder / "stand_in.py"
    values = {"folder": str(Path(julia_worker.__file__).parent), "greeting": greeting or {"versions": {"none": "0"}}}
    script.write_text(STAND_IN.format(**values), encoding="utf-8")
    return [sys.executable, "-P", str(script)]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[JuliaWorker]:
    found = JuliaWorker(command=stand_in(tmp_path))
    yield found
    found.close()


# --- protocol ------------------------------------------------------------------------------------


def test_frames_keep_numbers_types_and_shapes() -> None:
    arrays = {
        "matrix": np.random.default_rng(0).standard_normal((3, 4)),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "sizes": np.array([2, 64, 2]),
        "empty": np.zeros(0),
        "special": np.array([np.nan, np.inf, -0.0, 5e-324]),
    }
    stream = io.BytesIO()
    julia_worker.write_frame(stream, {"T": 0.1, "method": "Vern9", "exact": True}, arrays)
    julia_worker.write_frame(stream, {})
    stream.seek(0)
    first, second = julia_worker.read_frame(stream), julia_worker.read_frame(stream)
    assert first is not None
    assert first[0] == {"T": 0.1, "method": "Vern9", "exact": True}
    assert set(first[1]) == set(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(first[1][name], value)
        assert first[1][name].dtype == value.dtype
    assert second == ({}, {})
    assert julia_worker.read_frame(stream) is None


def test_a_frame_cut_short_is_an_end() -> None:
    stream = io.BytesIO()
    julia_worker.write_frame(stream, {"a": 1}, {"x": np.ones(100)})
    whole = stream.getvalue()
    for length in (0, 5, 24, 30, len(whole) - 1):
        assert julia_worker.read_frame(io.BytesIO(whole[:length])) is None


def test_frames_hold_no_pickles() -> None:
    stream = io.BytesIO()
    julia_worker.write_frame(stream, {}, {"x": np.array([{"a": 1}], dtype=object)})
    stream.seek(0)
    with pytest.raises(ValueError, match="pickle"):
        julia_worker.read_frame(stream)


# --- conversations -------------------------------------------------------------------------------


def test_the_process_stays_between_calls_and_is_offline(worker: JuliaWorker) -> None:
    assert not worker.running
    first, _ = worker.call({"command": "who"})
    x = np.random.default_rng(1).standard_normal((50, 7))
    message, arrays = worker.call({"command": "echo", "note": "α"}, {"x": x})
    assert message["note"] == "α"
    np.testing.assert_array_equal(arrays["x"], x)
    second, _ = worker.call({"command": "who"})
    assert first == second
    assert first["pid"] != os.getpid()
    assert first["offline"] == "yes"
    assert worker.versions == {"none": "0"}


def test_large_arrays_pass(worker: JuliaWorker) -> None:
    x = np.arange(400_000.0)
    _, arrays = worker.call({"command": "echo"}, {"x": x})
    np.testing.assert_array_equal(arrays["x"], x)


def test_downloads_are_allowed_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_JULIAPKG_OFFLINE", "no")
    for install, offline in ((False, "yes"), (True, "no")):
        found = JuliaWorker(install=install, command=stand_in(tmp_path))
        assert found.call({"command": "who"})[0]["offline"] == offline
        found.close()


def test_an_error_in_the_call_leaves_the_process(worker: JuliaWorker) -> None:
    pid = worker.call({"command": "who"})[0]["pid"]
    with pytest.raises(JuliaError, match=r"Vern9 ended at t = 0\.25 with MaxIters$") as caught:
        worker.call({"command": "fail"})
    assert caught.value.answered
    assert worker.call({"command": "who"})[0]["pid"] == pid


def test_what_is_printed_goes_to_stderr(worker: JuliaWorker, capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.call({"command": "print"}) == ({}, {})
    worker.close()
    said = ""

    def complete() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "said on stdout" in said and "written to stdout" in said

    assert eventually(complete)


@posix
def test_a_time_out_stops_the_process_and_the_next_call_has_another(worker: JuliaWorker) -> None:
    pid = worker.call({"command": "who"})[0]["pid"]
    with pytest.raises(JuliaError, match=r"did not answer within 0\.2 seconds and was stopped") as caught:
        worker.call({"command": "sleep"}, timeout=0.2)
    assert not caught.value.answered
    assert not worker.running
    assert eventually(lambda: not alive(pid))
    assert worker.call({"command": "who"})[0]["pid"] != pid


@posix
@pytest.mark.parametrize(("command", "how"), [("crash", "by signal 11"), ("exit", "with status 3")])
def test_a_crash_is_told_with_the_last_words(worker: JuliaWorker, command: str, how: str) -> None:
    with pytest.raises(JuliaError, match=f"the Julia process ended {how}") as caught:
        worker.call({"command": command})
    assert ("the last words" in str(caught.value)) == (command == "crash")
    assert worker.call({"command": "echo"})[0] == {"command": "echo"}


def test_a_process_that_went_away_between_calls_is_started_again(worker: JuliaWorker) -> None:
    pid = worker.call({"command": "who"})[0]["pid"]
    worker.cancel()
    assert eventually(lambda: not worker.running)
    assert worker.call({"command": "who"})[0]["pid"] != pid


@posix
def test_another_thread_cancels_a_call(worker: JuliaWorker) -> None:
    worker.start()
    timer = threading.Timer(0.2, worker.cancel)
    timer.start()
    with pytest.raises(JuliaError, match="ended by signal 9"):
        worker.call({"command": "sleep"})
    timer.join()
    assert not worker.running


@posix
def test_an_interrupt_stops_the_process(worker: JuliaWorker) -> None:
    pid = worker.call({"command": "who"})[0]["pid"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            worker.call({"command": "sleep"})
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert not worker.running
    assert eventually(lambda: not alive(pid))


def test_a_start_that_takes_too_long(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text("import time\ntime.sleep(60)\n", encoding="utf-8")
    slow = JuliaWorker(command=[sys.executable, str(script)], start_timeout=0.3)
    with pytest.raises(JuliaError, match=r"did not start within 0\.3 seconds"):
        slow.start()
    assert not slow.running


def test_a_start_that_fails(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('no luck today')\n", encoding="utf-8")
    with pytest.raises(JuliaError, match=r"ended with status 1; its last lines:\n  no luck today"):
        JuliaWorker(command=[sys.executable, str(script)]).start()


def test_something_that_is_no_message_ends_the_conversation(tmp_path: Path) -> None:
    script = tmp_path / "noise.py"
    script.write_text("print('{' * 400, flush=True)\nimport time\ntime.sleep(60)\n", encoding="utf-8")
    noise = JuliaWorker(command=[sys.executable, str(script)], start_timeout=30)
    with pytest.raises(JuliaError, match="was stopped: expected a message"):
        noise.start()
    assert not noise.running


PARENT = """
import os, sys, time
from pycnf.julia import JuliaWorker
worker = JuliaWorker(command={command!r})
print(worker.call({{"command": "who"}})[0]["pid"], flush=True)
{then}
"""


@posix
@pytest.mark.parametrize("end", ["killed while it waits for an answer", "killed between calls", "exits by itself"])
def test_no_process_is_left_behind(tmp_path: Path, end: str) -> None:
    then = {
        "killed while it waits for an answer": 'worker.call({"command": "sleep"})',
        "killed between calls": "time.sleep(60)",
        "exits by itself": "",
    }[end]
    code = PARENT.format(command=stand_in(tmp_path), then=then)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if end != "exits by itself":
        time.sleep(0.2)
        assert alive(pid)
        parent.kill()
    parent.wait(20)
    parent.stdout.close()
    assert eventually(lambda: not alive(pid))
    assert eventually(lambda: not group(pid)), "the guard or something that the worker started is left"


def test_closing_leaves_nothing(worker: JuliaWorker) -> None:
    pid = worker.call({"command": "who"})[0]["pid"]
    worker.close()
    worker.close()
    assert not worker.running
    assert eventually(lambda: not alive(pid) and not group(pid))


def test_there_is_one_shared_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(julia, "_shared", None)
    first = julia.shared_worker()
    assert julia.shared_worker(install=True) is first
    assert first.install
    assert not first.running


# --- what is missing -----------------------------------------------------------------------------


def start_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str) -> JuliaUnavailable:
    """Start the shipped worker where importing juliacall ends in a statement."""
    (tmp_path / "juliacall.py").write_text(statement + "\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(JuliaUnavailable) as caught:
        JuliaWorker().start()
    return caught.value


def test_without_juliacall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = start_without(tmp_path, monkeypatch, "raise ModuleNotFoundError(\"No module named 'juliacall'\")")
    assert error.command == "pip install 'pycnf[julia]'"
    assert str(error) == (
        "Julia cannot be used: looked for the Python package juliacall (No module named 'juliacall'). "
        "What helps: pip install 'pycnf[julia]'"
    )


def test_without_julia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON_JULIACALL_PROJECT", raising=False)
    error = start_without(tmp_path, monkeypatch, "raise Exception('could not find Julia 1.10.3 - 1.11')")
    assert error.command == "pycnf julia --install"
    assert "looked for Julia 1.10 or newer (could not find Julia 1.10.3 - 1.11)" in str(error)


def test_without_packages_in_a_project_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_JULIACALL_PROJECT", "/my/project")
    error = start_without(tmp_path, monkeypatch, "raise Exception('PythonCall.jl did not start properly')")
    assert error.command.startswith('julia --project=/my/project -e \'import Pkg; Pkg.add(["PythonCall", ')
    assert all(f'"{name}"' in error.command for name in julia.julia_packages())


@pytest.mark.parametrize(("missing", "command"), [("packages", "--install"), ("juliacall", "pip install")])
def test_what_the_greeting_says_is_missing(tmp_path: Path, missing: str, command: str) -> None:
    greeting = {"missing": missing, "cause": "Package X not found\nStacktrace:\n [1] here"}
    incomplete = JuliaWorker(command=stand_in(tmp_path, greeting))
    with pytest.raises(JuliaUnavailable, match=r"\(Package X not found\)") as caught:
        incomplete.start()
    assert command in caught.value.command
    assert not incomplete.running


def test_the_command_that_helps_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycnf.cli import app

    (tmp_path / "juliacall.py").write_text("raise Exception('could not find Julia')\n", encoding="utf-8")
    monkeypatch.delenv("PYTHON_JULIACALL_PROJECT", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["julia"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.endswith("What helps: pycnf julia --install\n")
    shown = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["julia", "--help"])
    assert "--install" in shown.stdout


def test_the_worker_needs_numpy_and_juliacall_only() -> None:
    tree = ast.parse(Path(julia_worker.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "juliacall"}


# --- packaging -----------------------------------------------------------------------------------


def project() -> dict[str, dict[str, str]]:
    return tomllib.loads((PACKAGE / "Project.toml").read_text(encoding="utf-8"))


def shipped() -> dict[str, str]:
    """Where the wheel takes the Julia code from, and where it puts it."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    table: dict[str, str] = content["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    return table


def test_juliapkg_lists_what_the_julia_package_needs() -> None:
    listed = json.loads((ROOT / "pycnf" / "juliapkg.json").read_text(encoding="utf-8"))
    wanted = project()
    assert {name: entry["uuid"] for name, entry in listed["packages"].items()} == wanted["deps"]
    versions = {name: entry["version"] for name, entry in listed["packages"].items()}
    assert versions | {"julia": listed["julia"]} == wanted["compat"]
    assert all(set(entry) == {"uuid", "version"} for entry in listed["packages"].values()), "registered packages only"


def test_the_julia_package_uses_what_it_lists() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "src").glob("*.jl"))
    statements = re.findall(
        r"^\s*(?:using|import) (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    used = {name.split(":")[0].strip() for statement in statements for name in statement.split(",")}
    assert used - {"DifferentialEquations"} == set(project()["deps"])
    assert set(re.findall(r'include\("(\w+\.jl)"\)', text)) == {
        path.name for path in (PACKAGE / "src").glob("*.jl") if path.stem != "PyCNFReference"
    }


def test_names_of_methods_are_the_same() -> None:
    text = (PACKAGE / "src" / "solving.jl").read_text(encoding="utf-8")
    found = re.search(r"^const METHODS = \((.*)\)$", text, re.MULTILINE)
    assert found is not None
    assert tuple(re.findall(r'"(\w+)"', found[1])) == tuple(julia.JULIA_METHODS)


def test_calls_match_the_signatures() -> None:
    text = (PACKAGE / "src" / "bridge.jl").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", text)
    for name, count in (("solve_arrays", 12), ("local_error_arrays", 9)):
        found = re.search(rf"function {name}\((.*?)\)", text)
        assert found is not None
        assert len([word for word in found[1].split(",") if word.strip()]) == count
    field = ast.parse(Path(julia_worker.__file__).read_text(encoding="utf-8"))
    source = ast.unparse(field)
    assert "module.solve_arrays(*field, message['T'], arrays['times'], *control, *ends)" in source  # 5 + 1 + 1 + 3 + 2
    assert "module.local_error_arrays(*field, message['T'], *control)" in source  # 5 + 1 + 3


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file byte by byte, as ``read_safetensors`` of the Julia package does."""
    types = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            values = np.frombuffer(content[8 + n + start : 8 + n + end], types[entry["dtype"]])
            found[name] = values.reshape(entry["shape"])
    return found


@pytest.mark.parametrize("conditioning", ["none", "concat", "concatsquash"])
def test_run_folders_are_as_the_julia_package_reads_them(tmp_path: Path, conditioning: Any) -> None:
    from pycnf import CNF, save_flow

    text = (PACKAGE / "src" / "runs.jl").read_text(encoding="utf-8")
    flow = CNF(2, (5, 4), blocks=2, activation="softplus", time=conditioning, T=0.5)
    save_flow(flow, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["flow"]
    wanted = set(re.findall(r'config\["(\w+)"\]', text)) - {"flow"}
    assert wanted == {"hidden", "blocks", "activation", "T"}
    assert [config[name] for name in sorted(wanted)] == [0.5, "softplus", 2, [5, 4]]
    assert "field" not in config, "it tells of a field of the user's own"
    tensors = read_tensors(tmp_path / "model.safetensors")
    optional = {"none": [], "concat": ["time_weight"], "concatsquash": ["gate_weight", "gate_bias", "shift_weight"]}
    vectors = re.search(r"names = \((.*)\)", text)
    assert vectors is not None
    known = re.findall(r'"(\w+)"', vectors[1])
    assert [name for name in known if f"fields.0.layers.0.{name}" in tensors] == optional[conditioning]
    for block, layer in ((b, i) for b in range(2) for i in range(3)):
        source = flow.fields[block].layers[layer]  # type: ignore[union-attr, index]
        for name in ("weight", "bias", *optional[conditioning]):
            np.testing.assert_array_equal(
                tensors.pop(f"fields.{block}.layers.{layer}.{name}"), getattr(source, name).detach()
            )
    assert not tensors, "Julia would miss some of the weights"


def test_the_source_is_found_in_the_source_tree() -> None:
    assert julia.julia_source() == PACKAGE / "src" / "PyCNFReference.jl"


def test_an_installed_package_finds_the_julia_code(tmp_path: Path) -> None:
    installed = tmp_path / "site"
    (installed / "pycnf").mkdir(parents=True)
    for name in ("julia.py", "julia_worker.py", "juliapkg.json"):
        shutil.copy(ROOT / "pycnf" / name, installed / "pycnf" / name)
    (installed / "pycnf" / "__init__.py").touch()
    for source, target in shipped().items():
        assert (ROOT / source).exists(), f"the wheel asks for {source}"
        (installed / target).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, installed / target)
    code = "import pycnf.julia as j; print(j.__file__); print(j.julia_source())"
    call = [sys.executable, "-P", "-c", code]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    module, source = done.stdout.split()
    assert Path(module) == installed / "pycnf" / "julia.py"
    assert Path(source) == installed / "pycnf" / "_julia" / "PyCNFReference" / "src" / "PyCNFReference.jl"
    shutil.rmtree(installed / "pycnf" / "_julia")
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert "this installation is incomplete" in done.stderr


def test_a_wheel_holds_the_julia_code(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    from zipfile import ZipFile

    (path,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(ZipFile(path).namelist())
    folder = "pycnf/_julia/PyCNFReference/"
    wanted = {f"{folder}src/{source.name}" for source in (PACKAGE / "src").glob("*.jl")}
    assert names >= wanted | {f"{folder}Project.toml", "pycnf/juliapkg.json", "pycnf/julia_worker.py"}


def test_the_source_distribution_holds_the_julia_folder() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "/julia" in content["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


# --- sources -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fatou() -> str:
    found = shutil.which("fatou", path=sysconfig.get_path("scripts")) or shutil.which("fatou")
    if found is None:
        pytest.skip("fatou is not installed")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_julia_sources_parse_and_are_clean(fatou: str, path: Path) -> None:
    for arguments in (["parse", "--verify", "--quiet"], ["lint"], ["format", "--check", "--safe"]):
        done = subprocess.run([fatou, *arguments, str(path)], capture_output=True, text=True, check=False, cwd=PACKAGE)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_linter_sees_a_mistake(fatou: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jl"
    broken.write_text("function f(x\n    x +\nend\n", encoding="utf-8")
    assert subprocess.run([fatou, "lint", str(broken)], capture_output=True, check=False).returncode != 0


def test_exported_julia_names_are_described() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "src").glob("*.jl"))
    exported = {name.strip() for line in re.findall(r"^export (.+)$", text, re.MULTILINE) for name in line.split(",")}
    described = set(re.findall(r'^"""\n    (\w+)', text, re.MULTILINE))
    assert exported <= described


def test_a_workflow_runs_the_marked_tests() -> None:
    text = (ROOT / ".github" / "workflows" / "julia.yml").read_text(encoding="utf-8")
    assert 'PYCNF_REQUIRE_JULIA: "1"' in text
    assert "-m julia" in text
    assert '"1.10"' in text
