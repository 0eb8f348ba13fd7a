"""Regularizers: what is added to the negative log-likelihood to keep a field easy to integrate."""

from pycnf.regularizers.base import Regularizer as Regularizer
from pycnf.regularizers.base import check_regularizers as check_regularizers
from pycnf.regularizers.base import describe_regularizers as describe_regularizers
from pycnf.regularizers.base import parse_regularizers as parse_regularizers
from pycnf.regularizers.local import LocalError as LocalError
from pycnf.regularizers.local import Stiffness as Stiffness
from pycnf.regularizers.polynomial import TPR as TPR
