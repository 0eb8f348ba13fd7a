"""What the page on choosing reads from the records, and the table that its decisions fill.

Pages put ``_ext`` and ``../benchmarks`` into ``sys.path`` and run in the folder ``book/``. A record that is not there
is said to be missing, with the command that makes it; a decision that its measurement does not support stops the build.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd
from recorded import Recorded, difference, lines_of, overview, percent, plural, write
from tables import CASES, spread

from pycnf.experiments.bench_results import BenchResult
from pycnf.records import read_json
from pycnf.regularizers import DEFAULT

FOLDER = Path("../results/benchmarks")
MISSING = "not recorded"
Row = Mapping[str, Any]


class Decisions:
    """Collect decisions, each with the measurement that it rests on."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []

    def add(self, situation: str, choice: str, measured: str, page: str, *, holds: bool | None = None) -> None:
        """Add a decision.

        Args:
            situation: When it applies.
            choice: What to take, in Markdown.
            measured: What was measured that says so.
            page: Page that tells more.
            holds: Whether the measurement supports the choice; None where nothing was measured.

        Raises:
            AssertionError: The measurement does not support the choice.
        """
        assert holds is None or holds, f"{situation}: {choice} is not supported by what was measured, {measured}"
        self.rows.append((situation, choice, measured, page))

    def markdown(self) -> str:
        """Return the table."""
        head = ["| situation | choice | what was measured | page |", "| --- | --- | --- | --- |"]
        lines = [f"| {' | '.join(words)} | {{doc}}`{page}` |" for *words, page in self.rows]
        return "\n".join(head + lines)


@dataclass(frozen=True)
class Benchmark:
    """Hold a recorded benchmark, or that it is not there.

    Attributes:
        record: The record, None where there is none.
    """

    record: Row | None
    name: ClassVar[str]

    @classmethod
    def read(cls) -> Self:
        """Read the record of this benchmark."""
        path = FOLDER / f"{cls.name}.json"
        return cls(read_json(path) if path.is_file() else None)

    @property
    def rows(self) -> Any:
        """Rows of the record, none where there is no record."""
        return [] if self.record is None else self.record["rows"]

    def table(self) -> pd.DataFrame:
        """Return what was measured."""
        raise NotImplementedError

    def says(self) -> str:
        """Return what the table comes to, in Markdown."""
        raise NotImplementedError

    def decide(self, decisions: Decisions) -> None:
        """Add the decisions that rest on this benchmark."""
        raise NotImplementedError

    def show(self) -> None:
        """Show the table and what it comes to; or what makes the record."""
        from IPython.display import Markdown, display

        if self.record is None:
            command = f"python benchmarks/{self.name}.py --output results/benchmarks/{self.name}.json"
            display(Markdown(f"*Not recorded here; `{command}` makes it.*"))
        else:
            display(self.table())
            display(Markdown(self.says()))


class GradientModes(Benchmark):
    """Hold times, memory and errors of the ways to a gradient, against backpropagation through the solver."""

    name = "gradient_modes"
    tolerance = 1e-4
    shown = ("backprop", "checkpoint", "adjoint", "torchdiffeq adjoint")

    def _memory(self, case: str, regularizer: str, mode: str) -> tuple[Row, float]:
        """Return what was measured at the tolerance of training, and its memory over that of backpropagation."""
        found = {
            row["mode"]: row
            for row in (self.record or {})["tolerances"]
            if (row["case"], row["regularizer"], row["tolerance"]) == (case, regularizer, self.tolerance)
        }
        return found[mode], found[mode]["peak_mb"] / found["backprop"]["peak_mb"]

    def table(self) -> pd.DataFrame:
        """Return a row a work, regularizer and mode."""
        lines = []
        for row in self.rows:
            if row["mode"] in self.shown:
                at, memory = self._memory(row["case"], row["regularizer"], row["mode"])
                lines.append(
                    {
                        "work": CASES[row["case"]],
                        "regularizer": row["regularizer"],
                        "mode": row["mode"],
                        "time × backprop (range)": spread(row, digits=2),
                        "backward evaluations": f"{row['nfe_backward']:.0f}",
                        "memory × backprop": f"{memory:.2f}",
                        "error of the gradient": f"{at['error']:.0e}",
                    }
                )
        return pd.DataFrame(lines).set_index(["work", "regularizer", "mode"])

    def says(self) -> str:
        """Return the record's own summary."""
        lines = (self.record or {})["rule"]
        return "The record sums up:\n\n" + "\n".join(line if line.startswith("-") else f"\n{line}\n" for line in lines)

    def _time(self, case: str, mode: str) -> tuple[Row, str]:
        """Return the plain flow's row of a work and mode, and how many times as long as backpropagation it takes."""
        (row,) = (row for row in self.rows if (row["case"], row["regularizer"], row["mode"]) == (case, "none", mode))
        return row, f"× {spread(row, digits=2)}"

    def decide(self, decisions: Decisions) -> None:
        """Add what to take where memory suffices, and where it does not."""
        fast, small, said = None, None, {"power": MISSING, "43d": MISSING}
        if self.record is not None:
            times = [self._time("power", mode) for mode in ("checkpoint", "adjoint")]
            fast = all(row["ratio"] > 1 for row, _ in times)
            said["power"] = (
                f"the fastest on small nets: checkpoints take {times[0][1]}, the adjoint {times[1][1]} of its time "
                "on POWER"
            )
            times = [self._time("43d", mode) for mode in ("checkpoint", "adjoint")]
            held = [self._memory("43d", "none", mode)[1] for mode in ("checkpoint", "adjoint")]
            small = held[1] < held[0] < 1
            said["43d"] = (
                f"on 43 dimensions with layers of 860: memory × {held[0]:.2f} and × {held[1]:.2f}, time {times[0][1]} "
                f"and {times[1][1]}"
            )
        decisions.add("gradients, memory suffices", '`gradient="backprop"`', said["power"], "gradients", holds=fast)
        decisions.add(
            "gradients, memory is short", '`"checkpoint"`, then `"adjoint"`', said["43d"], "adjoint", holds=small
        )


class Scaling(Benchmark):
    """Hold how the time of a training step grows with the dimension."""

    name = "scaling"
    dear = 2.0

    @property
    def over(self) -> dict[int, float]:
        """Time of a step with the exact divergence over that with one probe, by dimension."""
        if self.record is None:
            return {}
        curves = {
            curve["name"]: {int(point["x"]): point["ms"] for point in curve["points"]}
            for curve in self.rows["dimension"]
        }
        both = sorted(set(curves["exact"]) & set(curves["hutchinson"]))
        return {D: curves["exact"][D] / curves["hutchinson"][D] for D in both}

    @property
    def threshold(self) -> int | None:
        """The least dimension in which the exact divergence takes more than twice the time, None where none does."""
        return next((D for D, ratio in self.over.items() if ratio > self.dear), None)

    def table(self) -> pd.DataFrame:
        """Return the ratio of times by dimension."""
        cells = {f"D = {D}": f"{ratio:.1f}" for D, ratio in self.over.items()}
        return pd.DataFrame({"exact over one probe, time of a training step": cells}).T

    def says(self) -> str:
        """Say from which dimension on the exact divergence is dear."""
        where = "in no dimension" if self.threshold is None else f"from D = {self.threshold} on"
        return f"For a net of 3 × 64 and 200 rows, the exact divergence takes more than twice the time {where}."

    def decide(self, decisions: Decisions) -> None:
        """Add up to which dimension to train with the exact divergence."""
        over, dear = self.over, self.threshold
        choice = f"exact below D ≈ {dear}, else one probe" if dear else "exact, or one probe in high dimensions"
        measured = MISSING if not over else "in no dimension recorded does it take twice the time of one probe"
        if dear:
            measured = f"takes {over[dear]:.1f} times the time of one probe at D = {dear}"
        holds = all(ratio > 1 for D, ratio in over.items() if dear <= D) if dear else None
        decisions.add("divergence in training", choice, measured, "speed", holds=holds)


class Precision(Benchmark):
    """Hold what the precision of the arithmetic does to the error of log p."""

    name = "precision"

    @property
    def frame(self) -> pd.DataFrame:
        """One row a work, tolerance and precision."""
        return pd.DataFrame(self.rows)

    @property
    def tightest(self) -> float:
        """The tightest tolerance measured."""
        return float(self.frame["tolerance"].min())

    @property
    def floor(self) -> dict[str, float]:
        """Error of log p at the tightest tolerance, the larger of the works, by precision."""
        if self.record is None:
            return {}
        last = self.frame[self.frame["tolerance"] == self.tightest]
        return {name: float(own["error_rms"].max()) for name, own in last.groupby("precision", sort=False)}

    @property
    def worst(self) -> float | None:
        """The largest ratio of the errors in float32 and float64, over works and tolerances."""
        if self.record is None:
            return None
        errors = self.frame.pivot_table(index=["case", "tolerance"], columns="precision", values="error_rms")
        return float((errors["float32"] / errors["float64"]).max())

    def table(self) -> pd.DataFrame:
        """Return evaluations and errors by work, tolerance and precision."""
        told = self.frame.assign(tolerance=self.frame["tolerance"].map("{:.0e}".format))
        columns = {"index": ["case", "tolerance"], "columns": "precision", "values": ["nfe", "error_rms"]}
        found = told.pivot_table(**columns, sort=False).rename(
            columns={"nfe": "NFE", "error_rms": "error of log p (RMS)"}
        )
        return found.map(lambda value: f"{value:.0f}" if value >= 2 else f"{value:.0e}")

    def says(self) -> str:
        """Say where the errors stay, and what bfloat16 costs."""
        last = self.frame[self.frame["tolerance"] == self.tightest].set_index(["case", "precision"])["nfe"]
        more = (last.xs("bfloat16", level="precision") / last.xs("float64", level="precision")).max()
        stays = ", ".join(f"{write(value)} in {name}" for name, value in self.floor.items())
        return (
            f"At the tightest tolerance the error stays at {stays}; products in bfloat16 then take up to {more:.1f} "
            "times the evaluations of float64: below a tolerance of about the rounding error, the solver resolves the "
            "stairs that rounding makes of the field."
        )

    def decide(self, decisions: Decisions) -> None:
        """Add the precision to compute in."""
        worst, floor, measured = self.worst, self.floor, MISSING
        if worst is not None:
            measured = (
                f"down to {write(self.tightest)}, float32 errs at most × {worst:.2f} of float64; bfloat16 stays at "
                f"{write(floor['bfloat16'])} nats"
            )
        decisions.add(
            "precision",
            "float32; float64 below the tolerances measured; bfloat16 not for densities",
            measured,
            "speed",
            holds=None if worst is None else worst < 1.5 and floor["bfloat16"] > 10 * floor["float32"],
        )


@dataclass(frozen=True)
class Arms:
    """Hold what every recorded regularizer changed, against the plain model of the same seeds.

    Attributes:
        front: The benchmark of regularizers.
        sets: The sets of the recorded experiments.
    """

    front: BenchResult
    sets: Sequence[Recorded]
    lines: dict[str, dict[str, dict[str, Any]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.lines.update({one.data: lines_of(one.bench, one.data) for one in self.sets})
        for data in self.front.data:  # the benchmark's lines go before those of the experiments
            self.lines[data] = self.lines.get(data, {}) | lines_of(self.front, data)

    def benchmark(self, arms: Sequence[str]) -> pd.DataFrame:
        """Return a row a set of the benchmark and arm."""
        sets = [Recorded("regularizers", data, self.front) for data in self.front.data]
        return overview(sets, arms).drop(columns="seeds")

    def experiments(self) -> pd.DataFrame | None:
        """Return a row a set of the experiments and arm, None where there is none."""
        return overview(self.sets) if self.sets else None

    def _compared(self, kind: str | None = None) -> dict[str, list[tuple[float, bool | None]]]:
        """Return, by arm, the change of a test of every set, and whether the likelihood is not worse, if known."""
        found: dict[str, list[tuple[float, bool | None]]] = {}
        for one in self.sets:
            for line in one.arms[1:] if kind in (None, one.work["kind"]) else ():
                known = [verdict for verdict in line.get("within", {}).values() if verdict is not None]
                if line["nfe_test"].get("change") is not None:
                    verdict = any(known) if known else None
                    found.setdefault(line["arm"], []).append((line["nfe_test"]["change"], verdict))
        return found

    def says(self, least: int = 2) -> str:
        """Sum the experiments up, in Markdown: one item an arm that was run on so many sets."""
        items = []
        for arm, found in self._compared().items():
            changes = [change for change, _ in found]
            if len(found) >= least:
                items.append(
                    f"- `{arm.replace(',', ', ')}`: evaluations of a test {percent(min(changes))} to "
                    f"{percent(max(changes))}, median {percent(statistics.median(changes))}, over "
                    f"{plural(len(found), 'set')}; the likelihood is not worse by more than a standard error, by one "
                    f"of two measures, on {sum(bool(verdict) for _, verdict in found)} of the "
                    f"{sum(verdict is not None for _, verdict in found)} with several seeds."
                )
        return "Over the experiments:\n\n" + "\n".join(items) if items else "*No experiment is recorded here.*"

    def _tell(self, data: str, arm: str, digits: int = 2) -> str:
        """Write the change of evaluations of a test, and in brackets that of the likelihood."""
        line = self.lines.get(data, {}).get(arm)
        if line is None or line["nfe_test"].get("change") is None:
            return MISSING
        return f"{percent(line['nfe_test']['change'])} ({difference(line['nll'], digits)} nats)"

    def _saves(self, data: str, arm: str, nats: float) -> bool | None:
        """Say whether an arm saves evaluations on a set and costs less than so many nats, None if not recorded."""
        line = self.lines.get(data, {}).get(arm)
        if line is None or line["nfe_test"].get("change") is None:
            return None
        return bool(line["nfe_test"]["change"] < 0 and line["nll"]["difference"] < nats)

    def tolerance_alone(self, data: str, tolerance: float) -> float | None:
        """Return what a test of the plain model at another tolerance changes, None where it was not measured."""
        lines = (line for line in self.front.summary(data) if line.get("tolerance_alone") == tolerance)
        return next((line["nfe_test"]["change"] for line in lines), None)

    def _posterior(self) -> tuple[str, str] | None:
        """Return the arm that saves most on auto-encoders, not worse on half of its sets; and what was measured."""
        own = {
            arm: [(change, verdict) for change, verdict in found if verdict is not None]
            for arm, found in self._compared("vae").items()
        }
        free = {
            arm: statistics.median(change for change, _ in found)
            for arm, found in own.items()
            if found and 2 * sum(bool(verdict) for _, verdict in found) >= len(found)
        }
        if not free:
            return None
        best = min(free, key=lambda arm: free[arm])
        changes = [change for change, _ in own[best]]
        return f"`{best.replace(',', ', ')}`", (
            f"{percent(min(changes))} to {percent(max(changes))} evaluations of a solve on "
            f"{plural(len(changes), 'set')}, not worse by more than a standard error, by one of two measures, on "
            f"{sum(bool(verdict) for _, verdict in own[best])}"
        )

    def decide(self, decisions: Decisions) -> None:
        """Add which regularizer to take, if any."""
        light, published = "error:weight=0.005", "tpr:weight=5"
        found, pieces = self._compared().get(DEFAULT), self._saves("8gaussians", DEFAULT, 0.0)
        said = f"POWER {self._tell('power', DEFAULT)}, BSDS300 {self._tell('bsds300', DEFAULT)}"
        if found:
            median = statistics.median(change for change, _ in found)
            said += f"; median over {plural(len(found), 'set')} of the experiments {percent(median)}"
        decisions.add(
            "evaluations count",
            "the default regularizer, if a run on the data at hand says so",
            said,
            "front",
            holds=self._saves("power", DEFAULT, 0.1),
        )
        decisions.add(
            "the last tenth of a nat counts",
            f"none, or a light `{light}`",
            f"POWER {self._tell('power', light, 3)}",
            "front",
            holds=self._saves("power", light, 0.02),
        )
        if (posterior := self._posterior()) is not None:
            decisions.add("a posterior of an auto-encoder", *posterior, "vae")
        decisions.add(
            "mass in separate pieces",
            "none",
            f"8gaussians: the default {self._tell('8gaussians', DEFAULT, 3)}",
            "log-density",
            holds=None if pieces is None else not pieces,
        )
        decisions.add(
            "as published, for reproduction", f"`{published}`", f"POWER {self._tell('power', published)}", "tpr"
        )


def cheapest(needed: pd.DataFrame, flow: str, column: str) -> tuple[str, float]:
    """Return the method that takes the fewest evaluations for an error on a flow, and how many they are."""
    known = needed.loc[flow][column].astype(float).dropna()
    return str(known.idxmin()), float(known.min())


def cheapest_anywhere(needed: pd.DataFrame, column: str) -> list[str]:
    """Return the methods that are the cheapest for an error on some flow, each once."""
    flows: Iterable[str] = needed.index.get_level_values(0).unique()
    known = [flow for flow in flows if needed.loc[flow][column].notna().any()]
    return list(dict.fromkeys(cheapest(needed, flow, column)[0] for flow in known))


__all__ = [
    *("MISSING", "Arms", "Benchmark", "Decisions", "GradientModes", "Precision", "Scaling"),
    *("cheapest", "cheapest_anywhere"),
]
