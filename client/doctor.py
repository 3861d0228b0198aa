"""Is this machine fit for the work, and is the site folder in order? Looks only; uses no network.

Each check is a function of what it looks at, so that a test can show it an unfit machine.
"""

import importlib.metadata
import locale
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from client.doctor_site import examine_site
from client.finding import Finding, Level, ok, problem, warning

# The lower bounds of pyproject.toml (a test holds them equal); below them the code is not known to run.
OLDEST_PYTHON = (3, 11)
OLDEST_PACKAGES = {
    "torch": "2.11", "wfdb": "4.3", "numpy": "2.1", "scipy": "1.15", "numba": "0.61", "flwr": "1.41", "opacus": "1.6",
    "cryptography": "50",
}
OPTIONAL_PACKAGES = {"h5py": "CODE-15% archives", "pydicom": "DICOM ECGs"}
