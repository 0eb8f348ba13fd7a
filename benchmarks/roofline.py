"""Compare the floating-point operations a second of a training step with the machine's rate of matrix products.

    python benchmarks/roofline.py --output results/benchmarks/roofline.json
    python benchmarks/roofline.py --quick
    python benchmarks/roofline.py --device cuda --output results/benchmarks/roofline_gpu.json

The rate is that of torch.mm on square float32 matrices, the best of several sizes, measured in turn with the steps.
Operations are those of the matrix products, two for each multiplication with addition; torch's counter must agree
with the formula written here. What remains to the rate goes to activations, the solver's sums and Python, and in
compiled code also to what it evaluates again on the way back, which is not counted as work done.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from step_time import CASES, Case, Steps, trained
from timing import add_device, interleave, parser, save
from torch.utils.flop_counter import FlopCounterMode

import pycnf

CPU_SIZES, GPU_SIZES = (512, 1024, 2048), (2048, 4096, 8192)
LARGE = (
    Case("63d", 63, (1260, 1260, 1260), "tanh", 1000, 1.0, 2, 3, "hutchinson"),
    Case("63d exact", 63, (1260, 1260, 1260), "tanh", 100, 1.0, 2, 3),
)
GPU_BATCH = 10_000  # of the large cases on a GPU
AGREE = 0.01


@dataclass(frozen=True)
class Operations:
    """Count the operations of the matrix products of a training step by formula.

    Attributes:
        solve: What is formed once per solve, from the weights alone.
        evaluation: One evaluation of the field with its divergence.
    """

    solve: int
    evaluation: int

    def step(self, nfe: int, pulled: int) -> int:
        """Return those of a step: pulling a gradient back costs two products for each product."""
        return 3 * self.solve + (nfe + 2 * pulled) * self.evaluation


def operations(case: Case) -> Operations:
    """Return the operations of a case whose hidden layers are equally wide (:mod:`pycnf.tangents`)."""
    B, D, h, depth = case.batch, case.features, case.hidden[0], len(case.hidden)
    ends, inner = 4 * B * D * h, 2 * B * h * h * (depth - 1)
    if case.divergence == "hutchinson":  # one tangent beside the value; the probe meets first and last layer once
        return Operations(4 * B * D * h, ends + 2 * inner)
    if depth == 1:
        return Operations(0, ends)
    if depth == 2:  # one more product of a layer's size
        return Operations(2 * D * h * h, ends + 2 * inner)
    if depth == 3 and h <= B:  # tangents from below and cotangents from above, without a product of their own
        return Operations(0, ends + inner + 4 * B * D * h * h)
    return Operations(0, ends + (1 + D) * inner)  # D tangents beside the value


def counted(work: Callable[[], object]) -> int:
    """Return the operations of the matrix products that torch counts, those added in place among them."""

    def added(total: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
        work()
    return int(counter.get_total_flops())


def matrix_products(sizes: tuple[int, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    """Return products of square matrices to time."""
    made: dict[str, Callable[[], object]] = {}
    for size in sizes:
        a, b = torch.randn(2, size, size, device=device)
        made[f"mm {size}"] = lambda a=a, b=b: torch.mm(a, b)
    return made


def measure(case: Case, sizes: tuple[int, ...], device: torch.device) -> dict[str, object]:
    """Time training steps of a case and matrix products in turn.

    Raises:
        SystemExit: The counter and the formula differ.
    """
    flow, draw = trained(case, device)
    x = draw()
    stats = pycnf.objective(flow, x).solution.stats
    pulled = 6 * stats.accepted + 1  # the six new stages of each accepted step of dopri5, and the slope at the start
    step = Steps(flow, torch.optim.Adam(flow.parameters(), lr=0.0, fused=True), None, warm_start=False)
    flow.compiled = False  # torch counts its own products alone
    total, formula = counted(lambda: step(x)), operations(case).step(stats.nfe, pulled)
    flow.compiled = "auto"
    if abs(total - formula) > AGREE * total:
        sys.exit(f"{case.name}: torch counts {total:,} operations, the formula {formula:,}")
    products = matrix_products(sizes, device)
    seconds = interleave({"step": lambda: step(x), **products}, case.repeats)
    rates = {size: 2e-9 * size**3 / min(seconds[f"mm {size}"]) for size in sizes}
    median = statistics.median(seconds["step"])
    best = max(rates.values())
    return {
        "case": case.name,
        "batch": case.batch,
        "divergence": case.divergence,
        "nfe": stats.nfe,
        "gflop": 1e-9 * total,
        "gflop_formula": 1e-9 * formula,
        "ms": 1e3 * median,
        "gflop_per_second": 1e-9 * total / median,
        "matrix_gflop_per_second": best,
        "matrix_rates": {str(size): rate for size, rate in rates.items()},
        "share": 1e-9 * total / median / best,
        "share_min": 1e-9 * total / max(seconds["step"]) / best,
        "share_max": 1e-9 * total / min(seconds["step"]) / best,
        "rounds": case.repeats,
    }


def main() -> None:
    """Run the cases and print them."""
    options = parser(__doc__, "roofline")
    everything = (*CASES, *LARGE)
    names = [case.name for case in everything]
    options.add_argument("--cases", nargs="+", choices=names, default=names)
    add_device(options)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = args.device.type == "cuda"
    cases = [case for case in everything if case.name in args.cases]
    if on_gpu:
        cases = [dataclasses.replace(case, batch=GPU_BATCH) if case.name == "63d" else case for case in cases]
    if args.quick:
        cases = [dataclasses.replace(case, steps=1, repeats=1) for case in cases if case.name in ("moons", "power")]
    sizes = (GPU_SIZES if on_gpu else CPU_SIZES)[: 1 if args.quick else None]
    rows: list[dict[str, object]] = []
    for case in cases:
        rows.append(row := measure(case, sizes, args.device))
        print(
            f"{row['case']:10} {row['divergence']:10} batch {row['batch']:6} {row['gflop']:9.2f} GFLOP"
            f" {row['ms']:9.1f} ms {row['gflop_per_second']:8.1f} GFLOP/s of {row['matrix_gflop_per_second']:8.1f}"
            f" ({100 * row['share']:.0f} %)",  # type: ignore[operator]
            flush=True,
        )
    save(args.output, "roofline", rows, at=args.device)


if __name__ == "__main__":
    main()
