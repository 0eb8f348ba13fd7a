"""How far a benchmark has come, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pycnf.experiments.jobs import Job
from pycnf.experiments.pool import TICK, Event


class Estimate:
    """Estimate the time that is left from the runs that are done and those at work.

    A run is expected to take as long as the runs of its data set have taken on average; those at work count with
    the share of their steps that they have done. Where a set has no run yet, the average over all sets stands in.

    Args:
        jobs: The runs to make.
        clock: Function that returns the time in seconds.
    """

    def __init__(self, jobs: Sequence[Job], clock: Callable[[], float] = time.monotonic) -> None:
        self.jobs, self.clock = jobs, clock
        self.began: dict[int, float] = {}
        self.first: dict[int, int] = {}  # step from which a resumed run went on
        self.steps: dict[int, int] = {}
        self.taken: dict[int, float] = {}

    def update(self, event: Event, index: int, value: int) -> None:
        """Take note of an event of a run (:func:`~pycnf.experiments.pool.run_parallel`)."""
        if event == "started":
            self.began[index] = self.clock()
        elif event == "step" and value > 0:
            self.first.setdefault(index, value)
            self.steps[index] = value
        elif event in ("finished", "died"):
            self.taken[index] = self.clock() - self.began[index]

    @property
    def done(self) -> float:
        """Number of runs that are done, with those at work counted by their steps."""
        working = sum(min(self.steps.get(i, 0) / self.jobs[i].setup.max_steps, 1.0) for i in self._working())
        return len(self.taken) + working

    def left(self) -> float | None:
        """Return the seconds that are left; None where nothing can be said yet."""
        expected = {data: self._expected(data) for data in {job.data for job in self.jobs}}
        known = [seconds for seconds in expected.values() if seconds is not None]
        if not known:
            return None
        usual, total, longest = sum(known) / len(known), 0.0, 0.0
        for index, job in enumerate(self.jobs):
            if index not in self.taken:
                whole = expected[job.data]
                spent = self.clock() - self.began[index] if index in self.began else 0.0
                rest = max((usual if whole is None else whole) - spent, 0.0)
                total, longest = total + rest, max(longest, rest)
        workers = max(job.workers for job in self.jobs)
        return max(total / workers, longest)

    def _working(self) -> list[int]:
        return [index for index in self.began if index not in self.taken]

    def _expected(self, data: str) -> float | None:
        done = [seconds for index, seconds in self.taken.items() if self.jobs[index].data == data]
        if not done:  # from those at work, once they have done some steps
            for index in self._working():
                steps = self.steps.get(index, 0) - self.first.get(index, 0)
                if self.jobs[index].data == data and steps > 0:
                    whole = self.jobs[index].setup.max_steps
                    done.append((self.clock() - self.began[index]) * whole / (steps + 1))
        return sum(done) / len(done) if done else None


class Progress:
    """Show a bar for all runs together, and a line for each that is done, on stderr.

    Args:
        jobs: The runs to make.
        done: Number of runs that are recorded already.
        shown: Whether to show anything.
    """

    def __init__(self, jobs: Sequence[Job], *, done: int = 0, shown: bool = True) -> None:
        self.jobs, self.before, self.shown = jobs, done, shown
        self.estimate = Estimate(jobs)
        self._next = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        """Open the bar."""
        if not self.shown:
            return self
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        said, left = TextColumn("{task.description}"), TextColumn("{task.fields[left]}")
        console = Console(stderr=True, highlight=False)
        columns = (said, BarColumn(), TimeElapsedColumn(), left)
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        whole = self.before + len(self.jobs)
        self._task = self._bar.add_task("", total=whole, completed=self.before, left="")
        self._bar.start()
        if self.before:
            self._say(f"{self.before} of {whole} runs are recorded already")
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: Event, index: int, value: int) -> None:
        """Show an event of a run."""
        if event == "stopping":
            self._say("stopping after the step at hand; Ctrl-C once more stops at once")
            return
        if event == "step" and time.monotonic() < self._next:  # what this takes would count as training
            return
        self._next = time.monotonic() + TICK
        self.estimate.update(event, index, value)
        if self._bar is None:
            return
        finished, whole = self.before + len(self.estimate.taken), self.before + len(self.jobs)
        left = describe_seconds(self.estimate.left())
        if event in ("finished", "died"):
            tail = f"; {left}" if finished < whole else ""
            self._say(f"[{finished}/{whole}] {self.jobs[index].title}: {outcome(self.jobs[index])}{tail}")
        self._bar.update(
            self._task, completed=self.before + self.estimate.done, description=f"{finished} of {whole} runs", left=left
        )

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)


def outcome(job: Job) -> str:
    """Say in a line what a run came to."""
    row = job.read() or {"status": "lost", "error": "its record cannot be read"}
    if row["status"] != "finished":
        return f"{row['status']}: {row['error']}"
    return (
        f"held-out NLL {row['nll']:.4f} ± {row['nll_se']:.4f} nats, evaluations {row['nfe_train']:.1f} in training "
        f"and {row['nfe_test']:.1f} in test, {row['seconds']:.1f} s"
    )


def describe_seconds(seconds: float | None) -> str:
    """Say in words how much time is left.

    >>> describe_seconds(None), describe_seconds(40), describe_seconds(1000), describe_seconds(9000)
    ('estimating', 'under a minute left', 'about 17 min left', 'about 2.5 h left')
    """
    if seconds is None:
        return "estimating"
    if seconds < 60:
        return "under a minute left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


__all__ = ["Estimate", "Progress", "describe_seconds", "outcome"]
