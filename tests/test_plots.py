"""Truths about figures: they render, say what their axes mean, and show what the solver did."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pycnf.flow import CNF
from pycnf.plots import COLORS, compare_figure, density_2d, save_figure, training_curves, trajectories


def history() -> list[dict[str, Any]]:
    train = [
        {"step": s, "split": "train", "nll": 3 - 0.1 * s, "nfe": 14 + 6 * (s % 2), "nfe_backward": 2 * s}
        for s in range(1, 21)
    ]
    return [*train, {"step": 20, "split": "validation", "nll": 1.5, "nfe": 26}]


def rows(**changes: Any) -> list[dict[str, Any]]:
    def one(arm: str, seed: int) -> dict[str, Any]:
        cheaper = arm != "none"
        return {
            "data": "power",
            "arm": arm,
            "seed": seed,
            "status": "finished",
            "nll": 0.8 + 0.01 * seed,
            "nfe_test": 50 - 6 * cheaper + seed,
            "curve": {"step": [1, 2, 3], "nfe": [14, 20 + seed, 26]},
            "tolerances": [{"rtol": t, "nfe": n} for t, n in ((1e-3, 20), (1e-5, 44 - 6 * cheaper))],
            **dict.fromkeys(("rtol", "atol"), 1e-4),
            **dict.fromkeys(("test_rtol", "test_atol"), 1e-5),
            **changes,
        }

    failed = {"arm": "tpr:weight=5", "seed": 3, "status": "failed", "error": "no", "tolerances": []}
    return [*(one(arm, seed) for arm in ("none", "tpr:weight=5") for seed in range(3)), failed]


FIGURES: dict[str, Callable[[], Any]] = {
    "training": lambda: training_curves(history()),
    "comparison": lambda: compare_figure(rows()),
    "line": lambda: trajectories(CNF(1, (8,), blocks=2), torch.linspace(-1, 1, 5)[:, None]),
    "plane": lambda: trajectories(CNF(2, (8,)), n=6),
    "density": lambda: density_2d(CNF(2, (8,)), resolution=20, data=torch.randn(30, 2)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_render_with_labels_on_every_axis(name: str, tmp_path: Path) -> None:
    figure = FIGURES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = save_figure(figure, tmp_path / "new" / "figure.svg").read_text(encoding="utf-8")
        png = save_figure(figure, tmp_path / "figure.png").read_bytes()
    assert svg.startswith("<?xml")
    assert png.startswith(b"\x89PNG")
    for axes in figure.axes:
        assert axes.get_ylabel()
        assert axes.get_xlabel() or axes.get_label() == "<colorbar>"
    assert figure.get_facecolor()[3] == 0.0, "the background is transparent"


def test_units_are_told() -> None:
    labels = " ".join(axes.get_ylabel() + axes.get_xlabel() for axes in compare_figure(rows()).axes)
    assert "nats" in labels
    assert "evaluations" in labels


def test_figures_show_themselves_without_pyplot() -> None:
    before = "matplotlib.pyplot" in sys.modules
    figure = compare_figure(rows())
    bundle = figure._repr_mimebundle_()
    assert "<svg" in bundle["image/svg+xml"]
    assert bundle == compare_figure(rows())._repr_mimebundle_(), "the same rows give the same file"
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_the_comparison_names_its_tolerance_and_its_arms() -> None:
    figure = compare_figure(rows())
    assert figure.get_suptitle() == "power: all arms at tolerance 1e-4 in training, 1e-5 in test"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["none", "tpr:weight=5"]
    assert len(figure.axes) == 3
    assert len(compare_figure(rows(tolerances=[])).axes) == 2


def test_unequal_tolerances_are_labelled() -> None:
    mixed = [*rows(), *rows(rtol=1e-6, arm="other")]
    assert "UNEQUAL" in compare_figure(mixed).get_suptitle()


def test_the_comparison_shows_every_seed_and_the_mean() -> None:
    front = compare_figure(rows()).axes[0]
    clouds = [line for line in front.lines if len(line.get_xdata()) == 3]
    assert sorted(clouds[0].get_xdata()) == [50, 51, 52]
    means = [container.lines[0] for container in front.containers]
    assert [float(mean.get_xdata()[0]) for mean in means] == [51, 45]
    assert means[0].get_color() == COLORS[0]


def test_the_dots_of_a_trajectory_are_the_evaluations() -> None:
    flow = CNF(1, (8,), blocks=2)
    x = torch.linspace(-1, 1, 5)[:, None]
    with torch.no_grad():
        nfe = flow.eval().solve(x).stats.nfe
    axes = trajectories(flow.train(), x).axes[0]
    dots = next(line for line in axes.lines if line.get_label() == "evaluation of the field")
    assert len(dots.get_xdata()) == nfe * len(x)
    assert max(dots.get_xdata()) <= 2 * flow.T
    assert flow.training, "the flow keeps its mode"


def test_the_density_is_that_of_the_flow() -> None:
    flow = CNF(2, (8,)).eval()
    figure = density_2d(flow, extent=(-1, 2, -2, 1), resolution=7)
    image = torch.as_tensor(figure.axes[0].images[0].get_array())
    with torch.no_grad():
        corner = flow().log_prob(torch.tensor([[2.0, -2.0]])).exp().item()  # right, bottom
    assert image[0, -1].item() == pytest.approx(corner, rel=1e-3)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: training_curves([]), "no training rows"),
        (lambda: compare_figure([]), "no run is finished"),
        (lambda: trajectories(CNF(3, (8,))), "1 or 2 features"),
        (lambda: density_2d(CNF(1, (8,))), "2 features"),
        (lambda: density_2d(CNF(2, (8,), context=1)), "without context"),
    ],
)
def test_impossible_figures_are_refused(draw: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()
