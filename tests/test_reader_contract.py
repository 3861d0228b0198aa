"""One contract for every reader, on a format-faithful archive of each (docs/add-a-reader.md)."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.ingest import ingest
from client.records import READERS, Reader, choose_format, open_archive
from client.records.options import ReaderOptions
from client.records.record import EcgRecord, Reason, Remark, TurnedAway
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS, arrange
from tests.archive_fixtures import ARCHIVES, ArchiveFixture, Whole, cut_short, spoil
from tests.wfdb_fixtures import ecg_steps

GUIDE = Path(__file__).parents[1] / "docs" / "add-a-reader.md"
every_format = pytest.mark.parametrize("format_name", [*ARCHIVES, "cart"])


def write_cart(folder: Path) -> Whole:
    """The imaginary archive of docs/add-a-reader.md."""
    for number in range(3):
        rows = [",".join(map(str, sample)) for sample in ecg_steps(seed=number).T]
        first = ["rate_hz=500;unit=uV;samples=5000;patient=P1", ",".join(LEADS)]
        (folder / f"r{number}.cart").write_text("\n".join([*first, *rows]))
    cut_short(folder / "r1.cart")
    spoil(folder / "r2.cart")
    return Whole("r0", "P1", ecg_steps() / 1000, 1e-6)


@pytest.fixture(autouse=True)
def the_guide_is_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the guide, registered as the guide says."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    guide: dict[str, Any] = {}
    exec(compile(code, str(GUIDE), "exec"), guide)
    monkeypatch.setitem(READERS, "cart", Reader(guide["recognises"], guide["open_archive"]))
    monkeypatch.setitem(ARCHIVES, "cart", ArchiveFixture(write_cart))


def read(folder: Path, format_name: str) -> tuple[int, list[EcgRecord], list[TurnedAway]]:
    archive = open_archive(folder, format_name, ARCHIVES[format_name].options)
    items = list(archive.items)
    records = [item for item in items if isinstance(item, EcgRecord)]
    return archive.count, records, [item for item in items if isinstance(item, TurnedAway)]


@every_format
def test_a_whole_record_comes_through_as_it_is(tmp_path: Path, format_name: str) -> None:
    whole = ARCHIVES[format_name].write(tmp_path)
    _, (record,), _ = read(tmp_path, format_name)
    assert (record.record_id, record.patient_id) == (whole.record_id, whole.patient_id)
    assert record.sampling_rate_hz == whole.sampling_rate_hz
    assert sorted(record.lead_names, key=LEADS.index) == list(LEADS)
    assert record.signal_mv.dtype == np.float32
    assert record.signal_mv.shape == whole.signal_mv.shape
    difference_mv = np.abs(arrange(record.signal_mv, record.lead_names) - whole.signal_mv)
    assert difference_mv.max() <= whole.lsb_mv / 2
    np.testing.assert_equal((record.recorded_at, record.age_years), (whole.recorded_at, whole.age_years))
    assert (record.sex, dict(record.labels)) == (whole.sex, dict(whole.labels))
    assert (record.device, dict(record.measurements)) == (whole.device, dict(whole.measurements))


@every_format
def test_every_record_is_accounted_for(tmp_path: Path, format_name: str) -> None:
    ARCHIVES[format_name].write(tmp_path)
    count, records, away = read(tmp_path, format_name)
    assert count == len(records) + len(away) == 3
    assert {item.reason for item in away} <= {Reason.TRUNCATED, Reason.UNREADABLE}
    for item in away:
        assert item.source
        assert len(item.detail.splitlines()) == 1
        assert "again" in item.detail  # the remedy


@every_format
def test_auto_finds_the_format_and_the_store_takes_it(tmp_path: Path, format_name: str) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    ARCHIVES[format_name].write(source)
    assert choose_format(source) == format_name
    summary = ingest(source, site_dir, options=ARCHIVES[format_name].options)
    assert (summary.format, summary.read, summary.stored) == (format_name, 3, 1)
    again = ingest(source, site_dir, options=ARCHIVES[format_name].options)
    assert (again.read, again.stored, again.already_stored) == (3, 0, 1)


@every_format
def test_an_option_without_use_is_refused(tmp_path: Path, format_name: str) -> None:
    ARCHIVES[format_name].write(tmp_path)
    for option, options in {
        "--where": ReaderOptions(where=("a=b",)),
        "--unit": ReaderOptions(unit="mV"),
        "--leads": ReaderOptions(leads=("I",)),
    }.items():
        if option not in READERS[format_name].takes:
            with pytest.raises(HemoFedError, match=f"{option}: .*leave it out"):
                open_archive(tmp_path, format_name, options)


@pytest.mark.parametrize(
    ("first", "names", "reason"),
    [
        ("rate_hz=0;unit=uV;samples=5000;patient=P1", LEADS, Reason.NO_SAMPLING_RATE),
        ("rate_hz=nan;unit=uV;samples=5000;patient=P1", LEADS, Reason.NO_SAMPLING_RATE),
        ("rate_hz=500;unit=uV;samples=0;patient=P1", LEADS, Reason.TOO_SHORT),
        ("rate_hz=500;unit=uV;samples=-3;patient=P1", LEADS, Reason.TOO_SHORT),
        ("rate_hz=500;unit=uV;samples=5000;patient=P1", LEADS[:11], Reason.UNREADABLE),
        ("rate_hz=500;unit=uV;samples=5000;patient=P1", (*LEADS, "V7"), Reason.UNREADABLE),
    ],
)
def test_the_guide_turns_away_what_a_header_misstates(
    tmp_path: Path, first: str, names: tuple[str, ...], reason: Reason
) -> None:
    write_cart(tmp_path)
    path = tmp_path / "r0.cart"
    path.write_text("\n".join([first, ",".join(names), *path.read_text().splitlines()[2:]]))
    count, records, away = read(tmp_path, "cart")
    assert (count, len(records), len(away)) == (3, 0, 3)
    assert [item.reason for item in away if item.source == "r0.cart"] == [reason]


def test_the_subject_id_of_mimic_stays_out_of_the_index(tmp_path: Path) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    whole: Whole = ARCHIVES["mimic-iv-ecg"].write(source)
    assert ingest(source, site_dir).turned_away == {"truncated": 1, "unreadable": 1}
    for path in site_dir.iterdir():
        assert path.is_dir() or whole.patient_id.encode() not in path.read_bytes()
    assert whole.record_id.encode() in (site_dir / "index.sqlite").read_bytes()


@pytest.mark.parametrize(
    ("one", "other"),
    [("wfdb", "matlab"), ("cinc", "matlab"), ("ptbxl", "mimic-iv-ecg"), ("muse-xml", "dicom"), ("scg-rhc", "dicom")],
)
def test_two_formats_in_one_folder_are_not_guessed_between(tmp_path: Path, one: str, other: str) -> None:
    for format_name in (one, other):
        ARCHIVES[format_name].write(tmp_path)
    with pytest.raises(HemoFedError, match="--format") as caught:
        choose_format(tmp_path)
    assert caught.value.exit_code == ExitCode.FORMAT_UNDECLARED
    assert f"--format {one}" in caught.value.message
    assert f"--format {other}" in caught.value.message
    assert choose_format(tmp_path, one) == one


@pytest.mark.parametrize(("many", "one"), [("muse-xml", "hl7-aecg"), ("hl7-aecg", "muse-xml")])
def test_one_other_among_many_is_seen(tmp_path: Path, many: str, one: str) -> None:
    """An archive of one kind of XML with a single file of the other kind, wherever the file system lists it."""
    roots = {"muse-xml": "<RestingECG>", "hl7-aecg": '<AnnotatedECG xmlns="urn:hl7-org:v3">'}
    for number in range(300):
        (tmp_path / f"r{number}.xml").write_text(f'<?xml version="1.0"?>{roots[many]}')
    assert choose_format(tmp_path) == many
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "other.XML").write_text(f'<?xml version="1.0"?>{roots[one]}')
    with pytest.raises(HemoFedError) as caught:
        choose_format(tmp_path)
    assert caught.value.exit_code == ExitCode.FORMAT_UNDECLARED
    assert all(f"--format {name}" in caught.value.message for name in roots)


def test_remarks_are_no_records(tmp_path: Path) -> None:
    ARCHIVES["cinc"].write(tmp_path)
    items = list(open_archive(tmp_path, "cinc", ReaderOptions()).items)
    assert [item.noticed for item in items if isinstance(item, Remark)] == ["patient_from_record_name"]


def test_every_format_has_its_fixtures_and_its_line_in_the_guide() -> None:
    assert set(READERS) == set(ARCHIVES)
    table = (GUIDE.parent / "site-store.md").read_text(encoding="utf-8").partition("## Formats")[2].partition("###")[0]
    assert set(re.findall(r"^\| `([a-z][\w-]+)` \|", table, re.MULTILINE)) == set(READERS) - {"cart"}
