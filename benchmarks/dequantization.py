"""Train flows of images with uniform and with variational noise in the cells, and record what each comes to.

    python benchmarks/dequantization.py --output results/benchmarks/dequantization.json
    python benchmarks/dequantization.py --quick

Both have the settings, steps, batches and seeds of an experiment in its small budget (pycnf experiment run mnist),
without a regularizer. Bits per dimension are those of test images, a mean over draws of the noise and over probes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from timing import add_experiment, parser, save, trainings

from pycnf.experiments import plan_experiment, train_and_test

KINDS = ("uniform", "variational")
MEASURES = (
    *("steps", "seconds", "parameters", "nll", "bits_per_dim", "bits_per_dim_se", "noise_se"),
    *("nfe_test", "nfe_train", "nfe_train_last_200"),
)


def run(name: str, kind: str, seed: int, max_steps: int | None) -> dict[str, Any]:
    """Train and test one flow."""
    quick = {} if max_steps is None else {"test_rows": 100, "sweep_rows": 100}
    plan = plan_experiment(name, dequantization=kind, max_steps=max_steps, **quick)
    ((data_name, settings),) = plan.data.items()
    data = plan.work.load(data_name, None)
    setup = plan.work.setup(data_name, settings | {"device": "cpu"}, data)
    with tempfile.TemporaryDirectory() as scratch:
        row = train_and_test(data, [], seed, setup, work=plan.work, folder=Path(scratch) / "run", progress=False)
    return {"data": data_name, "dequantization": kind, "seed": seed} | {key: row[key] for key in MEASURES}


def main() -> None:
    """Train all and print them."""
    options = parser(__doc__, "dequantization")
    add_experiment(options, "mnist", 1)
    args = options.parse_args()
    seeds, steps = trainings(args)
    rows = []
    for seed in range(seeds):
        for kind in KINDS:
            rows.append(run(args.name, kind, seed, steps))
            found = rows[-1]
            print(
                f"{kind:12} seed {seed}: {found['bits_per_dim']:.3f} ± {found['bits_per_dim_se']:.3f} bits/dim,"
                f" NFE {found['nfe_test']:.1f} in test, training {found['seconds']:.0f} s",
                flush=True,
                file=sys.stderr,
            )
    save(args.output, "dequantization", rows)


if __name__ == "__main__":
    main()
