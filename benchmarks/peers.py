"""Time training steps and log-densities of pycnf and of other libraries on the same work, interleaved in one run.

    python -m venv peers-env
    peers-env/bin/pip install --editable ".[bench]"     # zuko, torchdyn, torchode, diffrax, optax
    peers-env/bin/python benchmarks/peers.py --output results/benchmarks/peers.json
    peers-env/bin/python benchmarks/peers.py --quick

All start from the same weights, which come from a short training, at the same tolerance with the exact divergence; how
each is used is told in benchmarks/peer_flows.py. Before anything is timed, log p of each at tolerance 1e-6 and its
gradient must agree with those of pycnf in float64 at 1e-9, on a hundred rows. Since tolerance is not accuracy, the
error of log p at the timed tolerance on these rows stands beside the time. Everything is done once before it is timed,
so that compilation, where there is one, does not count; how long it took is recorded.

A CPU build of torch and the torchvision that torchdyn brings along may not fit: uninstall torchvision then.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator

import torch
from peer_flows import SIDES, Counts, Side
from step_time import CASES, Case, batches, trained
from timing import Seconds, interleave, parser, ratio, save
from torch import Tensor

import pycnf

TRAINING, TEST = 1e-4, 1e-5
CHECK, CHECKED = 1e-6, 100  # tolerance of the check and number of rows
AGREE = 2e-3  # how far log p and the relative gradient may be off there
ROUNDS = {"moons": 11, "power": 5, "43d": 1}
TOO_LARGE = {"43d": ("torchdyn",)}  # its graph of 43 products an evaluation, kept over a solve, takes more than 10 GB


def reference(flow: pycnf.CNF, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p and the gradient of the loss in float64 at tolerance 1e-9."""
    exact = pycnf.CNF(**flow.config | {"solver": pycnf.Solver(method="dopri8", rtol=1e-9, atol=1e-9)}).double()
    exact.load_state_dict(flow.state_dict())
    found = pycnf.objective(exact, x.double())
    found.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    return found.solution.log_prob.detach(), gradient


def check(name: str, flow: pycnf.CNF, x: Tensor, truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return how far a side is off at a tight tolerance.

    Raises:
        SystemExit: Further than rounding and tolerance explain.
    """
    side = SIDES[name](flow, CHECK)
    off = float((side.log_prob(x).double() - truth[0]).abs().max())
    side.step(x)
    gradient = float((side.gradient().double() - truth[1]).norm() / truth[1].norm())
    if max(off, gradient) > AGREE:
        sys.exit(f"{name} computes something else: log p is off by {off:.1e}, the gradient by {gradient:.1e}")
    return {"check_log_prob": off, "check_gradient": gradient}


class Timed:
    """Let the sides work on the same batch in turn, and keep what each counted."""

    def __init__(self, sides: dict[str, Side], case: Case) -> None:
        self.sides, self.draw, self.counts = sides, batches(case), dict[str, Counts]()
        self.redraw()

    def redraw(self) -> None:
        self.x = self.draw()

    def run(self, method: str, rounds: int) -> Seconds:
        """Time a method of all sides."""

        def work(name: str) -> None:
            getattr(self.sides[name], method)(self.x)
            self.counts[name] = self.sides[name].counts

        works = {name: lambda name=name: work(name) for name in self.sides}
        return interleave(works, rounds, prepare=self.redraw, warm_up=0)


def measure(case: Case, names: list[str]) -> list[dict[str, object]]:
    """Check all sides, then time them."""
    flow, draw = trained(case, torch.device("cpu"))
    x = draw()[:CHECKED]
    truth = reference(flow, x)
    checks = {name: check(name, flow, x, truth) for name in names}
    rows: list[dict[str, object]] = []
    for method, tolerance in (("step", TRAINING), ("log_prob", TEST)):
        sides = {name: SIDES[name](flow, tolerance) for name in names}
        errors = {name: (side.log_prob(x).double() - truth[0]).abs() for name, side in sides.items()}
        timed = Timed(sides, case)
        firsts = {name: first_call(side, method, timed.x) for name, side in sides.items()}
        seconds = timed.run(method, case.repeats)
        for name in names:
            rows.append(
                {
                    "case": case.name,
                    "work": {"step": "training step", "log_prob": "log p"}[method],
                    "against": name,
                    "tolerance": tolerance,
                    **ratio(seconds, "pycnf", name),
                    "nfe": timed.counts["pycnf"],
                    "nfe_against": timed.counts[name],
                    "error_mean": errors[name].mean(),
                    "error_max": errors[name].max(),
                    "first_seconds": firsts[name],
                    "rounds": case.repeats,
                    **checks[name],
                }
            )
    return rows


def first_call(side: Side, method: str, x: Tensor) -> float:
    """Do the work for the first time, with the compilation it may bring, and return the seconds."""
    began = time.perf_counter()
    getattr(side, method)(x)
    return time.perf_counter() - began


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep this process, and every thread that it starts, on so many cores: XLA has no other bound."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def say(row: dict[str, object]) -> None:
    """Print a row."""
    counts = "+".join(str(count) for count in row["nfe_against"].values())  # type: ignore[union-attr]
    print(
        f"{row['case']:6} {row['work']:13} {row['against']:18} {row['ms_against']:9.1f} ms ({counts:>7} calls,"
        f" error of log p {row['error_mean']:.0e}, at most {row['error_max']:.0e})"
        f"   over pycnf {row['ratio']:6.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]",
        flush=True,
    )


def parse() -> argparse.Namespace:
    """Read the options."""
    options = parser(__doc__, "peers")
    options.add_argument("--cases", nargs="+", choices=list(ROUNDS), default=list(ROUNDS))
    options.add_argument("--peers", nargs="+", choices=list(SIDES)[1:], default=list(SIDES)[1:])
    return options.parse_args()


def main() -> None:
    """Run the cases and print them."""
    args = parse()
    torch.set_num_threads(args.threads)
    cases = [dataclasses.replace(case, repeats=ROUNDS[case.name]) for case in CASES if case.name in args.cases]
    if args.quick:
        cases = [dataclasses.replace(case, steps=20, repeats=1) for case in cases if case.name != "43d"]
    rows: list[dict[str, object]] = []
    with on_cores(args.threads):
        for case in cases:
            able = [peer for peer in args.peers if peer not in TOO_LARGE.get(case.name, ())]
            for row in measure(case, ["pycnf", *able]):
                rows.append(row)
                say(row)
    save(args.output, "peers", rows, versions=versions(args.peers))


def versions(peers: list[str]) -> dict[str, str]:
    """Return the versions of what took part."""
    from importlib import metadata

    from pycnf.records import versions as usual

    packages = {peer.partition(",")[0] for peer in peers} | ({"jax", "optax"} if "diffrax" in peers else set())
    return usual() | {name: metadata.version(name) for name in sorted(packages)}


if __name__ == "__main__":
    main()
