"""Experiments: arms that differ in their regularizer alone, trained and tested at the same tolerance."""

from pycnf.experiments.arms import Arm as Arm
from pycnf.experiments.arms import parse_arms as parse_arms
from pycnf.experiments.arms import parse_seeds as parse_seeds
from pycnf.experiments.autoencoders import AutoEncoders as AutoEncoders
from pycnf.experiments.bench_results import BenchResult as BenchResult
from pycnf.experiments.bench_results import load_bench as load_bench
from pycnf.experiments.benchmark import bench as bench
from pycnf.experiments.budgets import Budget as Budget
from pycnf.experiments.budgets import read_budget as read_budget
from pycnf.experiments.comparison import compare as compare
from pycnf.experiments.fronts import front_points as front_points
from pycnf.experiments.image_flows import Images as Images
from pycnf.experiments.presets import get_preset as get_preset
from pycnf.experiments.presets import list_presets as list_presets
from pycnf.experiments.reproduction import plan_experiment as plan_experiment
from pycnf.experiments.reproduction import run_experiment as run_experiment
from pycnf.experiments.results import ComparisonResult as ComparisonResult
from pycnf.experiments.runs import train_and_test as train_and_test
from pycnf.experiments.setup import PRESETS as PRESETS
from pycnf.experiments.setup import Setup as Setup
from pycnf.experiments.setup import read_hidden as read_hidden
from pycnf.experiments.setup import setup_for as setup_for
from pycnf.experiments.sweep import nfe_at_error as nfe_at_error
from pycnf.experiments.sweep import sweep_tolerances as sweep_tolerances
from pycnf.experiments.workloads import Tables as Tables
from pycnf.experiments.workloads import Workload as Workload
