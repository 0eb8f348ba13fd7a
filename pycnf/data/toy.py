"""Draw from the eight two-dimensional densities of the TPR paper, in the scaling of FFJORD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from pycnf.data.checks import DataError
from pycnf.data.dataset import Dataset

Points = NDArray[np.floating[Any]]
SIZES = (50_000, 5_000, 10_000)
"""Numbers of training, validation and test rows that `load` draws."""


def _polar(radius: Points | float, angle: Points) -> Points:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _angles(n: int, rng: Generator) -> Points:
    return rng.uniform(0.0, 2 * np.pi, n)


def _rings(n: int, rng: Generator) -> Points:
    """Four concentric rings of equal mass with radii 0.75, 1.5, 2.25, 3 and noise 0.08."""
    radius = 0.75 * rng.integers(1, 5, n)
    return _polar(radius, _angles(n, rng)) + 0.08 * rng.standard_normal((n, 2))


def _eight_gaussians(n: int, rng: Generator) -> Points:
    """Eight Gaussians of deviation 1/√8 whose centers divide a circle of radius 4/√2."""
    centers = _polar(4.0, rng.integers(0, 8, n) * (np.pi / 4))
    return (centers + 0.5 * rng.standard_normal((n, 2))) / np.sqrt(2)


def _checkerboard(n: int, rng: Generator) -> Points:
    """Draw uniformly from the eight cells of one color of a 4 × 4 board that covers [-4, 4]²."""
    column = rng.integers(0, 4, n)
    row = 2 * rng.integers(0, 2, n) + column % 2
    return 2 * (np.stack([column, row], axis=1) + rng.random((n, 2))) - 4


def _circles(n: int, rng: Generator) -> Points:
    """Two concentric circles of equal mass with radii 3 and 1.5 and noise 0.24."""
    radius = np.where(rng.random(n) < 0.5, 1.0, 0.5)
    return 3 * (_polar(radius, _angles(n, rng)) + 0.08 * rng.standard_normal((n, 2)))


def _moons(n: int, rng: Generator) -> Points:
    """Two half circles, one upside down and shifted by (1, 1/2), with noise 0.1; doubled and centered."""
    arc = _polar(1.0, rng.uniform(0.0, np.pi, n))
    lower = rng.random(n) < 0.5
    arc[lower] = np.array([1.0, 0.5]) - arc[lower]
    return 2 * (arc + 0.1 * rng.standard_normal((n, 2))) + np.array([-1.0, -0.2])


def _pinwheel(n: int, rng: Generator) -> Points:
    """Five arms: Gaussians at (1, 0), deviations 0.3 and 0.1, turned by an angle that grows outwards."""
    x = np.array([0.3, 0.1]) * rng.standard_normal((n, 2)) + np.array([1.0, 0.0])
    angle = rng.integers(0, 5, n) * (2 * np.pi / 5) + 0.25 * np.exp(x[:, 0])
    cos, sin = np.cos(angle), np.sin(angle)
    return 2 * np.stack([x[:, 0] * cos + x[:, 1] * sin, x[:, 1] * cos - x[:, 0] * sin], axis=1)


def _swissroll(n: int, rng: Generator) -> Points:
    """Draw from the spiral (t cos t, t sin t) with t uniform on [3π/2, 9π/2] and noise 1; divided by 5."""
    t = rng.uniform(1.5 * np.pi, 4.5 * np.pi, n)
    return (_polar(t, t) + rng.standard_normal((n, 2))) / 5


def _two_spirals(n: int, rng: Generator) -> Points:
    """Two arms ±(-t cos t, t sin t), t = 3π√u, with uniform noise up to 1/2; divided by 3, noise 0.1."""
    t = 3 * np.pi * np.sqrt(rng.random(n))
    arm = np.stack([-t * np.cos(t), t * np.sin(t)], axis=1) + 0.5 * rng.random((n, 2))
    sign = np.where(rng.random(n) < 0.5, 1.0, -1.0)
    return sign[:, None] * arm / 3 + 0.1 * rng.standard_normal((n, 2))


TOYS: dict[str, tuple[Callable[[int, Generator], Points], str]] = {
    "rings": (_rings, "four concentric rings"),
    "8gaussians": (_eight_gaussians, "eight Gaussians on a circle"),
    "checkerboard": (_checkerboard, "one color of a 4 × 4 board"),
    "circles": (_circles, "two concentric circles"),
    "moons": (_moons, "two interleaved half circles"),
    "pinwheel": (_pinwheel, "five curved arms"),
    "swissroll": (_swissroll, "one spiral"),
    "2spirals": (_two_spirals, "two interleaved spirals"),
}
"""Sampler and description of each density."""


def sample_toy(name: str, n: int, seed: int | Generator = 0) -> torch.Tensor:
    """Draw points of a two-dimensional density.

    >>> torch.equal(sample_toy("moons", 5, seed=1), sample_toy("moons", 5, seed=1))
    True

    Args:
        name: One of `TOYS`.
        n: Number of points.
        seed: Seed, or a NumPy generator to draw from.

    Returns:
        Independent points, float32, shape (n, 2).

    Raises:
        DataError: If there is no density of this name, or n is negative.

    References:
        Grathwohl et al., FFJORD, ICLR 2019 (the scaling).
        Huang and Yeh, Accelerating Continuous Normalizing Flow with Trajectory Polynomial Regularization,
        AAAI 2021.
    """
    if name not in TOYS:
        raise DataError(f"no toy density is called {name!r}; there are {', '.join(TOYS)}")
    if n < 0:
        raise DataError(f"expected a number of points n ≥ 0, got {n}")
    draw, _ = TOYS[name]
    return torch.from_numpy(draw(n, np.random.default_rng(seed)).astype(np.float32))


def load_toy(name: str, seed: int = 0, sizes: tuple[int, int, int] = SIZES) -> Dataset:
    """Draw a set of training, validation and test points of a two-dimensional density.

    Args:
        name: One of `TOYS`.
        seed: Seed; the three parts are independent of one another.
        sizes: Numbers of training, validation and test points.

    Returns:
        The set, not standardized.

    Raises:
        DataError: If there is no density of this name.
    """
    streams = np.random.default_rng(seed).spawn(3)
    train, validation, test = (sample_toy(name, n, rng) for n, rng in zip(sizes, streams, strict=True))
    return Dataset(
        name=name,
        train=train,
        validation=validation,
        test=test,
        columns=("x0", "x1"),
        source=f"drawn with seed {seed}: {TOYS[name][1]}",
        notes="scaling of FFJORD, not standardized",
    )
