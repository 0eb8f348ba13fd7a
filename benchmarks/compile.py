"""Compare ways to compile: time of each, what compiling takes, and after how many training steps it has paid.

- "eager" is what pycnf.tangents writes out, one call of torch after another.
- "native" is pycnf's own code, compiled by the C++ compiler of the machine (pycnf.native).
- "torch.compile" takes one evaluation of a perceptron and its pullback (pycnf.compiled.Traced).
- "torch.compile, whole step" takes all stages of a dopri5 step with its error norm, and its reverse pass.

Three pieces of work, each in turn with all ways that there are to it: one evaluation with its pullback, equal steps of
dopri5 with their reverse passes, and training steps as fit takes them. Compiling is timed from empty caches.

    python benchmarks/compile.py --output results/benchmarks/compile.json
    python benchmarks/compile.py --quick
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_time import CASES, Case, Steps, trained
from timing import interleave, parser, ratio, save
from torch import Tensor

import pycnf
from pycnf import native
from pycnf.compiled import Compiled, Traced
from pycnf.divergence import Exact
from pycnf.joint import channel_norm, joint_dynamics
from pycnf.tableau import tableau
from pycnf.tangents import OnePass

TOLERANCE, EQUAL = 1e-4, 5  # tolerance of training steps, and how many equal steps are timed
Row = dict[str, Any]


class WholeStep:
    """Take dopri5 steps of equal size and their reverse passes, each compiled as one graph."""

    def __init__(self, bound: OnePass, features: int) -> None:
        self.form, self.tensors = bound.form, [tensor.detach() for tensor in bound.prepared]
        self.norm, tab = channel_norm(features), tableau("dopri5")
        self.nodes, self.rows = tab.c.tolist(), tab.rows.tolist()
        self.forward = torch.compile(self.step, fullgraph=True)
        self.backward = torch.compile(self.pull, fullgraph=True)

    def step(self, t: Tensor, h: Tensor, y: Tensor, slope: Tensor, tensors: list[Tensor]) -> Any:
        """Return the solution, its slope, the norm of the error over the tolerance, and what the reverse pass needs."""
        slopes, kept, stage = [slope], [], y
        for c, row in zip(self.nodes, self.rows, strict=False):
            stage = y + sum((h * w).to(y) * k for w, k in zip(row, slopes, strict=False) if w)
            v, div, saved = self.form.forward((t + c * h).to(y), stage[:, :-1], tensors)
            slopes.append(torch.cat([v, -div.unsqueeze(1)], dim=1))
            kept.append([stage, *saved])
        error = sum((h * w).to(y) * k for w, k in zip(self.rows[-1], slopes, strict=True) if w)
        scale = TOLERANCE * (1 + torch.maximum(y.abs(), stage.abs()))
        return stage, slopes[-1], self.norm(error / scale), kept

    def pull(self, t: Tensor, h: Tensor, kept: Any, gy: Tensor, gslope: Tensor, tensors: list[Tensor]) -> Any:
        """Return the gradients of the state, the slope and the tensors."""
        grads, total = [torch.zeros_like(x) for x in tensors], torch.zeros_like(gy)
        gslopes = [*([torch.zeros_like(gy)] * len(kept)), gslope]
        for i in range(len(kept), 0, -1):
            (stage, *saved), g, time = kept[i - 1], gslopes[i], (t + self.nodes[i - 1] * h).to(gy)
            gz = self.form.backward(time, stage[:, :-1], tensors, saved, g[:, :-1], -g[:, -1], grads)
            gstage = torch.nn.functional.pad(gz, (0, 1)) + (gy if i == len(kept) else 0)
            total = total + gstage
            for j, w in enumerate(self.rows[i - 1]):
                if w:
                    gslopes[j] = gslopes[j] + (h * w).to(gy) * gstage
        return total, gslopes[0], grads

    def __call__(self, y: Tensor, end: float) -> None:
        """Carry y to the end and a gradient back."""
        h, kept = torch.tensor(end / EQUAL, dtype=torch.float64), []
        with torch.no_grad():
            v, div, _ = self.form.forward(y.new_zeros(()), y[:, :-1], self.tensors)
            slope, times = torch.cat([v, -div.unsqueeze(1)], dim=1), [i * h for i in range(EQUAL)]
            for t in times:
                y, slope, norm, saved = self.forward(t, h, y, slope, self.tensors)
                kept.append(saved)
                float(norm)
            gy, gslope = torch.ones_like(y), torch.zeros_like(y)
            for t, saved in zip(reversed(times), reversed(kept), strict=True):
                gy, gslope, _ = self.backward(t, h, saved, gy, gslope, self.tensors)


def evaluation(way: Compiled, y: Tensor) -> None:
    """Evaluate once and pull a gradient back."""
    t = y.new_full((), 0.3)
    with torch.no_grad():
        way.forward(t, y)
        way.backward(t, y, torch.ones_like(y), [torch.zeros_like(tensor) for tensor in way.prepared])


class Eager:
    """Evaluate as pycnf.tangents does, in the form of compiled code."""

    def __init__(self, bound: OnePass) -> None:
        self.prepared, self.dynamics = bound.prepared, joint_dynamics(bound)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        value, self.pull = self.dynamics.linearize(t, y)  # type: ignore[attr-defined]
        return value

    def backward(self, t: Tensor, y: Tensor, g: Tensor, grads: list[Tensor]) -> Tensor:
        return self.pull(g, grads)


def equal_steps(bound: OnePass, y: Tensor, end: float, *, compile: bool) -> Callable[[], None]:
    """Return a function that takes equal steps with pycnf's own stepper, and their reverse passes."""
    dynamics, h = joint_dynamics(bound, compile=compile), end / EQUAL
    solver = pycnf.Solver(rtol=TOLERANCE, atol=TOLERANCE, first_step=h, min_step=h, max_step=h)
    start, norm = y.clone().requires_grad_(), channel_norm(y.shape[1] - 1)

    def work() -> None:
        _, ys, _ = solver.integrate(dynamics, start, 0.0, end, norm=norm, tensors=bound.tensors)
        ys[-1].sum().backward(retain_graph=True)

    return work


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long the first call of a piece of work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(case: Case, rounds: int, build: float, *, traced: bool) -> list[Row]:
    """Time all pieces of work of a case; ``build`` are the seconds that the native code took to compile."""
    flow, draw = trained(case, torch.device("cpu"))
    x = draw()
    bound = Exact().bind(flow.fields[0], x, None)
    assert isinstance(bound, OnePass)
    y, code = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1), native.load()
    assert code is not None
    one: dict[str, Callable[[], None]] = {}
    for name, way in {"eager": Eager(bound), "native": native.Native(bound, code)}.items():
        one[name] = lambda way=way: evaluation(way, y)  # type: ignore[misc]
    steps = {name: equal_steps(bound, y, case.T, compile=name == "native") for name in ("eager", "native")}
    spent = {"native": build}
    if traced:
        lazy, whole = Traced(bound), WholeStep(bound, case.features)
        one["torch.compile"] = lambda: evaluation(lazy, y)
        steps["torch.compile, whole step"] = lambda: whole(y, case.T)
        spent["torch.compile"] = seconds_of(one["torch.compile"])
        spent["torch.compile, whole step"] = seconds_of(steps["torch.compile, whole step"])
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.0, fused=True)
    nfe: dict[str, int] = {}

    def train(name: str, tpr: pycnf.TPR | None) -> Callable[[], None]:
        stepping = Steps(flow, optimizer, tpr)

        def work() -> None:
            flow.compiled = name == "native"
            nfe[name] = stepping(x)

        return work

    pieces = {"evaluation and pullback": (one, 4 * rounds), f"{EQUAL} steps and back": (steps, rounds)}
    for label, tpr in (("training step", None), ("training step, TPR", pycnf.TPR())):
        pieces[label] = {name: train(name, tpr) for name in ("eager", "native")}, rounds
    gc.freeze()  # the rounds collect garbage, and what compiling leaves behind would be looked through each time
    rows = []
    for label, (ways, repeats) in pieces.items():
        seconds = interleave(ways, repeats, warm_up=2)
        for name in ways:
            if name == "eager":
                continue
            row: Row = {"case": case.name, "work": label, "way": name, "against": "eager"}
            row |= ratio(seconds, name, "eager") | {"compile_s": spent[name], "repeats": repeats}
            saved = (row["ms_against"] - row["ms"]) / 1e3
            if label.startswith("training"):
                row |= {"nfe": nfe[name], "pays_after": spent[name] / saved if saved > 0 else None}
            print(
                f"{case.name:6} {label:24} {name:26} {row['ms_against']:8.2f} -> {row['ms']:8.2f} ms   ratio "
                f"{row['ratio']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]   compiled: {spent[name]:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            rows.append(row)
    return rows


def main() -> None:
    """Run the cases and print them."""
    made = parser(__doc__, "compile")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        build = seconds_of(lambda: native.build(Path(folder)))
        rows = []
        for case in CASES[:2]:
            rows += measure(case, 3 if args.quick else 3 * case.repeats, build, traced=not args.quick)
    save(args.output, "compile", rows)


if __name__ == "__main__":
    main()
