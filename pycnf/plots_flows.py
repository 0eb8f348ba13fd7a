"""Pictures of flows: streams over a density, the solver's steps on trajectories, a density that forms over time.

The figures take several flows side by side, each under its name. Times count on through the blocks of a flow, from 0
at the data to ``blocks * T`` at the base density. All solves are those of evaluation mode, with the exact divergence
unless the flow says otherwise, and start with the method's own choice of the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pycnf.divergence import parse_divergence
from pycnf.flow import CNF, standard_normal_log_prob
from pycnf.joint import JointDynamics, channel_norm
from pycnf.plots import CHUNK, COLORS, INK, house_figure
from pycnf.scale import evaluation_mode
from pycnf.solution import SolveStats
from pycnf.stepper import Attempt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pycnf.flow import FlowSolution

STREAM = "white"
LEVELS = 40  # of color: a picture of few colors is a small file
ACCEPTED, REJECTED = COLORS[1], COLORS[3]


@dataclass(frozen=True)
class Paths:
    """Hold the trajectories of a batch and the steps in which a solver went along them.

    Attributes:
        ts: Times (K,), counted on through the blocks.
        z: States (K, B, D) at these times, to the accuracy of dense output.
        t: Times (S,) at which the steps that were tried end.
        ends: States (S, B, D) at these ends, as the solver computed them.
        accepted: Which steps were accepted, (S,).
        log_prob: Log-densities (B,) of the batch, in nats.
        stats: What the solve cost.
    """

    ts: Tensor
    z: Tensor
    t: Tensor
    ends: Tensor
    accepted: Tensor
    log_prob: Tensor
    stats: SolveStats


def solve_paths(flow: CNF, x: Tensor, *, points: int = 100) -> Paths:
    """Solve a batch from data to base density, and keep its trajectories and steps.

    Args:
        flow: A flow without context, solved by an adaptive method.
        x: Batch (B, D); all of it decides the steps together.
        points: Times a block at which the states are kept, besides its ends.

    Returns:
        Trajectories and steps (:class:`Paths`).

    Raises:
        ValueError: The flow has a context, or its method shows no steps.

    >>> paths = solve_paths(CNF(2, hidden=(8,)), torch.randn(5, 2))
    >>> int(paths.accepted.sum()) == paths.stats.accepted
    True
    """
    _check(flow)
    seen: list[tuple[int, Attempt]] = []
    inner = torch.linspace(0, flow.T, points + 2)[1:-1].tolist()
    with torch.no_grad(), evaluation_mode(flow):
        solved: FlowSolution = flow.solve(x, times=inner, observer=lambda *step: seen.append(step))
    blocks = enumerate(solved.blocks)
    return Paths(
        ts=torch.cat([block.ts.cpu() + i * flow.T for i, block in blocks]),
        z=torch.cat([block.z.cpu() for block in solved.blocks]),
        t=torch.tensor([i * flow.T + step.t + step.h for i, step in seen]),
        ends=torch.stack([step.y1[:, : flow.features].cpu() for _, step in seen]),
        accepted=torch.tensor([step.accepted for _, step in seen]),
        log_prob=solved.log_prob.cpu(),
        stats=solved.stats,
    )


def log_density_at(flow: CNF, t: float, z: Tensor) -> Tensor:
    r"""Return the log-density of the states at a time, ``log p_t(z) = log N(z(end); 0, I) + int_t^end div v dt``.

    At t = 0 it is ``flow().log_prob(z)``, at the end that of the base density.

    Args:
        flow: A flow without context.
        t: Time in [0, blocks * T], counted on through the blocks.
        z: States ``(*batch, D)``.

    Returns:
        Log-densities ``(*batch)`` in nats.

    Raises:
        ValueError: The flow has a context, or there is no such time.
    """
    _check(flow)
    if not 0 <= t <= flow.T * flow.blocks:
        raise ValueError(f"expected a time from 0 to {flow.T * flow.blocks:g}, got {t}")
    flat = z.reshape(-1, flow.features)
    with torch.no_grad(), evaluation_mode(flow):
        parts = [_carry_on(flow, t, part) for part in flat.split(CHUNK)]
    return torch.cat(parts).reshape(z.shape[:-1])


def streams_figure(
    flows: Mapping[str, CNF],
    *,
    extent: tuple[float, float] = (-3.5, 3.5),
    lines: int = 17,
    times: int = 48,
    resolution: int = 160,
    steps: bool = True,
    title: str | None = None,
) -> Figure:
    """Draw flows in one dimension: the density over time, streamlines of equal probability, and the solver's steps.

    Between two neighboring streamlines lies the same probability at every time. The dots on them are the ends of
    accepted steps, crosses the ends of rejected ones; the streamlines are the batch that decides the steps.

    Args:
        flows: Flows of one feature without context, by name.
        extent: Lowest and highest state drawn.
        lines: Number of streamlines.
        times: Number of times at which the density is computed.
        resolution: Number of states at which it is computed.
        steps: Whether to draw the steps.
        title: Title of the figure.

    Raises:
        ValueError: There is no flow, or one has not one feature, or a context.
    """
    check_flows(flows, features=1)
    with house_figure(len(flows), title, width=0.6 + 3.9 * len(flows), height=3.7) as (figure, panels):
        panels[0].set_ylabel("state z (units of the data)")
        for axes, (name, flow) in zip(panels, flows.items(), strict=True):
            like, end = next(flow.parameters(), torch.zeros(())), flow.T * flow.blocks
            z = torch.linspace(*extent, resolution).to(like)[:, None]
            clock = torch.linspace(0, end, times).tolist()
            density = torch.stack([log_density_at(flow, t, z).exp().cpu() for t in clock], dim=1)
            share = (torch.arange(lines) + 0.5) / lines
            with torch.no_grad(), evaluation_mode(flow):
                x = flow.solve(torch.special.ndtri(share).to(like)[:, None], reverse=True, density=False).z
            paths = solve_paths(flow, x)
            _draw_density(axes, density, (0, end, *extent), aspect="auto")
            axes.plot(paths.ts, paths.z[..., 0], color=STREAM, lw=0.8, alpha=0.85)
            if steps:
                _draw_ends(axes, paths, paths.t[:, None].expand(paths.ends.shape[:2]), paths.ends[..., 0])
            axes.set(xlabel="time t", xlim=(0, end), ylim=extent, title=f"{name}: {paths.stats.nfe} evaluations")
        if steps:
            _name_marks(figure)
    return figure


def paths_figure(
    flows: Mapping[str, CNF],
    x: Tensor,
    *,
    shown: int = 30,
    extent: tuple[float, float, float, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw trajectories of flows in the plane with the solver's steps on them, and below, the steps over time.

    A dot ends an accepted step, a cross a rejected one. All trajectories of a batch take the same steps.

    Args:
        flows: Flows of two features without context, by name.
        x: Where the trajectories begin, data (B, 2); the whole batch decides the steps.
        shown: Number of trajectories drawn, the first of the batch.
        extent: Window (left, right, bottom, top); None for one that holds what is drawn.
        title: Title of the figure.

    Raises:
        ValueError: There is no flow, or one has not two features, or a context.
    """
    check_flows(flows, features=2)
    found = {name: solve_paths(flow, x) for name, flow in flows.items()}
    if extent is None:
        states = torch.cat([paths.z[:, :shown].flatten(0, 1) for paths in found.values()])
        low, high = states.min(0).values, states.max(0).values
        room = 0.05 * (high - low).max()
        extent = (float(low[0] - room), float(high[0] + room), float(low[1] - room), float(high[1] + room))
    with _over_rulers(found, title, start="data") as (figure, panels):
        for axes, (name, paths) in zip(panels, found.items(), strict=True):
            z, ends = paths.z[:, :shown], paths.ends[:, :shown]
            axes.plot(z[..., 0], z[..., 1], color=COLORS[0], lw=0.9, alpha=0.8)
            _draw_ends(axes, paths, ends[..., 0], ends[..., 1], size=2.8)
            axes.plot(*z[0].T, "o", color=COLORS[2], ms=3.2, zorder=2.5)
            axes.set(title=name, xlabel="$z_1$", aspect="equal", xlim=extent[:2], ylim=extent[2:])
        panels[0].set_ylabel("$z_2$ (units of the data)")
    return figure


def densities_figure(
    flows: Mapping[str, CNF],
    x: Tensor,
    *,
    extent: tuple[float, float, float, float] = (-4.0, 4.0, -4.0, 4.0),
    resolution: int = 100,
    title: str | None = None,
) -> Figure:
    """Draw the densities of flows in the plane on one scale of color, and below each what computing it takes.

    Args:
        flows: Flows of two features without context, by name.
        x: Held-out data (B, 2) that is solved in one batch for the steps and the negative log-likelihood.
        extent: Window (left, right, bottom, top).
        resolution: Points along each side.
        title: Title of the figure.

    Raises:
        ValueError: There is no flow, or one has not two features, or a context.
    """
    check_flows(flows, features=2)
    images = {name: density_grid(flow, 0.0, extent, resolution) for name, flow in flows.items()}
    top = max(float(image.max()) for image in images.values())
    found = {name: solve_paths(flow, x) for name, flow in flows.items()}
    with _over_rulers(found, title) as (figure, panels):
        for axes, (name, paths) in zip(panels, found.items(), strict=True):
            _draw_density(axes, images[name], extent, vmax=top)
            axes.set(title=f"{name}: NLL {-paths.log_prob.mean():.3f} nats", xlabel="$x_1$")
        panels[0].set_ylabel("$x_2$")
    return figure


def forming_figure(
    flows: Mapping[str, CNF],
    *,
    times: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.0),
    extent: tuple[float, float, float, float] = (-4.0, 4.0, -4.0, 4.0),
    resolution: int = 100,
    title: str | None = None,
) -> Figure:
    """Draw how the densities of flows in the plane form, from the base density to the data: one row a flow.

    Args:
        flows: Flows of two features without context, by name.
        times: Times, as parts of the whole time of the flow.
        extent: Window (left, right, bottom, top).
        resolution: Points along each side.
        title: Title of the figure.

    Raises:
        ValueError: There is no flow or no time, or a flow has not two features, or a context.
    """
    check_flows(flows, features=2)
    if not times:
        raise ValueError("expected one time or more")
    with house_figure(1, title, width=0.5 + 1.75 * len(times), height=0.4 + 1.75 * len(flows)) as (figure, (only,)):
        only.remove()
        panels = figure.subplots(len(flows), len(times), squeeze=False, sharex=True, sharey=True)
        for row, (name, flow) in zip(panels, flows.items(), strict=True):
            row[0].set_ylabel(name)
            for axes, part in zip(row, times, strict=True):
                t = part * flow.T * flow.blocks
                _draw_density(axes, density_grid(flow, t, extent, resolution), extent)
                axes.set(xticks=[], yticks=[])
                if row[0] is panels[0, 0]:
                    axes.set_title(f"t = {t:.3g}")
    return figure


def _carry_on(flow: CNF, t: float, z: Tensor) -> Tensor:
    """Return log p_t of states (B, D)."""
    divergence, gained = parse_divergence(flow.eval_divergence), z.new_zeros(len(z))
    for i, field in enumerate(flow.fields):
        start = max(t - i * flow.T, 0.0)
        if start < flow.T * (1 - 1e-9):
            y = torch.cat([z, torch.zeros_like(z[:, :1])], dim=1)
            dynamics = JointDynamics(divergence.bind(field, z, None))
            _, ys, _ = flow.eval_solver.integrate(dynamics, y, start, flow.T, norm=channel_norm(flow.features))
            z, gained = ys[-1, :, :-1], gained - ys[-1, :, -1]
    return standard_normal_log_prob(z) + gained


def density_grid(flow: CNF, t: float, extent: tuple[float, float, float, float], resolution: int) -> Tensor:
    """Return the density p_t on a grid, (rows from the bottom, columns), on the host."""
    like = next(flow.parameters(), torch.zeros(()))
    sides = [torch.linspace(low, high, resolution) for low, high in (extent[:2], extent[2:])]
    grid = torch.cartesian_prod(*sides).to(like)
    return log_density_at(flow, t, grid).exp().reshape(resolution, resolution).T.float().cpu()


def _draw_density(axes: Axes, density: Tensor, extent: tuple[float, float, float, float], **look: Any) -> None:
    from matplotlib import colormaps

    axes.grid(False)
    colors = colormaps["viridis"].resampled(LEVELS)
    axes.imshow(density.numpy(), extent=extent, origin="lower", interpolation="bilinear", cmap=colors, vmin=0, **look)


@contextmanager
def _over_rulers(
    found: Mapping[str, Paths], title: str | None, *, start: str | None = None
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Open a figure of panels side by side, each over a ruler of the steps of its flow, with a legend of the marks."""
    count = len(found)
    with house_figure(1, title, width=0.5 + 2.9 * count, height=4.1) as (figure, (only,)):
        only.remove()
        upper, lower = figure.subplots(2, count, squeeze=False, height_ratios=(8, 1))
        yield figure, list(upper)
        for axes, paths in zip(lower, found.values(), strict=True):
            _draw_ruler(axes, paths)
        _name_marks(figure, start=start)


def _draw_ruler(axes: Axes, paths: Paths) -> None:
    """Draw the ends of the steps on the axis of time, and what they cost."""
    end = float(paths.ts[-1])
    axes.grid(False)
    axes.axhline(0, color=INK, lw=0.8, zorder=0)
    _draw_ends(axes, paths, paths.t[:, None], torch.zeros(len(paths.t), 1), size=5)
    axes.set(xlabel="time t", xlim=(-0.02 * end, 1.02 * end), ylim=(-1, 1), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.set_title(f"{paths.stats.nfe} evaluations", fontweight="bold")


def _draw_ends(axes: Axes, paths: Paths, x: Tensor, y: Tensor, *, size: float = 2.6) -> None:
    """Draw where steps end, coordinates (S, B)."""
    for good, look in ((False, _cross(size)), (True, _dot(size))):
        mine = paths.accepted == good
        axes.plot(x[mine].flatten(), y[mine].flatten(), zorder=3, clip_on=True, **look)


def _dot(size: float) -> dict[str, Any]:
    return {"marker": "o", "ls": "", "color": ACCEPTED, "ms": size, "mec": "none"}


def _cross(size: float) -> dict[str, Any]:
    return {"marker": "x", "ls": "", "color": REJECTED, "ms": 1.4 * size, "mew": 1.1}


def _name_marks(figure: Figure, *, start: str | None = None) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], label="end of an accepted step", **_dot(5)),
        Line2D([], [], label="end of a rejected step", **_cross(5)),
    ]
    if start:
        marks.insert(0, Line2D([], [], marker="o", ls="", color=COLORS[2], ms=4, label=start))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))


def _check(flow: CNF) -> None:
    if flow.context:
        raise ValueError(f"expected a flow without context, got one with {flow.context} context features")


def check_flows(flows: Mapping[str, CNF], *, features: int) -> None:
    """Check that flows can be drawn side by side.

    Raises:
        ValueError: There is none, or one has a context or another number of features.
    """
    if not flows:
        raise ValueError("expected one flow or more")
    for name, flow in flows.items():
        _check(flow)
        if flow.features != features:
            raise ValueError(f"expected flows of {features} feature(s), got {flow.features} in {name!r}")


__all__ = [
    *("Paths", "check_flows", "densities_figure", "density_grid", "forming_figure", "log_density_at"),
    *("paths_figure", "solve_paths", "streams_figure"),
]
