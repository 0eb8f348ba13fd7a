"""The experiments of the TPR paper by name: readable settings in two budgets, the paper's and one for two cores."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("presets.toml")
BUDGETS = ("small", "paper")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Hold an experiment.

    Attributes:
        name: Name.
        kind: What is trained: "table", "images" or "vae".
        about: The data, in words.
        fetch: Command that gets the data, None where they are always there.
        budgets: All settings by budget, "small" and "paper".
    """

    name: str
    kind: str
    about: str
    fetch: str | None
    budgets: Mapping[str, Mapping[str, Any]]

    def settings(self, budget: str, data: str | None = None) -> dict[str, Any]:
        """Return the settings of a budget, on one of its sets if it has settings of its own.

        Raises:
            ValueError: On an unknown budget.

        >>> [list_presets()["power"].settings("small", data)["max_steps"] for data in ("power-full", "power")]
        [4000, 1000]
        """
        if budget not in self.budgets:
            raise ValueError(f"unknown budget {budget!r}: choose {' or '.join(BUDGETS)}")
        values = dict(self.budgets[budget])
        own = values.pop("on", {})
        return values | own.get(data, {})

    def data(self, budget: str) -> tuple[str, ...]:
        """Return the sets that a budget can be run on, the preferred one first."""
        named = self.settings(budget).get("data", self.name)
        return (named,) if isinstance(named, str) else tuple(named)

    def substituted(self, data: str, budget: str = "small") -> str | None:
        """Return the set that one of a budget's sets stands in for, None for the preferred one.

        >>> [list_presets()["gas"].substituted(data) for data in ("gas", "gas-drift")]
        [None, 'gas']
        """
        preferred, *others = self.data(budget)
        return preferred if data in others else None


@functools.cache
def list_presets() -> Mapping[str, Preset]:
    """Return the presets by name.

    >>> list_presets()["vae-caltech"].settings("paper")["hidden"]
    [2048]
    """
    tables = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    shared = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    found = {}
    for key, table in tables.items():
        if isinstance(table, dict):
            for name in table.get("names", [key]):
                found[name] = _preset(name, table, tables, shared)
    return found


def get_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        ValueError: On an unknown name, with those that there are.
    """
    if name not in list_presets():
        raise ValueError(f"unknown experiment {name!r}: choose one of {', '.join(list_presets())}")
    return list_presets()[name]


def _preset(name: str, table: Mapping[str, Any], tables: Mapping[str, Any], shared: Mapping[str, Any]) -> Preset:
    like = tables.get(table.get("like", ""), {})
    paper = {**shared, **like.get("paper", {}), **table.get("paper", {})}
    small = {**paper, **like.get("small", {}), **table.get("small", {})}
    return Preset(
        name=name,
        kind=table.get("kind") or like["kind"],
        about=table["about"],
        fetch=table.get("fetch"),
        budgets={"small": small, "paper": paper},
    )


__all__ = ["BUDGETS", "Preset", "get_preset", "list_presets"]
