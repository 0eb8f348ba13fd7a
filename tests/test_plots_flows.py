"""Pictures of flows: what they show is what the flows and the solver did."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import pycnf
from pycnf.plots_animation import forming_animation
from pycnf.plots_flows import (
    densities_figure,
    forming_figure,
    log_density_at,
    paths_figure,
    solve_paths,
    streams_figure,
)

WINDOW = (-3.0, 3.0, -2.0, 2.0)


@pytest.fixture
def plane() -> pycnf.CNF:
    torch.manual_seed(0)
    return pycnf.CNF(2, hidden=(8, 8), blocks=2, T=0.5).double()


@pytest.fixture
def line() -> pycnf.CNF:
    torch.manual_seed(0)
    return pycnf.CNF(1, hidden=(8,))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_density_over_time_begins_at_the_data_and_ends_at_the_base(plane: pycnf.CNF, x: torch.Tensor) -> None:
    with torch.no_grad():
        own = plane.eval()().log_prob(x)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(log_density_at(plane, 0.0, x), own)
    torch.testing.assert_close(log_density_at(plane, 1.0, x), base)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_density_is_carried_along_trajectories(plane: pycnf.CNF, x: torch.Tensor, t: float) -> None:
    """log p_t(z(t)) = log p(x) + (change of log p up to t), in either block."""
    block, rest = (0, t) if t < 0.5 else (1, t - 0.5)
    with torch.no_grad():
        solved = plane.eval().solve(x, times=[0.1, 0.2, 0.3])
        part = solved.blocks[block]
        at = int((part.ts - rest).abs().argmin())
        before = solved.blocks[0].logp[-1] if block else 0.0
        expected = solved.log_prob + before + part.logp[at]
    torch.testing.assert_close(log_density_at(plane, t, part.z[at]), expected, atol=2e-4, rtol=0)


def test_the_density_integrates_to_one_halfway(plane: pycnf.CNF) -> None:
    side = torch.linspace(-7, 7, 90, dtype=torch.float64)
    density = log_density_at(plane, 0.7, torch.cartesian_prod(side, side)).exp()
    assert abs(density.sum() * (side[1] - side[0]) ** 2 - 1) < 1e-3


def test_times_outside_are_refused(plane: pycnf.CNF, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        log_density_at(plane, 1.2, x)


def test_paths_hold_the_steps_of_the_solve(plane: pycnf.CNF, x: torch.Tensor) -> None:
    paths = solve_paths(plane, x, points=9)
    assert paths.stats.nfe == plane.eval().solve(x).stats.nfe
    assert paths.accepted.sum() == paths.stats.accepted
    assert (~paths.accepted).sum() == paths.stats.rejected
    assert paths.ts.shape == (22,)
    assert paths.z.shape == (22, 40, 2)
    torch.testing.assert_close(paths.ends[paths.accepted][-1], paths.z[-1])
    assert paths.t[-1] == pytest.approx(1.0)


def test_figures_tell_the_evaluations_and_mark_every_step(plane: pycnf.CNF, x: torch.Tensor) -> None:
    paths = solve_paths(plane, x)
    flows = {"one": plane, "two": plane}
    for figure in (paths_figure(flows, x, shown=7), densities_figure(flows, x, extent=WINDOW, resolution=12)):
        upper, lower = figure.axes[:2], figure.axes[2:]
        assert [axes.get_title() for axes in lower] == [f"{paths.stats.nfe} evaluations"] * 2
        assert all(axes.get_title().startswith(name) for axes, name in zip(upper, flows, strict=True))
        marks = [line for line in lower[0].lines if line.get_marker() == "o"]
        assert sum(len(line.get_xdata()) for line in marks) == paths.stats.accepted


def test_streams_have_a_panel_a_flow(line: pycnf.CNF) -> None:
    figure = streams_figure({"one": line, "two": line}, lines=5, times=6, resolution=20)
    assert [axes.get_title() for axes in figure.axes[1:]] == [figure.axes[1].get_title()]
    streams = [drawn for drawn in figure.axes[0].lines if drawn.get_color() == "white"]
    assert len(streams) == 5
    ends = sorted(float(drawn.get_ydata()[-1]) for drawn in streams)
    quantiles = torch.special.ndtri((torch.arange(5) + 0.5) / 5)
    torch.testing.assert_close(torch.tensor(ends), quantiles, atol=1e-3, rtol=0)


def test_a_forming_density_has_a_row_a_flow(plane: pycnf.CNF) -> None:
    figure = forming_figure({"one": plane, "two": plane}, times=(1.0, 0.5, 0.0), extent=WINDOW, resolution=8)
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes] == ["t = 1", "t = 0.5", "t = 0", "", "", ""]
    with pytest.raises(ValueError, match="one time"):
        forming_figure({"one": plane}, times=())


def test_the_animation_is_one_piece_that_waits_to_be_played(plane: pycnf.CNF, tmp_path: Path) -> None:
    shown = forming_animation(
        {"<one>": plane, "two": plane}, extent=WINDOW, frames=4, samples=6, resolution=10, pixels=48
    )
    assert len(set(shown.frames)) == 4
    assert shown.labels == ("t = 1.00", "t = 0.67", "t = 0.33", "t = 0.00")
    assert Image.open(io.BytesIO(shown.frames[0])).size == (98, 32)
    text = shown.save(tmp_path / "sub" / "page.html").read_text(encoding="utf-8")
    assert shown._repr_html_() in text
    assert "&lt;one&gt;" in text
    assert "$" not in text
    assert not re.search(r"https?:|<link|@import|autoplay", text), "nothing is fetched, nothing starts by itself"
    assert "prefers-reduced-motion" in text
    assert 'type="range"' in text
    last = Image.open(io.BytesIO(shown._repr_png_()))
    assert (last.format, last.size) == ("PNG", (98, 32)), "on paper, the density that has formed"
    assert len(repr(shown)) < 400


def test_what_cannot_be_drawn_is_refused(plane: pycnf.CNF, line: pycnf.CNF, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected flows of 1 feature\(s\), got 2 in 'it'"):
        streams_figure({"it": plane})
    with pytest.raises(ValueError, match=r"expected flows of 2 feature\(s\), got 1"):
        densities_figure({"it": line}, x)
    with pytest.raises(ValueError, match="one flow or more"):
        paths_figure({}, x)
    with pytest.raises(ValueError, match="without context"):
        solve_paths(pycnf.CNF(2, hidden=(8,), context=1), x)
