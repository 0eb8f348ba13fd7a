"""Experiments: arms that differ in their regularizer alone, trained and tested at the same tolerance."""

from pycnf.experiments.arms import Arm as Arm
from pycnf.experiments.arms import parse_arms as parse_arms
from pycnf.experiments.arms import parse_seeds as parse_seeds
from pycnf.experiments.bench_results import BenchResult as BenchResult
from pycnf.experiments.bench_results import load_bench as load_bench
from pycnf.experiments.benchmark import bench as bench
from pycnf.experiments.budgets import Budget as Budget
from pycnf.experiments.budgets import read_budget as read_budget
from pycnf.experiments.comparison import compare as compare
from pycnf.experiments.fronts import front_points as front_points
from pycnf.experiments.results import ComparisonResult as ComparisonResult
from pycnf.experiments.runs import train_and_test as train_and_test
from pycnf.experiments.setup import PRESETS as PRESETS
from pycnf.experiments.setup import Setup as Setup
from pycnf.experiments.setup import read_hidden as read_hidden
from pycnf.experiments.setup import setup_for as setup_for
from pycnf.experiments.sweep import nfe_at_error as nfe_at_error
from pycnf.experiments.sweep import sweep_tolerances as sweep_tolerances
