"""What defines an experiment beside its data, its regularizer and its seed, with presets by data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pycnf.data import Dataset
from pycnf.experiments.presets import BUDGETS, list_presets
from pycnf.fields import TimeConditioning
from pycnf.flow import CNF
from pycnf.solve import METHODS, Solver
from pycnf.training.options import OptimizerName, ScheduleName, TrainingOptions, resolve_device


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Hold the model, the solvers and the training of an experiment.

    Attributes:
        hidden: Hidden widths of each block's perceptron.
        blocks: Number of blocks.
        activation: Activation of the perceptron.
        time: Time conditioning of the perceptron.
        T: End time of each block.
        divergence: Divergence in training; tests use the exact one.
        method: Solver method, in training and in test.
        n_steps: Number of equal steps, for fixed-step methods.
        rtol: Relative tolerance in training.
        atol: Absolute tolerance in training.
        test_rtol: Relative tolerance in validation and test.
        test_atol: Absolute tolerance in validation and test.
        gradient: "backprop", "checkpoint" or "adjoint".
        max_nfe: Budget of forward evaluations per block and solve in training; None for no limit.
        max_steps: Training steps at most.
        batch_size: Rows per training step.
        test_batch_size: Rows per batch in validation and test. The number of evaluations depends on it.
        lr: Learning rate at the start.
        weight_decay: Weight decay.
        optimizer: "adam", "adamw" or "adamax".
        schedule: "plateau", "cosine", "constant" or "auto".
        validate_every: Steps between two validations.
        warm_start: Whether solves start with the step that the last one suggests, in training and test.
        clip: Largest norm of the gradient, None for no limit.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: On an impossible setting.

    >>> Setup(rtol=1e-3).solver().rtol
    0.001
    """

    hidden: tuple[int, ...] = (64, 64, 64)
    blocks: int = 1
    activation: str = "tanh"
    time: TimeConditioning = "concat"
    T: float = 1.0
    divergence: str = "exact"
    method: str = "dopri5"
    n_steps: int | None = None
    rtol: float = 1e-4
    atol: float = 1e-4
    test_rtol: float = 1e-5
    test_atol: float = 1e-5
    gradient: str = "backprop"
    max_nfe: int | None = None
    max_steps: int = 1000
    batch_size: int = 1000
    test_batch_size: int = 1000
    lr: float = 2e-3
    weight_decay: float = 0.0
    optimizer: OptimizerName = "adam"
    schedule: ScheduleName = "cosine"
    validate_every: int = 200
    warm_start: bool = True
    clip: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        self.solver()
        self.test_solver()
        TrainingOptions(**self.training(), device=self.device)

    def solver(self) -> Solver:
        """Return the solver of training."""
        return self._solver(self.rtol, self.atol, max_nfe=self.max_nfe)

    def test_solver(self) -> Solver:
        """Return the solver of validation and test, which has no budget."""
        return self._solver(self.test_rtol, self.test_atol)

    def _solver(self, rtol: float, atol: float, **more: Any) -> Solver:
        gradient: Any = self.gradient  # checked by Solver itself
        return Solver(method=self.method, n_steps=self.n_steps, rtol=rtol, atol=atol, gradient=gradient, **more)

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its steps from the tolerance."""
        return METHODS[self.method].kind != "fixed"

    def build(self, features: int, seed: int) -> CNF:
        """Return a new flow of D features; its initial weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return CNF(
                features,
                self.hidden,
                self.blocks,
                eval_divergence="exact",
                **self.flow_settings(),
            )

    def flow_settings(self) -> dict[str, Any]:
        """Return what every flow of the setup is built with, beside its sizes and the divergence of its tests."""
        return {
            "activation": self.activation,
            "time": self.time,
            "T": self.T,
            "divergence": self.divergence,
            "solver": self.solver(),
            "eval_solver": self.test_solver(),
        }

    def training(self) -> dict[str, Any]:
        """Return the options of :func:`~pycnf.training.loop.fit` that are set here, without the device."""
        shared = (
            *("max_steps", "batch_size", "lr", "weight_decay", "optimizer", "schedule", "validate_every"),
            *("warm_start", "clip"),
        )
        return {name: getattr(self, name) for name in shared} | {"eval_batch_size": self.test_batch_size}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, from which ``Setup(**...)`` rebuilds them."""
        return dataclasses.asdict(self) | {"hidden": list(self.hidden)}


def _by_data() -> dict[str, dict[str, Any]]:
    known = {field.name for field in dataclasses.fields(Setup)}
    found: dict[str, dict[str, Any]] = {}
    for budget in BUDGETS:  # the paper's settings come last, and go first
        for preset in list_presets().values():
            if preset.kind == "table":
                for data in preset.data(budget):
                    found[data] = {k: v for k, v in preset.settings(budget, data).items() if k in known}
    return found


PRESETS: dict[str, dict[str, Any]] = _by_data()
"""Settings by table that differ from :class:`Setup`'s: the TPR paper's, and for tables that only a small budget of
:func:`~pycnf.experiments.presets.list_presets` names, such as the embedded ``power``, those of this budget."""


def setup_for(data: str | Path, settings: Mapping[str, Any] | None = None, *, rows: int | None = None) -> Setup:
    """Return the preset of a data set with some settings replaced.

    Args:
        data: Name of the set; :class:`Setup`'s defaults are taken where there is no preset.
        settings: Settings to replace; those that are None stay as they are.
        rows: Number of training rows, to which a preset's batch size is limited.

    Raises:
        ValueError: On an unknown or impossible setting.

    >>> setup_for("moons").T, setup_for("moons", {"T": 1.0}).T
    (0.5, 1.0)
    """
    known = [field.name for field in dataclasses.fields(Setup)]
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    for name in given:
        if name not in known:
            raise ValueError(f"unknown setting {name!r}: choose among {', '.join(known)}")
    values = PRESETS.get(str(data), {}) | given
    if rows is not None and "batch_size" not in given:
        values["batch_size"] = min(values.get("batch_size", Setup.batch_size), rows)
    return Setup(**values)


def setup_on(data: Dataset, name: str | Path, settings: Mapping[str, Any] | None = None) -> Setup:
    """Return the setup of :func:`setup_for` on loaded data, with its device resolved.

    Raises:
        ValueError: On an impossible setting, a batch larger than the training rows, or a model that cannot be built.
    """
    setup = setup_for(name, settings, rows=len(data.train))
    setup = dataclasses.replace(setup, device=str(resolve_device(setup.device)))
    if setup.batch_size > len(data.train):
        raise ValueError(f"batch_size {setup.batch_size} is larger than the {len(data.train)} training rows of {name}")
    setup.build(data.features, seed=0)
    return setup


def read_hidden(text: str | Sequence[int]) -> tuple[int, ...]:
    """Read hidden widths such as "60,60,60".

    Raises:
        ValueError: When these are not positive integers separated by commas.

    >>> read_hidden("60,60,60")
    (60, 60, 60)
    """
    try:
        widths = tuple(int(width) for width in (text.split(",") if isinstance(text, str) else text))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise ValueError(f"expected widths >= 1 separated by commas, such as 60,60,60, got {text!r}")
    return widths
