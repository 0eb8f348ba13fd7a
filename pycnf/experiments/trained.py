"""Runs of images and auto-encoders that are opened again: the model, its data, and the test of its experiment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycnf.divergence import parse_divergence
from pycnf.experiments.autoencoders import AutoEncoders
from pycnf.experiments.image_flows import Images
from pycnf.experiments.runs import DATA_CARD
from pycnf.experiments.setup import Setup
from pycnf.experiments.workloads import Row, Workload, divergence_for
from pycnf.flow import CNF
from pycnf.images import SOURCES
from pycnf.records import read_json
from pycnf.training import load_flow
from pycnf.training.folder import CONFIG
from pycnf.training.options import resolve_device
from pycnf.vae.training import load_vae


@dataclass(frozen=True)
class TrainedRun:
    """Hold a trained model of images or pictures, and how its experiment tests it.

    Attributes:
        work: The workload, with the settings of the run.
        model: The model, in evaluation mode.
        flow: Its flow: the model itself, or that of its posterior.
        setup: What the test needs of the run's setup.
        data: The data, as the workload loads them.
    """

    work: Workload
    model: Any
    flow: CNF
    setup: Setup
    data: Any

    def test(self, split: str = "test") -> Row:
        """Test the model as its experiment does, on the part "test", "validation" or "train" of the data."""
        return self.work.test(self.model, dataclasses.replace(self.data, test=getattr(self.data, split)), self.setup)


def kind_of(folder: Path) -> str:
    """Tell what a run folder holds: "table", "images" or "vae".

    Raises:
        FileNotFoundError: There is no such folder, or it holds no configuration.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    config = read_json(folder / CONFIG)
    if "vae" in config:
        return AutoEncoders.kind
    flow = config.get("flow")
    return Images.kind if isinstance(flow, dict) and flow.get("kind") == "ImageFlow" else "table"


def reopen(
    folder: Path,
    source: str,
    *,
    data_dir: Path | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    first: int | None = None,
    **settings: Any,
) -> TrainedRun:
    """Open a run of images or of an auto-encoder, and load data for a test.

    Args:
        folder: The run folder, made by an experiment, :func:`~pycnf.training.loop.fit` or
            :func:`~pycnf.vae.training.train_vae`.
        source: Name of the data.
        data_dir: Folder with their files.
        device: Where to test.
        batch_size: Rows of one solve; None for that of the run's tests.
        first: Take the first rows alone; None for those of the run's tests.
        **settings: Settings of the workload in place of the run's; those that are None stay as they are.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file is damaged, the data are not there or do not fit, or a setting is not one of this kind.
    """
    work_type: type[Workload] = AutoEncoders if kind_of(folder) == AutoEncoders.kind else Images
    model: Any = load_vae(folder) if work_type is AutoEncoders else load_flow(folder)
    flow = model.posterior.flow if work_type is AutoEncoders else model
    if flow is None:
        raise ValueError(f"the posterior of {folder} is no flow: test it in code, pycnf.vae.evaluate_vae(vae, x)")
    card = folder / DATA_CARD
    own: Row = dict(read_json(card).get("workload", {})) if card.is_file() else {}
    own.pop("kind", None)
    if work_type is Images and not own and source in SOURCES:  # trained in code: no more is known than the shape
        own["shrink"] = max(1, SOURCES[source].shape[1] // model.shape[1])
    given = {name: value for name, value in settings.items() if value is not None}
    known = {field.name for field in dataclasses.fields(work_type)}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{unknown[0]} is no setting of the tests of {folder}, whose kind is {work_type.kind}")
    if first is not None:
        given |= {"test_rows": first, "validation_rows": first}
    work = work_type(**{name: tuple(v) if isinstance(v, list) else v for name, v in {**own, **given}.items()})
    if work_type is AutoEncoders and "probes" in given:
        flow.eval_divergence = parse_divergence(divergence_for(flow.features, given["probes"]))
    data = work.load(source, data_dir)
    if data.shape != model.shape:
        raise ValueError(f"{folder} was trained on pictures of shape {model.shape}, {source} has {data.shape}")
    if first is not None:
        data = dataclasses.replace(data, train=data.train[:first])
    training = read_json(folder / CONFIG)["training"]
    size = batch_size or training["eval_batch_size"] or training["batch_size"]
    setup = Setup(test_batch_size=size, warm_start=training["warm_start"])
    return TrainedRun(work, model.to(resolve_device(device)), flow, setup, data)


__all__ = ["TrainedRun", "kind_of", "reopen"]
