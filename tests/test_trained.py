"""Truths about runs of images and auto-encoders that are opened again: they are tested and sampled as they were."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from problems import write_pictures
from typer.testing import CliRunner

from pycnf import fit
from pycnf.cli import app
from pycnf.experiments import run_experiment
from pycnf.experiments.trained import kind_of, reopen
from pycnf.images import ImageFlow, load
from pycnf.records import read_json
from pycnf.vae import VAE, load_pictures, train_vae

TINY: dict[str, Any] = {"max_steps": 2, "hidden": (4,), "batch_size": 10, "test_batch_size": 8, "device": "cpu"}
TINY |= {"seeds": 1, "jobs": 1, "progress": False, "regularizers": "none", "tolerances": (1e-3,), "sweep_rows": 5}
OWN: dict[str, dict[str, Any]] = {
    "mnist": {"shrink": 2, "probes": 2, "repeats": 3, "test_rows": 12, "dequantization": "variational"},
    "vae-freyfaces": {"widths": (8,), "latent": 2, "warmup": 0, "importance_rows": 3, "importance_samples": 5},
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the exact formats, with random content."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    write_pictures(folder, rng)
    return folder


def made(name: str, data_dir: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a run of an experiment, and its record."""
    result = run_experiment(name, data_dir=data_dir, output=folder, runs=folder / "kept", **TINY, **OWN[name])
    (run,) = (folder / "kept").iterdir()
    return run, dict(result.rows[0])


@pytest.fixture(scope="module")
def images(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return made("mnist", data_dir, tmp_path_factory.mktemp("mnist"))


@pytest.fixture(scope="module")
def faces(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return made("vae-freyfaces", data_dir, tmp_path_factory.mktemp("faces"))


def call(*arguments: Any) -> Any:
    """Run a command in this process."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


def evaluated(*arguments: Any) -> dict[str, Any]:
    done = call("evaluate", *arguments, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def test_an_evaluation_repeats_the_test_of_the_experiment(
    images: tuple[Path, dict[str, Any]], faces: tuple[Path, dict[str, Any]], data_dir: Path, tmp_path: Path
) -> None:
    for (run, trained), keys in (
        (images, ("bits_per_dim", "bits_per_dim_se", "noise_se", "repeats")),
        (faces, ("bits_per_dim", "importance_nll", "importance_bound", "effective", "importance_samples")),
    ):
        found = evaluated(run, "--data-dir", data_dir, "--output", tmp_path / "record.json")
        for name in ("nll", "nll_se", "nfe_test", "accepted", "rejected", *keys):
            assert found[name] == pytest.approx(trained[name], rel=1e-6), name
        assert found["divergence"] == trained["test_divergence"]
        assert (found["rtol"], found["method"], found["batch_size"]) == (1e-5, "dopri5", 8)
        assert set(found) >= {"command", "versions", "device", "date", "run", "data", "split", "rows", "seconds"}
        assert read_json(tmp_path / "record.json")["nll"] == found["nll"]


def test_what_is_shown_has_bits_and_their_error(
    images: tuple[Path, dict[str, Any]], faces: tuple[Path, dict[str, Any]], data_dir: Path
) -> None:
    shown = call("evaluate", images[0], "--data-dir", data_dir, "--device", "cpu")
    assert shown.exit_code == 0, shown.output
    assert f"{images[1]['bits_per_dim']:.4f}" in shown.stdout
    for text in ("bits/dim", "its standard error", "(12 pictures)", "hutchinson-rademacher-2", "a batch of 8"):
        assert text in shown.stdout
    shown = call("evaluate", faces[0], "--data-dir", data_dir, "--device", "cpu")
    for text in ("importance-weighted NLL", f"{faces[1]['importance_nll']:.4f}", "effective samples"):
        assert text in shown.stdout


def test_the_test_can_be_another(
    images: tuple[Path, dict[str, Any]], faces: tuple[Path, dict[str, Any]], data_dir: Path
) -> None:
    more = ["--probes", 3, "--repeats", 1, "--first", 15, "--batch-size", 5, "--rtol", 1e-2, "--atol", 1e-2]
    found = evaluated(images[0], "--data-dir", data_dir, *more)
    assert (found["divergence"], found["repeats"], found["rows"]) == ("hutchinson-rademacher-3", 1, 15)
    assert (found["batch_size"], found["rtol"]) == (5, 1e-2)
    assert found["noise_se"] is None or math.isnan(found["noise_se"]), "one repeat cannot tell"
    assert found["nfe_test"] < images[1]["nfe_test"]
    assert evaluated(images[0], "--data-dir", data_dir, "--split", "validation")["rows"] == 6
    assert evaluated(images[0], "--data-dir", data_dir, "--split", "train", "--first", 3, "--repeats", 1)["rows"] == 3
    found = evaluated(faces[0], "--data-dir", data_dir, "--importance-samples", 2, "--first", 4)
    assert (found["importance_samples"], found["importance_rows"], found["rows"]) == (2, 3, 4)


def test_images_of_a_file_are_rows(images: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (7, 196)).astype(np.float32))
    found = evaluated(images[0], "--rows", tmp_path / "x.npy", "--densities", tmp_path / "p.npy")
    assert (found["rows"], found["divergence"]) == (7, "hutchinson-rademacher")
    assert found["nll"] == pytest.approx(-np.load(tmp_path / "p.npy").mean())


def test_a_flow_that_was_trained_in_code_tells_its_shape(data_dir: Path, tmp_path: Path) -> None:
    digits = load("mnist", data_dir=data_dir).shrink(4)
    flow = ImageFlow(digits.shape, (4,), 1, scales=1, eval_divergence="exact")
    options: dict[str, Any] = {"max_steps": 1, "batch_size": 5, "device": "cpu", "progress": False}
    fit(flow, digits.rows("train"), None, output=tmp_path / "run", **options)
    found = evaluated(tmp_path / "run", "--data", "mnist", "--data-dir", data_dir, "--first", 4, "--repeats", 2)
    assert (found["rows"], found["repeats"], found["divergence"], found["batch_size"]) == (4, 2, "exact", 5)
    done = call("evaluate", tmp_path / "run", "--data-dir", data_dir)
    assert (done.exit_code, "name them with --data" in done.stderr) == (2, True)


def test_kinds_are_told_apart(
    images: tuple[Path, dict[str, Any]], faces: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    assert (kind_of(images[0]), kind_of(faces[0])) == ("images", "vae")
    with pytest.raises(FileNotFoundError, match="no folder"):
        kind_of(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        kind_of(tmp_path)


def test_what_cannot_be_evaluated_is_told(
    images: tuple[Path, dict[str, Any]], faces: tuple[Path, dict[str, Any]], data_dir: Path, tmp_path: Path
) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(images[0], wide)
    card = read_json(wide / "data.json")
    card["workload"]["shrink"] = 1
    (wide / "data.json").write_text(json.dumps(card), encoding="utf-8")
    there = ["--data-dir", data_dir]
    for run, arguments, message in (
        (images[0], ["--data-dir", tmp_path], "pycnf data fetch mnist"),
        (faces[0], ["--data-dir", tmp_path], "freyfaces"),
        (images[0], [*there, "--data", "power"], "no set of images is called 'power'"),
        (wide, there, "was trained on pictures of shape (1, 14, 14), mnist has (1, 28, 28)"),
        (images[0], [*there, "--workers", 2], "--workers is not for runs of kind images"),
        (images[0], [*there, "--divergence", "exact"], "--divergence is not for runs of kind images"),
        (images[0], [*there, "--densities", tmp_path / "p.npy"], "--densities is not for runs of kind images"),
        (images[0], [*there, "--importance-samples", 2], "importance_samples is no setting of the tests of"),
        (faces[0], [*there, "--repeats", 2], "repeats is no setting of the tests of"),
        (faces[0], [*there, "--rows", tmp_path / "x.npy"], "--rows is not for runs of kind vae"),
        (images[0], ["--rows", tmp_path / "x.npy", "--probes", 2], "--probes is not for runs of kind images with"),
    ):
        done = call("evaluate", run, *arguments)
        assert (done.exit_code, message in " ".join(done.stderr.split())) == (2, True), done.output
        assert "Traceback" not in done.stderr


def test_a_posterior_without_a_flow_is_refused(data_dir: Path, tmp_path: Path) -> None:
    faces = load_pictures("freyfaces", data_dir=data_dir)
    vae = VAE(faces.shape, latent=2, networks="dense", widths=(4,), pixels="logistic", posterior={"kind": "gaussian"})
    train_vae(vae, faces, max_steps=1, warmup=0, batch_size=5, device="cpu", output=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"the posterior of .* is no flow"):
        reopen(tmp_path / "run", "freyfaces", data_dir=data_dir)


# --- samples --------------------------------------------------------------------------------------


def test_images_are_sampled_as_levels(images: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for name in ("one.npy", "two.npy", "grid.png", "rows.csv"):
        done = call("sample", images[0], "-n", 6, "--seed", 2, "--device", "cpu", "--output", tmp_path / name, "--json")
        assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert (record["n"], record["shape"], record["units"]) == (6, [1, 14, 14], "levels")
    one, two = (np.load(tmp_path / name) for name in ("one.npy", "two.npy"))
    assert (one.shape, one.dtype) == ((6, 1, 14, 14), np.uint8)
    assert (one == two).all()
    assert one.std() > 0
    rows = np.loadtxt(tmp_path / "rows.csv", delimiter=",", skiprows=1)
    assert (rows == one.reshape(6, -1)).all()
    width, height = Image.open(tmp_path / "grid.png").size
    assert width > 5 * height, "six images in a row"


def test_pictures_of_an_auto_encoder_are_sampled(
    faces: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in (("one.npy", 6), ("two.npy", 6)):
        done = call("sample", faces[0], "-n", 6, "--batch-size", size, "--device", "cpu", "--output", name)
        assert done.exit_code == 0, done.output
    one, two = np.load("one.npy"), np.load("two.npy")
    assert (one.shape, one.dtype) == ((6, 1, 28, 20), np.float32)
    assert (one == two).all()
    assert 0 <= one.min() < one.max() <= 1
    assert call("sample", faces[0], "-n", 3, "--device", "cpu").exit_code == 0
    assert Path("samples.png").stat().st_size > 0
    again = call("sample", faces[0], "-n", 3, "--device", "cpu")
    assert (again.exit_code, "--overwrite" in again.stderr) == (2, True)


def test_what_cannot_be_sampled_is_told(
    images: tuple[Path, dict[str, Any]], faces: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for run, arguments, message in (
        (images[0], ["--output", tmp_path / "a.txt"], "expected a .csv or .npy or .png file"),
        (
            images[0],
            ["--output", tmp_path / "a.npy", "--standardized"],
            "--standardized is not for runs of kind images",
        ),
        (faces[0], ["--output", tmp_path / "a.npy", "--workers", 2], "--workers is not for runs of kind vae"),
    ):
        done = call("sample", run, *arguments)
        assert (done.exit_code, message in done.stderr) == (2, True), done.output
