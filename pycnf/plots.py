"""Figures in one house style: trajectories, densities, training curves and comparisons.

Every function returns a ``matplotlib.figure.Figure`` that is not registered with pyplot: nothing opens a
window, and nothing has to be closed. In a notebook the figure shows itself as SVG. The background is
transparent and the text mid-gray, so that a figure reads on light and on dark pages; the colors are those of
Okabe and Ito, told apart by color-blind readers.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycnf.divergence import BoundField, Divergence
from pycnf.experiments.arms import write_tolerance
from pycnf.flow import CNF

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Blue, vermilion, green, purple, orange and sky blue of Okabe and Ito."""
INK = "#7a7a7a"
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: dict[str, Any] = {
    "figure.facecolor": "none",
    "figure.dpi": 144,
    "savefig.facecolor": "none",
    "savefig.dpi": 200,
    "svg.hashsalt": "pycnf",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "font.size": 10,
    "lines.linewidth": 1.6,
}
CHUNK = 10_000  # rows of one solve


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a file, in the format that its suffix names (.svg, .png, .pdf).

    Args:
        figure: A figure of this module.
        path: File to write; its folder is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _style():
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def training_curves(history: Sequence[Mapping[str, Any]], *, title: str | None = None) -> Figure:
    """Draw the course of a training run: negative log-likelihood and function evaluations over steps.

    Args:
        history: ``FitResult.history``.
        title: Title of the figure.

    Raises:
        ValueError: There are no training rows.
    """
    train = [row for row in history if row["split"] == "train"]
    held_out = [row for row in history if row["split"] == "validation"]
    if not train:
        raise ValueError("the history has no training rows")
    steps = [row["step"] for row in train]
    with house_figure(2, title) as (figure, (left, right)):
        _noisy(left, steps, [row["nll"] for row in train], COLORS[0], "training batches")
        if held_out:
            values = [row["nll"] for row in held_out]
            left.plot([r["step"] for r in held_out], values, "o-", color=COLORS[1], ms=4, label="held out")
        left.set(xlabel="training step", ylabel="negative log-likelihood (nats)")
        _noisy(right, steps, [row["nfe"] for row in train], COLORS[0], "forward")
        if any(row["nfe_backward"] for row in train):
            _noisy(right, steps, [row["nfe_backward"] for row in train], COLORS[2], "backward")
        if held_out:
            values = [row["nfe"] for row in held_out]
            right.plot([r["step"] for r in held_out], values, "o-", color=COLORS[1], ms=4, label="held out")
        right.set(xlabel="training step", ylabel="function evaluations per batch")
        for axes in (left, right):
            axes.legend()
    return figure


def compare_figure(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> Figure:
    """Draw a comparison: likelihood against cost, cost in the course of training, effect of the tolerance.

    The first panel has a mark for every seed and, for every arm, the mean with bars of one standard
    deviation; the best place is at the bottom left. The second shows every seed's evaluations per training
    step and their mean. The third, where the rows tell, shows the evaluations of the same flows at other test
    tolerances.

    Args:
        rows: Rows of a :class:`~pycnf.experiments.results.ComparisonResult`; failed ones are left out.
        title: Title; None for one that tells data and tolerance.

    Raises:
        ValueError: No row is finished.
    """
    finished = [row for row in rows if row["status"] == "finished"]
    if not finished:
        raise ValueError("there is nothing to draw: no run is finished")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    swept = any(row["tolerances"] for row in finished)
    count = 3 if swept else 2
    with house_figure(count, title or _compare_title(finished), width=3.1 * count) as (figure, panels):
        for i, arm in enumerate(arms):
            own = [row for row in finished if row["arm"] == arm]
            if own:
                look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "label": arm}
                _draw_front(panels[0], own, **look)
                _draw_course(panels[1], own, look["color"])
                if swept:
                    apart = 1.08 ** (i - (len(arms) - 1) / 2)  # arms often need the same number
                    _draw_tolerances(panels[2], own, look["color"], look["marker"], apart)
        panels[0].set(xlabel="function evaluations per test batch", ylabel="held-out negative log-likelihood (nats)")
        panels[1].set(xlabel="training step", ylabel="function evaluations per training step")
        if swept:
            panels[2].set(xlabel="test tolerance, rtol = atol", ylabel="function evaluations per test batch")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    return figure


def trajectories(
    flow: CNF,
    x: Tensor | None = None,
    *,
    n: int = 20,
    seed: int = 0,
    evaluations: bool = True,
    title: str | None = None,
) -> Figure:
    """Draw trajectories of a flow in one or two dimensions, and where its solver evaluated the field.

    A one-dimensional flow is drawn over time, a two-dimensional one in the plane, from data to base density.
    The solve is that of evaluation mode. Its steps are shown by the states at which it evaluated the field:
    the dots on one trajectory are as many as the solve's NFE.

    Args:
        flow: A flow without context.
        x: Where the trajectories begin, data of shape (N, D); None draws ``n`` samples of the flow.
        n: Number of trajectories where ``x`` is None.
        seed: Seed of these samples.
        evaluations: Whether to draw the evaluations.
        title: Title; None tells method, tolerance and NFE.

    Raises:
        ValueError: The flow has more than two dimensions, or a context.
    """
    if flow.features > 2 or flow.context:
        raise ValueError(f"expected a flow of 1 or 2 features without context, got {flow.features}")
    solver = flow.eval_solver
    spy = _Spy(flow.eval_divergence)
    with torch.no_grad(), _evaluating(flow):
        if x is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                x = flow().sample((n,))
        curves = flow.solve(x, times=torch.linspace(0, flow.T, 102)[1:-1].tolist())
        stats = flow.solve(x, divergence=spy).stats
    plane = flow.features == 2
    label = title or f"{solver.method}, tolerance {write_tolerance(solver.rtol, solver.atol)}: {stats.nfe} evaluations"
    with house_figure(1, label, width=5.0, height=4.6 if plane else 3.4) as (figure, (axes,)):
        for i, block in enumerate(curves.blocks):
            t, z = block.ts.cpu() + i * flow.T, block.z.cpu()
            axes.plot(*((z[..., 0], z[..., 1]) if plane else (t, z[..., 0])), color=COLORS[0], lw=0.9, alpha=0.8)
        if evaluations:
            t, z = spy.times(flow.T), torch.stack(spy.z)
            spots = (z[..., 0], z[..., 1]) if plane else (t[:, None].expand(z.shape[:2]), z[..., 0])
            axes.plot(*(s.flatten() for s in spots), ".", color=COLORS[1], ms=2.5, label="evaluation of the field")
        ends = [
            (curves.blocks[0].z[0], 0.0, "data", COLORS[2]),
            (curves.z, flow.T * flow.blocks, "base", INK),
        ]
        for z, time, name, color in ends:
            z = z.cpu()
            spots = (z[:, 0], z[:, 1]) if plane else (torch.full((len(z),), time), z[:, 0])
            axes.plot(*spots, "o", color=color, ms=4, label=name, zorder=3)
        if plane:
            axes.set(xlabel="$z_1$", ylabel="$z_2$")
            axes.set_aspect("equal", adjustable="datalim")
        else:
            axes.set(xlabel="time t", ylabel="state z")
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def density_2d(
    flow: CNF,
    *,
    extent: tuple[float, float, float, float] | None = None,
    resolution: int = 150,
    data: Tensor | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the density of a two-dimensional flow.

    Args:
        flow: A flow of two features without context.
        extent: Window (left, right, bottom, top); None for one that holds the data or, without data, [-4,
        4]².
        resolution: Points along each side.
        data: Points (N, 2) to draw on top, at most 2,000 of them.
        title: Title of the figure.

    Raises:
        ValueError: The flow has not two dimensions, or a context.
    """
    if flow.features != 2 or flow.context:
        raise ValueError(f"expected a flow of 2 features without context, got {flow.features}")
    if extent is None:
        low, high = (torch.full((2,), -4.0), torch.full((2,), 4.0))
        if data is not None:
            low, high = data.min(0).values.cpu(), data.max(0).values.cpu()
            low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
        extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    like = next(flow.parameters())
    sides = [torch.linspace(a, b, resolution, dtype=like.dtype) for a, b in (extent[:2], extent[2:])]
    grid = torch.cartesian_prod(*sides).to(like.device)
    with torch.no_grad(), _evaluating(flow):
        log_prob = torch.cat([flow().log_prob(part) for part in grid.split(CHUNK)])
    density = log_prob.exp().reshape(resolution, resolution).T.cpu().numpy()
    sides_ratio = (extent[3] - extent[2]) / (extent[1] - extent[0])
    height = min(max(3.7 * sides_ratio + 0.6, 2.2), 7.0)  # of the axes: the color bar is as tall as they are
    with house_figure(1, title, width=5.0, height=height) as (figure, (axes,)):
        axes.grid(False)
        image = axes.imshow(density, extent=extent, origin="lower", aspect="equal", cmap="viridis")
        if data is not None:
            shown = data[:2000].cpu()
            axes.plot(shown[:, 0], shown[:, 1], ".", color=COLORS[1], ms=1.0, alpha=0.5, rasterized=True)
            axes.set(xlim=extent[:2], ylim=extent[2:])
        axes.set(xlabel="$x_1$", ylabel="$x_2$")
        bar = figure.colorbar(image, ax=axes)
        bar.set_label("density p(x)")
        bar.outline.set_visible(False)
    return figure


def _draw_front(axes: Axes, rows: Sequence[Mapping[str, Any]], *, color: str, marker: str, label: str) -> None:
    import numpy as np

    x, y = ([float(row[name]) for row in rows] for name in ("nfe_test", "nll"))
    axes.plot(x, y, marker, color=color, ms=4, alpha=0.45, mec="none")
    spread: dict[str, Any] = {"xerr": np.std(x, ddof=1), "yerr": np.std(y, ddof=1)} if len(rows) > 1 else {}
    axes.errorbar(np.mean(x), np.mean(y), **spread, fmt=marker, color=color, ms=8, capsize=3, lw=1.2, label=label)


def _draw_course(axes: Axes, rows: Sequence[Mapping[str, Any]], color: str) -> None:
    import numpy as np

    curves = [row["curve"] for row in rows]
    for curve in curves:
        axes.plot(curve["step"], curve["nfe"], color=color, lw=0.7, alpha=0.35)
    longest = max(curves, key=lambda curve: len(curve["step"]))["step"]
    same = [curve["nfe"] for curve in curves if curve["step"] == longest]
    axes.plot(longest, np.mean(same, axis=0), color=color, lw=2.0)


def _draw_tolerances(axes: Axes, rows: Sequence[Mapping[str, Any]], color: str, marker: str, apart: float) -> None:
    import numpy as np

    found: dict[float, list[float]] = {}
    for row in rows:
        for test in row["tolerances"]:
            if test["nfe"] is not None:
                found.setdefault(test["rtol"], []).append(test["nfe"])
    x = sorted(found)
    spread = [float(np.std(found[t], ddof=1)) if len(found[t]) > 1 else 0.0 for t in x]
    shifted = [t * apart for t in x]
    axes.errorbar(shifted, [np.mean(found[t]) for t in x], spread, fmt=f"{marker}-", color=color, ms=5, capsize=3)
    axes.set_xscale("log")
    if not axes.xaxis_inverted():
        axes.invert_xaxis()


def _compare_title(rows: Sequence[Mapping[str, Any]]) -> str:
    tolerances = {(row["rtol"], row["atol"], row["test_rtol"], row["test_atol"]) for row in rows}
    if len(tolerances) > 1:
        return f"{rows[0]['data']}: UNEQUAL tolerances, not a fair comparison"
    rtol, atol, test_rtol, test_atol = next(iter(tolerances))
    train, test = write_tolerance(rtol, atol), write_tolerance(test_rtol, test_atol)
    return f"{rows[0]['data']}: all arms at tolerance {train} in training, {test} in test"


def _noisy(axes: Axes, x: Sequence[float], y: Sequence[float], color: str, label: str) -> None:
    """Draw a noisy curve faintly, and its running mean over a fiftieth of its length on top."""
    import numpy as np

    axes.plot(x, y, color=color, lw=0.6, alpha=0.3)
    width = max(1, len(y) // 50)
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(y, dtype=float)]))
    axes.plot(x[width - 1 :], (sums[width:] - sums[:-width]) / width, color=color, label=label)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    style: Any = STYLE  # matplotlib's annotation names every key there is
    with mpl.rc_context(style):
        yield


@contextmanager
def house_figure(
    panels: int, title: str | None, *, width: float | None = None, height: float = 3.8
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Open a figure with panels side by side in the house style."""
    with _style():
        figure = _figure_type()(figsize=(width or 4.1 * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)
        if title:
            figure.suptitle(title, color=INK, fontsize="large")
        yield figure, list(axes[0])


@functools.cache
def _figure_type() -> type[Figure]:
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """Show itself in a notebook without pyplot."""

        def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
            buffer = io.StringIO()
            with _style():
                self.savefig(buffer, format="svg", metadata={"Date": None})
            return {"image/svg+xml": buffer.getvalue()}

    return NotebookFigure


class _Spy:
    """Stand in for a divergence and note the times and states at which it is evaluated."""

    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence
        self.t: list[tuple[int, float]] = []
        self.z: list[Tensor] = []
        self.block = -1

    def bind(self, field: nn.Module, z: Tensor, context: Tensor | None) -> BoundField:
        """Bind to the field of the next block."""
        self.block += 1
        return _SpyingField(self, self.divergence.bind(field, z, context))

    def times(self, T: float) -> Tensor:
        """Return the times of the evaluations, counted on through the blocks, shape (NFE,)."""
        return torch.tensor([block * T + t for block, t in self.t])


class _SpyingField:
    def __init__(self, spy: _Spy, bound: BoundField) -> None:
        self.spy, self.bound, self.tensors = spy, bound, bound.tensors

    def __call__(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        self.spy.t.append((self.spy.block, float(t)))
        self.spy.z.append(z.detach().cpu())
        return self.bound(t, z)


@contextmanager
def _evaluating(flow: CNF) -> Iterator[None]:
    """Put a flow into evaluation mode for a while."""
    before = flow.training
    flow.eval()
    try:
        yield
    finally:
        flow.train(before)


__all__ = [
    *("COLORS", "INK", "MARKERS", "STYLE", "compare_figure", "density_2d", "house_figure", "save_figure"),
    *("training_curves", "trajectories"),
]
