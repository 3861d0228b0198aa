"""PhysioNet/CinC Challenge 2020 and 2021: WFDB headers with SNOMED CT codes (doi:10.13026/34va-7q14).

The archive has no patient ids: each record counts as a patient of its own, although some patients of the PTB,
INCART and PTB-XL parts have several records, which can end in two splits.
"""

import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from client.records import wfdb_folder
from client.records.files import files_below
from client.records.options import ReaderOptions
from client.records.record import Archive, Unusable
from client.records.wfdb_header import Header, split_header

# Codes and abbreviations of a label, as the Challenge's dx_mapping_scored.csv and dx_mapping_unscored.csv have
# them; codes in one line are scored as the same diagnosis there, or are the complete form of it.
LABEL_CODES: Mapping[str, frozenset[str]] = {
    "sinus_rhythm": frozenset({"426783006", "NSR", "SNR"}),
    "sinus_bradycardia": frozenset({"426177001", "SB"}),
    "sinus_tachycardia": frozenset({"427084000", "STACH"}),
    "atrial_fibrillation": frozenset({"164889003", "AF"}),
    "atrial_flutter": frozenset({"164890007", "AFL"}),
    "first_degree_av_block": frozenset({"270492004", "IAVB"}),
    "right_bundle_branch_block": frozenset({"59118001", "713427006", "RBBB", "CRBBB"}),
    "left_bundle_branch_block": frozenset({"164909002", "733534002", "LBBB", "CLBBB"}),
    "premature_atrial_contraction": frozenset({"284470004", "63593006", "PAC", "SVPB"}),
    "premature_ventricular_contraction": frozenset({"427172004", "17338001", "PVC", "VPB"}),
}
_KNOWN = frozenset().union(*LABEL_CODES.values())
HEADERS_LOOKED_AT = 20
_DX = re.compile(r"dx\s*:", re.I)


def recognises(source: Path) -> bool:
    """Whether one of the first headers found has a `Dx` comment."""
    return any(map(_has_diagnosis, islice(files_below(source, wfdb_folder.SUFFIX), HEADERS_LOOKED_AT)))


def _has_diagnosis(header: str) -> bool:
    try:
        return any(map(_DX.match, split_header(header)[1]))
    except Unusable:
        return False


def open_archive(source: Path, options: ReaderOptions) -> Archive:
    """A WFDB folder whose headers bring labels; labels.csv goes before them. Raises HemoFedError as that does."""
    del options  # a header says all that is needed
    return wfdb_folder.open_records(source, diagnosis_labels)


def diagnosis_labels(header: Header) -> dict[str, float]:
    """0/1 labels from `#Dx: 426783006,164889003`, empty if there is no code.

    0 means that the code was not given. The parts of the archive were coded by different people with different
    vocabularies, so it does not prove that the finding is absent.
    """
    codes = {code.upper() for code in re.split(r"[,;\s]+", header.comments.get("dx", "")) if code}
    if not any(code.isdecimal() or code in _KNOWN for code in codes):
        return {}
    return {label: float(bool(codes & meant)) for label, meant in LABEL_CODES.items()}
