"""Draw bars and rings, the small pictures that the book's pages train on.

Pages import it by ``sys.path.insert(0, "_ext")``. A seed gives the same shapes in gray and in black and white.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


def gray_shapes(n: int, seed: int, size: int = 8) -> Tensor:
    """Draw n images of a bar or a ring each: whole gray levels 0 to 255, shape (n, size * size)."""
    distance, generator = _distances(n, seed, size)
    ground = 20 * torch.rand(n, 1, 1, generator=generator)
    return (220 * torch.exp(-((distance / 0.22) ** 2)) + ground).round().flatten(1)


def binary_shapes(n: int, seed: int, size: int = 8) -> Tensor:
    """Draw n pictures of a bar or a ring each: pixels 0 and 1, shape (n, size * size)."""
    return (_distances(n, seed, size)[0] < 0.2).float().flatten(1)


def _distances(n: int, seed: int, size: int) -> tuple[Tensor, Generator]:
    """Return the distance of each pixel from its shape's line, (n, size, size), and the generator that drew the shapes.

    A bar has any direction and passes near the middle; a ring has its center there and a radius from 0.4 to 0.7 of half
    the side.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    angle = uniform(0, math.pi)
    bar = (torch.cos(angle) * x + torch.sin(angle) * y - uniform(-0.3, 0.3)).abs()
    ring = (torch.hypot(x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2)) - uniform(0.4, 0.7)).abs()
    return torch.where(uniform(0, 1) < 0.5, bar, ring), generator


__all__ = ["binary_shapes", "gray_shapes"]
