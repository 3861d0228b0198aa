"""The site's patient key: pseudonyms and the train/validation/test split, both keyed hashes of the id."""

import hmac
import os
import re
import secrets
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from shared_model.errors import ExitCode, HemoFedError

KEY_FILE = "patient.key"
KEY_BYTES = 32
TRAIN, VALIDATION, TEST = 0, 1, 2
SPLIT_NAMES = ("train", "validation", "test")
_WHOLE_NUMBER = re.compile(r"([0-9]+)\.0")


@dataclass(frozen=True)
class SplitShares:
    """Shares of patients, in percent, for training, validation and test. Fixed at a store's first ingest."""

    train: int = 60
    validation: int = 20
    test: int = 20

    def __str__(self) -> str:
        return f"{self.train}/{self.validation}/{self.test}"


def parse_shares(text: str) -> SplitShares:
    """Read `60/20/20`. Raises HemoFedError unless it is three whole percentages above 0 that add up to 100."""
    try:
        train, validation, test = (int(part) for part in text.split("/"))
    except ValueError:
        train, validation, test = 0, 0, 0
    if min(train, validation, test) < 1 or train + validation + test != 100:
        raise HemoFedError(
            f"split {text!r}: give train/validation/test in percent, for example 60/20/20", ExitCode.USAGE
        )
    return SplitShares(train, validation, test)


def plain_patient_id(patient_id: str) -> str:
    """One spelling of an id: no blanks around it, no invisible characters (Unicode Cf), composed (NFC), 17.0 as 17.

    Programs write the same id in these ways; taken as different, a patient could be in two splits, or not be found
    to be forgotten. Upper and lower case stay different.
    """
    if not patient_id.isascii():
        visible = "".join(character for character in patient_id if unicodedata.category(character) != "Cf")
        patient_id = unicodedata.normalize("NFC", visible)
    patient_id = patient_id.strip()
    whole = _WHOLE_NUMBER.fullmatch(patient_id)
    return whole[1] if whole else patient_id


@dataclass(frozen=True)
class PatientKey:
    """A site's secret of 32 bytes.

    Guarantee: the store holds HMAC-SHA256(key, id) instead of the patient id. Without the key a pseudonym
    cannot be computed from an id, even from a guessed one, so two sites' pseudonyms cannot be matched.
    All spellings of an id that `plain_patient_id` knows are one patient.
    It fails for whoever reads the key file, and it hides the id only: record ids and source paths are kept
    as they are and may spell a patient id (docs/site-store.md).
    """

    secret: bytes = field(repr=False)
    shares: SplitShares = SplitShares()

    def pseudonym(self, patient_id: str) -> str:
        """32 hexadecimal characters (128 bits) that stand for this patient at this site."""
        return self._digest("patient", patient_id)[:16].hex()

    def split(self, patient_id: str) -> int:
        """TRAIN, VALIDATION or TEST by the store's shares: the same for all records of a patient, for ever."""
        percent = 100 * int.from_bytes(self._digest("split", patient_id)[:8], "big") / 2**64
        if percent < self.shares.train:
            return TRAIN
        return VALIDATION if percent < self.shares.train + self.shares.validation else TEST

    def _digest(self, domain: str, patient_id: str) -> bytes:
        # The domain keeps the two uses independent: a pseudonym says nothing of the split.
        return hmac.digest(self.secret, f"{domain}\0{plain_patient_id(patient_id)}".encode(), "sha256")


def patient_key(site_dir: Path, wanted: bytes | None = None) -> PatientKey:
    """The key of a site folder, made at first use (`wanted`, else random) in a file of mode 0600.

    Raises:
        HemoFedError: the file is readable by others, is not a key, or holds another key than `wanted`.
    """
    path = site_dir / KEY_FILE
    if not path.exists():
        _write_key(path, wanted or secrets.token_bytes(KEY_BYTES))
    key = read_patient_key(site_dir)
    if wanted is not None and key.secret != wanted:
        raise HemoFedError(
            f"{path}: holds another key than the one asked for; use a new site folder", ExitCode.BAD_SITE
        )
    return key


def read_patient_key(site_dir: Path) -> PatientKey:
    """The key that a site folder has; none is ever made, because its pseudonyms would match nobody's.

    Raises:
        HemoFedError: the file is absent, readable by others or not a key.
    """
    path = site_dir / KEY_FILE
    if not path.exists():
        raise HemoFedError(f"{path}: not there; restore it from a backup", ExitCode.BAD_SITE)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise HemoFedError(f"{path}: others may read the patient key; run: chmod 600 {path}", ExitCode.BAD_SITE)
    try:
        secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (ValueError, UnicodeDecodeError):
        secret = b""
    if len(secret) < KEY_BYTES:
        raise HemoFedError(
            f"{path}: not a patient key ({KEY_BYTES} bytes, hexadecimal); restore it from a backup, or start "
            "a new site folder",
            ExitCode.BAD_SITE,
        )
    return PatientKey(secret)


def _write_key(path: Path, secret: bytes) -> None:
    """Whole or not at all, and never readable by others, not even for a moment."""
    if len(secret) < KEY_BYTES:
        raise HemoFedError(f"a patient key needs {KEY_BYTES} bytes, got {len(secret)}", ExitCode.BAD_SITE)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secret.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
