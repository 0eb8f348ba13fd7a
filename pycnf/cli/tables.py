"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pycnf.experiments import ComparisonResult
from pycnf.experiments.arms import write_tolerance
from pycnf.experiments.results import write_cell

Row = Mapping[str, Any]


def console() -> Console:
    """Return a console on stdout, as wide as its terminal and wide enough for a table in a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(found.width, 150))


def comparison_table(result: ComparisonResult, tolerance: str, *, narrow: bool = False) -> Table:
    """Return a row per arm: likelihood, evaluations, steps and time, and the change against the first arm.

    Args:
        result: The comparison.
        tolerance: The tolerance in words.
        narrow: Whether to save width, for a terminal of 80 columns.
    """
    title = f"{result.data}, {tolerance}; mean ± sd over {len(result.seeds)} seed(s)"
    if not result.equal_tolerance:
        title += "\nUNEQUAL tolerances: not a fair comparison"
    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=0 if narrow else (0, 1),
        caption="NFE: function evaluations of a batch; steps: those of the test; in brackets: the change "
        "against the first arm",
        caption_justify="left",
    )
    table.add_column("arm", overflow="fold")
    for name in (
        *("held-out\nNLL (nats)", "NFE train\nforward", "NFE train\nbackward", "NFE\ntest"),
        *("steps\naccepted", "steps\nrejected", "training\n(s)"),
    ):
        table.add_column(name, justify="right")
    between = "\n" if narrow else " "
    for line in result.summary():
        failed = f"\n({line['failed']} of {len(result.seeds)} failed)" if line["failed"] else ""
        table.add_row(
            line["arm"] + failed,
            write_cell(line["nll"], 4, between=between, below="\n"),
            *(
                write_cell(line[name], 1, between=between, below="\n")
                for name in ("nfe_train", "nfe_backward", "nfe_test")
            ),
            *(write_cell(line[name], 1, between=between, change=False) for name in ("accepted", "rejected")),
            write_cell(line["seconds"], 1, between=between, below="\n"),
        )
    return table


def tolerance_table(result: ComparisonResult) -> Table | None:
    """Return what the test tolerance alone does to the evaluations of each arm; None if not tried."""
    summary = result.summary()
    tolerances = [(t["rtol"], t["atol"]) for t in next((s["tolerances"] for s in summary if s["tolerances"]), [])]
    if not tolerances:
        return None
    table = Table(title="evaluations of a test batch at other test tolerances", box=SIMPLE_HEAD)
    table.add_column("arm", overflow="fold")
    for pair in tolerances:
        table.add_column(write_tolerance(*pair), justify="right")
    for line in summary:
        found = {(t["rtol"], t["atol"]): t["nfe"] for t in line["tolerances"]}
        table.add_row(line["arm"], *(write_cell(found.get(pair, {}), 1) for pair in tolerances))
    return table


def facts_table(title: str, facts: Mapping[str, str]) -> Table:
    """Return a table of names and values."""
    table = Table(title=title, box=None, show_header=False, title_justify="left", padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def run_facts(row: Row) -> dict[str, str]:
    """Return what a trained and tested flow came to, in words."""
    return {
        "held-out NLL": f"{row['nll']:.4f} nats, standard error {row['nll_se']:.4f}",
        "evaluations in training": f"{row['nfe_train']:.1f} forward, {row['nfe_backward']:.1f} backward",
        "evaluations in test": f"{row['nfe_test']:.1f} a batch",
        "steps in test": f"{row['accepted']:.1f} accepted, {row['rejected']:.1f} rejected a batch",
        "training": f"{row['steps']:,} steps in {row['seconds']:.1f} s on {row['device']}",
    }


def data_table(rows: Sequence[Row]) -> Table:
    """Return the list of data sets."""
    table = Table(box=SIMPLE_HEAD)
    for name, justify in (("name", "left"), ("features", "right"), ("rows", "right"), ("license", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("present", overflow="fold")
    table.add_column("what it is", overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["features"]),
            f"{row['rows']:,}",
            row["license"],
            row["where"],
            row["summary"],
        )
    return table
