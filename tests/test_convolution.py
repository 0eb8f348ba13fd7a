"""Truths about the convolutional field: as torch convolves, with the divergence and gradients of differentiation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycnf import convolution_tangents
from pycnf.convolution import ConvNet, TimeConvolution
from pycnf.convolution_tangents import ConvolutionPass
from pycnf.divergence import BoundField, Exact, Hutchinson, call_field
from pycnf.fields import ACTIVATIONS
from pycnf.flow import CNF
from pycnf.joint import joint_dynamics
from pycnf.solve import Solver

TIME = ["concat", "concatsquash", "none"]
T = torch.tensor(0.37, dtype=torch.float64)
SHAPE = (2, 3, 4)


def make(hidden: tuple[int, ...] = (4, 3), time: str = "concat", **options: object) -> ConvNet:
    return ConvNet(SHAPE, hidden, time=time, **options).double()  # type: ignore[arg-type]


def states(rows: int = 5, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.randn(rows, shape[0] * shape[1] * shape[2]).double().requires_grad_()


def jacobian(field: nn.Module, z: Tensor, context: Tensor | None) -> Tensor:
    """Jacobians dv/dz of every row, (B, D, D), with a graph for more derivatives."""
    v = call_field(field, T, z, context)
    rows = [torch.autograd.grad(v[:, i].sum(), z, create_graph=True)[0] for i in range(z.shape[1])]
    return torch.stack(rows, dim=1)


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-9)


# --- the field ---------------------------------------------------------------------------------


def test_time_is_one_more_channel_padded_with_zeros() -> None:
    layer, x = TimeConvolution(2, 3).double(), torch.randn(4, 2, 5, 6).double()
    clock = T.expand(4, 1, 5, 6)
    want = F.conv2d(torch.cat([x, clock], 1), torch.cat([layer.weight, layer.time_weight], 1), layer.bias, padding=1)
    torch.testing.assert_close(layer(T, x), want)


def test_a_gate_and_a_shift_a_channel() -> None:
    layer, x = TimeConvolution(2, 3, 5, "concatsquash").double(), torch.randn(4, 2, 5, 6).double()
    gate = torch.sigmoid(T * layer.gate_weight + layer.gate_bias)[:, None, None]
    want = gate * F.conv2d(x, layer.weight, layer.bias, padding=2) + (T * layer.shift_weight)[:, None, None]
    torch.testing.assert_close(layer(T, x), want)


def test_without_time_nothing_moves_with_it() -> None:
    field, z = make(time="none"), states()
    assert torch.equal(field(T, z), field(2 * T, z))


@pytest.mark.parametrize("time", TIME)
def test_the_field_is_the_chain_of_its_layers(time: str) -> None:
    field, z, context = make((4, 3), time, context=2, activation="tanh"), states(), torch.randn(5, 2).double()
    h = torch.cat([z.view(5, *SHAPE), context.view(5, 2, 1, 1).expand(5, 2, 3, 4)], 1)
    first, second, third = field.layers
    want = third(T, torch.tanh(second(T, torch.tanh(first(T, h)))))
    torch.testing.assert_close(field(T, z, context), want.flatten(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvNet((4, 4)), r"expected an image shape \(channels, height, width\), each >= 1, got \(4, 4\)"),
        (lambda: ConvNet((1, 0, 4)), r"each >= 1, got \(1, 0, 4\)"),
        (lambda: ConvNet(SHAPE, ()), r"expected context >= 0 and hidden channels >= 1"),
        (lambda: ConvNet(SHAPE, kernel=4), "expected an odd kernel size, which keeps height and width, got 4"),
        (lambda: ConvNet(SHAPE, activation="elu"), "unknown activation 'elu': choose one of tanh"),
        (lambda: ConvNet(SHAPE, time="always"), "unknown time conditioning 'always'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


# --- value and divergence in one pass ----------------------------------------------------------


@pytest.mark.parametrize("probes", [None, 1, 3])
@pytest.mark.parametrize(
    ("hidden", "time", "activation", "context"),
    [
        *itertools.product([(4,), (4, 3), (3, 4, 3)], TIME, ["softplus"], [0, 2]),
        *itertools.product([(4, 3)], ["concat"], sorted(ACTIVATIONS), [0]),
    ],
)
def test_one_pass_equals_differentiation(
    hidden: tuple[int, ...], time: str, activation: str, context: int, probes: int | None
) -> None:
    """Values, and gradients with respect to states, parameters and context."""
    field, z = make(hidden, time, activation=activation, context=context), states()
    c = torch.randn(5, context).double().requires_grad_() if context else None
    eps = None if probes is None else torch.randn(probes, *z.shape).double()
    v, div = ConvolutionPass(field, z, c, eps)(T, z)
    want_v, J = call_field(field, T, z, c), jacobian(field, z, c)
    want = J.diagonal(dim1=1, dim2=2).sum(1) if eps is None else torch.einsum("kbi,bij,kbj->kb", eps, J, eps).mean(0)
    torch.testing.assert_close(v, want_v, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(div, want, atol=1e-12, rtol=1e-11)
    with torch.no_grad():
        bare_v, bare = ConvolutionPass(field, z, c, eps)(T, z)
    torch.testing.assert_close(bare_v, v)
    torch.testing.assert_close(bare, div)
    leaves, weights = [z, *field.parameters(), *([] if c is None else [c])], torch.randn(5).double()
    got = gradients((div * weights).sum() + v.square().sum(), leaves)
    assert_same(got, gradients((want * weights).sum() + want_v.square().sum(), leaves))


@pytest.mark.parametrize("probes", [None, 4])
@pytest.mark.parametrize("time", ["concat", "none"])
@pytest.mark.parametrize("hidden", [(4,), (4, 3), (3, 4, 3)], ids=str)
@pytest.mark.parametrize("context", [0, 2])
def test_the_written_out_pullback_equals_differentiation(
    hidden: tuple[int, ...], time: str, context: int, probes: int | None
) -> None:
    field, z = make(hidden, time, context=context), states()
    c = torch.randn(5, context).double().requires_grad_() if context else None
    eps = None if probes is None else torch.randn(probes, *z.shape).double()
    bound = ConvolutionPass(field, z, c, eps)
    assert bound.pullable
    gv, gdiv = torch.randn_like(z), torch.randn(5).double()
    with torch.no_grad():
        v, div, pullback = bound.linearize(T, z)
        grads = [torch.zeros_like(tensor) for tensor in bound.prepared]
        gz = pullback(gv, gdiv, grads)
        again = [torch.zeros_like(tensor) for tensor in bound.prepared]
        torch.testing.assert_close(pullback(gv, gdiv, again), gz, atol=0, rtol=0)
    want_v, want = ConvolutionPass(field, z, c, eps)(T, z)
    torch.testing.assert_close(v, want_v)
    torch.testing.assert_close(div, want)
    leaves = [*field.parameters(), *([] if c is None else [c])]
    wanted = gradients((want_v * gv).sum() + (want * gdiv).sum(), [z, *leaves])
    torch.testing.assert_close(gz, wanted[0], atol=1e-11, rtol=1e-9)
    pairs = [(tensor, grad) for tensor, grad in zip(bound.prepared, grads, strict=True) if tensor.requires_grad]
    tensors, shares = zip(*pairs, strict=True)
    got = torch.autograd.grad(tensors, leaves, shares, allow_unused=True, materialize_grads=True)
    assert_same(got, wanted[1:])


@pytest.mark.parametrize("probes", [None, 5])
def test_tangents_in_chunks_are_the_same_tangents(probes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    field, z = make((4, 3, 4)), states()
    eps = None if probes is None else torch.randn(probes, *z.shape).double()
    leaves, found = [z, *field.parameters()], []
    for chunk in (1, 2**24, 2 * 5 * 4 * 12):  # one at a time, all together, two at a time
        monkeypatch.setattr(convolution_tangents, "CHUNK", chunk)
        bound = ConvolutionPass(field, z, None, eps)
        v, div = bound(T, z)
        found.append((bound.chunk, v, div, gradients((div * div).sum() + v.square().sum(), leaves)))
    assert [chunk for chunk, *_ in found[::2]] == [1, 2]
    for _, v, div, grads in found[1:]:
        torch.testing.assert_close(v, found[0][1])
        torch.testing.assert_close(div, found[0][2])
        assert_same(grads, found[0][3])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (1, 5, 5)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_images_of_every_size_and_kernels_larger_than_they(shape: tuple[int, int, int], kernel: int) -> None:
    field, z = ConvNet(shape, (3, 3), kernel=kernel).double(), states(4, shape)
    v, div = Exact().bind(field, z, None)(T, z)
    torch.testing.assert_close(v, field(T, z))
    torch.testing.assert_close(div, jacobian(field, z, None).diagonal(dim1=1, dim2=2).sum(1), atol=1e-12, rtol=1e-11)


def test_divergences_take_the_one_pass_and_leave_subclasses_alone() -> None:
    class Doubled(ConvNet):
        def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
            return 2 * super().forward(t, z, context)

    z = states()
    for divergence in (Exact(), Hutchinson(2, "rademacher")):
        assert isinstance(divergence.bind(make(), z, None), ConvolutionPass)
        assert not isinstance(divergence.bind(Doubled(SHAPE, (4,)).double(), z, None), ConvolutionPass)
    field = Doubled(SHAPE, (4,)).double()
    v, _ = Exact().bind(field, z, None)(T, z)
    torch.testing.assert_close(v, field(T, z))


def test_a_users_field_can_bring_its_own_pass() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.rate * z

        def one_pass(self, z: Tensor, context: Tensor | None, probes: Tensor | None) -> BoundField:
            return Bound(self)

    class Bound:
        def __init__(self, field: Scaled) -> None:
            self.rate, self.tensors = field.rate, tuple(field.parameters())

        def __call__(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.rate * z, (self.rate * z.shape[1]).expand(len(z))

    class Shifted(Scaled):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.rate * z + z.square()

    z = states()
    for divergence in (Exact(), Hutchinson(noise="rademacher")):
        assert isinstance(divergence.bind(Scaled(), z, None), Bound)
        assert not isinstance(divergence.bind(Shifted(), z, None), Bound)
    flow = CNF(24, field=Scaled(), eval_solver={"rtol": 1e-9, "atol": 1e-9}).double().eval()
    torch.testing.assert_close(flow.solve(z.detach()).logp, torch.full((5,), -48.0).double())


def test_the_solver_takes_the_written_out_pullback() -> None:
    z = states()
    assert hasattr(joint_dynamics(Exact().bind(make(), z, None)), "linearize")
    assert not hasattr(joint_dynamics(Exact().bind(make(time="concatsquash"), z, None)), "linearize")


def test_second_derivatives_of_the_one_pass_are_refused() -> None:
    z = states()
    _, div = Exact().bind(make(), z, None)(T, z)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(div.sum(), z, create_graph=True)


# --- in a flow ---------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("time", TIME)
@pytest.mark.parametrize("divergence", ["exact", "hutchinson-rademacher"])
def test_both_engines_give_the_same_density_and_gradients(divergence: str, time: str, context: int) -> None:
    field = make((4, 3), time, context=context)
    x, c = states().detach(), torch.randn(5, context).double() if context else None
    found = []
    for engine in ("pycnf", "torchdiffeq"):
        solver = Solver(rtol=1e-5, atol=1e-5, engine=engine)  # type: ignore[arg-type]
        flow = CNF(24, field=field, context=context, divergence=divergence, solver=solver).double().train()
        torch.manual_seed(7)
        log_prob = flow(c).log_prob(x)
        found.append((log_prob, *gradients(log_prob.mean(), list(field.parameters()))))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-7)


def test_log_density_is_that_of_the_flow_map() -> None:
    flow = CNF(12, field=ConvNet((3, 2, 2), (4, 4)), eval_solver={"rtol": 1e-9, "atol": 1e-9}).double().eval()
    x = states(1, (3, 2, 2)).detach()
    J = torch.autograd.functional.jacobian(lambda x: flow.solve(x[None], density=False).z[0], x[0])
    with torch.no_grad():
        solution = flow.solve(x)
    torch.testing.assert_close(-solution.logp[0], torch.linalg.slogdet(J).logabsdet, atol=1e-7, rtol=1e-6)


def test_sampling_undoes_encoding() -> None:
    flow = CNF(24, field=make(), eval_solver={"rtol": 1e-9, "atol": 1e-9}).double().eval()
    x = states().detach()
    with torch.no_grad():
        there = flow.solve(x)
        back = flow.solve(there.z, reverse=True)
    torch.testing.assert_close(back.z, x, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(back.log_prob, there.log_prob, atol=1e-6, rtol=1e-6)
