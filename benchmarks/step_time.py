"""Time one training step of pycnf against the classic recipe and against torchdiffeq's engine, interleaved in one run.

The classic recipe is what FFJORD and the official TPR code do: torchdiffeq's adjoint with its default norm on the
tuple (z, log p), the divergence by one vector-Jacobian product per dimension, time concatenated to the input of
every layer, and (with TPR) the sampled times as output times of the solve. All sides take the same weights, batches,
tolerance, exact divergence and optimizer; the weights come from a short training, so that the field is not trivial.
pycnf steps as fit does: a solve starts with the step that the one before suggests.

The second comparison is between engines alone: torchdiffeq steps through the very field that pycnf evaluates in one
pass, and pycnf chooses its first step anew as torchdiffeq does, so that both take the same steps.

    python benchmarks/step_time.py --output results/benchmarks/step_time.json
    python benchmarks/step_time.py --json       # the list of ratios on stdout, and nothing else there
    python benchmarks/step_time.py --quick
    python benchmarks/step_time.py --device cuda --output results/benchmarks/step_time_gpu.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import add_device, interleave, parser, peak_megabytes, ratio, save
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

import pycnf
from pycnf.flow import standard_normal_log_prob
from pycnf.regularizers.polynomial import polynomial_residual


@dataclass(frozen=True)
class Case:
    """Name one piece of work: architecture, data, horizon, how long to train before timing, and how often to time."""

    name: str
    features: int
    hidden: tuple[int, ...]
    activation: str
    batch: int
    T: float
    steps: int
    repeats: int
    divergence: str = "exact"


CASES = (
    Case("moons", 2, (64, 64, 64), "tanh", 100, 0.5, 1000, 21),
    Case("power", 6, (60, 60, 60), "tanh", 1000, 1.0, 200, 7),
    Case("43d", 43, (860, 860), "softplus", 1000, 1.0, 10, 2),
)
TOLERANCE = 1e-4
COMPARED = (  # sides of a comparison, and its name
    ("pycnf", "classic", "classic"),
    ("same steps", "classic", "classic, no warm start"),
    ("same steps", "engine", "torchdiffeq engine"),
)


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
    ts = torch.cat([torch.zeros(1), inner, torch.full((1,), T)]).to(x)
    optimizer.zero_grad()
    z, logp = odeint_adjoint(field, (x, x.new_zeros(len(x), 1)), ts, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
    loss = -(standard_normal_log_prob(z[-1]) - logp[-1, :, 0]).mean()
    if tpr is not None:
        loss = loss + tpr.weight * polynomial_residual(ts, z, tpr.degree)
    loss.backward()
    optimizer.step()


def pycnf_step(flow: pycnf.CNF, optimizer: torch.optim.Optimizer, x: Tensor, tpr: pycnf.TPR | None) -> int:
    """Take one training step of pycnf and return its forward evaluations."""
    return Steps(flow, optimizer, tpr, warm_start=False)(x)


class Steps:
    """Take training steps of pycnf as fit does."""

    def __init__(
        self, flow: pycnf.CNF, optimizer: torch.optim.Optimizer, tpr: pycnf.TPR | None, *, warm_start: bool = True
    ) -> None:
        self.flow, self.optimizer, self.tpr, self.warm_start = flow, optimizer, tpr, warm_start
        self.openings: tuple[float, ...] | None = None

    def __call__(self, x: Tensor) -> int:
        """Take a step and return its forward evaluations."""
        self.optimizer.zero_grad()
        result = pycnf.objective(self.flow, x, regularizers=self.tpr, first_steps=self.openings)
        result.loss.backward()
        self.optimizer.step()
        self.openings = result.solution.openings if self.warm_start else None
        return result.solution.stats.nfe


def batches(case: Case) -> Callable[[], Tensor]:
    """Return a function that draws one batch of the case's data."""
    if case.name in ("moons", "power"):
        from pycnf import data

        pool = data.load(case.name).train
    elif case.name == "43d" and (rows := miniboone()) is not None:
        pool = rows
    else:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(case.features, case.features, generator=generator) / case.features**0.5
        pool = torch.randn(20_000, case.features, generator=generator) @ mix
        pool = torch.tanh(2 * pool) * 1.5
    return lambda: pool[torch.randint(len(pool), (case.batch,))]


def miniboone() -> Tensor | None:
    """Return rows of MINIBOONE where they are at hand."""
    path = Path(os.environ.get("PYCNF_DATA", "")) / "miniboone_head1523.npy"
    if not path.is_file():
        return None
    import numpy as np

    rows = torch.as_tensor(np.load(path)).float()
    return ((rows - rows.mean(0)) / rows.std(0)).clamp(-4, 4)


def trained(case: Case, device: torch.device, tpr: pycnf.TPR | None = None) -> tuple[pycnf.CNF, Callable[[], Tensor]]:
    """Return a flow after a short training, and a function that draws batches, both on a device."""
    torch.manual_seed(0)
    rows = batches(case)
    flow = pycnf.CNF(case.features, case.hidden, activation=case.activation, T=case.T, divergence=case.divergence).to(
        device
    )
    step = Steps(flow, torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True), tpr)
    for _ in range(case.steps):
        step(rows().to(device))
    return flow, lambda: rows().to(device)


def measure(case: Case, tpr: pycnf.TPR | None, device: torch.device) -> list[dict[str, object]]:
    """Time the steps of all sides in turn, from the same weights on the same batches."""
    flow, draw = trained(case, device, tpr)
    engine = pycnf.CNF(**flow.config | {"solver": dataclasses.replace(flow.solver, engine="torchdiffeq")}).to(device)
    engine.load_state_dict(flow.state_dict())
    classic = ClassicField(flow.fields[0]).to(device)  # type: ignore[arg-type]  # the shipped MLP
    optimizers = {  # a rate of 0: all stay at the same weights
        name: torch.optim.Adam(module.parameters(), lr=0.0, fused=True)
        for name, module in (("pycnf", flow), ("engine", engine), ("classic", classic))
    }
    x, calls = draw(), dict[str, int]()
    steps = {
        "pycnf": Steps(flow, optimizers["pycnf"], tpr),
        "same steps": Steps(flow, optimizers["pycnf"], tpr, warm_start=False),
        "engine": Steps(engine, optimizers["engine"], tpr, warm_start=False),
    }

    def redraw() -> None:
        nonlocal x
        x = draw()

    def ours(name: str) -> Callable[[], None]:
        def work() -> None:
            calls[name] = steps[name](x)

        return work

    def theirs() -> None:
        classic.calls = 0
        classic_step(classic, optimizers["classic"], x, case.T, tpr)
        calls["classic"] = classic.calls

    work = {"classic": theirs, **{name: ours(name) for name in steps}}
    seconds = interleave(work, case.repeats, prepare=redraw)
    peaks = {name: peak_megabytes(work[name]) for name in work}
    return [
        {
            "case": case.name,
            "against": label,
            "regularizer": "none" if tpr is None else str(tpr),
            **ratio(seconds, name, against),
            "nfe": calls[name],
            "calls_against": calls[against],
            "peak_mb": peaks[name],
            "peak_mb_against": peaks[against],
            "repeats": case.repeats,
        }
        for name, against, label in COMPARED
    ]


def main() -> None:
    """Run the cases and print them."""
    options = parser(__doc__, "step_time")
    options.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES])
    options.add_argument("--json", action="store_true", help="print the list of ratios as JSON and nothing else")
    add_device(options)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    cases = [case for case in CASES if case.name in args.cases]
    if args.quick:
        cases = [dataclasses.replace(case, steps=2, repeats=1) for case in cases if case.name != "43d"]
    rows: list[dict[str, object]] = []
    for case in cases:
        for tpr in (None, pycnf.TPR()):
            for row in measure(case, tpr, args.device):
                rows.append(row)
                print(
                    f"{row['case']:6} {row['regularizer']:13} {row['against']:18} {row['ms_against']:9.1f} ms"
                    f" ({row['calls_against']:3} calls, {row['peak_mb_against']:7.1f} MB)   pycnf {row['ms']:7.1f} ms"
                    f" ({row['nfe']:2} calls, {row['peak_mb']:7.1f} MB)"
                    f"   ratio {row['ratio']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]",
                    file=sys.stderr,
                    flush=True,
                )
    if args.json:
        print(json.dumps(rows, indent=2))
    save(args.output, "step_time", rows, at=args.device)


if __name__ == "__main__":
    main()
