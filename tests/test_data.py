"""Toys, the embedded table, names and descriptions."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pycnf.data import DataError, Dataset, describe, load, names, sample_toy
from pycnf.data.toy import TOYS


@pytest.mark.parametrize("name", TOYS)
def test_toy_is_finite_and_repeats_by_seed(name: str) -> None:
    x = sample_toy(name, 1001, seed=3)
    assert x.shape == (1001, 2)
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert torch.equal(x, sample_toy(name, 1001, seed=3))
    assert not torch.equal(x, sample_toy(name, 1001, seed=4))
    assert sample_toy(name, 0).shape == (0, 2)


@pytest.mark.parametrize(
    ("name", "square"),
    [
        # E|x|² in closed form
        ("rings", 0.75**2 * (1 + 4 + 9 + 16) / 4 + 2 * 0.08**2),
        ("8gaussians", (16 + 2 * 0.25) / 2),
        ("checkerboard", 2 * 16 / 3),
        ("circles", 9 * ((1 + 0.25) / 2 + 2 * 0.08**2)),
        ("pinwheel", 4 * (1 + 0.3**2 + 0.1**2)),
        ("swissroll", ((4.5**3 - 1.5**3) / 9 * math.pi**2 + 2) / 25),
        ("2spirals", None),
        ("moons", None),
    ],
)
def test_toy_has_the_moments_of_its_definition(name: str, square: float | None) -> None:
    x = sample_toy(name, 200_000, seed=0).double()
    if name == "moons":  # the mean of the two arcs is (1/2, 1/4); doubled and shifted it is (0, 0.3)
        torch.testing.assert_close(x.mean(dim=0), torch.tensor([0.0, 0.3]).double(), atol=0.02, rtol=0)
        return
    if name != "swissroll":
        torch.testing.assert_close(x.mean(dim=0), torch.zeros(2).double(), atol=0.03, rtol=0)
    if square is not None:
        assert x.square().sum(dim=1).mean().item() == pytest.approx(square, rel=0.01)


def test_checkerboard_fills_eight_cells_evenly() -> None:
    x = sample_toy("checkerboard", 80_000, seed=0)
    cells = ((x + 4) / 2).floor().long().clamp(0, 3)
    counts = torch.bincount(4 * cells[:, 0] + cells[:, 1], minlength=16).view(4, 4)
    dark = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert (counts[~dark] == 0).all()
    assert (counts[dark] - 10_000).abs().max() < 500  # five deviations of a binomial count


def test_toy_draws_from_a_generator() -> None:
    rng = np.random.default_rng(0)
    assert not torch.equal(sample_toy("moons", 5, rng), sample_toy("moons", 5, rng))


def test_toy_refuses_bad_arguments() -> None:
    with pytest.raises(DataError, match=r"no toy density is called 'moon'; there are rings, .*moons"):
        sample_toy("moon", 5)
    with pytest.raises(DataError, match="n ≥ 0, got -1"):
        sample_toy("moons", -1)


def test_load_toy_has_independent_parts() -> None:
    data = load("moons", seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (50_000, 5_000, 10_000)
    assert data.features == 2
    assert not torch.equal(data.train[:5_000], data.validation)
    assert torch.equal(data.restore(data.test), data.test)
    assert torch.equal(data.train, load("moons", seed=1).train)


def test_attribution_is_beside_the_embedded_table() -> None:
    import pycnf.data

    text = Path(pycnf.data.__file__).with_name("ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(word in text for word in ("Hebrail", "Berard", "CC BY 4.0", "10.24432/C58K54", "changed"))


def test_dataset_prints_in_one_line_and_checks_shapes() -> None:
    assert repr(load("rings")) == "Dataset('rings', features=2, train=50000, validation=5000, test=10000)"
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=re.escape("expected test of shape (*, 2), got (3, 1)")):
        Dataset("d", x, x, x[:, :1], ("a", "b"), "here")


def test_names_and_descriptions_cover_everything(tmp_path: Path) -> None:
    assert set(TOYS) == set(names("toy"))
    assert set(names("benchmark")) == {"power-full", "gas", "hepmass", "miniboone", "bsds300"}
    for name in names():
        row = describe(name, data_dir=tmp_path)
        assert row.name == name
        assert row.features > 0
        assert row.rows > 0
        assert row.summary
        assert row.license
        assert row.source
        assert row.present == (row.kind in ("toy", "embedded"))
        assert row.path is None
        assert row.fetchable == (row.kind == "benchmark")


def test_description_says_where_a_set_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data" / "miniboone" / "data.npy"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert describe("miniboone", data_dir=tmp_path).path == path
    monkeypatch.setenv("PYCNF_DATA", str(tmp_path))
    assert describe("miniboone").present


def test_unknown_name_suggests_similar_ones() -> None:
    with pytest.raises(DataError, match=r"called 'checkerbord'; did you mean checkerboard\? There are: rings"):
        load("checkerbord")
    with pytest.raises(DataError, match="seed ≥ 0, got -1"):
        load("moons", seed=-1)


@pytest.mark.parametrize("name", names("benchmark"))
def test_missing_benchmark_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name}: found no .* in .*fetch it with: pycnf data fetch {name}, or name"):
        load(name, data_dir=tmp_path)


@pytest.mark.parametrize("name", names("substitute"))
def test_missing_substitute_says_where_it_comes_from(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder.*get it from https://.*PYCNF_DATA"):
        load(name, data_dir=tmp_path / "nowhere")
