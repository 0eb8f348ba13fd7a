"""Truths about learned noise: its density, the bound that it gives, and flows that are trained with it."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pycnf import ConvNet, objective
from pycnf.data import DataError
from pycnf.experiments import Images, Setup, plan_experiment
from pycnf.images import ImageFlow, VariationalNoise, bits_per_dim, dequantize, load
from pycnf.training import fit, load_flow, save_flow

FINE = {"rtol": 1e-9, "atol": 1e-9}


def learned(shape: tuple[int, int, int], layers: int = 2, levels: int = 256, seed: int = 0) -> VariationalNoise:
    """Noise in float64 that is far from uniform, as if it were trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        noise = VariationalNoise(shape, (6, 6), layers, levels=levels).double()
        for net in noise.nets:
            for parameter in last(net):
                torch.nn.init.normal_(parameter, std=0.1)
    return noise


def last(net: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters of the last convolution, which start at zero."""
    assert isinstance(net, ConvNet)
    return list(net.layers[-1].parameters())


def make(shape: tuple[int, int, int] = (1, 4, 4), dequantization: str = "variational", **options: object) -> ImageFlow:
    settings = {"hidden": (4,), "depth": 1, "scales": 1, "alpha": 0.05, "eval_divergence": "exact", **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageFlow(shape, dequantization=dequantization, **settings).double().eval()  # type: ignore[arg-type]


def levels(rows: int, features: int = 16, top: int = 256) -> Tensor:
    return torch.randint(0, top, (rows, features)).double()


def logistic(*shape: int) -> Tensor:
    return torch.logit(torch.rand(*shape).double())


# --- the noise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 2, 3), (1, 1, 1)])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_density_of_the_noise_is_that_of_its_map(shape: tuple[int, int, int], layers: int) -> None:
    noise, d = learned(shape, layers), math.prod(shape)
    x, v = levels(1, d), logistic(1, d)
    u, log_q = noise.carry(x, v)
    J = torch.autograd.functional.jacobian(lambda v: noise.carry(x, v[None])[0][0], v[0])
    start = torch.distributions.TransformedDistribution(
        torch.distributions.Uniform(torch.zeros(d).double(), 1.0),
        [torch.distributions.transforms.SigmoidTransform().inv],
    )
    want = start.log_prob(v[0]).sum() - torch.linalg.slogdet(J).logabsdet
    torch.testing.assert_close(log_q[0], want, atol=1e-10, rtol=1e-10)
    assert u.shape == (1, d)


def test_noise_lies_in_the_cube_and_depends_on_the_image() -> None:
    noise, x = learned((1, 4, 4)), levels(500)
    u, log_q = noise(x)
    assert (u.shape, log_q.shape) == ((500, 16), (500,))
    assert float(u.detach().min()) > 0
    assert float(u.detach().max()) < 1
    v = logistic(1, 16)
    (one, _), (other, _) = noise.carry(x[:1], v), noise.carry(255 - x[:1], v)
    assert float((one - other).detach().abs().max()) > 0.01
    one_row, log_one = noise(x[0])
    assert (one_row.shape, log_one.shape) == ((16,), ())


@pytest.mark.parametrize("x", [0.0, 3.0, 7.0])
def test_the_density_of_the_noise_of_one_pixel_has_mass_one(x: float) -> None:
    noise = learned((1, 1, 1), levels=8)
    v = torch.linspace(-40, 40, 20_001).double()[:, None]
    with torch.no_grad():
        u, log_q = noise.carry(torch.full_like(v, x), v)
        mass = torch.trapezoid(log_q.exp(), u[:, 0])
    assert float(u.min()) < 1e-6
    assert float(u.max()) > 1 - 1e-6
    assert float(mass) == pytest.approx(1, abs=1e-4)


def test_untrained_noise_is_uniform() -> None:
    noise, x = VariationalNoise((1, 4, 4), (8,)), levels(2000).float()
    u, log_q = noise(x)
    assert torch.equal(log_q, torch.zeros(2000))
    n = u.numel()
    assert abs(float(u.detach().double().mean()) - 0.5) <= 5 * math.sqrt(1 / 12 / n)
    assert abs(float(u.detach().double().var()) - 1 / 12) <= 5 * math.sqrt(1 / 180 / n)


def test_the_two_colors_of_the_checkerboard_take_turns() -> None:
    noise = learned((2, 3, 3), layers=3)
    first, second, third = noise.moved.view(3, 2, 3, 3)
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert torch.equal(first[0], torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool())
    assert torch.equal(first[0], first[1])


def test_noise_keeps_to_its_cell_and_carries_gradients() -> None:
    x, u = torch.tensor([0.0, 254.0, 255.0]), torch.tensor([1.0, 1.0, 0.25], requires_grad=True)
    noisy = dequantize(x, u)
    assert torch.equal(noisy.detach().floor(), x)
    noisy.sum().backward()
    assert u.grad is not None
    assert float(u.grad[2]) == 1


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="expected layers >= 1, got 0"):
        VariationalNoise((1, 4, 4), layers=0)


# --- the bound ---------------------------------------------------------------------------------


def test_the_bound_is_one_and_many_samples_tighten_it() -> None:
    """One pixel of four levels, whose probabilities are integrals that can be computed."""
    flow = make((1, 1, 1), levels=4, eval_solver=FINE)
    bare = make((1, 1, 1), "none", levels=4, eval_solver=FINE)
    bare.load_state_dict({k: v for k, v in flow.state_dict().items() if not k.startswith("noise.")})
    flow.noise = learned((1, 1, 1), levels=4)
    rows, points = 4000, 2000
    with torch.no_grad():
        edges = (torch.arange(points).double() + 0.5) / points
        for level in range(4):
            P = bare().log_prob(level + edges[:, None]).exp().mean()
            torch.manual_seed(level)
            bounds = flow().log_prob(torch.full((rows, 1), float(level)).double())
            error = float(bounds.std()) / math.sqrt(rows)
            assert float(bounds.mean()) < float(P.log()) - 3 * error, "a bound, and this noise leaves a gap"
            weights = bounds.exp()
            assert abs(float(weights.mean() - P)) < 5 * float(weights.std()) / math.sqrt(rows), "weights are unbiased"
            ten = torch.logsumexp(bounds.view(-1, 10), 1) - math.log(10)
            assert float(bounds.mean()) < float(ten.mean()) < float(P.log()) + 3 * error


def test_a_solve_is_that_of_its_continuous_levels_less_the_density_of_the_noise() -> None:
    flow, bare, x = make(eval_solver=FINE), make(dequantization="none", eval_solver=FINE), levels(5)
    flow.noise = learned((1, 4, 4))
    with torch.no_grad():
        solution = flow.solve(x)
        assert torch.equal(solution.start.floor(), x)  # type: ignore[attr-defined]
        log_q = solution.log_q  # type: ignore[attr-defined]
        torch.testing.assert_close(bare().log_prob(solution.start) - log_q, solution.log_prob)  # type: ignore[attr-defined]
        torch.manual_seed(2)
        u, want = flow.noise(x)
        torch.manual_seed(2)
        again = flow.solve(x)
        assert torch.equal(again.start, dequantize(x, u))  # type: ignore[attr-defined]
        assert torch.equal(again.log_q, want)  # type: ignore[attr-defined]
        back = flow.solve(solution.z, reverse=True)
        torch.testing.assert_close(back.log_prob, solution.log_prob + log_q, atol=1e-5, rtol=1e-6)
    samples = flow().sample((3,))
    assert torch.equal(samples, samples.floor())


def test_flows_begin_alike_whatever_their_noise() -> None:
    """The same weights of the fields come from the same seed."""
    flow, uniform = make(), make(dequantization="uniform")
    assert {k for k in flow.state_dict() if not k.startswith("noise.")} == set(uniform.state_dict())
    assert all(torch.equal(value, flow.state_dict()[name]) for name, value in uniform.state_dict().items())
    assert uniform.noise is None


def test_a_flow_with_learned_noise_is_written_read_and_copied(tmp_path: Path) -> None:
    flow = make((3, 4, 4), hidden=(5,), kernel=5, activation="tanh", levels=32)
    assert flow.noise is not None
    for parameter in flow.noise.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert flow.config["dequantization"] == "variational"
    save_flow(flow, tmp_path)
    x, found = levels(3, 48, 32), []
    for one in (flow, load_flow(tmp_path), copy.deepcopy(flow)):
        torch.manual_seed(5)
        found.append(one().log_prob(x))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert {tuple(net.get_parameter("layers.0.weight").shape) for net in flow.noise.nets} == {(5, 6, 5, 5)}
    assert flow().log_prob(x[0]).shape == ()


def test_noise_that_is_not_there_is_told() -> None:
    flow = make(dequantization="uniform")
    flow.dequantization = "variational"
    with pytest.raises(ValueError, match="build it with dequantization='variational'"):
        flow().log_prob(levels(2))
    flow = make()
    with pytest.raises(ValueError, match="expected whole levels"):
        flow().log_prob(levels(2) + 0.5)
    flow.dequantization = "none"
    assert torch.equal(flow.solve(levels(1) + 0.5).log_q, torch.zeros(1).double())  # type: ignore[attr-defined]


# --- training ----------------------------------------------------------------------------------


def test_gradients_reach_the_noise() -> None:
    flow = make().train()
    objective(flow, levels(6)).loss.backward()
    assert flow.noise is not None
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for net in flow.noise.nets for p in last(net))
    assert all(p.grad is not None for p in flow.parameters())


def test_noise_learns_what_the_flow_cannot() -> None:
    """A fixed flow of one pixel whose density within a cell is far from even: the gap of the bound closes."""
    flow = make((1, 1, 1), levels=2, alpha=1e-3, eval_solver={"rtol": 1e-5, "atol": 1e-5})
    assert flow.noise is not None
    x = levels(500, 1, 2)
    optimizer = torch.optim.Adam(flow.noise.parameters(), lr=0.02)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = -flow().log_prob(x).mean()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    with torch.no_grad():
        flow.dequantization = "none"
        edges = (torch.arange(2000).double() + 0.5) / 2000
        best = -sum(flow().log_prob(k + edges[:, None]).exp().mean().log() * (x == k).double().mean() for k in (0, 1))
    assert history[0] - float(best) > 0.1
    assert sum(history[-5:]) / 5 - float(best) < 0.3 * (history[0] - float(best))


def test_it_trains_on_digits() -> None:
    if "PYCNF_DATA" not in os.environ:
        pytest.skip("PYCNF_DATA is not set")
    try:
        digits = load("mnist").shrink(2)
    except DataError as err:
        pytest.skip(str(err))
    work = Images(dequantization="variational")
    setup = Setup(hidden=(8,), activation="softplus", batch_size=50, divergence="hutchinson-rademacher")
    flow = work.build(digits, setup, seed=0)
    x = digits.rows("train")[:500]
    result = fit(flow, x, None, max_steps=15, batch_size=50, lr=5e-3, seed=0, device="cpu", progress=False)
    nll = [row["nll"] for row in result.rows("train")]
    assert bits_per_dim(sum(nll[-3:]) / 3, 196) < bits_per_dim(nll[0], 196) - 0.3
    assert flow.noise is not None
    assert all(bool((p.detach() != 0).any()) for net in flow.noise.nets for p in last(net)), "the noise has moved, too"


# --- experiments -------------------------------------------------------------------------------


def test_records_tell_of_learned_noise_and_only_of_that() -> None:
    assert "dequantization" not in Images().describe()["workload"], "as in records that are there"
    assert Images(dequantization="variational").describe()["workload"]["dequantization"] == "variational"
    json.dumps(Images(dequantization="variational").describe())
    with pytest.raises(ValueError, match="unknown dequantization 'none': choose uniform or variational"):
        Images(dequantization="none")


def test_a_preset_takes_the_setting(tmp_path: Path) -> None:
    if "PYCNF_DATA" not in os.environ:
        pytest.skip("PYCNF_DATA is not set")
    try:
        plan = plan_experiment("mnist", dequantization="variational")
    except DataError as err:
        pytest.skip(str(err))
    assert plan.work.dequantization == "variational"  # type: ignore[attr-defined]
