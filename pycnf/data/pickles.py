"""Read the numbers of a pickled pandas DataFrame without running what the pickle says.

`pickle.load` and `pandas.read_pickle` call whatever function a file names. The GAS set is published as such a
file, written by pandas of 2017, whose classes today's pandas no longer finds. The reader below calls nothing
but constructors of NumPy arrays; every pandas object becomes an inert record of its arguments, from which the
columns are then picked. A file that names anything else is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycnf.data.checks import DataError


class _Record:
    """Remember the arguments and the state a pickle gives to an object, and do nothing with them."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: object) -> _Record:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: object) -> None:
        self.state = state


def _from_buffer(buffer: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> NDArray[Any]:
    """Rebuild an array of pickle protocol 5."""
    return np.frombuffer(buffer, dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Rebuild the bytes that protocol 2 stores as text."""
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise pickle.UnpicklingError(f"it encodes bytes as {encoding!r}")
    return text.encode("latin1")


def _new_object(cls: type[_Record], *_: object) -> _Record:
    """Rebuild an object of protocol 0 or 1."""
    return cls()


_reconstruct: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    ("builtins", "slice"): slice,
    ("builtins", "object"): object,
    ("builtins", "bytearray"): bytearray,
    ("copyreg", "_reconstructor"): _new_object,
}
_ALLOWED |= {  # the same names in Python 2
    ({"builtins": "__builtin__", "copyreg": "copy_reg"}[module], name): value
    for (module, name), value in _ALLOWED.items()
    if module in ("builtins", "copyreg")
}
for _numpy in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_numpy}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_numpy}.numeric", "_frombuffer"] = _from_buffer


class SafeUnpickler(pickle.Unpickler):
    """Resolve the names of a pickle to NumPy's constructors and inert records only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "pandas" or module.startswith("pandas."):
            return type(name, (_Record,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table needs")


def read_frame_pickle(path: Path) -> dict[str, NDArray[np.float64]]:
    """Read the numeric columns of a pickled pandas DataFrame.

    Args:
        path: File written by `DataFrame.to_pickle` of pandas 0.18 or later, uncompressed.

    Returns:
        The columns by name, in the order of the frame, float64, shape (N,) each.

    Raises:
        DataError: If the file is damaged, names a class or a function that a table does not need, or holds
            something else than a DataFrame of numbers.
    """
    try:
        with path.open("rb") as file:
            frame = SafeUnpickler(file, encoding="latin1").load()
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err}") from err
    except Exception as err:  # a damaged pickle can raise anything
        raise DataError(f"{path}: not a pickled table, or damaged: {err or type(err).__name__}") from err
    try:
        return _columns(frame)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as err:
        raise DataError(f"{path}: a pickle, but not of a pandas DataFrame of numbers ({err})") from err


def _columns(frame: _Record) -> dict[str, NDArray[np.float64]]:
    """Pick the columns out of a recorded DataFrame."""
    state: Mapping[str, _Record] = frame.state
    manager = state["_mgr"] if "_mgr" in state else state["_data"]
    if manager.state is not None:  # pandas < 1.3: the fourth item is {"0.14.1": {"axes": ..., "blocks": ...}}
        layout = manager.state[3]["0.14.1"]
        axes = layout["axes"]
        blocks = [(block["values"], block["mgr_locs"]) for block in layout["blocks"]]
    else:  # later: BlockManager(blocks, axes), a block being made from (values, placement, dimensions)
        recorded, axes = manager.args
        blocks = [block.args[:2] for block in recorded]
    names = [str(name) for name in axes[0].args[1]["data"]]
    found: dict[int, NDArray[np.float64]] = {}
    for values, placement in blocks:
        positions = np.arange(len(names))[placement]
        found |= dict(zip(positions.tolist(), np.asarray(values, dtype=np.float64), strict=True))
    return {name: found[j] for j, name in enumerate(names)}
