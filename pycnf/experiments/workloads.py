"""What an experiment trains and how it tests it: the protocol, and its first case, the density of a table."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from pycnf import data as tables
from pycnf.divergence import Hutchinson
from pycnf.experiments.setup import Setup, setup_for, setup_on
from pycnf.experiments.sweep import sweep_tolerances
from pycnf.records import to_plain
from pycnf.training import Evaluation, FitResult, evaluate, fit
from pycnf.training.options import resolve_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Settings = Mapping[str, Any]

Model = TypeVar("Model", bound=nn.Module)

EXACT = 100
"""Dimension up to which tests use the exact divergence; above it, many Hutchinson probes."""


@dataclass(frozen=True, kw_only=True)
class Workload(abc.ABC):
    """Load data, build a model, train it and test it.

    The fields of a subclass are its own settings, beside those of :class:`~pycnf.experiments.setup.Setup`. Data are
    whatever :meth:`load` returns, with a name, a source, notes, and the parts train, validation and test.

    Attributes:
        kind: Name in presets and records.
        measures: What :meth:`test` measures beyond a density of rows, by key of a row: what it is, for readers.
        note: What readers of the likelihood have to know.
    """

    kind: ClassVar[str]
    measures: ClassVar[Mapping[str, str]] = {}
    note: ClassVar[str] = ""

    def describe(self) -> Row:
        """Return what a record tells of the workload and its own settings."""
        settings: Row = to_plain(dataclasses.asdict(self))
        return {"workload": {"kind": self.kind, **settings}}

    @abc.abstractmethod
    def present(self, name: str, data_dir: Path | None) -> bool:
        """Tell whether a set can be loaded now."""

    @abc.abstractmethod
    def load(self, name: str, data_dir: Path | None) -> Any:
        """Load a set."""

    @abc.abstractmethod
    def setup(self, name: str, settings: Settings, data: Any = None) -> Setup:
        """Return the setup with some settings, fitted to the data where they are given.

        Raises:
            ValueError: On an impossible setting, or one that does not fit the data.
        """

    @abc.abstractmethod
    def build(self, data: Any, setup: Setup, seed: int) -> nn.Module:
        """Return a new model; its initial weights depend on the seed alone."""

    @abc.abstractmethod
    def fit(self, model: Any, data: Any, setup: Setup, **options: Any) -> FitResult:
        """Train the model; the options are regularizers, seed, device, output, resume, overwrite, and so on."""

    @abc.abstractmethod
    def test(self, model: Any, data: Any, setup: Setup) -> Row:
        """Return nll, nll_se, nfe_test, accepted, rejected, seconds_test, test_divergence, and the measures."""

    @abc.abstractmethod
    def sweep(
        self, model: Any, data: Any, setup: Setup, tolerances: Sequence[float], rows: int, truth_rows: int
    ) -> list[Row]:
        """Repeat the test at several tolerances (see :func:`~pycnf.experiments.sweep.sweep_tolerances`)."""

    def figures(self, model: Any, data: Any) -> dict[str, Figure]:
        """Draw what the model has learned, by name."""
        return {}

    def card(self, data: Any) -> Row:
        """Return where the data come from, what turns samples back into their units, and what the workload is."""
        shown = {name: getattr(data, name) for name in ("name", "source", "notes")}
        return shown | {"columns": [], "shift": [0.0], "scale": [1.0]} | self.describe()


@dataclass(frozen=True, kw_only=True)
class Tables(Workload):
    """Estimate the density of a table by a flow, and test it with the exact divergence."""

    kind: ClassVar[str] = "table"

    def describe(self) -> Row:
        return {}  # what a record without an entry is about

    def present(self, name: str, data_dir: Path | None) -> bool:
        return tables.describe(name, data_dir).present

    def load(self, name: str, data_dir: Path | None) -> tables.Dataset:
        return tables.load(name, data_dir=data_dir)

    def setup(self, name: str, settings: Settings, data: tables.Dataset | None = None) -> Setup:
        return setup_for(name, settings) if data is None else setup_on(data, name, settings)

    def build(self, data: tables.Dataset, setup: Setup, seed: int) -> nn.Module:
        return setup.build(data.features, seed)

    def fit(self, model: Any, data: tables.Dataset, setup: Setup, **options: Any) -> FitResult:
        return fit(model, data.train, data.validation, data_name=data.name, **setup.training(), **options)

    def test(self, model: Any, data: tables.Dataset, setup: Setup) -> Row:
        found = evaluate(model, data.test, batch_size=setup.test_batch_size, warm_start=setup.warm_start)
        return test_row(found, "exact")

    def sweep(
        self,
        model: Any,
        data: tables.Dataset,
        setup: Setup,
        tolerances: Sequence[float],
        rows: int,
        truth_rows: int,
    ) -> list[Row]:
        return sweep_tolerances(
            model,
            data.test[:rows],
            tolerances,
            batch_size=setup.test_batch_size,
            truth_rows=truth_rows,
            warm_start=setup.warm_start,
        )

    def figures(self, model: Any, data: tables.Dataset) -> dict[str, Figure]:
        if data.features != 2:
            return {}
        from pycnf.plots import density_2d

        return {"density": density_2d(model, data=data.test)}

    def card(self, data: tables.Dataset) -> Row:
        return {name: getattr(data, name) for name in ("name", "source", "notes", "columns", "shift", "scale")}


def test_row(found: Evaluation, divergence: str) -> Row:
    """Return an evaluation, made with a divergence, with the keys of a row."""
    names = {"nll": "nll", "nll_se": "nll_se", "nfe_test": "nfe", "accepted": "accepted", "rejected": "rejected"}
    names |= {"seconds_test": "seconds"}
    return {key: getattr(found, name) for key, name in names.items()} | {"test_divergence": divergence}


def check_batches(setup: Setup, rows: int, name: str) -> Setup:
    """Return a setup with its device resolved.

    Raises:
        ValueError: A batch is larger than the training rows, or there is no such device.
    """
    if setup.batch_size > rows:
        raise ValueError(f"batch_size {setup.batch_size} is larger than the {rows} training rows of {name}")
    return dataclasses.replace(setup, device=str(resolve_device(setup.device)))


def divergence_for(dimension: int, probes: int) -> str:
    """Return the divergence of tests: exact up to :data:`EXACT` dimensions, else that of so many probes.

    >>> divergence_for(64, 10), divergence_for(784, 10)
    ('exact', 'hutchinson-rademacher-10')
    """
    return "exact" if dimension <= EXACT else str(Hutchinson(probes, "rademacher"))


def seeded(build: Callable[[], Model], seed: int) -> Model:
    """Call a function that draws initial weights, from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


TABLES = Tables()

__all__ = [
    "EXACT",
    "TABLES",
    "Row",
    "Settings",
    "Tables",
    "Workload",
    "check_batches",
    "divergence_for",
    "seeded",
    "test_row",
]
