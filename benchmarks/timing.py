"""Time pieces of work in turn, so that what else the machine does falls on all of them, and measure their memory."""

from __future__ import annotations

import argparse
import gc
import shlex
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pycnf import records

Work = Callable[[], object]
Seconds = dict[str, list[float]]


def interleave(
    work: Mapping[str, Work], rounds: int, *, prepare: Callable[[], object] = lambda: None, warm_up: int = 1
) -> Seconds:
    """Time each piece of work once a round, in an order that rotates from round to round.

    Args:
        work: Names and functions without arguments.
        rounds: Rounds that count.
        prepare: What is done before each round, for all of them.
        warm_up: Rounds before, which do not count.

    Returns:
        Seconds of each round, by name.
    """
    names = list(work)
    seconds: Seconds = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        prepare()
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            synchronize()
            start = time.perf_counter()
            work[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Seconds, name: str, against: str) -> dict[str, float]:
    """Return how many times longer ``against`` takes: median and range over the rounds, and both times in ms."""
    ratios = [b / a for a, b in zip(seconds[name], seconds[against], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ms": 1e3 * statistics.median(seconds[name]),
        "ms_against": 1e3 * statistics.median(seconds[against]),
    }


def synchronize() -> None:
    """Wait for the GPU, where one is at work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class PeakMemory(TorchDispatchMode):
    """Follow the bytes of all tensors made while it is on, and keep their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in before and storage not in self._known:
                    self._keep(storage)
        return result

    def _keep(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.live -= size


def peak_megabytes(work: Work) -> float:
    """Return the largest sum of the tensors that a piece of work holds at once, beyond those that were there."""
    gc.collect()
    with PeakMemory() as memory:
        work()
    return memory.peak / 1e6


def save(path: Path | None, name: str, rows: object, *, at: torch.device | str = "cpu", **more: object) -> None:
    """Write a record, where one is wanted."""
    if path is not None:
        command = shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
        records.write_json(path, records.run_record(device=at, command=command, name=name, seed=0, rows=rows, **more))


def parser(description: str | None, record: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="tiny settings: a look at whether everything runs")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    made.add_argument("--output", type=Path, help=f"record to write: results/benchmarks/{record}.json")
    return made


def add_device(made: argparse.ArgumentParser) -> None:
    """Add the option that names the device."""
    made.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu, or cuda for a GPU")


def add_experiment(made: argparse.ArgumentParser, name: str, seeds: int) -> None:
    """Add the options of benchmarks that train an experiment."""
    made.add_argument("--name", default=name, help="the experiment")
    made.add_argument("--seeds", type=int, default=seeds, help="number of seeds")


def trainings(args: argparse.Namespace) -> tuple[int, int | None]:
    """Return the number of seeds, and the training steps where they are not the experiment's, and set the threads."""
    torch.set_num_threads(args.threads)
    return (1, 3) if args.quick else (args.seeds, None)


def device(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        argparse.ArgumentTypeError: There is none.
    """
    try:
        found = torch.device(name)
    except RuntimeError as err:
        raise argparse.ArgumentTypeError(f"unknown device {name!r}") from err
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            "no GPU is present, or this torch is built without CUDA; without --device the same table is made on the CPU"
        )
    return found
