"""One reader a format. A new format is one more file and one more line here (docs/add-a-reader.md)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client.records import (
    chapman,
    cinc,
    code15,
    dicom_ecg,
    hl7_aecg,
    matlab_array,
    mimic_iv_ecg,
    muse_xml,
    ptbxl,
    scg_rhc,
    wfdb_folder,
)
from client.records.options import ReaderOptions
from client.records.record import Archive
from shared_model.errors import ExitCode, HemoFedError

WHERE = frozenset({"--where"})


@dataclass(frozen=True)
class Reader:
    """How a format is recognised and opened: `open_archive(source, options)`."""

    recognises: Callable[[Path], bool]
    open_archive: Callable[[Path, ReaderOptions], Archive]
    takes: frozenset[str] = frozenset()
    """The options it has a use for."""
    by_table: bool = False
    """Known by the archive's own table or folder at the top, which then says what the folder holds."""
    special_case_of: str = ""
    """The format that fits as well wherever this one does."""


READERS = {
    "ptbxl": Reader(ptbxl.recognises, ptbxl.open_archive, WHERE, by_table=True),
    "mimic-iv-ecg": Reader(mimic_iv_ecg.recognises, mimic_iv_ecg.open_archive, WHERE, by_table=True),
    "chapman": Reader(chapman.recognises, chapman.open_archive, by_table=True),
    "code15": Reader(code15.recognises, code15.open_archive, code15.TAKES, by_table=True),
    "cinc": Reader(cinc.recognises, cinc.open_archive, special_case_of="wfdb"),
    "scg-rhc": Reader(scg_rhc.recognises, scg_rhc.open_archive, special_case_of="wfdb"),
    "wfdb": Reader(wfdb_folder.recognises, wfdb_folder.open_archive),
    "matlab": Reader(matlab_array.recognises, matlab_array.open_archive, matlab_array.TAKES),
    "muse-xml": Reader(muse_xml.recognises, muse_xml.open_archive),
    "hl7-aecg": Reader(hl7_aecg.recognises, hl7_aecg.open_archive),
    "dicom": Reader(dicom_ecg.recognises, dicom_ecg.open_archive),
}


def choose_format(source: Path, wanted: str = "auto") -> str:
    """The name of the reader for a source folder.

    Raises:
        HemoFedError: the folder is absent, the format unknown, or not exactly one is recognised there.
    """
    if not source.is_dir():
        raise HemoFedError(f"{source}: no such folder; give the folder that holds the records", ExitCode.BAD_SOURCE)
    if wanted in READERS:
        return wanted
    known = ", ".join(READERS)
    if wanted != "auto":
        raise HemoFedError(f"--format {wanted}: unknown; use auto or one of: {known}", ExitCode.USAGE)
    fitting = _fitting(source)
    if not fitting:
        raise HemoFedError(
            f"{source}: no ECG records recognised; give the folder that holds them (known formats: {known})",
            ExitCode.BAD_SOURCE,
        )
    if len(fitting) > 1:
        raise HemoFedError(
            f"{source}: more than one format fits; choose with {' or '.join(f'--format {name}' for name in fitting)}",
            ExitCode.FORMAT_UNDECLARED,
        )
    return fitting[0]


def _fitting(source: Path) -> list[str]:
    """The formats that fit. Only where no table is found are all the files below looked at."""
    by_table = [name for name, reader in READERS.items() if reader.by_table and reader.recognises(source)]
    if by_table:
        return by_table
    fitting = [name for name, reader in READERS.items() if not reader.by_table and reader.recognises(source)]
    return [name for name in fitting if name not in {READERS[special].special_case_of for special in fitting}]


def open_archive(source: Path, format_name: str, options: ReaderOptions) -> Archive:
    """Open a source folder. Raises HemoFedError if an option is of no use to the format, or as its reader does."""
    reader = READERS[format_name]
    options.refuse_unused(format_name, reader.takes)
    return reader.open_archive(source, options)
