"""What commands that try many methods share: options that list them, and a table that fits 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pycnf.experiments.arms import write_tolerance

WIDE = 110  # columns of a terminal from which tables have air between theirs


def split_list(text: str) -> tuple[str, ...]:
    """Split a list of an option at its commas, its spaces, or both.

    >>> split_list("dopri5, rk4,euler") == split_list("dopri5 rk4 euler") == ("dopri5", "rk4", "euler")
    True
    """
    return tuple(text.replace(",", " ").split())


def read_names(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Read names among those that are known.

    Raises:
        ValueError: On another name, or none.
    """
    found, allowed = split_list(text), tuple(known)
    for name in found or (text,):
        if name not in allowed:
            raise ValueError(f"{name!r} is not one of {', '.join(allowed)}")
    return found


def read_tolerances(text: str) -> tuple[float, ...]:
    """Read finite numbers > 0.

    Raises:
        ValueError: On anything else.

    >>> read_tolerances("1e-4,1e-6") == (1e-4, 1e-6)
    True
    """
    try:
        found = tuple(float(word) for word in split_list(text))
    except ValueError as err:
        raise ValueError(f"expected numbers separated by commas, such as 1e-4,1e-6, got {text!r}") from err
    if not found or not all(0 < value < math.inf for value in found):
        raise ValueError(f"expected finite numbers > 0, separated by commas, got {text!r}")
    return found


def read_counts(text: str) -> tuple[int, ...]:
    """Read whole numbers >= 1.

    Raises:
        ValueError: On anything else.

    >>> read_counts("4,8")
    (4, 8)
    """
    found = split_list(text)
    if not found or not all(word.isdigit() and int(word) for word in found):
        raise ValueError(f"expected whole numbers >= 1, separated by commas, such as 2,4,8, got {text!r}")
    return tuple(int(word) for word in found)


def write_setting(tolerance: float | None, n_steps: int | None) -> str:
    """Write what a method was solved with: its tolerance, or its number of equal steps.

    >>> write_setting(1e-4, None), write_setting(None, 16)
    ('1e-4', '16')
    """
    return str(n_steps) if tolerance is None else write_tolerance(tolerance, tolerance)


def write_order(seen: float | None, nominal: int) -> str:
    """Write an order as it was seen and, in brackets, as the method has it; nothing where none was seen.

    >>> write_order(4.93, 5), write_order(3.1, 0), write_order(float("nan"), 5)
    ('4.9 (5)', '3.1', '')
    """
    if seen is None or not seen > 0:
        return ""
    return f"{seen:.1f} ({nominal})" if nominal else f"{seen:.1f}"


def make_table(out: Console, title: str, heads: Sequence[str], caption: str | None = None) -> Table:
    """Return an empty table, its first column to the left and the others to the right.

    Args:
        out: Where it will be printed; narrow ones get no air between the columns.
        title: Title.
        heads: Heads of the columns, of one or two lines.
        caption: What is said below it.
    """
    table = Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1) if out.width >= WIDE else 0,
    )
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    return table
