"""Truths about the benchmarks: all sides do the same work, and what is counted is what is done."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pycnf
from pycnf import scale

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import at_scale  # noqa: E402
import peer_flows  # noqa: E402
import peers  # noqa: E402
import regularizer_cost  # noqa: E402
import roofline  # noqa: E402
import scaling  # noqa: E402
import step_time  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402


def small_flow(**settings: Any) -> pycnf.CNF:
    tight = pycnf.Solver(rtol=1e-7, atol=1e-7)
    return pycnf.CNF(3, (8, 8), solver=tight, eval_solver=tight, **settings).double()


def rows(n: int = 20) -> torch.Tensor:
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---- timing and memory ------------------------------------------------------------------------


def test_work_takes_turns() -> None:
    done: list[str] = []
    work = {name: lambda name=name: done.append(name) for name in "abc"}
    seconds = timing.interleave(work, 3, prepare=lambda: done.append("|"), warm_up=1)
    assert "".join(done) == "|cab|abc|bca|cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_those_of_the_rounds() -> None:
    found = timing.ratio({"us": [1.0, 2.0, 4.0], "them": [3.0, 4.0, 40.0]}, "us", "them")
    assert found == {"ratio": 3.0, "ratio_min": 2.0, "ratio_max": 10.0, "ms": 2000.0, "ms_against": 4000.0}


def test_memory_is_what_is_held_at_once() -> None:
    def one_after_another() -> None:
        for _ in range(5):
            torch.zeros(250_000)

    def together() -> list[torch.Tensor]:
        return [torch.zeros(250_000) for _ in range(5)]

    assert timing.peak_megabytes(one_after_another) == pytest.approx(1.0)
    assert timing.peak_megabytes(together) == pytest.approx(5.0)
    assert timing.peak_megabytes(lambda: torch.zeros(10).view(2, 5)[0].add_(1)) == pytest.approx(40e-6)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks /proc for the memory of a process")
def test_memory_of_the_process_is_that_of_the_work() -> None:
    held = at_scale.memory_of(lambda: np.ones(25_000_000).sum())
    assert 180 < held < 300
    assert at_scale.memory_of(lambda: None) < 50, "the peak of before is forgotten"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no GPU is present"):
        timing.device("cuda")
    with pytest.raises(argparse.ArgumentTypeError, match="unknown device 'abacus'"):
        timing.device("abacus")


def test_records_say_how_they_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/anywhere/benchmarks/some.py", "--threads", "2"])
    timing.save(tmp_path / "some.json", "some", [{"value": torch.tensor(1.5)}])
    record = json.loads((tmp_path / "some.json").read_text(encoding="utf-8"))
    assert record["command"] == "python benchmarks/some.py --threads 2"
    assert set(record) >= {"versions", "device", "date", "seed", "threads"}
    assert record["rows"] == [{"value": 1.5}]


# ---- the same work on all sides ---------------------------------------------------------------


def test_the_classic_field_is_that_of_pycnf() -> None:
    flow, x, t = small_flow(), rows(), torch.tensor(0.3, dtype=torch.float64)
    classic = step_time.ClassicField(flow.fields[0]).double()
    v, minus_div = classic(t, (x, torch.zeros(20, 1)))
    same_v, div = flow.divergence.bind(flow.fields[0], x, None)(t, x)
    torch.testing.assert_close(v, same_v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(-minus_div[:, 0], div, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tpr", [None, pycnf.TPR(weight=3.0)], ids=["none", "tpr"])
def test_the_classic_step_has_the_gradient_of_pycnf(tpr: pycnf.TPR | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "TOLERANCE", 1e-9)
    flow, x = small_flow(), rows()
    classic = step_time.ClassicField(flow.fields[0]).double()
    torch.manual_seed(2)  # the sampled times
    step_time.classic_step(classic, torch.optim.SGD(classic.parameters(), lr=0.0), x, flow.T, tpr)
    torch.manual_seed(2)
    step_time.pycnf_step(flow, torch.optim.SGD(flow.parameters(), lr=0.0), x, tpr)
    for layer, linear in zip(flow.fields[0].layers, classic.layers, strict=True):
        ours = torch.cat([layer.time_weight.grad.unsqueeze(1), layer.weight.grad], dim=1)
        torch.testing.assert_close(ours, linear.weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.bias.grad, linear.bias.grad, rtol=1e-4, atol=1e-6)


def test_the_classic_log_prob_is_that_of_pycnf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_scale, "TOLERANCE", 1e-6)
    flow, x = pycnf.CNF(3, (8, 8)), rows().float()
    classic = at_scale.classic_log_prob(step_time.ClassicField(flow.fields[0]), x, flow.T, 7)
    torch.testing.assert_close(classic, scale.log_prob(flow, x, batch_size=7).values, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", peer_flows.SIDES)
def test_every_library_computes_the_same(name: str) -> None:
    if name != "pycnf":
        pytest.importorskip(name.partition(",")[0])
    flow, x = pycnf.CNF(3, (8, 8), T=0.5), rows().float()
    truth = peers.reference(flow, x)
    found = peers.check(name, flow, x, truth)
    assert max(found.values()) < peers.AGREE
    side = peer_flows.SIDES[name](flow, 1e-4)
    side.step(x)
    assert side.counts["forward"] >= 7


def test_a_library_that_computes_something_else_is_refused() -> None:
    flow, x = pycnf.CNF(3, (8, 8)), rows().float()
    value, gradient = peers.reference(flow, x)
    with pytest.raises(SystemExit, match="pycnf computes something else"):
        peers.check("pycnf", flow, x, (value + 0.1, gradient))


# ---- operations, growth, tables ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "hidden", "batch", "divergence"),
    [
        (3, (16,), 50, "exact"),
        (43, (86, 86), 30, "exact"),
        (6, (60, 60, 60), 100, "exact"),
        (30, (40, 40, 40), 20, "exact"),
        (5, (16, 16, 16, 16), 50, "exact"),
        (30, (64, 64, 64), 40, "hutchinson"),
    ],
)
def test_the_formula_counts_what_torch_counts(
    features: int, hidden: tuple[int, ...], batch: int, divergence: str
) -> None:
    case = step_time.Case("a", features, hidden, "tanh", batch, 1.0, 0, 1, divergence)
    flow = pycnf.CNF(features, hidden, divergence=divergence, compile=False)  # torch counts its own products
    x = torch.randn(batch, features)
    stats = pycnf.objective(flow, x).solution.stats
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.0)
    counted = roofline.counted(lambda: step_time.pycnf_step(flow, optimizer, x, None))
    formula = roofline.operations(case).step(stats.nfe, 6 * stats.accepted + 1)
    assert formula == pytest.approx(counted, rel=roofline.AGREE)


def test_products_are_counted_alike_whether_they_are_added_in_place_or_not() -> None:
    a, b, total = torch.randn(3, 4), torch.randn(4, 5), torch.zeros(3, 5)
    assert roofline.counted(lambda: a @ b) == 2 * 3 * 4 * 5
    assert roofline.counted(lambda: total.addmm_(a, b)) == 2 * 3 * 4 * 5
    assert regularizer_cost.counted is roofline.counted, "one count for all tables"


def test_a_series_ends_where_time_or_memory_would_run_out() -> None:
    for seconds, megabytes in ((1.0, 1.0), (1e-6, 400.0)):
        series = scaling.Series("a", lambda x: lambda: 7)
        series.add(10, [seconds], 7, megabytes)
        series.expect(10.0)
        assert series.open
        series.add(100, [10 * seconds], 7, None)
        series.expect(10.0)
        assert not series.open
        series.expect(0.001)
        assert not series.open, "once ended, it stays so"


def test_growth_is_recorded_and_drawn(tmp_path: Path) -> None:
    series = [scaling.Series(name, lambda x: lambda: int(x)) for name in ("one", "two")]
    scaling.follow("batch", series, (10, 20), 1, proportional=True)
    assert [[point["nfe"] for point in one.points] for one in series] == [[10, 20], [10, 20]]
    curves = [{"name": one.name, "points": one.points} for one in series]
    scaling.draw_figure({"dimension": curves, "batch": curves, "evaluations": curves}, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_every_record_has_its_tables() -> None:
    for path in sorted((ROOT / "results" / "benchmarks").glob("*.json")):
        kinds = [kind for kind in tables.TABLES if kind.partition("#")[0] == path.stem.removesuffix("_gpu")]
        for kind in kinds:
            text = tables.table(path, kind.partition("#")[2] or None)
            lines = [line for line in text.splitlines() if line.startswith("|")]
            assert len({line.count("|") for line in lines}) == 1


def test_marks_name_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    record = {
        "device": "a machine",
        "threads": 2,
        "rows": [{"against": "torchdiffeq engine", "case": "moons"} | ENGINE],
    }
    record["rows"].append(record["rows"][0] | {"against": "classic"})  # type: ignore[attr-defined,index]
    (tmp_path / "step_time.json").write_text(json.dumps(record), encoding="utf-8")
    text = "a\n<!-- table: step_time.json#engines -->\nold\n<!-- end table -->\nb\n"
    new = tables.render(text)
    assert "| moons: 2-d, 3×64, batch 100 | none | 3.0 | 2.0 | 1.50 (1.00 – 2.00) | 5 | 4 | 5 |" in new
    assert "old" not in new
    assert tables.render(new) == new
    with pytest.raises(SystemExit, match="no table step_time#engine: there are"):
        tables.render(text.replace("#engines", "#engine"))


ENGINE = {
    "regularizer": "none",
    "ms": 2.0,
    "ms_against": 3.0,
    "ratio": 1.5,
    "ratio_min": 1.0,
    "ratio_max": 2.0,
    "peak_mb": 4.0,
    "peak_mb_against": 5.0,
}


@pytest.mark.slow
def test_the_ratios_alone_go_to_stdout() -> None:
    call = [sys.executable, "benchmarks/step_time.py", "--quick", "--cases", "moons", "--json", "--threads", "1"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(done.stdout)
    assert [row["against"] for row in found] == 2 * [label for *_, label in step_time.COMPARED]
    assert all(row["case"] == "moons" and 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] for row in found)
    engine = [row for row in found if row["against"] == "torchdiffeq engine"]
    assert all(row["nfe"] == row["calls_against"] for row in engine), "the same steps"
