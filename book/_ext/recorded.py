"""Show the recorded experiments on the book's pages: one loader, one table and one list of sentences for any arms.

Pages import it by ``sys.path.insert(0, "_ext")`` and run in the folder ``book/``. A record that is not there is missing
from what :func:`recorded` returns; the pages say so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from pycnf.experiments.bench_results import PLAIN, BenchResult, load_bench, write_within
from pycnf.experiments.presets import get_preset, list_presets
from pycnf.regularizers import DEFAULT

RECORDS = Path("../results/experiments")
SHORT = {PLAIN: "none", "tpr:weight=5": "TPR as published", DEFAULT: "default"}
EQUAL = ("method", "rtol", "atol", "test_rtol", "test_atol", "test_divergence", "batch_size", "test_batch_size")
NARROW = "\u202f"  # a space where no line breaks
METRICS = ("nll", "nfe_test", "nfe_train", "nfe_train_last_200", "nfe_backward", "seconds", "error_rms")


@dataclass(frozen=True)
class Recorded:
    """Hold the runs of one set of a recorded experiment.

    Attributes:
        name: Name of the experiment, that of its folder.
        data: Name of the set.
        bench: All runs of the experiment.
    """

    name: str
    data: str
    bench: BenchResult

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The finished runs."""
        return [row for row in self.bench.rows if row["data"] == self.data and row["status"] == "finished"]

    @property
    def work(self) -> Mapping[str, Any]:
        """What was trained, and its own settings."""
        return self.rows[0]["configuration"].get("workload", {"kind": "table"})

    @property
    def setup(self) -> Mapping[str, Any]:
        """The settings that the arms share."""
        return self.rows[0]["configuration"]["setup"]

    @property
    def substitute(self) -> str | None:
        """The set that these data stand in for; None where they are what the experiment is named after."""
        if self.name not in list_presets():
            return None
        return get_preset(self.name).substituted(self.data)

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The summary: lines of the arms, then of the tolerance alone. It resamples the runs, so it is made once."""
        return self.bench.summary(self.data)

    @property
    def arms(self) -> list[dict[str, Any]]:
        """The summary's lines of the arms."""
        return [line for line in self.lines if "tolerance_alone" not in line]

    def describe(self) -> str:
        """Return what was run, in Markdown."""
        rows, setup, first = self.rows, self.setup, self.rows[0]
        seeds = len({row["seed"] for row in rows})
        blocks = setup["blocks"]
        net = f"{' × '.join(map(str, setup['hidden']))}, {setup['activation']}, {plural(blocks, 'block')}"
        stands = f" (*stands in for {self.substitute}, and is not {self.substitute}*)" if self.substitute else ""
        return (
            f"**{self.data}**{stands}: {plural(seeds, 'seed')}, hidden {net}, {first['parameters']:,} parameters; "
            f"at most {plural(setup['max_steps'], 'step')} of {setup['batch_size']:,} rows of {first['train_rows']:,}, "
            f"tested on {first['test_rows']:,}. Tolerance {write(first['rtol'])} in training, "
            f"{write(first['test_rtol'])} in test; divergence {first['divergence']} in training, "
            f"{first['test_divergence']} in test. "
            f"{first['device']}, torch {first['versions']['torch']}, {first['date'][:10]}."
        )

    def table(self, measures: Mapping[str, str] | None = None, unit: str = "nats") -> pd.DataFrame:
        """Return a column an arm: likelihood, evaluations and times, and further measures by key of a row."""
        more, columns = dict(measures or {}), {}
        found = {line["arm"]: line for line in self.bench.comparison(self.data).summary((*METRICS, *more))}
        for line in self.arms:
            own = found[line["arm"]]
            columns[short(line["arm"])] = {
                "seeds": str(line["n"]),
                f"held-out NLL ({unit})": amount(own["nll"], 3),
                "… against none": difference(own["nll"], 3),
                "within 1 SE": within(line),
                "NFE, test": amount(own["nfe_test"], 1),
                "… change": percent(own["nfe_test"].get("change")),
                "NFE, training": amount(own["nfe_train"], 1),
                "… change ": percent(own["nfe_train"].get("change")),
                "NFE, training, last 200 steps": amount(own["nfe_train_last_200"], 1),
                "RMS error of log p (nats)": "–"
                if own["error_rms"]["mean"] is None
                else f"{own['error_rms']['mean']:.0e}",
                "training (s)": amount(own["seconds"], 0),
                **{text: amount(own[key], 3) for key, text in more.items()},
            }
        return pd.DataFrame(columns)

    def sentences(self, unit: str = "nats") -> str:
        """Return what came out, one item an arm, in Markdown."""
        items = []
        for line in self.arms[1:]:
            if line["nfe_test"].get("change") is None:
                items.append(f"- {long(line['arm'])}: no run to compare is finished.")
                continue
            interval = line["nfe_test"].get("bootstrap")
            known = (
                ""
                if not interval or None in interval
                else f" (95 % from {percent(interval[0])} to {percent(interval[1])})"
            )
            changes = [percent(line[metric]["change"]) for metric in ("nfe_test", "nfe_train")]
            items.append(
                f"- {long(line['arm'])} changes the evaluations of a test by {changes[0]}{known}, those of training by "
                f"{changes[1]}, and the held-out NLL by {difference(line['nll'], 3)} {unit}: {VERDICTS[within(line)]}."
            )
        for line in self.lines:
            if "tolerance_alone" in line and line["nfe_test"].get("change") is not None:
                items.append(
                    f"- No regularizer at all, only a test at {write(line['tolerance_alone'])}: "
                    f"{percent(line['nfe_test']['change'])}."
                )
        return "\n".join(items)

    def pictures(self, what: str) -> list[tuple[str, Path]]:
        """Return the recorded pictures of a kind, such as samples, each with the arm that it shows."""
        folder, found = RECORDS / self.name, []
        for line in self.arms:
            part = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.data}-{line['arm']}").strip("-")[:80]  # as the run names it
            if (path := folder / f"{what}-{part}.png").is_file():
                found.append((short(line["arm"]), path))
        return found

    def check(self) -> None:
        """Require what every faithful run satisfies.

        Raises:
            AssertionError: Runs were not made alike, or hold impossible numbers.
        """
        rows = self.rows
        assert len({tuple(row[key] for key in EQUAL) for row in rows}) == 1, (
            f"{self.name}: unequal tolerance or batches"
        )
        assert len({row["steps"] for row in rows}) == 1 or self.setup["schedule"] == "plateau", f"{self.name}: steps"
        for row in rows:
            assert all(math.isfinite(row[key]) for key in ("nll", "nll_se", "nfe_test", "nfe_train", "seconds")), row
            assert min(row["nfe_test"], row["nfe_train"]) >= 7, "a solve of dopri5 takes seven evaluations at least"
            assert row["accepted"] >= 1


VERDICTS = {
    "yes": "not worse by more than one standard error, of the paired difference and of the plain model's mean",
    "paired": "not worse by more than the standard error of the paired difference, worse by more than the plain mean's",
    "unpaired": "not worse by more than the standard error of the plain mean, worse by more than the paired one",
    "no": "worse by more than one standard error",
    "–": "with too few seeds for a standard error",
}


def recorded(*kinds: str) -> list[Recorded]:
    """Return the recorded sets of some kinds of models ("table", "images", "vae"), in the order of the presets.

    A set without a finished plain run is left out: there is nothing to compare with.
    """
    order = list(list_presets())
    folders = [path for path in RECORDS.glob("*") if (path / "runs").is_dir() and any((path / "runs").glob("*.json"))]
    folders.sort(key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))
    found = []
    for folder in folders:
        bench = load_bench(folder)
        for data in bench.data:
            one = Recorded(folder.name, data, bench)
            if any(row["arm"] == PLAIN for row in one.rows) and one.work["kind"] in kinds:
                found.append(one)
    return found


def overview(sets: Sequence[Recorded], arms: Collection[str] | None = None) -> pd.DataFrame:
    """Return a row a set and arm, of these arms or of all: what each regularizer changes."""
    lines = []
    for one in sets:
        stands = f" (for {one.substitute})" if one.substitute else ""
        for line in one.arms[1:]:
            if line["nfe_test"].get("change") is not None and (arms is None or line["arm"] in arms):
                lines.append(
                    {
                        "set": ("VAE of " if one.work["kind"] == "vae" else "") + one.data + stands,
                        "arm": short(line["arm"]),
                        "seeds": line["n"],
                        "NFE test": percent(line["nfe_test"]["change"]),
                        "NFE training": percent(line["nfe_train"]["change"]),
                        "NLL (nats)": difference(line["nll"], 3),
                        "within 1 SE": within(line),
                    }
                )
    return pd.DataFrame(lines).set_index(["set", "arm"]) if lines else pd.DataFrame()


def lines_of(bench: BenchResult, data: str) -> dict[str, dict[str, Any]]:
    """Return the lines of a summary by arm; a summary resamples its runs, so it is made once."""
    return {line["arm"]: line for line in bench.summary(data)}


def short(arm: str) -> str:
    """Return an arm's name for a head of a table, which can be broken into lines."""
    return SHORT.get(arm, arm.replace(",", ", "))


def long(arm: str) -> str:
    """Return an arm's name for a sentence."""
    return f"{SHORT[arm]} (`{arm}`)" if arm in SHORT else f"`{arm}`"


def plural(count: int, word: str) -> str:
    """Write a number of things."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def percent(change: float | None) -> str:
    """Write a change."""
    return "" if change is None else f"{100 * change:+.1f}{NARROW}%".replace("-", "−")


def amount(values: Mapping[str, Any], digits: int) -> str:
    """Write a mean over seeds, with its standard deviation where there is one."""
    if values["mean"] is None:
        return "–"
    sd = values.get("sd")
    text = f"{values['mean']:,.{digits}f}" + (
        "" if sd is None or not math.isfinite(sd) else f"{NARROW}±{NARROW}{sd:,.{digits}f}"
    )
    return text.replace("-", "−")


def difference(values: Mapping[str, Any], digits: int) -> str:
    """Write a mean paired difference with its standard error."""
    if values.get("difference") is None:
        return ""
    se = values.get("difference_se")
    text = f"{values['difference']:+,.{digits}f}" + ("" if se is None else f"{NARROW}±{NARROW}{se:,.{digits}f}")
    return text.replace("-", "−")


def within(line: Mapping[str, Any]) -> str:
    """Say by which standard errors an arm is not worse than the plain one."""
    return write_within(line.get("within", {}))


def write(value: float) -> str:
    """Write a power of ten such as a tolerance."""
    mantissa, exponent = f"{value:.0e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if mantissa == "1" else f"{mantissa} · 10{raised}"


__all__ = ["RECORDS", "Recorded", "lines_of", "overview", "recorded"]
