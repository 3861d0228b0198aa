"""Messages: what is packed is what is unpacked, and what no honest end would send is refused."""

import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from shared_model.errors import ExitCode, HemoFedError
from shared_model.wire import MAXIMUM_TEXT, Instruction, Reply, TrainingReport, pack, unpack
from tests.federations import description, tiny_study

RUN = "0123456789abcdef"
PLAIN = st.sampled_from(["<f4", "<f8", "<i8", "<i4", "|u1", "|b1"])
ARRAYS = st.dictionaries(
    st.text(min_size=1, max_size=20),
    PLAIN.flatmap(lambda kind: hnp.arrays(np.dtype(kind), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))),
    max_size=4,
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 10**9)
REPORTS = st.builds(TrainingReport, loss=FINITE, hub_share=st.none() | FINITE)
REPLIES = st.builds(
    Reply,
    site=st.text("aZ09é _.-", min_size=1, max_size=80),
    reference=st.from_regex(r"[0-9a-f]{0,16}", fullmatch=True),
    description=st.none() | st.builds(description, records=COUNT, test_patients=COUNT),
    training=st.none() | REPORTS,
)
INSTRUCTIONS = st.builds(
    Instruction,
    run_id=st.from_regex(r"[0-9a-f]{8,64}", fullmatch=True),
    task=st.sampled_from(["describe", "pretrain", "finetune", "evaluate"]),
    round_number=COUNT,
    study=st.builds(lambda seed, name: tiny_study(seed=seed, name=name), COUNT, st.text(min_size=1, max_size=80)),
    learning_rate=st.floats(0, 10),
    threshold_edge=st.none() | COUNT,
)


def same(first: dict[str, NDArray[np.generic]], second: dict[str, NDArray[np.generic]]) -> bool:
    return first.keys() == second.keys() and all(
        (first[name].dtype, first[name].shape, first[name].tobytes())
        == (second[name].dtype, second[name].shape, second[name].tobytes())
        for name in first
    )


@settings(max_examples=60, deadline=None)
@given(INSTRUCTIONS | REPLIES, ARRAYS)
def test_what_is_packed_is_what_is_unpacked(body: Instruction | Reply, arrays: dict[str, NDArray[np.generic]]) -> None:
    again, back = unpack(pack(body, arrays), type(body))
    assert again == body
    assert same(back, arrays)


def test_an_array_that_is_a_view_of_another_order_arrives_as_it_was() -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4).T
    _, back = unpack(pack(Reply(site="a"), {"w": value}), Reply)
    np.testing.assert_array_equal(back["w"], value)


def with_text(change: Callable[[dict[str, Any]], object]) -> RecordDict:
    """A good instruction whose JSON was changed on the way."""
    content = pack(Instruction(run_id=RUN, task="pretrain", study=tiny_study()), {})
    table = json.loads(str(content["hemofed"]["body"]))
    changed = change(table)
    content["hemofed"] = ConfigRecord({"body": json.dumps(table if changed is None else changed)})
    return content


BAD_TEXTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown key": lambda table: table.update(sql="drop"),
    "unknown key of the study": lambda table: table["study"].update(sql="drop"),
    "another schema": lambda table: table.update(schema_version=2),
    "a run id that is a path": lambda table: table.update(run_id="../../../../etc"),
    "an unknown task": lambda table: table.update(task="upload"),
    "not a number": lambda table: table.update(learning_rate=float("nan")),
    "infinity": lambda table: table.update(learning_rate=float("inf")),
    "infinity in the study": lambda table: table["study"]["finetune"].update(learning_rate=float("inf")),
    "no study": lambda table: table.pop("study") and None,
    "not an object": lambda table: [table],
    "too long": lambda table: table["study"].update(name="x" * (MAXIMUM_TEXT + 1)),
}


@pytest.mark.parametrize("fault", BAD_TEXTS)
def test_a_text_that_no_honest_end_would_send_is_refused(fault: str) -> None:
    unpack(with_text(lambda table: None), Instruction)  # what the faults are planted in is good
    with pytest.raises(HemoFedError) as caught:
        unpack(with_text(BAD_TEXTS[fault]), Instruction)
    assert caught.value.exit_code == ExitCode.SITE_FAILED
    assert "\n" not in caught.value.message
    assert "drop" not in caught.value.message


def test_a_text_is_refused_by_its_length_before_it_is_read() -> None:
    content = pack(Reply(site="a"))
    text = str(content["hemofed"]["body"])
    for spaces, fits in ((MAXIMUM_TEXT - len(text), True), (MAXIMUM_TEXT - len(text) + 1, False)):
        content["hemofed"] = ConfigRecord({"body": text + " " * spaces})
        if fits:
            assert unpack(content, Reply)[0].site == "a"
        else:
            with pytest.raises(HemoFedError):
                unpack(content, Reply)


@pytest.mark.parametrize("broken", ["no record", "no body", "bytes", "no arrays", "arrays of another kind"])
def test_a_message_without_its_halves_is_refused(broken: str) -> None:
    content = pack(Reply(site="a"))
    if broken == "no record":
        del content["hemofed"]
    elif broken == "no arrays":
        del content["arrays"]
    elif broken == "arrays of another kind":
        content["arrays"] = ConfigRecord({})
    else:
        content["hemofed"] = ConfigRecord({} if broken == "no body" else {"body": b"{}"})
    with pytest.raises(HemoFedError):
        unpack(content, Reply)


def saved(value: NDArray[Any], **options: Any) -> bytes:
    buffer = BytesIO()
    np.save(buffer, value, **options)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


class Boom:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was opened",)


def absurd_shape() -> bytes:
    good = saved(np.zeros((1000,), np.float32))
    return good.replace(b"(1000,)", b"(9" + b"9" * 4 + b",)")[: len(good)] + b""


BAD_ARRAYS = {
    "a pickle": saved(np.array([Boom()], dtype=object), allow_pickle=True),
    "an archive": archive(),
    "the head of an archive": b"PK\x03\x04garbage",
    "no array": b"garbage",
    "nothing": b"",
    "cut short": saved(np.zeros(100, np.float32))[:-1],
    "a header that promises more": absurd_shape(),
}


@pytest.mark.parametrize("fault", BAD_ARRAYS)
def test_an_array_that_is_not_plain_numpy_is_refused(fault: str) -> None:
    content = pack(Reply(site="a"), {"w": np.zeros(100, np.float32)})
    unpack(content, Reply)
    bad = Array(dtype="float32", shape=(100,), stype="numpy.ndarray", data=BAD_ARRAYS[fault])
    content["arrays"] = ArrayRecord({"w": bad})
    with pytest.raises(HemoFedError, match="cannot be read as plain numpy"):
        unpack(content, Reply)


def test_an_object_array_is_not_packed_as_a_pickle() -> None:
    with pytest.raises(ValueError, match=r"allow_pickle|[Oo]bject arrays"):
        pack(Reply(site="a"), {"w": np.array([object()])})


def test_an_array_of_another_framework_is_refused() -> None:
    content = pack(Reply(site="a"))
    data = saved(np.zeros(100, np.float32))
    content["arrays"] = ArrayRecord({"w": Array(dtype="float32", shape=(100,), stype="pickle", data=data)})
    with pytest.raises(HemoFedError):
        unpack(content, Reply)


@pytest.mark.parametrize("name", ["", "a/../b", "a\nb", "\x1b[31mred", "<b>", "x" * 81])
def test_a_site_cannot_call_itself_what_would_harm_a_terminal_a_path_or_a_page(name: str) -> None:
    content = pack(Reply(site="St. Mary-2"))
    assert unpack(content, Reply)[0].site == "St. Mary-2"
    text = str(content["hemofed"]["body"]).replace('"St. Mary-2"', json.dumps(name))
    content["hemofed"] = ConfigRecord({"body": text})
    with pytest.raises(HemoFedError):
        unpack(content, Reply)
