"""Measure whether batches of rows of like difficulty save evaluations, and what they do to the error of log p.

    python benchmarks/ordering.py --output results/benchmarks/ordering.json
    python benchmarks/ordering.py --quick

Rows in the order in which they come, against rows sorted by pycnf.scale (order="difficulty"), at two tolerances, in
float64. The evaluations of the sorted run include those of the look at all rows that comes before; errors are those
against a solve at tolerance 1e-10.
"""

from __future__ import annotations

import dataclasses

import torch
from step_time import CASES, Case, trained
from timing import interleave, parser, ratio, save

import pycnf
from pycnf import scale

ROWS, ROUNDS, TRUTH = 10_000, 3, pycnf.Solver(method="dopri8", rtol=1e-10, atol=1e-10)
TOLERANCES = (1e-5, 1e-7)


def measure(case: Case, count: int, rounds: int) -> list[dict[str, object]]:
    """Compare the two orders on a case."""
    flow, draw = trained(case, torch.device("cpu"))
    flow.double()
    x = torch.cat([draw() for _ in range(-(-count // case.batch))])[:count].double()
    truth = scale.log_prob(flow, x, solver=TRUTH).values
    rows: list[dict[str, object]] = []
    for tolerance in TOLERANCES:
        solver, found = pycnf.Solver(rtol=tolerance, atol=tolerance), dict[str, scale.Batched]()

        def work(order: scale.Order, solver: pycnf.Solver = solver, found: dict[str, scale.Batched] = found) -> None:
            found[order] = scale.log_prob(flow, x, solver=solver, order=order)

        seconds = interleave({"given": lambda: work("given"), "difficulty": lambda: work("difficulty")}, rounds)
        row: dict[str, object] = {"case": case.name, "rows": count, "tolerance": tolerance, "rounds": rounds}
        row |= ratio(seconds, "difficulty", "given")
        for suffix, order in (("", "difficulty"), ("_against", "given")):
            error = (found[order].values - truth).abs()
            row[f"nfe{suffix}"] = found[order].stats.nfe / found[order].batches
            row[f"error_mean{suffix}"], row[f"error_max{suffix}"] = error.mean(), error.max()
            row[f"error_99{suffix}"] = error.quantile(0.99)
        rows.append(row)
        print(
            f"{case.name:6} {tolerance:.0e}  given: {row['nfe_against']:6.1f} evaluations a row, error"
            f" {row['error_mean_against']:.1e}, 99 % below {row['error_99_against']:.1e}   by difficulty:"
            f" {row['nfe']:6.1f}, {row['error_mean']:.1e}, {row['error_99']:.1e}   time {1 / row['ratio']:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Run the cases and print them."""
    args = parser(__doc__, "ordering").parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    for case in (case for case in CASES if case.name != "43d"):
        if args.quick:
            rows += measure(dataclasses.replace(case, steps=5), 2000, 1)
        else:
            rows += measure(dataclasses.replace(case, steps=2000), ROWS, ROUNDS)
    save(args.output, "ordering", rows)


if __name__ == "__main__":
    main()
