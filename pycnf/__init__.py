"""Train continuous normalizing flows that are cheap to solve.

>>> import torch, pycnf
>>> flow = pycnf.CNF(features=2, hidden=(16, 16))
>>> flow().log_prob(torch.zeros(4, 2)).shape == (4,)
True
"""

from importlib.metadata import version

from pycnf.convolution import ConvNet as ConvNet
from pycnf.divergence import Exact as Exact
from pycnf.divergence import Hutchinson as Hutchinson
from pycnf.fields import MLP as MLP
from pycnf.flow import CNF as CNF
from pycnf.flow import FlowDistribution as FlowDistribution
from pycnf.flow import FlowSolution as FlowSolution
from pycnf.objective import objective as objective
from pycnf.reference import reference_solve as reference_solve
from pycnf.regularizers import TPR as TPR
from pycnf.regularizers import Regularizer as Regularizer
from pycnf.shipped import load as load
from pycnf.shipped import models as models
from pycnf.solution import Solution as Solution
from pycnf.solution import SolveError as SolveError
from pycnf.solution import SolveStats as SolveStats
from pycnf.solution import SolveWarning as SolveWarning
from pycnf.solve import Solver as Solver
from pycnf.training import evaluate as evaluate
from pycnf.training import fit as fit
from pycnf.training import load_flow as load_flow
from pycnf.training import save_flow as save_flow

__version__ = version("pycnf")
