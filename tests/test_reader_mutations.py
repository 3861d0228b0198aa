"""Damaged bytes anywhere in an archive: every reader ends, accounts for its records, and raises nothing of its own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.records import open_archive
from client.records.record import EcgRecord, Remark
from shared_model.errors import HemoFedError
from tests.archive_fixtures import ARCHIVES

EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BYTES = st.one_of(st.sampled_from(list(b"\x00\xff\n,;#/.-0129eE")), st.integers(0, 255))


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    for name, archive in ARCHIVES.items():
        (folder / name).mkdir()
        archive.write(folder / name)
    return folder


@pytest.mark.parametrize("format_name", list(ARCHIVES))
@EXAMPLES
@given(data=st.data())
def test_flipped_bytes_never_crash_a_reader(
    tmp_path: Path, archives: Path, format_name: str, data: st.DataObject
) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(archives / format_name, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    # Headers are where damage does most: half of the flips go there.
    last = data.draw(st.sampled_from([min(600, len(content)), len(content)])) - 1
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, last))] = data.draw(BYTES)
    path.write_bytes(content)
    try:
        archive = open_archive(copy, format_name, ARCHIVES[format_name].options)
        items = [item for item in archive.items if not isinstance(item, Remark)]
    except HemoFedError:
        return  # a table of the archive is broken: one line for the whole folder
    assert len(items) == archive.count
    for record in items:
        if isinstance(record, EcgRecord):
            assert record.signal_mv.dtype == np.float32
            assert record.signal_mv.shape[0] == len(record.lead_names)
            assert not np.isinf(record.signal_mv).any()
        else:
            assert len(record.detail.splitlines()) == 1
