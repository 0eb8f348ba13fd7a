"""Diagnostics: the errors a solver makes on a flow, where it makes them, and what its trajectories are made of."""

from pycnf.diagnostics.polynomials import PolynomialContent as PolynomialContent
from pycnf.diagnostics.polynomials import polynomial_content as polynomial_content
from pycnf.diagnostics.propagation import Contributions as Contributions
from pycnf.diagnostics.propagation import contributions as contributions
from pycnf.diagnostics.report import Diagnosis as Diagnosis
from pycnf.diagnostics.report import diagnose as diagnose
from pycnf.diagnostics.samples import Difficulty as Difficulty
from pycnf.diagnostics.samples import sample_difficulty as sample_difficulty
from pycnf.diagnostics.steps import LocalErrors as LocalErrors
from pycnf.diagnostics.steps import local_errors as local_errors
from pycnf.diagnostics.truth import TRUTH as TRUTH
from pycnf.diagnostics.truth import in_float64 as in_float64
from pycnf.diagnostics.truth import solve_truth as solve_truth
from pycnf.diagnostics.work import WorkPoint as WorkPoint
from pycnf.diagnostics.work import observed_order as observed_order
from pycnf.diagnostics.work import work_precision as work_precision
