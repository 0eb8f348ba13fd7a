"""Time one training step of pycnf against the classic recipe, interleaved in one run.

The classic recipe is what FFJORD and the official TPR code do: torchdiffeq's adjoint with its default norm on the
tuple (z, log p), the divergence by one vector-Jacobian product per dimension, time concatenated to the input of
every layer, and (with TPR) the sampled times as output times of the solve. Both sides take the same weights, batch,
tolerance, exact divergence and optimizer; the weights come from a short training, so that the field is not trivial.

    python benchmarks/step_time.py                # table, and results/benchmarks/step_time.json
    python benchmarks/step_time.py --json         # the list of ratios on stdout
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

import pycnf
from pycnf import records
from pycnf.flow import standard_normal_log_prob
from pycnf.regularizers.polynomial import polynomial_residual


@dataclass(frozen=True)
class Case:
    """Name one piece of work: architecture, data, horizon and how long to train before timing."""

    name: str
    features: int
    hidden: tuple[int, ...]
    activation: str
    batch: int
    T: float
    steps: int
    repeats: int


CASES = (
    Case("moons", 2, (64, 64, 64), "tanh", 100, 0.5, 1000, 21),
    Case("power", 6, (60, 60, 60), "tanh", 1000, 1.0, 200, 7),
    Case("43d", 43, (860, 860), "softplus", 1000, 1.0, 10, 2),
)
TOLERANCE = 1e-4


class ClassicField(nn.Module):
    """Evaluate (v, -div v) the classic way on the weights of a pycnf MLP."""

    def __init__(self, field: pycnf.MLP) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for layer in field.layers:
            linear = nn.Linear(layer.weight.shape[1] + 1, layer.weight.shape[0])
            with torch.no_grad():
                linear.weight.copy_(torch.cat([layer.time_weight.unsqueeze(1), layer.weight], dim=1))
                linear.bias.copy_(layer.bias)
            self.layers.append(linear)
        self.activation = {"tanh": torch.tanh, "softplus": nn.functional.softplus}[field.activation]
        self.calls = 0

    def forward(self, t: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.calls += 1
        with torch.enable_grad():
            z = states[0].requires_grad_(True)
            h = z
            for i, layer in enumerate(self.layers):
                h = layer(torch.cat([torch.ones_like(h[:, :1]) * t, h], dim=1))
                h = self.activation(h) if i < len(self.layers) - 1 else h
            div = torch.zeros_like(z[:, 0])
            for i in range(z.shape[1]):
                (row,) = torch.autograd.grad(h[:, i].sum(), z, create_graph=True)
                div = div + row[:, i]
        return h, -div.unsqueeze(1)


def classic_step(
    field: ClassicField, optimizer: torch.optim.Optimizer, x: Tensor, T: float, tpr: pycnf.TPR | None
) -> None:
    """Take one training step of the classic recipe."""
    inner = torch.empty(0) if tpr is None else tpr.sample_times() * T
    ts = torch.cat([torch.zeros(1), inner, torch.full((1,), T)]).float()
    optimizer.zero_grad()
    z, logp = odeint_adjoint(field, (x, torch.zeros(len(x), 1)), ts, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
    loss = -(standard_normal_log_prob(z[-1]) - logp[-1, :, 0]).mean()
    if tpr is not None:
        loss = loss + tpr.weight * polynomial_residual(ts, z, tpr.degree)
    loss.backward()
    optimizer.step()


def pycnf_step(flow: pycnf.CNF, optimizer: torch.optim.Optimizer, x: Tensor, tpr: pycnf.TPR | None) -> int:
    """Take one training step of pycnf and return its forward evaluations."""
    optimizer.zero_grad()
    result = pycnf.objective(flow, x, regularizers=tpr)
    result.loss.backward()
    optimizer.step()
    return result.solution.stats.nfe


def batches(case: Case) -> Callable[[], Tensor]:
    """Return a function that draws one batch of the case's data."""
    if case.name == "43d":
        folder = os.environ.get("PYCNF_DATA")
        if folder and (Path(folder) / "miniboone_head1523.npy").exists():
            import numpy as np

            rows = torch.as_tensor(np.load(Path(folder) / "miniboone_head1523.npy")).float()
            pool = ((rows - rows.mean(0)) / rows.std(0)).clamp(-4, 4)
        else:
            generator = torch.Generator().manual_seed(0)
            mix = torch.randn(43, 43, generator=generator) / 43**0.5
            pool = torch.randn(20_000, 43, generator=generator) @ mix
            pool = torch.tanh(2 * pool) * 1.5
    else:
        from pycnf import data

        pool = data.load(case.name).train
    return lambda: pool[torch.randint(len(pool), (case.batch,))]


def measure(case: Case, tpr: pycnf.TPR | None) -> dict[str, object]:
    """Train shortly, then time both steps in turn from the same weights."""
    torch.manual_seed(0)
    draw = batches(case)
    flow = pycnf.CNF(case.features, case.hidden, activation=case.activation, T=case.T)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)
    for _ in range(case.steps):
        pycnf_step(flow, optimizer, draw(), tpr)
    classic = ClassicField(flow.fields[0])  # type: ignore[arg-type]  # the shipped MLP
    classic_optimizer = torch.optim.Adam(classic.parameters(), lr=0.0, fused=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # both sides stay at the same weights
    x = draw()
    seconds: dict[str, list[float]] = {"classic": [], "pycnf": []}
    nfe = 0
    for repeat in range(-1, case.repeats):
        gc.collect()
        start = time.perf_counter()
        classic.calls = 0
        classic_step(classic, classic_optimizer, x, case.T, tpr)
        middle = time.perf_counter()
        nfe = pycnf_step(flow, optimizer, x, tpr)
        if repeat >= 0:  # the first pair warms up
            seconds["classic"].append(middle - start)
            seconds["pycnf"].append(time.perf_counter() - middle)
    ratios = [a / b for a, b in zip(seconds["classic"], seconds["pycnf"], strict=True)]
    return {
        "case": case.name,
        "against": "classic",
        "regularizer": "none" if tpr is None else str(tpr),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ms": 1e3 * statistics.median(seconds["pycnf"]),
        "ms_against": 1e3 * statistics.median(seconds["classic"]),
        "nfe": nfe,
        "calls_against": classic.calls,
        "repeats": case.repeats,
    }


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the list of ratios as JSON and nothing else")
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--output", type=Path, help="record to write, for example results/benchmarks/step_time.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in (c for c in CASES if c.name in args.cases):
        for tpr in (None, pycnf.TPR()):
            rows.append(row := measure(case, tpr))
            print(
                f"{row['case']:6} {row['regularizer']:13} classic {row['ms_against']:9.1f} ms"
                f" ({row['calls_against']} calls)"
                f"   pycnf {row['ms']:7.1f} ms ({row['nfe']} calls)"
                f"   ratio {row['ratio']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]",
                file=sys.stderr,
                flush=True,
            )
    if args.json:
        print(json.dumps(rows, indent=2))
    if args.output:
        records.write_json(args.output, records.run_record(name="step_time", seed=0, rows=rows))


if __name__ == "__main__":
    main()
