"""Truths about experiments: arms at one tolerance, pairs by seed, statistics, restarts and failures."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pycnf.data import Dataset, describe, load, names
from pycnf.experiments import (
    PRESETS,
    ComparisonResult,
    Setup,
    compare,
    comparison,
    parse_arms,
    parse_seeds,
    setup_for,
)
from pycnf.experiments.results import contrast
from pycnf.records import read_json
from pycnf.solve import Solver

TINY: dict[str, Any] = {"max_steps": 4, "batch_size": 100, "hidden": (8,), "progress": False, "device": "cpu"}
KEYS = {
    *(
        "data",
        "regularizer",
        "seed",
        "rtol",
        "atol",
        "nll",
        "nfe_train",
        "nfe_backward",
        "nfe_test",
        "seconds",
    ),
    *("device", "versions", "command", "accepted", "rejected", "test_rtol", "test_atol", "nll_se", "steps"),
    *("method", "gradient", "divergence", "nfe_train_last", "date", "status", "setup"),
}


@pytest.fixture(scope="module")
def data() -> Dataset:
    """A few rows of POWER."""
    full = load("power")
    return dataclasses.replace(full, train=full.train[:400], validation=full.validation[:100], test=full.test[:200])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def result(data: Dataset, folder: Path) -> ComparisonResult:
    return compare(data, "none tpr:weight=5", 2, output=folder, test_tolerances=(1e-2, 1e-5), **TINY)


def never(*args: Any, **kwargs: Any) -> Any:
    pytest.fail("a recorded run was made again")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [(3, (0, 1, 2)), ("3", (0, 1, 2)), ("0,3,7", (0, 3, 7)), ([4], (4,)), ("4,", (4,)), ("0, 2", (0, 2))],
)
def test_seeds_are_a_number_or_a_list(text: Any, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", [0, -1, "", "x", "1,1", [-2], "1.5"])
def test_impossible_seeds_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_seeds(text)


def test_arms_share_the_tolerance() -> None:
    arms = parse_arms(["none", "tpr:weight=5 tpr:weight=50,degree=2"], Setup(rtol=1e-3, test_atol=1e-6))
    assert [arm.label for arm in arms] == ["none", "tpr:weight=5", "tpr:weight=50,degree=2"]
    assert {arm.tolerance for arm in arms} == {(1e-3, 1e-4, 1e-5, 1e-6)}


@pytest.mark.parametrize("specs", ["none@1e-6 tpr", "none tpr@1e-4:1e-6", "none@1e-4/1e-8:1e-5 tpr"])
def test_unequal_tolerances_are_refused_unless_asked_for(specs: str) -> None:
    with pytest.raises(ValueError, match="allow_unequal_tolerance=True"):
        parse_arms(specs, Setup())
    labels = [arm.label for arm in parse_arms(specs, Setup(), allow_unequal_tolerance=True)]
    assert all("@1e-" in label for label in labels), "every label tells its tolerance"


def test_tolerances_of_an_arm_of_its_own_are_read() -> None:
    specs = "none@1e-6 none@1e-6/1e-8 none@1e-4:1e-6"
    arms = parse_arms(specs, Setup(), allow_unequal_tolerance=True)
    assert [arm.tolerance for arm in arms] == [
        (1e-6, 1e-6, 1e-6, 1e-6),
        (1e-6, 1e-8, 1e-6, 1e-8),
        (1e-4, 1e-4, 1e-6, 1e-6),
    ]
    assert parse_arms("none@1e-6 tpr@1e-6", Setup())[1].setup.rtol == 1e-6, "equal tolerances are accepted"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ("", "at least one regularizer"),
        ("none none", "given twice"),
        ("none tpr tpr:weight=5", "given twice"),
        ("none@", "cannot read the tolerance"),
        ("none@x", "cannot read the tolerance"),
        ("none@-1", "rtol > 0"),
        ("mystery", "unknown regularizer"),
    ],
)
def test_unreadable_arms_are_refused(specs: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arms(specs, Setup())


def test_every_preset_builds_a_flow() -> None:
    assert set(names("toy")) | {"power", "gas", "hepmass", "miniboone", "bsds300"} <= set(PRESETS)
    for name in PRESETS:
        features = describe(name).features
        assert setup_for(name).build(features, seed=0).features == features
    assert setup_for("power").to_dict()["hidden"] == [60, 60, 60]
    assert setup_for("moons").T == 0.5


def test_settings_replace_those_of_the_preset() -> None:
    setup = setup_for("moons", {"hidden": (8,), "T": None, "lr": 1e-2})
    assert (setup.hidden, setup.T, setup.lr) == ((8,), 0.5, 1e-2)
    assert setup_for("hepmass", rows=500).batch_size == 500
    assert setup_for("hepmass", {"batch_size": 900}, rows=500).batch_size == 900, "what was asked for stays"
    with pytest.raises(ValueError, match="unknown setting 'width'"):
        setup_for("moons", {"width": 8})
    with pytest.raises(ValueError, match="unknown method"):
        setup_for("moons", {"method": "newton"})


def test_setup_is_rebuilt_from_plain_values() -> None:
    setup = Setup(hidden=(3, 4), method="rk4", n_steps=7)
    assert Setup(**setup.to_dict()) == setup
    assert not setup.adaptive


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (torch.cat([p.flatten() for p in Setup().build(2, s).parameters()]) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_say_everything(result: ComparisonResult) -> None:
    assert len(result.rows) == 4
    for row in result.rows:
        assert set(row) >= KEYS
        assert row["status"] == "finished"
        assert math.isfinite(row["nll"])
        assert row["nfe_test"] > 0
        assert (row["rtol"], row["atol"], row["test_rtol"], row["test_atol"]) == (1e-4, 1e-4, 1e-5, 1e-5)
        loose, tight = row["tolerances"]
        assert loose["nfe"] <= tight["nfe"]
        assert tight["nll"] == pytest.approx(row["nll"], rel=1e-6)
        assert tight["nfe"] == row["nfe_test"], "the test tolerance again"
    assert result.equal_tolerance


def test_arms_are_paired_and_alternate(result: ComparisonResult) -> None:
    order = [(row["arm"], row["seed"]) for row in result.rows]
    assert order == [("none", 0), ("tpr:weight=5", 0), ("tpr:weight=5", 1), ("none", 1)]
    first = {(row["arm"], row["seed"]): row["curve"]["nll"][0] for row in result.rows}
    for seed in (0, 1):
        assert first["none", seed] == first["tpr:weight=5", seed], "same weights, same first batch"


def test_evaluations_are_those_of_the_solver(data: Dataset) -> None:
    steps, stages = 5, 4
    run = compare(data, "none", 1, method="rk4", n_steps=steps, **TINY)
    assert run.rows[0]["nfe_train"] == run.rows[0]["nfe_test"]
    assert 0 <= run.rows[0]["nfe_test"] - steps * stages <= 1
    assert run.rows[0]["tolerances"] == [], "a fixed-step method has no tolerance"


def test_backward_evaluations_are_counted(data: Dataset) -> None:
    run = compare(data, "none", 1, gradient="adjoint", test_tolerances=(), **TINY)
    assert run.rows[0]["nfe_backward"] > 0


def test_a_record_is_read_back(result: ComparisonResult, folder: Path) -> None:
    again = ComparisonResult.load(folder / "comparison.json")
    assert again.summary() == result.summary()
    record = read_json(folder / "comparison.json")
    assert {"command", "versions", "device", "date", "seeds", "configuration"} <= set(record)
    assert record["arms"] == again.rows
    (folder / "other.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="not the record of a comparison"):
        ComparisonResult.load(folder / "other.json")


def test_recorded_runs_are_not_made_again(
    result: ComparisonResult, data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "train_and_test", never)
    again = compare(data, "none tpr:weight=5", 2, output=folder, test_tolerances=(1e-2, 1e-5), **TINY)
    assert again.summary() == result.summary()


def test_other_runs_are_made(data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def note(*args: Any, **kwargs: Any) -> dict[str, Any]:
        made.append(args[2])
        return row("none", args[2], nll=0.0, nll_se=0.0, nfe_test=1.0)

    monkeypatch.setattr(comparison, "train_and_test", note)
    compare(data, "none", "0,2", output=folder, test_tolerances=(1e-2, 1e-5), **TINY)
    assert made == [2], "seed 0 is recorded"
    compare(data, "none", 1, output=folder, test_tolerances=(1e-2, 1e-5), **(TINY | {"lr": 1e-2}))
    assert made == [2, 0], "other settings"
    compare(data, "none", 1, output=folder, test_tolerances=(1e-2, 1e-5), overwrite=True, **TINY)
    assert made == [2, 0, 0], "asked for"


def test_a_failing_arm_is_recorded_and_leaves_the_others(data: Dataset, tmp_path: Path) -> None:
    specs = "none@1e-3 none@1e-7:1e-3"
    result = compare(
        data, specs, 1, output=tmp_path, max_nfe=22, allow_unequal_tolerance=True, test_tolerances=(), **TINY
    )
    good, bad = result.rows
    assert good["status"] == "finished"
    assert bad["status"] == "failed"
    assert "max_nfe = 22" in bad["error"]
    assert set(bad) >= KEYS
    assert not result.equal_tolerance
    assert [line["failed"] for line in result.summary()] == [0, 1]
    assert result.summary()[1]["nll"]["mean"] is None
    assert read_json(tmp_path / "comparison.json")["arms"][1]["error"] == bad["error"]


def test_an_interrupt_keeps_what_is_finished(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = comparison.train_and_test, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(comparison, "train_and_test", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(data, "none", 2, output=tmp_path, test_tolerances=(), **TINY)
    partial = ComparisonResult.load(tmp_path / "comparison.json")
    assert (partial.status, len(partial.rows)) == ("interrupted", 1)
    whole = compare(data, "none", 2, output=tmp_path, test_tolerances=(), **TINY)
    assert (whole.status, len(whole.rows)) == ("finished", 2)
    assert calls == [0, 1, 1], "only the interrupted run was made again"


def test_an_interrupted_run_is_resumed(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycnf.training import task

    real, calls = task.objective, []

    def counted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(task, "objective", counted)
    options = TINY | {"max_steps": 6, "validate_every": 2, "test_tolerances": ()}
    with pytest.raises(KeyboardInterrupt):
        compare(data, "none", 1, output=tmp_path, **options)
    resumed = compare(data, "none", 1, output=tmp_path, **options).rows[0]
    assert len(calls) == 4 + 4, "from step 2 on"
    whole = compare(data, "none", 1, **options).rows[0]
    assert resumed["nll"] == whole["nll"], "as if it had never been interrupted"
    assert resumed["curve"] == whole["curve"]


def test_bad_input_is_told_before_anything_runs(data: Dataset, tmp_path: Path) -> None:
    for options, message in (
        ({"batch_size": 401}, "batch_size 401 is larger than the 400 training rows"),
        ({"hidden": (0,)}, "hidden widths >= 1"),
        ({"rtol": 0.0}, "rtol > 0"),
        ({"test_tolerances": (-1.0,)}, "rtol > 0"),
        ({"unheard": 1}, "unknown setting 'unheard'"),
        ({"seeds": 0}, "at least one seed"),
        ({"device": "abacus"}, "unknown device"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(data, output=tmp_path, **(TINY | options))
    assert list(tmp_path.iterdir()) == []


def row(arm: str, seed: int, **values: Any) -> dict[str, Any]:
    metrics = dict.fromkeys(("nfe_train", "nfe_train_last", "nfe_backward", "accepted", "rejected", "seconds"), 1.0)
    return {"arm": arm, "seed": seed, "status": "finished", "tolerances": [], **metrics, **values}


def test_statistics_are_paired_by_seed() -> None:
    nll, nfe = {"a": [1.0, 2.0, 4.0], "b": [1.5, 1.8, 4.4]}, {"a": [50, 44, 56], "b": [44, 38, 44]}
    rows = [row(arm, s, nll=nll[arm][s], nfe_test=nfe[arm][s]) for s in (2, 0, 1) for arm in "ba"]
    result = ComparisonResult(rows=rows, data="x", arms=("a", "b"), seeds=(0, 1, 2))
    first, second = result.summary()
    assert first["nll"] == {
        "mean": pytest.approx(7 / 3),
        "sd": pytest.approx(np.std(nll["a"], ddof=1)),
        "se": pytest.approx(np.std(nll["a"], ddof=1) / math.sqrt(3)),
    }
    difference = np.subtract(nll["b"], nll["a"])
    half = stats.t.ppf(0.975, 2) * difference.std(ddof=1) / math.sqrt(3)
    assert second["nll"]["difference"] == pytest.approx(difference.mean())
    assert second["nll"]["low"] == pytest.approx(difference.mean() - half)
    assert second["nll"]["high"] == pytest.approx(difference.mean() + half)
    assert second["nll"]["p"] == pytest.approx(stats.ttest_rel(nll["b"], nll["a"]).pvalue)
    assert second["nll"]["ratio"] is None, "a ratio of log-likelihoods means nothing"
    assert second["nfe_test"]["ratio"] == pytest.approx(126 / 150)
    assert second["nfe_test"]["change"] == pytest.approx(126 / 150 - 1)


def test_only_seeds_that_both_arms_finished_are_compared() -> None:
    rows = [
        row("a", 0, nll=1.0, nfe_test=10),
        row("a", 1, nll=9.0, nfe_test=99),
        row("b", 0, nll=2.0, nfe_test=5),
    ]
    rows.append({"arm": "b", "seed": 1, "status": "failed", "error": "no"})
    result = ComparisonResult(rows=rows, data="x", arms=("a", "b"), seeds=(0, 1))
    second = result.summary()[1]
    assert second["nll"]["difference"] == 1.0
    assert second["nfe_test"]["ratio"] == 0.5
    assert second["nll"]["sd"] is None
    assert [failure["seed"] for failure in result.failures] == [1]


def test_equal_differences_have_no_p_value() -> None:
    assert contrast([1.0, 2.0], [0.0, 1.0])["p"] is None
    assert contrast([], [])["difference"] is None


def test_setup_gives_the_solvers_of_training_and_test() -> None:
    setup = Setup(rtol=1e-3, test_rtol=1e-6, max_nfe=99)
    flow = setup.build(2, 0)
    assert flow.solver == Solver(rtol=1e-3, atol=1e-4, max_nfe=99)
    assert flow.eval_solver == Solver(rtol=1e-6, atol=1e-5), "the test has no budget"
