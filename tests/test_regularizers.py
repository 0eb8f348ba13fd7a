"""Truths about TPR and the protocol of regularizers."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from problems import Calls, Wave, flat_gradient, small_flow
from torch import Tensor

from pycnf import CNF, TPR, Regularizer, Solution, Solver, SolveStats, objective
from pycnf.regularizers import check_regularizers, describe_regularizers, parse_regularizers
from pycnf.regularizers.polynomial import orthonormal_basis, polynomial_residual
from pycnf.regularizers.times import LAWS
from pycnf.solve import METHODS
from pycnf.stepper import Attempt

T = 0.5


def sampled(regularizer: TPR) -> Tensor:
    """Times 0, those of the regularizer, T."""
    inner = regularizer.sample_times() * T
    return torch.cat([torch.zeros(1).double(), inner, torch.full((1,), T).double()])


def polynomial(ts: Tensor, degree: int, batch: tuple[int, ...] = (6,), features: int = 3) -> Tensor:
    """Trajectories (K, *batch, D) whose coordinates are polynomials of exactly this degree in t."""
    coefficients = torch.randn(degree + 1, *batch, features).double()
    powers = ts.unsqueeze(1) ** torch.arange(degree + 1)
    return torch.einsum("kp,p...->k...", powers, coefficients)


def solution(
    ts: Tensor, z: Tensor, logp: Tensor | None = None, tolerance: tuple[float, float] | None = None
) -> Solution:
    return Solution(ts, z, logp, SolveStats(), tolerance=tolerance)


# --- the value ---------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("degree", "times"), [(0, 1), (1, 1), (1, 2), (2, 3), (3, 6), (5, 8)])
def test_zero_on_polynomials_and_positive_above(degree: int, times: int, law: str) -> None:
    tpr = TPR(degree=degree, times=times, law=law)  # type: ignore[arg-type]
    ts = sampled(tpr)
    assert len(ts) == times + 2
    for lower in range(degree + 1):
        z = polynomial(ts, lower)
        assert float(tpr.penalty(solution(ts, z))) <= 1e-25 * float(z.square().max())
    above = float(tpr.penalty(solution(ts, polynomial(ts, degree + 1))))
    assert above > 1e-16, "far above rounding, however close the times"


@pytest.mark.parametrize("degree", [0, 1, 2, 4])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3)], ids=str)
def test_equals_its_definition(degree: int, batch: tuple[int, ...]) -> None:
    """|(I - G (G^T G)^-1 G^T) Z|^2 / (K B), by least squares on monomials."""
    ts = torch.tensor([0.0, 0.07, 0.2, 0.31, 0.42, 0.5]).double()
    z = torch.randn(6, *batch, 3).double()
    g = ts.unsqueeze(1) ** torch.arange(degree + 1)
    flat = z.reshape(6, -1)
    residual = flat - g @ torch.linalg.lstsq(g, flat).solution
    want = residual.square().sum() / (6 * math.prod(batch))
    got = TPR(degree=degree, times=4).penalty(solution(ts, z))
    torch.testing.assert_close(got, want, atol=1e-14, rtol=1e-9)


@pytest.mark.parametrize("degree", [0, 1, 3, 6])
def test_projection(degree: int) -> None:
    ts = torch.rand(9).double().sort().values
    q = orthonormal_basis(ts, degree)
    r = torch.eye(9).double() - q @ q.t()
    assert q.shape == (9, degree + 1)
    torch.testing.assert_close(q.t() @ q, torch.eye(degree + 1).double(), atol=1e-13, rtol=0)
    torch.testing.assert_close(r @ r, r, atol=1e-13, rtol=0)
    torch.testing.assert_close(r, r.t(), atol=1e-15, rtol=0)
    assert float(torch.trace(r)) == pytest.approx(9 - degree - 1)
    torch.testing.assert_close(r @ polynomial(ts, degree, ()), torch.zeros(9, 3).double(), atol=1e-11, rtol=0)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_invariances(degree: int) -> None:
    """The clock may be rescaled, shifted, reversed, and the samples named in any order."""
    ts, z = torch.rand(7).double().sort().values, torch.randn(7, 5, 2).double()
    want = polynomial_residual(ts, z, degree)
    for same_ts, same_z in (
        (3.0 * ts, z),
        (ts - 4.0, z),
        (1.0 - ts, z),
        ((1.0 - ts).flip(0), z.flip(0)),
        (ts[[3, 0, 6, 1, 5, 2, 4]], z[[3, 0, 6, 1, 5, 2, 4]]),
    ):
        torch.testing.assert_close(polynomial_residual(same_ts, same_z, degree), want, atol=1e-14, rtol=1e-9)


def test_scaling_and_averages() -> None:
    ts, z = torch.rand(6).double().sort().values, torch.randn(6, 5, 2).double()
    want = polynomial_residual(ts, z, 1)
    torch.testing.assert_close(polynomial_residual(ts, 3 * z, 1), 9 * want)
    torch.testing.assert_close(polynomial_residual(ts, torch.cat([z, z], dim=1), 1), want)  # mean over the batch
    torch.testing.assert_close(polynomial_residual(ts, torch.cat([z, z], dim=2), 1), 2 * want)  # a sum over D
    torch.testing.assert_close(polynomial_residual(ts, z + polynomial(ts, 1, (5,), 2), 1), want)


def test_too_few_times_give_zero() -> None:
    ts, z = torch.tensor([0.0, 1.0]).double(), torch.randn(2, 5, 2).double()
    assert float(polynomial_residual(ts, z, 1)) == 0.0
    assert float(polynomial_residual(ts, z, 2)) == 0.0


def test_a_smooth_curve_is_closer_to_higher_degrees() -> None:
    ts = torch.linspace(0, 1, 9).double()
    z = torch.stack([torch.sin(3 * ts), torch.exp(ts)], dim=1).unsqueeze(1)
    values = [float(polynomial_residual(ts, z, p)) for p in range(6)]
    assert values == sorted(values, reverse=True)


def test_float32_states() -> None:
    ts = torch.tensor([0.0, 0.2, 0.35, 0.5]).double()
    z = torch.randn(4, 50, 3)
    got = TPR().penalty(solution(ts, z))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), TPR().penalty(solution(ts, z.double())), rtol=1e-5, atol=0)


def test_channels() -> None:
    ts = torch.tensor([0.0, 0.1, 0.35, 0.5]).double()
    z, logp = torch.randn(4, 8, 3).double(), torch.randn(4, 8).double()
    both = solution(ts, z, logp)
    on_z, on_logp = polynomial_residual(ts, z, 1), polynomial_residual(ts, logp.unsqueeze(-1), 1)
    torch.testing.assert_close(TPR(channels="z").penalty(both), on_z)
    torch.testing.assert_close(TPR(channels="logp").penalty(both), on_logp)
    torch.testing.assert_close(TPR(channels="logp", logp_weight=7.0).penalty(both), on_logp)
    torch.testing.assert_close(TPR(channels="both").penalty(both), on_z + on_logp)
    torch.testing.assert_close(TPR(channels="both", logp_weight=0.3).penalty(both), on_z + 0.3 * on_logp)
    for channels in ("logp", "both"):
        with pytest.raises(ValueError, match="needs the log-density"):
            TPR(channels=channels).penalty(solution(ts, z))  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", ["z", "logp", "both"])
def test_per_dimension(channels: str) -> None:
    ts = torch.tensor([0.0, 0.1, 0.35, 0.5]).double()
    held = solution(ts, torch.randn(4, 8, 3).double(), torch.randn(4, 8).double())
    plain, scaled = (TPR(channels=channels, per_dimension=p).penalty(held) for p in (False, True))  # type: ignore[arg-type]
    torch.testing.assert_close(scaled, plain / (3 * math.log(2)))


# --- the language of the step control ------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_residuals_in_units_of_the_tolerance(degree: int) -> None:
    """Mean square over times, batch and D of (I - G (G^T G)^-1 G^T) Z / (atol + rtol max_k |Z_k|), plus log p's."""
    rtol, atol = 1e-2, 1e-3
    ts = torch.tensor([0.0, 0.07, 0.2, 0.31, 0.42, 0.5]).double()
    y = torch.randn(6, 7, 4).double() * torch.tensor([0.1, 1.0, 10.0, 100.0]).double()
    g = ts.unsqueeze(1) ** torch.arange(degree + 1)
    residual = y.flatten(1) - g @ torch.linalg.lstsq(g, y.flatten(1)).solution
    square = (residual.view_as(y) / (atol + rtol * y.abs().max(0).values)).square().mean((0, 1))
    held = solution(ts, y[..., :3], y[..., 3], (rtol, atol))
    settings = {"degree": degree, "times": 4, "unit": "tolerance"}
    for channels, want in (
        ("z", square[:3].mean()),
        ("logp", square[3]),
        ("both", square[:3].mean() + 0.3 * square[3]),
    ):
        tpr = TPR(channels=channels, logp_weight=0.3 if channels == "both" else 1.0, **settings)  # type: ignore[arg-type]
        torch.testing.assert_close(tpr.penalty(held), want, rtol=1e-9, atol=0)
        rooted = dataclasses.replace(tpr, power=0.4)
        torch.testing.assert_close(rooted.penalty(held), want**0.2, rtol=1e-9, atol=0)


def test_relative_tolerance_forgets_the_size_of_the_states() -> None:
    ts, z = torch.rand(5).double().sort().values, torch.randn(5, 6, 2).double()
    tpr = TPR(unit="tolerance")
    sizes = torch.tensor([1e-3, 1e4]).double()
    want = tpr.penalty(solution(ts, z, tolerance=(1e-3, 0.0)))
    torch.testing.assert_close(tpr.penalty(solution(ts, sizes * z, tolerance=(1e-3, 0.0))), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(tpr.penalty(solution(ts, z, tolerance=(1e-4, 0.0))), 100 * want, rtol=1e-12, atol=0)


def test_no_gradient_passes_through_the_tolerance() -> None:
    ts, z = torch.rand(5).double().sort().values, torch.randn(5, 6, 2).double().requires_grad_()
    penalty = TPR(unit="tolerance").penalty(solution(ts, z, tolerance=(1e-2, 1e-3)))
    scale = 1e-3 + 1e-2 * z.detach().abs().max(0).values
    by_hand = polynomial_residual(ts, z / scale, 1) / 2
    torch.testing.assert_close(torch.autograd.grad(penalty, z), torch.autograd.grad(by_hand, z))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_root_of_the_residual_counts_pieces(degree: int) -> None:
    """The residual of a degree p on a piece of length h falls like h^(p+1): its root of that order halves with h."""
    tpr = TPR(degree=degree, times=degree + 3, law="gauss", unit="tolerance", power=1 / (degree + 1))
    found = []
    for h in (0.1, 0.05):
        ts = h * torch.cat([torch.zeros(1), tpr.sample_times(), torch.ones(1)]).double()
        z = torch.stack([torch.sin(ts + 1), torch.exp(-ts)], dim=1).unsqueeze(1)
        found.append(float(tpr.penalty(solution(ts, z, tolerance=(1e-12, 1e-4)))))
    assert found[0] / found[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_solutions_know_the_tolerance_of_their_steps(method: str) -> None:
    """The tolerance of a solution is that by which its steps were judged, None where they were not."""
    kind = METHODS[method].kind
    settings = {"n_steps": 4} if kind == "fixed" else {"rtol": 1e-2, "atol": 1e-3}
    flow, x, seen = small_flow(), torch.randn(4, 2).double(), list[Attempt]()
    solver = Solver(method=method, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        observer = (lambda _, attempt: seen.append(attempt)) if kind == "adaptive" else None
        block = flow.solve_blocks(x, None, [None], solver=solver, watched=kind == "adaptive", observer=observer).blocks[
            0
        ]
    if kind != "adaptive":
        assert block.tolerance == (None if kind == "fixed" else (1e-2, 1e-3))
        return
    assert block.tolerance is not None
    assert block.steps is not None
    rtol, atol = block.tolerance
    taken = [attempt for attempt in seen if attempt.accepted]
    for attempt, scale, error in zip(taken, block.steps.scale, block.steps.error, strict=True):
        want = atol + rtol * torch.maximum(attempt.y0.abs(), attempt.y1.abs())
        torch.testing.assert_close(scale, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(error, attempt.error * want, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("samples", ["dense", "exact"])
def test_dense_output_hides_high_degrees_of_a_single_step(samples: str) -> None:
    flow, x = small_flow(tol=1e-6, method="dopri5"), torch.randn(8, 2).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(3)
    flow.solver = Solver(first_step=1.0, min_step=1.0, samples=samples)  # type: ignore[arg-type]
    values = [
        float(objective(flow, x, regularizers=TPR(degree=p, times=6, law="gauss")).penalties["tpr"]) for p in (3, 4)
    ]
    assert values[0] > 1e-12
    assert (values[1] < 1e-24) == (samples == "dense")


def test_solves_without_tolerance_are_refused() -> None:
    flow = small_flow(solver=Solver(method="rk4", n_steps=4))
    with pytest.raises(ValueError, match="unit='tolerance' needs a solve that has one: take an adaptive method"):
        objective(flow, torch.randn(4, 2).double(), regularizers=TPR(unit="tolerance"))


def test_tolerances_do_not_move_the_default() -> None:
    """The paper's penalty is the same number whatever the solve's tolerance."""
    ts, z = torch.rand(5).double().sort().values, torch.randn(5, 6, 2).double()
    want = TPR().penalty(solution(ts, z))
    assert torch.equal(TPR().penalty(solution(ts, z, tolerance=(1e-3, 1e-3))), want)
    assert torch.equal(want, polynomial_residual(ts, z, 1))


# --- derivatives of the value --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"degree": 0},
        {"degree": 2, "times": 3},
        {"channels": "both"},
        {"channels": "logp"},
        {"channels": "both", "power": 0.5},
    ],
    ids=str,
)
def test_gradcheck(settings: dict[str, object]) -> None:
    tpr = TPR(law="gauss", **settings)  # type: ignore[arg-type]
    ts = sampled(tpr)
    z = torch.randn(len(ts), 3, 2).double().requires_grad_()
    logp = torch.randn(len(ts), 3).double().requires_grad_()

    def penalty(z: Tensor, logp: Tensor) -> Tensor:
        return tpr.penalty(solution(ts, z, logp))

    assert torch.autograd.gradcheck(penalty, (z, logp))
    assert torch.autograd.gradgradcheck(penalty, (z, logp))


# --- the times ---------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("times", [1, 2, 3, 8, 31])
def test_times_are_sorted_fractions(times: int, law: str) -> None:
    tpr = TPR(degree=0, times=times, law=law)  # type: ignore[arg-type]
    for _ in range(20):
        u = tpr.sample_times()
        assert u.shape == (times,)
        assert u.dtype == torch.float64
        assert 0 < float(u.min()) <= float(u.max()) < 1
        assert torch.equal(u, u.sort().values)
        assert len(u.unique()) == times


@pytest.mark.parametrize("times", [1, 2, 5, 12])
def test_fixed_nodes(times: int) -> None:
    gauss = TPR(degree=0, times=times, law="gauss").sample_times()
    nodes = np.sort(np.polynomial.legendre.legroots([0] * times + [1]))
    np.testing.assert_allclose(gauss, (nodes + 1) / 2, atol=1e-13)
    chebyshev = TPR(degree=0, times=times, law="chebyshev").sample_times()
    np.testing.assert_allclose(chebyshev, (np.sort(np.polynomial.chebyshev.chebpts1(times)) + 1) / 2, atol=1e-14)


def test_stratified_times_fall_into_their_strata() -> None:
    tpr = TPR(times=7, law="stratified")
    for _ in range(50):
        assert torch.equal(torch.floor(tpr.sample_times() * 7), torch.arange(7).double())


@pytest.mark.parametrize("law", ["uniform", "stratified"])
def test_random_times_are_uniform(law: str) -> None:
    """Mean and variance within 4.9 standard errors of 1/2 and 1/12 (false-alarm rate 1e-6 each)."""
    tpr = TPR(times=4, law=law)  # type: ignore[arg-type]
    u = torch.cat([tpr.sample_times() for _ in range(2500)])
    assert not torch.equal(tpr.sample_times(), tpr.sample_times())
    assert abs(float(u.mean()) - 0.5) <= 4.9 * math.sqrt(1 / 12 / len(u))
    assert abs(float(u.var()) - 1 / 12) <= 4.9 * math.sqrt(1 / 180 / len(u))


@pytest.mark.parametrize("degree", [1, 3])
def test_even_times_make_a_steadier_estimate(degree: int) -> None:
    """On a smooth path the penalty at stratified times varies less than at uniform ones, at fixed ones not at all."""
    spread = {}
    for law in LAWS:
        tpr = TPR(degree=degree, times=6, law=law)  # type: ignore[arg-type]
        values = []
        for _ in range(200):
            ts = sampled(tpr)
            values.append(
                tpr.penalty(solution(ts, torch.stack([torch.sin(5 * ts), torch.exp(2 * ts)], 1).unsqueeze(1)))
            )
        spread[law] = float(torch.stack(values).std() / torch.stack(values).mean())
    assert spread["stratified"] < 0.6 * spread["uniform"]
    assert spread["gauss"] < 1e-12
    assert spread["chebyshev"] < 1e-12


# --- in the objective --------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("law", LAWS)
def test_no_further_forward_calls(law: str, blocks: int) -> None:
    flow = small_flow(blocks=blocks, tol=1e-5, method="dopri5")
    x = torch.randn(16, 2).double()
    without = objective(flow, x)
    tpr = TPR(degree=1, times=5, law=law, channels="both")  # type: ignore[arg-type]
    with_tpr = objective(flow, x, regularizers=[tpr])
    assert with_tpr.solution.stats.nfe == without.solution.stats.nfe
    assert with_tpr.solution.stats.accepted == without.solution.stats.accepted
    torch.testing.assert_close(with_tpr.nll, without.nll, atol=0, rtol=0)


def test_no_further_forward_calls_of_a_users_field() -> None:
    calls = Calls(Wave())
    flow = CNF(2, field=calls)
    x = torch.randn(8, 2).double()
    counts = []
    for regularizers in ((), (TPR(), TPR(times=6, degree=3))):
        calls.count = 0
        stats = objective(flow, x, regularizers=regularizers).solution.stats
        assert stats.nfe == calls.count
        counts.append(calls.count)
    assert counts[0] == counts[1]


@dataclasses.dataclass(frozen=True)
class Ends(Regularizer):
    """Penalize the squared displacement: a regularizer that names no times."""

    name: ClassVar[str] = "ends-of-a-test"
    weight: float = 1.0

    def penalty(self, solution: Solution) -> Tensor:
        return (solution.z[-1] - solution.z[0]).square().sum(-1).mean()


@pytest.mark.parametrize("blocks", [1, 3])
def test_objective_is_the_sum_of_its_parts(blocks: int) -> None:
    flow, x = small_flow(blocks=blocks, tol=1e-6), torch.randn(16, 2).double()
    terms = [
        TPR(weight=3.0, law="gauss"),
        TPR(weight=0.5, law="gauss", times=4, degree=2, channels="both"),
        Ends(2.0),
    ]
    got = objective(flow, x, regularizers=terms)
    assert list(got.penalties) == ["tpr", "tpr-1", "ends-of-a-test"]
    assert not any(p.requires_grad for p in got.penalties.values())
    total = sum(t.weight * p for t, p in zip(terms, got.penalties.values(), strict=True))
    torch.testing.assert_close(got.loss, got.nll + total)
    torch.testing.assert_close(got.nll, -flow().log_prob(x).mean())
    for term in terms:
        alone = objective(flow, x, regularizers=term)
        position = terms.index(term)
        torch.testing.assert_close(
            alone.penalties[term.name], list(got.penalties.values())[position], atol=1e-7, rtol=1e-5
        )
    solved = flow.solve(x, times=terms[0].sample_times() * flow.T)
    by_hand = torch.stack([terms[0].penalty(block) for block in solved.blocks]).sum()
    torch.testing.assert_close(got.penalties["tpr"], by_hand, atol=1e-7, rtol=1e-5)


def test_weight_zero_changes_nothing_but_is_reported() -> None:
    flow, x = small_flow(tol=1e-6), torch.randn(8, 2).double()
    got = objective(flow, x, regularizers=[TPR(weight=0.0)])
    assert torch.equal(got.loss, got.nll)
    assert float(got.penalties["tpr"]) > 0


@pytest.mark.parametrize(
    "gradient",
    [
        {"gradient": "backprop"},
        {"gradient": "adjoint"},
        {"gradient": "adjoint", "adjoint_norm": "full"},
    ],
    ids=["backprop", "adjoint", "full norm"],
)
@pytest.mark.parametrize("samples", ["dense", "exact"])
@pytest.mark.parametrize(
    "regularizers",
    [
        [],
        [TPR(law="gauss")],
        [TPR(law="chebyshev", times=3, degree=2, channels="both"), Ends(0.5)],
    ],
    ids=["none", "tpr", "several"],
)
@pytest.mark.parametrize("field", ["perceptron", "user's"])
def test_gradients_agree_with_finite_differences(
    field: str, regularizers: list[Regularizer], samples: str, gradient: dict[str, str]
) -> None:
    """Along a random direction of all parameters, the data and the context at once."""
    solver = Solver(method="dopri8", rtol=1e-10, atol=1e-10, samples=samples, **gradient)  # type: ignore[arg-type]
    settings = {"context": 2, "solver": solver, "T": 0.7, "blocks": 2}
    flow = (
        CNF(2, (5, 4), **settings).double() if field == "perceptron" else CNF(2, field=lambda: Wave(2, 2), **settings)
    )  # type: ignore[arg-type]
    x, context = (torch.randn(5, 2).double().requires_grad_() for _ in range(2))
    leaves = [x, context, *flow.parameters()]
    got = flat_gradient(objective(flow, x, context, regularizers).loss, leaves)
    direction = torch.randn_like(got)
    pieces = direction.split([leaf.numel() for leaf in leaves])
    h, values = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            for leaf, piece in zip(leaves, pieces, strict=True):
                leaf += sign * h * piece.view_as(leaf)
            values.append(float(objective(flow, x, context, regularizers).loss))
            for leaf, piece in zip(leaves, pieces, strict=True):
                leaf -= sign * h * piece.view_as(leaf)
    # the adjoint is that of the exact trajectory, from which dense samples of dopri8 are off
    bound = 1e-3 if samples == "dense" and regularizers else 2e-6
    assert float(got @ direction) == pytest.approx((values[0] - values[1]) / (2 * h), rel=bound, abs=bound)
    for leaf, piece in zip(leaves, got.split([leaf.numel() for leaf in leaves]), strict=True):
        assert float(piece.abs().sum()) > 0, f"no gradient for a leaf of shape {tuple(leaf.shape)}"


def test_gradient_modes_agree() -> None:
    x, context = torch.randn(5, 2).double(), torch.randn(5, 2).double().requires_grad_()
    flow = CNF(2, (5, 4, 3), context=2, blocks=2).double()
    found = []
    for settings in (
        {},
        {"gradient": "adjoint"},
        {"gradient": "adjoint", "adjoint_norm": "full"},
    ):
        flow.solver = Solver(method="dopri8", rtol=1e-11, atol=1e-11, samples="exact", **settings)  # type: ignore[arg-type]
        loss = objective(flow, x, context, [TPR(law="gauss", channels="both")]).loss
        found.append(flat_gradient(loss, [context, *flow.parameters()]))
    torch.testing.assert_close(found[1], found[0], atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(found[2], found[0], atol=1e-8, rtol=1e-7)


# --- names and settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "regularizers",
    [
        [],
        [TPR()],
        [TPR(weight=0.0)],
        [
            TPR(
                weight=50.0,
                degree=3,
                times=6,
                law="stratified",
                channels="both",
                logp_weight=0.25,
                per_dimension=True,
            )
        ],
        [TPR(weight=1 / 3), TPR(channels="logp", logp_weight=math.pi)],
        [TPR(weight=123456789.0)],
        [TPR(weight=1e20), TPR(weight=1e-20)],
    ],
    ids=str,
)
def test_written_regularizers_read_back(regularizers: list[Regularizer]) -> None:
    assert parse_regularizers(describe_regularizers(regularizers)) == regularizers


@pytest.mark.parametrize(
    ("spec", "regularizers"),
    [
        ("none", []),
        ("", []),
        (" None ", []),
        ("tpr", [TPR()]),
        ("tpr:", [TPR()]),
        ("tpr:weight=50,degree=1", [TPR(weight=50.0)]),
        ("tpr: weight = 50 , law = gauss ", [TPR(weight=50.0, law="gauss")]),
        ("tpr:per_dimension=true + tpr:channels=both", [TPR(per_dimension=True), TPR(channels="both")]),
        ("tpr:weight=1e-2", [TPR(weight=0.01)]),
        ("tpr:weight=1e+2", [TPR(weight=100.0)]),
    ],
)
def test_read_regularizers(spec: str, regularizers: list[Regularizer]) -> None:
    assert parse_regularizers(spec) == regularizers


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ridge", "unknown regularizer 'ridge': choose none, default or one of .*tpr"),
        ("tpr+", "unknown regularizer ''"),
        ("tpr:alpha=5", "unknown setting 'alpha=5' of tpr.*weight"),
        ("tpr:weight", "unknown setting 'weight'"),
        ("tpr:weight=heavy", "cannot read 'heavy' for tpr:weight"),
        ("tpr:degree=1.5", "cannot read '1.5' for tpr:degree"),
        ("tpr:per_dimension=maybe", "cannot read 'maybe' for tpr:per_dimension"),
        ("tpr:law=random", "unknown law 'random': choose one of uniform"),
        ("tpr:channels=x", "unknown channels 'x': choose one of z"),
        ("tpr:degree=3", "degree 3 interpolates the 4 sampled states"),
    ],
)
def test_unreadable_regularizers_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_regularizers(spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "finite weight >= 0, got -1"),
        ({"weight": math.nan}, "finite weight >= 0, got nan"),
        ({"weight": math.inf}, "finite weight >= 0, got inf"),
        ({"degree": -1}, "degree >= 0"),
        ({"times": 0, "degree": 0}, "times >= 1"),
        ({"degree": 3, "times": 2}, "always 0: take degree <= 2 or times >= 3"),
        ({"degree": 2, "times": 1}, "always 0: take degree <= 1 or times >= 2"),
        ({"law": "random"}, "unknown law"),
        ({"channels": "x"}, "unknown channels"),
        ({"logp_weight": -0.5}, "logp_weight >= 0"),
        ({"logp_weight": math.nan}, "logp_weight >= 0"),
        ({"unit": "bits"}, "unknown unit 'bits': choose one of state, tolerance"),
        ({"power": 0.0}, "finite power > 0, got 0"),
        ({"power": math.inf}, "finite power > 0, got inf"),
        ({"unit": "tolerance", "per_dimension": True}, "averages over D as it is: choose one"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TPR(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("degree", "times"), [(2, 2), (1, 1), (0, 1), (6, 6)])
def test_largest_degree_is_allowed(degree: int, times: int) -> None:
    assert TPR(degree=degree, times=times).degree == degree


def test_lists_of_regularizers_are_checked() -> None:
    tpr = TPR()
    assert check_regularizers(None) == ()
    assert check_regularizers(tpr) == (tpr,)
    assert check_regularizers([tpr, tpr]) == (tpr, tpr)
    for wrong in ([5.0], ["tpr"], [TPR]):
        with pytest.raises(TypeError, match="expected regularizers such as TPR"):
            check_regularizers(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected regularizers such as TPR"):
        check_regularizers("tpr")  # type: ignore[arg-type]
