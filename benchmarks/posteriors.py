"""Train auto-encoders with the classic posteriors beside the flow's, and record bound and likelihood of each.

    python benchmarks/posteriors.py --output results/benchmarks/posteriors.json
    python benchmarks/posteriors.py --quick

Gaussian, planar and inverse autoregressive posteriors take encoder, decoder, steps, batches and learning rate of the
preset of the set in its small budget (pycnf experiment run vae-caltech), whose posterior is a continuous flow. The
importance-weighted likelihood does not depend on how tight the bound is that was trained.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from timing import add_experiment, parser, save, trainings

from pycnf.experiments.autoencoders import AutoEncoders
from pycnf.experiments.reproduction import plan_experiment
from pycnf.experiments.workloads import seeded
from pycnf.vae import VAE, evaluate_vae, importance_likelihood

POSTERIORS: dict[str, dict[str, Any]] = {
    "gaussian": {"kind": "gaussian"},
    "planar, 16 maps": {"kind": "planar", "maps": 16},
    "iaf": {"kind": "iaf"},
    "cnf": {},
}
MEASURES = ("nll", "importance_nll", "seconds")


def run(name: str, posterior: str, seed: int, max_steps: int | None) -> dict[str, Any]:
    """Train and test one auto-encoder."""
    plan = plan_experiment(name, max_steps=max_steps)
    work = plan.work
    if not isinstance(work, AutoEncoders):
        sys.exit(f"{name} is no auto-encoder: take one that pycnf experiment list calls a vae")
    ((data_name, settings),) = plan.data.items()
    data = work.load(data_name, None)
    setup = work.setup(data_name, settings, data)
    if posterior == "cnf":
        vae = work.build(data, setup, seed)
    else:
        shape: dict[str, Any] = {"networks": work.networks, "widths": work.widths, "pixels": work.pixels}
        chosen = POSTERIORS[posterior]
        vae = seeded(lambda: VAE(data.shape, latent=work.latent, posterior=chosen, **shape), seed)
    fitted = work.fit(vae, data, setup, seed=seed, device="cpu", progress=False)
    torch.manual_seed(0)
    bound = evaluate_vae(vae, data.test, batch_size=setup.test_batch_size)
    weighted = importance_likelihood(vae, data.test[: work.importance_rows], samples=work.importance_samples)
    return {
        "data": data_name,
        "posterior": posterior,
        "seed": seed,
        "steps": fitted.steps,
        "seconds": fitted.seconds,
        "nll": bound.nll,
        "nll_se": bound.nll_se,
        "importance_nll": weighted.nll,
        "importance_nll_se": weighted.nll_se,
        "importance_bound": weighted.bound,
        "importance_rows": weighted.rows,
        "importance_samples": weighted.samples,
        "effective": weighted.effective,
        "parameters": sum(p.numel() for p in vae.parameters()),
    }


def main() -> None:
    """Train all and print them."""
    options = parser(__doc__, "posteriors")
    add_experiment(options, "vae-caltech", 3)
    args = options.parse_args()
    seeds, steps = trainings(args)
    rows = []
    for posterior in POSTERIORS:
        found = [run(args.name, posterior, seed, steps) for seed in range(seeds)]
        means = {name: statistics.fmean(row[name] for row in found) for name in MEASURES}
        print(
            f"{posterior:16} bound {means['nll']:8.3f}   importance-weighted {means['importance_nll']:8.3f}"
            f"   training {means['seconds']:6.1f} s",
            flush=True,
            file=sys.stderr,
        )
        rows += found
    save(args.output, "posteriors", rows)


if __name__ == "__main__":
    main()
