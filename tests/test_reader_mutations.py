"""Damage anywhere in an archive: every ingest ends, accounts for its records, and raises nothing of its own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.ingest import ingest
from client.records import open_archive
from client.records.record import EcgRecord, Remark
from client.store import open_store
from shared_model.errors import HemoFedError
from tests.archive_fixtures import ARCHIVES
from tests.mutations import damaged, fields_replaced

EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = (".hea", ".csv", ".json", ".xml")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    for name, archive in ARCHIVES.items():
        (folder / name).mkdir()
        archive.write(folder / name)
    return folder


def damaged_copy(archive: Path, copy: Path, data: st.DataObject) -> Path:
    """A copy of an archive with one file damaged; returns that file."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(archive, copy)
    # One suffix first, so that a table is damaged as often as the many files of records.
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    suffix = data.draw(st.sampled_from(sorted({path.suffix for path in files})))
    path = data.draw(st.sampled_from([path for path in files if path.suffix == suffix]))
    way = fields_replaced if suffix in TEXT and data.draw(st.booleans()) else damaged
    path.write_bytes(data.draw(way(path.read_bytes())))
    return path


@pytest.mark.parametrize("format_name", list(ARCHIVES))
@EXAMPLES
@given(data=st.data())
def test_damage_never_crashes_a_reader(tmp_path: Path, archives: Path, format_name: str, data: st.DataObject) -> None:
    path = damaged_copy(archives / format_name, tmp_path / "copy", data)
    try:
        archive = open_archive(tmp_path / "copy", format_name, ARCHIVES[format_name].options)
        items = [item for item in archive.items if not isinstance(item, Remark)]
    except HemoFedError:
        assert path.suffix == ".csv"  # a table of the archive is broken: one line for the whole folder
        return
    assert len(items) == archive.count
    for record in items:
        if isinstance(record, EcgRecord):
            assert record.signal_mv.dtype == np.float32
            assert record.signal_mv.shape[0] == len(record.lead_names)
            assert not np.isinf(record.signal_mv).any()
        else:
            assert len(record.detail.splitlines()) == 1


@pytest.mark.parametrize("format_name", list(ARCHIVES))
@settings(EXAMPLES, max_examples=12)
@given(data=st.data())
def test_an_ingest_of_a_damaged_archive_adds_up(
    tmp_path: Path, archives: Path, format_name: str, data: st.DataObject
) -> None:
    path = damaged_copy(archives / format_name, tmp_path / "copy", data)
    site_dir = tmp_path / "site"
    shutil.rmtree(site_dir, ignore_errors=True)
    try:
        count = open_archive(tmp_path / "copy", format_name, ARCHIVES[format_name].options).count
        summary = ingest(tmp_path / "copy", site_dir, format=format_name, options=ARCHIVES[format_name].options)
    except HemoFedError:
        assert path.suffix == ".csv"
        return
    assert summary.read == count == summary.stored + summary.already_stored + sum(summary.turned_away.values())
    if summary.stored:
        store = open_store(site_dir)
        assert len(store.index) == summary.segments
        assert store.read(np.arange(len(store.index))).dtype == np.int16
