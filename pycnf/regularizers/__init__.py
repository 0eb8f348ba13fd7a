"""Regularizers: what is added to the negative log-likelihood to keep a field easy to integrate."""

from pycnf.regularizers.base import DEFAULT as DEFAULT
from pycnf.regularizers.base import Regularizer as Regularizer
from pycnf.regularizers.base import check_regularizers as check_regularizers
from pycnf.regularizers.base import describe_regularizers as describe_regularizers
from pycnf.regularizers.base import parse_regularizers as parse_regularizers
from pycnf.regularizers.decay import Decay as Decay
from pycnf.regularizers.integrals import Derivative as Derivative
from pycnf.regularizers.integrals import Jacobian as Jacobian
from pycnf.regularizers.integrals import Kinetic as Kinetic
from pycnf.regularizers.local import LocalError as LocalError
from pycnf.regularizers.local import Stiffness as Stiffness
from pycnf.regularizers.polynomial import TPR as TPR
from pycnf.regularizers.steer import Steer as Steer
