"""Figures of a benchmark: fronts of likelihood against evaluations, evaluations in training, work and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pycnf.experiments.arms import write_tolerance
from pycnf.experiments.bench_results import ERROR, PLAIN, BenchResult, family, weights
from pycnf.experiments.fronts import Cost, Point, front_band, front_points, pareto
from pycnf.plots import COLORS, INK, MARKERS, house_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", ":", "-.")
GRID = 200


def front_figure(result: BenchResult, data: str, *, error: float = ERROR, title: str | None = None) -> Figure:
    """Draw likelihood against evaluations, at equal tolerance and at equal error of log p.

    A mark is an arm; arms that differ in their weights alone are joined. Bars are one standard error of the paired
    difference to the plain arm, whose NLL is the dotted line: an arm whose bar reaches down to it is not worse by more
    than one standard error. The gray curve is the plain arm at looser tolerances: what can be had without any
    regularizer. The band is the 90 % bootstrap band of the front of all arms over seeds; the best place is at the
    bottom left. Arms far worse than most lie above the frame, and are named there.

    Args:
        result: The benchmark.
        data: Name of the set.
        error: RMS error of log p of the second panel, in nats.
        title: Title; None for one that tells data and tolerance.

    Raises:
        ValueError: The plain arm has no finished run.
    """
    panels: list[tuple[Cost, str]] = [
        ("nfe_test", "function evaluations per test batch"),
        ("nfe_equal", f"function evaluations for an error of\nlog p of {write_tolerance(error, error)} nats (RMS)"),
    ]
    styles = _styles(result, data)
    with house_figure(2, title or _title(result, data), width=8.6, height=4.4) as (figure, axes):
        for panel, (cost, label) in zip(axes, panels, strict=True):
            try:
                points = front_points(result, data, cost, error)
            except ValueError:
                if cost == "nfe_test":
                    raise
                panel.text(0.5, 0.5, "not reached within the tolerances tried", transform=panel.transAxes, ha="center")
                points = []
            if points:
                _draw_band(panel, result, data, points, cost, error)
                _draw_points(panel, points, styles)
                _frame(panel, points)
            if cost == "nfe_test":
                _draw_tolerance(panel, result, data)
            panel.set(xlabel=label, ylabel="held-out negative log-likelihood (nats)")
        _legend(figure, axes[0])
    return figure


def course_figure(
    result: BenchResult, data: str, *, arms: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Draw the evaluations of a training step in the course of training, forward and, where there are any, backward.

    Lines are means over seeds, bands one standard error.

    Args:
        result: The benchmark.
        data: Name of the set.
        arms: Arms to draw; None for all.
        title: Title; None for one that tells data and tolerance.

    Raises:
        ValueError: No run is finished.
    """
    finished = _finished(result, data, arms)
    names = ["nfe"]
    if any(any(row["curve"]["nfe_backward"]) for rows in finished.values() for row in rows):
        names.append("nfe_backward")
    styles = _styles(result, data)
    width = 1.6 + 4.1 * len(names)
    height = 3.4 + 0.2 * len(finished) / _columns(width, finished)
    with house_figure(len(names), title or _title(result, data), width=width, height=height) as (figure, axes):
        for panel, name in zip(axes, names, strict=True):
            for arm, rows in finished.items():
                longest = max((row["curve"]["step"] for row in rows), key=len)
                values = [row["curve"][name] for row in rows if row["curve"]["step"] == longest]
                _draw_mean(panel, longest, values, **styles(arm), label=arm)
            kind = "backward" if name == "nfe_backward" else "forward"
            panel.set(xlabel="training step", ylabel=f"{kind} evaluations per training step")
        _legend(figure, axes[0])
    return figure


def precision_figure(
    result: BenchResult,
    data: str,
    *,
    arms: Sequence[str] | None = None,
    error: float = ERROR,
    title: str | None = None,
) -> Figure:
    """Draw evaluations and the error of log p that is really reached, at all test tolerances.

    Lines are means over seeds (of logarithms), bands one standard error; the dotted line is the error at which
    :func:`front_figure` compares.

    Args:
        result: The benchmark.
        data: Name of the set.
        arms: Arms to draw; None for all.
        error: RMS error of log p, in nats.
        title: Title; None for the name of the set.

    Raises:
        ValueError: No run is finished.
    """
    import numpy as np

    finished = _finished(result, data, arms)
    styles = _styles(result, data)
    height = 3.4 + 0.2 * len(finished) / _columns(8.6, finished)
    with house_figure(2, title or data, width=8.6, height=height) as (figure, (left, right)):
        for arm, rows in finished.items():
            runs = [[test for test in row["tolerances"] if test["error_rms"] is not None] for row in rows]
            common = sorted(set.intersection(*({test["rtol"] for test in run} for run in runs)), reverse=True)
            nfe, rms = (
                np.array([[test[name] for test in run if test["rtol"] in common] for run in runs])
                for name in ("nfe", "error_rms")
            )
            if not common:
                continue
            look = styles(arm)
            _draw_mean(left, common, nfe, **look, label=arm, scale=np.log)
            right.plot(np.exp(np.log(nfe).mean(0)), np.exp(np.log(rms).mean(0)), **look, ms=4)
        right.axhline(error, color=INK, ls=":", lw=1.0)
        left.set(xlabel="test tolerance, rtol = atol", xscale="log", yscale="log")
        left.set_ylabel("function evaluations per test batch")
        left.invert_xaxis()
        right.set(xlabel="function evaluations per test batch", xscale="log", yscale="log")
        right.set_ylabel("error of log p reached (nats, RMS)")
        for axis in (left.yaxis, right.xaxis):
            _plain_numbers(axis)
        _legend(figure, left)
    return figure


def _draw_points(axes: Axes, points: Sequence[Point], styles: Callable[[str], dict[str, Any]]) -> None:
    plain = points[0]
    axes.axhline(plain.nll, color=INK, ls=":", lw=1.0)
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.family, []).append(point)
    for name, group in groups.items():
        group.sort(key=lambda point: point.weights)
        look = styles(group[0].arm) | {"ls": "-"}
        if len(group) > 1:
            axes.plot([p.nfe for p in group], [p.nll for p in group], color=look["color"], lw=0.9, alpha=0.6)
        for i, point in enumerate(group):
            bars: dict[str, Any] = {} if point is plain else {"xerr": point.nfe_se, "yerr": point.nll_se}
            bars |= {"fmt": look["marker"], "color": look["color"], "ms": 6, "capsize": 2, "lw": 1}
            axes.errorbar(point.nfe, point.nll, **bars, label=None if i else name)
            if point.weights:
                text = "+".join(f"{weight:g}" for weight in point.weights)
                axes.annotate(text, (point.nfe, point.nll), xytext=(4, 4), textcoords="offset points", fontsize=7)


def _frame(axes: Axes, points: Sequence[Point]) -> None:
    """Limit the axis of the likelihood to where most arms are, and name those that lie above."""
    import numpy as np

    plain = points[0].nll
    if len(points) < 3:
        return
    top = plain + 3 * float(np.quantile([abs(point.nll - plain) for point in points[1:]], 0.75))
    above = [point for point in points if point.nll > top]
    if not above:
        return
    low = min(point.nll - (point.nll_se or 0.0) for point in points)
    axes.set_ylim(low - 0.1 * (top - low), top)
    names = "\n".join(f"{point.arm}: {point.nll:.3g} nats at {point.nfe:.3g}" for point in above)
    axes.text(0.98, 0.98, f"above the frame\n{names}", transform=axes.transAxes, ha="right", va="top", fontsize=7)


def _draw_band(axes: Axes, result: BenchResult, data: str, points: Sequence[Point], cost: Cost, error: float) -> None:
    """Draw the front as a staircase, and its band."""
    import numpy as np

    best = pareto(points)
    low, high = min(p.nfe for p in points), max(p.nfe for p in points)
    end = high + 0.05 * (high - low)
    axes.plot(
        [*(p.nfe for p in best), end], [*(p.nll for p in best), best[-1].nll], drawstyle="steps-post", color=INK, lw=0.8
    )
    if high > low:
        grid = np.linspace(low, end, GRID)
        band = front_band(result, data, grid, cost, error)
        if band is not None:
            axes.fill_between(grid, *band, step="post", color=INK, alpha=0.12, lw=0, label="front, 90 % band")


def _draw_tolerance(axes: Axes, result: BenchResult, data: str) -> None:
    """Draw the plain arm at looser tolerances, beginning at its own mark."""
    lines = result.summary(data)
    x, y = [lines[0]["nfe_test"]["mean"]], [lines[0]["nll"]["mean"]]
    for line in lines:
        if line.get("tolerance_alone") and line["nfe_test"]["ratio"] is not None:
            x.append(x[0] * line["nfe_test"]["ratio"])
            y.append(y[0] + line["nll"]["difference"])
            name = write_tolerance(line["tolerance_alone"], line["tolerance_alone"])
            axes.annotate(name, (x[-1], y[-1]), xytext=(0, -10), textcoords="offset points", fontsize=7, color=INK)
    if len(x) > 1:
        axes.plot(x, y, "x--", color=INK, ms=5, lw=1.0, label=f"{PLAIN}, looser tolerance alone")


def _draw_mean(
    axes: Axes, x: Sequence[float], values: Any, *, label: str, scale: Callable[[Any], Any] | None = None, **look: Any
) -> None:
    """Draw the mean of several curves and a band of one standard error, on a scale where one is given."""
    import numpy as np
    from scipy import stats

    array = np.asarray(values, dtype=float)
    array = array if scale is None else scale(array)
    back = (lambda y: y) if scale is None else np.exp
    mean = array.mean(axis=0)
    marker = look.pop("marker") if scale is not None else look.pop("marker") and None
    axes.plot(x, back(mean), **look, marker=marker, ms=4, label=label)
    if len(array) > 1:
        se = stats.sem(array, axis=0)
        axes.fill_between(x, back(mean - se), back(mean + se), color=look["color"], alpha=0.15, lw=0)


def _styles(result: BenchResult, data: str) -> Callable[[str], dict[str, Any]]:
    """Give each family of arms a color and a marker, each weight in it a line style."""
    arms = result.arms(data)
    families = list(dict.fromkeys(family(arm) for arm in arms))
    members = {name: sorted({weights(arm) for arm in arms if family(arm) == name}) for name in families}

    def style(arm: str) -> dict[str, Any]:
        name = family(arm)
        i, j = families.index(name), members[name].index(weights(arm))
        marker = MARKERS[(i + i // len(COLORS)) % len(MARKERS)]
        return {"color": COLORS[i % len(COLORS)], "marker": marker, "ls": LINES[j % len(LINES)]}

    return style


def _finished(result: BenchResult, data: str, arms: Sequence[str] | None) -> Mapping[str, list[dict[str, Any]]]:
    comparison = result.comparison(data)
    for arm in arms or ():
        if arm not in comparison.arms:
            raise ValueError(f"there is no arm {arm!r}: choose among {', '.join(comparison.arms)}")
    found = {arm: comparison.finished(arm) for arm in arms or comparison.arms}
    found = {arm: rows for arm, rows in found.items() if rows}
    if not found:
        raise ValueError(f"there is nothing to draw: no run of {data!r} is finished")
    return found


def _title(result: BenchResult, data: str) -> str:
    setup = result.comparison(data).setup
    train = write_tolerance(setup["rtol"], setup["atol"])
    test = write_tolerance(setup["test_rtol"], setup["test_atol"])
    return f"{data}: all arms at tolerance {train} in training, {test} in test"


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_columns(figure.get_figwidth(), labels))


def _columns(width: float, labels: Iterable[str]) -> int:
    """Return how many columns of a legend fit into a width in inches."""
    names = list(labels)
    return max(1, min(3, len(names), int(width / (0.6 + 0.075 * max(map(len, names))))))


def _plain_numbers(axis: Any) -> None:
    """Write 20, 50, 100 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


__all__ = ["course_figure", "front_figure", "precision_figure"]
