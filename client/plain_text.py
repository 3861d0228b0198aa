"""Text from a source as it may be printed."""

import unicodedata

from rich.markup import escape

NOT_SHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories: control, format (also what turns the direction of writing), surrogate, line and paragraph."""


def printable(text: str) -> str:
    """The text on one line; characters that would steer a terminal, or are invisible, as `\\x1b` or `\\u202e`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def shown(text: str) -> str:
    """The same for rich, which would take `[bold]` as markup."""
    return escape(printable(text))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in NOT_SHOWN:
        return character
    return character.encode("unicode_escape").decode("ascii")
