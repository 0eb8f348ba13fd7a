"""Run Julia in a process of its own: NumPy and juliacall, never torch, which crashes beside Julia.

:mod:`pycnf.julia` starts this file by its path and talks to it through stdin and stdout. A message is a frame: a
mark of 8 bytes, two lengths (8 bytes each, big-endian), then that many bytes of JSON and of an .npz file of arrays. The
worker greets with its versions or with what is missing, then answers every request with one frame until stdin ends.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:  # NumPy starts threads, and the guard is forked before there are any
    from numpy.typing import NDArray

Message = dict[str, Any]
Arrays = dict[str, "NDArray[Any]"]
Handler = Callable[[Message, Arrays], tuple[Message, Arrays]]

HEAD = struct.Struct(">8sQQ")
MARK = b"pycnf-jl"
GRACE = 1.0  # seconds that a worker has to end by itself once its parent has gone


def write_frame(stream: BinaryIO, message: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> None:
    """Write one message with its arrays."""
    import numpy as np

    text, packed = json.dumps(message).encode("utf-8"), io.BytesIO()
    if arrays:
        np.savez(packed, **arrays)
    stream.write(HEAD.pack(MARK, len(text), packed.tell()) + text)
    stream.write(packed.getbuffer())
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[Message, Arrays] | None:
    """Read one message with its arrays; None when the stream has ended, even within a frame.

    Raises:
        ValueError: What comes is not a frame.
    """
    import numpy as np

    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    mark, n, m = HEAD.unpack(head)
    if mark != MARK:
        raise ValueError(f"expected a message, got {head!r}")
    text, packed = stream.read(n), stream.read(m)
    if len(text) < n or len(packed) < m:
        return None
    arrays: Arrays = {}
    if m:
        with np.load(io.BytesIO(packed), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    return json.loads(text), arrays


def open_channels() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for messages; whatever else is printed goes to stderr."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return requests, answers


def start_guard() -> None:
    """Let a small forked process kill this one when its parent is gone, even while Julia computes.

    The guard waits for the end of stdin, which the parent holds open, or of this process. Where there is no fork
    (Windows), a worker whose parent was killed ends after the computation it is in.
    """
    if not hasattr(os, "fork"):
        return
    worker = os.getpid()
    own_end, life_line = os.pipe()
    if os.fork():
        os.close(own_end)
        return  # the life line stays open for as long as this process lives
    try:
        for descriptor in (1, 2, life_line):
            os.close(descriptor)
        ends = select.poll()
        ends.register(0, 0)  # no events asked for: a hang-up is always told
        ends.register(own_end, 0)
        if all(descriptor == 0 for descriptor, _ in ends.poll()):
            ends.unregister(0)
            if not ends.poll(GRACE * 1000):
                alone = os.getpgrp() == worker  # then so is what Julia has started
                (os.killpg if alone else os.kill)(worker, signal.SIGKILL)
    finally:
        os._exit(0)


def serve(start: Callable[[], tuple[Message, Handler | None]]) -> None:
    """Greet, then answer requests until stdin ends.

    Args:
        start: Returns the greeting and what handles a request, None where nothing can be handled.
    """
    requests, answers = open_channels()
    start_guard()
    greeting, handle = start()
    write_frame(answers, greeting)
    while handle is not None and (request := read_frame(requests)) is not None:
        try:
            message, arrays = handle(*request)
        except Exception as err:  # whatever goes wrong is the caller's to see
            said = str(err).split("\nStacktrace")[0].strip()
            message, arrays = {"error": said or type(err).__name__}, {}
        write_frame(answers, message, arrays)


def start_julia() -> tuple[Message, Handler | None]:
    """Start Julia and load the module PyCNFReference from the path given as the first argument."""
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:  # juliapkg looks for pycnf/juliapkg.json below every entry
        sys.path.append(root)
    try:
        import juliacall
    except ModuleNotFoundError as err:
        return {"missing": "juliacall", "cause": str(err)}, None
    except Exception as err:  # juliapkg and juliacall raise plain exceptions
        return {"missing": "Julia", "cause": str(err)}, None
    try:
        juliacall.Base.include(juliacall.Main, sys.argv[1])
        module = juliacall.Main.PyCNFReference
    except Exception as err:
        return {"missing": "packages", "cause": str(err)}, None
    versions = {"julia": str(juliacall.Base.VERSION), "juliacall": juliacall.__version__}
    return {"versions": versions}, lambda message, arrays: answer(module, message, arrays)


def answer(module: Any, message: Message, arrays: Arrays) -> tuple[Message, Arrays]:
    """Carry out one request with the Julia module."""
    import numpy as np

    field = (arrays["parameters"], arrays["sizes"], message["activation"], message["time"], arrays["inputs"])
    control = (message["method"], message["rtol"], message["atol"])
    if message["command"] == "solve":
        ends = (message["exact"], message["reverse"])
        done = module.solve_arrays(*field, message["T"], arrays["times"], *control, *ends)
        counts = {name: int(getattr(done, name)) for name in ("nf", "naccept", "nreject")}
        names = ("ts", "z", "logp", "steps")
    elif message["command"] == "local_errors":
        done = module.local_error_arrays(*field, message["T"], *control)
        counts, names = {}, ("t", "h", "z", "logp")
    else:
        raise ValueError(f"unknown command {message['command']!r}")
    # Julia's last index is Python's first
    return counts, {name: np.array(getattr(done, name), dtype=np.float64).T for name in names}


if __name__ == "__main__":
    serve(start_julia)
