"""Compare the ways to the gradient of a training step: time, evaluations, memory and error, side by side.

All modes differentiate the same loss of the same weights on the same batch, with and without TPR at the same two
sampled times. The weights come from a short training without regularizer, so that the field is not trivial.

- Time is that of the loss and its backward pass, in rounds that take each mode in turn, divided by the time of
  backpropagation in the same round.
- Memory is the largest sum of the bytes of all tensors that a step holds at once, beyond those that were there before
  it; it does not depend on the machine. The tolerance varies, and with it the number of evaluations (NFE).
- The error of a gradient is its distance from that of dopri8 at 1e-9 in float64, whose samples are exact, relative to
  the latter's norm. That of backpropagation is the error of the solve alone.

    python benchmarks/gradient_modes.py --output results/benchmarks/gradient_modes.json
    python benchmarks/gradient_modes.py --quick
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from step_time import CASES, Case, trained
from timing import add_device, interleave, parser, peak_megabytes, ratio, save
from torch import Tensor

import pycnf

MODES: dict[str, dict[str, Any]] = {
    "backprop": {},
    "checkpoint": {"gradient": "checkpoint"},
    "adjoint": {"gradient": "adjoint"},
    "adjoint, full norm": {"gradient": "adjoint", "adjoint_norm": "full"},
    "torchdiffeq backprop": {"engine": "torchdiffeq"},
    "torchdiffeq adjoint": {"engine": "torchdiffeq", "gradient": "adjoint"},
}
TERMS: dict[str, list[pycnf.Regularizer]] = {"none": [], "tpr": [pycnf.TPR(times=2)]}
TOLERANCE = 1e-4
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
Row = dict[str, Any]


@dataclasses.dataclass
class Step:
    """Differentiate the loss of one flow on one batch."""

    flow: pycnf.CNF
    x: Tensor
    seed: int = 0

    def __call__(self, terms: list[pycnf.Regularizer], tolerance: float, **settings: Any) -> pycnf.SolveStats:
        """Leave the gradient in the parameters and return what it cost."""
        torch.manual_seed(self.seed)  # all modes meet the same sampled times
        self.flow.solver = pycnf.Solver(rtol=tolerance, atol=tolerance, **settings)
        self.flow.zero_grad()
        result = pycnf.objective(self.flow, self.x, regularizers=terms)
        result.loss.backward()
        return result.solution.stats

    @property
    def gradient(self) -> Tensor:
        """Gradient of the parameters as one vector in float64."""
        return torch.cat([p.grad.flatten() for p in self.flow.parameters() if p.grad is not None]).double()


def measure_times(case: Case, step: Step, draw: Callable[[], Tensor], name: str) -> list[Row]:
    """Time all modes in turn, on a new batch each round."""
    costs: dict[str, list[pycnf.SolveStats]] = {mode: [] for mode in MODES}

    def redraw() -> None:
        step.seed += 1
        torch.manual_seed(step.seed)
        step.x = draw()

    def work(mode: str) -> Callable[[], None]:
        return lambda: costs[mode].append(step(TERMS[name], TOLERANCE, **MODES[mode]))

    seconds = interleave({mode: work(mode) for mode in MODES}, case.repeats, prepare=redraw)
    return [
        {
            "case": case.name,
            "regularizer": name,
            "mode": mode,
            "ms": 1e3 * float(np.median(seconds[mode])),
            **{key: value for key, value in ratio(seconds, "backprop", mode).items() if key.startswith("ratio")},
            "nfe": float(np.mean([stats.nfe for stats in costs[mode]])),
            "nfe_backward": float(np.mean([stats.nfe_backward for stats in costs[mode]])),
            "rounds": case.repeats,
        }
        for mode in MODES
    ]


def measure_tolerances(case: Case, step: Step, name: str, tolerances: Iterable[float]) -> list[Row]:
    """Measure memory, evaluations and error of all modes at several tolerances."""
    exact = Step(copy.deepcopy(step.flow).double(), step.x.double(), step.seed)
    exact(TERMS[name], 1e-9, method="dopri8", samples="exact", gradient="checkpoint")
    truth, rows = exact.gradient, list[Row]()
    for tolerance in tolerances:
        for mode, settings in MODES.items():
            stats = pycnf.SolveStats()

            def work(tolerance: float = tolerance, settings: dict[str, Any] = settings) -> None:
                nonlocal stats
                stats = step(TERMS[name], tolerance, **settings)

            peak = peak_megabytes(work)
            rows.append(
                {
                    "case": case.name,
                    "regularizer": name,
                    "mode": mode,
                    "tolerance": tolerance,
                    "nfe": stats.nfe,
                    "nfe_backward": stats.nfe_backward,
                    "peak_mb": peak,
                    "error": float((step.gradient - truth).norm() / truth.norm()),
                }
            )
    return rows


def memory_growth(rows: list[Row]) -> list[Row]:
    """Fit a line to the peak memory over the forward evaluations: MB at none, and MB for each."""
    fits: list[Row] = []
    for keys in dict.fromkeys((row["case"], row["regularizer"], row["mode"]) for row in rows):
        own = [row for row in rows if (row["case"], row["regularizer"], row["mode"]) == keys]
        nfe, peaks = [row["nfe"] for row in own], [row["peak_mb"] for row in own]
        slope, start = np.polyfit(nfe, peaks, 1)
        fit = {"mb": float(start), "mb_per_nfe": float(slope), "growth": max(peaks) / min(peaks)}
        fits.append(dict(zip(("case", "regularizer", "mode"), keys, strict=True)) | fit | {"nfe": [min(nfe), max(nfe)]})
    return fits


def rule_of_thumb(times: list[Row], rows: list[Row], fits: list[Row]) -> list[str]:
    """Say in words what the rows support, over all cases and with and without TPR."""
    usual = [row for row in rows if row["tolerance"] == TOLERANCE]
    base = {(row["case"], row["regularizer"]): row for row in usual if row["mode"] == "backprop"}

    def beside(key: str, mode: str) -> list[float]:
        return [row[key] / base[row["case"], row["regularizer"]][key] for row in usual if row["mode"] == mode]

    time = {mode: [row["ratio"] for row in times if row["mode"] == mode] for mode in MODES}
    memory = {mode: beside("peak_mb", mode) for mode in MODES}
    lines = [f"At tolerance {TOLERANCE:g}, beside backpropagation through the steps:"]
    for mode in list(MODES)[1:]:
        error = spread(beside("error", mode))
        lines.append(f"- {mode}: time x {spread(time[mode])}, memory x {spread(memory[mode])}, error x {error}")
    for mode in ("adjoint", "torchdiffeq adjoint"):
        calls = {(row["case"], row["regularizer"]): row["nfe_backward"] for row in times if row["mode"] == mode}
        pairs = [(calls[case, "none"], calls[case, "tpr"]) for case, name in calls if name == "tpr"]
        more, part = spread([b - a for a, b in pairs]), spread([100 * (b / a - 1) for a, b in pairs])
        lines.append(f"- two sampled times add {more} backward evaluations, {part} %, to the {mode}")
    wider = spread([fit["nfe"][1] / fit["nfe"][0] for fit in fits])
    for mode in ("backprop", "checkpoint", "adjoint"):
        grown = spread([fit["growth"] for fit in fits if fit["mode"] == mode])
        lines.append(f"- over tolerances that span NFE x {wider}, the memory of {mode} grows x {grown}")
    lines.append("Rule of thumb: take the first whose memory suffices")
    for wish, modes in (
        ("the gradient of the loss as computed", ["backprop", "checkpoint"]),
        ("a gradient to tolerance", ["backprop", "checkpoint", "adjoint"]),
    ):
        front: list[str] = []
        for mode in sorted(modes, key=lambda mode: float(np.median(time[mode]))):
            if all(np.median(memory[mode]) < np.median(memory[faster]) for faster in front):
                front.append(mode)
        lines.append(f"- for {wish}: {', then '.join(front)}")
    return lines


def spread(values: list[float]) -> str:
    """Write the range of some numbers."""
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def describe(row: Mapping[str, Any]) -> str:
    """Write one row on one line."""
    head = (
        f"{row['case']:6} {row['regularizer']:5} {row['mode']:21} {row['nfe']:6.1f} + {row['nfe_backward']:6.1f} calls"
    )
    if "ms" in row:
        return f"{head} {row['ms']:9.1f} ms, time x {row['ratio']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
    return f"{head} at {row['tolerance']:.0e}: {row['peak_mb']:9.2f} MB, error {row['error']:.1e}"


def main() -> None:
    """Run the cases and print them."""
    options = parser(__doc__, "gradient_modes")
    options.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    add_device(options)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    cases, tolerances = [case for case in CASES if case.name in args.cases], TOLERANCES
    if args.quick:
        cases = [dataclasses.replace(case, steps=20, repeats=2) for case in cases if case.name == "moons"]
        tolerances = (1e-3, 1e-4, 1e-5)
    times: list[Row] = []
    rows: list[Row] = []
    for case in cases:
        flow, draw = trained(case, args.device)
        for name in TERMS:
            step = Step(flow, draw())
            for found, measured in (
                (times, measure_times(case, step, draw, name)),
                (rows, measure_tolerances(case, step, name, tolerances)),
            ):
                found += measured
                print("\n".join(map(describe, measured)), flush=True)
    fits = memory_growth(rows)
    rule = rule_of_thumb(times, rows, fits)
    print("\n".join(rule))
    save(args.output, "gradient_modes", times, at=args.device, tolerances=rows, memory=fits, rule=rule)


if __name__ == "__main__":
    main()
