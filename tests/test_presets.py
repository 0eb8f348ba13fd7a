"""Truths about experiments by name: their settings, their data, what they train and test, and how they end."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import write_pictures
from typer.testing import CliRunner

from pycnf.cli import app
from pycnf.data import DataError
from pycnf.divergence import Exact
from pycnf.experiments import (
    AutoEncoders,
    BenchResult,
    Budget,
    Images,
    Setup,
    get_preset,
    list_presets,
    parse_arms,
    plan_experiment,
    run_experiment,
)
from pycnf.experiments.image_flows import noise_error
from pycnf.experiments.presets import BUDGETS
from pycnf.experiments.reproduction import KINDS
from pycnf.experiments.settings import check_settings, read_settings, settable
from pycnf.experiments.sweep import Solved, sweep
from pycnf.experiments.workloads import EXACT, divergence_for
from pycnf.images import ImageSet
from pycnf.images.flow import ImageFlow
from pycnf.records import read_json
from pycnf.scale import log_prob
from pycnf.solution import SolveStats
from pycnf.solve import Solver
from pycnf.vae import PictureSet

TOYS = ("rings", "8gaussians", "checkerboard", "circles", "moons", "pinwheel", "swissroll", "2spirals")
NAMES = {
    *TOYS,
    *("power", "gas", "hepmass", "miniboone", "bsds300", "mnist", "fashion-mnist", "cifar10"),
    *("vae-mnist", "vae-omniglot", "vae-freyfaces", "vae-caltech"),
}
ARM_KEYS = {
    *("data", "regularizer", "seed", "rtol", "atol", "nll", "nll_se", "nfe_train", "nfe_backward", "nfe_test"),
    *("seconds", "device", "versions", "command", "date", "notes", "test_divergence", "tolerances", "configuration"),
}
TINY: dict[str, Any] = {"max_steps": 2, "hidden": (4,), "batch_size": 10, "device": "cpu"}
TINY |= {"tolerances": (1e-3, 1e-5), "sweep_rows": 10}
OWN: dict[str, dict[str, Any]] = {
    "moons": {},
    "mnist": {"shrink": 2, "probes": 2, "repeats": 3, "test_batch_size": 10},
    "vae-freyfaces": {"widths": (8,), "latent": 2, "warmup": 0, "importance_rows": 3, "importance_samples": 20},
}
QUICK = ["--max-steps", "2", "--seeds", "1", "--jobs", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the exact formats, with random content."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    write_pictures(folder, rng)
    np.savez(folder / "gas_drift16.npz", x=rng.standard_normal((200, 16)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


def tiny(name: str, data_dir: Path, folder: Path, **options: Any) -> BenchResult:
    """Run an experiment with a tiny model, in this process."""
    settings = {"seeds": 1, "jobs": 1, "progress": False, "regularizers": "tpr:weight=50", **TINY, **OWN[name]}
    where = {"output": folder / name, "runs": folder / "checkpoints" / name}
    return run_experiment(name, data_dir=data_dir, **where, **settings | options)


@pytest.fixture(scope="module", params=list(OWN))
def made(request: pytest.FixtureRequest, data_dir: Path, folder: Path) -> tuple[str, BenchResult]:
    return request.param, tiny(request.param, data_dir, folder)


# --- settings -------------------------------------------------------------------------------------


def test_the_experiments_of_the_paper_go_by_their_names() -> None:
    assert set(list_presets()) == NAMES
    assert {preset.kind for preset in list_presets().values()} == set(KINDS)


PAPER = {
    **dict.fromkeys(TOYS, ((64, 64, 64), 1, "tanh", "concat", 100, "adam", 1e-3, 0.5, "exact")),
    "power": ((60, 60, 60), 5, "tanh", "concat", 10_000, "adam", 1e-3, 1.0, "hutchinson"),
    "gas": ((160, 160, 160), 5, "tanh", "concat", 1000, "adam", 1e-3, 1.0, "hutchinson"),
    "hepmass": ((210, 210), 10, "softplus", "concat", 10_000, "adam", 1e-3, 1.0, "hutchinson"),
    "miniboone": ((860, 860), 1, "softplus", "concat", 1000, "adam", 1e-3, 1.0, "hutchinson"),
    "bsds300": ((1260, 1260, 1260), 2, "tanh", "concatsquash", 10_000, "adam", 1e-3, 1.0, "hutchinson"),
    **dict.fromkeys(
        ("mnist", "fashion-mnist", "cifar10"),
        ((64, 64, 64), 2, "softplus", "concat", 200, "adam", 1e-3, 1.0, "hutchinson-rademacher"),
    ),
    "vae-mnist": ((1024, 1024), 2, "softplus", "concat", 100, "adamax", 5e-4, 0.5, "hutchinson"),
    "vae-omniglot": ((512, 512), 5, "softplus", "concat", 100, "adamax", 5e-4, 0.5, "hutchinson"),
    "vae-freyfaces": ((512, 512), 2, "softplus", "concat", 100, "adamax", 5e-4, 0.5, "hutchinson"),
    "vae-caltech": ((2048,), 1, "tanh", "concat", 100, "adamax", 5e-4, 0.5, "hutchinson"),
}


def parts(name: str, budget: str) -> tuple[Setup, dict[str, Any]]:
    """The setup of a preset before any data are read, and the settings of its workload."""
    values, fields = get_preset(name).settings(budget), {field.name for field in dataclasses.fields(Setup)}
    return Setup(**{key: value for key, value in values.items() if key in fields}), values


@pytest.mark.parametrize("name", sorted(NAMES))
def test_presets_have_the_papers_settings(name: str) -> None:
    setup, values = parts(name, "paper")
    found = (setup.hidden, setup.blocks, setup.activation, setup.time, setup.batch_size, setup.optimizer, setup.lr)
    assert (*found, setup.T, setup.divergence) == PAPER[name]
    assert (setup.rtol, setup.atol, setup.test_rtol, setup.test_atol, setup.method) == (
        *[1e-4] * 2,
        *[1e-5] * 2,
        "dopri5",
    )
    assert values["regularizers"][:2] == ["none", "tpr:weight=5"]
    assert parse_arms(values["regularizers"], setup)


def test_presets_of_images_and_auto_encoders_have_the_papers_own_settings() -> None:
    ranks = {name: get_preset(name).settings("paper")["rank"] for name in NAMES if name.startswith("vae-")}
    assert ranks == {"vae-mnist": 64, "vae-omniglot": 20, "vae-freyfaces": 20, "vae-caltech": 20}
    assert get_preset("cifar10").settings("paper")["warmup"] == 1000
    for name in ranks:
        values = get_preset(name).settings("paper")
        assert (values["warmup"], values["patience"]) == (100, 35)
    assert (AutoEncoders().latent, Images().shrink) == (64, 1)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_small_budgets_have_small_models_at_the_same_tolerance(name: str) -> None:
    (small, values), (paper, _) = parts(name, "small"), parts(name, "paper")
    assert (small.rtol, small.test_rtol, small.T) == (paper.rtol, paper.test_rtol, paper.T)
    assert small.blocks * sum(small.hidden) <= 256
    assert small.max_steps <= 4000
    assert set(values) >= set(get_preset(name).settings("paper")), "what small does not change is the paper's"


@pytest.mark.parametrize(
    ("name", "shape"), [("vae-mnist", (28, 28)), ("vae-freyfaces", (28, 20)), ("vae-caltech", (28, 28))]
)
def test_small_auto_encoders_are_small(name: str, shape: tuple[int, int]) -> None:
    setup, values = parts(name, "small")
    fields = {field.name for field in dataclasses.fields(AutoEncoders)}
    work = AutoEncoders(**{key: value for key, value in values.items() if key in fields})
    blank = torch.zeros(2, math.prod(shape))
    vae = work.build(PictureSet("blank", shape, blank, blank, blank), setup, seed=0)
    assert sum(p.numel() for p in vae.parameters()) < 1e6
    flow = vae.posterior.flow
    assert flow is not None
    assert (flow.T, str(flow.divergence), str(flow.eval_divergence)) == (0.5, "hutchinson-gaussian", "exact")
    assert (flow.solver.rtol, flow.eval_solver.rtol) == (1e-4, 1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get_preset("mnists"), "unknown experiment 'mnists': choose one of rings"),
        (lambda: get_preset("moons").settings("large"), "unknown budget 'large': choose small or paper"),
        (lambda: plan_experiment("moons", width=3), "unknown setting 'width' of moons"),
        (lambda: plan_experiment("moons", shrink=2), "unknown setting 'shrink' of moons"),
        (lambda: run_experiment("moons", regularizers="mystery"), "unknown regularizer 'mystery'"),
        (lambda: run_experiment("moons", rtol=-1.0), "rtol > 0"),
        (lambda: plan_experiment("moons", lr="fast"), "lr of moons: expected a number, got 'fast'"),
        (lambda: plan_experiment("moons", blocks=1.5), "blocks of moons: expected a whole number, got 1.5"),
        (lambda: plan_experiment("moons", warm_start=1), "warm_start of moons: expected true or false, got 1"),
        (lambda: plan_experiment("moons", hidden=64), r"hidden of moons: expected a list such as \[64, 64\], got 64"),
        (lambda: plan_experiment("moons", max_nfe="no"), "max_nfe of moons: expected a whole number, got 'no'"),
        (lambda: plan_experiment("mnist", dequantization="gauss"), "expected uniform or variational or none"),
        (lambda: plan_experiment("moons", about="x"), "unknown setting 'about' of moons"),
    ],
)
def test_impossible_experiments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_plain_arm_is_always_there_and_first() -> None:
    for given in ("tpr", ["tpr", "none"], "none tpr"):
        assert plan_experiment("moons", regularizers=given).regularizers == ("none", "tpr")


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMES - {*TOYS}))
@pytest.mark.parametrize("budget", BUDGETS)
def test_absent_data_are_named_with_the_command_that_gets_them(name: str, budget: str, tmp_path: Path) -> None:
    if (name, budget) == ("power", "small"):
        assert list(plan_experiment(name, budget, data_dir=tmp_path).data) == ["power"], "part of the package"
        return
    fetch = get_preset(name).fetch
    assert fetch is not None
    assert fetch.startswith(("pycnf data fetch ", "curl -L -o "))
    output = tmp_path / "out"
    with pytest.raises(DataError, match=r"the data .* are not in") as told:
        run_experiment(name, budget, data_dir=tmp_path, output=output)
    assert fetch in str(told.value)
    assert str(tmp_path) in str(told.value)
    assert not output.exists(), "nothing was run"


def test_a_substitute_goes_by_its_own_name(data_dir: Path, tmp_path: Path) -> None:
    assert list(plan_experiment("gas", data_dir=data_dir).data) == ["gas-drift"]
    with pytest.raises(DataError, match="pycnf data fetch gas"):
        plan_experiment("gas", "paper", data_dir=data_dir)
    done = call(
        "experiment", "run", "gas", "--data-dir", data_dir, "--output", tmp_path / "out", "--regularizer", "none"
    )
    assert "on gas-drift, which stands in for gas and is not gas" in done.stderr
    assert "batch_size 500 is larger than the 162 training rows of gas-drift" in done.stderr, "a tiny file"


# --- runs -----------------------------------------------------------------------------------------


def test_every_kind_has_the_same_records(made: tuple[str, BenchResult], folder: Path) -> None:
    name, result = made
    files = sorted((folder / name / "runs").glob("*.json"))
    assert len(files) == len(result.rows) == 2
    rows = [read_json(path) for path in files]
    assert {row["regularizer"] for row in rows} == {"none", "tpr:weight=50"}
    for row in rows:
        assert set(row) >= ARM_KEYS
        assert row["status"] == "finished"
        assert (row["rtol"], row["test_rtol"]) == (1e-4, 1e-5)
        assert math.isfinite(row["nll"])
        assert row["nll_se"] > 0
        assert row["nfe_test"] > 0
        assert set(row) >= set(KINDS[get_preset(name).kind].measures)
        assert [test["rtol"] for test in row["tolerances"]] == [1e-3, 1e-5]
    record = read_json(folder / name / "bench.json")
    assert set(record) >= {"command", "versions", "device", "date", "seeds", "data"}
    (data,) = record["data"].values()
    assert [line["arm"] for line in data["summary"]] == ["none", "tpr:weight=50", *(["none, only tested at 1e-3"])]


def test_a_recorded_experiment_is_not_run_again(made: tuple[str, BenchResult], data_dir: Path, folder: Path) -> None:
    name, result = made
    before = {path: path.read_bytes() for path in (folder / name / "runs").iterdir()}
    again = tiny(name, data_dir, folder)
    assert again == result
    assert {path: path.read_bytes() for path in (folder / name / "runs").iterdir()} == before
    with pytest.raises(ValueError, match="cannot be compared"):
        tiny(name, data_dir, folder, lr=1.0)


def test_figures_show_what_each_arm_has_learned(made: tuple[str, BenchResult], folder: Path) -> None:
    name, result = made
    kinds = {"moons": ["density"], "mnist": ["samples"], "vae-freyfaces": ["samples", "reconstructions"]}[name]
    (data,) = result.data
    wanted = {f"{kind}-{data}-{arm}.png" for kind in kinds for arm in ("none", "tpr-weight-50")}
    assert {path.name for path in (folder / name).glob("*.png")} == wanted


def test_images_are_tested_with_probes_and_a_standard_error(made: tuple[str, BenchResult]) -> None:
    name, result = made
    if name != "mnist":
        return
    for row in result.rows:
        assert row["test_divergence"] == "hutchinson-rademacher-2"
        assert row["bits_per_dim"] == pytest.approx(row["nll"] / (196 * math.log(2)))
        assert 0 < row["noise_se"] < row["nll_se"]
        assert "means of 2 x 2 pixels" in row["notes"]


def test_auto_encoders_are_tested_by_the_bound_and_by_importance_weights(made: tuple[str, BenchResult]) -> None:
    name, result = made
    if name != "vae-freyfaces":
        return
    for row in result.rows:
        assert row["test_divergence"] == "exact"
        assert row["importance_nll"] < row["importance_bound"], "never worse than the bound of the same samples"
        assert 1 <= row["effective"] <= row["importance_samples"] == 20
        assert row["importance_rows"] == 3
        assert row["bits_per_dim"] == pytest.approx(row["nll"] / (560 * math.log(2)))


# --- workloads ------------------------------------------------------------------------------------


def test_divergences_of_tests_are_exact_up_to_a_hundred_dimensions() -> None:
    assert divergence_for(EXACT, 7) == "exact"
    assert divergence_for(EXACT + 1, 7) == "hutchinson-rademacher-7"


def test_noise_error_is_the_standard_error_of_the_mean_that_noise_alone_causes() -> None:
    repeats, rows, sd = 5, 400, 0.3
    generator = torch.Generator().manual_seed(0)
    truth = 10 * torch.randn(rows, dtype=torch.float64, generator=generator)
    values = truth + sd * torch.randn(repeats, rows, dtype=torch.float64, generator=generator)
    assert noise_error(values) == pytest.approx(sd / math.sqrt(repeats * rows), rel=0.1)
    assert math.isnan(noise_error(values[:1]))


def test_a_sweep_measures_the_distance_to_the_truth() -> None:
    truth = torch.tensor([1.0, 2.0, math.nan], dtype=torch.float64)

    def solve(solver: Solver) -> Solved:
        return torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + solver.rtol, SolveStats(nfe=12), 2

    loose, tight = sweep(solve, Solver(), (1e-2, 1e-4), truth, 3)
    assert (loose["error_rms"], tight["error_rms"]) == (pytest.approx(1e-2), pytest.approx(1e-4))
    assert (loose["error_rows"], loose["nfe"], loose["rows"]) == (2, 6.0, 3)
    assert sweep(solve, Solver(), (1e-2,), None, 3)[0]["error_rms"] is None


def squares(size: int, rows: int = 30) -> ImageSet:
    """Gray images of so many pixels, a square in one corner."""
    x = torch.full((rows, 1, size, size), 128, dtype=torch.uint8)
    x[:, :, :2, :2] = torch.arange(rows).view(-1, 1, 1, 1).to(torch.uint8) + 150
    labels: Any = {part: torch.zeros(rows, dtype=torch.int64) for part in ("train", "validation", "test")}
    return ImageSet("squares", x, x, x, labels, "drawn")


def curved(work: Images, data: ImageSet, setup: Setup, factor: float) -> ImageFlow:
    """A flow whose steps have errors to speak of."""
    model = work.build(data, setup, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model.eval()


def test_probes_estimate_what_the_exact_divergence_gives() -> None:
    work, data, setup = Images(probes=1, repeats=8), squares(12, rows=12), Setup(hidden=(4,), activation="softplus")
    model = curved(work, data, setup, 1.3)
    found = work.test(model, data, setup)
    assert found["test_divergence"] == "hutchinson-rademacher"
    model.eval_divergence = Exact()
    exact = -torch.stack([log_prob(model, data.rows("test")).values for _ in range(2)])
    assert abs(found["nll"] - float(exact.mean())) < 4 * (found["noise_se"] + noise_error(exact))
    assert found["noise_se"] > noise_error(exact), "probes add noise to that of the levels"
    assert work.test(model, data, setup)["nll"] == found["nll"], "all arms are tested with the same noise"


def test_images_are_swept_with_the_same_noise_at_every_tolerance() -> None:
    work, data, setup = Images(), squares(4), Setup(hidden=(4,), activation="softplus")
    model = curved(work, data, setup, 5.0)
    rows = work.sweep(model, data, setup, (1e-2, 1e-4, 1e-6), 10, 10)
    errors = [row["error_rms"] for row in rows]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0
    assert [row["nfe"] for row in rows] == sorted(row["nfe"] for row in rows)
    assert rows[1]["nll"] == pytest.approx(rows[2]["nll"], abs=10 * errors[1])
    assert next(model.parameters()).dtype == torch.float32, "the model itself is left alone"
    assert isinstance(model.eval_divergence, Exact)


def test_the_learning_rate_warms_up() -> None:
    work, data = Images(warmup=4), squares(4)
    setup = Setup(hidden=(4,), max_steps=6, batch_size=10, test_batch_size=10, lr=1e-3, schedule="constant")
    model = work.build(data, setup, seed=0)
    result = work.fit(model, data, setup, regularizers=[], seed=0, device="cpu", progress=False)
    assert [row["lr"] for row in result.rows("train")] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_epochs_become_steps_unless_steps_are_asked_for(data_dir: Path) -> None:
    work = AutoEncoders(epochs=3, validation_rows=2, test_rows=3)
    data = work.load("freyfaces", data_dir)
    assert (len(data.validation), len(data.test)) == (2, 3)
    epoch = len(data.train) // 20
    setup = work.setup("freyfaces", {"batch_size": 20}, data)
    assert (setup.validate_every, setup.max_steps, setup.schedule) == (epoch, 3 * epoch, "plateau")
    assert work.setup("freyfaces", {"batch_size": 20, "max_steps": 7}, data).max_steps == 7
    with pytest.raises(ValueError, match="batch_size 100 is larger than"):
        work.setup("freyfaces", {"batch_size": 100}, data)


# --- command line ---------------------------------------------------------------------------------


def test_every_setting_of_a_preset_has_the_type_of_its_field() -> None:
    for name, preset in list_presets().items():
        types = settable(Setup, KINDS[preset.kind], Budget)
        for budget in BUDGETS:
            for data in preset.data(budget):
                values = preset.settings(budget, data)
                check_settings({key: value for key, value in values.items() if key != "data"}, types, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["epochs"], "as NAME=VALUE"), (["epochs="], "as NAME=VALUE"), (["lr=1", "lr=2"], "lr is given twice")],
)
def test_settings_in_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(words)


def call(*arguments: Any) -> Any:
    """Run a command in this process."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


def test_the_list_tells_what_there_is(data_dir: Path) -> None:
    rows = {row["name"]: row for row in json.loads(call("experiment", "list", "--json", "--data-dir", data_dir).stdout)}
    assert set(rows) == NAMES
    assert rows["gas"]["data"] == {"small": "gas-drift", "paper": None}
    assert rows["mnist"]["data"] == {"small": "mnist", "paper": "mnist"}
    shown = call("experiment", "list", "--data-dir", data_dir).stdout
    assert "pycnf data fetch cifar10" in shown
    assert "pycnf data fetch mnist" not in shown, "it is there"


def test_run_prints_a_table_and_where_its_files_are(tmp_path: Path) -> None:
    where = ["--output", tmp_path / "out", "--runs", tmp_path / "runs"]
    done = call("experiment", "run", "circles", "--regularizer", "tpr", *QUICK, *where)
    assert done.exit_code == 0, done.output
    assert "tolerance 1e-4 in training, 1e-5 in test" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines if line} >= {"none", "tpr:weight=5"}
    for name in ("front-circles.svg", "course-circles.svg", "density-circles-none.png", "bench.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0
        assert str(tmp_path / "out" / name) in done.stdout
    record = json.loads(call("experiment", "run", "circles", "--regularizer", "tpr", *QUICK, *where, "--json").stdout)
    assert record["command"].startswith("pycnf")


def test_settings_of_a_preset_are_replaced(data_dir: Path, tmp_path: Path) -> None:
    replaced = {"dequantization": "variational", "hidden": [4], "shrink": 4, "validation_rows": 20, "test_rows": 20}
    words = [word for name, value in replaced.items() for word in ("--set", f"{name}={value}")]
    where = ["--output", tmp_path / "out", "--runs", tmp_path / "runs", "--data-dir", data_dir]
    given = [*QUICK, *words, "--set", "batch_size=20", "--set", "test_batch_size=20", "--set", "sweep_rows=10"]
    done = call("experiment", "run", "mnist", "--regularizer", "none", *given, *where, "--json")
    assert done.exit_code == 0, done.output
    (run,) = (read_json(path) for path in (tmp_path / "out" / "runs").iterdir())
    assert run["status"] == "finished"
    made = run["configuration"]
    assert made["setup"]["hidden"] == [4]
    assert (made["workload"]["dequantization"], made["workload"]["shrink"]) == ("variational", 4)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_settings_are_shown(name: str) -> None:
    found = json.loads(call("experiment", "show", name, "--json").stdout)
    assert set(found) == set(BUDGETS)
    shown = call("experiment", "show", name).stdout
    for key in ("hidden", "lr", "rtol", "regularizers"):
        assert f"  {key} " in shown
    values = found["small"]
    assert values["epochs" if "epochs" in values else "max_steps"] > 0
    assert ("epochs" in values) != ("max_steps" in values), "epochs say how many steps there are"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnists"], "unknown experiment"),
        (["moons", "--set", "lr"], "NAME=VALUE"),
        (["moons", "--set", "epochs=3"], "unknown setting 'epochs'"),
        (["moons", "--budget", "large"], "'large' is not one of small, paper"),
        (["moons", "--regularizer", "mystery"], "unknown regularizer"),
        (["cifar10", "--data-dir", "nowhere"], "pycnf data fetch cifar10"),
    ],
)
def test_bad_input_is_told(arguments: list[str], message: str) -> None:
    done = call("experiment", "run", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
