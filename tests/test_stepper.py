"""The stepper takes torchdiffeq's steps, and its written-out reverse pass gives torchdiffeq's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pycnf import CNF, TPR, Solver, objective
from pycnf.objective import Objective
from pycnf.solve import METHODS

ADAPTIVE = [name for name, method in METHODS.items() if method.kind == "adaptive"]
FIELDS = {
    "one hidden layer": {"hidden": (12,), "time": "none"},
    "two hidden layers": {"hidden": (12, 10)},
    "three hidden layers": {"hidden": (10, 12, 8)},
    "four hidden layers": {"hidden": (8, 8, 8, 8), "activation": "softplus"},
    "gated by time": {"hidden": (10, 8, 12), "time": "concatsquash"},
    "conditional": {"hidden": (10, 10, 10), "context": 2},
    "two probes": {"hidden": (10, 12), "divergence": "hutchinson-2"},
}


def differentiate(flow: CNF, solver: Solver, x: Tensor, context: Tensor | None) -> tuple[Objective, Tensor]:
    """Return the objective with TPR on both channels, and its gradient with respect to everything."""
    flow.solver = solver
    leaves = [*flow.parameters(), *((x,) if context is None else (x, context))]
    torch.manual_seed(1)
    result = objective(flow, x, context, [TPR(weight=3.0, channels="both")])
    gradients = torch.autograd.grad(result.loss, leaves)
    return result, torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("samples", ["dense", "exact"])
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("name", FIELDS)
def test_engines_agree(name: str, method: str, samples: str) -> None:
    torch.manual_seed(0)
    flow = CNF(2, blocks=2, **FIELDS[name]).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(2)
    x = (2 * torch.randn(20, 2)).double().requires_grad_()
    context = torch.randn(20, 2).double().requires_grad_() if flow.context else None
    found = {}
    for engine in ("torchdiffeq", "pycnf"):
        solver = Solver(method=method, rtol=1e-4, atol=1e-4, samples=samples, engine=engine)  # type: ignore[arg-type]
        found[engine] = differentiate(flow, solver, x, context)
    (theirs, their_gradient), (ours, our_gradient) = found["torchdiffeq"], found["pycnf"]
    for count in ("nfe", "accepted", "rejected"):
        assert getattr(ours.solution.stats, count) == getattr(theirs.solution.stats, count)
    assert ours.solution.stats.max_step == pytest.approx(theirs.solution.stats.max_step, rel=1e-7)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-11, rtol=1e-11)
    scale = float(their_gradient.abs().max())
    assert float((our_gradient - their_gradient).abs().max()) < 1e-10 * scale


@pytest.mark.parametrize("engine", ["pycnf", "torchdiffeq"])
def test_solves_run_backwards_as_well(engine: str) -> None:
    torch.manual_seed(0)
    flow = CNF(3, (12, 12, 12)).double()
    flow.solver = Solver(rtol=1e-9, atol=1e-9, engine=engine)  # type: ignore[arg-type]
    z = torch.randn(30, 3).double().requires_grad_()
    there = flow.solve(z, reverse=True)
    back = flow.solve(there.z)
    torch.testing.assert_close(back.z, z, atol=1e-7, rtol=0)
    torch.testing.assert_close(back.log_prob, there.log_prob, atol=1e-7, rtol=0)
    (gradient,) = torch.autograd.grad(back.z.sum(), z)
    torch.testing.assert_close(gradient, torch.ones_like(z), atol=1e-6, rtol=0)


class Borrowed(torch.nn.Module):
    """v = W z with a W that is no parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.weight.t()


@pytest.mark.parametrize("leaf", [True, False])
def test_gradients_are_never_lost_in_silence(leaf: bool) -> None:
    source = torch.randn(2, 2, requires_grad=True)
    flow = CNF(2, field=Borrowed(source if leaf else 2 * source))
    x = torch.randn(4, 2, requires_grad=True)
    with pytest.raises(ValueError, match="is no parameter of the field"):
        flow().log_prob(x)
    with pytest.raises(ValueError, match="is no parameter of the field"):
        flow().log_prob(x.detach())
    with torch.no_grad():
        assert flow().log_prob(x).isfinite().all()
