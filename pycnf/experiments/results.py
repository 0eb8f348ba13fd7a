"""What a comparison came to: its rows, their statistics over seeds, and its record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycnf.records import read_json, run_record, to_plain, write_json

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]

METRICS = (
    *("nll", "nfe_train", "nfe_train_last", "nfe_backward", "nfe_test"),
    *("accepted", "rejected", "seconds"),
)
"""The numbers of a row that are summarized over seeds."""
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class ComparisonResult:
    """Hold the rows of a comparison, one for each arm and seed that was run.

    A row has the keys data, regularizer, arm, seed, status ("finished" or "failed", then with "error"), rtol
    and atol (training), test_rtol and test_atol, method, gradient, divergence, nll and nll_se (held-out, in
    nats), nfe_train, nfe_train_last (last tenth of the steps), nfe_backward, nfe_test (evaluations of one
    batch), accepted and rejected (steps of one test batch), seconds (of the training steps), steps,
    tolerances (the test repeated at other tolerances), curve (the course of training), device, versions,
    command, date and more.

    Attributes:
        rows: The rows.
        data: Name of the data set.
        arms: Labels of the arms; the others are compared with the first.
        seeds: The seeds.
        setup: What the arms have in common, as plain values.
        equal_tolerance: Whether all arms are trained and tested at the same tolerance.
        status: "finished" or "interrupted".
        command: Command that made it, None for that of this process.
        folder: Folder with its files, or None.
    """

    rows: list[Row]
    data: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    setup: Row = field(default_factory=dict)
    equal_tolerance: bool = True
    status: str = "finished"
    command: str | None = None
    folder: Path | None = None

    def finished(self, arm: str) -> list[Row]:
        """Return the rows of an arm that were finished, in the order of the seeds."""
        found = {row["seed"]: row for row in self.rows if row["arm"] == arm and row["status"] == "finished"}
        return [found[seed] for seed in self.seeds if seed in found]

    @property
    def failures(self) -> list[Row]:
        """Rows that failed."""
        return [row for row in self.rows if row["status"] != "finished"]

    def summary(self, metrics: Sequence[str] = METRICS) -> list[Row]:
        """Summarize each arm over its seeds, and compare it with the first arm seed by seed.

        Args:
            metrics: Keys of the rows to summarize; a row where one is None does not count for it.

        Returns:
            One row an arm: arm, n (finished seeds), failed (number), for each of ``metrics`` a dict with
            mean, sd (sample standard deviation over seeds) and se (sd / sqrt(n)), and "tolerances", the mean
            nfe, nll and error of log p of the test at other tolerances. Arms after the first add to each dict
            the mean paired difference, its standard error, its 95 % confidence interval (low, high) and p-value
            of the paired t-test, the ratio of the means and change = ratio - 1 (not of the NLL), all over the
            seeds that both arms finished. What cannot be computed is None.
        """
        first = self.finished(self.arms[0])
        table = []
        for i, arm in enumerate(self.arms):
            rows = self.finished(arm)
            failed = sum(row["arm"] == arm for row in self.failures)
            line: Row = {"arm": arm, "n": len(rows), "failed": failed}
            for metric in metrics:
                line[metric] = describe([row[metric] for row in rows if row[metric] is not None])
                if i:
                    line[metric] |= contrast(*pairs(rows, first, metric), ratio=metric != "nll")
            line["tolerances"] = _tolerance_means(rows)
            table.append(line)
        return table

    def table(self) -> pandas.DataFrame:
        """Write the summary for readers: a row an arm, mean ± sd over seeds, the change against the first arm.

        Returns:
            A table of texts, ready to print, with the arms as its index.
        """
        import pandas as pd

        lines = {}
        for line in self.summary():
            failed = f" ({line['failed']} of {len(self.seeds)} failed)" if line["failed"] else ""
            lines[f"{line['arm']}{failed}"] = {
                title: write_cell(line[metric], digits, change=change)
                for title, metric, digits, change in (
                    ("held-out NLL (nats)", "nll", 3, True),
                    ("NFE train, forward", "nfe_train", 1, True),
                    ("NFE train, backward", "nfe_backward", 1, True),
                    ("NFE test", "nfe_test", 1, True),
                    ("accepted", "accepted", 1, False),
                    ("rejected", "rejected", 1, False),
                    ("training (s)", "seconds", 0, True),
                )
            }
        return pd.DataFrame(lines).T.rename_axis("arm")

    def record(self) -> Row:
        """Return everything as plain values, ready for JSON."""
        extra = {} if self.command is None else {"command": self.command}
        fields = {
            "experiment": "compare",
            "status": self.status,
            "data": self.data,
            "seeds": list(self.seeds),
            "equal_tolerance": self.equal_tolerance,
            "configuration": {"arms": list(self.arms), **self.setup},
            "summary": self.summary(),
            "arms": self.rows,
        }
        record: Row = to_plain(run_record(device=_device(self.setup), **fields, **extra))
        return record

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON.

        Args:
            path: File to write.

        Returns:
            The path.

        Raises:
            OSError: The file could not be written; an earlier one is unchanged.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.record())
        return path

    @classmethod
    def load(cls, path: str | Path) -> ComparisonResult:
        """Read a record that :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not the record of a comparison.
        """
        record = read_json(path)
        try:
            configuration = dict(record["configuration"])
            return cls(
                rows=record["arms"],
                data=record["data"],
                arms=tuple(configuration.pop("arms")),
                seeds=tuple(record["seeds"]),
                setup=configuration,
                equal_tolerance=record["equal_tolerance"],
                status=record["status"],
                command=record["command"],
                folder=Path(path).parent,
            )
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{path} is not the record of a comparison: it lacks {err}") from err


def describe(values: Sequence[float]) -> Row:
    """Return mean, sample standard deviation and standard error; None where there are too few values.

    >>> describe([1.0, 3.0])["mean"], describe([1.0])["sd"]
    (2.0, None)
    """
    import numpy as np
    from scipy import stats

    if not values:
        return {"mean": None, "sd": None, "se": None}
    several = len(values) > 1
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if several else None,
        "se": float(stats.sem(values)) if several else None,
    }


def contrast(values: Sequence[float], reference: Sequence[float], *, ratio: bool = True) -> Row:
    """Compare paired values: mean difference with its 95 % interval and p-value, and the ratio of the means.

    Args:
        values: Values of one arm.
        reference: Values of the first arm, for the same seeds.
        ratio: Whether these are amounts, of which a ratio makes sense.

    Returns:
        A dict with difference, difference_se, low, high, p, ratio and change; None stands for what cannot be
        computed.

    >>> contrast([1.0, 2.0, 3.5], [2.0, 4.0, 6.0])["difference"] < 0
    True
    """
    import numpy as np
    from scipy import stats

    empty: Row = dict.fromkeys(("difference", "difference_se", "low", "high", "p", "ratio", "change"))
    if not values:
        return empty
    difference = np.subtract(values, reference)
    mean, base = float(difference.mean()), float(np.mean(reference))
    found = empty | {"difference": mean}
    if ratio and base > 0:
        found["ratio"] = float(np.mean(values)) / base
        found["change"] = found["ratio"] - 1
    if len(difference) > 1:
        found["difference_se"] = float(stats.sem(difference))
    if len(difference) > 1 and difference.std() > 1e-12 * np.abs(difference).max():
        test = stats.ttest_rel(values, reference)
        interval = test.confidence_interval(0.95)
        found |= {"low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue)}
    return found


def resample(values: Sequence[float], reference: Sequence[float], *, ratio: bool = True) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the change of the mean, pairs of values drawn with replacement.

    With n pairs there are only (2n - 1)! / (n! (n - 1)!) different draws, 10 for three seeds: with so few the
    interval is too short, and that of ``contrast`` is the safe one.

    Args:
        values: Values of one arm.
        reference: Values of the first arm, for the same seeds.
        ratio: Whether the change is relative, mean / mean - 1, or the difference of the means.

    Returns:
        Lower and upper end; None with fewer than two pairs.

    References:
        Efron & Tibshirani, An introduction to the bootstrap, 1993, chapter 13 (the percentile interval).

    >>> low, high = resample([1.0, 2.0, 3.5], [2.0, 4.0, 6.0])
    >>> -0.6 < low < high < -0.4
    True
    """
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        return None

    def change(a: Any, b: Any, axis: int) -> Any:
        return np.mean(a, axis=axis) / np.mean(b, axis=axis) - 1 if ratio else np.mean(a - b, axis=axis)

    found = stats.bootstrap(
        (np.asarray(values, dtype=float), np.asarray(reference, dtype=float)),
        change,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def write_cell(
    values: Mapping[str, Any], digits: int, *, change: bool = True, between: str = " ", below: str = " "
) -> str:
    """Write one metric of a summary: mean ± sd, and in brackets the change against the first arm.

    Args:
        values: Mean, sd and, for arms after the first, change or difference of the metric.
        digits: Digits after the point.
        change: Whether to write the change: relative, or absolute for the NLL.
        between: What stands before ± sd.
        below: What stands before the change.

    >>> write_cell({"mean": 2.0, "sd": 0.25}, 2)
    '2.00 ± 0.25'
    """
    if values.get("mean") is None:
        return "–"
    text = f"{values['mean']:.{digits}f}"
    if values["sd"] is not None:
        text += f"{between}± {values['sd']:.{digits}f}"
    if change and values.get("change") is not None:
        text += f"{below}({values['change']:+.1%})".replace("%", " %")
    elif change and values.get("difference") is not None and digits > 1:
        text += f"{below}({values['difference']:+.{digits}f})"
    return text.replace("(-", "(−")


def pairs(rows: Sequence[Row], first: Sequence[Row], metric: str) -> tuple[list[float], list[float]]:
    """Return the values of a metric of two arms, of the seeds for which both have one."""
    reference = {row["seed"]: row[metric] for row in first if row[metric] is not None}
    both = [row for row in rows if row["seed"] in reference and row[metric] is not None]
    return [row[metric] for row in both], [reference[row["seed"]] for row in both]


def _tolerance_means(rows: Sequence[Row]) -> list[Row]:
    found: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        for test in row["tolerances"]:
            found.setdefault((test["rtol"], test["atol"]), []).append(test)
    table = []
    for (rtol, atol), tests in found.items():
        line: Row = {"rtol": rtol, "atol": atol}
        for metric in ("nfe", "nll", "error_rms", "error_max"):
            line[metric] = describe([test[metric] for test in tests if _is_number(test.get(metric))])
        table.append(line)
    return table


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _device(setup: Mapping[str, Any]) -> str:
    from pycnf.training.options import resolve_device

    try:
        return str(resolve_device(setup.get("device", "auto")))
    except ValueError:  # the record of another machine
        return "cpu"
