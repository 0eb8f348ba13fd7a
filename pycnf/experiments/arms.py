"""Arms of a comparison: a regularizer each and, only where asked for by name, a tolerance of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pycnf.experiments.setup import Setup
from pycnf.regularizers import Regularizer, describe_regularizers, parse_regularizers


@dataclass(frozen=True)
class Arm:
    """Hold one arm of a comparison.

    Attributes:
        label: Name in tables, figures and records.
        regularizer: The regularizers as :func:`~pycnf.regularizers.base.parse_regularizers` reads them.
        terms: The regularizers.
        setup: What it is trained and tested with.
    """

    label: str
    regularizer: str
    terms: tuple[Regularizer, ...]
    setup: Setup

    @property
    def slug(self) -> str:
        """Name in file names."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-")[:60]

    @property
    def tolerance(self) -> tuple[float, float, float, float]:
        """Tolerances (rtol, atol) in training and in test."""
        return self.setup.rtol, self.setup.atol, self.setup.test_rtol, self.setup.test_atol


def parse_arms(specs: str | Sequence[str], setup: Setup, *, allow_unequal_tolerance: bool = False) -> tuple[Arm, ...]:
    """Read the arms of a comparison, such as ``"none tpr:weight=5 tpr:weight=50,degree=1"``.

    A tolerance of an arm's own follows its regularizer after an ``@``: ``none@1e-6`` is trained and tested at
    rtol = atol = 1e-6, ``none@1e-6/1e-8`` at rtol = 1e-6 and atol = 1e-8, ``none@1e-4:1e-6`` is trained at
    1e-4 and tested at 1e-6.

    Args:
        specs: Regularizers separated by white space, or a sequence of them.
        setup: What all arms have in common.
        allow_unequal_tolerance: Accept arms at different tolerances; each label then tells its tolerance.

    Raises:
        ValueError: On no arm, an arm given twice, an unreadable one, or unequal tolerances.

    >>> [arm.label for arm in parse_arms("none tpr:weight=5", Setup())]
    ['none', 'tpr:weight=5']
    """
    words = [word for spec in ([specs] if isinstance(specs, str) else specs) for word in spec.split()]
    if not words:
        raise ValueError("expected at least one regularizer, such as none or tpr:weight=5")
    arms = tuple(_parse_arm(word, setup) for word in words)
    tolerances = {arm.tolerance for arm in arms}
    if len(tolerances) > 1:
        if not allow_unequal_tolerance:
            described = "; ".join(f"{arm.regularizer} {describe_tolerance(arm.setup)}" for arm in arms)
            raise ValueError(
                f"arms at different tolerances cannot be compared fairly ({described}): drop the @..., "
                "or ask for it by name with allow_unequal_tolerance=True (--allow-unequal-tolerance)"
            )
        arms = tuple(dataclasses.replace(a, label=f"{a.regularizer}@{_short_tolerance(a.setup)}") for a in arms)
    for i, arm in enumerate(arms):
        if arm.label in [other.label for other in arms[:i]]:
            raise ValueError(f"the arm {arm.label!r} was given twice")
    return arms


def parse_seeds(seeds: int | str | Sequence[int]) -> tuple[int, ...]:
    """Read seeds: an integer N means 0 ... N-1, a list such as ``"0,3,7"`` exactly these.

    Raises:
        ValueError: On no seed, a negative one, or one given twice.

    >>> parse_seeds(3), parse_seeds("0,3,7"), parse_seeds("7,")
    ((0, 1, 2), (0, 3, 7), (7,))
    """
    try:
        if isinstance(seeds, str):
            words = seeds.replace(" ", "").split(",")
            seeds = int(words[0]) if len(words) == 1 else [int(word) for word in words if word]
        if isinstance(seeds, int):
            found = tuple(range(seeds))
        else:
            found = tuple(int(seed) for seed in seeds)
    except ValueError as err:
        raise ValueError(f"expected a number of seeds, or seeds such as 0,3,7, got {seeds!r}") from err
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(f"expected at least one seed, all different and >= 0, got {seeds!r}")
    return found


def describe_tolerance(setup: Setup) -> str:
    """Say in words at which tolerances a setup is trained and tested, or with how many steps."""
    if not setup.adaptive:
        return f"{setup.n_steps} equal steps in training and test"
    train = write_tolerance(setup.rtol, setup.atol)
    return f"tolerance {train} in training, {write_tolerance(setup.test_rtol, setup.test_atol)} in test"


def write_tolerance(rtol: float, atol: float) -> str:
    """Write a pair of tolerances as an arm takes it.

    >>> write_tolerance(1e-4, 1e-4), write_tolerance(1e-6, 2.5e-8)
    ('1e-4', '1e-6/2.5e-8')
    """
    short = [
        f"{float(mantissa):g}e{int(exponent)}"
        for mantissa, exponent in (f"{value:.3e}".split("e") for value in (rtol, atol))
    ]
    return short[0] if rtol == atol else "/".join(short)


def _parse_arm(word: str, setup: Setup) -> Arm:
    spec, _, tolerance = word.partition("@")
    terms = tuple(parse_regularizers(spec))
    if tolerance or word.endswith("@"):
        own: dict[str, Any] = _parse_tolerance(tolerance, word)
        setup = dataclasses.replace(setup, **own)
    name = describe_regularizers(terms)
    return Arm(name, name, terms, setup)


def _parse_tolerance(text: str, word: str) -> dict[str, float]:
    train, _, test = text.partition(":")
    values = []
    for part in (train, test or train):
        rtol, _, atol = part.partition("/")
        try:
            values += [float(rtol), float(atol or rtol)]
        except ValueError as err:
            raise ValueError(
                f"cannot read the tolerance of {word!r}: write REGULARIZER@RTOL, @RTOL/ATOL or @TRAINING:TEST"
            ) from err
    return dict(zip(("rtol", "atol", "test_rtol", "test_atol"), values, strict=True))


def _short_tolerance(setup: Setup) -> str:
    train = write_tolerance(setup.rtol, setup.atol)
    test = write_tolerance(setup.test_rtol, setup.test_atol)
    return train if train == test else f"{train}:{test}"
