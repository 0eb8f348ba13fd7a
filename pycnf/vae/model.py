r"""Variational auto-encoders: p(x) = int p(x | z) N(z; 0, I) dz, and a posterior q(z | x) that is fitted with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pycnf.vae.networks import NetworkKind, build_networks
from pycnf.vae.pixels import PIXELS, Pixels
from pycnf.vae.posteriors import Posterior, build_posterior


class VAE(nn.Module):
    """Model pictures by a latent state, a decoder and an amortized posterior.

    Args:
        shape: Height and width of the pictures.
        latent: Dimension D of the latent state.
        networks: Kind of the encoder and the decoder, ``"conv"`` or ``"dense"``.
        widths: Their widths (``pycnf.vae.networks.build_networks``); the last is the number of features.
        pixels: Distribution of the pixels, a name in ``pycnf.vae.pixels.PIXELS``.
        posterior: Kind of posterior and its settings (``pycnf.vae.posteriors.build_posterior``).

    Raises:
        ValueError: On unknown names or impossible sizes.

    References:
        Kingma & Welling, Auto-encoding variational Bayes, ICLR 2014.

    >>> vae = VAE((4, 4), latent=2, networks="dense", widths=(8,), posterior={"kind": "gaussian"})
    >>> vae.sample(3).shape == (3, 16)
    True
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        latent: int = 64,
        networks: NetworkKind = "conv",
        widths: Sequence[int] = (32, 256),
        pixels: str = "bernoulli",
        posterior: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pixels not in PIXELS:
            raise ValueError(f"unknown distribution of pixels {pixels!r}: choose one of {', '.join(PIXELS)}")
        if len(shape) != 2:
            raise ValueError(f"expected shape (height, width), got {tuple(shape)}")
        chosen = {"kind": "cnf"} if posterior is None else dict(posterior)
        self.shape, self.latent = (int(shape[0]), int(shape[1])), latent
        self.pixels: Pixels = PIXELS[pixels]
        self.config: dict[str, Any] = {
            "shape": list(self.shape),
            "latent": latent,
            "networks": networks,
            "widths": list(widths),
            "pixels": pixels,
            "posterior": chosen,
        }
        channels = self.pixels.channels
        self.encoder, self.decoder = build_networks(networks, self.shape, widths, latent, channels)
        self.posterior: Posterior = build_posterior(features=widths[-1], latent=latent, **chosen)

    @property
    def features(self) -> int:
        """Number of pixels."""
        return self.shape[0] * self.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        """Return the features (B, H) of pictures (B, pixels) in [0, 1].

        Raises:
            ValueError: When the pictures do not have the shape of the model.
        """
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"expected pictures of shape (B, {self.features}), got {tuple(x.shape)}")
        return self.encoder(2 * x - 1)

    def decode(self, z: Tensor) -> Tensor:
        """Return the raw parameters ``(*batch, channels, pixels)`` of the pixels for states ``(*batch, D)``."""
        return self.decoder(z.reshape(-1, self.latent)).unflatten(0, z.shape[:-1])

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the expected pictures (B, pixels) of one posterior sample for each picture (B, pixels)."""
        return self.pixels.mean(self.decode(self.posterior(self.encode(x)).z))

    @torch.no_grad()
    def sample(self, n: int, *, mean: bool = True) -> Tensor:
        """Draw pictures (n, pixels) of the model.

        Args:
            n: How many.
            mean: Return what the decoder expects of each latent sample, rather than pixels drawn from it.
        """
        like = next(self.parameters())
        raw = self.decode(torch.randn(n, self.latent, dtype=like.dtype, device=like.device))
        return self.pixels.mean(raw) if mean else self.pixels.sample(raw)


__all__ = ["VAE"]
