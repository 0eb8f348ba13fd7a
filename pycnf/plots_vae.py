"""Figures of a variational auto-encoder: reconstructions and samples as grids of pictures, in the house style."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pycnf.plots_images import image_grid
from pycnf.scale import evaluation_mode
from pycnf.training.batches import preserved_rng
from pycnf.vae.model import VAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reconstruction_grid(vae: VAE, x: Tensor, *, columns: int = 10, seed: int = 0, title: str | None = None) -> Figure:
    """Draw pictures, and below each what the decoder expects of a sample of its posterior.

    Args:
        vae: The model, taken in evaluation mode.
        x: Pictures (N, pixels) in [0, 1].
        columns: Pictures in a row.
        seed: Seed of the posterior samples.
        title: Title of the figure.
    """
    with _seeded(seed, vae):
        again = vae.reconstruct(x.to(next(vae.parameters()))).to(x)
    columns = min(columns, len(x))
    blank = x.new_full((-len(x) % columns, x.shape[1]), 0.5)
    rows = [torch.cat([part, blank]).unflatten(0, (-1, columns)) for part in (x, again)]
    return _grid(torch.stack(rows, dim=1).flatten(0, 2), vae, columns, title)


def sample_grid(vae: VAE, n: int = 60, *, columns: int = 10, seed: int = 0, title: str | None = None) -> Figure:
    """Draw what the decoder expects of samples of the prior.

    Args:
        vae: The model, taken in evaluation mode.
        n: Number of samples.
        columns: Pictures in a row.
        seed: Seed of the samples.
        title: Title of the figure.
    """
    with _seeded(seed, vae):
        pictures = vae.sample(n)
    return _grid(pictures, vae, columns, title)


def _grid(pictures: Tensor, vae: VAE, columns: int, title: str | None) -> Figure:
    return image_grid(pictures, (1, *vae.shape), columns=columns, levels=2, title=title)


@contextmanager
def _seeded(seed: int, vae: VAE) -> Iterator[None]:
    """Draw from a seed of one's own, in evaluation mode."""
    with preserved_rng(next(vae.parameters()).device), evaluation_mode(vae):
        torch.manual_seed(seed)
        yield


__all__ = ["reconstruction_grid", "sample_grid"]
