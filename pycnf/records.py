"""Records: who ran what, where, when and with which versions, and files that are never left half written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("pycnf", "torch", "torchdiffeq", "lightning", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result ("absent" if not installed).

    Returns:
        Names to version strings: python and every name in ``PACKAGES``.

    Example:
        >>> versions()["torch"] == torch.__version__
        True
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if name == "torch":  # its own string tells the build (+cpu, +cu128), the metadata may not
            found[name] = str(torch.__version__)
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def device_name(device: str | torch.device = "cpu") -> str:
    """Return the name of the processor behind a torch device: the CPU's model or the GPU's.

    Args:
        device: A torch device or its string.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return " ".join(found.group(1).split())
    return platform.processor() or platform.machine() or "cpu"


def command_line() -> str:
    """Return the command that started this process, in a form a shell accepts.

    The program is named without its folder; a notebook kernel, whose arguments say nothing, is "notebook".
    """
    program, arguments = sys.argv[0] if sys.argv else "", sys.argv[1:]
    name = Path(program).name
    if name.startswith(("ipykernel_launcher", "colab_kernel_launcher")):
        return "notebook"
    if name == "__main__.py":
        return shlex.join(["python", "-m", Path(program).parent.name, *arguments])
    if program in ("", "-c", "-"):
        return shlex.join(word for word in ("python", program, *arguments) if word)
    if name.endswith(".py"):
        return shlex.join(["python", name, *arguments])
    return shlex.join([name, *arguments])


def run_record(*, device: str | torch.device = "cpu", **fields: Any) -> dict[str, Any]:
    """Return ``fields`` with date (UTC, ISO 8601), command, versions, device and number of CPU threads.

    Args:
        device: Where the work was done.
        **fields: What the record is about; a field given here wins over one that is added.

    Example:
        >>> record = run_record(data="moons", seed=3)
        >>> record["seed"], set(record) >= {"date", "command", "versions", "device", "threads"}
        (3, True)
    """
    added = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "versions": versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }
    return added | fields


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file as a whole or not at all: into a temporary file beside it, then renamed over it.

    Args:
        path: File to write; its folder must exist.
        data: All of its content.

    Raises:
        OSError: The disk is full, the folder cannot be written, ...; an earlier file is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            _write(file, data)
        os.replace(temporary, path)
    except BaseException as err:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(err, OSError):
            raise
        kept = "; the earlier file is kept" if path.is_file() else ""
        raise OSError(err.errno, f"could not write {path}: {err.strerror or err}{kept}") from err


def write_json(path: str | Path, obj: Any) -> None:
    """Write an object as JSON, atomically.

    Mappings, sequences, dataclasses, paths, dates, and scalars of numpy and torch are converted. JSON has no
    NaN and no infinity: both are written as null, and read back as None.

    Args:
        path: File to write; its folder must exist.
        obj: What to write.

    Raises:
        ValueError: A value has no JSON form; the message says where it stands.
        OSError: The file could not be written; an earlier one is unchanged.
    """
    text = json.dumps(to_plain(obj), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode("utf-8"))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON; the message gives the line.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise FileNotFoundError(err.errno, f"no file {path}") from err
    except UnicodeDecodeError as err:
        raise ValueError(f"{path} is not JSON: it is not text") from err
    except json.JSONDecodeError as err:
        raise ValueError(f"{path} is not JSON: {err.msg} in line {err.lineno}") from err


def to_plain(obj: Any, where: str = "") -> Any:
    """Convert an object to what JSON knows: dict, list, str, int, float, bool, None (NaN and inf to None).

    Args:
        obj: What to convert.
        where: Place of ``obj`` in a larger object, for the message of an error.

    Raises:
        ValueError: The object has no such form.

    Example:
        >>> to_plain({"nll": float("nan"), "shape": (2, 3), "seed": torch.tensor(1)})
        {'nll': None, 'shape': [2, 3], 'seed': 1}
    """
    if obj is None or isinstance(obj, (bool, int, str)):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, (Path, torch.device, torch.dtype)):
        return str(obj)
    if isinstance(obj, datetime):
        return obj.isoformat()
    if isinstance(obj, Mapping):
        wrong = next((key for key in obj if not isinstance(key, str)), None)
        if wrong is not None:
            raise ValueError(f"cannot write {where or 'the object'} as JSON: key {wrong!r} is not a string")
        return {key: to_plain(value, f"{where}.{key}".lstrip(".")) for key, value in obj.items()}
    if isinstance(obj, (list, tuple, set, frozenset)):
        items = sorted(obj) if isinstance(obj, (set, frozenset)) else obj
        return [to_plain(value, f"{where}[{i}]") for i, value in enumerate(items)]
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {
            f.name: to_plain(getattr(obj, f.name), f"{where}.{f.name}".lstrip(".")) for f in dataclasses.fields(obj)
        }
    if hasattr(obj, "tolist"):  # arrays and scalars of numpy and torch
        return to_plain(obj.tolist(), where)
    raise ValueError(f"cannot write {where or 'the object'} as JSON: it is a {type(obj).__name__}")


def _write(file: Any, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
