"""Measure what coarser matrix products do to log-densities and to the number of evaluations, tolerance by tolerance.

The flows come from a short training in float32. Each precision solves the same held-out states at every tolerance; the
error of a log-density is its distance from that of dopri8 at 1e-11 in float64. Below a tolerance of about the rounding
error the solver resolves the stairs that rounding makes of the field: evaluations multiply, and errors stay.

    python benchmarks/precision.py --output results/benchmarks/precision.json
    python benchmarks/precision.py --device cuda --output results/benchmarks/precision_gpu.json
    python benchmarks/precision.py --quick

TF32 is made by tensor cores: on a CPU its rows would be those of float32, and are left out.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

import torch
from step_time import CASES, trained
from timing import add_device, interleave, parser, save
from torch import Tensor

import pycnf

TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
TRUTH = pycnf.Solver(method="dopri8", rtol=1e-11, atol=1e-11)
STATES = 1000
Row = dict[str, Any]


def solve(flow: pycnf.CNF, x: Tensor, precision: str, tolerance: float) -> pycnf.FlowSolution:
    """Solve without gradients in one precision."""
    flow.precision = "float32" if precision == "float64" else precision
    flow, x = (copy.deepcopy(flow).double(), x.double()) if precision == "float64" else (flow, x)
    with torch.no_grad():
        return flow.solve(x, solver=pycnf.Solver(rtol=tolerance, atol=tolerance))


def measure(flow: pycnf.CNF, x: Tensor, name: str, repeats: int) -> list[Row]:
    """Solve in every precision at every tolerance."""
    precisions = ["float64", "float32", *(["tf32"] if x.device.type == "cuda" else []), "bfloat16"]
    with torch.no_grad():
        truth = copy.deepcopy(flow).double().solve(x.double(), solver=TRUTH).log_prob
    rows = []
    for tolerance in TOLERANCES:
        work = {p: lambda p=p: solve(flow, x, p, tolerance) for p in precisions}  # type: ignore[misc]  # noqa: B023
        seconds = interleave(work, repeats)
        for precision in precisions:
            solution = work[precision]()
            error = solution.log_prob.double() - truth
            row: Row = {
                "case": name,
                "precision": precision,
                "tolerance": tolerance,
                "nfe": solution.stats.nfe,
                "rejected": solution.stats.rejected,
                "error_rms": error.square().mean().sqrt().item(),
                "error_mean": error.mean().item(),
                "ms": 1e3 * sorted(seconds[precision])[repeats // 2],
            }
            print(
                f"{name:6} {precision:9} tolerance {tolerance:.0e}   {row['nfe']:4} evaluations   error of log p: "
                f"{row['error_rms']:.1e} nats, of its mean {row['error_mean']:+.1e}   {row['ms']:8.1f} ms",
                file=sys.stderr,
                flush=True,
            )
            rows.append(row)
    return rows


def main() -> None:
    """Run the cases and print them."""
    made = parser(__doc__, "precision")
    add_device(made)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in CASES[:2]:
        case = dataclasses.replace(case, batch=50 if args.quick else STATES, steps=10 if args.quick else case.steps)
        flow, draw = trained(case, args.device)
        rows += measure(flow.eval(), draw(), case.name, 1 if args.quick else 5)
    save(args.output, "precision", rows, at=args.device)


if __name__ == "__main__":
    main()
