"""Processes of their own that call a function on one job after another, and end with the process that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

Job = tuple[Tensor | None, ...]
Task = Callable[..., tuple[Tensor, Any]]


def spread(tasks: Sequence[Task], count: int, job: Callable[[int], Job]) -> Iterator[tuple[int, Any]]:
    """Call ``tasks[i % len(tasks)](*job(i))`` for every i < count, each task in a process of its own.

    The processes are started afresh (spawned) with one torch thread each, ignore Ctrl-C, and are ended when the
    iterator is closed or an error passes through it. Which task gets which job does not depend on their speed.

    Torch's generator of each process is seeded from that of this one.

    Args:
        tasks: Functions of tensors that return a tensor and something picklable; sent by value, so they keep their
            own state from job to job.
        count: Number of jobs.
        job: Makes the arguments of a job, tensors or None, when its turn comes.

    Yields:
        (i, what the call returned, or the exception it raised), in the order in which the calls end.

    Raises:
        ValueError: A task cannot be sent to another process.
    """
    payloads = [_pickled(task) for task in tasks[:count]]
    seeds = torch.randint(2**62, (len(payloads),)).tolist()
    pool: list[_Worker] = []
    try:
        for payload, seed in zip(payloads, seeds, strict=True):
            pool.append(_Worker(payload, seed))
        for i, worker in enumerate(pool):
            worker.give(i, job(i))
        busy: dict[Any, _Worker] = {worker.pipe: worker for worker in pool}
        while busy:
            for pipe in wait(list(busy)):
                worker = busy[pipe]
                done, outcome = worker.index, worker.collect()
                following = done + len(pool)
                if following < count and not isinstance(outcome, Exception):
                    worker.give(following, job(following))
                else:
                    del busy[pipe]
                yield done, outcome
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """Hold a process that carries out one job at a time."""

    def __init__(self, payload: bytes, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, payload, seed), daemon=True)
        with interrupts_ignored():
            self.process.start()
        theirs.close()
        self.index = -1

    def give(self, index: int, job: Job) -> None:
        """Hand over a job; that the process is gone will show when its result is collected."""
        self.index = index
        with contextlib.suppress(ConnectionError):
            self.pipe.send([None if part is None else part.cpu().numpy() for part in job])

    def collect(self) -> Any:
        """Return what the job came to, an exception where it raised one or took its process along."""
        try:
            outcome = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return ChildProcessError(
                f"a worker process ended with exit code {self.process.exitcode}. Where memory ran out, take fewer "
                "workers or smaller batches; a script that starts workers must do so under "
                "`if __name__ == '__main__':`"
            )
        return outcome if isinstance(outcome, Exception) else (torch.from_numpy(outcome[0]), outcome[1])

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, payload: bytes, seed: int) -> None:
    """Carry out the jobs that come through the pipe: the life of a process."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    with contextlib.suppress(EOFError, ConnectionError):  # the process that wants the results is gone
        try:
            task: Task = pickle.loads(payload)
        except Exception as err:
            pipe.send(_sendable(err))
            return
        while True:
            parts = pipe.recv()
            try:
                values, rest = task(*(None if part is None else torch.from_numpy(part) for part in parts))
                pipe.send((values.cpu().numpy(), rest))
            except ConnectionError:
                raise
            except Exception as err:
                pipe.send(_sendable(err))


def _sendable(err: Exception) -> Exception:
    """Return an exception that survives the way to another process, with where it was raised as a note."""
    err.add_note("".join(traceback.format_exception(err)))
    try:
        pickle.loads(pickle.dumps(err))
    except Exception:
        return RuntimeError(f"{type(err).__name__}: {err}")
    return err


def _pickled(task: Task) -> bytes:
    """Write a task down by value: torch would move its tensors to memory shared between the processes."""
    try:
        return pickle.dumps(task)
    except Exception as err:  # pickle raises many kinds
        raise ValueError(
            f"cannot be sent to worker processes ({err}): define the classes of the flow's fields at the top of a "
            "module, or take workers=1"
        ) from err


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Let a process that is started here ignore Ctrl-C from its first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


__all__ = ["Job", "Task", "interrupts_ignored", "spread"]
