"""Load data: toys, the tables of the MAF benchmark, and a user's own files."""

from __future__ import annotations

from pycnf.data.catalog import Description as Description
from pycnf.data.catalog import describe as describe
from pycnf.data.catalog import names as names
from pycnf.data.checks import DataError as DataError
from pycnf.data.dataset import Dataset as Dataset
from pycnf.data.loading import load as load
from pycnf.data.remote import fetch as fetch
from pycnf.data.toy import sample_toy as sample_toy
