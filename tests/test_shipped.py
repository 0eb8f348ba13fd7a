"""Truths about the models that come with the package: they are whole, small, and as good as their record says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

import pycnf
from pycnf.data import load as load_data
from pycnf.records import read_json
from pycnf.regularizers import describe_regularizers, parse_regularizers
from pycnf.shipped import CARDS, FOLDER

ROOT = Path(__file__).resolve().parents[1]
NAMES = list(pycnf.models())
RECORD = ROOT / "results" / "shipped" / "models.json"


def test_there_are_models_without_and_with_regularizers() -> None:
    cards = pycnf.models()
    assert {"power-none", "power-tpr"} <= set(cards)
    by_data: dict[str, set[str]] = {}
    for name, card in cards.items():
        assert name.startswith(f"{card['data']}-")
        assert describe_regularizers(parse_regularizers(card["regularizer"])) == card["regularizer"]
        by_data.setdefault(card["data"], set()).add(card["regularizer"])
    assert all("none" in arms and len(arms) > 1 for arms in by_data.values())


def test_arms_differ_in_nothing_but_the_regularizer() -> None:
    cards = pycnf.models()
    for card in cards.values():
        plain = cards[f"{card['data']}-none"]
        for key in ("seed", "steps", "rtol", "atol", "test_rtol", "test_atol", "test_batch_size", "parameters"):
            assert card[key] == plain[key]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_reproduces_its_recorded_likelihood(name: str) -> None:
    flow, card = pycnf.load(name), pycnf.models()[name]
    test = load_data(card["data"]).test
    assert not flow.training
    assert sum(p.numel() for p in flow.parameters()) == card["parameters"]
    found = pycnf.evaluate(flow, test, batch_size=card["test_batch_size"])
    assert found.nll == pytest.approx(card["nll"], abs=1e-3)
    assert found.nfe == pytest.approx(card["nfe_test"], rel=0.1)
    assert (found.rtol, found.atol) == (card["test_rtol"], card["test_atol"])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_densities_and_samples(name: str) -> None:
    flow = pycnf.load(name)
    x = load_data(pycnf.models()[name]["data"]).test[:20]
    with torch.no_grad():
        assert torch.isfinite(flow().log_prob(x)).all()
        drawn = flow().sample((7,))
        assert drawn.shape == (7, x.shape[1])
        solved = flow.solve(x)
        back = flow.solve(solved.z, reverse=True).z
    torch.testing.assert_close(back, x, atol=1e-2, rtol=1e-2)


def test_unknown_models_are_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="no model is called 'power': choose one of power-none"):
        pycnf.load("power")


def test_the_models_take_less_than_a_megabyte() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} == set(NAMES)
    assert {path.name for path in files} == {"config.json", "model.safetensors", CARDS}
    assert sum(path.stat().st_size for path in files) < 1e6


def test_the_models_are_part_of_the_package() -> None:
    package = Path(importlib.import_module("pycnf").__file__ or "").parent
    assert FOLDER.is_relative_to(package), "hatch puts everything below pycnf/ into the wheel that git does not ignore"
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert not {"*.safetensors", "*.json", "weights/", "/pycnf/weights/"} & set(ignored)


def test_the_record_tells_how_they_were_made() -> None:
    record = read_json(RECORD)
    assert record["command"] == "python benchmarks/shipped_models.py"
    assert {row["arm"] for row in record["arms"]} == set(NAMES)
    for row in record["arms"]:
        card = pycnf.models()[row["arm"]]
        assert {key: row[key] for key in card} == card
    assert json.loads((FOLDER / CARDS).read_text(encoding="utf-8")) == pycnf.models()
