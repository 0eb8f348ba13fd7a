"""Settings of experiments by their names: read from words, checked against the classes that hold them."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

from pycnf.experiments.budgets import Budget

FIXED = frozenset({"name", "about", "data", "settings", "work", "figures"})
"""Entries of a budget that a preset says itself."""


def settable(*classes: type) -> dict[str, Any]:
    """Return the types of the settings that dataclasses hold, by name; of a budget those that a user may choose.

    >>> settable(Budget)["seeds"]
    <class 'int'>
    """
    return {
        field.name: hints[field.name]
        for cls in classes
        for hints in (typing.get_type_hints(cls),)
        for field in dataclasses.fields(cls)
        if not (cls is Budget and field.name in FIXED)
    }


def read_settings(words: Iterable[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` words; a value is written as in TOML, and a word without quotes is text.

    Raises:
        ValueError: A word has no name or no value, or a name is given twice.

    >>> read_settings(["epochs=10", "hidden=[64, 64]", "lr=1e-3", "dequantization=variational"])
    {'epochs': 10, 'hidden': [64, 64], 'lr': 0.001, 'dequantization': 'variational'}
    """
    found = dict[str, Any]()
    for word in words:
        name, _, text = (part.strip() for part in word.partition("="))
        if not name or not text:
            raise ValueError(f"expected a setting as NAME=VALUE, such as epochs=10, got {word!r}")
        if name in found:
            raise ValueError(f"the setting {name} is given twice")
        try:
            found[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = text
    return found


def check_settings(values: Mapping[str, Any], types_by_name: Mapping[str, Any], of: str) -> None:
    """Refuse settings that are unknown or of another type than theirs.

    Raises:
        ValueError: With the name, what is expected, and what was given.
    """
    for name, value in values.items():
        if name not in types_by_name:
            raise ValueError(f"unknown setting {name!r} of {of}: choose among {', '.join(types_by_name)}")
        if not _fits(value, types_by_name[name]):
            raise ValueError(f"{name} of {of}: expected {_describe(types_by_name[name])}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(one, inner[0]) for one in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "nothing"}
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(one) for one in inner if one is not types.NoneType)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin is tuple:
        return f"a list such as [{'64, 64' if inner[0] is int else '0.001, 0.0001' if inner[0] is float else 'none'}]"
    return names[hint]


__all__ = ["check_settings", "read_settings", "settable"]
