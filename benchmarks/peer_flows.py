"""The same flow in pycnf, zuko, torchdyn, torchode, diffrax: same weights, tolerance, exact divergence and optimizer.

Each side takes training steps (loss -mean log p, its gradient, one step of Adam) and computes log-densities, and
tells how often it evaluated the field. What is theirs is used as it comes: solver, step control, divergence, gradient.

- zuko's flow has its perceptron replaced by the one of pycnf, evaluated as the plain module it is. Its step control
  takes the largest error of all rows and channels, with that of the log-density divided by 100; it evaluates the
  field anew at the start of each step. It knows one method and one way to differentiate, starts from T = 1, and tells
  neither evaluations nor states in between, so it can be given no budget and no regularizer of trajectories.
- torchdyn gets the weights in linear layers that take time as one more input. It builds the graph of the divergence
  even where no gradient is wanted, tells no rejected steps, and leaves log-densities and samples to the user.
- torchode solves equations, each row with steps of its own; value and divergence are propagated forward in one pass, as
  pycnf does it, so that what differs is the stepping and the gradient through it. It counts the calls of the field.
- diffrax solves equations and has no flow: density, divergence and loss are written here, as in its documentation,
  with forward-mode instead of reverse-mode tangents, which is faster. It compiles once for each shape of a batch.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from step_time import Steps
from torch import Tensor, nn

import pycnf
from pycnf.flow import standard_normal_log_prob

Counts = dict[str, int]


class Side(Protocol):
    """One library at work.

    Attributes:
        counts: Evaluations of the field in the last work done, "forward" and "backward".
    """

    counts: Counts

    def step(self, x: Tensor) -> None:
        """Take a training step."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p of rows, without gradients."""
        ...

    def gradient(self) -> Tensor:
        """Return the gradient of the last training step: W_1, b_1, w_1, W_2, ... in one vector."""
        ...


class Pycnf:
    """Train as fit does, each solve starting with the step that the one before suggests."""

    def __init__(self, flow: pycnf.CNF, tolerance: float) -> None:
        solver = pycnf.Solver(rtol=tolerance, atol=tolerance)
        self.flow = pycnf.CNF(**flow.config | {"solver": solver, "eval_solver": solver})
        self.flow.load_state_dict(flow.state_dict())
        self.train = Steps(self.flow, adam(self.flow), None)
        self.openings: tuple[float, ...] | None = None
        self.counts: Counts = {}

    def step(self, x: Tensor) -> None:
        self.counts = {"forward": self.train(x), "backward": 0}

    def log_prob(self, x: Tensor) -> Tensor:
        self.flow.eval()
        with torch.no_grad():
            solution = self.flow.solve(x, first_steps=self.openings)
        self.flow.train()
        self.openings, self.counts = solution.openings, {"forward": solution.stats.nfe}
        return solution.log_prob

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.flow.parameters() if p.grad is not None])


class Zuko:
    """Train zuko's CNF around the perceptron of pycnf."""

    def __init__(self, flow: pycnf.CNF, tolerance: float) -> None:
        import zuko
        from zuko.flows.continuous import FFJTransform

        side = self

        class Transform(FFJTransform):  # type: ignore[misc]
            def f(self, t: Tensor, x: Tensor, c: Tensor | None = None) -> Tensor:
                side.calls += 1
                return self.ode(t, x)

        transform = Transform(flow.features, atol=tolerance, rtol=tolerance, exact=True)
        transform.ode = copy.deepcopy(flow.fields[0])
        transform.times[1] = flow.T
        self.flow = zuko.flows.CNF(flow.features)
        self.flow.transform = transform
        self.optimizer, self.calls = adam(self.flow), 0
        self.counts: Counts = {}

    def step(self, x: Tensor) -> None:
        self.calls = 0
        self.optimizer.zero_grad()
        loss = -self.flow().log_prob(x).mean()
        forward = self.calls
        loss.backward()
        self.optimizer.step()
        self.counts = {"forward": forward, "backward": self.calls - forward}

    def log_prob(self, x: Tensor) -> Tensor:
        self.calls = 0
        self.flow.eval()
        with torch.no_grad():
            found: Tensor = self.flow().log_prob(x)
        self.flow.train()
        self.counts = {"forward": self.calls}
        return found

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.flow.transform.ode.parameters()])


class Torchdyn:
    """Train torchdyn's CNF by its adjoint or through its steps."""

    def __init__(self, flow: pycnf.CNF, tolerance: float, sensitivity: str) -> None:
        from torchdyn.core import NeuralODE
        from torchdyn.models import CNF
        from torchdyn.nn import DepthCat

        field = flow.fields[0]
        modules: list[nn.Module] = []
        self.linear: list[nn.Linear] = []
        for layer in field.layers:  # type: ignore[union-attr]
            linear = nn.Linear(layer.weight.shape[1] + 1, layer.weight.shape[0])
            with torch.no_grad():
                linear.weight.copy_(torch.cat([layer.weight, layer.time_weight.unsqueeze(1)], dim=1))
                linear.bias.copy_(layer.bias)
            self.linear.append(linear)
            modules += [DepthCat(1), linear, {"tanh": nn.Tanh, "softplus": nn.Softplus}[str(field.activation)]()]
        with contextlib.redirect_stdout(io.StringIO()):  # it announces that it wraps the field
            self.node = NeuralODE(
                CNF(nn.Sequential(*modules[:-1])),
                solver="dopri5",
                sensitivity=sensitivity,
                **dict.fromkeys(("atol", "rtol", "atol_adjoint", "rtol_adjoint"), tolerance),
            )
        self.ts = torch.tensor([0.0, flow.T])
        self.optimizer = adam(self.node)
        self.counts: Counts = {}

    def density(self, x: Tensor) -> Tensor:
        self.node.vf.nfe = 0
        _, states = self.node(torch.cat([torch.zeros_like(x[:, :1]), x], dim=1), self.ts.to(x))
        self.counts = {"forward": int(self.node.vf.nfe)}
        return standard_normal_log_prob(states[-1, :, 1:]) - states[-1, :, 0]

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        (-self.density(x).mean()).backward()
        self.optimizer.step()
        self.counts["backward"] = int(self.node.vf.nfe) - self.counts["forward"]

    def log_prob(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.density(x)

    def gradient(self) -> Tensor:
        parts = [(linear.weight.grad, linear.bias.grad) for linear in self.linear]
        return torch.cat([g.flatten() for weight, bias in parts for g in (weight[:, :-1], bias, weight[:, -1])])


class Torchode:
    """Train by stepping through value and divergence with torchode, one pass forward for both."""

    def __init__(self, flow: pycnf.CNF, tolerance: float) -> None:
        import torchode

        self.torchode, self.T = torchode, flow.T
        field = flow.fields[0]
        self.layers: Any = copy.deepcopy(field.layers)
        self.activation: Any = {"tanh": torch.tanh, "softplus": nn.functional.softplus}[str(field.activation)]
        term = torchode.ODETerm(self.moved, with_stats=False)
        control = torchode.IntegralController(tolerance, tolerance, term=term)
        self.solver = torchode.AutoDiffAdjoint(
            torchode.Dopri5(term=term), control, backprop_through_step_size_control=False
        )
        self.optimizer, self.calls = adam(self.layers), 0
        self.counts: Counts = {}

    def moved(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        a, tangents = y[:, :-1], torch.eye(y.shape[1] - 1).to(y).unsqueeze(1)  # (B, D), (D, 1, D)
        for number, layer in enumerate(self.layers):
            if number:
                slope = torch.sigmoid(a) if self.activation is nn.functional.softplus else 1 - torch.tanh(a) ** 2
                a, tangents = self.activation(a), slope * tangents
            a = torch.addcmul(a @ layer.weight.t() + layer.bias, t.unsqueeze(1), layer.time_weight)
            tangents = tangents @ layer.weight.t()
        return torch.cat([a, -tangents.diagonal(dim1=0, dim2=2).sum(-1).unsqueeze(1)], dim=1)

    def density(self, x: Tensor) -> Tensor:
        self.calls, ends = 0, torch.full_like(x[:, 0], self.T)
        start = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
        problem = self.torchode.InitialValueProblem(y0=start, t_start=torch.zeros_like(ends), t_end=ends)
        y = self.solver.solve(problem).ys[:, -1]
        self.counts = {"forward": self.calls}
        return standard_normal_log_prob(y[:, :-1]) - y[:, -1]

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        (-self.density(x).mean()).backward()
        self.optimizer.step()

    def log_prob(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.density(x)

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.layers.parameters()])


class Diffrax:
    """Train a flow written with diffrax and optax, compiled as a whole."""

    def __init__(self, flow: pycnf.CNF, tolerance: float) -> None:
        import diffrax
        import jax
        import jax.numpy as jnp
        import optax

        field = flow.fields[0]
        activation = {"tanh": jnp.tanh, "softplus": jax.nn.softplus}[str(field.activation)]
        self.parameters: Any = [
            tuple(jnp.asarray(p.detach().numpy()) for p in (layer.weight, layer.bias, layer.time_weight))
            for layer in field.layers  # type: ignore[union-attr]
        ]
        basis = jnp.eye(flow.features)

        def velocity(t: Any, z: Any, parameters: Any) -> Any:
            for i, (weight, bias, rate) in enumerate(parameters):
                z = weight @ (z if i == 0 else activation(z)) + bias + t * rate
            return z

        def moved(t: Any, z: Any, parameters: Any) -> Any:
            v, push = jax.linearize(lambda z: velocity(t, z, parameters), z)
            return v, -jnp.trace(jax.vmap(push)(basis))

        def log_prob(parameters: Any, x: Any) -> Any:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, parameters: jax.vmap(moved, (None, 0, None))(t, y[0], parameters)),
                diffrax.Dopri5(),
                0.0,
                flow.T,
                None,
                (x, jnp.zeros(len(x))),
                parameters,
                stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
                max_steps=256,
            )
            z, logp = solution.ys
            normal = -0.5 * jnp.sum(z[0] ** 2, axis=1) - 0.5 * flow.features * jnp.log(2 * jnp.pi)
            return normal - logp[0], 2 + 6 * solution.stats["num_steps"]  # the first step takes two, each step six

        def loss(parameters: Any, x: Any) -> Any:
            values, calls = log_prob(parameters, x)
            return -values.mean(), calls

        def step(parameters: Any, state: Any, x: Any) -> Any:
            gradient, calls = jax.grad(loss, has_aux=True)(parameters, x)
            updates, state = self.optimizer.update(gradient, state, parameters)
            return optax.apply_updates(parameters, updates), state, gradient, calls

        self.optimizer = optax.adam(0.0)
        self.state = self.optimizer.init(self.parameters)
        self.compiled_step, self.compiled_log_prob = jax.jit(step), jax.jit(log_prob)
        self.ready: Callable[[Any], Any] = jax.block_until_ready
        self.last: Any = None
        self.counts: Counts = {}

    def step(self, x: Tensor) -> None:
        done = self.ready(self.compiled_step(self.parameters, self.state, x.numpy()))
        self.parameters, self.state, self.last, calls = done
        self.counts = {"forward": int(calls)}  # what its backward pass evaluates again, it does not tell

    def log_prob(self, x: Tensor) -> Tensor:
        values, calls = self.ready(self.compiled_log_prob(self.parameters, x.numpy()))
        self.counts = {"forward": int(calls)}
        return torch.from_numpy(np.array(values))

    def gradient(self) -> Tensor:
        return torch.cat([torch.from_numpy(np.array(part)).flatten() for layer in self.last for part in layer])


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """Return Adam at a rate of 0: all sides stay at the same weights."""
    return torch.optim.Adam(module.parameters(), lr=0.0, fused=True)


SIDES: dict[str, Callable[[pycnf.CNF, float], Side]] = {
    "pycnf": Pycnf,
    "zuko": Zuko,
    "torchdyn": lambda flow, tolerance: Torchdyn(flow, tolerance, "autograd"),
    "torchdyn, adjoint": lambda flow, tolerance: Torchdyn(flow, tolerance, "adjoint"),
    "torchode": Torchode,
    "diffrax": Diffrax,
}
