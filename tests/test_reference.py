"""Compare with solves made by Julia's DifferentialEquations.jl (Vern9 at 1e-13).

The reference lies in a folder ``julia-reference`` beside the folder that PYCNF_DATA names.
"""

from __future__ import annotations

import os

import pytest
import torch
from problems import JULIA, julia_case, read_julia

from pycnf import Solver

pytestmark = pytest.mark.skipif(
    "PYCNF_DATA" not in os.environ or not (JULIA / "reference.json").is_file(),
    reason="no folder julia-reference beside the one that PYCNF_DATA names",
)
CASES = ["mlp2", "mlp6"]


@pytest.mark.parametrize("divergence", ["exact", "exact-forward", "exact-reverse"])
@pytest.mark.parametrize("case", CASES)
def test_trajectories_and_densities(case: str, divergence: str) -> None:
    reference = read_julia("reference.json", case)
    states = torch.tensor(reference["states"], dtype=torch.float64)
    flow, start = julia_case(case)
    solver = Solver(method="dopri8", rtol=1e-12, atol=1e-12, samples="exact")
    with torch.no_grad():
        (block,) = flow.solve(start, times=reference["times"][1:-1], solver=solver, divergence=divergence).blocks
    assert block.ts.tolist() == reference["times"]
    assert block.logp is not None
    assert float((block.z - states[..., :-1]).abs().max()) <= 1e-11
    assert float((block.logp - states[..., -1]).abs().max()) <= 1e-11


@pytest.mark.parametrize("case", CASES)
def test_way_back(case: str) -> None:
    states = torch.tensor(read_julia("reference.json", case)["states"], dtype=torch.float64)
    flow, start = julia_case(case)
    solver = Solver(method="dopri8", rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        back = flow.solve(states[-1, :, :-1], reverse=True, solver=solver)
    torch.testing.assert_close(back.z, start, atol=1e-9, rtol=0)
    torch.testing.assert_close(back.logp, -states[-1, :, -1], atol=1e-9, rtol=0)


# Largest error of log p at T and calls, measured when the solve was made to end at T.
MEASURED = [
    ("mlp2", "bosh3", 1e-6, 8e-7, 116),
    ("mlp2", "dopri5", 1e-5, 5e-5, 26),
    ("mlp2", "dopri8", 1e-5, 2e-6, 41),
    ("mlp2", "dopri8", 1e-8, 7e-10, 93),
    ("mlp6", "bosh3", 1e-6, 1e-6, 122),
    ("mlp6", "dopri5", 1e-6, 5e-6, 50),
    ("mlp6", "dopri8", 1e-5, 6e-7, 67),
    ("mlp6", "dopri8", 1e-8, 2e-9, 106),
]


@pytest.mark.parametrize(("case", "method", "tol", "error", "calls"), MEASURED)
def test_achieved_error_at_the_end(case: str, method: str, tol: float, error: float, calls: int) -> None:
    states = torch.tensor(read_julia("reference.json", case)["states"], dtype=torch.float64)
    flow, start = julia_case(case)
    with torch.no_grad():
        solution = flow.solve(start, solver=Solver(method=method, rtol=tol, atol=tol))
    assert float((solution.logp - states[-1, :, -1]).abs().max()) <= 3 * error
    assert solution.stats.nfe <= 1.5 * calls


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
@pytest.mark.parametrize("case", CASES)
def test_error_stays_near_the_tolerance(case: str, method: str) -> None:
    states = torch.tensor(read_julia("reference.json", case)["states"], dtype=torch.float64)
    flow, start = julia_case(case)
    for tol in (1e-5, 1e-6, 1e-7, 1e-8):
        with torch.no_grad():
            solution = flow.solve(start, solver=Solver(method=method, rtol=tol, atol=tol))
        assert float((solution.z - states[-1, :, :-1]).abs().max()) <= 30 * tol
        assert float((solution.logp - states[-1, :, -1]).abs().max()) <= 30 * tol
