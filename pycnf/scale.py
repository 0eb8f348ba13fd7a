r"""Log-densities and samples of any number of rows: in batches, in bounded memory, in one process or several.

The solver takes one step size for a whole batch, from the root mean square over its rows of error over tolerance. So
``batch_size`` has a say in the result, within the tolerance: in a large batch hard rows hide among easy ones, in a
small one they set its steps. Memory holds the result, one batch a process, and what one evaluation of the field needs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pycnf.flow import CNF
from pycnf.rows import Rows, RowSource, cut
from pycnf.solution import SolveError, SolveStats
from pycnf.solve import Solver
from pycnf.stepper import Attempt
from pycnf.workers import spread

Order = Literal["given", "difficulty"]
Goal = Literal["log_prob", "samples", "difficulty"]
Batch = tuple[Tensor, Tensor | None]

LOOK = Solver(method="adaptive_heun", rtol=0.1, atol=0.1)  # finds out which rows are difficult


@dataclass(frozen=True)
class Batched:
    """Hold what was computed in batches, and what it cost.

    Attributes:
        values: Log-densities (N,) or samples (N, D), on the CPU.
        stats: Counts summed over all solves.
        batches: Number of batches.
    """

    values: Tensor
    stats: SolveStats
    batches: int


class BatchError(SolveError):
    """Report a solve that failed, with the rows that were in it.

    Attributes:
        rows: Which rows, in words.
        cause: The error of the solve.
    """

    def __init__(self, rows: str, cause: SolveError) -> None:
        self.rows, self.cause = rows, cause
        self.method, self.t, self.step, self.nfe = cause.method, cause.t, cause.step, cause.nfe
        RuntimeError.__init__(self, f"{rows}: {cause}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows, self.cause)


def log_prob(
    flow: CNF,
    data: RowSource | str | Path,
    context: RowSource | str | Path | None = None,
    *,
    batch_size: int = 1000,
    solver: Solver | None = None,
    warm_start: bool = True,
    order: Order = "given",
    workers: int = 1,
    device: str | torch.device | None = None,
    out: Tensor | np.ndarray | None = None,
    progress: bool | str = False,
) -> Batched:
    """Compute log p of every row under a flow in evaluation mode, without gradients.

    Args:
        flow: The flow; it is left in the mode in which it was.
        data: Rows (N, D): a tensor, an array, a memory-mapped array or anything else that is sliced like one, or the
            path of a .npy file, which is then memory-mapped. Converted to the flow's precision batch by batch.
        context: Their context (N, C), likewise, for a flow with context.
        batch_size: Rows of one solve; a thousand keep the arrays of a small flow in the processor's caches.
        solver: Solver in place of ``flow.eval_solver``.
        warm_start: Start the solve of each batch with the step that the one before suggests, in place of the method's
            own choice.
        order: ``"difficulty"`` puts rows of like difficulty into one batch, so that easy rows do not pay for hard
            ones and hard ones get the steps they need. A coarse solve, at tolerance 0.1, looks at all rows first
            and finds out how difficult they are by its own error estimates: some ten more evaluations, which are
            soon earned back at tolerances tighter than 1e-5.
        workers: Number of processes, with one thread each; each takes seconds to start. Which rows share a batch
            does not depend on it, but with ``warm_start`` the first step of their solve does, within the tolerance.
        device: Where to solve, None for where the flow is. Several workers on ``"cuda"`` share all GPUs.
        out: Tensor or array (N,) to write to, memory-mapped for instance; None for a new tensor.
        progress: Show a progress bar; a string is its label.

    Returns:
        The log-densities in nats, (N,).

    Raises:
        ValueError: Rows and flow do not fit, rows hold NaN or infinity (found before anything is solved), or an
            option is impossible.
        BatchError: A solve failed; the message names its rows.
        ChildProcessError: A worker process ended before its time.

    >>> flow = CNF(2, hidden=(8,))
    >>> x = torch.randn(2500, 2)
    >>> with torch.no_grad():
    ...     together = flow.eval()().log_prob(x)
    >>> torch.allclose(log_prob(flow, x).values, together, atol=1e-2)
    True
    """
    _check_options(batch_size=batch_size, workers=workers)
    if order not in ("given", "difficulty"):
        raise ValueError(f"unknown order {order!r}: choose given or difficulty")
    table = Rows("data", data, flow.features, _like(flow).dtype)
    given = _context(flow, context, len(table))
    target = _target(out, (len(table),), table.dtype)
    machine = _Machine(flow, workers, device, warm_start, "log p" if progress is True else progress or None)
    batches, stats = list[Any](cut(len(table), batch_size)), SolveStats()
    if order == "difficulty":
        difficulty = torch.empty(len(table))
        stats += machine.run("difficulty", LOOK, batches, table, given, difficulty)
        ascending = difficulty.argsort(stable=True).numpy()
        batches = [np.sort(ascending[part]) for part in batches]  # in the order of the file within a batch
    stats += machine.run("log_prob", solver or flow.eval_solver, batches, table, given, target)
    return Batched(target, stats, len(batches))


def sample(
    flow: CNF,
    n: int,
    context: RowSource | str | Path | None = None,
    *,
    seed: int | None = None,
    batch_size: int = 1000,
    solver: Solver | None = None,
    warm_start: bool = True,
    workers: int = 1,
    device: str | torch.device | None = None,
    out: Tensor | np.ndarray | None = None,
    progress: bool | str = False,
) -> Batched:
    """Draw n samples of a flow in evaluation mode, without gradients.

    The noise is drawn first, for all samples together, into the memory of the result: it depends on the seed and on
    n alone, so that another ``batch_size`` or number of workers gives the same samples within the tolerance.

    Args:
        flow: The flow; it is left in the mode in which it was.
        n: Number of samples.
        context: Context of a conditional flow, (n, C) for one a sample or (C,) for one for all.
        seed: Seed of the noise; None continues torch's own generator.
        batch_size: Samples of one solve.
        solver: Solver in place of ``flow.eval_solver``.
        warm_start: As for :func:`log_prob`.
        workers: As for :func:`log_prob`.
        device: As for :func:`log_prob`.
        out: Tensor or array (n, D) to write to; None for a new tensor.
        progress: Show a progress bar; a string is its label.

    Returns:
        The samples, (n, D).

    Raises:
        ValueError: An option is impossible, or the context does not fit.
        BatchError: A solve failed; the message names its rows.
        ChildProcessError: A worker process ended before its time.

    >>> flow = CNF(2, hidden=(8,))
    >>> once, again = (sample(flow, 100, seed=1, batch_size=size).values for size in (100, 30))
    >>> torch.allclose(once, again, atol=1e-2)
    True
    """
    _check_options(n=n, batch_size=batch_size, workers=workers)
    like = _like(flow)
    target = _target(out, (n, flow.features), like.dtype)
    generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    torch.randn(n, flow.features, dtype=target.dtype, generator=generator, out=target)
    given = None
    if flow.context or context is not None:
        if isinstance(context, Tensor) and context.ndim == 1:
            context = context.expand(n, -1)
        given = _context(flow, context, n)
    machine = _Machine(flow, workers, device, warm_start, "samples" if progress is True else progress or None)
    batches = cut(n, batch_size)
    stats = machine.run("samples", solver or flow.eval_solver, batches, target, given, target)
    return Batched(target, stats, len(batches))


@contextmanager
def evaluation_mode(flow: torch.nn.Module) -> Iterator[None]:
    """Put every module of a flow into evaluation mode, and back into the mode it had."""
    modes = {module: module.training for module in flow.modules()}
    flow.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass
class _Solve:
    """Solve one batch after another for what is wanted of its rows, each with the opening of the one before.

    The difficulty of a row is the sum of its squared errors over tolerance, in all accepted steps.
    """

    flow: CNF
    device: str
    goal: Goal
    solver: Solver
    warm_start: bool
    openings: tuple[float, ...] | None = None

    def __call__(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, SolveStats]:
        """Return what is wanted of a batch, and what it cost."""
        like = _like(self.flow.to(self.device))
        z, given = x.to(like), None if context is None else context.to(like)
        difficulty, reverse = torch.zeros_like(z[:, 0]), self.goal == "samples"

        def look(block: int, attempt: Attempt) -> None:
            if attempt.accepted:
                square = attempt.error.pow(2)
                difficulty.add_(torch.maximum(square[:, :-1].mean(1), square[:, -1]))

        observer = look if self.goal == "difficulty" else None
        with evaluation_mode(self.flow), torch.no_grad():
            solution = self.flow.solve(
                z,
                given,
                reverse=reverse,
                density=not reverse,
                solver=self.solver,
                first_steps=self.openings,
                observer=observer,
            )
        self.openings = solution.openings if self.warm_start else None
        values = solution.z if reverse else solution.log_prob if observer is None else difficulty
        return values, solution.stats


@dataclass(frozen=True)
class _Machine:
    """Solve batches of rows, here or in other processes, and show how far it is."""

    flow: CNF
    workers: int
    device: str | torch.device | None
    warm_start: bool
    label: str | None

    def run(
        self, goal: Goal, solver: Solver, batches: Sequence[Any], rows: Any, context: Rows | None, target: Tensor
    ) -> SolveStats:
        """Write what is wanted of all rows to the target, and return the summed counts."""
        from tqdm import tqdm

        def job(i: int) -> Batch:
            return rows[batches[i]], None if context is None else context[batches[i]]

        stats, label = SolveStats(), "looking at the rows" if goal == "difficulty" else self.label
        bar = tqdm(
            total=len(target),
            desc=label,
            unit=" rows",
            unit_scale=True,
            delay=1.0,
            mininterval=0.2 if sys.stderr.isatty() else 5.0,
            dynamic_ncols=True,
            disable=self.label is None,
        )
        with bar, closing(self._outcomes(goal, solver, len(batches), job)) as outcomes:
            for i, outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise _blame(_name_rows(batches[i]), outcome)
                values, counts = outcome
                target[batches[i]] = values.to(target)
                stats += counts
                bar.update(len(values))
        return stats

    def _outcomes(
        self, goal: Goal, solver: Solver, count: int, job: Callable[[int], Batch]
    ) -> Generator[tuple[int, Any], None, None]:
        here = _like(self.flow).device
        device = here if self.device is None else torch.device(self.device)
        if self.workers > 1 and count > 1:
            flow = copy.deepcopy(self.flow).cpu()
            places = _places(device, self.workers)
            yield from spread([_Solve(flow, place, goal, solver, self.warm_start) for place in places], count, job)
            return
        flow = self.flow if device == here else copy.deepcopy(self.flow)
        solve = _Solve(flow, str(device), goal, solver, self.warm_start)
        outcome: tuple[Tensor, SolveStats] | Exception
        for i in range(count):
            try:
                outcome = solve(*job(i))
            except Exception as err:
                outcome = err
            yield i, outcome


def _places(device: torch.device, workers: int) -> list[str]:
    """Deal workers on "cuda" over all GPUs."""
    if str(device) != "cuda":
        return [str(device)] * workers
    return [f"cuda:{i % torch.cuda.device_count()}" for i in range(workers)]


def _context(flow: CNF, context: Any, rows: int) -> Rows | None:
    if flow.context == 0:
        if context is not None:
            raise ValueError("context was given, but the flow has none: make it with CNF(..., context=...)")
        return None
    if context is None:
        raise ValueError(f"the flow has context={flow.context}: expected context of shape ({rows}, {flow.context})")
    table = Rows("context", context, flow.context, _like(flow).dtype)
    if len(table) != rows:
        raise ValueError(f"expected context of shape ({rows}, {flow.context}), got {tuple(table.values.shape)}")
    return table


def _target(out: Tensor | np.ndarray | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype)
    if tuple(out.shape) != shape:
        raise ValueError(f"expected out of shape {shape}, got {tuple(out.shape)}")
    return out if isinstance(out, Tensor) else torch.from_numpy(out)


def _like(flow: CNF) -> Tensor:
    return next(flow.parameters(), torch.empty(()))


def _name_rows(batch: Any) -> str:
    if isinstance(batch, slice):
        return f"rows {batch.start:,} to {batch.stop - 1:,}"
    return f"{len(batch):,} rows of like difficulty, among them {', '.join(f'{row:,}' for row in batch[:5])}"


def _blame(rows: str, err: Exception) -> Exception:
    if isinstance(err, SolveError):
        return BatchError(rows, err)
    if isinstance(err, ChildProcessError):
        return ChildProcessError(f"{rows}: {err}")
    err.add_note(f"while solving {rows}")
    return err


def _check_options(**least_one: int) -> None:
    for name, value in least_one.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"expected an integer {name} >= 1, got {value!r}")


__all__ = ["BatchError", "Batched", "evaluation_mode", "log_prob", "sample"]
