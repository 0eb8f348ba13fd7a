"""Measure how the time of pycnf grows with the dimension, with the batch, and with the number of evaluations.

    python benchmarks/scaling.py --output results/benchmarks/scaling.json      # and scaling.svg beside it
    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py --device cuda --output results/benchmarks/scaling_gpu.json

- dimension: a training step on 200 rows with a 3×64 net, exact divergence and Hutchinson's estimate, D = 2 ... 1,000;
- batch: a training step, the same with checkpoints, and log p in one solve, on the POWER net (6-d, 3×60);
- evaluations: a training step on moons (2-d, 3×64, batch 100) after a short training, over tolerances.

All series of a group take turns at each point, three times or, where that takes long, once and without a look at their
memory. A series ends where its next point would, by proportion, take more time or memory than it is given.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from step_time import CASES, Steps, trained
from timing import add_device, interleave, parser, peak_megabytes, save
from torch import Tensor

import pycnf
from pycnf.records import read_json

DIMENSIONS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)
BATCHES = (100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SLOW, LONGEST, LARGEST = 1e3, 9e4, 8e3  # milliseconds of a piece of work, likewise, megabytes of its tensors


@dataclass
class Series:
    """Follow one curve of a group.

    Attributes:
        name: What it shows.
        make: From a point to the work to time, which returns its forward evaluations.
    """

    name: str
    make: Callable[[float], Callable[[], int]]
    points: list[dict[str, float | None]] = field(default_factory=list)
    ms: float = 0.0
    megabytes: float = 0.0
    open: bool = True

    def expect(self, growth: float) -> None:
        """Expect so many times the time and memory of the last point at the next, and end where they run out."""
        self.ms, self.megabytes = growth * self.ms, growth * self.megabytes
        self.open = self.open and self.ms < LONGEST and self.megabytes < LARGEST

    def add(self, x: float, seconds: Sequence[float], nfe: int, megabytes: float | None) -> None:
        """Add a point; memory that was not measured is as expected."""
        ms = [1e3 * value for value in seconds]
        self.ms, self.megabytes = statistics.median(ms), self.megabytes if megabytes is None else megabytes
        spread = {"ms": self.ms, "ms_min": min(ms), "ms_max": max(ms)}
        self.points.append({"x": x, **spread, "nfe": nfe, "peak_mb": megabytes})


class Counted:
    """Do a piece of work and keep the evaluations that it took."""

    def __init__(self, work: Callable[[], int]) -> None:
        self.work, self.nfe = work, 0

    def __call__(self) -> None:
        self.nfe = self.work()


def follow(group: str, series: Sequence[Series], xs: Sequence[float], rounds: int, *, proportional: bool) -> None:
    """Time all series of a group at each point in turn."""
    last = xs[0]
    for x in xs:
        for one in series:
            one.expect(x / last if proportional else 1.0)
        last, taking_part = x, [one for one in series if one.open]
        work = {one.name: Counted(one.make(x)) for one in taking_part}
        slow = any(one.ms > SLOW for one in taking_part)
        seconds = interleave(work, 1 if slow else rounds, warm_up=0 if slow else 1) if work else {}
        for one in taking_part:
            megabytes = None if slow else peak_megabytes(work[one.name])
            one.add(x, seconds[one.name], work[one.name].nfe, megabytes)
            print(f"{group:12} {one.name:28} {x:12g} {one.ms:10.1f} ms, {work[one.name].nfe:3} calls", flush=True)


def training(flow: pycnf.CNF, x: Tensor) -> Callable[[], int]:
    """Return a training step at fixed weights on one batch."""
    step = Steps(flow, torch.optim.Adam(flow.parameters(), lr=0.0, fused=True), None)
    return lambda: step(x)


def density(flow: pycnf.CNF, x: Tensor) -> Callable[[], int]:
    """Return the computation of log p in one solve."""

    def work() -> int:
        flow.eval()
        with torch.no_grad():
            solution = flow.solve(x)
        flow.train()
        return solution.stats.nfe

    return work


def normal(rows: float, features: int, device: torch.device) -> Tensor:
    """Return standard normal rows."""
    return torch.randn(int(rows), features, generator=torch.Generator().manual_seed(1)).to(device)


def variant(flow: pycnf.CNF, device: torch.device, **solver: object) -> pycnf.CNF:
    """Return the same flow with another solver in training."""
    made = pycnf.CNF(**flow.config | {"solver": dataclasses.replace(flow.solver, **solver)}).to(device)  # type: ignore[arg-type]
    made.load_state_dict(flow.state_dict())
    return made


def dimensions(device: torch.device) -> list[Series]:
    """Return the series over dimensions."""

    def make(divergence: str) -> Callable[[float], Callable[[], int]]:
        def at(features: float) -> Callable[[], int]:
            torch.manual_seed(0)
            flow = pycnf.CNF(int(features), (64, 64, 64), divergence=divergence).to(device)
            return training(flow, normal(200, int(features), device))

        return at

    return [Series("exact", make("exact")), Series("hutchinson", make("hutchinson"))]


def batch_sizes(device: torch.device, steps: int) -> list[Series]:
    """Return the series over batches."""
    case = next(case for case in CASES if case.name == "power")
    flow, draw = trained(dataclasses.replace(case, steps=steps), device)
    pool = torch.cat([draw() for _ in range(50)])

    def rows(count: float) -> Tensor:
        return pool[torch.randint(len(pool), (int(count),))]

    sparing = variant(flow, device, gradient="checkpoint")
    return [
        Series("training step", lambda count: training(flow, rows(count))),
        Series("training step, checkpoints", lambda count: training(sparing, rows(count))),
        Series("log p", lambda count: density(flow, rows(count))),
    ]


def evaluations(device: torch.device, steps: int) -> list[Series]:
    """Return the series over tolerances."""
    case = next(case for case in CASES if case.name == "moons")
    flow, draw = trained(dataclasses.replace(case, steps=steps), device)
    x = draw()
    return [Series("training step", lambda tol: training(variant(flow, device, rtol=tol, atol=tol), x))]


def draw_figure(groups: dict[str, list[dict[str, object]]], path: object) -> None:
    """Draw a panel for each group."""
    from pycnf.plots import COLORS, MARKERS, house_figure, save_figure

    with house_figure(3, None) as (figure, panels):
        for axes, (name, curves) in zip(panels, groups.items(), strict=True):
            for curve, color, marker in zip(curves, COLORS, MARKERS, strict=False):
                points: list[dict[str, float]] = curve["points"]  # type: ignore[assignment]
                x = [point["nfe" if name == "evaluations" else "x"] for point in points]
                axes.plot(x, [point["ms"] for point in points], marker=marker, color=color, ms=4, label=curve["name"])
            label = {"evaluations": "evaluations of a solve", "batch": "rows of a batch"}.get(name, name)
            scale = "linear" if name == "evaluations" else "log"
            axes.set(xscale=scale, yscale=scale, xlabel=label, ylabel="time (ms)")
            axes.legend()
    save_figure(figure, path)  # type: ignore[arg-type]


def main() -> None:
    """Measure all groups, and write the record and its figure."""
    options = parser(__doc__, "scaling")
    add_device(options)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rounds, cut = (1, 2) if args.quick else (3, None)
    plan = {
        "dimension": (dimensions(args.device), DIMENSIONS[:cut], True),
        "batch": (batch_sizes(args.device, 2 if args.quick else 200), BATCHES[:cut], True),
        "evaluations": (evaluations(args.device, 2 if args.quick else 1000), TOLERANCES[:cut], False),
    }
    groups: dict[str, list[dict[str, object]]] = {}
    for name, (series, xs, proportional) in plan.items():
        follow(name, series, xs, rounds, proportional=proportional)
        groups[name] = [{"name": one.name, "points": one.points} for one in series]
    save(args.output, "scaling", groups, at=args.device, rounds=rounds)
    if args.output:
        draw_figure(read_json(args.output)["rows"], args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
