"""How a flow of images is laid out: stages of blocks, squeezes between them, and channels that leave at every scale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pycnf.images.pieces import squeeze, unsqueeze

Shape = tuple[int, int, int]
Move = Callable[[int, Tensor], Tensor]
"""Blocks of a stage: its number and flat images ``(*, D)`` to flat images ``(*, D)``."""
SMALLEST = 4  # height and width down to which images are squeezed where the number of scales is not given


class Stage(NamedTuple):
    """Describe blocks that move images of one shape (C, H, W), and what happens to the images after them."""

    shape: Shape
    then: Literal["squeeze", "split", "end"]


def plan(shape: Shape, scales: int | None = None) -> tuple[Stage, ...]:
    """Lay out the stages of a multiscale flow.

    Args:
        shape: Shape (C, H, W) of the images.
        scales: Number of scales; None for as many as leave height and width whole and at least 4.

    Returns:
        Two stages a scale, before and after its squeeze, and one for the last scale.

    Raises:
        ValueError: When the images cannot be halved so often.

    >>> [stage.shape for stage in plan((1, 28, 28))]
    [(1, 28, 28), (4, 14, 14), (2, 14, 14), (8, 7, 7), (4, 7, 7)]
    """
    if scales is not None and scales < 1:
        raise ValueError(f"expected scales >= 1, got {scales}")
    stages: list[Stage] = []
    channels, height, width = shape
    for number in itertools.count(1):
        even = height % 2 == 0 and width % 2 == 0
        if number == scales or (scales is None and (not even or min(height, width) < 2 * SMALLEST)):
            break
        if not even:
            raise ValueError(
                f"images of {shape[1]} x {shape[2]} pixels can be halved {number - 1} times: "
                f"take scales <= {number}, got {scales}"
            )
        stages.append(Stage((channels, height, width), "squeeze"))
        height, width = height // 2, width // 2
        stages.append(Stage((4 * channels, height, width), "split"))
        channels *= 2
    return (*stages, Stage((channels, height, width), "end"))


def encode(stages: Sequence[Stage], y: Tensor, move: Move) -> Tensor:
    """Carry images through the stages.

    Args:
        stages: What :func:`plan` returned.
        y: Flat images ``(*, D)``.
        move: Blocks of a stage.

    Returns:
        The latent ``(*, D)``: what left at each scale, then what is left at the end.
    """
    gone: list[Tensor] = []
    for number, stage in enumerate(stages):
        y = move(number, y)
        if stage.then == "squeeze":
            y = squeeze(y, stage.shape)
        elif stage.then == "split":
            y, out = y.chunk(2, dim=-1)
            gone.append(out)
    return torch.cat([*gone, y], dim=-1)


def decode(stages: Sequence[Stage], z: Tensor, move: Move) -> Tensor:
    """Undo :func:`encode`, with blocks that undo its blocks."""
    sizes = [math.prod(stage.shape) // 2 for stage in stages if stage.then == "split"]
    *gone, y = z.split([*sizes, z.shape[-1] - sum(sizes)], dim=-1)
    for number, stage in reversed(list(enumerate(stages))):
        if stage.then == "squeeze":
            y = unsqueeze(y, stage.shape)
        elif stage.then == "split":
            y = torch.cat([y, gone.pop()], dim=-1)
        y = move(number, y)
    return y


__all__ = ["Move", "Shape", "Stage", "decode", "encode", "plan"]
