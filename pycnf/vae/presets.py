"""The auto-encoders of the literature as data: architecture, posterior and schedule of each set, in two budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pycnf.vae.model import VAE
from pycnf.vae.networks import NetworkKind

Budget = Literal["paper", "small"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Describe an experiment with a variational auto-encoder.

    Attributes:
        pictures: Name of the set (:func:`~pycnf.vae.pictures.load_pictures`).
        shape: Height and width of its pictures.
        networks: Kind of encoder and decoder.
        widths: Their widths.
        pixels: Distribution of the pixels.
        hidden: Hidden widths of the posterior's fields.
        blocks: Blocks of the posterior.
        rank: Rank of the per-sample updates.
        activation: Activation of the fields.
        latent: Dimension of the latent state.
        T: End time of each block.
        epochs: Epochs at most.
        warmup: Epochs in which the weight of the divergence rises from 0 to 1.
        patience: Epochs without a new best bound after which training stops.
        batch_size: Pictures of one step.
        lr: Learning rate of Adamax.
        rtol: Tolerance in training, relative and absolute.
        eval_rtol: Tolerance in evaluation, relative and absolute.
    """

    pictures: str
    shape: tuple[int, int] = (28, 28)
    networks: NetworkKind = "conv"
    widths: tuple[int, ...] = (32, 256)
    pixels: str = "bernoulli"
    hidden: tuple[int, ...]
    blocks: int
    rank: int = 20
    activation: str = "softplus"
    latent: int = 64
    T: float = 0.5
    epochs: int = 2000
    warmup: int = 100
    patience: int = 35
    batch_size: int = 100
    lr: float = 5e-4
    rtol: float = 1e-4
    eval_rtol: float = 1e-5

    @property
    def posterior(self) -> dict[str, Any]:
        """Settings of the flow posterior (:class:`~pycnf.vae.posteriors.CNFPosterior`)."""
        return {
            "kind": "cnf",
            "hidden": list(self.hidden),
            "blocks": self.blocks,
            "rank": self.rank,
            "activation": self.activation,
            "T": self.T,
            "divergence": "hutchinson-gaussian",
            "solver": {"rtol": self.rtol, "atol": self.rtol},
            "eval_solver": {"rtol": self.eval_rtol, "atol": self.eval_rtol},
        }

    @property
    def training(self) -> dict[str, Any]:
        """Settings of :func:`~pycnf.vae.training.train_vae`."""
        names = ("epochs", "warmup", "patience", "batch_size", "lr")
        return {name: getattr(self, name) for name in names}

    def build(self, posterior: Mapping[str, Any] | None = None) -> VAE:
        """Build the model, with the flow posterior or another one in its place.

        >>> PRESETS["vae-caltech"].build({"kind": "planar"}).latent
        64
        """
        return VAE(
            self.shape,
            latent=self.latent,
            networks=self.networks,
            widths=self.widths,
            pixels=self.pixels,
            posterior=self.posterior if posterior is None else posterior,
        )


_DENSE: dict[str, Any] = {"networks": "dense", "widths": (300, 300)}

PRESETS: dict[str, Preset] = {
    "vae-mnist": Preset(pictures="mnist", hidden=(1024, 1024), blocks=2, rank=64),
    "vae-omniglot": Preset(pictures="omniglot", hidden=(512, 512), blocks=5),
    "vae-freyfaces": Preset(
        pictures="freyfaces", shape=(28, 20), pixels="logistic", hidden=(512, 512), blocks=2, **_DENSE
    ),
    "vae-caltech": Preset(pictures="caltech", hidden=(2048,), blocks=1, activation="tanh", **_DENSE),
}
"""The auto-encoders of the TPR paper by name, in its settings."""

_SIZES: dict[str, Any] = {"hidden": (128, 128), "blocks": 1, "rank": 8, "lr": 2e-3}
_SMALL: dict[str, dict[str, Any]] = {
    "vae-mnist": {**_SIZES, "widths": (8, 64), "epochs": 4, "warmup": 1},
    "vae-omniglot": {**_SIZES, "widths": (8, 64), "epochs": 10, "warmup": 2},
    "vae-freyfaces": {**_SIZES, "widths": (128, 64), "epochs": 200, "warmup": 40},
    "vae-caltech": {**_SIZES, "widths": (128, 64), "hidden": (256,), "epochs": 60, "warmup": 12},
}


def get_preset(name: str, budget: Budget = "paper") -> Preset:
    """Return a preset by name: in the paper's settings, or in a size that two cores train in minutes.

    Raises:
        ValueError: On an unknown name or budget.

    >>> get_preset("vae-mnist", "small").pictures
    'mnist'
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    if budget not in ("paper", "small"):
        raise ValueError(f"unknown budget {budget!r}: choose paper or small")
    return PRESETS[name] if budget == "paper" else replace(PRESETS[name], **_SMALL[name])


__all__ = ["PRESETS", "Budget", "Preset", "get_preset"]
