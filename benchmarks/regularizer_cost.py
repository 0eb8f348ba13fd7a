"""Measure what each regularizer adds to one training step: time, matrix products and memory.

All steps start from the same weights on the same batches, at the same tolerance and with the exact divergence; the
weights come from a short training without regularizer, so that the field is not trivial. Each round takes one step
with each regularizer in turn, and every time is divided by that of the plain step of its round.

    python benchmarks/regularizer_cost.py --output results/benchmarks/regularizer_cost.json
    python benchmarks/regularizer_cost.py --quick
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from roofline import counted
from step_time import CASES, Case, Steps, trained
from timing import add_device, interleave, parser, peak_megabytes, ratio, save

from pycnf.regularizers import parse_regularizers

SPECS = (
    "none",
    "tpr",
    "default",
    "error",
    "stiffness",
    "kinetic",
    "jacobian",
    "jacobian:exact=true",
    "derivative:order=2",
    "derivative:order=3",
    "derivative:order=5",
    "steer",
    "decay",
)
ROUNDS = {"moons": 21, "power": 9, "43d": 5}


def measure(case: Case, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Measure every regularizer on one case."""
    flow, draw = trained(case, device)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.0, fused=True)  # a rate of 0: all stay at the same weights
    terms = {spec: parse_regularizers(spec) for spec in SPECS}
    steps = {spec: Steps(flow, optimizer, terms[spec]) for spec in SPECS}
    evaluations: dict[str, list[int]] = {spec: [] for spec in SPECS}
    x = draw()

    def redraw() -> None:
        nonlocal x
        x = draw()

    def step(spec: str) -> Callable[[], None]:
        return lambda: evaluations[spec].append(steps[spec](x))

    work = {spec: step(spec) for spec in SPECS}
    seconds = interleave(work, rounds, prepare=redraw)
    flow.compiled = False  # torch counts its own products alone, and follows its own tensors
    counts = {spec: (counted(work[spec]) / 1e12, peak_megabytes(work[spec])) for spec in SPECS}
    rows = []
    for spec in SPECS:
        timed = ratio(seconds, "none", spec)
        rows.append(
            {
                "case": case.name,
                "regularizer": spec,
                "ms": timed["ms_against"],
                **{name: timed[name] for name in ("ratio", "ratio_min", "ratio_max")},
                "nfe": sum(evaluations[spec][-rounds:]) / rounds,
                "evaluations": sum(term.evaluations for term in terms[spec]),
                "teraflop": counts[spec][0],
                "peak_mb": counts[spec][1],
                "repeats": rounds,
            }
        )
    plain = rows[0]
    return [row | {f"{name}_ratio": row[name] / plain[name] for name in ("teraflop", "peak_mb")} for row in rows]


def describe(row: Mapping[str, Any]) -> str:
    """Write one row on one line."""
    calls = f"{row['nfe']:5.1f} + {row['evaluations']:2} calls"
    times = f"{row['ratio']:5.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
    more = f"products x {row['teraflop_ratio']:5.2f}, memory x {row['peak_mb_ratio']:.2f}"
    return f"{row['case']:6} {row['regularizer']:64} {row['ms']:9.1f} ms, {calls}; time x {times}, {more}"


def main() -> None:
    """Run the cases and print them."""
    options = parser(__doc__, "regularizer_cost")
    options.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    add_device(options)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    cases = [case for case in CASES if case.name in args.cases]
    if args.quick:
        cases = [dataclasses.replace(CASES[0], steps=20)]
    rows: list[dict[str, Any]] = []
    for case in cases:
        for row in measure(case, 3 if args.quick else ROUNDS[case.name], args.device):
            rows.append(row)
            print(describe(row), flush=True)
    save(args.output, "regularizer_cost", rows, at=args.device)


if __name__ == "__main__":
    main()
