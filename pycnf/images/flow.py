r"""The multiscale flow of images: convolutional blocks, squeezes, and channels that leave at every scale.

Levels x become continuous, x + u, and logits y. At every scale but the last, blocks move the image, a squeeze trades
height and width for channels, more blocks follow, and half of the channels leave: they are part of the latent z, and
the other half go on. With N the density of z, and the volumes of the logits and of the blocks,

    log p(x + u) = log N(z; 0, I) + log|det dy/dx| + sum_blocks int_0^T div v dt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributions import constraints

from pycnf.convolution import ConvNet
from pycnf.divergence import Divergence
from pycnf.fields import TimeConditioning
from pycnf.flow import CNF, FlowDistribution, FlowObserver, FlowSolution, standard_normal_log_prob
from pycnf.images.dequantization import VariationalNoise
from pycnf.images.pieces import Logit, dequantize
from pycnf.images.stages import decode, encode, plan
from pycnf.solution import Solution
from pycnf.solve import Solver

Dequantization = Literal["uniform", "variational", "none"]
DEQUANTIZATIONS = get_args(Dequantization)


@dataclass(frozen=True)
class ImageSolution(FlowSolution):
    """Hold a solve through all pieces of a flow of images.

    Attributes:
        start: States at the start, ``(*batch, D)``: levels with their noise, or with ``reverse`` the latent.
        end: States at the end, ``(*batch, D)``: the latent, or with ``reverse`` continuous levels.
        volume: log|det| of the fixed pieces in the direction of the solve, ``(*batch,)``.
        log_q: Log-density of the noise, given the levels, that the solve drew, ``(*batch,)``; 0 for uniform noise.
    """

    start: Tensor
    end: Tensor
    volume: Tensor
    log_q: Tensor

    @property
    def z(self) -> Tensor:
        """Final states, shape ``(*batch, D)``."""
        return self.end

    @property
    def logp(self) -> Tensor:
        """Change of the log-density along the whole solve, shape ``(*batch,)``."""
        return super().logp - self.volume

    @property
    def log_prob(self) -> Tensor:
        """Log-density of the continuous levels less that of their noise, in nats, shape ``(*batch,)``."""
        if self.reverse:
            return standard_normal_log_prob(self.start) + self.logp
        return standard_normal_log_prob(self.end) - self.logp - self.log_q


class ImageFlow(CNF):
    r"""Model a density of images by a multiscale flow of convolutional fields.

    It is used like any :class:`~pycnf.flow.CNF`: rows are flat images (B, D), D = C H W, of whole levels 0, 1, ...,
    ``levels`` - 1, noise is drawn anew in every solve from data to latent, and log-densities are lower bounds of the
    log-probability of the levels, in nats (:func:`~pycnf.images.pieces.bits_per_dim`). Samples are whole levels, too,
    and ``rsample`` gives continuous ones, which can be differentiated. Beside this likelihood in nats a regularizer has
    the effect that the same weight has beside bits per dimension if the penalty is divided by D ln 2 there.

    Args:
        shape: Shape (C, H, W) of the images.
        hidden: Channels of the hidden layers of each block's :class:`~pycnf.convolution.ConvNet`.
        depth: Blocks of every stage; all scales but the last have two stages, before and after their squeeze.
        scales: Number of scales, None for as many as the images allow (``pycnf.images.stages.plan``).
        context: Dimension of a context c, for a conditional density p(x | c); 0 for none.
        levels: Number of levels of a pixel.
        alpha: Margin of the logits (:class:`~pycnf.images.pieces.Logit`).
        dequantization: ``"uniform"`` noise, ``"variational"`` for noise that is learned along with the flow
            (:class:`~pycnf.images.dequantization.VariationalNoise`, with the hidden channels, the kernel and the
            activation of the fields), or ``"none"`` for a density of continuous values in [0, ``levels``].
        kernel: Height and width of the convolutions' kernels, odd.
        activation: Activation of the fields.
        time: Time conditioning of the fields.
        T: End time of each block, > 0.
        divergence: Divergence in training mode (:func:`~pycnf.divergence.parse_divergence`).
        solver: Solver in training mode, a :class:`~pycnf.solve.Solver` or its settings.
        eval_divergence: Divergence in evaluation mode.
        eval_solver: Solver in evaluation mode.

    Raises:
        ValueError: On impossible sizes or settings.

    References:
        Dinh et al., Density estimation using real NVP, ICLR 2017. Grathwohl et al., FFJORD, ICLR 2019.

    >>> flow = ImageFlow((1, 4, 4), hidden=(8,))
    >>> images = flow().sample((5,))
    >>> bool((images == images.floor()).all()), flow().log_prob(images).shape == (5,)
    (True, True)
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        depth: int = 2,
        *,
        scales: int | None = None,
        context: int = 0,
        levels: int = 256,
        alpha: float = 1e-6,
        dequantization: Dequantization = "uniform",
        kernel: int = 3,
        activation: str = "softplus",
        time: TimeConditioning = "concat",
        T: float = 1.0,
        divergence: str | Divergence = "hutchinson-rademacher",
        solver: Solver | Mapping[str, Any] | None = None,
        eval_divergence: str | Divergence = "hutchinson-rademacher",
        eval_solver: Solver | Mapping[str, Any] | None = None,
    ) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"expected an image shape (channels, height, width), each >= 1, got {tuple(shape)}")
        if depth < 1:
            raise ValueError(f"expected depth >= 1, got {depth}")
        if dequantization not in DEQUANTIZATIONS:
            raise ValueError(f"unknown dequantization {dequantization!r}: choose one of {', '.join(DEQUANTIZATIONS)}")
        channels, height, width = shape
        look: dict[str, Any] = {"kernel": kernel, "activation": activation, "time": time}
        stages = plan((channels, height, width), scales)
        fields = [[ConvNet(stage.shape, hidden, context=context, **look) for _ in range(depth)] for stage in stages]
        super().__init__(
            channels * height * width,
            blocks=len(stages) * depth,
            context=context,
            field=[field for own in fields for field in own],
            T=T,
            divergence=divergence,
            solver=solver,
            eval_divergence=eval_divergence,
            eval_solver=eval_solver,
        )
        self.shape = (channels, height, width)
        self.depth, self.stages, self.dequantization = depth, stages, dequantization
        self.logit = Logit(levels, alpha)
        self.noise: VariationalNoise | None = None
        if dequantization == "variational":
            self.noise = VariationalNoise(self.shape, hidden, levels=levels, kernel=kernel, activation=activation)
        self._look = {"hidden": list(hidden), "scales": sum(stage.then != "split" for stage in stages), **look}
        # flows over the same fields, one a stage: in a tuple, so that a field is registered once
        self._chains = tuple(CNF(own[0].features, blocks=depth, context=context, field=own, T=T) for own in fields)

    @property
    def config(self) -> dict[str, Any]:
        """Settings that rebuild this flow by ``ImageFlow(**flow.config)``, ready for JSON."""
        return {
            "shape": list(self.shape),
            "depth": self.depth,
            "context": self.context,
            "levels": self.logit.levels,
            "alpha": self.logit.alpha,
            "dequantization": self.dequantization,
            **self._look,
            "T": self.T,
            "divergence": str(self.divergence),
            "solver": self.solver.to_dict(),
            "eval_divergence": str(self.eval_divergence),
            "eval_solver": self.eval_solver.to_dict(),
        }

    def forward(self, context: Tensor | None = None) -> ImageDistribution:
        """Return the density p(x), or p(x | context) for a context of shape ``(*batch, C)``."""
        self._check_context(context)
        return ImageDistribution(self, context)

    def solve_blocks(
        self,
        x: Tensor,
        context: Tensor | None,
        times: Sequence[Tensor | None],
        *,
        reverse: bool = False,
        solver: Solver | None = None,
        divergence: str | Divergence | None = None,
        first_steps: Sequence[float] | None = None,
        observer: FlowObserver | None = None,
        ends: Sequence[float] | None = None,
        **settings: Any,
    ) -> ImageSolution:
        """Solve with interior times, and where wanted end times, of each block's own (see ``CNF.solve``).

        Settings beyond those named are those of ``CNF.solve_blocks``; sequences are in the order of the solve.
        """
        self.check_states(x)
        self._check_context(context)
        settings["reverse"] = reverse
        settings["solver"] = solver or (self.solver if self.training else self.eval_solver)
        settings["divergence"] = divergence or (self.divergence if self.training else self.eval_divergence)
        sequences: dict[str, Any] = {"first_steps": first_steps, "ends": ends}
        blocks: list[Solution] = []

        def move(number: int, y: Tensor) -> Tensor:
            own = slice(len(blocks), len(blocks) + self.depth)
            solution = self._chains[number].solve_blocks(
                y,
                context,
                times[own],
                observer=None if observer is None else lambda i, attempt: observer(own.start + i, attempt),
                **{name: values[own] for name, values in sequences.items() if values is not None},
                **settings,
            )
            blocks.extend(solution.blocks)
            return solution.z

        if reverse:
            start, log_q = x, torch.zeros_like(x[..., 0])
            end, volume = self.logit.inverse(decode(self.stages, x, move))
        else:
            start, log_q = self._continuous(x)
            y, volume = self.logit.forward(start)
            end = encode(self.stages, y, move)
        return ImageSolution(tuple(blocks), reverse, start, end, volume, log_q)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the whole levels, 0 to ``levels`` - 1, of continuous ones."""
        return x.floor().clamp(0, self.logit.levels - 1)

    def _continuous(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Check levels and add the noise; return its log-density, too."""
        highest = self.logit.levels - (self.dequantization != "none")
        low, high = float(x.detach().min()), float(x.detach().max())
        if low < 0 or high > highest:
            raise ValueError(
                f"expected levels from 0 to {highest}, got values from {low:g} to {high:g}: scale the images, or build "
                "the flow with levels=... for another number of levels"
            )
        if self.dequantization == "variational":
            if self.noise is None:
                raise ValueError("this flow has no noise to learn: build it with dequantization='variational'")
            u, log_q = self.noise(x)
            return dequantize(x, u), log_q
        return dequantize(x) if self.dequantization == "uniform" else x, torch.zeros_like(x[..., 0])


class ImageDistribution(FlowDistribution):
    """Present a flow of images, given its context, as a distribution over levels.

    ``sample`` gives whole levels, ``rsample`` and ``rsample_and_log_prob`` continuous ones; ``log_prob`` is a lower
    bound of the log-probability of whole levels, whose noise is drawn anew in every call.
    """

    flow: ImageFlow
    support = constraints.independent(constraints.nonnegative, 1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw images, ``(*sample_shape, *batch, D)``; continuous ones from a flow without dequantization."""
        with torch.no_grad():
            x = self.rsample(sample_shape)
            return x if self.flow.dequantization == "none" else self.flow.quantize(x)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ImageDistribution:
        """Repeat the density over a larger batch shape."""
        if self.context is not None:
            return ImageDistribution(self.flow, self.context.expand(*batch_shape, self.flow.context))
        expanded = ImageDistribution(self.flow, None)
        expanded._batch_shape = torch.Size(batch_shape)
        return expanded


def interpolate(flow: ImageFlow, a: Tensor, b: Tensor, steps: int = 8, context: Tensor | None = None) -> Tensor:
    r"""Return images between pairs of images, by way of their latents.

    z(s) = cos(s) z_a + sin(s) z_b for s from 0 to pi / 2: where z_a and z_b are independent and normal, every z(s) is.

    Args:
        flow: The flow, which is solved in its current mode.
        a: Images at one end, ``(*batch, D)``.
        b: Images at the other end, ``(*batch, D)``.
        steps: Number of images, the two ends included.
        context: Context of both, for a conditional flow.

    Returns:
        Whole levels ``(steps, *batch, D)``; a first and b last, to the accuracy of the solver.
    """
    if steps < 2:
        raise ValueError(f"expected steps >= 2, both ends included, got {steps}")
    with torch.no_grad():
        z_a, z_b = (flow.solve(x, context, density=False).z for x in (a, b))
        angles = torch.linspace(0, math.pi / 2, steps).to(z_a).view(-1, *[1] * z_a.ndim)
        z = torch.cos(angles) * z_a + torch.sin(angles) * z_b
        return flow.quantize(flow.solve(z, context, reverse=True, density=False).z)


__all__ = ["ImageDistribution", "ImageFlow", "ImageSolution", "interpolate"]
