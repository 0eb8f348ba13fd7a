"""Figures of images: grids of data, of samples, and of the way between two images, in the house style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from pycnf.images.flow import ImageFlow, interpolate
from pycnf.plots import house_figure
from pycnf.scale import evaluation_mode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = 0.55  # side of an image in a figure


def image_grid(
    images: Tensor,
    shape: Sequence[int] | None = None,
    *,
    columns: int = 10,
    levels: int = 256,
    title: str | None = None,
) -> Figure:
    """Draw images beside and below one another.

    Args:
        images: Levels 0 to ``levels`` - 1 of N images, (N, C, H, W) or, with ``shape``, flat (N, C H W); C is 1 (gray)
            or 3 (red, green, blue).
        shape: Shape (C, H, W) of flat images.
        columns: Images in a row.
        levels: Number of levels.
        title: Title of the figure.

    Raises:
        ValueError: When there are no images, or they are neither gray nor colored.
    """
    if shape is not None:
        images = images.unflatten(-1, tuple(shape))
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0 or columns < 1:
        raise ValueError(
            f"expected images of shape (N, 1 or 3, H, W), N >= 1, and columns >= 1, got {tuple(images.shape)} and "
            f"{columns}"
        )
    across = min(columns, len(images))
    missing = -len(images) % across
    shades = images.detach().cpu().float() / (levels - 1)
    framed = functional.pad(shades.clamp(0, 1), (1, 1, 1, 1), value=0.5)
    framed = torch.cat([framed, framed.new_full((missing, *framed.shape[1:]), 0.5)])
    down, (channels, height, width) = len(framed) // across, framed.shape[1:]
    sheet = framed.view(down, across, channels, height, width).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(down * height, across * width, channels)
    size = (INCHES * across, INCHES * down * height / width)
    with house_figure(1, title, width=size[0], height=size[1] + (0.3 if title else 0.0)) as (figure, (axes,)):
        axes.imshow(sheet.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
    return figure


def sample_grid(
    flow: ImageFlow,
    n: int = 100,
    *,
    columns: int = 10,
    seed: int = 0,
    context: Tensor | None = None,
    title: str | None = None,
) -> Figure:
    """Draw samples of a flow of images, solved as in evaluation mode.

    Args:
        flow: The flow.
        n: Number of samples.
        columns: Images in a row.
        seed: Seed of the samples.
        context: Context (n, C) of a conditional flow.
        title: Title of the figure.
    """
    with torch.random.fork_rng(devices=_devices(flow)), evaluation_mode(flow):
        torch.manual_seed(seed)
        images = flow(context).sample((n,) if context is None else ())
    return image_grid(images, flow.shape, columns=columns, levels=flow.logit.levels, title=title)


def interpolation_grid(
    flow: ImageFlow,
    a: Tensor,
    b: Tensor,
    *,
    steps: int = 10,
    seed: int = 0,
    context: Tensor | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the way between images by way of their latents, one pair a row (:func:`~pycnf.images.flow.interpolate`).

    Args:
        flow: The flow, solved as in evaluation mode.
        a: Images on the left, flat (N, D).
        b: Images on the right, flat (N, D).
        steps: Images in a row, the two ends included.
        seed: Seed of the noise of the levels.
        context: Context (N, C) of a conditional flow.
        title: Title of the figure.
    """
    with torch.random.fork_rng(devices=_devices(flow)), evaluation_mode(flow):
        torch.manual_seed(seed)
        images = interpolate(flow, a, b, steps, context)
    rows = images.transpose(0, 1).flatten(0, 1)
    return image_grid(rows, flow.shape, columns=steps, levels=flow.logit.levels, title=title)


def _devices(flow: ImageFlow) -> list[torch.device]:
    device = next(flow.parameters()).device
    return [device] if device.type == "cuda" else []


__all__ = ["image_grid", "interpolation_grid", "sample_grid"]
