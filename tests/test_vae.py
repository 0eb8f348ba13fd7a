"""Truths about variational auto-encoders: per-sample fields, posteriors, bounds, pictures, training."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import Tensor

from pycnf.data import DataError
from pycnf.divergence import Exact, Hutchinson
from pycnf.fields import MLP
from pycnf.flow import CNF, FlowSolution, standard_normal_log_prob
from pycnf.joint import joint_dynamics
from pycnf.objective import Penalized
from pycnf.plots import save_figure
from pycnf.plots_vae import reconstruction_grid, sample_grid
from pycnf.records import read_json
from pycnf.regularizers import TPR, parse_regularizers
from pycnf.solve import Solver
from pycnf.tangents import OnePass
from pycnf.training.folder import read_checkpoint
from pycnf.vae import (
    VAE,
    LowRankMLP,
    PictureSet,
    SolvePlan,
    describe_pictures,
    evaluate_vae,
    evidence_bound,
    importance_likelihood,
    load_pictures,
    load_vae,
    save_vae,
    train_vae,
)
from pycnf.vae.networks import Gated, build_networks
from pycnf.vae.onepass import LowRankOnePass
from pycnf.vae.pictures import area_resample
from pycnf.vae.pixels import PIXELS, DiscretizedLogistic
from pycnf.vae.posteriors import CNFPosterior, Draw, PlanarPosterior, Posterior, build_posterior

DATA = os.environ.get("PYCNF_DATA")
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
TINY_CNF = {"kind": "cnf", "hidden": [6, 5], "blocks": 2, "rank": 2, "eval_solver": TIGHT}
KINDS = ["gaussian", "planar", "iaf", "cnf"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def settings(kind: str) -> dict[str, Any]:
    if kind == "iaf":
        pytest.importorskip("zuko", reason="the inverse autoregressive posterior needs zuko")
    return {
        "gaussian": {},
        "planar": {"maps": 3},
        "iaf": {"maps": 2, "hidden": [8]},
        "cnf": {name: value for name, value in TINY_CNF.items() if name != "kind"},
    }[kind]


def model(kind: str = "cnf", *, latent: int = 2, **changes: Any) -> VAE:
    posterior = {"kind": kind, **settings(kind)}
    return VAE((2, 3), **{"latent": latent, "networks": "dense", "widths": (7,), "posterior": posterior, **changes})


def stir(module: torch.nn.Module, size: float = 0.5) -> torch.nn.Module:
    """Give every parameter a random value, so that nothing is zero by its initialization."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, size)
    return module


# --- the field -----------------------------------------------------------------------------------


def bind(hidden: tuple[int, ...], activation: str, probes: int) -> tuple[LowRankMLP, Any, Tensor, Tensor, Any]:
    field = LowRankMLP(3, hidden, 2, activation=activation, block=1, blocks=2).double()
    z, context = torch.randn(4, 3).double().requires_grad_(), torch.randn(4, field.context).double().requires_grad_()
    eps = torch.randn(probes, 4, 3).double() if probes else None
    return field, field.one_pass(z, context, eps), z, context, eps


def by_autograd(field: LowRankMLP, t: Tensor, z: Tensor, context: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor]:
    v = field(t, z, context)
    rows = [torch.autograd.grad(v[:, i].sum(), z, create_graph=True)[0] for i in range(z.shape[1])]
    jacobian = torch.stack(rows, dim=1)
    if eps is None:
        return v, jacobian.diagonal(dim1=1, dim2=2).sum(1)
    return v, torch.einsum("mbi,bij,mbj->b", eps, jacobian, eps) / len(eps)


@pytest.mark.parametrize("probes", [0, 1, 2])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu"])
@pytest.mark.parametrize("hidden", [(7,), (7, 6), (7, 6, 5)], ids=str)
def test_one_pass_equals_automatic_differentiation(hidden: tuple[int, ...], activation: str, probes: int) -> None:
    field, bound, z, context, eps = bind(hidden, activation, probes)
    t = torch.tensor(0.3).double()
    v, div = bound(t, z)
    want_v, want_div = by_autograd(field, t, z, context, eps)
    torch.testing.assert_close(v, want_v)
    torch.testing.assert_close(div, want_div)
    gv, gdiv = torch.randn_like(v), torch.randn_like(div)
    inputs = [z, context, *field.parameters()]
    want = torch.autograd.grad((want_v * gv).sum() + (want_div * gdiv).sum(), inputs)
    recorded = torch.autograd.grad((v * gv).sum() + (div * gdiv).sum(), inputs, retain_graph=True)
    with torch.no_grad():
        _, _, pullback = bound.linearize(t, z)
        grads = [torch.zeros_like(tensor) for tensor in bound.prepared]
        gz = pullback(gv, gdiv, grads)
    written = [gz, *torch.autograd.grad(bound.prepared, inputs[1:], grads)]
    for a, b, c in zip(want, recorded, written, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


def test_one_sample_makes_an_ordinary_perceptron() -> None:
    field = stir(LowRankMLP(3, (7, 6), 2).double())
    context, z, t = torch.randn(1, field.context).double(), torch.randn(5, 3).double(), torch.tensor(0.3).double()
    merged = field.merge(context)
    assert type(merged) is MLP
    torch.testing.assert_close(merged(t, z), field(t, z, context.repeat(5, 1)))
    shared, own = field.one_pass(z, context.expand(5, -1), None), field.one_pass(z, context.repeat(5, 1), None)
    assert isinstance(shared, OnePass)
    assert isinstance(own, LowRankOnePass)
    for a, b in zip(shared(t, z), own(t, z), strict=True):
        torch.testing.assert_close(a, b)


def test_merged_weights_pass_gradients_to_parameters_and_context() -> None:
    field = LowRankMLP(2, (5,), 2).double()
    flow = CNF(2, field=field, context=field.context, solver=Solver(**TIGHT), divergence="exact").double()
    context, x = torch.randn(field.context).double().requires_grad_(), torch.randn(4, 2).double()
    inputs = [context, *field.parameters()]
    shared = torch.autograd.grad(flow.solve(x, context).log_prob.sum(), inputs)
    own = torch.autograd.grad(flow.solve(x, context.expand(4, -1).contiguous()).log_prob.sum(), inputs)
    for a, b in zip(shared, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_silent_numbers_and_those_of_other_blocks_leave_the_field_unchanged() -> None:
    field = LowRankMLP(3, (7, 6), 2, block=1, blocks=3)
    t, z, context = torch.tensor(0.5), torch.randn(4, 3), torch.zeros(4, field.context)
    still = field(t, z, context)
    n = field.numbers
    elsewhere = torch.randn_like(context)
    elsewhere[:, n : n + field.silent] = 0
    torch.testing.assert_close(field(t, z, elsewhere), still)
    context[:, n] = 1.0
    context[:, n + field.silent :] = 1.0
    assert not torch.allclose(field(t, z, context), still)


def test_divergences_take_the_written_out_form() -> None:
    field, z = LowRankMLP(3, (7,), 2), torch.randn(4, 3)
    context = torch.randn(4, field.context)
    for divergence in (Exact(), Hutchinson()):
        bound = divergence.bind(field, z, context)
        assert isinstance(bound, LowRankOnePass)
        assert hasattr(joint_dynamics(bound), "linearize")
    assert not isinstance(Exact("reverse").bind(field, z, context), LowRankOnePass)


def test_gradients_of_a_solve_are_those_of_automatic_differentiation() -> None:
    fields = [LowRankMLP(2, (5, 4), 2, block=i, blocks=2) for i in range(2)]
    x, context = torch.randn(3, 2).double(), torch.randn(3, fields[0].context).double().requires_grad_()

    def gradients(divergence: str) -> tuple[Tensor, ...]:
        flow = CNF(2, field=fields, blocks=2, context=fields[0].context, divergence=divergence).double()
        solution = flow.solve(x, context)
        return torch.autograd.grad((solution.z.sin() + solution.logp.unsqueeze(1)).sum(), [context, *flow.parameters()])

    for a, b in zip(gradients("exact"), gradients("exact-reverse"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LowRankMLP(2, (), 1), "hidden widths >= 1"),
        (lambda: LowRankMLP(2, (4,), 0), "rank"),
        (lambda: LowRankMLP(2, (4,), 1, activation="step"), "unknown activation 'step'"),
        (lambda: LowRankMLP(2, (4,), 1, block=2, blocks=2), "0 <= block < blocks"),
        (lambda: PlanarPosterior(4, 2, maps=0), "maps >= 1"),
        (lambda: build_posterior("flow", 4, 2), "unknown posterior 'flow': choose one of gaussian"),
        (lambda: build_posterior("planar", 4, 2, rank=3), "settings of posterior 'planar' do not fit"),
        (lambda: VAE((2, 2), pixels="gray"), "unknown distribution of pixels 'gray'"),
        (lambda: VAE((2, 2, 2)), r"expected shape \(height, width\)"),
        (lambda: build_networks("conv", (30, 28), (4, 8), 2, 1), "multiples of 4"),
        (lambda: build_networks("linear", (4, 4), (4,), 2, 1), "unknown kind of networks"),  # type: ignore[arg-type]
        (lambda: build_networks("dense", (4, 4), (), 2, 1), "sizes >= 1"),
        (lambda: model("gaussian").encode(torch.zeros(2, 5)), r"shape \(B, 6\)"),
        (lambda: importance_likelihood(model("gaussian"), torch.zeros(1, 6), samples=0), "samples >= 1"),
    ],
)
def test_impossible_settings_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# --- posteriors ------------------------------------------------------------------------------------


def carried(posterior: Posterior, z: Tensor, h: Tensor) -> Draw:
    """Carry chosen draws of the Gaussian, with their densities."""
    drawn = Draw(z, posterior.base(h).log_prob(z), Penalized(z.new_zeros(()), {}, {}, FlowSolution((), False)))
    return posterior.carry(drawn, h, SolvePlan())


@pytest.mark.parametrize("kind", KINDS)
def test_density_of_a_posterior_is_that_of_the_carried_gaussian(kind: str) -> None:
    posterior = stir(build_posterior(kind, 4, 3, **settings(kind)).double()).eval()
    h = torch.randn(2, 4).double()
    state = torch.random.get_rng_state()
    drawn = posterior(h)
    torch.random.set_rng_state(state)
    z0 = posterior.base(h).rsample()
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda z, i=i: carried(posterior, z, h[i]).z, z0[i])
        want = posterior.base(h[i]).log_prob(z0[i]) - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(drawn.log_q[i], want, rtol=1e-6, atol=1e-6)
        assert (kind == "gaussian") == torch.equal(drawn.z[i], z0[i])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_one_picture_are_those_of_repeated_features(kind: str) -> None:
    posterior = stir(build_posterior(kind, 4, 3, **settings(kind)).double()).eval()
    h = torch.randn(4).double()
    together = posterior(h, (5,))
    assert (together.z.shape, together.log_q.shape) == ((5, 3), (5,))
    torch.manual_seed(1)
    shared = posterior(h, (5,))
    torch.manual_seed(1)
    repeated = posterior(h.repeat(5, 1))
    torch.testing.assert_close(shared.z, repeated.z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared.log_q, repeated.log_q, rtol=1e-6, atol=1e-6)


def test_a_flow_posterior_is_normalized() -> None:
    posterior = stir(CNFPosterior(3, 2, hidden=(5,), rank=2, eval_solver=TIGHT).double()).eval()
    h = torch.randn(3).double()
    side = torch.linspace(-9, 9, 121).double()
    z = torch.cartesian_prod(side, side)
    with torch.no_grad():
        back = posterior.flow.solve(z, posterior.updates(h), reverse=True)
        log_q = posterior.base(h).log_prob(back.z) - back.logp
    total = log_q.exp().sum() * (side[1] - side[0]) ** 2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-3, atol=0)


def test_training_starts_from_one_flow_for_all_pictures() -> None:
    posterior = CNFPosterior(4, 3, hidden=(6, 5), blocks=2, rank=2)
    z, h = torch.randn(3).expand(5, 3), 10 * torch.randn(5, 4)
    assert posterior.updates(h).abs().max() > 0
    end = posterior.flow.solve(z, posterior.updates(h), divergence="exact").z
    torch.testing.assert_close(end, end[:1].expand_as(end))
    fresh = torch.autograd.grad(end.square().sum(), list(posterior.updates.parameters()))
    assert all(grad.abs().max() > 0 for grad in fresh)


def test_planar_maps_stay_invertible() -> None:
    posterior = stir(PlanarPosterior(4, 3, maps=5).double(), size=5.0)
    drawn = posterior(torch.randn(200, 4).double())
    assert torch.isfinite(drawn.log_q).all()


# --- pixels and networks -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIXELS)
def test_probabilities_of_all_levels_sum_to_one(name: str) -> None:
    pixels = PIXELS[name]
    raw = 3 * torch.randn(20, pixels.channels, 1).double()
    levels = torch.arange(pixels.levels).double() / (pixels.levels - 1)
    log_p = torch.stack([pixels.log_prob(level.expand(20, 1), raw) for level in levels])
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(20).double())
    drawn = pixels.sample(raw.expand(50, *raw.shape))
    assert drawn.shape == (50, 20, 1)
    assert torch.isin(drawn.mul(pixels.levels - 1).round(), levels * (pixels.levels - 1)).all()
    if name != "logistic":  # whose mean is that before it is cut
        torch.testing.assert_close(pixels.mean(raw).squeeze(1), (log_p.exp() * levels.unsqueeze(1)).sum(0))


def test_a_discretized_logistic_is_a_difference_of_distribution_functions() -> None:
    raw, x = torch.rand(9, 2, 4).double(), torch.randint(1, 255, (9, 4)).double() / 255
    mean, scale = torch.sigmoid(raw[:, 0]), torch.exp(raw[:, 1] - 2)
    upper, lower = (torch.sigmoid((x - mean + side / 510) / scale) for side in (1, -1))
    torch.testing.assert_close(DiscretizedLogistic().log_prob(x, raw), torch.log(upper - lower).sum(1))


def test_gray_levels_far_from_the_mean_have_finite_gradients() -> None:
    raw = torch.tensor([[9.0, -30.0], [-9.0, -30.0], [9.0, 30.0]]).unsqueeze(2).requires_grad_()
    log_p = DiscretizedLogistic().log_prob(torch.tensor([[0.0], [1.0], [0.5]]), raw)
    (grad,) = torch.autograd.grad(log_p.sum(), raw)
    assert torch.isfinite(log_p).all()
    assert torch.isfinite(grad).all()


def test_a_gate_is_a_product_of_two_maps() -> None:
    layer, x = torch.nn.Linear(3, 8), torch.randn(5, 3)
    a, b = layer(x).chunk(2, dim=1)
    torch.testing.assert_close(Gated(layer)(x), a * torch.sigmoid(b))


@pytest.mark.parametrize(("kind", "widths"), [("conv", (2, 9)), ("dense", (11, 9))])
@pytest.mark.parametrize("shape", [(28, 28), (28, 20)])
def test_networks_fit_the_pictures(kind: Any, widths: tuple[int, int], shape: tuple[int, int]) -> None:
    encoder, decoder = build_networks(kind, shape, widths, latent=5, channels=3)
    pixels = shape[0] * shape[1]
    assert encoder(torch.rand(2, pixels)).shape == (2, 9)
    assert decoder(torch.randn(2, 5)).shape == (2, 3, pixels)


# --- bounds --------------------------------------------------------------------------------------


def log_evidence(vae: VAE, x: Tensor) -> Tensor:
    """log p(x) by quadrature over a one-dimensional latent state."""
    z = torch.linspace(-12, 12, 4001).double().unsqueeze(1)
    with torch.no_grad():
        log_p = standard_normal_log_prob(z) + vae.pixels.log_prob(x.unsqueeze(1), vae.decode(z))
    return torch.logsumexp(log_p, dim=1) + (z[1] - z[0]).log()


@pytest.mark.parametrize("kind", ["gaussian", "cnf"])
def test_importance_weights_estimate_the_evidence_which_bounds_the_bound(kind: str) -> None:
    posterior = {**TINY_CNF, "blocks": 1, "eval_solver": None} if kind == "cnf" else {"kind": kind}
    vae = model(kind, latent=1, posterior=posterior).double()
    stir(vae, 0.4)
    torch.nn.init.constant_(vae.posterior.scale.bias, 1.0)  # wider than the prior: weights of small variance
    x = torch.bernoulli(torch.full((4, 6), 0.5)).double()
    exact = -log_evidence(vae, x).mean().item()
    found = importance_likelihood(vae, x, samples=4000, chunk=1500)
    assert found.bound > exact
    assert found.nll == pytest.approx(exact, abs=5 * found.sampling_se)
    assert found.sampling_se < 0.1 * (found.bound - exact)
    assert 1 < found.effective < 4000
    few = importance_likelihood(vae, x, samples=5)
    assert few.nll < few.bound
    assert evaluate_vae(vae, x.repeat(200, 1)).nll == pytest.approx(found.bound, rel=0.05)


def test_likelihood_depends_on_seed_and_picture_alone() -> None:
    vae, x = model("cnf").double(), torch.bernoulli(torch.full((4, 6), 0.5)).double()
    state = torch.random.get_rng_state()
    whole = importance_likelihood(vae, x, samples=30)
    assert torch.equal(torch.random.get_rng_state(), state)
    parts = [importance_likelihood(vae, x[:2], samples=30), importance_likelihood(vae, x, samples=30)]
    assert parts[1].nll == whole.nll
    assert parts[0].rows == 2
    assert importance_likelihood(vae, x, samples=30, seed=1).nll != whole.nll
    one = importance_likelihood(vae, x, samples=1)
    assert one.nll == pytest.approx(one.bound)
    assert math.isnan(one.sampling_se)
    assert whole.bits_per_dim == pytest.approx(whole.nll / (6 * math.log(2)))
    assert vae.training, "the model keeps its mode"


def test_loss_is_reconstruction_divergence_and_penalties() -> None:
    vae, x = model("cnf"), torch.rand(16, 6).round()
    stir(vae.posterior.flow)
    found = evidence_bound(vae, x, beta=0.25, plan=SolvePlan([TPR(weight=5.0)], [0.5]))
    want = found.reconstruction + 0.25 * found.kl + 2.5 * found.penalties["tpr"]
    torch.testing.assert_close(found.loss.detach(), want)
    torch.testing.assert_close(found.nll, found.reconstruction + found.kl)
    assert found.weights == {"tpr": 2.5}
    assert found.penalties["tpr"] > 0
    assert len(found.solution.blocks) == 2
    assert found.solution.stats.nfe > 0
    assert evidence_bound(model("gaussian"), x).solution.stats.nfe == 0


@pytest.mark.parametrize("spec", ["tpr:channels=both,degree=1", "error:weight=1", "tpr+error"])
def test_regularizers_reach_every_part_of_the_posterior(spec: str) -> None:
    vae, x = model("cnf"), torch.rand(8, 6).round()
    stir(vae.posterior)
    found = evidence_bound(vae, x, plan=SolvePlan(parse_regularizers(spec)))
    penalty = found.loss - found.reconstruction - found.kl
    reached = torch.autograd.grad(penalty, [vae.posterior.updates.weight, vae.encoder[0].layer.weight])
    assert all(grad.abs().max() > 0 for grad in reached)


def test_a_model_is_rebuilt_from_its_configuration(tmp_path: Path) -> None:
    vae = stir(model("cnf")).eval()
    again = VAE(**json.loads(json.dumps(vae.config))).eval()
    again.load_state_dict(vae.state_dict())
    save_vae(vae, tmp_path)
    read = load_vae(tmp_path)
    x = torch.rand(5, 6).round()
    values = []
    for built in (vae, again, read):
        torch.manual_seed(3)
        values.append(evaluate_vae(built, x).nll)
    assert values[0] == values[1] == values[2]
    (tmp_path / "config.json").write_text('{"flow": {}}')
    with pytest.raises(ValueError, match="no entry 'vae'"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text('{"vae": {"shape": [2, 3], "depth": 4}}')
    with pytest.raises(ValueError, match="does not describe a model of this version"):
        load_vae(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_vae(tmp_path / "elsewhere")


# --- pictures ------------------------------------------------------------------------------------


def write_mnist(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for name, n in (("train", 12), ("test", 5))}
    np.savez(folder / "mnist.npz", **arrays, train_labels=np.arange(12) % 10, test_labels=np.arange(5))


def write_idx(folder: Path) -> None:
    (folder / "mnist").mkdir()
    for name, n in (("train", 12), ("t10k", 5)):
        for kind, magic, shape in (("images-idx3", 2051, (n, 28, 28)), ("labels-idx1", 2049, (n,))):
            head = np.array([magic, *shape], dtype=">u4").tobytes()
            data = head + np.random.default_rng(n).integers(0, 10, shape, dtype=np.uint8).tobytes()
            (folder / "mnist" / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))


def write_omniglot(folder: Path) -> None:
    for name, n in (("background", 3), ("evaluation", 2)):
        drawings = np.ones((n, 20, 105, 105), dtype=bool)
        drawings[:, :, :15, 30:60] = False  # a bar of ink, 4 x 8 of the small pixels, up and left of the middle
        np.savez(folder / f"omniglot_images_{name}.npz", images=drawings)


def write_omniglot_mat(folder: Path) -> None:
    picture = np.zeros((28, 28))
    picture[:4, 8:16] = 1
    column = picture.T.reshape(784, 1)
    savemat(folder / "chardata.mat", {"data": np.repeat(column, 40, axis=1), "testdata": np.repeat(column, 9, axis=1)})


def write_frey(folder: Path) -> None:
    faces = np.random.default_rng(0).integers(0, 256, (30, 28, 20), dtype=np.uint8)
    np.savez(folder / "freyfaces.npz", images=faces)


def write_frey_mat(folder: Path) -> None:
    faces = np.random.default_rng(0).integers(0, 256, (30, 28, 20), dtype=np.uint8)
    savemat(folder / "frey_rawface.mat", {"ff": faces.reshape(30, 560).T})


def silhouettes(n: int) -> np.ndarray:
    picture = np.ones((28, 28), dtype=np.uint8)
    picture[:4, 8:16] = 0
    return np.repeat(picture.T.reshape(1, 784), n, axis=0)


def write_caltech(folder: Path) -> None:
    savemat(folder / "caltech101_silhouettes_28.mat", {"X": silhouettes(20), "Y": np.arange(20)})


def write_caltech_split(folder: Path) -> None:
    parts = {"train_data": silhouettes(9), "val_data": silhouettes(4), "test_data": silhouettes(5)}
    savemat(folder / "caltech101_silhouettes_28_split1.mat", parts)


WRITERS: dict[str, tuple[str, Callable[[Path], None], tuple[int, int, int]]] = {
    "mnist": ("mnist", write_mnist, (10, 2, 5)),
    "mnist-idx": ("mnist", write_idx, (10, 2, 5)),
    "omniglot": ("omniglot", write_omniglot, (71, 4, 25)),
    "omniglot-mat": ("omniglot", write_omniglot_mat, (38, 2, 9)),
    "freyfaces": ("freyfaces", write_frey, (24, 3, 3)),
    "freyfaces-mat": ("freyfaces", write_frey_mat, (24, 3, 3)),
    "caltech": ("caltech", write_caltech, (9, 5, 6)),
    "caltech-split": ("caltech", write_caltech_split, (9, 4, 5)),
}


@pytest.mark.parametrize("case", WRITERS)
def test_pictures_are_read_from_every_layout(case: str, tmp_path: Path) -> None:
    name, write, sizes = WRITERS[case]
    write(tmp_path)
    images, again = (load_pictures(name, data_dir=tmp_path, seed=s) for s in (0, 0))
    assert tuple(len(part) for part in (images.train, images.validation, images.test)) == sizes
    about, missing = describe_pictures(name, tmp_path), describe_pictures(name, tmp_path / "elsewhere")
    assert about.present
    assert (about.features, missing.present) == (images.train.shape[1], False)
    assert images.shape == ((28, 20) if name == "freyfaces" else (28, 28))
    assert images.dynamic == (name in ("mnist", "omniglot"))
    for part in ("validation", "test"):
        x = getattr(images, part)
        assert torch.equal(x, getattr(again, part))
        if name != "freyfaces":
            assert torch.isin(x, torch.tensor([0.0, 1.0])).all()
    if name in ("omniglot", "caltech"):
        bar = torch.zeros(28, 28)
        bar[:4, 8:16] = 1
        torch.testing.assert_close(images.test, bar.reshape(1, 784).expand_as(images.test))


def test_both_layouts_of_a_set_hold_the_same_pictures(tmp_path: Path) -> None:
    for name, write in (("a", write_frey), ("b", write_frey_mat)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    a, b = (load_pictures("freyfaces", data_dir=tmp_path / name) for name in ("a", "b"))
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(a, part), getattr(b, part))
    assert not torch.equal(a.train, load_pictures("freyfaces", data_dir=tmp_path / "a", seed=1).train)


def test_area_averages_are_exact() -> None:
    ink = np.random.default_rng(0).random((3, 105, 105)) < 0.3
    fine = ink.repeat(4, axis=1).repeat(4, axis=2)  # 420 = 4 * 105 = 15 * 28
    want = fine.reshape(3, 28, 15, 28, 15).mean((2, 4))
    np.testing.assert_allclose(area_resample(ink, 28), want, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("digits", lambda folder: None, "no set of pictures is called 'digits'; there are mnist, omniglot"),
        ("mnist", lambda folder: None, "found no mnist.npz or .*PYCNF_DATA"),
        ("freyfaces", lambda folder: None, "get it from https://"),
        ("mnist", lambda folder: (folder / "mnist.npz").write_bytes(b"PK"), "mnist.npz: not a NumPy file, or damaged"),
        ("caltech", lambda folder: savemat(folder / "caltech101_silhouettes_28.mat", {"Z": 1}), "no array X"),
        (
            "caltech",
            lambda folder: savemat(folder / "caltech101_silhouettes_28.mat", {"X": np.zeros((3, 5))}),
            r"shape \(N, 784\)",
        ),
        ("freyfaces", lambda folder: (folder / "frey_rawface.mat").write_bytes(b"no"), "not a MATLAB file"),
    ],
)
def test_absent_and_damaged_files_are_named(
    name: str, spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        load_pictures(name, data_dir=tmp_path)


def test_impossible_sets_are_refused() -> None:
    x = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"expected test of shape \(N, 4\)"):
        PictureSet("x", (2, 2), x, x, x[:0])
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        PictureSet("x", (2, 2), x, x + 1, x)
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        PictureSet("x", (2, 2), x, x, x * torch.nan)


@pytest.mark.skipif(DATA is None, reason="the real pictures are found by PYCNF_DATA")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mnist", (50_000, 10_000, 10_000)),
        ("freyfaces", (1565, 200, 200)),
        ("caltech", (4100, 2264, 2307)),
        pytest.param("omniglot", (23_045, 1345, 8070), marks=pytest.mark.slow),
    ],
)
def test_real_pictures_are_divided_as_in_the_literature(name: str, sizes: tuple[int, int, int]) -> None:
    try:
        images = load_pictures(name, data_dir=DATA)
    except DataError as err:
        pytest.skip(str(err))
    assert tuple(len(part) for part in (images.train, images.validation, images.test)) == sizes
    means = torch.stack([part.mean() for part in (images.train, images.validation, images.test)])
    assert means.max() - means.min() < 0.01, "the three parts look alike"
    frame = images.test.reshape(-1, *images.shape)
    edge = torch.cat([frame[:, 0], frame[:, -1]], dim=1).mean()
    assert name == "freyfaces" or edge < frame.mean(), "ink is bright and in the middle"


# --- presets -------------------------------------------------------------------------------------


# --- training ------------------------------------------------------------------------------------


def bars(*, dynamic: bool = False) -> PictureSet:
    """Draw two kinds of picture, white at the left or at the right, with some noise."""
    odds = torch.tensor([[0.97, 0.5, 0.03] * 2, [0.03, 0.5, 0.97] * 2])[torch.arange(96) % 2]
    drawn = torch.bernoulli(odds, generator=torch.Generator().manual_seed(5))
    return PictureSet("bars", (2, 3), odds[:64] if dynamic else drawn[:64], drawn[64:80], drawn[80:], dynamic)


def train(vae: VAE, images: PictureSet, **changes: Any) -> Any:
    quick = {"batch_size": 16, "warmup": 0, "device": "cpu", "progress": False, "lr": 1e-2}
    return train_vae(vae, images, **{**quick, **changes})


def test_training_raises_the_bound() -> None:
    vae, images = model("cnf", latent=1, posterior={**TINY_CNF, "blocks": 1, "eval_solver": None}), bars()
    before = evaluate_vae(vae, images.test).nll
    result = train(vae, images, max_steps=100, lr=3e-2)
    assert not vae.training
    for after in (result.nll, evaluate_vae(vae, images.test).nll):
        assert after < before - 0.6


def test_training_writes_what_training_a_flow_writes(tmp_path: Path) -> None:
    vae = model("cnf")
    result = train(vae, bars(dynamic=True), epochs=3, warmup=2, output=tmp_path, regularizers=TPR(weight=2.0, ramp=4))
    rows = result.rows("train")
    assert len(rows) == 12
    assert [row["beta"] for row in rows] == pytest.approx([min(1, s / 8) for s in range(1, 13)])
    for row in rows:
        assert row["nll"] == pytest.approx(row["reconstruction"] + row["kl"], rel=1e-5)
        total = row["reconstruction"] + row["beta"] * row["kl"] + row["weight_tpr"] * row["penalty_tpr"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert [row["step"] for row in result.rows("validation")] == [4, 8, 12]
    record, config = read_json(tmp_path / "record.json"), read_json(tmp_path / "config.json")
    assert record["status"] == "finished"
    assert (record["data"], record["method"], record["rtol"]) == ("bars", "dopri5", 1e-4)
    assert record["nfe_train"] == pytest.approx(sum(row["nfe"] for row in rows) / 12)
    assert config["regularizers"] == "tpr:weight=2,ramp=4"
    read = load_vae(tmp_path)
    z = torch.randn(3, 2)
    assert torch.equal(read.decode(z), vae.decode(z))


def test_a_run_without_solves_has_no_solver_in_its_record(tmp_path: Path) -> None:
    result = train(model("planar"), bars(), epochs=1, output=tmp_path)
    assert "method" not in read_json(tmp_path / "record.json")
    assert result.nfe_train == 0


def test_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    images, terms = bars(dynamic=True), [TPR(weight=2.0)]
    straight, broken = model("cnf"), model("cnf")
    broken.load_state_dict(straight.state_dict())
    train(straight, images, max_steps=12, warmup=2, output=tmp_path / "a", regularizers=terms)
    train(broken, images, max_steps=8, warmup=2, output=tmp_path / "b", regularizers=terms)
    train(broken, images, max_steps=12, warmup=2, output=tmp_path / "b", regularizers=terms, resume=True)
    a, b = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("a", "b"))
    assert a["global_step"] == b["global_step"] == 12
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    with pytest.raises(ValueError, match=r"training\.warmup_steps was 8 and is now 12"):
        train(broken, images, max_steps=16, warmup=3, output=tmp_path / "b", regularizers=terms, resume=True)


def test_no_validation_before_the_end_of_the_warmup_stops_training() -> None:
    def steps(warmup: int) -> int:
        torch.manual_seed(0)
        return train(model("gaussian"), bars(), epochs=40, warmup=warmup, patience=1, lr=1e-12).steps

    assert steps(0) < 4 * 10 <= steps(10) < 4 * 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 65}, "1 <= batch_size <= 64"),
        ({"warmup": -1}, "warmup >= 0"),
        ({"resume": True}, "need the run folder"),
        ({"patience": 0}, "patience >= 1"),
    ],
)
def test_impossible_training_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(model("gaussian"), bars(), **changes)
    x = torch.rand(20, 4)
    with pytest.raises(ValueError, match=r"expected pictures of shape \(2, 3\), got x of shape \(2, 2\)"):
        train(model("gaussian"), PictureSet("x", (2, 2), x, x, x))


# --- figures -------------------------------------------------------------------------------------


def test_figures_show_pictures_above_their_reconstructions(tmp_path: Path) -> None:
    vae, x = model("cnf"), torch.rand(5, 6).round()
    state = torch.random.get_rng_state()
    figure = reconstruction_grid(vae, x, columns=3, title="pictures")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert vae.training
    sheet = torch.as_tensor(figure.axes[0].images[0].get_array())
    height, width = sheet.shape[0] // 4, sheet.shape[1] // 3
    tiles = sheet.unfold(0, height, height).unfold(1, width, width)[..., 1:-1, 1:-1]
    for i in range(5):
        assert torch.equal(tiles[2 * (i // 3), i % 3].flatten(), x[i])
        below = tiles[2 * (i // 3) + 1, i % 3]
        assert ((below > 0) & (below < 1)).all()
    assert save_figure(figure, tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    a, b, c = (sample_grid(vae, 7, seed=seed).axes[0].images[0].get_array() for seed in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
