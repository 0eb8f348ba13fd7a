r"""The dynamics of a perceptron compiled for the processor at hand, by whatever C++ compiler is found.

One source, ``perceptron.cpp``, serves every perceptron: it is compiled once on a machine, kept in the user's cache, and
told the sizes of layers and batches as it is called. A batch goes through it in blocks of rows that stay in the
nearest caches, and the pullback evaluates a block again instead of keeping anything but the states.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pycnf.dynamics import StepPullback
from pycnf.tableau import Tableau
from pycnf.tangents import OnePass, Slopes, Tangents

SOURCE = Path(__file__).with_name("perceptron.cpp")
DEEPEST = 16  # hidden layers that the source takes
ACTIVATIONS = ("tanh", "softplus", "sigmoid", "silu", "sin")  # as it numbers them
FLAGS = ("-O2", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TARGETS = (("-march=native", "-fopenmp"), ("-march=native",), ())  # the first that the compiler takes


class _Problem(ctypes.Structure):
    """Describe a batch and a perceptron, as the source declares it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "features", "layers", "tangents", "by_row", "own")),
        *((name, ctypes.c_int64) for name in ("activation", "threads")),
        ("widths", ctypes.c_int64 * DEEPEST),
        *((name, ctypes.c_void_p) for name in ("shared", "transposed", "start", "end", "extra")),
    )


class _Stages(ctypes.Structure):
    """Describe a step of a Runge-Kutta method, as the source declares it."""

    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("t", "h")),
        *((name, ctypes.c_void_p) for name in ("c", "a")),
    )


def cache_folder() -> Path:
    """Return where compiled code is kept: in the user's cache, ``XDG_CACHE_HOME`` or else ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pycnf" / "compiled"


def find_compiler() -> str:
    """Return the C++ compiler: what ``CXX`` names, else the first of c++, g++ and clang++.

    Raises:
        OSError: When there is none.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise OSError(f"CXX names {named}, which is no program" if named else "there is no c++, g++ or clang++")


def build(folder: Path) -> Path:
    """Compile the source into a folder, or find it there as this compiler makes it for this processor.

    Raises:
        OSError: When there is no compiler, it fails, or the folder cannot be written.
    """
    compiler, complaint = find_compiler(), ""
    for target in TARGETS:
        macros = [compiler, *target[:1], "-dM", "-E", "-x", "c++", os.devnull]  # they name compiler and processor
        known = subprocess.run(macros, capture_output=True, check=False).stdout
        command = [compiler, *FLAGS, *target]
        key = hashlib.sha256(b"\0".join([known, SOURCE.read_bytes(), *(word.encode() for word in command)]))
        library = folder / f"perceptron-{key.hexdigest()[:16]}.so"
        if library.exists():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            done = subprocess.run([*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return made.replace(library)
        complaint = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[0]
    raise OSError(f"{compiler} does not compile {SOURCE.name}: {complaint}")


def load(*, quiet: bool = False) -> ctypes.CDLL | None:
    """Return the compiled code, None where it cannot be had: with one warning a process, or quietly."""
    code = _load()
    if isinstance(code, ctypes.CDLL):
        return code
    if not quiet:
        _warn(code)
    return None


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Compile and load the source once a process; what stood in the way where that fails."""
    try:
        code = ctypes.CDLL(str(build(cache_folder())))
    except (OSError, RuntimeError) as err:  # the latter where there is no home
        return str(err)
    for name, arguments in (("forward", 4), ("backward", 9), ("step", 5), ("pull_step", 10)):
        for dtype in ("float32", "float64"):
            door = getattr(code, f"{dtype}_{name}")
            door.argtypes, door.restype = [ctypes.c_void_p] * arguments, None
    return code


@functools.cache
def _warn(cause: str) -> None:
    message = f"{cause}: flows are evaluated without compiled code, slower and as exactly"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


class Native:
    """Evaluate the dynamics of one solve by the compiled code, and pull gradients back.

    The state y (B, C) is (z, log p), C = D + 1, or z alone; dy/dt is (v, -div v), or v.

    Args:
        bound: The perceptron on a CPU, in float32 or float64.
        density: Whether the state holds log p.
        code: What :func:`load` returns.

    Attributes:
        prepared: What ``backward`` gives gradients for; automatic differentiation goes on from there.
    """

    def __init__(self, bound: OnePass, code: ctypes.CDLL, *, density: bool = True) -> None:
        first, *hidden, last = bound.weights
        self._lanes = 64 // first.element_size()
        doors = (
            f"{first.dtype}_{name}".removeprefix("torch.") for name in ("forward", "backward", "step", "pull_step")
        )
        self._forward, self._backward, self._step, self._pull_step = (getattr(code, door) for door in doors)
        start, end, own = _tangents(bound) if density else (first[:0].t()[:0], last[:0], [])
        by_row, matrices = density and bound.probes is not None, [*hidden, *own]
        vectors = [part for vector in (bound.offset, bound.rate) for part in vector.split(bound.sizes)]
        parts = [*vectors, first.t(), last, *(() if by_row else (start, end)), *matrices]
        shared = torch.cat([self._pad(part).reshape(-1) for part in parts])
        self._by_row = (self._pad(start).contiguous(), self._pad(end).contiguous()) if by_row else ()
        self._extra = () if bound.extra is None else (self._pad(bound.extra).contiguous(),)
        self.prepared = (shared, *self._by_row, *self._extra)
        with torch.no_grad():
            flipped = [self._pad(matrix.t()).reshape(-1) for matrix in matrices]
            self._transposed = torch.cat(flipped) if flipped else shared[:0]
        self._problem = _Problem(
            *(len(bound.z), bound.features, 1 + len(hidden), len(start), by_row, bool(own)),
            *(ACTIVATIONS.index(bound.field.activation), torch.get_num_threads()),
            (ctypes.c_int64 * DEEPEST)(*bound.sizes[:-1]),
            *(shared.data_ptr(), self._transposed.data_ptr(), *self._pointers(self.prepared)),
        )
        self._address = ctypes.addressof(self._problem)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt (B, C) at scalar t and y (B, C)."""
        t, y = t.to(y.dtype), y.contiguous()
        out = torch.empty_like(y)
        self._forward(self._address, t.data_ptr(), y.data_ptr(), out.data_ptr())
        return out

    def backward(self, t: Tensor, y: Tensor, g: Tensor, grads: list[Tensor]) -> Tensor:
        """Return the gradient of y, given that of dy/dt, and add those of ``prepared`` to ``grads``."""
        t, y, g = t.to(y.dtype), y.contiguous(), g.contiguous()
        gy = torch.empty_like(y)
        pointers = (tensor.data_ptr() for tensor in (t, y, g, gy, grads[0]))
        self._backward(self._address, *pointers, *self._pointers(grads))
        return gy

    def step(
        self, t: float, h: float, y: Tensor, slope: Tensor, tableau: Tableau
    ) -> tuple[Tensor, Tensor, StepPullback]:
        """Take a step (:class:`~pycnf.dynamics.SteppingDynamics`)."""
        y, count = y.contiguous(), len(tableau.c) + 1
        slopes, last = y.new_empty(count, y.numel()), y.new_empty(y.numel())
        slopes[0] = slope.reshape(-1)
        stages = _Stages(count, t, h, tableau.c.ctypes.data, tableau.rows.ctypes.data)
        self._step(self._address, ctypes.addressof(stages), y.data_ptr(), slopes.data_ptr(), last.data_ptr())

        def pull(g: Tensor, glast: Tensor, grads: list[Tensor]) -> Tensor:
            gy = glast.clone()  # changes on the way from the last stage to y
            pointers = (tensor.data_ptr() for tensor in (y, slopes, g, gy, grads[0]))
            self._pull_step(self._address, ctypes.addressof(stages), *pointers, *self._pointers(grads))
            return gy

        return slopes, last, pull

    def _pad(self, x: Tensor) -> Tensor:
        """Fill rows up with zeros to whole vectors."""
        missing = -x.shape[-1] % self._lanes
        return F.pad(x, (0, missing)) if missing else x

    def _pointers(self, tensors: Sequence[Tensor]) -> list[int | None]:
        """Return the addresses of what differs by row: starts and ends of the tangents, and the context's share."""
        found: list[int | None] = [tensor.data_ptr() for tensor in tensors[1:]]
        return [*([] if self._by_row else [None, None]), *found, *([] if self._extra else [None])]


def _tangents(bound: OnePass) -> tuple[Tensor, Tensor, list[Tensor]]:
    r"""Return the tangents' starts and ends, and their matrices where these are not the layers'.

    - probes: W_1 e and W_{L+1}^T e, by row;
    - one hidden layer: tr J = s_1 . m, a tangent of ones that meets m;
    - two: tr J = s_2 . M s_1, a tangent of ones that passes through M and meets ones;
    - more: the D columns of W_1 that meet the rows of W_{L+1}.
    """
    first, *hidden, last = bound.weights
    if bound.probes is not None:
        start, end = Tangents().prepare(first, hidden, last, bound.probes)
        return start, end, []
    if len(hidden) > 1:
        return first.t(), last, []
    (form,) = Slopes().prepare(first, hidden, last)
    start, end = first.new_ones(1, len(first)), last.new_ones(1, last.shape[1])
    return (start, end, [form]) if hidden else (start, form.unsqueeze(0), [])


__all__ = ["Native", "build", "cache_folder", "load"]
