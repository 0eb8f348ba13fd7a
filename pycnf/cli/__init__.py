"""The command line: ``pycnf compare``, ``train``, ``evaluate``, ``sample`` and ``data``."""

from pycnf.cli.app import app as app
from pycnf.cli.app import main as main
