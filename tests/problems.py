"""Fields with a closed-form flow and log-determinant, and what several test files do with a field.

Each problem is a module v(t, z) as a user would write one, with ``state(t, z0)``, the solution z(t) of
dz/dt = v(t, z) from z(0) = z0, and ``logp(t, z0)``, the change of the log-density -int_0^t div v, both exact.
"""

from __future__ import annotations

import json
import math
import os
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pycnf import CNF, Solver
from pycnf.julia import JuliaUnavailable, shared_worker


def parameter(values: object) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


class Problem(nn.Module):
    """Base of the problems, all on [0, 1]."""

    features = 2

    @abstractmethod
    def state(self, t: float, z0: Tensor) -> Tensor: ...

    @abstractmethod
    def logp(self, t: float, z0: Tensor) -> Tensor: ...

    def start(self, n: int = 8) -> Tensor:
        """Points to start from, (n, D), the same at every call."""
        generator = torch.Generator().manual_seed(7)
        return torch.randn(n, self.features, dtype=torch.float64, generator=generator)


class Linear(Problem):
    """v = A z, z(t) = expm(A t) z0, log-determinant t tr A."""

    features = 3

    def __init__(self) -> None:
        super().__init__()
        self.a = parameter([[-0.5, 1.0, 0.2], [-1.0, 0.3, -0.4], [0.1, 0.6, 0.4]])

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.a.t()

    def state(self, t: float, z0: Tensor) -> Tensor:
        return z0 @ torch.linalg.matrix_exp(self.a * t).t()

    def logp(self, t: float, z0: Tensor) -> Tensor:
        return -t * torch.trace(self.a) * torch.ones_like(z0[:, 0])


class Diagonal(Problem):
    """v = a * z, z(t) = exp(a t) * z0, log-determinant t sum a."""

    features = 4

    def __init__(self) -> None:
        super().__init__()
        self.a = parameter([-1.5, -0.3, 0.4, 1.0])

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z * self.a

    def state(self, t: float, z0: Tensor) -> Tensor:
        return z0 * torch.exp(self.a * t)

    def logp(self, t: float, z0: Tensor) -> Tensor:
        return -t * self.a.sum() * torch.ones_like(z0[:, 0])


class Rotation(Problem):
    """v = omega (-z_2, z_1): a rotation, which keeps volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.omega = parameter(2.0)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.omega * torch.stack([-z[:, 1], z[:, 0]], dim=1)

    def state(self, t: float, z0: Tensor) -> Tensor:
        cos, sin = torch.cos(self.omega * t), torch.sin(self.omega * t)
        return torch.stack([cos * z0[:, 0] - sin * z0[:, 1], sin * z0[:, 0] + cos * z0[:, 1]], dim=1)

    def logp(self, t: float, z0: Tensor) -> Tensor:
        return torch.zeros_like(z0[:, 0])


class AffineInTime(Problem):
    """v = A z + b + c t with A invertible.

    z = expm(A t) (z0 - q(0)) + q(t) with the particular solution q(t) = -A^-1 (b + c t + A^-1 c).
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = parameter([[0.8, -0.5], [0.7, -1.2]])
        self.b, self.c = parameter([0.5, -1.0]), parameter([-2.0, 1.5])

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.a.t() + self.b + self.c * t

    def state(self, t: float, z0: Tensor) -> Tensor:
        inverse = torch.linalg.inv(self.a)

        def particular(t: float) -> Tensor:
            return -inverse @ (self.b + self.c * t + inverse @ self.c)

        return (z0 - particular(0.0)) @ torch.linalg.matrix_exp(self.a * t).t() + particular(t)

    def logp(self, t: float, z0: Tensor) -> Tensor:
        return -t * torch.trace(self.a) * torch.ones_like(z0[:, 0])


class TimeScaled(Problem):
    """v = (a + b t) z: the divergence changes in time. z = exp(a t + b t^2 / 2) z0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = parameter(1.0), parameter(-2.5)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return (self.a + self.b * t) * z

    def state(self, t: float, z0: Tensor) -> Tensor:
        return torch.exp(self.a * t + self.b * t**2 / 2) * z0

    def logp(self, t: float, z0: Tensor) -> Tensor:
        return -self.features * (self.a * t + self.b * t**2 / 2) * torch.ones_like(z0[:, 0])


class GaussianToGaussian(Problem):
    """Carry N(m, diag(s^2)) to N(0, I) along straight lines: z = (1 - t) z0 + t (z0 - m) / s.

    The log-determinant sum log((1 - t) + t / s) is no polynomial in t although every trajectory is a line.
    """

    def __init__(self) -> None:
        super().__init__()
        self.m, self.s = parameter([0.5, -1.0]), parameter([0.5, 2.0])

    def stretch(self, t: Tensor | float) -> Tensor:
        return (1 - t) + t / self.s

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        z0 = (z + t * self.m / self.s) / self.stretch(t)
        return (z0 - self.m) / self.s - z0

    def state(self, t: float, z0: Tensor) -> Tensor:
        return (1 - t) * z0 + t * (z0 - self.m) / self.s

    def logp(self, t: float, z0: Tensor) -> Tensor:
        return -self.stretch(t).log().sum() * torch.ones_like(z0[:, 0])

    def log_prob(self, x: Tensor) -> Tensor:
        normal = torch.distributions.Normal(self.m, self.s)
        return normal.log_prob(x).sum(-1)


class Sine(Problem):
    """v = a sin z, nonlinear: tan(z / 2) = e^(a t) tan(z0 / 2), and the divergence depends on the state."""

    features = 3

    def __init__(self) -> None:
        super().__init__()
        self.a = parameter(1.5)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.a * torch.sin(z)

    def start(self, n: int = 8) -> Tensor:
        return super().start(n).clamp(-2.5, 2.5)

    def state(self, t: float, z0: Tensor) -> Tensor:
        return 2 * torch.atan(torch.tan(z0 / 2) * torch.exp(self.a * t))

    def logp(self, t: float, z0: Tensor) -> Tensor:
        k = torch.tan(z0 / 2).square()
        return -(self.a * t + torch.log1p(k) - torch.log1p(k * torch.exp(2 * self.a * t))).sum(-1)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "linear": Linear,
    "diagonal": Diagonal,
    "rotation": Rotation,
    "affine in time": AffineInTime,
    "scaled in time": TimeScaled,
    "gaussian to gaussian": GaussianToGaussian,
    "sine": Sine,
}


class Calls(nn.Module):
    """Wrap a user's field and count its calls."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.count = field, 0

    def forward(self, t: Tensor, z: Tensor, *context: Tensor) -> Tensor:
        self.count += 1
        return self.field(t, z, *context)


class Wave(nn.Module):
    """A user's field with parameters and, if asked for, a context: tanh(W z + t u + U c) W'."""

    def __init__(self, features: int = 2, context: int = 0, width: int = 5) -> None:
        super().__init__()
        self.inner = nn.Linear(features + context + 1, width, dtype=torch.float64)
        self.outer = nn.Linear(width, features, dtype=torch.float64)

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        inputs = [z, t.expand(len(z), 1)] + ([] if context is None else [context])
        return self.outer(torch.tanh(self.inner(torch.cat(inputs, dim=1))))


def as_flow(problem: Problem, solver: Solver, **settings: object) -> CNF:
    """Make a one-block flow of a problem that uses one solver in both modes."""
    return CNF(problem.features, field=problem, solver=solver, eval_solver=solver, **settings)  # type: ignore[arg-type]


def small_flow(features: int = 2, *, tol: float = 1e-10, method: str = "dopri8", **settings: object) -> CNF:
    """Make a small float64 flow of multilayer perceptrons, solved tightly in both modes."""
    solver = Solver(method=method, rtol=tol, atol=tol)
    settings = {"hidden": (5, 4), "solver": solver, "eval_solver": solver} | settings
    return CNF(features, **settings).double()  # type: ignore[arg-type]


def flat_gradient(loss: Tensor, tensors: list[Tensor]) -> Tensor:
    """Gradient of a loss with respect to several tensors, as one vector."""
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    pairs = zip(tensors, gradients, strict=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for x, g in pairs])


def z_score_bound(false_alarm: float) -> float:
    """Bound that a standard normal variable exceeds, on either side, with this probability."""
    return math.sqrt(2) * float(torch.special.erfinv(torch.tensor(1 - false_alarm, dtype=torch.float64)))


JULIA = Path(os.environ.get("PYCNF_DATA", ".")).resolve().parent / "julia-reference"
"""Folder with the solves that Julia made, beside the real data."""


def read_julia(name: str, case: str) -> dict[str, Any]:
    """One case of a file in that folder."""
    content = json.loads((JULIA / name).read_text(encoding="utf-8"))
    return dict(content.get("cases", content)[case])


def julia_case(case: str) -> tuple[CNF, Tensor]:
    """Flow with the weights of a case that Julia solved, and its starting points."""
    inputs = read_julia("inputs.json", case)
    start = torch.tensor(inputs["z0"], dtype=torch.float64)
    sizes = [len(layer["bias"]) for layer in inputs["layers"]]
    flow = CNF(start.shape[1], sizes[:-1], T=inputs["T"]).double()
    with torch.no_grad():
        for layer, given in zip(flow.fields[0].layers, inputs["layers"], strict=True):
            weight = torch.tensor(given["weight"], dtype=torch.float64)
            layer.time_weight.copy_(weight[:, 0])
            layer.weight.copy_(weight[:, 1:])
            layer.bias.copy_(torch.tensor(given["bias"], dtype=torch.float64))
    return flow, start


def start_julia() -> None:
    """Start Julia or skip the test with the reason; PYCNF_REQUIRE_JULIA=1 makes its absence a failure."""
    try:
        shared_worker().start()
    except JuliaUnavailable as err:
        if os.environ.get("PYCNF_REQUIRE_JULIA") == "1":
            raise
        pytest.skip(str(err))


def write_pictures(folder: Path, rng: np.random.Generator) -> None:
    """Write files of MNIST and of the Frey Faces in their exact formats, small and with random content."""
    digits = {
        name: rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8) for name, rows in (("train", 60), ("test", 20))
    }
    labels = {f"{name}_labels": np.zeros(len(x), dtype=np.int64) for name, x in digits.items()}
    np.savez(folder / "mnist.npz", **digits, **labels)
    np.savez(folder / "freyfaces.npz", images=rng.integers(0, 256, (100, 28, 20), dtype=np.uint8))
