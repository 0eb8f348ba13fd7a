"""Fronts of likelihood against evaluations: the points of the arms, the front they make, and how certain it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pycnf.experiments.bench_results import ERROR, PLAIN, BenchResult, family, weights
from pycnf.experiments.results import RESAMPLES, contrast, pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

Cost = Literal["nfe_test", "nfe_equal"]
"""Evaluations of a test batch at equal tolerance, or at equal error of log p."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Hold one arm on a front.

    The bars come from differences to the plain arm with the same seed, because the likelihood varies more from seed
    to seed than from arm to arm.

    Attributes:
        arm: Name of the arm.
        family: The arm without its weights.
        weights: Its weights.
        nfe: Evaluations of a test batch: those of the plain arm plus the mean paired difference.
        nll: Held-out NLL in nats, likewise.
        nfe_se: Standard error of the difference in evaluations, None with one seed; of the mean, for the plain arm.
        nll_se: Standard error of the difference in NLL, likewise.
        n: Number of seeds.
    """

    arm: str
    family: str
    weights: tuple[float, ...]
    nfe: float
    nll: float
    nfe_se: float | None
    nll_se: float | None
    n: int


def front_points(result: BenchResult, data: str, cost: Cost = "nfe_test", error: float = ERROR) -> list[Point]:
    """Return a point an arm, the plain one first; arms without a seed in common with it are left out.

    Args:
        result: The benchmark.
        data: Name of the set.
        cost: Evaluations at equal tolerance or at equal error.
        error: The RMS error of log p, in nats.

    Raises:
        ValueError: The plain arm has no run with these evaluations.
    """
    comparison = result.comparison(data, error)
    (base, *lines) = comparison.summary(("nll", cost))
    if base["nll"]["mean"] is None or base[cost]["mean"] is None:
        raise ValueError(f"the plain arm of {data!r} has no evaluations to compare with: no run, or none at that error")
    points = [_point(PLAIN, base[cost]["mean"], base["nll"]["mean"], base[cost]["se"], base["nll"]["se"], base["n"])]
    first = comparison.finished(PLAIN)
    for line in lines:
        rows = [row for row in comparison.finished(line["arm"]) if row[cost] is not None]
        nfe, nll = (contrast(*pairs(rows, first, metric)) for metric in (cost, "nll"))
        if nfe["difference"] is not None and nll["difference"] is not None:
            points.append(
                _point(
                    line["arm"],
                    base[cost]["mean"] + nfe["difference"],
                    base["nll"]["mean"] + nll["difference"],
                    nfe["difference_se"],
                    nll["difference_se"],
                    len(pairs(rows, first, cost)[0]),
                )
            )
    return points


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other undercuts in both evaluations and NLL, fewest evaluations first.

    >>> a, b, c = (_point(str(x), x, y, None, None, 1) for x, y in ((1.0, 3.0), (2.0, 2.0), (3.0, 2.5)))
    >>> pareto([c, a, b]) == [a, b]
    True
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.nfe, p.nll)):
        if not best or point.nll < best[-1].nll:
            best.append(point)
    return best


def front_band(
    result: BenchResult, data: str, grid: NDArray[Any], cost: Cost = "nfe_test", error: float = ERROR
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return the 90 % bootstrap band of the front: the lowest NLL that some arm reaches with so many evaluations.

    The seeds that all arms have finished are drawn with replacement, and with each draw the front is made anew from
    the differences to the plain arm. Where a draw has no arm with so few evaluations, its worst arm stands in.

    Args:
        result: The benchmark.
        data: Name of the set.
        grid: Numbers of evaluations, increasing, shape (G,).
        cost: Evaluations at equal tolerance or at equal error.
        error: The RMS error of log p, in nats.

    Returns:
        Lower and upper end in nats, shape (G,) each; None with fewer than two seeds in common.
    """
    import numpy as np
    from scipy import stats

    comparison = result.comparison(data, error)
    runs = [
        {row["seed"]: (row[cost], row["nll"]) for row in comparison.finished(arm) if row[cost] is not None}
        for arm in comparison.arms
    ]
    seeds = sorted(set.intersection(*(set(run) for run in runs if run))) if runs[0] else []
    if len(seeds) < 2:
        return None
    runs = [run for run in runs if run]
    values = np.array([[run[seed] for seed in seeds] for run in runs], dtype=float)  # (arms, seeds, 2), plain first
    values = values - values[0] + values[0].mean(axis=0)

    def front(drawn: NDArray[Any], axis: int) -> NDArray[Any]:
        means = values[:, drawn].mean(axis=axis - 1)  # the last axis tells evaluations from NLL
        nfe, nll = means[..., 0], means[..., 1]
        shape = (-1, *(1,) * nfe.ndim)
        reached = np.where(nfe <= grid.reshape(shape), nll, nll.max(axis=0))
        return reached.min(axis=1)

    found = stats.bootstrap(
        (np.arange(len(seeds)),),
        front,
        vectorized=True,
        confidence_level=0.9,
        method="percentile",
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return found.low, found.high


def _point(arm: str, nfe: float, nll: float, nfe_se: float | None, nll_se: float | None, n: int) -> Point:
    return Point(arm=arm, family=family(arm), weights=weights(arm), nfe=nfe, nll=nll, nfe_se=nfe_se, nll_se=nll_se, n=n)


__all__ = ["Cost", "Point", "front_band", "front_points", "pareto"]
