"""Files of a trained flow and of a training run: plain, atomic, readable without running code from them."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pycnf.flow import CNF
from pycnf.images.flow import ImageFlow
from pycnf.records import read_json, run_record, write_bytes, write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CHECKPOINT = "last.ckpt"
METRICS = "metrics.csv"
RECORD = "record.json"
TENSORBOARD = "tensorboard"

Row = dict[str, Any]
KINDS: dict[str, type[CNF]] = {"CNF": CNF, "ImageFlow": ImageFlow}


def save_flow(flow: CNF, folder: str | Path) -> None:
    """Write a flow into a folder: weights as ``model.safetensors``, how it is built as ``config.json``.

    Both files are written atomically and hold no pickled objects.

    Args:
        flow: The flow.
        folder: Folder, created where it is missing.

    Raises:
        OSError: A file could not be written; an earlier one is unchanged.
    """
    folder = make_folder(folder)
    write_json(folder / CONFIG, {"flow": describe_flow(flow)})
    write_weights(folder / WEIGHTS, flow.state_dict())


def load_flow(folder: str | Path, *, into: CNF | None = None) -> CNF:
    """Read a flow that :func:`save_flow` or a training run has written, in evaluation mode.

    Args:
        folder: Folder with ``config.json`` and ``model.safetensors``.
        into: Flow that takes the weights. Needed where the flow has a field of your own, which the
            configuration cannot rebuild.

    Returns:
        The flow.

    Raises:
        FileNotFoundError: The folder or one of the files is missing.
        ValueError: A file is damaged, or the weights do not fit the flow.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    flow = _build(folder / CONFIG) if into is None else into
    load_weights(folder / WEIGHTS, flow, cast=into is None)
    return flow.eval()


def load_weights(path: Path, model: nn.Module, *, cast: bool) -> None:
    """Give a model the tensors of a safetensors file, and with ``cast`` their precision.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or does not fit the model.
    """
    weights = read_weights(path)
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or extra:
        what = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} is not wanted"
        raise ValueError(f"{path} does not fit the flow: {what}")
    for name, tensor in wanted.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"{path} does not fit the flow: expected {name} of shape {tuple(tensor.shape)}, "
                f"got {tuple(weights[name].shape)}"
            )
    if cast:
        model.to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)


def describe_flow(flow: CNF) -> Row:
    """Return ``flow.config``, or what can be said of a flow whose fields are the user's own."""
    try:
        return flow.config if type(flow) is CNF else {"kind": type(flow).__name__, **flow.config}
    except ValueError:
        return {
            "features": flow.features,
            "field": [type(field).__qualname__ for field in flow.fields],
            "blocks": flow.blocks,
            "context": flow.context,
            "T": flow.T,
            "divergence": str(flow.divergence),
            "solver": flow.solver.to_dict(),
            "eval_divergence": str(flow.eval_divergence),
            "eval_solver": flow.eval_solver.to_dict(),
        }


def _build(path: Path) -> CNF:
    config = read_json(path)
    settings = config.get("flow") if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not describe a flow: it has no entry 'flow'")
    if "field" in settings:
        raise ValueError(
            f"{path} describes a flow with a field of its own ({', '.join(settings['field'])}): "
            "build the flow in code and call load_flow(folder, into=flow)"
        )
    try:
        return KINDS[settings.pop("kind", "CNF")](**settings)
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"{path} does not describe a flow of this version: {err}") from err


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return load(path.read_bytes())
    except SafetensorError as err:
        raise ValueError(f"{path} is damaged or not a safetensors file: {err}") from err


def make_folder(folder: str | Path) -> Path:
    """Create a folder with its parents and return its path."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as err:
        raise ValueError(f"expected a folder, but there is a file at {folder}") from err
    except OSError as err:
        raise OSError(err.errno, f"could not create the folder {folder}: {err.strerror}") from err
    return folder


class RunFolder:
    """Keep the files of one training run.

    Args:
        path: The folder.
        config: What the run is: entries flow, training, regularizers, data.
        resume: Go on with the run in the folder.
        overwrite: Delete the run in the folder and start anew.

    Attributes:
        checkpoint: State to go on from, None for a new run.

    Raises:
        ValueError: The folder holds a run and neither was asked for, or there is no run to resume, or it was
            made with other settings.
    """

    def __init__(self, path: str | Path, config: Row, *, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other: go on with the run or start anew?")
        self.path = Path(path)
        self.checkpoint: Row | None = None
        holds_run = (self.path / RECORD).exists() or (self.path / CHECKPOINT).exists()
        if resume:
            if not (self.path / CHECKPOINT).exists():
                raise ValueError(f"nothing to resume: {self.path} holds no {CHECKPOINT}")
            self.checkpoint = read_checkpoint(self.path / CHECKPOINT)
            config = self._continued(config)
        elif holds_run and not overwrite:
            raise ValueError(
                f"{self.path} already holds a run (status: {self._status()}): choose another folder, "
                "go on with it (resume=True) or delete it and start anew (overwrite=True)"
            )
        self._config, self._overwrite = config, overwrite

    def begin(self) -> None:
        """Create the folder, clear it where that was asked for, and write ``config.json``."""
        make_folder(self.path)
        if self._overwrite:
            for name in (CHECKPOINT, METRICS, RECORD, WEIGHTS, CONFIG):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / TENSORBOARD, ignore_errors=True)
        write_json(self.path / CONFIG, self._config)

    def _status(self) -> str:
        try:
            return str(read_json(self.path / RECORD)["status"])
        except (OSError, ValueError, KeyError, TypeError):
            return "unknown"

    def _continued(self, config: Row) -> Row:
        """Compare the settings with those of the run to resume; note those that may change and did."""
        step = int((self.checkpoint or {})["global_step"])
        old, new = read_json(self.path / CONFIG), json.loads(json.dumps(config))
        changed = sorted(_differences(old, new))
        free = {"training.max_steps", "training.device", "training.eval_batch_size", "data.name"}
        if new["training"]["schedule"] == "cosine":
            free.discard("training.max_steps")
        fixed = [name for name in changed if name not in free and not name.startswith(_FREE_PREFIXES)]
        if fixed:
            name = fixed[0]
            before, after = _look_up(old, name), _look_up(new, name)
            raise ValueError(
                f"cannot resume {self.path} with other settings: {name} was {before!r} and is now {after!r}"
            )
        if new["training"]["max_steps"] < step:
            wanted = new["training"]["max_steps"]
            raise ValueError(f"{self.path} is already at step {step}: ask for more than {wanted} steps")
        note = {"step": step, "changed": {name: _look_up(old, name) for name in changed}}
        return {**new, "resumed": [*old.get("resumed", []), note]}

    def write_record(self, status: str, device: torch.device, **fields: Any) -> None:
        """Write ``record.json``: what the run is, where it ran, how far it came."""
        write_json(self.path / RECORD, run_record(device=device, status=status, **fields))

    def read_metrics(self, trained: int, validated: int) -> list[Row]:
        """Return the rows of ``metrics.csv`` up to a step of each split; drop later ones from the file."""
        path = self.path / METRICS
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            raw = [row for row in csv.DictReader(file) if None not in row.values() and (row["step"] or "").isdigit()]
        last = {"train": trained, "validation": validated}
        kept = [row for row in raw if int(row["step"]) <= last.get(row["split"], -1)]
        rows = [{name: _parse(name, text) for name, text in row.items() if text != ""} for row in kept]
        if rows:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, list(raw[0]), restval="")
            writer.writeheader()
            writer.writerows(rows)
            write_bytes(path, text.getvalue().encode("utf-8"))
        else:
            path.unlink()
        return rows

    def append_metrics(self, rows: list[Row], columns: list[str]) -> None:
        """Append rows to ``metrics.csv``."""
        path = self.path / METRICS
        try:
            new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, restval="")
                if new:
                    writer.writeheader()
                writer.writerows(rows)
        except OSError as err:
            raise OSError(err.errno, f"could not write {path}: {err.strerror or err}") from err


_FREE_PREFIXES = ("flow.solver", "flow.eval_solver", "flow.divergence", "flow.eval_divergence", "resumed")


def read_checkpoint(path: Path) -> Row:
    """Read ``last.ckpt`` without running any code from it."""
    data = path.read_bytes()
    try:
        state: Row = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises many types for a damaged file
        raise ValueError(f"{path} is damaged, or was not written by pycnf: {err}") from err
    return state


def _parse(column: str, text: str) -> Any:
    if column == "split":
        return text
    try:
        return int(text)
    except ValueError:
        return float(text)


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [d for k in names for d in _differences(old.get(k), new.get(k), f"{where}.{k}".lstrip("."))]
    return [] if old == new else [where]


def _look_up(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
