"""What a benchmark came to: its runs, read back from their records, and their statistics over seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycnf.experiments.arms import write_tolerance
from pycnf.experiments.results import ComparisonResult, contrast, describe, pairs, resample
from pycnf.experiments.sweep import nfe_at_error
from pycnf.records import read_json, run_record, write_json

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]

BENCH = "bench.json"
RUNS = "runs"
PLAIN = "none"
ERROR = 1e-4
"""RMS error of log p, in nats, at which evaluations are compared beside equal tolerance."""

METRICS = (
    *("nll", "nfe_test", "nfe_equal", "error_rms", "error_max"),
    *("nfe_train", "nfe_train_last_200", "nfe_backward", "nfe_backward_last_200"),
    *("accepted", "rejected", "seconds", "seconds_to_nll"),
)


@dataclass(frozen=True)
class BenchResult:
    """Hold the runs of a benchmark.

    A row has the keys of a comparison's row (:class:`~pycnf.experiments.results.ComparisonResult`) and
    configuration, what the run depends on. Its "tolerances" are those of
    :func:`~pycnf.experiments.sweep.sweep_tolerances`. The status is "finished", "failed" or "crashed".

    Attributes:
        rows: The rows.
        folder: Folder that they were read from.
    """

    rows: tuple[Row, ...]
    folder: Path

    @property
    def data(self) -> tuple[str, ...]:
        """Names of the sets."""
        return tuple(dict.fromkeys(row["data"] for row in self.rows))

    @property
    def failures(self) -> list[Row]:
        """Rows without a result."""
        return [row for row in self.rows if row["status"] != "finished"]

    def arms(self, data: str) -> tuple[str, ...]:
        """Return the arms of a set: the plain one, then by regularizer and weight."""
        return tuple(sorted({row["arm"] for row in self.rows if row["data"] == data}, key=_arm_order))

    def comparison(self, data: str, error: float = ERROR) -> ComparisonResult:
        """Return the runs of a set as a comparison of arms with the plain one.

        Args:
            data: Name of the set.
            error: RMS error of log p for "nfe_equal", in nats.

        Returns:
            The comparison; its finished rows have these keys too: error_rms and error_max (of log p, at the test
            tolerance), nfe_equal (evaluations for the given error), seconds_to_nll (training time until the
            held-out NLL reached the best of the plain arm with the same seed), each None where it is not known.

        Raises:
            ValueError: There are no runs of this set.
        """
        rows = [row for row in self.rows if row["data"] == data]
        if not rows:
            raise ValueError(f"there are no runs of {data!r}: choose among {', '.join(self.data)}")
        plain = {row["seed"]: row for row in rows if row["arm"] == PLAIN and row["status"] == "finished"}
        return ComparisonResult(
            rows=[_derived(row, plain.get(row["seed"]), error) for row in rows],
            data=data,
            arms=(PLAIN, *(arm for arm in self.arms(data) if arm != PLAIN)),
            seeds=tuple(sorted({row["seed"] for row in rows})),
            setup=rows[0]["configuration"]["setup"],
            folder=self.folder,
        )

    def summary(self, data: str, error: float = ERROR) -> list[Row]:
        """Summarize the arms of a set over seeds, and what the tolerance alone does to the plain arm.

        Args:
            data: Name of the set.
            error: RMS error of log p for "nfe_equal", in nats.

        Returns:
            A line an arm, as ``ComparisonResult.summary`` makes them, of ``METRICS``, with "reached", the
            number of runs that reached the plain arm's NLL (seconds_to_nll is over these alone). Arms after the plain
            one add "within", whether their mean NLL exceeds the plain arm's by at most one standard error: "paired",
            that of the difference seed by seed, and "unpaired", that of the plain arm's mean; and to nll and nfe_test
            "bootstrap", the 95 % interval of the difference or change
            (:func:`~pycnf.experiments.results.resample`). At the end stands a line for each tolerance looser than
            that of the test, with "tolerance_alone": the plain arm at that tolerance against itself at the test's.
        """
        comparison = self.comparison(data, error)
        lines = comparison.summary(METRICS)
        first = comparison.finished(PLAIN)
        for line in lines:
            times = [row["seconds_to_nll"] for row in comparison.finished(line["arm"])]
            line["reached"] = sum(seconds is not None for seconds in times)
        for line in lines[1:]:
            rows = comparison.finished(line["arm"])
            errors = {"paired": line["nll"]["difference_se"], "unpaired": lines[0]["nll"]["se"]}
            worse = line["nll"]["difference"]
            line["within"] = {k: None if None in (worse, se) else worse <= se for k, se in errors.items()}
            for metric in ("nll", "nfe_test"):
                line[metric]["bootstrap"] = resample(*pairs(rows, first, metric), ratio=metric != "nll")
        return lines + _tolerance_lines(first)

    def table(self, data: str, error: float = ERROR) -> pandas.DataFrame:
        """Write the summary of a set for readers; every cell is a text.

        Args:
            data: Name of the set.
            error: RMS error of log p at which evaluations are compared, in nats.

        Returns:
            A row a line of :meth:`summary`, with the arms as index. NLL: mean, and the paired difference to the
            plain arm ± its standard error. Within 1 SE: "yes", "no", or by which of the two standard errors alone.
            NFE: mean and change. Times: ratio to the plain arm. The lines on the tolerance alone give differences
            and changes only, because they were measured on other rows than the rest: those of the sweep, in float64.
        """
        import pandas as pd

        seeds = len(self.comparison(data, error).seeds)
        return pd.DataFrame(
            {line["arm"]: _cells(line, error, seeds) for line in self.summary(data, error)}
        ).T.rename_axis("arm")

    def sweep(self, data: str, metric: str = "nfe") -> pandas.DataFrame:
        """Return the mean of a metric of the test at every tolerance.

        Args:
            data: Name of the set.
            metric: "nfe", "nll", "error_rms" or "error_max".

        Returns:
            A row an arm, a column a tolerance (rtol = atol), loosest first.
        """
        import pandas as pd

        lines = self.comparison(data).summary(("nll",))
        found = {line["arm"]: {t["rtol"]: t[metric]["mean"] for t in line["tolerances"]} for line in lines}
        table = pd.DataFrame(found).T.rename_axis(index="arm", columns="tolerance").astype(float)
        return table[sorted(table.columns, reverse=True)]

    def best(self, data: str) -> Row | None:
        """Return the line of the arm with the fewest test evaluations whose NLL is within both standard errors.

        It is the best of several, so its saving is the one that chance has most likely flattered.
        """
        lines = [line for line in self.summary(data) if all(line.get("within", {"": False}).values())]
        return min(lines, key=lambda line: line["nfe_test"]["mean"], default=None)

    def record(self, **more: Any) -> Row:
        """Return what the benchmark came to as plain values, without the runs' curves."""
        seeds = sorted({row["seed"] for row in self.rows})
        devices = sorted({row["device"] for row in self.rows})
        sets = {
            data: {
                "setup": self.comparison(data).setup,
                "seeds": list(self.comparison(data).seeds),
                "summary": self.summary(data),
            }
            for data in self.data
        }
        failures = [{key: row[key] for key in ("data", "arm", "seed", "status", "error")} for row in self.failures]
        fields = {"experiment": "bench", "status": "finished", "seeds": seeds, **more}
        record = run_record(**fields, error=ERROR, runs=len(self.rows), failures=failures, data=sets)
        return record | {"device": ", ".join(devices)}

    def save(self, **more: Any) -> Path:
        """Write the record as ``bench.json`` into the folder.

        Args:
            **more: Further entries of the record.

        Raises:
            OSError: The file could not be written; an earlier one is unchanged.
        """
        write_json(self.folder / BENCH, self.record(**more))
        return self.folder / BENCH


def load_bench(path: str | Path) -> BenchResult:
    """Read a benchmark back from the records of its runs.

    Args:
        path: Its folder, or the ``bench.json`` in it.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: A file is not the record of a run, or runs of a set differ in more than regularizer and seed.
    """
    folder = Path(path).parent if Path(path).suffix == ".json" else Path(path)
    if not (folder / RUNS).is_dir():
        raise FileNotFoundError(f"no benchmark in {folder}: it has no folder {RUNS}")
    rows = []
    for file in sorted((folder / RUNS).glob("*.json")):
        row = read_json(file)
        if not isinstance(row, dict) or row.get("experiment") != "bench" or "configuration" not in row:
            raise ValueError(f"{file} is not the record of a run of a benchmark: delete it")
        rows.append(row)
    check_protocol(rows)
    rows.sort(key=lambda row: (row["data"], row["seed"], _arm_order(row["arm"])))
    return BenchResult(tuple(rows), folder)


def check_protocol(rows: Iterable[Mapping[str, Any]]) -> None:
    """Require the runs of a set to differ in regularizer and seed alone.

    Args:
        rows: Rows, of which the configuration counts.

    Raises:
        ValueError: They differ in something else; the message names it.
    """
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        flat = _flat(row["configuration"])
        seen = first.setdefault(flat["data"], flat)
        for name in seen.keys() | flat.keys():
            if seen.get(name) != flat.get(name):
                raise ValueError(
                    f"runs of {flat['data']} with {name} = {seen.get(name)!r} and {flat.get(name)!r} cannot be "
                    "compared: choose another output folder, or delete the records that are there"
                )


def family(arm: str) -> str:
    """Return an arm without its weights: the curve of a front that it belongs to.

    >>> family("tpr:weight=5,degree=3+error:weight=0.1"), family("kinetic:weight=0.1")
    ('tpr:degree=3+error', 'kinetic')
    """
    return re.sub(r":(?=\+|$)", "", re.sub(r"weight=[^,+]*,?", "", arm).replace(",+", "+"))


def weights(arm: str) -> tuple[float, ...]:
    """Return the weights of an arm.

    >>> weights("tpr:weight=5,degree=3+error:weight=0.1"), weights("none")
    ((5.0, 0.1), ())
    """
    return tuple(float(text) for text in re.findall(r"\bweight=([-+.\deE]*\d)", arm))


def reach(validation: Mapping[str, Sequence[float]], nll: float) -> float | None:
    """Return the seconds of training until the held-out NLL first came down to a value, interpolated linearly.

    Args:
        validation: Lists seconds and nll of a run's validations.
        nll: The value.

    Returns:
        Seconds, None where it was never reached.

    >>> reach({"seconds": [10.0, 20.0], "nll": [2.0, 1.0]}, 1.5)
    15.0
    """
    before: tuple[float, float] | None = None
    for seconds, value in zip(validation["seconds"], validation["nll"], strict=True):
        if value <= nll:
            if before is None:
                return seconds
            part = (before[1] - nll) / (before[1] - value)
            return before[0] + part * (seconds - before[0])
        before = seconds, value
    return None


def _derived(row: Row, plain: Row | None, error: float) -> Row:
    if row["status"] != "finished":
        return row
    at_test: Row = next((test for test in row["tolerances"] if test["rtol"] == row["test_rtol"]), {})
    known = plain is not None and plain["validation"]["nll"]
    return row | {
        "error_rms": at_test.get("error_rms"),
        "error_max": at_test.get("error_max"),
        "nfe_equal": nfe_at_error(row["tolerances"], error),
        "seconds_to_nll": reach(row["validation"], min(plain["validation"]["nll"])) if plain and known else None,
    }


def _tolerance_lines(plain: Sequence[Row]) -> list[Row]:
    """Compare the plain arm at looser tolerances with itself at that of the test, on the rows of the sweep."""
    tests = [{test["rtol"]: test for test in row["tolerances"]} for row in plain]
    at = plain[0]["test_rtol"] if plain else 0.0
    names = {"nll": "nll", "nfe_test": "nfe", "accepted": "accepted", "rejected": "rejected"}
    names |= {"error_rms": "error_rms", "error_max": "error_max"}
    lines = []
    for tolerance in sorted(t for t in (tests[0] if tests else {}) if t > at):
        line: Row = {
            "arm": f"{PLAIN}, only tested at {write_tolerance(tolerance, tolerance)}",
            "n": len(tests),
            "failed": 0,
            "tolerance_alone": tolerance,
            **{metric: describe([]) for metric in METRICS},
        }
        for metric, name in names.items():
            both = [(test[tolerance][name], test[at][name]) for test in tests]
            known = [pair for pair in both if None not in pair]
            values, reference = [pair[0] for pair in known], [pair[1] for pair in known]
            line[metric] = describe(values) | contrast(values, reference, ratio=metric != "nll")
        lines.append(line)
    return lines


def _cells(line: Row, error: float, seeds: int) -> dict[str, str]:
    alone, error_cell = "tolerance_alone" in line, line["error_rms"]["mean"]
    cells = {
        "n": f"{line['n']}" if line["n"] == seeds else f"{line['n']} of {seeds}",
        "held-out NLL (nats)": _likelihood(line["nll"], alone),
        "within 1 SE": write_within(line.get("within", {})),
        "NFE test": write_change(line["nfe_test"]) if alone else _amount(line["nfe_test"]),
        "NFE train": _amount(line["nfe_train"]),
        "last 200": _amount(line["nfe_train_last_200"], change=False),
        "NFE backward": _amount(line["nfe_backward"], change=False),
        "training time": _ratio(line["seconds"], alone),
        "time to plain NLL": _reached(line, alone),
        "RMS error of log p": "–" if error_cell is None else f"{error_cell:.1e}",
        f"NFE at error {write_tolerance(error, error)}": _amount(line["nfe_equal"]),
    }
    return {name: re.sub(r"^-|(?<=\()-", "−", text) for name, text in cells.items()}


def _likelihood(nll: Mapping[str, Any], alone: bool) -> str:
    if nll["mean"] is None:
        return "–"
    mean = f"{nll['mean']:.3f}"
    if nll.get("difference") is None:
        return mean + ("" if nll["se"] is None else f" ± {nll['se']:.3f}")
    difference = write_difference(nll)
    return difference if alone else f"{mean} ({difference})"


def write_difference(values: Mapping[str, Any]) -> str:
    """Write a mean paired difference with its standard error, where there is one."""
    se = "" if values["difference_se"] is None else f" ± {values['difference_se']:.3f}"
    return f"{values['difference']:+.3f}{se}"


def write_within(found: Mapping[str, bool | None]) -> str:
    """Write by which standard errors an arm is not worse than the plain one: "yes" for both, "no", or the only one."""
    holds = [name for name, value in found.items() if value]
    if None in found.values() or not found:
        return "–"
    return "no" if not holds else "yes" if len(holds) == len(found) else holds[0]


def _amount(values: Mapping[str, Any], *, change: bool = True) -> str:
    if values["mean"] is None:
        return "–"
    text = f"{values['mean']:.1f}"
    return f"{text} ({write_change(values)})" if change and values.get("change") is not None else text


def write_change(values: Mapping[str, Any]) -> str:
    """Write a change in per cent."""
    return "–" if values["change"] is None else f"{values['change']:+.1%}".replace("%", " %")


def _ratio(values: Mapping[str, Any], alone: bool) -> str:
    if alone or values["mean"] is None:
        return "–"
    if "ratio" not in values:
        return f"{values['mean']:.0f} s"
    return "–" if values["ratio"] is None else f"× {values['ratio']:.2f}"


def _reached(line: Row, alone: bool) -> str:
    text, reached = _ratio(line["seconds_to_nll"], alone), line.get("reached", 0)
    if alone or not line["n"] or reached == line["n"]:
        return text
    return f"{text} ({reached} of {line['n']})" if reached else "not reached"


def _arm_order(arm: str) -> tuple[Any, ...]:
    return arm != PLAIN, family(arm), weights(arm), arm


def _flat(configuration: Mapping[str, Any]) -> dict[str, Any]:
    shared = {name: value for name, value in configuration.items() if name not in ("regularizer", "seed", "setup")}
    return shared | {f"setup.{name}": value for name, value in configuration["setup"].items()}


__all__ = [
    *("BENCH", "ERROR", "PLAIN", "RUNS", "BenchResult"),
    *("check_protocol", "family", "load_bench", "reach", "weights"),
    *("write_change", "write_difference", "write_within"),
]
