"""One reader a format. A new format is one more file and one more line here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.records import dicom_ecg, hl7_aecg, muse_xml, ptbxl, scg_rhc, wfdb_folder
from client.records.record import Archive
from shared_model.errors import ExitCode, HemoFedError


@dataclass(frozen=True)
class Reader:
    """How a format is recognised and opened: `open_archive(source, where)`."""

    recognises: Callable[[Path], bool]
    open_archive: Callable[[Path, Sequence[str]], Archive]


# In the order in which they are tried: a PTB-XL archive is a WFDB folder as well.
READERS = {
    "ptbxl": Reader(ptbxl.recognises, ptbxl.open_archive),
    "scg-rhc": Reader(scg_rhc.recognises, scg_rhc.open_archive),
    "wfdb": Reader(wfdb_folder.recognises, wfdb_folder.open_archive),
    "muse-xml": Reader(muse_xml.recognises, muse_xml.open_archive),
    "hl7-aecg": Reader(hl7_aecg.recognises, hl7_aecg.open_archive),
    "dicom": Reader(dicom_ecg.recognises, dicom_ecg.open_archive),
}


def choose_format(source: Path, wanted: str = "auto") -> str:
    """The name of the reader for a source folder.

    Raises:
        HemoFedError: the folder is absent, the format unknown, or nothing there is recognised.
    """
    if not source.is_dir():
        raise HemoFedError(f"{source}: no such folder; give the folder that holds the records", ExitCode.BAD_SOURCE)
    if wanted in READERS:
        return wanted
    known = ", ".join(READERS)
    if wanted != "auto":
        raise HemoFedError(f"--format {wanted}: unknown; use auto or one of: {known}", ExitCode.USAGE)
    for name, reader in READERS.items():
        if reader.recognises(source):
            return name
    raise HemoFedError(
        f"{source}: no ECG records recognised; give the folder that holds them (known formats: {known})",
        ExitCode.BAD_SOURCE,
    )
