"""Truths about flows of images: the volume of every piece, densities of levels, and a CNF's whole interface."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from torch import Tensor

import pycnf
from pycnf.convolution import ConvNet
from pycnf.flow import CNF, standard_normal_log_prob
from pycnf.images import ImageFlow, Logit, bits_per_dim, dequantize, interpolate, squeeze, unsqueeze
from pycnf.images.stages import decode, encode, plan
from pycnf.objective import objective
from pycnf.plots_images import image_grid, interpolation_grid, sample_grid
from pycnf.regularizers import TPR

SHAPES = [(1, 4, 4), (3, 4, 4)]
FINE = {"rtol": 1e-9, "atol": 1e-9}


def make(shape: tuple[int, int, int] = (1, 4, 4), seed: int = 0, **options: object) -> ImageFlow:
    """A flow in float64 and evaluation mode, by default small, exact and of two scales."""
    settings = {"hidden": (4, 4), "depth": 1, "scales": 2, "alpha": 0.05, "eval_divergence": "exact", **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ImageFlow(shape, **settings).double().eval()  # type: ignore[arg-type]


def levels(rows: int, features: int = 16) -> Tensor:
    return torch.randint(0, 256, (rows, features)).double()


def jacobian(x: Tensor, y: Tensor) -> Tensor:
    """Jacobian of one row, from as many copies of it, each pulled back along one unit vector."""
    (rows,) = torch.autograd.grad((y * torch.eye(x.shape[1]).to(y)).sum(), x)
    return rows


def copies(x: Tensor) -> Tensor:
    return x.expand(x.shape[-1], -1).clone().requires_grad_()


# --- pieces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_squeeze_is_a_permutation_that_is_undone(shape: tuple[int, int, int]) -> None:
    x = torch.randn(5, math.prod(shape)).double()
    y = squeeze(x, shape)
    assert torch.equal(unsqueeze(y, shape), x)
    one = copies(x[:1])
    J = jacobian(one, squeeze(one, shape))
    assert torch.equal(J.sum(0), torch.ones_like(J[0]))
    assert torch.equal(J.sum(1), torch.ones_like(J[0]))
    assert torch.equal(torch.linalg.slogdet(J).logabsdet, torch.zeros(()).double())


def test_the_squeeze_turns_squares_into_channels() -> None:
    image = torch.arange(16.0).view(1, 4, 4)
    small = squeeze(image.view(1, 16), (1, 4, 4)).view(4, 2, 2)
    for (i, j), (r, c) in itertools.product(itertools.product(range(2), repeat=2), repeat=2):
        assert small[2 * r + c, i, j] == image[0, 2 * i + r, 2 * j + c]


@pytest.mark.parametrize("alpha", [1e-6, 0.05])
def test_the_volume_of_the_logit_is_that_of_its_jacobian(alpha: float) -> None:
    logit, x = Logit(256, alpha), copies(256 * torch.rand(1, 6).double())
    y, volume = logit.forward(x)
    want = torch.linalg.slogdet(jacobian(x, y)).logabsdet
    torch.testing.assert_close(volume[0], want, atol=1e-10, rtol=1e-10)
    back, undone = logit.inverse(y)
    torch.testing.assert_close(back, x, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(undone, -volume, atol=1e-9, rtol=1e-9)
    p = alpha + (1 - 2 * alpha) * x.detach() / 256
    torch.testing.assert_close(y.detach(), torch.logit(p), atol=1e-9, rtol=1e-9)


def test_the_logit_of_the_extremes_is_precise_in_float32() -> None:
    logit = Logit(256, 1e-6)
    x = torch.tensor([0.0, 1e-3, 255.0, 255.99997, 256.0])
    for single, double in zip(logit.forward(x), logit.forward(x.double()), strict=True):
        torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=1e-5)


def test_noise_stays_in_the_cell_of_a_level() -> None:
    x = torch.tensor([0.0, 254.0, 255.0]).repeat(50_000)
    noisy = dequantize(x)
    assert torch.equal(noisy.floor(), x)
    u = (noisy - x).double()
    n = len(u)
    assert abs(float(u.mean()) - 0.5) <= 5 * math.sqrt(1 / 12 / n)
    assert abs(float(u.var()) - 1 / 12) <= 5 * math.sqrt(1 / 180 / n)


def test_bits_of_uniform_levels_are_the_logarithm_of_their_number() -> None:
    assert bits_per_dim(12 * math.log(256), 12) == pytest.approx(8)
    torch.testing.assert_close(bits_per_dim(torch.full((3,), math.log(2)), 1), torch.ones(3))


@pytest.mark.parametrize(
    ("shape", "scales", "want"),
    [
        ((1, 28, 28), None, [(1, 28, 28), (4, 14, 14), (2, 14, 14), (8, 7, 7), (4, 7, 7)]),
        ((3, 32, 32), None, [(3, 32, 32), (12, 16, 16), (6, 16, 16), (24, 8, 8), (12, 8, 8), (48, 4, 4), (24, 4, 4)]),
        ((1, 4, 4), None, [(1, 4, 4)]),
        ((1, 28, 20), None, [(1, 28, 20), (4, 14, 10), (2, 14, 10), (8, 7, 5), (4, 7, 5)]),
        ((1, 4, 4), 2, [(1, 4, 4), (4, 2, 2), (2, 2, 2)]),
        ((3, 5, 7), 1, [(3, 5, 7)]),
    ],
)
def test_stages(shape: tuple[int, int, int], scales: int | None, want: list[tuple[int, int, int]]) -> None:
    stages = plan(shape, scales)
    assert [stage.shape for stage in stages] == want
    assert [stage.then for stage in stages] == ["squeeze", "split"] * (len(want) // 2) + ["end"]


def test_what_leaves_comes_back() -> None:
    stages, x = plan((1, 8, 8), 3), torch.randn(2, 3, 64)
    seen: list[int] = []

    def move(number: int, y: Tensor) -> Tensor:
        assert y.shape[-1] == math.prod(stages[number].shape)
        seen.append(number)
        return y + number

    z = encode(stages, x, move)
    assert seen == [0, 1, 2, 3, 4]
    back = decode(stages, z, lambda number, y: y - number)
    torch.testing.assert_close(back, x)
    plain = encode(stages, x, lambda _, y: y)
    assert torch.equal(plain.sort(-1).values, x.sort(-1).values), "without blocks the latent is a permutation"
    half = squeeze(x, (1, 8, 8))[..., 32:]
    assert torch.equal(plain[..., :32], half), "half of the channels leave at the first scale"


# --- densities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_density_is_that_of_the_whole_map(shape: tuple[int, int, int]) -> None:
    flow = make(shape, dequantization="none", eval_solver=FINE)
    x = copies(256 * torch.rand(1, flow.features).double())
    solution = flow.solve(x)
    want = standard_normal_log_prob(solution.z[0]) + torch.linalg.slogdet(jacobian(x, solution.z)).logabsdet
    torch.testing.assert_close(solution.log_prob[0], want, atol=1e-6, rtol=1e-7)
    with torch.no_grad():
        back = flow.solve(solution.z[:1].detach(), reverse=True)
    torch.testing.assert_close(back.z[0], x[0].detach(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(back.log_prob[0], solution.log_prob[0].detach(), atol=1e-5, rtol=1e-6)


def test_the_density_of_one_pixel_has_mass_one() -> None:
    flow = make((1, 1, 1), scales=1, levels=4, alpha=1e-6, dequantization="none", eval_solver=FINE)
    edges = torch.linspace(0, 4, 4001).double()
    with torch.no_grad():
        density = flow().log_prob(((edges[1:] + edges[:-1]) / 2)[:, None]).exp()
    assert float(density.sum()) * 4 / 4000 == pytest.approx(1, abs=1e-3)


def test_levels_have_the_density_of_levels_with_noise() -> None:
    noisy, bare = make(), make(dequantization="none")
    x = levels(6)
    with torch.no_grad():
        torch.manual_seed(3)
        got = noisy().log_prob(x)
        torch.manual_seed(3)
        y = dequantize(x)
        want = bare().log_prob(y)
        other = noisy().log_prob(x)
    assert torch.equal(got, want)
    assert not torch.equal(got, other), "the noise is drawn anew"


def test_samples_are_levels() -> None:
    flow = make(levels=16, alpha=1e-6)
    x = flow().sample((3, 5))
    assert x.shape == (3, 5, 16)
    assert torch.equal(x, x.floor())
    assert x.min() >= 0
    assert x.max() <= 15
    assert flow().log_prob(x).shape == (3, 5)
    y, log_prob = flow().rsample_and_log_prob((4,))
    assert y.requires_grad
    bare = make(levels=16, alpha=1e-6, dequantization="none")
    with torch.no_grad():
        torch.testing.assert_close(bare().log_prob(y.clamp(0, 16)), log_prob.detach(), atol=1e-3, rtol=1e-3)
    assert not torch.equal(bare().sample((2,)), bare().sample((2,)).floor())
    assert flow().expand([7]).sample().shape == (7, 16)


def test_a_conditional_density() -> None:
    flow = make(context=2)
    context, x = torch.randn(5, 2).double(), levels(5)
    torch.manual_seed(1)
    got = flow(context).log_prob(x)
    torch.manual_seed(1)
    other = flow(context + 1).log_prob(x)
    assert not torch.allclose(got, other)
    assert flow(context).sample((2,)).shape == (2, 5, 16)
    assert flow(context[:1]).expand([4]).sample().shape == (4, 16)
    torch.manual_seed(1)
    one = flow(context[0]).log_prob(x)
    torch.manual_seed(1)
    torch.testing.assert_close(one, flow(context[:1].expand(5, 2)).log_prob(x))


def test_interpolation_begins_and_ends_with_the_images() -> None:
    flow = make(eval_solver=FINE)
    a, b = levels(4), levels(4)
    between = interpolate(flow, a, b, steps=3)
    assert between.shape == (3, 4, 16)
    assert torch.equal(between[0], a)
    assert torch.equal(between[-1], b)
    with pytest.raises(ValueError, match="expected steps >= 2, both ends included, got 1"):
        interpolate(flow, a, b, steps=1)


# --- the interface of a CNF --------------------------------------------------------------------


def test_a_flow_is_rebuilt_from_its_configuration() -> None:
    flow = make((3, 4, 4), hidden=(5, 4), depth=2, context=1, kernel=5, time="concatsquash", activation="tanh", T=0.5)
    again = ImageFlow(**json.loads(json.dumps(flow.config))).double().eval()
    assert again.config == flow.config
    again.load_state_dict(flow.state_dict())
    x, context = levels(3, 48), torch.randn(3, 1).double()
    found = []
    for one in (flow, again, copy.deepcopy(flow)):
        torch.manual_seed(5)
        found.append(one(context).log_prob(x))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_every_parameter_is_there_once() -> None:
    flow = make(depth=2)
    names = list(flow.state_dict())
    assert flow.blocks == 6
    assert len(names) == len(set(names)) == sum(len(field.state_dict()) for field in flow.fields)
    assert all(isinstance(field, ConvNet) for field in flow.fields)
    assert next(flow._chains[0].fields[1].parameters()) is next(flow.fields[1].parameters())


def test_regularizers_are_summed_over_the_blocks() -> None:
    flow = make(depth=2, levels=8, divergence="exact").train()
    x = torch.randint(0, 8, (6, 16)).double()
    term = TPR(weight=3.0, law="gauss")
    result = objective(flow, x, regularizers=[term])
    blocks = result.solution.blocks
    assert len(blocks) == 6
    assert [block.z.shape[-1] for block in blocks] == [16, 16, 16, 16, 8, 8]
    want = sum(float(term.penalty(block).detach()) for block in blocks)
    assert float(result.penalties["tpr"]) == pytest.approx(want)
    assert float(result.loss.detach()) == pytest.approx(float(result.nll.detach()) + 3 * want)
    assert result.solution.stats.nfe == sum(block.stats.nfe for block in blocks)
    result.loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in flow.parameters())


def test_end_times_and_interior_times_reach_their_blocks() -> None:
    flow = make(depth=1)
    times = [torch.tensor([0.1 * (i + 1)]).double() for i in range(3)]
    solution = flow.solve_blocks(levels(2), None, times, ends=[0.5, 0.75, 1.0])
    assert [block.ts.tolist() for block in solution.blocks] == [
        pytest.approx([0.0, 0.1, 0.5]),
        pytest.approx([0.0, 0.2, 0.75]),
        pytest.approx([0.0, 0.3, 1.0]),
    ]
    back = flow.solve(solution.z, times=[0.25], reverse=True)
    assert [block.z.shape[-1] for block in back.blocks] == [8, 16, 16]
    assert all(block.ts.tolist() == [1.0, 0.25, 0.0] for block in back.blocks)


@pytest.mark.parametrize("reverse", [False, True])
def test_an_observer_sees_every_step_of_every_block(reverse: bool) -> None:
    flow, seen = make(depth=2), list[int]()
    x = torch.randn(3, 16).double() if reverse else levels(3)
    solution = flow.solve(x, reverse=reverse, observer=lambda i, attempt: seen.append(i))
    counts = [block.stats.accepted + block.stats.rejected for block in solution.blocks]
    assert [seen.count(i) for i in range(6)] == counts
    assert seen == sorted(seen)


def test_modes_choose_solver_and_divergence() -> None:
    flow = make(solver={"method": "euler", "n_steps": 3}, divergence="hutchinson")
    x = levels(4)
    assert flow.train().solve(x).stats.nfe == 3 * flow.blocks
    assert flow.eval().solve(x).stats.nfe > 3 * flow.blocks
    assert flow.solve(x, solver=flow.solver, density=False).stats.nfe == 3 * flow.blocks
    flow.solver = pycnf.Solver(method="euler", n_steps=2)
    assert flow.train().solve(x).stats.nfe == 2 * flow.blocks


def test_fit_and_evaluate() -> None:
    """Images bright above or bright below, of two levels each: one bit an image and one a pixel, 17 / 16 in all."""
    above = torch.rand(400, 1, 1, 1) < 0.5
    bright = (torch.arange(4).view(1, 1, 4, 1) < 2) == above
    x = (bright * 6.0 + torch.randint(0, 2, (400, 1, 4, 4))).flatten(1)
    flow = ImageFlow((1, 4, 4), (8,), depth=1, scales=2, levels=8, alpha=0.05)
    before = pycnf.evaluate(flow, x[:100])
    result = pycnf.fit(flow, x[100:], x[:100], max_steps=20, batch_size=100, lr=1e-2, validate_every=20, progress=False)
    after = pycnf.evaluate(flow, x[:100])
    assert bits_per_dim(before.nll, 16) > 3
    assert 17 / 16 < bits_per_dim(after.nll, 16) < 2.3
    assert result.nll == pytest.approx(after.nll, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ImageFlow((4, 4)), r"expected an image shape \(channels, height, width\), each >= 1, got \(4, 4\)"),
        (lambda: ImageFlow((1, 4, 4), depth=0), "expected depth >= 1, got 0"),
        (lambda: ImageFlow((1, 4, 4), dequantization="noise"), "unknown dequantization 'noise'"),  # type: ignore[arg-type]
        (
            lambda: ImageFlow((1, 6, 6), scales=3),
            "images of 6 x 6 pixels can be halved 1 times: take scales <= 2, got 3",
        ),
        (lambda: ImageFlow((1, 4, 4), scales=0), "expected scales >= 1, got 0"),
        (lambda: ImageFlow((1, 4, 4), levels=1), "expected levels >= 2, got 1"),
        (lambda: ImageFlow((1, 4, 4), alpha=0.5), r"expected alpha in \(0, 1/2\), got 0.5"),
        (lambda: make()().log_prob(levels(2) + 0.5), "expected whole levels, which noise makes continuous"),
        (lambda: make()().log_prob(levels(2) - 300), "expected levels from 0 to 255, got values from -"),
        (lambda: make()().log_prob(torch.full((2, 16), 256.0).double()), "expected levels from 0 to 255"),
        (
            lambda: make(dequantization="none").solve(torch.full((2, 16), 257.0).double()),
            "expected levels from 0 to 256,",
        ),
        (lambda: make()().log_prob(levels(2, 8)), r"expected states of shape \(\*, 16\)"),
        (lambda: make()(torch.zeros(2, 1)), "this flow takes no context"),
    ],
)
def test_impossible_settings_and_images_are_refused(call: object, message: str) -> None:
    torch.manual_seed(12)
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_one_scale_is_a_chain_of_blocks_on_logits() -> None:
    flow = make(scales=1, depth=2, dequantization="none", eval_solver=FINE)
    chain = CNF(16, blocks=2, field=list(flow.fields), eval_solver=FINE).double().eval()
    x = 256 * torch.rand(3, 16).double()
    y, volume = flow.logit.forward(x)
    torch.testing.assert_close(flow().log_prob(x), chain().log_prob(y) + volume, atol=1e-9, rtol=1e-9)


# --- figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_in_its_place(channels: int) -> None:
    images = torch.randint(0, 256, (5, channels, 4, 6))
    figure = image_grid(images, columns=3, title="images")
    sheet = torch.as_tensor(figure.axes[0].images[0].get_array()).view(2 * 6, 3 * 8, channels)
    for n in range(5):
        r, c = divmod(n, 3)
        part = sheet[6 * r + 1 : 6 * r + 5, 8 * c + 1 : 8 * c + 7]
        torch.testing.assert_close(part.permute(2, 0, 1), images[n] / 255.0)


def test_grids_of_a_flow_are_of_its_images_and_repeat() -> None:
    flow = make().train()
    before = torch.random.get_rng_state()
    sheets = [sample_grid(flow, 4, columns=2).axes[0].images[0].get_array() for _ in range(2)]
    assert (sheets[0] == sheets[1]).all()
    assert torch.equal(before, torch.random.get_rng_state())
    assert flow.training
    a, b = levels(2), levels(2)
    flow.eval_solver = pycnf.Solver(**FINE)  # type: ignore[arg-type]
    sheet = torch.as_tensor(interpolation_grid(flow, a, b, steps=3).axes[0].images[0].get_array())
    assert sheet.shape == (2 * 6, 3 * 6)
    torch.testing.assert_close(sheet[7:11, 1:5].double(), a[1].view(4, 4) / 255, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sheet[1:5, 13:17].double(), b[0].view(4, 4) / 255, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 2, 4, 4), (4, 4)])
def test_impossible_grids_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 1 or 3, H, W\)"):
        image_grid(torch.zeros(shape))
