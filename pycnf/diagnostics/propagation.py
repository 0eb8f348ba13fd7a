r"""How local errors add up to the error of a whole solve: Lady Windermere's fan.

With phi(y_n) the exact solution to the end of the flow from the numerical state y_n after step n, the error of the
solve is the sum, exact and without remainder, of what each step contributes,

    y_N - phi(y_0) = sum_n ( phi(y_(n+1)) - phi(y_n) ).

References:
    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, sections I.7 and II.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycnf.diagnostics.steps import LocalErrors
from pycnf.diagnostics.truth import carry, in_float64
from pycnf.flow import CNF


@dataclass(frozen=True)
class Contributions:
    """Hold what each of the N accepted steps contributes to the error of the final (z, log p) of a flow.

    Attributes:
        step: Contribution of each accepted step, (N, B, D + 1), log p last, in units of the state and in nats.
        total: Error of the solve, their sum, (B, D + 1).
        local: True local error of each step before it is carried to the end, (N, B, D + 1), in the same units.
    """

    step: Tensor
    total: Tensor
    local: Tensor

    def rms(self) -> dict[str, Tensor]:
        """Return the root mean square of the steps' contributions to ``"z"`` and ``"logp"``, (N,) each."""
        square = self.step.square()
        return {"z": square[..., :-1].mean((1, 2)).sqrt(), "logp": square[..., -1].mean(1).sqrt()}


def contributions(
    flow: CNF, errors: LocalErrors, context: Tensor | None = None, *, samples: int | None = None
) -> Contributions:
    """Carry the local error of every accepted step to the end of the flow.

    All states that are on their way travel in one batch, so the cost grows with the square of the number of steps.

    Args:
        flow: The flow.
        errors: Steps of :func:`~pycnf.diagnostics.steps.local_errors` of the same flow and context.
        context: Context (C,) or (B, C) of a conditional flow.
        samples: Number of samples to follow, the first ones of the batch; None for all.

    Returns:
        The contributions (:class:`Contributions`).
    """
    double, steps = in_float64(flow), errors.only_accepted()
    device = next((p.device for p in flow.parameters()), steps.y0.device)
    starts, ends = steps.y0[:, :samples], steps.y1[:, :samples]
    batch = steps.y0.shape[1]
    given = None if context is None else context.detach().double().expand(batch, flow.context)[:samples]
    fan = starts[:1].to(device)
    done, local = torch.zeros_like(fan[0, :, -1]), []
    for i in range(len(steps)):
        block, t, h = int(steps.block[i]), float(steps.t[i]), float(steps.h[i])
        if i and block != int(steps.block[i - 1]):
            done = fan[-1, :, -1]  # log p starts again at 0 in each block of the solve
        repeated = None if given is None else given.repeat(len(fan), 1)
        carried = carry(double, block, fan.flatten(0, 1), t, t + h, repeated).view_as(fan)
        y1 = ends[i].to(device)
        y1 = torch.cat([y1[:, :-1], (y1[:, -1] + done).unsqueeze(1)], dim=1)
        local.append(y1 - carried[-1])
        fan = torch.cat([carried, y1.unsqueeze(0)])
    return Contributions(fan.diff(dim=0).cpu(), (fan[-1] - fan[0]).cpu(), torch.stack(local).cpu())


__all__ = ["Contributions", "contributions"]
