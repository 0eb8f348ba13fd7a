"""Figures of diagnostics, in the house style of :mod:`pycnf.plots`.

Each draws one result of :mod:`pycnf.diagnostics`. Blue is the state z and vermilion the log-density log p wherever a
figure tells the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pycnf.crosscheck import Crosscheck, Deviation
from pycnf.diagnostics import Contributions, Difficulty, LocalErrors, PolynomialContent, WorkPoint
from pycnf.experiments.arms import write_tolerance
from pycnf.plots import COLORS, INK, MARKERS, house_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

CHANNELS = {"z": ("state z", COLORS[0]), "logp": ("log p", COLORS[1])}
TINY = 1e-300  # what logarithmic axes show in place of zero: nothing
WIDTH = 9.4  # inches of the widest figures: their text reads on a page of the book
FEW, MANY = 100.0, 1e5  # ratio of the ends of a logarithmic axis of few and of many decades


def local_error_figure(errors: LocalErrors, *, title: str | None = None) -> Figure:
    """Draw the steps of a solve: their size, their estimated and true local errors, and the ratio of the two.

    The blocks of a flow follow one another on the axis of time. Rejected steps are crosses. The ratio is left out
    where both errors are below a hundredth of the tolerance.

    Args:
        errors: Result of :func:`~pycnf.diagnostics.steps.local_errors`.
        title: Title; None tells method, tolerance and counts.
    """
    kept, lost = errors.only_accepted(), ~errors.accepted
    stats = errors.stats
    label = title or f"{_solver(errors)}: {stats.accepted} steps, {stats.rejected} rejected, {stats.nfe} evaluations"
    with house_figure(3, label, width=WIDTH, height=3.5) as (figure, (left, middle, right)):
        edges = kept.clock.tolist()
        left.step([*edges, edges[-1] + float(kept.h[-1])], [*kept.h.tolist(), float(kept.h[-1])], where="post")
        left.lines[0].set(color=COLORS[0], label="accepted step")
        left.plot(edges, kept.h, "o", color=COLORS[0], ms=4)
        if lost.any():
            left.plot(errors.clock[lost], errors.h[lost], "x", color=INK, ms=6, label="rejected step")
        left.set(xlabel=_time(errors), ylabel="step size h")
        left.set_ylim(bottom=0)
        estimate, true = errors.rms("estimate"), errors.rms("true")
        for name, (words, color) in CHANNELS.items():
            middle.semilogy(edges, _shown(kept.rms("estimate")[name]), "o--", color=color, ms=4, mfc="none", lw=0.9)
            middle.semilogy(edges, _shown(kept.rms("true")[name]), "o-", color=color, ms=4, label=words)
            if lost.any():
                middle.plot(errors.clock[lost], _shown(true[name][lost]), "x", color=color, ms=6)
            usable = errors.counts & (estimate[name] > 0)
            found = true[name][usable] / estimate[name][usable]
            right.semilogy(errors.clock[usable], _shown(found), "o-", color=color, ms=4, label=words)
        middle.axhline(1, color=INK, lw=0.9, ls=":")
        middle.plot([], [], "o-", color=INK, ms=4, label="true")
        middle.plot([], [], "o--", color=INK, ms=4, mfc="none", lw=0.9, label="estimate")
        middle.set(xlabel=_time(errors), ylabel="local error / tolerance (RMS)")
        right.axhline(1, color=INK, lw=0.9, ls=":")
        right.set(xlabel=_time(errors), ylabel="true local error / estimate", xlim=middle.get_xlim())
        _plain_ticks(right.yaxis)
        for axes in (left, middle, right):
            _mark_blocks(axes, errors)
            axes.legend()
    return figure


def difficulty_figure(errors: LocalErrors, difficulty: Difficulty, *, title: str | None = None) -> Figure:
    """Draw where a solver suffers: in time by the density of its steps, in space by the samples that set them.

    The first panel is the density of accepted steps over time. The second is the share of the squared error norm of
    the hardest samples, in order; the diagonal is a batch of equally hard ones. The third shows what each sample
    costs alone: in the plane for two dimensions, else against its distance from the origin.

    Args:
        errors: Result of :func:`~pycnf.diagnostics.steps.local_errors`.
        difficulty: Result of :func:`~pycnf.diagnostics.samples.sample_difficulty` for the same batch.
        title: Title; None tells what the samples cost together.
    """
    alone = difficulty.alone
    label = title or (
        f"{_solver(errors)}: {difficulty.together} evaluations for {len(difficulty.share)} samples together"
    )
    with house_figure(3, label, width=WIDTH, height=3.5) as (figure, (time, share, space)):
        edges, density = errors.density()
        floor = 0.5 * float(density.min())
        time.set_yscale("log")  # a first or last step may be tiny
        time.stairs(density, edges, baseline=floor, color=COLORS[0], fill=True, alpha=0.35)
        time.stairs(density, edges, baseline=floor, color=COLORS[0], lw=1.6)
        time.set(xlabel=_time(errors), ylabel="steps per unit of time, 1 / h")
        time.set_ylim(bottom=floor)
        _plain_ticks(time.yaxis)
        _mark_blocks(time, errors)
        ordered = difficulty.share.sort(descending=True).values.cumsum(0)
        fractions = torch.linspace(0, 1, len(ordered) + 1)
        share.plot(fractions, torch.cat([torch.zeros(1), ordered]), color=COLORS[0], label="this batch")
        share.plot([0, 1], [0, 1], ":", color=INK, lw=0.9, label="equally hard")
        share.set(xlabel="fraction of samples, hardest first", ylabel="share of the squared error norm")
        share.legend()
        _draw_space(figure, space, difficulty.x[: len(alone)], alone, difficulty.together)
    return figure


def work_precision_figure(points: Iterable[WorkPoint], *, title: str | None = None) -> Figure:
    """Draw the error that each method reaches against the evaluations it spends, for z and for log p.

    Filled marks and full lines are adaptive methods, hollow marks and broken lines those with equal steps.

    Args:
        points: Result of :func:`~pycnf.diagnostics.work.work_precision`.
        title: Title of the figure.

    Raises:
        ValueError: No solve came to its end.
    """
    groups = _by_method(points)
    with house_figure(2, title, width=WIDTH, height=4.4) as (figure, panels):
        for axes, (name, (words, _)) in zip(panels, CHANNELS.items(), strict=True):
            for i, (method, own) in enumerate(groups.items()):
                errors = [getattr(point, f"error_{name}") for point in own]
                axes.loglog([p.nfe for p in own], _positive(errors), label=method, **_look(i, own[0].kind))
            unit = " (nats)" if name == "logp" else ""
            axes.set(xlabel="function evaluations", ylabel=f"RMS error of {words} at the end{unit}")
            _plain_ticks(axes.xaxis)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
    return figure


def tolerance_figure(points: Iterable[WorkPoint], *, title: str | None = None) -> Figure:
    """Draw the error that each adaptive method reaches against the tolerance it was asked for.

    On the dotted line the error equals the tolerance.

    Args:
        points: Result of :func:`~pycnf.diagnostics.work.work_precision`.
        title: Title of the figure.

    Raises:
        ValueError: No solve with a tolerance came to its end.
    """
    groups = _by_method(point for point in points if point.tolerance is not None)
    with house_figure(2, title, width=WIDTH, height=4.0) as (figure, panels):
        for axes, (name, (words, _)) in zip(panels, CHANNELS.items(), strict=True):
            for i, (method, own) in enumerate(groups.items()):
                errors = [getattr(point, f"error_{name}") for point in own]
                axes.loglog([p.tolerance for p in own], _positive(errors), label=method, **_look(i, own[0].kind))
            both = [p.tolerance for own in groups.values() for p in own if p.tolerance is not None]
            axes.plot([min(both), max(both)], [min(both), max(both)], ":", color=INK, lw=0.9, label="error = tolerance")
            axes.invert_xaxis()
            unit = " (nats)" if name == "logp" else ""
            axes.set(xlabel="tolerance, rtol = atol", ylabel=f"RMS error of {words} at the end{unit}")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
    return figure


def polynomial_figure(content: PolynomialContent, *, title: str | None = None) -> Figure:
    """Draw the polynomial content of trajectories: coefficients by degree, and what is left over at each degree.

    Args:
        content: Result of :func:`~pycnf.diagnostics.polynomials.polynomial_content`.
        title: Title of the figure.
    """
    degrees = range(content.degree + 1)
    with house_figure(2, title, width=8.2, height=3.6) as (figure, panels):
        for axes, found in zip(panels, (content.coefficient_rms(), content.residual_rms()), strict=True):
            for name, (words, color) in CHANNELS.items():
                for i, values in enumerate(found[name]):
                    block = f", block {i + 1}" if len(found[name]) > 1 else ""
                    look = {"color": color, "marker": MARKERS[i % len(MARKERS)], "ms": 4}
                    axes.semilogy(degrees, _shown(values), label=words + block, **look)
            axes.set_xticks(list(degrees))
            axes.legend()
        panels[0].set(xlabel="degree k", ylabel="RMS coefficient $c_k$")
        panels[1].set(xlabel="degree p", ylabel="RMS left over at degree p")
    return figure


def contribution_figure(errors: LocalErrors, found: Contributions, *, title: str | None = None) -> Figure:
    """Draw what each accepted step contributes to the error at the end of the flow.

    Args:
        errors: Result of :func:`~pycnf.diagnostics.steps.local_errors`.
        found: Result of :func:`~pycnf.diagnostics.propagation.contributions` for it.
        title: Title; None tells method and tolerance.
    """
    kept, rms = errors.only_accepted(), found.rms()
    total = found.total.square()
    ends = {"z": float(total[:, :-1].mean().sqrt()), "logp": float(total[:, -1].mean().sqrt())}
    with house_figure(1, title or _solver(errors), width=6.8, height=3.6) as (figure, (axes,)):
        middle = kept.clock + kept.h / 2
        for name, (words, color) in CHANNELS.items():
            axes.semilogy(middle, _shown(rms[name]), "o-", color=color, ms=4, label=f"one step, {words}")
            axes.axhline(max(ends[name], TINY), color=color, lw=0.9, ls="--", label=f"the whole solve, {words}")
        axes.set(xlabel=_time(errors), ylabel="RMS contribution to the error at the end")
        _mark_blocks(axes, errors)
        figure.legend(loc="outside right upper")
    return figure


def _draw_space(figure: Figure, axes: Axes, x: Tensor, alone: Tensor, together: int) -> None:
    if x.shape[1] == 2 and len(alone):
        spots = axes.scatter(x[:, 0], x[:, 1], c=alone.numpy(), s=14, cmap="viridis")
        axes.set(xlabel="$x_1$", ylabel="$x_2$")
        axes.set_aspect("equal", adjustable="datalim")
        bar = figure.colorbar(spots, ax=axes, shrink=0.9)
        bar.set_label("evaluations of a sample alone")
        bar.outline.set_visible(False)
        return
    axes.plot(x.norm(dim=1), alone, "o", color=COLORS[0], ms=4, alpha=0.6, mec="none", label="alone")
    axes.axhline(together, color=COLORS[1], lw=1.2, label="all together")
    axes.set(xlabel="distance from the origin, |x|", ylabel="evaluations of the field")
    axes.legend()


def crosscheck_figure(found: Crosscheck, *, title: str | None = None) -> Figure:
    """Draw how far every method is from the reference against the evaluations it spends, for z and for log p.

    Full lines are adaptive methods, broken ones those with equal steps. The dotted line is the tight solve that was
    held against the bound.

    Args:
        found: Result of :func:`~pycnf.crosscheck.crosscheck`.
        title: Title; None tells the reference.
    """
    groups: dict[str, list[Deviation]] = {}
    for row in found.sweep:
        groups.setdefault(row.label, []).append(row)
    sources = {"closed-form": "the closed form", "scipy": "SciPy", "julia": "Julia"}
    label = title or f"{found.rows} rows against {sources[found.backend]}"
    with house_figure(2, label, width=WIDTH, height=4.0) as (figure, panels):
        for axes, (name, (words, _)) in zip(panels, CHANNELS.items(), strict=True):
            for i, (method, own) in enumerate(groups.items()):
                errors = [getattr(row, f"max_{name}") for row in own]
                kind = "fixed" if own[0].tolerance is None else "adaptive"
                axes.loglog([row.nfe for row in own], _positive(errors), label=method, **_look(i, kind))
            tight = f"{found.agreement.method} at {write_tolerance(1e-12, 1e-12)}"
            floor = max(getattr(found.agreement, f"max_{name}"), TINY)
            axes.axhline(floor, color=INK, lw=0.9, ls=":", label=tight)
            unit = " (nats)" if name == "logp" else ""
            axes.set(xlabel="function evaluations", ylabel=f"largest difference of {words}{unit}")
            axes.set_yscale("log")
            _plain_ticks(axes.xaxis)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
    return figure


def _plain_ticks(axis: Axis) -> None:
    """Write the numbers of a logarithmic axis without powers of ten, and more of them where it has few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < FEW * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    if high < MANY * low:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _by_method(points: Iterable[WorkPoint]) -> dict[str, list[WorkPoint]]:
    groups: dict[str, list[WorkPoint]] = {}
    for point in points:
        if point.failed is None:
            groups.setdefault(point.method, []).append(point)
    if not groups:
        raise ValueError("there is nothing to draw: no solve came to its end")
    return groups


def _look(i: int, kind: str) -> dict[str, Any]:
    adaptive = kind != "fixed"
    return {
        "color": COLORS[i % len(COLORS)],
        "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)],
        "ms": 4,
        "ls": "-" if adaptive else "--",
        "lw": 1.4 if adaptive else 0.9,
        "mfc": None if adaptive else "none",
    }


def _mark_blocks(axes: Axes, errors: LocalErrors) -> None:
    for block in range(1, int(errors.block.max()) + 1):
        axes.axvline(block * errors.T, color=INK, lw=0.7, alpha=0.6)


def _time(errors: LocalErrors) -> str:
    return "time t" if int(errors.block.max()) == 0 else "time t, one block after another"


def _solver(errors: LocalErrors) -> str:
    return f"{errors.solver.method}, tolerance {write_tolerance(errors.solver.rtol, errors.solver.atol)}"


def _shown(values: Tensor) -> list[float]:
    return _positive(values.tolist())


def _positive(values: Sequence[float]) -> list[float]:
    """Let zeros and what is no number leave a gap on a logarithmic axis."""
    return [value if value > TINY else math.nan for value in values]


__all__ = [
    *("contribution_figure", "crosscheck_figure", "difficulty_figure", "local_error_figure", "polynomial_figure"),
    *("tolerance_figure", "work_precision_figure"),
]
