"""XML from outside, read so that a file can neither reach out nor blow up.

Why not defusedxml: all it would forbid needs a document type with an internal subset (entities, default
attributes, notations), and refusing that is one handler of the standard library's expat. expat fetches nothing
by itself, so an external DTD (`<!DOCTYPE RestingECG SYSTEM "restecg.dtd">`) is named and never read.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from client.records.files import files_below
from client.records.record import Reason, Unusable

SUFFIX = ".xml"
LARGEST_BYTES = 32 * 2**20  # a 60 s ECG of twelve leads at 1000 Hz is 5 MB as aECG, 2 MB as MUSE XML
MOST_ELEMENTS = 200_000
DEEPEST = 100
BYTES_SNIFFED = 4096


def xml_files(source: Path) -> Iterator[str]:
    """The XML files below a folder."""
    return files_below(source, SUFFIX)


def holds_root(source: Path, root: str) -> bool:
    """Whether one of the XML files of a folder begins with this root element.

    Where none does all of them are looked at: a folder that mixes two kinds must not pass for one of them.
    """
    pattern = re.compile(rb"<(?:[\w.-]+:)?" + root.encode() + rb"[\s>]")
    for path in xml_files(source):
        try:
            with open(path, "rb") as file:
                head = file.read(BYTES_SNIFFED)
        except OSError:
            continue
        if pattern.search(head.replace(b"\0", b"")):  # UTF-16 is ASCII with zero bytes between
            return True
    return False


def read_xml(path: Path, root: str) -> Element:
    """The element tree of a file, with namespaces stripped from the names.

    Raises:
        Unusable: unreadable, too large or deep, not well formed, a document type that declares anything,
            an entity that is not built in, or another root element.
    """
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise Unusable(Reason.UNREADABLE, f"larger than {LARGEST_BYTES >> 20} MB; export one ECG a file")
        text = path.read_bytes()
    except OSError as error:
        raise Unusable(Reason.UNREADABLE, f"cannot be read ({error.strerror}); check the file's permissions") from None
    tree = _parse(text)
    if tree.tag != root:
        detail = f"its root element is {tree.tag[:40]!r}, not {root}; leave the file out or name its --format"
        raise Unusable(Reason.NOT_AN_ECG, detail)
    return tree


def _parse(text: bytes) -> Element:
    tree = TreeBuilder()
    depth = elements = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, elements
        depth, elements = depth + 1, elements + 1
        if depth > DEEPEST or elements > MOST_ELEMENTS:
            raise Unusable(Reason.UNREADABLE, "more elements than any ECG has; export it again")
        tree.start(_local(name), {_local(key): value for key, value in attributes.items()})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        tree.end(_local(name))

    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = tree.data
    parser.StartDoctypeDeclHandler = _refuse_declarations
    parser.SkippedEntityHandler = _refuse_entity
    try:
        parser.Parse(text, True)
        return tree.close()
    except (expat.ExpatError, ValueError, LookupError, AssertionError) as error:
        detail = f"not well-formed XML ({str(error)[:80]}); export it again"
        raise Unusable(Reason.UNREADABLE, detail) from None


def _refuse_declarations(_name: str, _system_id: str | None, _public_id: str | None, internal_subset: int) -> None:
    if internal_subset:
        raise Unusable(Reason.UNREADABLE, "its DOCTYPE declares entities or the like; export it without them")


def _refuse_entity(name: str, _is_parameter: int) -> None:
    raise Unusable(Reason.UNREADABLE, f"it uses the entity {name[:40]!r}, which it does not define; export it again")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def text_of(element: Element, path: str) -> str:
    """The text at a path, "" where there is none."""
    return (element.findtext(path) or "").strip()


def attribute_of(element: Element, path: str, name: str) -> str:
    """The attribute of the element at a path, "" where either is absent."""
    found = element.find(path)
    return "" if found is None else found.get(name, "").strip()
