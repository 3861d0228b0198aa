"""Where the real ECGs lie, if they lie anywhere: HEMOFED_REAL_DATA, else ../shared/data beside the checkout."""

import os
from pathlib import Path

import pytest

REAL_DATA = Path(os.environ.get("HEMOFED_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"real ECGs are not at {REAL_DATA}; set HEMOFED_REAL_DATA to their folder"
)
