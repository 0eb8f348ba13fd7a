"""Run the command line: ``python -m pycnf``."""

import sys

from pycnf.cli.app import main

if __name__ == "__main__":
    sys.argv[0] = "pycnf"  # so that help and records name the command
    main()
