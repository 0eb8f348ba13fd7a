"""Truths about the command line: results, records, messages and exit codes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import pycnf
from pycnf.cli import app
from pycnf.experiments import comparison
from pycnf.regularizers import DEFAULT

TINY = ["--max-steps", "5", "--hidden", "8", "--batch-size", "200", "--device", "cpu"]
ARM_KEYS = {
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
    *("device", "versions", "command"),
}


def call(*arguments: Any) -> Any:
    """Run a command in this process."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


def succeed(*arguments: Any) -> Any:
    """Run a command that must succeed."""
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A comparison on the POWER subset."""
    folder = tmp_path_factory.mktemp("compare")
    return folder, succeed("compare", "--data", "power", "--seeds", 2, "--output", folder, *TINY)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a small flow on the POWER subset."""
    folder = tmp_path_factory.mktemp("train") / "run"
    done = succeed("train", "--regularizers", "tpr", "--seed", 3, "--output", folder, *TINY)
    assert "held-out NLL" in done.stdout
    assert str(folder) in done.stdout.replace("\n", "")
    return folder


def test_compare_prints_a_row_for_every_arm_and_where_its_files_are(compared: tuple[Path, Any]) -> None:
    folder, done = compared
    assert "tolerance 1e-4 in training, 1e-5 in test" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert any(line[:1] == ["none"] and "±" in line for line in lines)
    assert any(line[:1] == ["tpr:weight=5"] and "±" in line for line in lines)
    for name in ("comparison.svg", "comparison.png", "comparison.json"):
        assert (folder / name).stat().st_size > 0
        assert str(folder / name) in done.stdout
    assert "[1/6] none, seed 0" in done.stderr


def test_the_record_has_an_arm_for_every_seed(compared: tuple[Path, Any]) -> None:
    record = json.loads((compared[0] / "comparison.json").read_text(encoding="utf-8"))
    assert {"command", "versions", "device", "date", "seeds", "configuration"} <= set(record)
    assert len(record["arms"]) == 6
    for arm in record["arms"]:
        assert set(arm) >= ARM_KEYS
        assert (arm["rtol"], arm["test_rtol"]) == (1e-4, 1e-5)
    assert len(list((compared[0] / "runs").glob("*.json"))) == 6


def test_a_recorded_comparison_is_not_run_again_and_json_stands_alone(
    compared: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "train_and_test", lambda *a, **k: pytest.fail("was run again"))
    done = succeed("compare", "--data", "power", "--seeds", 2, "--output", compared[0], *TINY, "--json")
    assert len(json.loads(done.stdout)["arms"]) == 6
    assert "recorded before" in done.stderr


def test_unequal_tolerances_are_refused_unless_asked_for(tmp_path: Path) -> None:
    arms = ["--regularizers", "none@1e-3 tpr:weight=5", "--output", tmp_path, "--seeds", 1, *TINY]
    done = call("compare", *arms)
    assert done.exit_code == 2
    assert "--allow-unequal-tolerance" in done.stderr
    assert not list(tmp_path.iterdir())
    done = succeed("compare", *arms, "--allow-unequal-tolerance", "--quiet")
    assert "UNEQUAL" in done.stdout
    assert "none@1e-3" in done.stdout
    assert done.stderr == ""


def test_a_failing_arm_is_told_and_the_exit_code_says_when_all_failed(tmp_path: Path) -> None:
    specs = ["--regularizers", "none@1e-3", "--regularizers", "none@1e-7:1e-3", "--allow-unequal-tolerance"]
    done = succeed("compare", *specs, "--max-nfe", 22, "--seeds", 1, "--output", tmp_path / "a", *TINY)
    assert "failed: none@1e-7:1e-3, seed 0" in done.stdout
    done = call("compare", "--max-nfe", 3, "--seeds", 1, "--output", tmp_path / "b", *TINY)
    assert done.exit_code == 1
    assert json.loads((tmp_path / "b" / "comparison.json").read_text(encoding="utf-8"))["arms"][0]["error"]


def test_a_table_of_ones_own_is_compared(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    rows = np.random.default_rng(0).standard_normal((1000, 3))
    np.savetxt(table, rows, delimiter=",", header="a,b,c", comments="")
    done = succeed("compare", "--data", table, "--seeds", "1,", "--output", tmp_path, "--json", "--quiet", *TINY)
    record = json.loads(done.stdout)
    assert record["seeds"] == [1]
    run = next(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert "NLL" in succeed("evaluate", run).stdout, "a run of a comparison is a run folder"
    succeed("sample", run, "-n", 7, "--output", tmp_path / "new.csv")
    with (tmp_path / "new.csv").open(newline="", encoding="utf-8") as file:
        header, *values = csv.reader(file)
    assert header == ["a", "b", "c"]
    assert np.asarray(values, dtype=float).shape == (7, 3)


def test_evaluate_repeats_the_result_of_training(run: Path) -> None:
    trained = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert set(trained) >= ARM_KEYS
    assert trained["seed"] == 3
    found = json.loads(succeed("evaluate", run, "--json").stdout)
    assert found["nll"] == pytest.approx(trained["nll"], rel=1e-6)
    assert found["nfe_test"] == trained["nfe_test"]
    loose = json.loads(succeed("evaluate", run, "--json", "--rtol", 1e-2, "--atol", 1e-2).stdout)
    assert (loose["rtol"], loose["nfe_test"] <= found["nfe_test"]) == (1e-2, True)
    fixed = json.loads(succeed("evaluate", run, "--json", "--method", "rk4", "--n-steps", 6).stdout)
    assert fixed["nfe_test"] in (24, 25), "four stages a step, and perhaps one evaluation at the end"


def test_samples_are_repeatable_and_in_the_units_of_the_data(run: Path, tmp_path: Path) -> None:
    for name in ("one.npy", "two.npy"):
        succeed("sample", run, "-n", 50, "--seed", 1, "--output", tmp_path / name)
    succeed("sample", run, "-n", 50, "--seed", 1, "--standardized", "--output", tmp_path / "z.npy")
    one, two, z = (np.load(tmp_path / name) for name in ("one.npy", "two.npy", "z.npy"))
    assert one.shape == (50, 6)
    np.testing.assert_array_equal(one, two)
    card = json.loads((run / "data.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(one, z * np.array(card["scale"]) + np.array(card["shift"]))
    done = call("sample", run, "--output", tmp_path / "one.npy")
    assert (done.exit_code, "--overwrite" in done.stderr) == (2, True)


def test_training_goes_on(run: Path) -> None:
    again = ["train", "--regularizers", "tpr", "--seed", 3, "--output", run, *TINY]
    done = call(*again)
    assert done.exit_code == 2
    assert "--resume" in done.stderr
    assert "--overwrite" in done.stderr
    assert json.loads(succeed(*again, "--resume", "--json").stdout)["steps"] == 5


@pytest.mark.parametrize("name", ["setup.toml", "setup.yaml"])
def test_a_configuration_file_gives_options_and_flags_win(name: str, tmp_path: Path) -> None:
    pairs = {
        "max-steps": "3", "hidden": "[8, 8]", "batch_size": "150", "regularizers": '["none", "tpr:weight=2"]',
        "seeds": "[5]", "device": '"cpu"', "rtol": "0.001", "json": "true",
    }  # fmt: skip
    sign = " = " if name.endswith("toml") else ": "
    file = tmp_path / name
    file.write_text("\n".join(key + sign + value for key, value in pairs.items()), encoding="utf-8")
    done = succeed("compare", "--config", file, "--max-steps", 2, "--output", tmp_path / "out")
    arms = json.loads(done.stdout)["arms"]
    assert [(arm["regularizer"], arm["seed"], arm["steps"]) for arm in arms] == [
        ("none", 5, 2),
        ("tpr:weight=2", 5, 2),
    ]
    assert all((arm["rtol"], arm["batch_size"], arm["setup"]["hidden"]) == (1e-3, 150, [8, 8]) for arm in arms)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-step = 3", "unknown option 'max_step'"),
        ("hidden = [", "cannot read"),
        ("rtol = -1.0", "number > 0"),
    ],
)
def test_a_bad_configuration_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    done = call("compare", "--config", tmp_path / "c.toml")
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--data", "pwer"], "did you mean power"),
        (["compare", "--data", "no/such.csv"], "no/such.csv"),
        (["compare", "--rtol", "0"], "finite number > 0"),
        (["compare", "--method", "newton"], "not one of dopri8"),
        (["compare", "--method", "rk4"], "n_steps"),
        (["compare", "--regularizers", "tpr:degree=9"], "interpolates"),
        (["compare", "--regularizers", "ridge"], "unknown regularizer"),
        (["compare", "--seeds", "0,0"], "all different"),
        (["compare", "--hidden", "6,x"], "separated by commas"),
        (["compare", "--max-steps", "0"], "0 is not in the range|greater than or equal to 1"),
        (["compare", "--batch-size", "100000"], "larger than the 40000 training rows"),
        (["compare", "--divergence", "guess"], "unknown divergence"),
        (["compare", "--device", "abacus"], "unknown device"),
        (["compare", "--bogus"], "No such option"),
        (["train", "--regularizers", "none tpr"], "unknown regularizer"),
        (["evaluate", "no-such-run"], "no-such-run"),
        (["sample", "no-such-run", "--output", "x.txt"], ".csv or .npy"),
        (["data", "fetch", "moons"], "needs no download"),
    ],
)
def test_bad_input_gives_one_message_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.exit_code == 2
    assert any(part in done.stderr for part in message.split("|")), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_a_failed_solve_gives_exit_code_1(tmp_path: Path) -> None:
    done = call("train", "--max-nfe", 3, "--output", tmp_path / "run", *TINY)
    assert done.exit_code == 1
    assert "max_nfe = 3" in done.stderr
    assert "Traceback" not in done.stderr


def test_data_sets_are_listed(tmp_path: Path) -> None:
    rows = json.loads(succeed("data", "list", "--data-dir", tmp_path, "--json").stdout)
    assert {"power", "moons", "gas"} <= {row["name"] for row in rows}
    table = succeed("data", "list", "--data-dir", tmp_path).stdout
    assert "no: pycnf data fetch gas" in table


def test_version_and_help() -> None:
    assert succeed("--version").stdout.split() == ["pycnf", pycnf.__version__]
    text = succeed("compare", "--help").stdout
    for option in (
        "--data",
        "--seeds",
        "--max-steps",
        "--rtol",
        "--atol",
        "--method",
        "--regularizers",
        "--output",
    ):
        assert option in text
    assert "pycnf compare --data power" in text, "an example"


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "pycnf", *(str(a) for a in arguments)]


def test_the_command_shows_something_within_ten_seconds(tmp_path: Path) -> None:
    """A real process; its first line of progress comes before anything is imported for training."""
    process = subprocess.Popen(
        command("compare", "--data", "moons", "--seeds", 1, "--output", tmp_path, "--json", *TINY),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith(
        f"Comparing on moons: none | tpr:weight=5 | {DEFAULT}; seeds 0; tolerance"
    )
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    record = json.loads(out)
    assert record["command"].startswith("pycnf compare --data moons")
    assert all(arm["command"] == record["command"] for arm in record["arms"])


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process on Windows")
def test_ctrl_c_gives_exit_code_130_and_leaves_the_results_readable(tmp_path: Path) -> None:
    options = ["--data", "moons", "--hidden", 8, "--seeds", 1, "--output", tmp_path, "--device", "cpu"]
    process = subprocess.Popen(
        command("compare", *options, "--max-steps", 1_000_000),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while time.monotonic() < end and not list(tmp_path.glob("runs/*/last.ckpt")):
        time.sleep(0.1)
    time.sleep(1.0)  # some steps
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "The same command goes on from there" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["status"] == "interrupted"
