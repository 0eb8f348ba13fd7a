"""Budgets of benchmarks: which sets, arms, seeds, steps and models, as tables that can be read and replaced."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycnf.experiments.setup import Setup
from pycnf.experiments.workloads import TABLES, Workload

TABLE = Path(__file__).with_name("budgets.toml")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Hold what a benchmark runs.

    Attributes:
        name: Name.
        about: What it is for.
        regularizers: The arms, as :func:`~pycnf.experiments.arms.parse_arms` reads them.
        seeds: Number of seeds.
        tolerances: Test tolerances at which evaluations and errors are measured, beside that of the test.
        sweep_rows: Test rows on which they are.
        truth_rows: Rows of these at which the error of log p is measured.
        settings: Settings of :class:`~pycnf.experiments.setup.Setup` for every set.
        data: Settings by set, which go before those for every set and those of the set's preset.
        work: What is trained, and how it is tested.
        figures: Whether to draw what the model of each arm has learned with the first seed.
    """

    name: str
    about: str
    regularizers: tuple[str, ...]
    data: dict[str, dict[str, Any]]
    seeds: int = 3
    tolerances: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
    sweep_rows: int = 2000
    truth_rows: int = 500
    settings: dict[str, Any] = field(default_factory=dict)
    work: Workload = TABLES
    figures: bool = False

    def settings_for(self, data: str, more: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings for a set, listed here or not, with those of ``more`` that are not None on top."""
        given = {name: value for name, value in more.items() if value is not None}
        return self.settings | self.data.get(data, {}) | given


def read_budget(name: str | Path) -> Budget:
    """Read a budget: one of the shipped table by its name, or the only one in a TOML file of the same form.

    Raises:
        ValueError: There is no such budget, or its table has an unknown or missing entry.

    >>> "power" in read_budget("small").data
    True
    """
    path = Path(name) if Path(name).suffix == ".toml" else TABLE
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise ValueError(f"cannot read the budget {path}: {err}") from err
    if path == TABLE and name not in tables:
        raise ValueError(f"unknown budget {str(name)!r}: choose {', '.join(tables)}, or a .toml file of that form")
    if path != TABLE and len(tables) != 1:
        raise ValueError(f"expected one budget in {path}, got {len(tables)}: {', '.join(tables)}")
    key = str(name) if path == TABLE else next(iter(tables))
    return _budget(key, tables[key], path)


def budget_names() -> tuple[str, ...]:
    """List the shipped budgets."""
    return tuple(tomllib.loads(TABLE.read_text(encoding="utf-8")))


def _budget(name: str, table: Any, path: Path) -> Budget:
    known = {f.name for f in dataclasses.fields(Budget)} - {"name", "work", "figures"}
    settings = {f.name for f in dataclasses.fields(Setup)}
    where = f"the budget {name!r} of {path.name}"
    if not isinstance(table, dict) or (unknown := table.keys() - known):
        found = repr(sorted(unknown)[0]) if isinstance(table, dict) else repr(table)
        raise ValueError(f"{where} has an unknown entry {found}: expected {', '.join(sorted(known))}")
    if missing := {"about", "regularizers", "data"} - table.keys():
        raise ValueError(f"{where} lacks {sorted(missing)[0]!r}")
    for part in (table.get("settings", {}), *table["data"].values()):
        if unknown := part.keys() - settings:
            raise ValueError(f"{where} has an unknown setting {sorted(unknown)[0]!r}: see pycnf.experiments.Setup")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return Budget(name=name, **values)


__all__ = ["Budget", "budget_names", "read_budget"]
