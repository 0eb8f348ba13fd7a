"""The reader of pickled tables: old and new ones, and hostile ones."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from pycnf.data import DataError
from pycnf.data.pickles import read_frame_pickle

pd = pytest.importorskip("pandas")


def frame() -> pd.DataFrame:
    x = np.random.default_rng(0).standard_normal((7, 3))
    return pd.DataFrame(x, columns=pd.Index(["a", "b", "c"], dtype=object)).assign(n=np.arange(7))


@pytest.mark.parametrize("protocol", range(6))
def test_reads_what_pandas_writes(protocol: int, tmp_path: Path) -> None:
    original = frame()
    original.columns = pd.Index(["a", "b", "c", "n"], dtype=object)
    path = tmp_path / "frame.pickle"
    original.to_pickle(path, protocol=protocol)
    columns = read_frame_pickle(path)
    assert list(columns) == ["a", "b", "c", "n"]
    for name, values in columns.items():
        np.testing.assert_array_equal(values, original[name])


class Name:
    """A global name in a pickle."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Text:
    """A string of Python 2."""

    def __init__(self, text: bytes) -> None:
        self.text = text


class Made:
    """An object made by calling a name, or by `__new__`, and then given a state."""

    def __init__(self, call: Name, args: tuple[Any, ...], state: Any = None, *, new: bool = False) -> None:
        self.call, self.args, self.state, self.new = call, args, state, new


class OldPickler(pickle._Pickler):  # type: ignore[name-defined]
    """Write what pandas 0.20 on Python 2 wrote, without having either."""

    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_name(self, name: Name) -> None:
        self.write(pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode())

    def save_text(self, text: Text) -> None:
        self.write(pickle.BINSTRING + len(text.text).to_bytes(4, "little") + text.text)

    def save_made(self, made: Made) -> None:
        self.save(made.call)
        self.save(made.args)
        self.write(pickle.NEWOBJ if made.new else pickle.REDUCE)
        self.memoize(made)
        if made.state is not None:
            self.save(made.state)
            self.write(pickle.BUILD)

    dispatch[Name], dispatch[Text], dispatch[Made] = save_name, save_text, save_made


def old_array(x: np.ndarray) -> Made:
    kind = b"O8" if x.dtype == object else x.dtype.str[1:].encode()
    order, flags = (b"|", 63) if x.dtype == object else (b"<", 0)
    made = Made(Name("numpy", "dtype"), (Text(kind), 0, 1), (3, Text(order), None, None, None, -1, -1, flags))
    values = [Text(name.encode()) for name in x] if x.dtype == object else Text(x.tobytes())
    empty = (Name("numpy", "ndarray"), (0,), Text(b"b"))
    state = (1, x.shape, made, False, values)
    return Made(Name("numpy.core.multiarray", "_reconstruct"), empty, state)


def old_pickle(path: Path, x: np.ndarray, names: list[str]) -> None:
    """Write a frame whose first column is in a block of its own, as pandas 0.20 stored it."""
    index = Name("pandas.core.indexes.base", "_new_Index")
    columns = old_array(np.array(names, dtype=object))
    axes = [
        Made(index, (Name("pandas.core.indexes.base", "Index"), {"data": columns, "name": None})),
        Made(
            index,
            (
                Name("pandas.core.indexes.range", "RangeIndex"),
                {"start": 0, "stop": len(x), "step": 1, "name": None},
            ),
        ),
    ]
    locations = Made(Name("__builtin__", "slice"), (1, len(names), 1))
    blocks = [
        {"values": old_array(np.ascontiguousarray(x.T[:1])), "mgr_locs": old_array(np.array([0]))},
        {"values": old_array(np.ascontiguousarray(x.T[1:])), "mgr_locs": locations},
    ]
    layout = {"0.14.1": {"axes": axes, "blocks": blocks}}
    manager = Made(Name("pandas.core.internals", "BlockManager"), (), ([], [], [], layout), new=True)
    state = {"_metadata": [], "_typ": "dataframe", "_data": manager}
    made = Made(Name("pandas.core.frame", "DataFrame"), (), state, new=True)
    buffer = io.BytesIO()
    OldPickler(buffer, protocol=2).dump(made)
    path.write_bytes(buffer.getvalue())


def test_reads_what_old_pandas_wrote(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((7, 3))
    path = tmp_path / "old.pickle"
    old_pickle(path, x, ["Time", "Meth", "s1"])
    columns = read_frame_pickle(path)
    assert list(columns) == ["Time", "Meth", "s1"]
    np.testing.assert_array_equal(np.column_stack(list(columns.values())), x)


class Hostile:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.args


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("call", [os.mkdir, eval, getattr, __import__, pd.read_pickle, np.load])
def test_refuses_to_call_anything(call: Any, protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "made"
    argument = f"__import__('os').mkdir({str(target)!r})" if call is eval else str(target)
    path = tmp_path / "hostile.pickle"
    path.write_bytes(pickle.dumps(Hostile(call, argument), protocol))
    with pytest.raises(DataError, match=r"hostile\.pickle: (not a pickled table, or damaged: it names|a pickle, but)"):
        read_frame_pickle(path)
    assert not target.exists()


def test_refuses_other_content(tmp_path: Path) -> None:
    path = tmp_path / "frame.pickle"
    frame().to_pickle(path, protocol=2)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="not a pickled table, or damaged"):
        read_frame_pickle(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a pickled table, or damaged"):
        read_frame_pickle(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="not of a pandas DataFrame"):
        read_frame_pickle(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_frame_pickle(tmp_path / "missing.pickle")
