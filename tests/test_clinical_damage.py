"""Damaged and hostile files of hospital systems: a reason each, never a crash, a hang or a silent change."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.cli import main
from client.records import READERS
from client.records.options import ReaderOptions
from client.records.record import EcgRecord, Item, Reason, Remark, TurnedAway
from shared_model.errors import ExitCode
from shared_model.leads import LEADS
from tests.clinical_fixtures import (
    MUSE_DOCTYPE,
    MUSE_LEADS,
    dicom_group,
    only_reason,
    only_record,
    steps_for,
    write_aecg,
    write_dicom,
    write_muse,
    write_scg_rhc,
)

MUTATION = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SHORT = 3000  # samples
flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


def flipped(content: bytes, changes: list[tuple[float, int]]) -> bytes:
    raw = bytearray(content)
    for place, byte in changes:
        raw[int(place * len(raw))] = byte
    return bytes(raw)


def items_of(reader: str, folder: Path) -> list[Item]:
    """Everything one reader says of a folder, without Remarks; each detail is one line."""
    items = [
        item for item in READERS[reader].open_archive(folder, ReaderOptions()).items if not isinstance(item, Remark)
    ]
    assert all(len(item.detail.splitlines()) == 1 for item in items if isinstance(item, TurnedAway))
    return items


@MUTATION
@given(changes=flips)
def test_muse_samples_never_change_silently(tmp_path: Path, changes: list[tuple[float, int]]) -> None:
    """Whatever is flipped within WaveFormData, the CRC turns the file away or the samples are the same."""
    path = write_muse(tmp_path / "r.xml", steps_for(MUSE_LEADS)[:, :SHORT])
    expected = only_record(tmp_path).signal_mv
    head, mark, rest = path.read_bytes().rpartition(b"<WaveFormData>")
    data, end, tail = rest.partition(b"</WaveFormData>")
    path.write_bytes(head + mark + flipped(data, changes) + end + tail)
    (item,) = items_of("muse-xml", tmp_path)
    if isinstance(item, EcgRecord):
        np.testing.assert_array_equal(item.signal_mv, expected)
    else:
        assert item.reason in (Reason.WRONG_CHECKSUM, Reason.TRUNCATED, Reason.UNREADABLE)


def test_without_the_checksum_the_change_would_be_silent(tmp_path: Path) -> None:
    """The negative control of the test above: it is the CRC that notices."""
    path = write_muse(tmp_path / "r.xml")
    expected = only_record(tmp_path).signal_mv
    text = path.read_text("latin-1")
    place = text.rindex("<WaveFormData>") + 40
    changed = text[:place] + ("B" if text[place] != "B" else "C") + text[place + 1 :]
    path.write_text(changed, "latin-1")
    assert only_reason(tmp_path) == Reason.WRONG_CHECKSUM
    path.write_text(changed.replace("LeadDataCRC32", "Unchecked"), "latin-1")
    assert not np.array_equal(only_record(tmp_path).signal_mv, expected)


@MUTATION
@given(changes=flips, reader=st.sampled_from(["muse-xml", "hl7-aecg"]))
def test_a_damaged_xml_never_crashes(tmp_path: Path, changes: list[tuple[float, int]], reader: str) -> None:
    write = {"muse-xml": write_muse, "hl7-aecg": write_aecg}[reader]
    # Four leads of six samples: most flips then hit the structure, not the samples.
    path = write(tmp_path / reader / "r.xml", steps_for(LEADS if reader == "hl7-aecg" else MUSE_LEADS)[:, :6])
    path.write_bytes(flipped(path.read_bytes(), changes))
    assert len(items_of(reader, path.parent)) == 1


@MUTATION
@given(changes=flips, cut=st.one_of(st.none(), st.integers(0, 3000)))
def test_a_damaged_dicom_never_crashes(tmp_path: Path, changes: list[tuple[float, int]], cut: int | None) -> None:
    pytest.importorskip("pydicom")
    path = write_dicom(tmp_path / "r.dcm", [dicom_group(steps_for(LEADS)[:, :6], padding=-32768)])
    path.write_bytes(flipped(path.read_bytes(), changes)[:cut])
    assert len(items_of("dicom", tmp_path)) == 1


@MUTATION
@given(changes=flips, file=st.sampled_from([".json", ".hea"]))
def test_a_damaged_scg_rhc_never_crashes(tmp_path: Path, changes: list[tuple[float, int]], file: str) -> None:
    path = write_scg_rhc(tmp_path, seconds=2).with_suffix(file)
    path.write_bytes(flipped(path.read_bytes(), changes))
    assert len(items_of("scg-rhc", tmp_path)) == 1


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
HOSTILE = {
    "billion laughs": (f'<!DOCTYPE RestingECG [<!ENTITY l0 "lol">{LAUGHS}]>', "&l9;"),
    "external entity": ('<!DOCTYPE RestingECG [<!ENTITY x SYSTEM "file:///etc/passwd">]>', "&x;"),
    "external parameter entity": ('<!DOCTYPE RestingECG [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]>', "P"),
    "default attribute": ('<!DOCTYPE RestingECG [<!ATTLIST LeadData a CDATA "aaaa">]>', "P"),
    "entity of the external DTD": (MUSE_DOCTYPE, "&x;"),
    "undefined entity": ("", "&x;"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_declarations_and_entities_are_refused(tmp_path: Path, name: str) -> None:
    doctype, patient_id = HOSTILE[name]
    write_muse(tmp_path / "r.xml", doctype=doctype, patient={"PatientID": patient_id})
    assert only_reason(tmp_path) == Reason.UNREADABLE


def test_built_in_entities_and_the_plain_doctype_are_read(tmp_path: Path) -> None:
    """The negative control: a guard that refused every DOCTYPE or entity would refuse every MUSE file."""
    (tmp_path / "restecg.dtd").write_text('<!ENTITY x "read after all">')
    write_muse(tmp_path / "r.xml", patient={"PatientID": "A&amp;B&#49;"})
    assert only_record(tmp_path).patient_id == "A&B1"


@pytest.mark.parametrize(
    "inside", ["<a>" * 200 + "</a>" * 200, "<a/>" * 200_001, f"<PatientID>{' ' * (33 << 20)}</PatientID>"]
)
def test_too_deep_too_many_too_large(tmp_path: Path, inside: str) -> None:
    path = write_muse(tmp_path / "r.xml")
    path.write_text(path.read_text("latin-1").replace("<MuseInfo>", f"{inside}<MuseInfo>"), "latin-1")
    assert only_reason(tmp_path) == Reason.UNREADABLE


@pytest.mark.parametrize("length", [2**30, 2**32 - 2])
def test_a_dicom_that_claims_a_gigabyte(tmp_path: Path, length: int) -> None:
    pytest.importorskip("pydicom")
    path = write_dicom(tmp_path / "r.dcm", [dicom_group(steps_for(LEADS)[:, :SHORT])])
    raw, true_length = path.read_bytes(), (12 * SHORT * 2).to_bytes(4, "little")
    place = raw.index(b"\x00\x54\x10\x10OW\x00\x00" + true_length) + 8
    path.write_bytes(raw[:place] + length.to_bytes(4, "little") + raw[place + 4 :])
    assert only_reason(tmp_path) in (Reason.UNREADABLE, Reason.TRUNCATED)


def test_a_quoted_value_cannot_break_the_line(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    path = write_dicom(tmp_path / "r.dcm", [dicom_group(steps_for(LEADS))])
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1", b"1.2.8\n\x1b[2J08.1.2.1"))
    (item,) = items_of("dicom", tmp_path)
    assert isinstance(item, TurnedAway)
    assert item.detail.isprintable()


def test_a_deflated_dicom_is_not_unpacked(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    path = write_dicom(tmp_path / "r.dcm", [dicom_group(steps_for(LEADS))])
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    assert only_reason(tmp_path) == Reason.UNREADABLE


def test_the_command_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctype, patient_id = HOSTILE["billion laughs"]
    write_muse(tmp_path / "in" / "r.xml", doctype=doctype, patient={"PatientID": patient_id})
    typed = ["hemofed-client", "ingest", str(tmp_path / "in"), "--site-dir", str(tmp_path / "site"), "--json"]
    monkeypatch.setattr(sys, "argv", typed)
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    assert ended.value.code == ExitCode.NOTHING_STORED
    assert json.loads(output.out)["turned_away"] == {"unreadable": 1}
    assert "declares entities" in json.loads(output.out)["examples"][0]
    assert "Traceback" not in output.err
