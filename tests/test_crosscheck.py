"""Truths about cross-checks: what they measure, when they pass, what the command prints."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import JULIA, julia_case, read_julia, small_flow, start_julia
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from pycnf import CNF, MLP, FlowSolution, Solution, SolveStats, save_flow
from pycnf.cli import app
from pycnf.cli.crosschecking import deviation_table
from pycnf.crosscheck import ORDERS, Deviation, crosscheck, observed_order
from pycnf.plots import save_figure
from pycnf.plots_diagnostics import crosscheck_figure
from pycnf.reference import reference_solve


def recorded(case: str) -> tuple[CNF, Tensor, FlowSolution, list[dict[str, Any]]]:
    """Flow, start, and what Julia's Vern9 at 1e-13 gave; and what Julia's methods gave at each tolerance."""
    found = read_julia("reference.json", case)
    flow, start = julia_case(case)
    states = torch.tensor(found["states"], dtype=torch.float64)
    ts = torch.tensor(found["times"], dtype=torch.float64)
    solution = Solution(ts, states[..., :-1], states[..., -1], SolveStats())
    return flow, start, FlowSolution((solution,), reverse=False), found["runs"]


@pytest.mark.skipif(
    "PYCNF_DATA" not in os.environ or not (JULIA / "reference.json").is_file(),
    reason="no folder julia-reference beside the one that PYCNF_DATA names",
)
@pytest.mark.parametrize("case", ["mlp2", "mlp6"])
def test_against_solves_that_julia_made(case: str) -> None:
    flow, start, truth, runs = recorded(case)
    found = crosscheck(
        flow, start, reference=truth, methods=("dopri5", "DOP853"), tolerances=(1e-4, 1e-6, 1e-8), bound=1e-11
    )
    assert found.passed
    assert found.agreement.worst < 1e-12
    for row in found.sweep:
        assert row.worst < 100 * row.tolerance  # type: ignore[operator]
    ours = reference_solve(flow, start, times=truth.blocks[0].ts[1:-1], backend="scipy")
    torch.testing.assert_close(ours.blocks[0].z, truth.blocks[0].z, atol=1e-11, rtol=0)
    torch.testing.assert_close(ours.blocks[0].logp, truth.blocks[0].logp, atol=1e-11, rtol=0)
    tight = [run for run in runs if run["tol"] == 1e-10]
    assert all(max(run["max_error_z"], run["max_error_logp"]) < 1e-9 for run in tight), "Julia's runs agree as well"


def test_a_tight_solve_agrees_and_a_wrong_reference_does_not() -> None:
    flow, x = small_flow(3, blocks=2), torch.randn(5, 3, dtype=torch.float64)
    found = crosscheck(flow, x, backend="scipy", methods=("dopri5",), tolerances=(1e-3, 1e-5))
    assert found.passed
    assert (found.backend, found.rows, found.bound) == ("scipy", 5, 1e-9)
    assert found.reference_nfe > 0
    inner = [0.25, 0.5, 0.75]
    truth = reference_solve(flow, x, times=inner, backend="scipy")
    first, second = truth.blocks
    wrong = Solution(second.ts, second.z, second.logp + 3e-9, second.stats)  # type: ignore[operator]
    worse = crosscheck(flow, x, reference=FlowSolution((first, wrong), reverse=False), methods=())
    assert not worse.passed
    assert worse.agreement.max_logp == pytest.approx(3e-9, rel=1e-2)
    assert worse.agreement.max_z < 1e-11
    nan = Solution(second.ts, second.z * torch.nan, second.logp, second.stats)
    assert not crosscheck(flow, x, reference=FlowSolution((first, nan), reverse=False), methods=()).passed


def test_a_reference_at_other_times_is_refused() -> None:
    flow, x = small_flow(2), torch.randn(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected a reference at the times \[0.0, 0.25, 0.5, 0.75, 1.0\]"):
        crosscheck(flow, x, reference=reference_solve(flow, x, times=[0.3], backend="scipy"), methods=())


def test_deviations_are_measured_row_by_row() -> None:
    flow, x = small_flow(2), torch.randn(4, 2, dtype=torch.float64)
    truth = reference_solve(flow, x, times=[0.25, 0.5, 0.75], backend="scipy")
    (block,) = truth.blocks
    z = block.z.clone()
    z[-1, 2, 1] += 1e-3
    found = crosscheck(
        flow,
        x,
        reference=FlowSolution((Solution(block.ts, z, block.logp, block.stats),), reverse=False),
        methods=("dopri8",),
        tolerances=(1e-11,),
    )
    (row,) = found.sweep
    assert row.max_z == pytest.approx(1e-3, rel=1e-6)
    assert row.rms_z == pytest.approx(1e-3 / 8**0.5, rel=1e-6)
    assert found.agreement.rms_z == pytest.approx(1e-3 / 40**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "low", "high"), [("bosh3", 2.4, 4.0), ("dopri5", 4.2, 6.8), ("rk4", 3.5, 4.6), ("RK45", 4.2, 6.8)]
)
def test_the_order_is_seen(method: str, low: float, high: float) -> None:
    flow, x = small_flow(2, hidden=(16, 16)), torch.randn(8, 2, dtype=torch.float64)
    with torch.no_grad():
        for weight in flow.parameters():
            weight.mul_(3.0)  # a field that takes some steps
    found = crosscheck(
        flow, x, backend="scipy", methods=(method,), tolerances=(1e-4, 1e-6, 1e-8, 1e-10), n_steps=(8, 16, 32, 64)
    )
    order = found.orders[method]
    assert order is not None
    assert low <= order <= high
    assert [row.n_steps is None for row in found.sweep] == [method != "rk4"] * 4
    assert {row.software for row in found.sweep} == {"SciPy" if method == "RK45" else "pycnf"}


class Closed(nn.Module):
    """v = z cos t, with its closed form z exp(sin t)."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z * torch.cos(t)

    def closed_form(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return z * torch.exp(torch.sin(t)), -2 * torch.sin(t).expand(len(z))


def deviation(nfe: int, error: float) -> Deviation:
    names = ("max_z", "rms_z", "max_logp", "rms_logp")
    errors = dict.fromkeys(names, error)
    counts = {"nfe": nfe, "accepted": 1, "rejected": 0}
    own = {"method": "m", "software": "pycnf", "order": 4, "tolerance": None, "n_steps": 1}
    return Deviation(**own, **counts, **errors)  # type: ignore[arg-type]


def test_orders_are_known_of_every_method() -> None:
    assert {
        "dopri8": 8,
        "rk4": 4,
        "DOP853": 8,
        "Radau": 5,
        "Tsit5": 5,
        "Vern9": 9,
        "VCABM": 0,
    }.items() <= ORDERS.items()
    assert "scipy_solver" not in ORDERS


def test_the_order_of_known_errors() -> None:
    rows = [deviation(n, 7.0 * n**-4.0) for n in (10, 20, 40)]
    assert observed_order(rows) == pytest.approx(4.0)
    assert observed_order([*rows, deviation(10_000, 1e-15)]) == pytest.approx(4.0), "rounding is left out"
    assert observed_order([*rows, deviation(80, float("nan"))]) == pytest.approx(4.0)
    assert observed_order([deviation(4, 5.0), *rows]) == pytest.approx(4.0), "loose solves tell nothing of the order"
    assert observed_order(rows[:1]) is None
    assert observed_order([]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ("dopri6",)}, "unknown method 'dopri6': choose among dopri8, dopri5"),
        ({"bound": 0.0}, "expected bound > 0, got 0"),
        ({"backend": "closed-form"}, "no closed form"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crosscheck(CNF(2, (4,)), torch.zeros(2, 2), **arguments)


@pytest.mark.parametrize("backend", ["scipy", "closed-form"])
def test_the_figure_shows_what_was_measured(backend: Any, tmp_path: Path) -> None:
    problem = Closed() if backend == "closed-form" else MLP(2, (8,)).double()
    flow, x = CNF(2, field=problem), torch.randn(4, 2, dtype=torch.float64)
    found = crosscheck(flow, x, backend=backend, methods=("rk4", "RK45"), tolerances=(1e-3, 1e-5), n_steps=(4, 8))
    figure = crosscheck_figure(found)
    assert save_figure(figure, tmp_path / "figure.svg").stat().st_size > 0
    for axes, name in zip(figure.axes, ("max_z", "max_logp"), strict=True):
        fixed, adaptive, tight = axes.lines
        assert [line.get_label() for line in axes.lines] == ["rk4", "RK45 (SciPy)", "dopri8 at 1e-12"]
        assert list(fixed.get_ydata()) == [getattr(row, name) for row in found.sweep[:2]]
        assert list(adaptive.get_xdata()) == [row.nfe for row in found.sweep[2:]]
        assert set(tight.get_ydata()) == {getattr(found.agreement, name)}
        assert axes.get_xlabel()
        assert axes.get_ylabel()


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("run")
    save_flow(CNF(6, (8, 8)), folder)
    return folder


def call(*arguments: object) -> Any:
    """Run the command in this process."""
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    words = ["crosscheck", *map(str, arguments), "--data", "power", "--rows", "8"]
    return CliRunner(env=environment).invoke(app, words)


def test_the_command_prints_a_table(run: Path) -> None:
    done = call(
        run, "--backend", "scipy", "--methods", "dopri5,rk4,RK45", "--tolerances", "1e-3,1e-5", "--n-steps", "4,8"
    )
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert "8 rows, against SciPy's DOP853 at 1e-13" in done.stdout
    assert sum(line[:1] == ["dopri5"] for line in lines) == 2
    assert sum(line[:1] == ["rk4"] for line in lines) == 2
    assert sum(line[:2] == ["RK45", "(SciPy)"] for line in lines) == 2
    assert "dopri8 at 1e-12 agrees with the reference" in done.stdout
    assert "bound 1e-9" in done.stdout
    assert "reference by scipy" in done.stderr
    for name in ("crosscheck.json", "deviations.svg", "deviations.png"):
        assert (run / "crosscheck" / name).stat().st_size > 0
        assert str(run / "crosscheck" / name) in done.stdout


def test_the_table_fits_80_columns() -> None:
    flow, x = small_flow(2), torch.randn(4, 2, dtype=torch.float64)
    found = crosscheck(flow, x, backend="scipy", methods=("implicit_adams", "DOP853"), n_steps=(16,))
    out = Console(width=80, file=io.StringIO())
    out.print(deviation_table(out, found, "title"))
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    row = next(line for line in lines if line.startswith("implicit_adams"))
    assert f"{found.sweep[0].max_z:.1e}" in row, "numbers are whole"
    assert any(line.startswith("DOP853 (SciPy)") for line in lines)
    assert "…" not in "".join(lines)


def test_the_exit_status_tells_of_a_difference(run: Path, tmp_path: Path) -> None:
    quick = ["--backend", "scipy", "--methods", "dopri5", "--tolerances", "1e-3", "--quiet"]
    done = call(run, *quick, "--bound", "1e-30", "--json", "--output", tmp_path / "check")
    assert done.exit_code == 1
    assert done.stderr == ""
    record = json.loads(done.stdout)
    assert record["passed"] is False
    assert record["agreement"]["method"] == "dopri8"
    assert record["sweep"][0]["tolerance"] == 1e-3
    assert {"command", "versions", "device", "date", "seed", "backend", "bound", "orders"} <= set(record)
    assert json.loads((tmp_path / "check" / "crosscheck.json").read_text(encoding="utf-8")) == record
    assert record["figures"] == ["deviations.svg", "deviations.png"]
    assert "DIFFERS from" in call(run, *quick, "--bound", "1e-30").stdout
    assert call(run, *quick).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "matlab"], "'matlab' is not one of auto, julia, scipy"),
        (["--methods", "dopri5,dopri6"], "'dopri6' is not one of"),
        (["--tolerances", "1e-3,0"], "expected finite numbers > 0"),
        (["--methods", ","], "',' is not one of"),
        (["--tolerances", "tight"], "expected numbers separated by commas"),
        (["--n-steps", "0"], "expected whole numbers >= 1"),
        (["--bound", "-1"], "expected a finite number > 0"),
    ],
)
def test_impossible_options(run: Path, arguments: list[str], message: str) -> None:
    done = call(run, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")


def test_julia_that_is_missing_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycnf import julia

    (tmp_path / "juliacall.py").write_text("raise Exception('could not find Julia')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("PYTHON_JULIACALL_PROJECT", raising=False)
    monkeypatch.setattr(julia, "_shared", julia.JuliaWorker())
    done = call(run, "--backend", "julia")
    assert done.exit_code == 2
    assert "What helps: pycnf julia --install" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.julia
def test_the_command_with_julia(run: Path) -> None:
    start_julia()
    done = call(run, "--backend", "julia", "--methods", "dopri5,Tsit5,Vern7", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["passed"]
    assert set(record["julia"]) == {"julia", "juliacall"}
    assert {row["software"] for row in record["sweep"]} == {"pycnf", "Julia"}
    assert 4 < record["orders"]["Tsit5"] < 7
