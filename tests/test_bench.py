"""Truths about the benchmark: one tolerance, restarts, failures, processes, statistics and figures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from pycnf.cli import app
from pycnf.data import names
from pycnf.experiments import (
    BenchResult,
    Budget,
    Setup,
    bench,
    front_points,
    load_bench,
    nfe_at_error,
    read_budget,
    setup_for,
    sweep_tolerances,
)
from pycnf.experiments.bench_results import METRICS, family, reach, weights
from pycnf.experiments.fronts import front_band, pareto
from pycnf.experiments.jobs import Job
from pycnf.experiments.pool import Event, Report, run_parallel
from pycnf.experiments.progress import Estimate
from pycnf.experiments.results import resample
from pycnf.plots import save_figure
from pycnf.plots_fronts import course_figure, front_figure, precision_figure
from pycnf.records import read_json

DATA = "mine.npy"
TOLERANCES = (1e-2, 1e-4, 1e-6)
TINY = Budget(
    name="tiny",
    about="a test",
    regularizers=("none", "tpr:weight=5"),
    data={},
    seeds=2,
    tolerances=TOLERANCES,
    sweep_rows=50,
    truth_rows=20,
    settings={"max_steps": 4, "batch_size": 50, "hidden": (8,), "validate_every": 2, "device": "cpu"},
)
KEYS = {
    *("data", "regularizer", "arm", "seed", "status", "command", "versions", "device", "date", "threads", "workers"),
    *("rtol", "atol", "test_rtol", "test_atol", "nll", "nll_se", "nfe_train", "nfe_train_last_200", "nfe_backward"),
    *("nfe_backward_last_200", "nfe_test", "accepted", "rejected", "accepted_train", "rejected_train", "seconds"),
    *("tolerances", "curve", "validation", "configuration"),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of 300 correlated rows in a file."""
    path = tmp_path_factory.mktemp("data") / "mine.npy"
    x = np.random.default_rng(0).standard_normal((300, 2))
    np.save(path, x @ [[1.0, 0.8], [0.0, 0.6]])
    return str(path)


def tiny(table: str, folder: Path, **options: Any) -> BenchResult:
    """Make a tiny benchmark in this process."""
    settings = {"budget": TINY, "data": [table], "output": folder / "out", "runs": folder / "runs", "jobs": 1}
    return bench(**(settings | {"progress": False} | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def made(table: str, folder: Path) -> BenchResult:
    return tiny(table, folder)


def files(folder: Path) -> dict[str, bytes]:
    """The records of the runs in a folder."""
    return {path.name: path.read_bytes() for path in (folder / "out" / "runs").glob("*.json")}


def test_every_run_has_a_small_record_that_says_everything(made: BenchResult, folder: Path) -> None:
    records = files(folder)
    assert len(records) == 4
    for content in records.values():
        assert len(content) < 20_000
        row = json.loads(content)
        assert set(row) >= KEYS
        assert row["status"] == "finished"
        assert [test["rtol"] for test in row["tolerances"]] == [1e-2, 1e-4, 1e-5, 1e-6], "the test's own is among them"
        for test in row["tolerances"]:
            assert test["nfe"] > 0
            assert 0 <= test["error_rms"] <= test["error_max"]
        assert row["tolerances"][-1]["error_rms"] < 1e-5
    assert {(row["arm"], row["seed"]) for row in made.rows} == {(a, s) for a in TINY.regularizers for s in (0, 1)}
    assert {row["regularizer"] for row in made.rows} == {"none", "tpr:weight=5"}
    assert {(row["rtol"], row["test_rtol"]) for row in made.rows} == {(1e-4, 1e-5)}


def test_a_benchmark_is_read_back(made: BenchResult, folder: Path) -> None:
    again = load_bench(folder / "out" / "bench.json")
    assert again == load_bench(folder / "out") == made
    record = read_json(folder / "out" / "bench.json")
    assert set(record) >= {"command", "versions", "device", "date", "seeds", "data", "budget"}
    assert record["status"] == "finished"
    assert [line["arm"] for line in record["data"][DATA]["summary"]][:2] == ["none", "tpr:weight=5"]


def test_recorded_runs_are_not_made_again_and_others_are_added(made: BenchResult, table: str, folder: Path) -> None:
    before = files(folder)
    more = tiny(table, folder, regularizers="none tpr:weight=50", seeds="0,")
    after = files(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == 5
    assert more.arms(DATA) == ("none", "tpr:weight=5", "tpr:weight=50")
    assert [line["n"] for line in more.summary(DATA)] == [2, 2, 1, 2, 2], "three arms, two tolerances"


def test_runs_of_other_settings_are_refused_before_anything_runs(made: BenchResult, table: str, folder: Path) -> None:
    before = files(folder)
    for options, name in (({"max_steps": 5}, "max_steps"), ({"rtol": 1e-3}, "rtol"), ({"test_rtol": 1e-6}, "equal")):
        with pytest.raises(ValueError, match=name if name != "equal" else "rtol = atol"):
            tiny(table, folder, **options)
    with pytest.raises(ValueError, match="sweep_rows = 50 and 40"):
        tiny(table, folder, budget=dataclasses.replace(TINY, sweep_rows=40))
    assert files(folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularizers": "tpr"}, "'none' among the regularizers"),
        ({"regularizers": "none@1e-6 tpr"}, "different tolerances"),
        ({"regularizers": "none none"}, "given twice"),
        ({"method": "rk4", "n_steps": 4}, "adaptive method"),
        ({"data": []}, "at least one data set"),
        ({"data": "moons,moons"}, "all different"),
        ({"data": "lunes"}, "no data set is called 'lunes'"),
        ({"seeds": 0}, "at least one seed"),
        ({"jobs": 0}, "jobs >= 1"),
        ({"batch_size": 1000}, r"larger than the \d+ training rows"),
        ({"width": 3}, "unknown setting 'width'"),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    options: dict[str, Any], message: str, table: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(table, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_overwritten_run_is_made_again(table: str, tmp_path: Path) -> None:
    first = tiny(table, tmp_path, seeds=1, command="one")
    again = tiny(table, tmp_path, seeds=1, command="two", regularizers="none", overwrite=True)
    assert [row["command"] for row in again.rows] == ["two", "one"], "only those asked for"
    assert again.rows[0]["nll"] == first.rows[0]["nll"]


def test_a_failed_run_is_recorded_and_leaves_the_others(table: str, tmp_path: Path) -> None:
    specs = "none error:weight=1"
    result = tiny(table, tmp_path, seeds=1, regularizers=specs, gradient="adjoint")  # error needs backprop
    good, bad = result.rows
    assert good["status"] == "finished"
    assert bad["status"] != "finished"
    assert "backprop" in bad["error"]
    assert result.failures == [bad]
    line = result.summary(DATA)[1]
    assert (line["n"], line["failed"], line["nll"]["mean"]) == (0, 1, None)
    assert result.table(DATA).loc["error:weight=1", "NFE test"] == "–"
    assert read_json(tmp_path / "out" / "bench.json")["failures"][0]["error"] == bad["error"]


def test_a_run_that_needs_too_much_fails_for_good_and_one_that_crashed_is_tried_again(
    table: str, tmp_path: Path
) -> None:
    failed = tiny(table, tmp_path, seeds=1, regularizers="none", max_nfe=3)
    assert failed.rows[0]["status"] == "failed"
    assert "max_nfe" in failed.rows[0]["error"]
    before = files(tmp_path)
    assert tiny(table, tmp_path, seeds=1, regularizers="none", max_nfe=3) == failed
    assert files(tmp_path) == before
    (path,) = (tmp_path / "out" / "runs").glob("*.json")
    path.write_text(json.dumps(read_json(path) | {"status": "crashed"}), encoding="utf-8")
    assert tiny(table, tmp_path, seeds=1, regularizers="none", max_nfe=3).rows[0]["status"] == "failed"


def test_an_interrupted_run_is_resumed(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycnf.training import task

    real, calls = task.objective, []

    def counted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(task, "objective", counted)
    options: dict[str, Any] = {"seeds": 1, "regularizers": "none", "max_steps": 6}
    with pytest.raises(KeyboardInterrupt):
        tiny(table, tmp_path, **options)
    assert files(tmp_path) == {}
    assert read_json(tmp_path / "out" / "bench.json")["status"] == "interrupted"
    resumed = tiny(table, tmp_path, **options).rows[0]
    assert len(calls) == 4 + 4, "from step 2 on"
    whole = tiny(table, tmp_path / "new", **options).rows[0]
    assert (resumed["nll"], resumed["curve"]) == (whole["nll"], whole["curve"]), "as if never interrupted"


def test_a_record_of_something_else_is_refused(made: BenchResult, table: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no benchmark"):
        load_bench(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is not the record of a run"):
        load_bench(tmp_path)
    with pytest.raises(ValueError, match=r"there are no runs of 'power': choose among mine\.npy"):
        made.summary("power")


# ---- processes --------------------------------------------------------------------------------


def work(task: tuple[Path, int], report: Report) -> None:
    """Count steps, or die: what the processes of a test do."""
    path, steps = task
    if steps < 0:
        os._exit(-steps)
    for step in range(1, steps + 1):
        report(step)
    path.write_text(str(torch.get_num_threads()), encoding="utf-8")


@pytest.mark.slow
def test_processes_do_all_tasks_and_one_that_dies_loses_its_own_alone(tmp_path: Path) -> None:
    tasks = [(tmp_path / str(i), steps) for i, steps in enumerate((3, -7, 5, 2))]
    seen: list[tuple[Event, int, int]] = []
    run_parallel(work, tasks, 2, lambda *event: seen.append(event))
    assert [path.read_text() if path.is_file() else None for path, _ in tasks] == ["1", None, "1", "1"], "one thread"
    assert ("died", 1, 7) in seen
    assert {index for event, index, _ in seen if event == "finished"} == {0, 2, 3}
    assert [index for event, index, _ in seen if event == "started"] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a Windows console has no process groups of this kind")
def test_ctrl_c_stops_the_processes_between_two_steps(table: str, tmp_path: Path) -> None:
    settings = TINY.settings | {"max_steps": 100_000}
    script = tmp_path / "call.py"
    script.write_text(
        "from pathlib import Path\n"
        "from pycnf.experiments import Budget, bench\n"
        "if __name__ == '__main__':\n"
        f"    budget = Budget(name='tiny', about='', regularizers=('none',), data={{}}, settings={settings!r})\n"
        f"    bench(budget, data=[{table!r}], seeds=3, jobs=2, output='out', runs='runs', command='call')\n",
        encoding="utf-8",
    )
    child = subprocess.Popen(
        [sys.executable, script.name],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*/last.ckpt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert child.returncode != 0
    assert "stopping after the step at hand" in said
    assert said.count("Traceback") == 1, "the processes end without a word"
    states = {path.parent.name: read_json(path)["status"] for path in tmp_path.glob("runs/*/record.json")}
    assert list(states.values()) == ["interrupted", "interrupted"], "saved, and what waited was not begun"
    assert load_bench(tmp_path / "out").rows == ()


# ---- what is measured -------------------------------------------------------------------------


def test_the_sweep_measures_the_error_against_the_closed_form() -> None:
    flow = _linear(dim=2)
    x = torch.randn(40, 2, dtype=torch.float64)
    rows = sweep_tolerances(flow, x, (1e-3, 1e-5, 1e-8), batch_size=20, truth_rows=40, warm_start=False)
    with torch.no_grad():
        for row in rows:
            solver = dataclasses.replace(flow.eval_solver, rtol=row["rtol"], atol=row["atol"])
            parts = [flow.solve(batch, solver=solver) for batch in x.split(20)]
            error = torch.cat([part.log_prob for part in parts]) - flow.fields[0].log_prob(x)
            assert row["error_rms"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-3, abs=1e-11)
            assert row["error_max"] == pytest.approx(error.abs().max().item(), rel=1e-3, abs=1e-11)
            assert row["nfe"] == sum(part.stats.nfe for part in parts) / 2
            assert row["accepted"] == sum(part.stats.accepted for part in parts) / 2
    assert [row["nfe"] for row in rows] == sorted(row["nfe"] for row in rows)
    assert rows[-1]["error_rms"] < rows[0]["error_rms"]


def test_the_truth_of_some_rows_is_enough_and_the_batches_stay_whole() -> None:
    flow = _linear(dim=2)
    x = torch.randn(40, 2, dtype=torch.float64)
    all_rows, few = (
        sweep_tolerances(flow, x, (1e-4,), batch_size=20, truth_rows=n, warm_start=False)[0] for n in (40, 4)
    )
    assert (few["error_rows"], all_rows["error_rows"]) == (4, 40)
    assert (few["nfe"], few["nll"]) == (all_rows["nfe"], all_rows["nll"])
    assert 0 < few["error_max"] <= all_rows["error_max"]


def test_a_solve_that_fails_in_the_sweep_is_told() -> None:
    flow = _linear(dim=2)
    flow.eval_solver = dataclasses.replace(flow.eval_solver, max_nfe=60)
    loose, tight = sweep_tolerances(flow, torch.randn(4, 2), (1e-1, 1e-12))
    assert loose["nfe"] > 0
    assert (tight["nfe"], tight["error_rms"]) == (None, None)
    assert "max_nfe" in tight["error"]


def test_evaluations_at_an_error_are_exact_for_a_power_law() -> None:
    errors = [t**0.9 for t in TOLERANCES]
    rows = [{"rtol": t, "nfe": 3.0 * e**-0.2, "error_rms": e} for t, e in zip(TOLERANCES, errors, strict=True)]
    for error in (errors[1], 1e-3, 2e-5):
        assert nfe_at_error(rows[::-1], error) == pytest.approx(3.0 * error**-0.2)
    assert nfe_at_error(rows, 1.0) is None, "the loosest tolerance is better than that already"
    assert nfe_at_error(rows, 1e-9) is None, "the tightest is not that good"
    rows[1] |= {"nfe": None}
    assert nfe_at_error(rows, 1e-3) == pytest.approx(3.0 * 1e-3**-0.2), "a solve that failed is left out"


def test_the_time_to_a_likelihood_is_interpolated_and_not_invented() -> None:
    course = {"seconds": [1.0, 2.0, 4.0], "nll": [3.0, 2.0, 1.0]}
    assert [reach(course, nll) for nll in (5.0, 2.5, 1.0, 0.9)] == [1.0, 1.5, 4.0, None]


def test_families_are_arms_without_their_weights() -> None:
    arms = ("tpr:weight=5", "tpr:weight=50,degree=3", "tpr:weight=1e-05+steer:weight=0.1", "none", "a:b=1,weight=2")
    assert [family(arm) for arm in arms] == ["tpr", "tpr:degree=3", "tpr+steer", "none", "a:b=1,"]
    assert [weights(arm) for arm in arms] == [(5.0,), (50.0,), (1e-5, 0.1), (), (2.0,)]


# ---- statistics -------------------------------------------------------------------------------

ARMS = {
    "none": (0.64, 56.0),
    "tpr:weight=5": (0.641, 50.0),
    "tpr:weight=50": (0.72, 44.0),
    "error:weight=0.5": (0.62, 36.0),
}


def row(arm: str, seed: int, nll: float, nfe: float, **changes: Any) -> dict[str, Any]:
    """A finished run with a work-precision curve that is a power law."""
    tolerances = [
        {
            "rtol": t,
            "atol": t,
            "nll": nll + 100 * t,
            "nfe": nfe * (t / 1e-5) ** -0.2,
            "error_rms": 0.5 * t,
            "error_max": 2 * t,
            "accepted": 8.0,
            "rejected": 1.0,
        }
        for t in (1e-3, 1e-4, 1e-5, 1e-6)
    ]
    times = [nfe, 2 * nfe, 3 * nfe]
    return {
        "experiment": "bench",
        "data": "mine",
        "arm": arm,
        "regularizer": arm,
        "seed": seed,
        "status": "finished",
        "device": "a machine",
        "nll": nll,
        "nfe_test": nfe,
        "test_rtol": 1e-5,
        "tolerances": tolerances,
        "curve": {"step": [1, 2, 3], "nfe": [14.0, 20.0, nfe], "nfe_backward": [0.0, 0.0, 0.0]},
        "validation": {"step": [1, 2, 3], "nll": [nll + 2, nll + 1, nll], "seconds": times},
        "configuration": {"data": "mine", "regularizer": arm, "seed": seed, "setup": Setup().to_dict()},
        **dict.fromkeys(("nfe_train", "nfe_train_last_200", "nfe_backward", "nfe_backward_last_200"), 1.0),
        **dict.fromkeys(("accepted", "rejected", "seconds"), 1.0),
        **changes,
    }


def synthetic(seeds: int = 3, **changes: Any) -> BenchResult:
    """A benchmark whose seeds differ more than its arms."""
    rng = np.random.default_rng(1)
    shift = rng.normal(0, 0.1, seeds)
    rows = [
        row(arm, s, nll + shift[s] + rng.normal(0, 0.004), nfe + rng.normal(0, 1), **changes)
        for s in range(seeds)
        for arm, (nll, nfe) in ARMS.items()
    ]
    return BenchResult(tuple(rows), Path("nowhere"))


def column(result: BenchResult, arm: str, metric: str) -> np.ndarray[Any, Any]:
    return np.array([r[metric] for r in result.comparison("mine").finished(arm)])


def test_arms_are_compared_seed_by_seed() -> None:
    result = synthetic()
    lines = {line["arm"]: line for line in result.summary("mine")}
    assert set(METRICS) <= set(lines["none"])
    for arm in ARMS:
        if arm != "none":
            difference = column(result, arm, "nll") - column(result, "none", "nll")
            found = lines[arm]["nll"]
            assert found["difference"] == pytest.approx(difference.mean())
            assert found["difference_se"] == pytest.approx(stats.sem(difference))
            assert found["p"] == pytest.approx(stats.ttest_1samp(difference, 0.0).pvalue)
            paired, unpaired = stats.sem(difference), stats.sem(column(result, "none", "nll"))
            assert lines[arm]["within"] == {
                "paired": difference.mean() <= paired,
                "unpaired": difference.mean() <= unpaired,
            }
            ratio = column(result, arm, "nfe_test").mean() / column(result, "none", "nfe_test").mean()
            assert lines[arm]["nfe_test"]["change"] == pytest.approx(ratio - 1)
            low, high = lines[arm]["nfe_test"]["bootstrap"]
            assert low <= ratio - 1 <= high
    assert lines["error:weight=0.5"]["within"] == {"paired": True, "unpaired": True}
    assert not lines["tpr:weight=50"]["within"]["paired"]
    best = result.best("mine")
    assert best is not None
    assert best["arm"] == "error:weight=0.5"


def test_the_bootstrap_interval_is_that_of_all_draws() -> None:
    values, reference = np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.5, 8.0])
    draws = np.array([[i, j, k] for i in range(3) for j in range(3) for k in range(3)])
    for ratio in (True, False):
        a, b = values[draws].mean(1), reference[draws].mean(1)
        every = a / b - 1 if ratio else a - b
        found = resample(list(values), list(reference), ratio=ratio)
        assert found is not None
        assert found == pytest.approx((every.min(), every.max()), abs=0.05 * np.ptp(every))
    assert resample([1.0], [2.0]) is None


def test_every_table_tells_what_the_tolerance_alone_does() -> None:
    result = synthetic()
    alone = [line for line in result.summary("mine") if "tolerance_alone" in line]
    assert [line["tolerance_alone"] for line in alone] == [1e-4, 1e-3]
    for line in alone:
        factor = (line["tolerance_alone"] / 1e-5) ** -0.2
        assert line["nfe_test"]["change"] == pytest.approx(factor - 1)
        assert line["nll"]["difference"] == pytest.approx(100 * (line["tolerance_alone"] - 1e-5))
        assert line["error_rms"]["mean"] == pytest.approx(0.5 * line["tolerance_alone"])
    table = result.table("mine")
    assert list(table.index[-2:]) == ["none, only tested at 1e-4", "none, only tested at 1e-3"]
    assert table.loc["none, only tested at 1e-4", "NFE test"] == "−36.9 %"
    assert table.loc["none, only tested at 1e-4", "held-out NLL (nats)"] == "+0.009 ± 0.000"
    assert table.loc["none, only tested at 1e-4", "NFE train"] == "–"


def test_the_plain_arm_has_to_be_reached() -> None:
    lines = {line["arm"]: line for line in synthetic().summary("mine")}
    assert [lines[arm]["reached"] for arm in ("none", "tpr:weight=50", "error:weight=0.5")] == [3, 0, 3]
    assert lines["error:weight=0.5"]["seconds_to_nll"]["ratio"] < 36 / 56
    table = synthetic().table("mine")
    assert table.loc["tpr:weight=50", "time to plain NLL"] == "not reached"


def test_one_seed_gives_no_interval() -> None:
    lines = synthetic(seeds=1).summary("mine")
    assert lines[1]["within"] == {"paired": None, "unpaired": None}
    assert lines[1]["nfe_test"]["bootstrap"] is None
    assert synthetic(seeds=1).best("mine") is None
    assert set(synthetic(seeds=1).table("mine")["within 1 SE"]) == {"–"}
    assert front_band(synthetic(seeds=1), "mine", np.linspace(30, 60, 4)) is None


def test_the_sweep_table_has_an_arm_a_row_and_a_tolerance_a_column() -> None:
    table = synthetic().sweep("mine", "error_rms")
    assert list(table.columns) == [1e-3, 1e-4, 1e-5, 1e-6]
    assert list(table.index) == ["none", "error:weight=0.5", "tpr:weight=5", "tpr:weight=50"]
    assert np.allclose(table.to_numpy(), 0.5 * np.array(table.columns))


def test_points_of_the_front_carry_paired_bars() -> None:
    result = synthetic()
    points = {point.arm: point for point in front_points(result, "mine")}
    plain, other = points["none"], points["tpr:weight=5"]
    difference = column(result, "tpr:weight=5", "nll") - column(result, "none", "nll")
    assert other.nll_se == pytest.approx(stats.sem(difference))
    assert other.nll - plain.nll == pytest.approx(difference.mean())
    assert other.nll_se < plain.nll_se / 5, "seeds differ more than arms"
    assert [point.arm for point in pareto(list(points.values()))] == ["error:weight=0.5"]
    equal = front_points(result, "mine", "nfe_equal", error=5e-5)
    assert [p.nfe for p in equal] == pytest.approx([points[p.arm].nfe * 10**-0.2 for p in equal], rel=1e-6)
    with pytest.raises(ValueError, match="no evaluations to compare with"):
        front_points(result, "mine", "nfe_equal", error=1.0)


def test_the_band_holds_the_front() -> None:
    result = synthetic(seeds=4)
    grid = np.linspace(30, 60, 31)
    points = front_points(result, "mine")
    band = front_band(result, "mine", grid)
    assert band is not None
    low, high = band
    for x, bottom, top in zip(grid, low, high, strict=True):
        reached = [point.nll for point in points if point.nfe <= x]
        if reached and all(abs(point.nfe - x) > 2 for point in points):
            assert bottom <= min(reached) <= top
    assert (np.diff(high) <= 1e-12).all(), "more evaluations never make the front worse"


def test_the_time_left_follows_from_what_was_done() -> None:
    now = [0.0]
    jobs = [_job(data, seed) for seed in (0, 1) for data in ("a", "b")]
    estimate = Estimate(jobs, clock=lambda: now[0])
    assert estimate.left() is None
    estimate.update("started", 0, 0)
    estimate.update("step", 0, 1)
    now[0] = 10.0
    estimate.update("finished", 0, 0)
    assert estimate.left() == pytest.approx(30.0), "three more like it"
    estimate.update("started", 1, 0)
    now[0] = 12.0
    estimate.update("step", 1, 1)
    now[0] = 20.0
    estimate.update("step", 1, 5)
    assert estimate.done == pytest.approx(1.5)
    now[0] = 30.0
    estimate.update("finished", 1, 0)
    assert estimate.left() == pytest.approx(10.0 + 20.0), "each set at its own pace"


# ---- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "paper"])
def test_shipped_budgets_can_be_built(name: str) -> None:
    budget = read_budget(name)
    assert budget.seeds >= 3
    assert budget.regularizers[0] == "none"
    assert set(budget.tolerances) >= {1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8}
    for data in budget.data:
        assert data in names()
        setup = setup_for(data, budget.settings_for(data, {"max_steps": 7, "lr": None}))
        assert setup.max_steps == 7
        assert setup.adaptive


def test_the_paper_budget_has_the_models_of_the_paper() -> None:
    budget = read_budget("paper")
    setups = {data: setup_for(data, budget.settings_for(data, {})) for data in budget.data}
    shapes = {name: (s.hidden, s.blocks, s.activation, s.batch_size, s.time) for name, s in setups.items()}
    assert shapes == {
        "power-full": ((60,) * 3, 5, "tanh", 10_000, "concat"),
        "gas": ((160,) * 3, 5, "tanh", 1000, "concat"),
        "hepmass": ((210,) * 2, 10, "softplus", 10_000, "concat"),
        "miniboone": ((860,) * 2, 1, "softplus", 1000, "concat"),
        "bsds300": ((1260,) * 3, 2, "tanh", 10_000, "concatsquash"),
    }
    assert {(s.lr, s.optimizer, s.schedule, s.divergence) for s in setups.values()} == {
        (1e-3, "adam", "plateau", "hutchinson")
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nabout = 'x'\nregularizers = ['none']\n", "lacks 'data'"),
        ("[a]\nabout = 'x'\nregularizers = ['none']\nruns = 3\n[a.data.moons]\n", "unknown entry 'runs'"),
        ("[a]\nabout = 'x'\nregularizers = ['none']\n[a.data.moons]\nwidth = 3\n", "unknown setting 'width'"),
        ("[a]\n[b]\n", "expected one budget"),
        ("[a", "cannot read the budget"),
    ],
)
def test_unreadable_budgets_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_budget(tmp_path / "mine.toml")


def test_unknown_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown budget 'huge': choose small, paper"):
        read_budget("huge")
    with pytest.raises(ValueError, match="cannot read the budget"):
        read_budget("nowhere.toml")


# ---- figures and the command ------------------------------------------------------------------

FIGURES: dict[str, Callable[[BenchResult], Any]] = {
    "front": lambda result: front_figure(result, "mine"),
    "course": lambda result: course_figure(result, "mine"),
    "precision": lambda result: precision_figure(result, "mine"),
}


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", FIGURES)
def test_figures_render_with_labels_on_every_axis(name: str, seeds: int, tmp_path: Path) -> None:
    figure = FIGURES[name](synthetic(seeds))
    with _no_warnings():
        svg = save_figure(figure, tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert svg.startswith("<?xml")
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    assert "evaluations" in " ".join(axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes)


def test_the_front_shows_the_tolerance_alone_beside_the_arms() -> None:
    figure = FIGURES["front"](synthetic())
    assert "1e-4 in training, 1e-5 in test" in figure.get_suptitle()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"none", "tpr", "error", "none, looser tolerance alone"} <= set(labels)
    line = next(line for line in figure.axes[0].lines if line.get_label() == "none, looser tolerance alone")
    x = np.asarray(line.get_xdata())
    assert x / x[0] == pytest.approx([1.0, 10**-0.2, 100**-0.2])


def test_backward_evaluations_have_a_panel_where_there_are_any() -> None:
    assert len(FIGURES["course"](synthetic()).axes) == 1
    curve = {"step": [1, 2, 3], "nfe": [14.0, 20.0, 26.0], "nfe_backward": [1.0, 2.0, 3.0]}
    assert len(FIGURES["course"](synthetic(curve=curve)).axes) == 2


def test_figures_of_nothing_are_refused() -> None:
    failed = synthetic(status="failed", error="no")
    for draw in FIGURES.values():
        with pytest.raises(ValueError, match="no run"):
            draw(failed)
    with pytest.raises(ValueError, match="no arm 'decay'"):
        course_figure(synthetic(), "mine", arms=["decay"])


def call(*arguments: Any) -> Any:
    """Run a command in this process."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


@pytest.fixture
def budget(table: str, tmp_path: Path) -> Path:
    """A budget in a file."""
    path = tmp_path / "mine.toml"
    path.write_text(
        "[mine]\nabout = 'a test'\nseeds = 1\nregularizers = ['none', 'tpr:weight=5']\ntolerances = [1e-3, 1e-4]\n"
        f"sweep_rows = 50\ntruth_rows = 10\n[mine.data.'{table}']\n"
        "max_steps = 3\nbatch_size = 50\nhidden = [8]\ndevice = 'cpu'\n",
        encoding="utf-8",
    )
    return path


def test_the_command_leaves_tables_records_and_figures(budget: Path, tmp_path: Path) -> None:
    options = ["--budget", budget, "--output", tmp_path / "out", "--runs", tmp_path / "runs", "--jobs", 1]
    done = call("bench", "regularizers", *options)
    assert done.exit_code == 0, done.output
    assert "tolerance 1e-4 in training, 1e-5 in test" in done.stdout
    assert "none, only tested at 1e-4" in done.stdout
    assert "[2/2]" in done.stderr
    for name in ("front-mine.npy.svg", "course-mine.npy.svg", "precision-mine.npy.svg", "bench.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0
        assert name in done.stdout
    again = call("bench", "regularizers", *options, "--json", "--quiet")
    assert json.loads(again.stdout)["runs"] == 2
    assert again.stderr == ""


def test_bad_options_give_one_message_and_exit_code_2(budget: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--budget", "huge"], "unknown budget"),
        (["--budget", budget, "--seeds", "x"], "seeds such as 0,3,7"),
        (["--budget", budget, "--regularizers", "tpr"], "'none' among the regularizers"),
        (["--budget", budget, "--regularizers", "none mystery"], "unknown regularizer"),
        (["--budget", budget, "--data", "lunes"], "no data set is called"),
    ):
        done = call("bench", "regularizers", *options, "--output", tmp_path / "out")
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.replace("│", " ").split())
        assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


# ---- helpers ----------------------------------------------------------------------------------


class _Linear(torch.nn.Module):
    """dz/dt = A z, whose log-density is known."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(2.0 * torch.eye(dim, dtype=torch.float64).roll(1, 0) - torch.eye(dim).double())

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * t) * z @ self.A.T

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x) = log N(exp(s A) x; 0, I) + s tr A, with s = int_0^1 sin 3t dt."""
        s = (1 - math.cos(3.0)) / 3
        z = x @ torch.linalg.matrix_exp(s * self.A).T
        return -0.5 * z.square().sum(1) - x.shape[1] * math.log(2 * math.pi) / 2 + s * torch.trace(self.A)


def _linear(dim: int) -> Any:
    from pycnf.flow import CNF

    return CNF(dim, field=_Linear(dim)).double().eval()


def _job(data: str, seed: int) -> Job:
    folder = Path("nowhere")
    return Job(
        source=data,
        data=data,
        data_dir=None,
        rows="",
        regularizer="none",
        seed=seed,
        setup=Setup(max_steps=10),
        tolerances=(),
        sweep_rows=1,
        truth_rows=1,
        records=folder,
        runs=folder,
        overwrite=False,
        command="",
        workers=1,
    )


@contextmanager
def _no_warnings() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
