"""Run tasks in processes of their own, a few at a time; stop them between two steps, never in the middle of one."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Literal, TypeVar

from pycnf.workers import interrupts_ignored

Task = TypeVar("Task")
Report = Callable[[int], None]
Event = Literal["started", "step", "finished", "died", "stopping"]

TICK = 0.5  # seconds between two looks at the steps
GRACE = 60.0  # seconds that tasks have to come to a stop
STOP, STEP = 0, 1


def run_parallel(
    function: Callable[[Task, Report], None],
    tasks: Sequence[Task],
    workers: int,
    watch: Callable[[Event, int, int], None],
) -> None:
    """Call ``function(task, report)`` for every task, in at most so many processes with one torch thread each.

    The function says ``report(step)`` after each of its steps; this raises KeyboardInterrupt in it when it shall
    stop, which is when Ctrl-C reached this process, or when this process is gone. A second Ctrl-C, or a minute,
    ends the processes where they are. A process that dies takes its own task along and no other.

    Args:
        function: A function that can be imported by its name. What it returns is dropped: it writes files.
        tasks: Its first arguments; they must be picklable.
        workers: Number of processes, >= 1.
        watch: Is told (event, index, value): "started", "step" (value: the step, twice a second), "finished",
            "died" (value: exit code) of the task with this index; "stopping" (index -1) on Ctrl-C.

    Raises:
        KeyboardInterrupt: Ctrl-C; all processes have ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(range(len(tasks)))
    pool: list[_Worker[Task]] = []
    try:
        while waiting or any(worker.task is not None for worker in pool):
            idle = [worker for worker in pool if worker.task is None]
            while waiting and (idle or len(pool) < workers):
                if not idle:
                    idle.append(_Worker(context, function))
                    pool.append(idle[-1])
                index = waiting.popleft()
                idle.pop().give(index, tasks[index])
                watch("started", index, 0)
            busy = [worker for worker in pool if worker.task is not None]
            ready = wait([worker.pipe for worker in busy], timeout=TICK)
            for worker in busy:
                index = worker.index
                if worker.pipe not in ready:
                    watch("step", index, worker.step)
                elif worker.collect():
                    watch("finished", index, 0)
                else:
                    pool.remove(worker)
                    watch("died", index, worker.process.exitcode or 0)
    except BaseException as err:
        if isinstance(err, KeyboardInterrupt):
            watch("stopping", -1, 0)
        _stop(pool, GRACE)
        raise
    _stop(pool, GRACE)


class _Worker(Generic[Task]):
    """Hold a process that carries out one task after another."""

    def __init__(self, context: Any, function: Callable[[Task, Report], None]) -> None:
        self.pipe, theirs = context.Pipe()
        self.shared = context.RawArray("q", 2)
        self.process = context.Process(target=_serve, args=(theirs, self.shared, function), daemon=True)
        with interrupts_ignored():
            self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.index = -1

    @property
    def step(self) -> int:
        """Step of the task at hand."""
        return int(self.shared[STEP])

    def give(self, index: int, task: Task) -> None:
        """Hand over a task."""
        self.shared[STEP] = 0
        self.task, self.index = task, index
        self.pipe.send(task)

    def collect(self) -> bool:
        """Take the task back; tell whether it is done, or the process has died."""
        self.task = None
        try:
            self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return False
        return True


def _stop(pool: Sequence[_Worker[Any]], grace: float) -> None:
    """Ask the processes to stop, wait for them, and end those that do not in time or at a second Ctrl-C."""
    deadline = time.monotonic() + grace
    try:
        for worker in pool:
            worker.shared[STOP] = 1
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
        for worker in pool:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in pool:
            worker.process.terminate()
            worker.process.join()
            worker.pipe.close()


def _serve(pipe: Connection, shared: Any, function: Callable[[Any, Report], None]) -> None:
    """Carry out the tasks that come through the pipe: the life of a process."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def report(step: int) -> None:
        shared[STEP] = step
        if shared[STOP] or (parent is not None and not parent.is_alive()):
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt, EOFError, ConnectionError):
        while (task := pipe.recv()) is not None:
            function(task, report)
            pipe.send(True)


__all__ = ["TICK", "Event", "Report", "run_parallel"]
