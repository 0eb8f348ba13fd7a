"""Configuration files: options of a command in TOML or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the values of options from a TOML or YAML file; those on the command line win."""
    if path is None:
        return None
    values = {key.replace("-", "_"): value for key, value in _parse(path).items()}
    options = {str(p.name): p for p in ctx.command.params if p.name not in ("config", "help", "version")}
    names = {name.removeprefix("as_"): name for name in options}
    unknown = [key for key in values if key not in names]
    if unknown:
        known = ", ".join(name.replace("_", "-") for name in names)
        raise typer.BadParameter(f"{path} gives an unknown option {unknown[0]!r}; there are: {known}")
    flat = {names[key]: _flat(value, options[names[key]]) for key, value in values.items()}
    ctx.default_map = {**(ctx.default_map or {}), **flat}
    return path


def _parse(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise typer.BadParameter(f"cannot read {path}: {getattr(err, 'strerror', None) or err}") from err
    try:
        if path.suffix.lower() in (".yaml", ".yml"):
            import yaml

            values = yaml.safe_load(text)
        else:
            import tomllib

            values = tomllib.loads(text)
    except Exception as err:  # each parser has its own
        raise typer.BadParameter(f"cannot read {path}: {' '.join(str(err).split())}") from err
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} gives no options: write one option and its value a line")
    return {str(key): value for key, value in values.items()}


def _flat(value: Any, option: Any) -> Any:
    """Write a value as it would stand on the command line; a list of one keeps its comma."""
    if getattr(option, "multiple", False):
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, list):
        return ",".join(str(item) for item in value) + ("," if len(value) == 1 else "")
    return value
