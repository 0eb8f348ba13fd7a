from __future__ import annotations

import errno
import json
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from pycnf import records


def test_versions_name_what_decides_a_result() -> None:
    found = records.versions()
    assert set(found) == {"python", *records.PACKAGES}
    assert found["torch"] == torch.__version__
    assert found["python"].split(".")[0] == "3"


def test_device_name_of_the_cpu_is_one_line() -> None:
    name = records.device_name("cpu")
    assert name
    assert "\n" not in name
    assert records.device_name(torch.device("meta")) == "meta"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/local/bin/pycnf", "train", "--data", "my data.csv"], "pycnf train --data 'my data.csv'"),
        (["/home/someone/run.py", "--seeds", "3"], "python run.py --seeds 3"),
        (["/lib/pycnf/__main__.py", "compare"], "python -m pycnf compare"),
        (["/lib/ipykernel_launcher.py", "-f", "/run/kernel-1.json"], "notebook"),
        (["-c"], "python -c"),
        ([""], "python"),
    ],
)
def test_command_line(monkeypatch: pytest.MonkeyPatch, argv: list[str], expected: str) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert records.command_line() == expected


def test_run_record_adds_and_does_not_overrule() -> None:
    record = records.run_record(seed=3, device="cpu", command="mine")
    assert record["seed"] == 3
    assert record["command"] == "mine"
    assert record["device"] == records.device_name("cpu")
    assert record["threads"] == torch.get_num_threads()
    assert datetime.fromisoformat(record["date"]).utcoffset().total_seconds() == 0


@dataclass
class Point:
    x: float
    y: Path


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {
        "nan": float("nan"),
        "inf": [float("inf"), -float("inf")],
        "numpy": np.float64(0.1),
        "array": np.arange(3),
        "torch": torch.tensor([[1.0, float("nan")]]),
        "flag": np.bool_(True),
        "point": Point(1.5, Path("b")),
        "tuple": (1, "two", None),
        "set": {2, 1},
    }
    records.write_json(path, value)
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN and no Infinity in the file
    assert records.read_json(path) == {
        "nan": None,
        "inf": [None, None],
        "numpy": 0.1,
        "array": [0, 1, 2],
        "torch": [[1.0, None]],
        "flag": True,
        "point": {"x": 1.5, "y": "b"},
        "tuple": [1, "two", None],
        "set": [1, 2],
    }
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": [1, object()]}}, r"cannot write a\.b\[1\] as JSON: it is a object"),
        ({"a": {1: 2}}, r"cannot write a as JSON: key 1 is not a string"),
        (object(), r"cannot write the object as JSON"),
    ],
)
def test_json_says_what_it_cannot_write(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        records.write_json(tmp_path / "a.json", value)
    assert not list(tmp_path.iterdir())


def test_read_json_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.json"):
        records.read_json(path)
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(ValueError, match=r"a\.json is not JSON: .* in line 2"):
        records.read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is not text"):
        records.read_json(path)


def test_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    records.write_json(path, {"step": 1})

    def half(file: object, data: bytes) -> None:
        file.write(data[: len(data) // 2])  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "_write", half)
    with pytest.raises(OSError, match=r"could not write .*a\.json: No space .*; the earlier file is kept") as caught:
        records.write_json(path, {"step": 2})
    assert caught.value.errno == errno.ENOSPC
    assert records.read_json(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not write .*a\.json: No such file or directory"):
        records.write_bytes(tmp_path / "missing" / "a.json", b"")
