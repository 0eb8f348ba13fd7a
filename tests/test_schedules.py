"""Truths about the weights of regularizers in the course of training: schedules, and steering to a target NFE."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pycnf import CNF, TPR, Regularizer, Solver, fit, objective
from pycnf.regularizers import Decay, Kinetic, LocalError, Steer, describe_regularizers, parse_regularizers
from pycnf.training import FitResult
from pycnf.training.folder import read_checkpoint
from pycnf.training.weights import PATIENCE, SPAN, WeightControl


def corners(n: int, seed: int = 0) -> Tensor:
    """Four bumps far apart, whose flow needs many steps."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(0, 4, (n,), generator=generator) * (torch.pi / 2)
    return 3 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.3 * torch.randn(n, 2, generator=generator)


def train(terms: list[Regularizer], steps: int, folder: Path | None = None, **settings: Any) -> tuple[CNF, FitResult]:
    """Train shortly with everything that is random switched on."""
    torch.manual_seed(0)
    flow = CNF(2, (8,), solver=Solver(method="bosh3", rtol=1e-2, atol=1e-2), divergence="hutchinson")
    options: dict[str, Any] = {"batch_size": 32, "lr": 2e-2, "schedule": "constant", "validate_every": 4}
    result = fit(
        flow,
        corners(200),
        regularizers=terms,
        max_steps=steps,
        output=folder,
        device="cpu",
        progress=False,
        **options | settings,
    )
    return flow, result


def weights(flow: CNF) -> Tensor:
    return torch.cat([p.detach().flatten() for p in flow.parameters()])


# --- schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1]),
        ({"start": 3}, [0, 0, 0, 1, 1, 1, 1]),
        ({"ramp": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ({"ramp": 1}, [1, 1, 1, 1, 1, 1, 1]),
        ({"start": 2, "ramp": 2}, [0, 0, 0.5, 1, 1, 1, 1]),
        ({"stop": 2}, [1, 1, 0, 0, 0, 0, 0]),
        ({"start": 1, "ramp": 4, "stop": 4}, [0, 0.25, 0.5, 0.75, 0, 0, 0]),
    ],
    ids=str,
)
def test_schedules(settings: dict[str, int], factors: list[float]) -> None:
    term = TPR(**settings)  # type: ignore[arg-type]
    assert [term.scheduled(step) for step in range(7)] == factors
    control = WeightControl([Kinetic(), term])
    assert [control.factors(step) for step in range(7)] == [[1.0, factor] for factor in factors]
    assert parse_regularizers(describe_regularizers([term])) == [term]


def test_a_ramp_rises_evenly() -> None:
    values = [TPR(start=10, ramp=500).scheduled(step) for step in range(10, 511)]
    assert values[-1] == values[-2] == 1.0
    assert all(0 < b - a == pytest.approx(1 / 500) for a, b in itertools.pairwise(values[:-1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "expected start >= 0, ramp >= 0 and stop > start, got -1, 0 and None"),
        ({"ramp": -5}, "expected start >= 0, ramp >= 0 and stop > start, got 0, -5 and None"),
        ({"start": 5, "stop": 5}, "expected start >= 0, ramp >= 0 and stop > start, got 5, 0 and 5"),
        ({"target_nfe": 0.0}, "expected target_nfe > 0 or None, got 0"),
        ({"target_nfe": float("inf")}, "expected target_nfe > 0 or None, got inf"),
    ],
    ids=str,
)
def test_impossible_schedules_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TPR(**settings)


@pytest.mark.parametrize("spec", ["tpr:start=0.5", "tpr:ramp=soon", "kinetic:stop=1e3"])
def test_unreadable_schedules_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read '.*' for (tpr|kinetic):"):
        parse_regularizers(spec)


def test_factors_scale_the_weights_of_an_objective() -> None:
    flow, x = CNF(2, (6,)).double(), torch.randn(16, 2).double()
    terms = [TPR(weight=5.0, law="gauss"), Kinetic(weight=0.1)]
    whole = objective(flow, x, regularizers=terms)
    got = objective(flow, x, regularizers=terms, factors=[0.5, 0.0])
    assert got.weights == {"tpr": 2.5, "kinetic": 0.0}
    assert got.penalties == whole.penalties
    torch.testing.assert_close(got.loss, got.nll + 2.5 * got.penalties["tpr"])
    with pytest.raises(ValueError, match="expected 2 factors, one a regularizer, got 1"):
        objective(flow, x, regularizers=terms, factors=[1.0])


def test_training_follows_the_schedule() -> None:
    terms: list[Regularizer] = [TPR(weight=4.0, start=2, ramp=2, stop=6), Decay(weight=1e-3)]
    _, result = train(terms, 8)
    rows = result.rows("train")
    assert [row["weight_tpr"] for row in rows] == [0, 0, 2, 4, 4, 4, 0, 0]
    assert [row["weight_decay"] for row in rows] == [1e-3] * 8
    for row in rows:
        want = row["nll"] + row["weight_tpr"] * row["penalty_tpr"] + row["weight_decay"] * row["penalty_decay"]
        assert row["loss"] == pytest.approx(want, rel=1e-5)


def test_a_regularizer_that_has_not_begun_changes_nothing() -> None:
    settings = {"divergence": "exact"}
    found = []
    for terms in ([], [Kinetic(weight=1.0, start=6)], [Kinetic(weight=1.0, start=5)]):
        torch.manual_seed(0)
        flow = CNF(2, (8,), **settings)  # type: ignore[arg-type]
        fit(flow, corners(100), regularizers=terms, max_steps=6, batch_size=32, device="cpu", progress=False)
        found.append(weights(flow))
    assert torch.allclose(found[1], found[0], rtol=0, atol=1e-5), "the samples that it names do not move the solve"
    assert not torch.allclose(found[2], found[0], rtol=0, atol=1e-5)


def test_random_end_times_follow_the_schedule() -> None:
    flow, x, term = CNF(2, (6,)).double(), torch.randn(8, 2).double(), Steer(weight=0.8, start=1, ramp=8, stop=9)
    ends = []
    for step in range(11):
        found = objective(flow, x, regularizers=term, factors=WeightControl([term]).factors(step))
        ends.append(float(found.solution.blocks[0].ts[-1]))
    assert ends[0] == ends[9] == ends[10] == 1.0, "before the start and after the stop every solve ends at T"
    assert len(set(ends[1:9])) == 8
    assert all(abs(end - 1) < 0.1 * step for step, end in enumerate(ends[1:9], start=1)), "the width rises"


# --- steering ----------------------------------------------------------------------------------


def steered(target: float, nfe: float, steps: int = PATIENCE, **settings: Any) -> float:
    """Factor of a weight after some steps that all spend the same."""
    control = WeightControl([TPR(target_nfe=target, **settings)])
    for step in range(steps):
        control.factors(step)
        control.update(int(nfe))
    return control.factors(steps)[0]


def test_steering_follows_the_ratio_to_the_target() -> None:
    assert steered(20, 40) == pytest.approx(2)
    assert steered(20, 10) == pytest.approx(1 / 2)
    assert steered(20, 28) == pytest.approx(1.4)
    assert steered(20, 20) == 1.0
    assert steered(20, 1000) == pytest.approx(2), "at most one power of two in so many steps"
    assert steered(20, 0) == pytest.approx(1 / 2)


def test_steering_is_bounded() -> None:
    assert steered(20, 1000, steps=2 * SPAN * PATIENCE) == 2.0**SPAN
    assert steered(20, 1, steps=2 * SPAN * PATIENCE) == 2.0**-SPAN


def test_weights_that_are_held_back_are_not_steered() -> None:
    assert steered(20, 40, start=PATIENCE) == 1.0
    assert steered(20, 40, ramp=PATIENCE + 1) == pytest.approx(1.0)
    assert steered(20, 40, steps=2 * PATIENCE, start=PATIENCE) == pytest.approx(2)
    control = WeightControl([TPR(target_nfe=20, stop=1)])
    control.factors(0)
    control.update(40)
    control.factors(1)
    control.update(40)
    assert control.powers == [pytest.approx(1 / PATIENCE)]


def test_only_terms_with_a_target_are_steered() -> None:
    control = WeightControl([TPR(), TPR(target_nfe=20), Kinetic(target_nfe=80)])
    control.factors(0)
    control.update(40)
    assert control.powers[0] == 0.0
    assert control.powers[1] == pytest.approx(1 / PATIENCE)
    assert control.powers[2] == pytest.approx(-1 / PATIENCE)


def response(target: float | None) -> tuple[float, float]:
    """Weight at the end of a training run, and mean evaluations of its last steps."""
    _, result = train([LocalError(weight=0.3, target_nfe=target)], 200)
    rows = result.rows("train")
    return rows[-1]["weight_error"], sum(row["nfe"] for row in rows[-40:]) / 40


def test_steering_brings_training_closer_to_its_target() -> None:
    """The weight is too strong for both targets: it falls, further for the higher one, and the evaluations rise."""
    (free_weight, free), (low_weight, low), (high_weight, high) = (response(target) for target in (None, 10.0, 14.0))
    assert free_weight == 0.3
    assert high_weight < low_weight < free_weight
    assert free < low < high
    assert abs(low - 10) < abs(free - 10)
    assert abs(high - 14) < abs(free - 14)


@pytest.mark.parametrize("first", [6, 8])
def test_resuming_a_steered_run_is_exact(tmp_path: Path, first: int) -> None:
    """Stopped between or at checkpoints, within the ramp or after it, and gone on with."""
    terms: list[Regularizer] = [
        LocalError(weight=0.4, target_nfe=300.0),
        TPR(weight=2.0, start=3, ramp=4, target_nfe=2.0),
        Kinetic(weight=0.1, stop=7, law="uniform"),
    ]
    straight, expected = train(terms, 14, tmp_path / "straight")
    train(terms, first, tmp_path / "halves")
    resumed, result = train(terms, 14, tmp_path / "halves", resume=True)
    assert torch.equal(weights(straight), weights(resumed))
    powers = [read_checkpoint(tmp_path / name / "last.ckpt")["weights"] for name in ("straight", "halves")]
    assert powers[0] == powers[1]
    assert powers[0][0] < 0 < powers[0][1]
    assert powers[0][2] == 0
    for mine, theirs in zip(result.rows("train"), expected.rows("train"), strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
