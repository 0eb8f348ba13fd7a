"""Training: fit a flow, evaluate it, save and load it."""

from pycnf.training.evaluation import Evaluation as Evaluation
from pycnf.training.evaluation import evaluate as evaluate
from pycnf.training.folder import load_flow as load_flow
from pycnf.training.folder import save_flow as save_flow
from pycnf.training.loop import fit as fit
from pycnf.training.options import TrainingOptions as TrainingOptions
from pycnf.training.results import FitResult as FitResult
from pycnf.training.results import TrainingError as TrainingError
from pycnf.training.results import TrainingInterrupted as TrainingInterrupted
