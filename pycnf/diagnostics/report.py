"""Everything that can be measured of a flow and a batch, in one call and one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pycnf.diagnostics.polynomials import PolynomialContent, polynomial_content
from pycnf.diagnostics.propagation import Contributions, contributions
from pycnf.diagnostics.samples import Difficulty, sample_difficulty
from pycnf.diagnostics.steps import LocalErrors, local_errors
from pycnf.diagnostics.truth import TRUTH
from pycnf.diagnostics.work import N_STEPS, TOLERANCES, WorkPoint, observed_order, work_precision
from pycnf.flow import CNF
from pycnf.solve import Solver

FAN = 1000  # states that travel together, at most, when errors are carried to the end


@dataclass(frozen=True)
class Diagnosis:
    """Hold the diagnostics of one flow and one batch.

    Attributes:
        errors: Local errors of the steps.
        contributions: What each step contributes to the error at the end, for the first samples.
        difficulty: Which samples set the steps.
        points: Error and cost of many methods.
        content: Polynomial content of the trajectories.
    """

    errors: LocalErrors
    contributions: Contributions
    difficulty: Difficulty
    points: list[WorkPoint]
    content: PolynomialContent

    def summary(self) -> dict[str, Any]:
        """Return all of it in numbers, ready for JSON; local errors are in units of the tolerance.

        The ratio of true error and estimate is that of the accepted steps whose error counts
        (:attr:`~pycnf.diagnostics.steps.LocalErrors.counts`).
        """
        kept, alone = self.errors.only_accepted(), self.difficulty.alone.double()
        found = (self.errors.norm("true") / self.errors.norm("estimate"))[self.errors.counts]
        rms, total = self.contributions.rms(), self.contributions.total.square()
        methods = dict.fromkeys(point.method for point in self.points)
        return {
            "solver": self.errors.solver.to_dict(),
            "truth": TRUTH.to_dict(),
            "nfe": self.errors.stats.nfe,
            "accepted": self.errors.stats.accepted,
            "rejected": self.errors.stats.rejected,
            "steps": self.errors.rows(),
            "true_over_estimate": {
                "steps": len(found),
                "median": float(found.median()) if len(found) else None,
                "max": float(found.max()) if len(found) else None,
            },
            "deciding": {name: kept.deciding().count(name) for name in ("z", "logp")},
            "error": {"z": float(total[:, :-1].mean().sqrt()), "logp": float(total[:, -1].mean().sqrt())},
            "contributions": {
                "samples": self.contributions.total.shape[0],
                **{name: values.tolist() for name, values in rms.items()},
            },
            "samples": {
                "hardest_tenth": self.difficulty.hardest(0.1),
                "effective": self.difficulty.effective,
                "share": self.difficulty.share.tolist(),
                "together": self.difficulty.together,
                "alone": self.difficulty.alone.tolist(),
                "alone_mean": float(alone.mean()) if len(alone) else None,
                "alone_max": float(alone.max()) if len(alone) else None,
            },
            "work_precision": [dataclasses.asdict(point) for point in self.points],
            "orders": {
                method: {name: observed_order(self.points, method, name) for name in ("z", "logp")}
                for method in methods
            },
            "polynomials": {
                "degree": self.content.degree,
                "coefficients": {k: v.tolist() for k, v in self.content.coefficient_rms().items()},
                "residuals": {k: v.tolist() for k, v in self.content.residual_rms().items()},
            },
        }


def diagnose(
    flow: CNF,
    x: Tensor,
    context: Tensor | None = None,
    *,
    solver: Solver | None = None,
    methods: Sequence[str] | None = None,
    tolerances: Sequence[float] = TOLERANCES,
    n_steps: Sequence[int] = N_STEPS,
    max_nfe: int | None = 500,
    degree: int = 8,
    alone: int = 64,
    say: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Measure the errors of a flow's solver on a batch, where they arise, and what other methods would do.

    Args:
        flow: The flow.
        x: Batch (B, D) in the flow's precision.
        context: Context (C,) or (B, C) of a conditional flow.
        solver: Adaptive solver whose steps are looked at; None for ``flow.eval_solver``.
        methods: Methods of the work-precision diagram; None for all but SciPy's.
        tolerances: rtol = atol of its adaptive methods.
        n_steps: Steps per block of its fixed-step methods.
        max_nfe: Budget of each of its solves and blocks.
        degree: Highest degree of the polynomial content.
        alone: Number of samples that are also solved by themselves.
        say: Function that is told what is being done.

    Returns:
        The diagnosis (:class:`Diagnosis`).

    Raises:
        ValueError: On impossible settings, or data that do not fit the flow.
        pycnf.SolveError: When a solve of the flow itself fails.
    """
    tell = say or (lambda text: None)
    tell("steps and their true local errors")
    errors = local_errors(flow, x, context, solver=solver)
    tell("what each step contributes to the error at the end")
    samples = max(8, FAN // max(1, errors.stats.accepted))
    carried = contributions(flow, errors, context, samples=samples)
    tell("samples, each solved alone")
    difficulty = sample_difficulty(flow, x, errors, context, alone=alone)
    tell("polynomial content of the trajectories")
    content = polynomial_content(flow, x, context, degree=degree)
    tell("work and precision of other methods")
    points = work_precision(flow, x, context, methods=methods, tolerances=tolerances, n_steps=n_steps, max_nfe=max_nfe)
    return Diagnosis(errors, carried, difficulty, points, content)


__all__ = ["Diagnosis", "diagnose"]
