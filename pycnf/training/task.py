"""What a training run minimizes and validates: maximum likelihood of a flow, or another task of the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from pycnf.flow import CNF
from pycnf.objective import Objective, objective
from pycnf.regularizers import Regularizer
from pycnf.training.batches import Rows
from pycnf.training.evaluation import Evaluation, evaluate_rows


class Task(Protocol):
    """Train a model on an objective and validate it; :class:`~pycnf.training.run.Run` does the rest.

    Attributes:
        model: What is trained.
        regularizers: Regularizers of its solves.
        columns: Names of further scalar tensors of an objective that are recorded at every step.
        settled: Training steps from which on the objective stays the same; no earlier validation counts for the
            learning rate or for stopping.
    """

    regularizers: tuple[Regularizer, ...]
    columns: tuple[str, ...]
    settled: int

    @property
    def model(self) -> nn.Module: ...

    def objective(
        self, batch: Rows, step: int, factors: Sequence[float], first_steps: Sequence[float] | None
    ) -> Objective:
        """Return the objective of a batch at a training step, counted from 0, solved with these first steps."""
        ...

    def evaluate(self, rows: Rows, batch_size: int, *, warm_start: bool) -> Evaluation:
        """Return the negative log-likelihood, or its bound, of held-out rows."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the solver: method, rtol and atol."""
        ...


class FlowTask:
    """Train a flow by maximum likelihood."""

    columns: tuple[str, ...] = ()
    settled = 0

    def __init__(self, flow: CNF, regularizers: Sequence[Regularizer]) -> None:
        self.model, self.regularizers = flow, tuple(regularizers)

    def objective(
        self, batch: Rows, step: int, factors: Sequence[float], first_steps: Sequence[float] | None
    ) -> Objective:
        """Return -mean log p(x) + sum of weight * penalty."""
        return objective(self.model, *batch, self.regularizers, factors, first_steps)

    def evaluate(self, rows: Rows, batch_size: int, *, warm_start: bool) -> Evaluation:
        """Return the mean negative log-likelihood."""
        return evaluate_rows(self.model, rows, batch_size=batch_size, warm_start=warm_start)

    def describe(self) -> dict[str, Any]:
        """Return method and tolerances of the training solver."""
        solver = self.model.solver
        return {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol}
