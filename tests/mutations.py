"""Damage for files: bytes flipped, cut off, put in; and for text, fields replaced by awkward ones."""

import re

from hypothesis import strategies as st

AWKWARD_FIELDS = (
    *(b"0", b"-1", b"1", b"12", b"nan", b"inf", b"1e9", b"99999999999", b"-32768", b"16", b"212", b"80", b"61", b"310"),
    *(b"24", b"508", b"16x2", b"16:3", b"16+24", b"200", b"0(0)/mV", b"1000(5)/uV", b"200/mmHg", b"I", b"II", b"aVR"),
    *(b"", b"/", b"..", b"~", b"\xff\xfe", b'"', b"<", b"#"),
)
BYTES = st.one_of(st.sampled_from(list(b"\x00\xff\n\r,;#/.+:x-0129eE \"'<>")), st.integers(0, 255))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """One to four injuries. Beginnings are where damage does most, so half of them go there."""
    for _ in range(draw(st.integers(1, 4))):
        last = max(0, draw(st.sampled_from([min(600, len(content)), len(content)])) - 1)
        place = draw(st.integers(0, last))
        kind = draw(st.sampled_from(("flip", "put in", "leave out", "cut", "double")))
        length = draw(st.integers(1, 40))
        if kind == "flip":
            content = content[:place] + bytes([draw(BYTES)]) + content[place + 1 :]
        elif kind == "put in":
            content = content[:place] + bytes(draw(st.lists(BYTES, min_size=1, max_size=6))) + content[place:]
        elif kind == "leave out":
            content = content[:place] + content[place + length :]
        elif kind == "double":
            content = content[: place + length] + content[place:]
        else:
            content = content[:place]
    return content


@st.composite
def fields_replaced(draw: st.DrawFn, content: bytes) -> bytes:
    """One to three of the fields of a text, which blanks, commas or line ends part, replaced by awkward ones."""
    parts = re.split(rb"([ ,\n])", content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, min(60, len(parts) - 1)))
        parts[place] = (
            draw(st.sampled_from(AWKWARD_FIELDS)) if parts[place] not in (b" ", b",", b"\n") else parts[place]
        )
    return b"".join(parts)
