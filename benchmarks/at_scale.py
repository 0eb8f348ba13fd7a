"""Measure log p of a million POWER rows: rows a second, memory, and the ratio to the classic recipe.

    python benchmarks/at_scale.py --output results/benchmarks/at_scale.json
    python benchmarks/at_scale.py --quick

The rows are drawn with replacement from the data, lie in a .npy file and are memory-mapped. pycnf solves them with
pycnf.scale in the given number of processes; how much memory that takes beyond what the process held before is read
from the operating system. The classic recipe (torchdiffeq on (z, log p), one vector-Jacobian product per dimension)
takes too long for all rows: in each round both take the same ten thousand of them in this process, which gives the
ratios, and its time for all rows is that time by proportion. All at tolerance 1e-5; pycnf in its batches of a thousand,
the classic recipe in the same, and in batches of ten thousand as the official scripts do.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from step_time import CASES, ClassicField, trained
from timing import interleave, parser, ratio, save
from torch import Tensor
from torchdiffeq import odeint

import pycnf
from pycnf import data, scale
from pycnf.flow import standard_normal_log_prob

ROWS, PART, BATCH, CLASSIC_BATCH, ROUNDS, TOLERANCE = 1_000_000, 10_000, 1_000, 10_000, 5, 1e-5


def write_rows(path: Path, count: int) -> None:
    """Write so many standardized POWER rows, drawn with replacement."""
    pool = data.load("power")
    rows = torch.cat([pool.train, pool.validation, pool.test]).numpy()
    np.save(path, rows[np.random.default_rng(0).integers(len(rows), size=count)])


def classic_log_prob(field: ClassicField, x: Tensor, T: float, batch: int) -> Tensor:
    """Return log p of rows by the classic recipe, in batches."""
    found = []
    with torch.no_grad():
        for part in x.split(batch):
            start, ts = (part, torch.zeros(len(part), 1)), torch.tensor([0.0, T])
            z, logp = odeint(field, start, ts, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
            found.append(standard_normal_log_prob(z[-1]) - logp[-1, :, 0])
    return torch.cat(found)


def megabytes(name: str) -> float:
    """Return VmRSS (memory held) or VmHWM (the most so far) of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {name} in /proc/self/status")


def memory_of(work: Callable[[], object]) -> float:
    """Return the most memory, in MB, that work held beyond what was held before, its processes included."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # lets VmHWM start anew
    before = megabytes("VmRSS")
    work()
    return megabytes("VmHWM") - before


def main() -> None:
    """Run both sides, and print what came out."""
    options = parser(__doc__, "at_scale")
    options.add_argument("--workers", type=int, help="processes of the full run; as many as threads if not given")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    workers = args.workers or args.threads
    count, part, rounds = (4_000, 1_000, 1) if args.quick else (ROWS, PART, ROUNDS)
    case = next(case for case in CASES if case.name == "power")
    flow, _ = trained(dataclasses.replace(case, steps=5 if args.quick else case.steps), torch.device("cpu"))
    classic = ClassicField(flow.fields[0])  # type: ignore[arg-type]  # the shipped MLP
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        write_rows(path, count)
        rows = torch.from_numpy(np.load(path, mmap_mode="r")[:part].copy())
        sides = {
            "classic": lambda: classic_log_prob(classic, rows, case.T, BATCH),
            "classic, large batch": lambda: classic_log_prob(classic, rows, case.T, CLASSIC_BATCH),
            "pycnf": lambda: scale.log_prob(flow, rows, batch_size=BATCH),
        }
        off = float((sides["classic"]() - sides["pycnf"]().values).abs().mean())  # type: ignore[operator,attr-defined]
        seconds = interleave(sides, rounds)
        full: list[scale.Batched] = []
        began = time.perf_counter()
        memory = memory_of(lambda: full.append(full_run(flow, path, workers)))
        took = time.perf_counter() - began
    processes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6 * workers if workers > 1 else 0.0
    table: list[dict[str, object]] = []
    for against, batch in (("classic", BATCH), ("classic, large batch", CLASSIC_BATCH)):
        paired, by_proportion = ratio(seconds, "pycnf", against), statistics.median(seconds[against]) / part * count
        table.append(
            {
                "case": case.name,
                "against": against,
                "rows": count,
                "workers": workers,
                "batch": BATCH,
                "batch_against": batch,
                "seconds": took,
                "rows_per_second": count / took,
                "nfe": full[0].stats.nfe / full[0].batches,
                "memory_mb": memory + processes,
                "seconds_against": by_proportion,
                "ratio_full": by_proportion / took,
                "rows_paired": part,
                **paired,
                "mean_difference": off,
                "rounds": rounds,
            }
        )
        print(
            f"{count:,} rows: {took:.1f} s in {workers} process(es), {count / took:,.0f} rows/s,"
            f" {memory + processes:,.0f} MB; {against} {by_proportion:,.0f} s by proportion, {by_proportion / took:.1f}"
            f" times that; the same {part:,} rows in one process: ratio {paired['ratio']:.1f}"
            f" [{paired['ratio_min']:.1f}, {paired['ratio_max']:.1f}]"
        )
    save(args.output, "at_scale", table)


def full_run(flow: pycnf.CNF, path: Path, workers: int) -> scale.Batched:
    """Compute log p of all rows of a file."""
    return scale.log_prob(flow, path, batch_size=BATCH, workers=workers, progress=True)


if __name__ == "__main__":
    main()
