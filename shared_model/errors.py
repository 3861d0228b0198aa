"""The one error a person sees: what went wrong, where, and what to do; and the exit code it ends with."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every hemofed command (docs/exit-codes.md)."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    BAD_STUDY = 10
    BAD_SITE = 11
    BAD_SOURCE = 12
    NOTHING_STORED = 13
    NO_USABLE_PATIENTS = 14
    TOO_FEW_SITES = 15
    SITE_FAILED = 16
    BAD_CHECKPOINT = 17
    DISCLOSURE_REFUSED = 18
    DEVICE_MISSING = 19
    RELEASE_DIFFERS = 20
    FORMAT_UNDECLARED = 21
    UNFIT = 24
    POLICY_REFUSED = 25
    BUDGET_EXCEEDED = 26
    LEDGER_DAMAGED = 27
    LEDGER_ROLLED_BACK = 28
    LEDGER_BUSY = 29
    LEDGER_REFUSED = 30
    CLOCK_SET_BACK = 31
    LEDGER_NOT_WRITTEN = 32
    BANK_DIFFERS = 33
    AUDIT_TOOTHLESS = 34
    AUDIT_BROKEN = 35
    INTERRUPTED = 130


class HemoFedError(Exception):
    """A mistake or fault that a person can mend. `message` is one line: what, where, what to do."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.UNEXPECTED) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
