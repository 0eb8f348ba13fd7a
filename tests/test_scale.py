"""Truths about many rows: what batches, files, orders and processes must not change, and how they fail."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Diagonal
from torch import Tensor, nn
from typer.testing import CliRunner

from pycnf import CNF, Solver, evaluate
from pycnf.cli import app
from pycnf.rows import Standardized
from pycnf.scale import BatchError, log_prob, sample
from pycnf.solution import SolveError

FIXED = Solver(method="rk4", n_steps=4)  # its result for a row does not depend on the other rows


def flow(**settings: Any) -> CNF:
    return CNF(2, (8,), **settings).double().eval()


def rows(n: int = 50) -> Tensor:
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def direct(model: CNF, x: Tensor, context: Tensor | None = None, solver: Solver = FIXED) -> Tensor:
    """All rows in one solve."""
    with torch.no_grad():
        return model.solve(x, context, solver=solver).log_prob


class Stiff(nn.Module):
    """v = -a(z_2) z_1 in the first coordinate, a large where z_2 > 1: hard rows among easy ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(40.0, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        a = 1 + self.rate * torch.sigmoid(20 * (z[:, 1] - 1))
        return torch.stack([-a * z[:, 0], torch.zeros_like(t) * z[:, 1]], dim=1)


class Explosive(nn.Module):
    """v = z^3: reaches infinity before t = 1 from |z| > 0.71."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.calls = nn.Parameter(torch.ones((), dtype=torch.float64)), 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        return self.one * z**3


class Deadly(Diagonal):
    """Ends its process where a row starts with a 7, and complains about a 5."""

    features = 2

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        if float(t) == 0 and (z[:, 0] == 7).any():
            os._exit(3)
        if float(t) == 0 and (z[:, 0] == 5).any():
            raise ZeroDivisionError("a five")
        return super().forward(t, z)


class Watched:
    """Rows that remember the most that was ever asked of them at once."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.most = values, values.shape, 0

    def __getitem__(self, index: Any) -> np.ndarray:
        part = self.values[index]
        self.most = max(self.most, len(part))
        return part


# ---- values -----------------------------------------------------------------------------------


def test_batches_are_solved_one_by_one() -> None:
    model, x = flow(), rows()
    found = log_prob(model, x, batch_size=20, warm_start=False)
    parts = [model.solve(part) for part in x.split(20)]
    assert torch.equal(found.values, torch.cat([part.log_prob for part in parts]))
    assert found.batches == 3
    assert found.stats.nfe == sum(part.stats.nfe for part in parts)


@pytest.mark.parametrize("order", ["given", "difficulty"])
@pytest.mark.parametrize("batch_size", [1, 7, 50, 1000])
def test_a_row_keeps_its_value_in_any_order_and_batch(order: Any, batch_size: int) -> None:
    model, x = flow(blocks=2), rows()
    found = log_prob(model, x, batch_size=batch_size, order=order, solver=FIXED)
    torch.testing.assert_close(found.values, direct(model, x), rtol=1e-12, atol=1e-12)
    assert found.batches == -(-50 // batch_size)


def test_rows_of_like_difficulty_share_their_steps() -> None:
    model, x = CNF(2, field=Stiff()).eval(), rows(200)
    tight = Solver(rtol=1e-7, atol=1e-7)
    given, sorted_ = (log_prob(model, x, batch_size=20, solver=tight, order=order) for order in ("given", "difficulty"))
    torch.testing.assert_close(given.values, sorted_.values, rtol=0, atol=1e-5)
    assert sorted_.stats.nfe < 0.8 * given.stats.nfe, "with what the look at the rows cost"


@pytest.mark.parametrize("kind", ["array", "single", "swapped", "list", "file", "mapped", "source", "tensor"])
def test_rows_come_from_anywhere(kind: str, tmp_path: Path) -> None:
    model, x = flow(), rows()
    if kind == "single":
        x = x.float().double()
    np.save(tmp_path / "x.npy", x.numpy())
    source: Any = {
        "array": x.numpy(),
        "single": x.float().numpy(),
        "swapped": x.numpy().astype(">f8"),
        "list": x.tolist(),
        "file": tmp_path / "x.npy",
        "mapped": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "source": Watched(x.numpy()),
        "tensor": x.clone().requires_grad_(),
    }[kind]
    found = log_prob(model, source, batch_size=20, solver=FIXED, order="difficulty").values
    torch.testing.assert_close(found, direct(model, x), rtol=1e-12, atol=1e-12)
    assert not found.requires_grad


def test_no_more_than_a_part_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycnf.rows.AT_A_TIME", 10)
    source = Watched(rows(200).numpy())
    log_prob(flow(), source, batch_size=8, solver=FIXED, order="difficulty")
    assert source.most == 10


def test_standardized_rows_are_those_of_the_flow() -> None:
    model, x, shift, scale = flow(), rows(), [1.0, -2.0], [0.5, 3.0]
    original = (x * torch.tensor(scale) + torch.tensor(shift)).numpy()
    table = Standardized(original, shift, scale)
    found = log_prob(model, table, solver=FIXED, batch_size=7, order="difficulty").values
    torch.testing.assert_close(found, direct(model, x), rtol=1e-12, atol=1e-12)


def test_results_are_written_where_they_are_wanted(tmp_path: Path) -> None:
    model, x = flow(), rows()
    target = np.lib.format.open_memmap(tmp_path / "out.npy", mode="w+", dtype=np.float64, shape=(50,))
    log_prob(model, x, solver=FIXED, out=target, batch_size=20)
    target.flush()
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), direct(model, x).numpy(), rtol=1e-12)
    preset = torch.empty(50, 2, dtype=torch.float32)
    assert sample(model, 50, seed=0, out=preset).values is preset
    with pytest.raises(ValueError, match=r"expected out of shape \(50,\), got \(49,\)"):
        log_prob(model, x, out=torch.empty(49))


def test_a_flow_keeps_its_mode_and_its_place() -> None:
    model = flow().train()
    log_prob(model, rows(), device="cpu")
    sample(model, 3)
    assert all(module.training for module in model.modules())
    assert model.solver.rtol != model.eval_solver.rtol
    found = log_prob(model, rows())
    assert torch.equal(found.values, log_prob(model.eval(), rows()).values), "evaluation mode in any case"


def test_context_goes_with_its_rows() -> None:
    model, x = flow(context=3), rows()
    context = torch.randn(50, 3, dtype=torch.float64)
    found = log_prob(model, x, context.numpy(), batch_size=20, solver=FIXED, order="difficulty")
    torch.testing.assert_close(found.values, direct(model, x, context), rtol=1e-12, atol=1e-12)
    together = sample(model, 50, context, seed=1, solver=FIXED, batch_size=20).values
    alone = torch.cat([sample(model, 50, row, seed=1, solver=FIXED).values[i : i + 1] for i, row in enumerate(context)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    for given, message in ((None, "flow has context=3"), (context[:9], r"expected context of shape \(50, 3\)")):
        with pytest.raises(ValueError, match=message):
            log_prob(model, x, given)
    with pytest.raises(ValueError, match="the flow has none"):
        log_prob(flow(), x, context)


def test_samples_depend_on_the_seed_and_not_on_the_batches() -> None:
    model = flow(blocks=2)
    noise = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.solve(noise, reverse=True, density=False, solver=FIXED).z
    for size in (1, 7, 1000):
        found = sample(model, 50, seed=3, batch_size=size, solver=FIXED).values
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.manual_seed(3)
    torch.testing.assert_close(sample(model, 50, solver=FIXED).values, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(sample(model, 50, seed=4, solver=FIXED).values, expected)


def test_evaluate_is_the_mean_over_all_rows() -> None:
    model, x = flow(), rows()
    found = evaluate(model, x, batch_size=20, solver=FIXED, order="difficulty")
    assert found.nll == pytest.approx(-direct(model, x).mean().item(), rel=1e-12)
    assert found.rows == 50


# ---- processes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    model, x = CNF(2, field=Deadly()).eval(), rows()
    np.save(tmp_path / "x.npy", x.numpy())
    found = log_prob(model, tmp_path / "x.npy", batch_size=7, workers=2, solver=FIXED)
    torch.testing.assert_close(found.values, direct(model, x), rtol=1e-12, atol=1e-12)
    assert found.stats.nfe == log_prob(model, x, batch_size=7, solver=FIXED).stats.nfe
    assert not any(p.is_shared() for p in model.parameters()), "the flow stays where it is"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (7.0, ChildProcessError, "rows 20 to 29: a worker process ended with exit code 3"),
        (5.0, ZeroDivisionError, "a five"),
    ],
)
def test_a_process_that_fails_says_where(value: float, error: type[Exception], message: str) -> None:
    x = rows()
    x[23, 0] = value
    with pytest.raises(error, match=message) as caught:
        log_prob(CNF(2, field=Deadly()).eval(), x, batch_size=10, workers=2)
    assert error is ChildProcessError or any("rows 20 to 29" in note for note in caught.value.__notes__)


def test_a_flow_that_cannot_be_sent_is_refused() -> None:
    class Local(Deadly):
        pass

    with pytest.raises(ValueError, match="top of a module, or take workers=1"):
        log_prob(CNF(2, field=Local()).eval(), rows(), batch_size=10, workers=2)


def running(pid: str) -> bool:
    """Whether a process is there and not merely waiting to be counted out by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SCRIPT = """
import torch
from pycnf import CNF
from pycnf.scale import log_prob

if __name__ == "__main__":
    print("begin", flush=True)
    log_prob(CNF(2, (8,)), torch.randn(10_000_000, 2), batch_size=100, workers=2, progress=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks /proc for the children of a process")
def test_ctrl_c_ends_all_processes_at_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    children: list[str] = []
    end = time.monotonic() + 60
    while len(children) < 3 and time.monotonic() < end:  # two workers and the resource tracker
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        time.sleep(0.05)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert err.count("Traceback") == 1, err
    assert "KeyboardInterrupt" in err
    end = time.monotonic() + 10
    while any(map(running, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(running, children))


# ---- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["given", "difficulty"])
def test_bad_rows_are_named_before_anything_is_solved(order: Any) -> None:
    field, x = Explosive(), rows() / 10
    x[[3, 17, 41], 1] = torch.tensor([torch.nan, torch.inf, 1e300], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"NaN or infinity in torch.float64 in 2 of 50 rows: 3, 17 \(counted from 0\)"):
        log_prob(CNF(2, field=field).eval(), x, order=order)
    with pytest.raises(ValueError, match=r"in torch.float32 in 3 of 50 rows: 3, 17, 41"):
        log_prob(CNF(2, (4,)), x.numpy(), order=order)
    assert field.calls == 0


@pytest.mark.parametrize("order", ["given", "difficulty"])
def test_a_solve_that_fails_names_its_rows(order: Any) -> None:
    x = rows() / 100
    x[23] = 1.5
    with pytest.raises(SolveError, match="rows") as caught:
        log_prob(CNF(2, field=Explosive()).eval(), x, batch_size=10, order=order)
    assert isinstance(caught.value, BatchError)
    assert caught.value.rows == "rows 20 to 29"
    assert caught.value.method == ("adaptive_heun" if order == "difficulty" else "dopri5")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.rows, again.nfe) == (str(caught.value), caught.value.rows, caught.value.nfe)


def test_any_other_error_carries_its_rows() -> None:
    x = rows()
    x[31, 0] = 5
    with pytest.raises(ZeroDivisionError, match="a five") as caught:
        log_prob(CNF(2, field=Deadly()).eval(), x, batch_size=10)
    assert caught.value.__notes__ == ["while solving rows 30 to 39"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(5, 3), r"expected data of shape \(N, 2\), got \(5, 3\)"),
        (torch.zeros(0, 2), "at least one row"),
        (torch.zeros(5), r"got \(5,\)"),
        (torch.zeros(5, 2, dtype=torch.int64), "floating-point numbers, got torch.int64"),
        (np.zeros((5, 2), dtype=int), "floating-point numbers, got int64"),
        (np.array([["a", "b"]]), "floating-point numbers, got <U1"),
    ],
)
def test_rows_that_do_not_fit_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_prob(flow(), values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "expected an integer batch_size >= 1, got 0"),
        ({"batch_size": 2.0}, "expected an integer batch_size >= 1, got 2.0"),
        ({"workers": 0}, "expected an integer workers >= 1, got 0"),
        ({"order": "random"}, "unknown order 'random'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_prob(flow(), rows(), **options)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="expected an integer n >= 1, got 0"):
        sample(flow(), 0)


def test_damaged_files_are_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with pytest.raises(FileNotFoundError, match=r"no file .*x.npy"):
        log_prob(flow(), path)
    np.save(path, rows().numpy())
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:40], b"", b"a,b\n1,2\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.npy is not a .npy file of numbers, or damaged"):
            log_prob(flow(), path)
    np.save(path, np.array([[1, "a"]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"x.npy is not a .npy file of numbers"):
        log_prob(flow(), path)
    np.save(path, np.array([["a", "b"]]))
    with pytest.raises(ValueError, match=r"expected real numbers in .*x.npy"):
        log_prob(flow(), path)


# ---- the command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scale") / "run"
    done = call("train", "--max-steps", 3, "--hidden", 8, "--batch-size", 200, "--device", "cpu", "--output", folder)
    assert done.exit_code == 0, done.output
    return folder


def call(*arguments: Any) -> Any:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


def test_the_command_evaluates_rows_of_a_file(run: Path, tmp_path: Path) -> None:
    call("sample", run, "-n", 300, "--output", tmp_path / "x.npy", "--batch-size", 70)
    call("sample", run, "-n", 300, "--output", tmp_path / "z.npy", "--standardized")
    found = []
    for name, more in (("x", []), ("z", ["--standardized", "--order", "difficulty", "--batch-size", 50])):
        target = tmp_path / f"{name}-log-prob.npy"
        done = call("evaluate", run, "--rows", tmp_path / f"{name}.npy", "--densities", target, "--json", *more)
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout)
        assert (record["rows"], record["split"]) == (300, "all")
        found.append(np.load(target))
        assert record["nll"] == pytest.approx(-found[-1].mean())
    np.testing.assert_allclose(*found, atol=1e-3)
    card = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert record["log_scale"] == pytest.approx(np.log(card["scale"]).sum())


def test_the_command_refuses_what_it_cannot_use(run: Path, tmp_path: Path) -> None:
    path, there = tmp_path / "x.npy", tmp_path / "there.npy"
    np.save(path, np.full((5, 6), np.nan))
    there.touch()
    for arguments, message in (
        (["--rows", path], "in 5 of 5 rows: 0, 1, 2, 3, 4"),
        (["--rows", path, "--data", "power"], "--rows stands in place of --data"),
        (["--rows", there], "is not a .npy file"),
        (["--rows", tmp_path / "absent.npy"], "no file"),
        (["--densities", there], "--overwrite"),
        (["--densities", tmp_path / "p.csv"], "expected a .npy file"),
        (["--rows", path, "--first", 3], "--rows takes a whole file"),
        (["--probes", 3], "--probes is not for runs of kind table"),
    ):
        done = call("evaluate", run, *arguments)
        assert (done.exit_code, message in done.stderr) == (2, True), done.output
        assert "Traceback" not in done.stderr
    done = call("sample", run, "--output", tmp_path / "a.png")
    assert (done.exit_code, "expected a .csv or .npy file" in done.stderr) == (2, True), done.output
    done = call("evaluate", run, "--first", 30, "--json")
    assert json.loads(done.stdout)["rows"] == 30
