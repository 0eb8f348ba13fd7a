"""The bridge to Julia: a worker process, what is asked of it, and the error that says why it cannot be had.

Julia runs in a child process (:mod:`pycnf.julia_worker`), because torch and Julia in one process crash. It gets data,
never Python callables, and evaluates fields with its own code, the Julia package PyCNFReference. It is started once
and then waits for the next call; it ends with this process.

``pycnf julia`` says whether Julia can be had, ``pycnf julia --install`` downloads what is missing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from pycnf.julia_worker import Arrays, Message, read_frame, write_frame

PACKAGE = "PyCNFReference"
START_TIMEOUT = 600.0  # seconds; the first start after an installation compiles
JULIA_METHODS = {"Tsit5": 5, "DP5": 5, "Vern7": 7, "Vern9": 9, "VCABM": 0, "Rodas5P": 5}
"""Methods of the Julia package and their orders, 0 where it varies."""


class JuliaUnavailable(ImportError):
    """Report that Julia or one of its packages is not there: what was looked for, and the command that helps.

    Attributes:
        command: The command that helps.
    """

    def __init__(self, sought: str, cause: str, command: str) -> None:
        self.command = command
        super().__init__(f"Julia cannot be used: looked for {sought} ({cause}). What helps: {command}")


class JuliaError(ChildProcessError):
    """Report a call that Julia did not carry out.

    Attributes:
        answered: Whether Julia itself reported the error; otherwise it crashed, was too slow or was stopped.
    """

    def __init__(self, message: str, *, answered: bool = False) -> None:
        super().__init__(message)
        self.answered = answered


def julia_source() -> Path:
    """Return the file to include for the Julia module: from the source tree where there is one, else as installed.

    Raises:
        JuliaUnavailable: The Julia code is in neither place.
    """
    here = Path(__file__).resolve().parent
    places = (here.parent / "julia", here / "_julia")
    for place in places:
        file = place / PACKAGE / "src" / f"{PACKAGE}.jl"
        if file.is_file():
            return file
    sought = f"{PACKAGE}.jl below {places[0]} and {places[1]}"
    raise JuliaUnavailable(sought, "this installation is incomplete", "pip install --force-reinstall 'pycnf[julia]'")


class JuliaWorker:
    """Hold one Julia process, started at the first call and again after it was stopped.

    Args:
        install: Whether missing parts (Julia, its packages) may be downloaded; offline otherwise.
        start_timeout: Seconds that starting may take.
        command: Program and arguments in place of those that start Julia.

    Attributes:
        versions: Versions of Julia and juliacall, once started.
    """

    def __init__(
        self, *, install: bool = False, start_timeout: float = START_TIMEOUT, command: Sequence[str] | None = None
    ) -> None:
        self.install, self.start_timeout, self._command = install, start_timeout, command
        self.versions: dict[str, str] = {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._last_words: deque[str] = deque(maxlen=20)
        self._frames: queue.SimpleQueue[tuple[Message, Arrays] | None] = queue.SimpleQueue()
        self._listener = threading.Thread()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start Julia, if it is not running.

        Raises:
            JuliaUnavailable: Julia, a package or juliacall is missing.
            JuliaError: It crashed or took too long.
        """
        with self._lock:
            self._start()

    def call(
        self, message: Mapping[str, Any], arrays: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> tuple[Message, Arrays]:
        """Send one request and wait for the answer.

        An interrupt (Ctrl-C) or a time-out stops the process, since Julia cannot be interrupted within a solve; the
        next call starts another.

        Args:
            message: What to do, ready for JSON.
            arrays: Its arrays.
            timeout: Seconds to wait; None for no limit.

        Raises:
            JuliaUnavailable: Julia, a package or juliacall is missing.
            JuliaError: Julia reported an error, crashed, took too long or was stopped.
        """
        with self._lock:
            process = self._start()
            try:
                write_frame(cast(BinaryIO, process.stdin), message, arrays)
            except OSError as err:
                raise self._crashed() from err
            found, values = self._receive(timeout, "answer")
        if "error" in found:
            raise JuliaError(f"Julia reports: {found['error']}", answered=True)
        return found, values

    def cancel(self) -> None:
        """Stop the process at once; a call that waits in another thread raises :class:`JuliaError`."""
        if self._process is not None and self._owner == os.getpid():
            _kill(self._process)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        try:
            if process.stdin is not None:
                process.stdin.close()  # a worker that waits ends by itself
            process.wait(2.0)
        except (OSError, subprocess.TimeoutExpired):
            _kill(process)
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._process
            self.close()
        worker = Path(__file__).with_name("julia_worker.py")
        command = self._command or (sys.executable, "-P", str(worker), str(julia_source()))
        offline = {"PYTHON_JULIAPKG_OFFLINE": "no" if self.install else "yes"}
        self._frames = queue.SimpleQueue()
        self._last_words.clear()
        self._owner = os.getpid()
        process = self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | offline,
            start_new_session=True,  # Ctrl-C reaches this process, which decides
        )
        threading.Thread(target=_pass_frames, args=(process.stdout, self._frames), daemon=True).start()
        self._listener = threading.Thread(target=_pass_lines, args=(process.stderr, self._last_words), daemon=True)
        self._listener.start()
        greeting, _ = self._receive(self.start_timeout, "start")
        if "missing" in greeting:
            self._stop()
            raise _unavailable(greeting["missing"], greeting["cause"])
        self.versions = greeting["versions"]
        return process

    def _receive(self, timeout: float | None, what: str) -> tuple[Message, Arrays]:
        try:
            frame = self._frames.get(timeout=timeout)
        except queue.Empty:
            self._stop()
            raise JuliaError(f"Julia did not {what} within {timeout:g} seconds and was stopped") from None
        except BaseException:
            self._stop()
            raise
        if frame is None:
            raise self._crashed()
        if "broken" in frame[0]:
            self._stop()
            raise JuliaError(f"the Julia process was stopped: {frame[0]['broken']}")
        return frame

    def _stop(self) -> None:
        if self._process is not None:
            _kill(self._process)
        self.close()

    def _crashed(self) -> JuliaError:
        process, status = self._process, None
        if process is not None:
            self.close()
            status = process.returncode
            self._listener.join(1.0)
        how = f"by signal {-status}" if status is not None and status < 0 else f"with status {status}"
        said = "".join(f"\n  {line}" for line in self._last_words)
        return JuliaError(f"the Julia process ended {how}" + (f"; its last lines:{said}" if said else ""))


_shared: JuliaWorker | None = None
_shared_lock = threading.Lock()


def shared_worker(*, install: bool = False) -> JuliaWorker:
    """Return the Julia process of this Python process, which is ended with it.

    Args:
        install: Whether missing parts may be downloaded when it starts.
    """
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = JuliaWorker(install=install)
            atexit.register(_shared.close)
        elif install:
            _shared.install = True
        return _shared


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and what it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _pass_frames(stream: BinaryIO, sink: queue.SimpleQueue[tuple[Message, Arrays] | None]) -> None:
    """Pass the messages of a stream to a queue, and None at its end."""
    try:
        while (frame := read_frame(stream)) is not None:
            sink.put(frame)
    except (OSError, ValueError) as err:
        sink.put(({"broken": str(err)}, {}))
    sink.put(None)
    stream.close()


def _pass_lines(stream: BinaryIO, last: deque[str]) -> None:
    """Pass what the process prints to stderr, and remember the last lines."""
    for line in stream:
        text = line.decode("utf-8", "replace")
        last.append(text.rstrip())
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
    stream.close()


def _unavailable(missing: str, cause: str) -> JuliaUnavailable:
    cause = " ".join(cause.split("Stacktrace")[0].split())
    cause = cause if len(cause) <= 300 else f"{cause[:300]} ..."
    project = os.environ.get("PYTHON_JULIACALL_PROJECT")
    if missing == "juliacall":
        sought, command = "the Python package juliacall", "pip install 'pycnf[julia]'"
    elif project is not None:
        sought = f"Julia and the packages of {PACKAGE} in the project {project} that PYTHON_JULIACALL_PROJECT names"
        names = ", ".join(f'"{name}"' for name in julia_packages())
        command = f"julia --project={project} -e 'import Pkg; Pkg.add([\"PythonCall\", {names}])'"
    else:
        sought = "Julia 1.10 or newer" if missing == "Julia" else f"the Julia packages of {PACKAGE}"
        command = "pycnf julia --install"
    return JuliaUnavailable(sought, cause, command)


def julia_packages() -> tuple[str, ...]:
    """Return the names of the Julia packages that are needed, as ``juliapkg.json`` lists them."""
    content = json.loads(Path(__file__).with_name("juliapkg.json").read_text(encoding="utf-8"))
    return tuple(content["packages"])


__all__ = [
    "JULIA_METHODS",
    "JuliaError",
    "JuliaUnavailable",
    "JuliaWorker",
    "julia_packages",
    "julia_source",
    "shared_worker",
]
