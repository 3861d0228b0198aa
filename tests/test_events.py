"""Tables of measurements: a hospital's own and MIMIC-IV's chartevents, good rows and bad ones."""

import gzip
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.events import read_events
from client.records.labels_csv import is_event_form, read_labels
from client.records.record import unix_seconds
from shared_model.errors import ExitCode, HemoFedError
from tests.event_fixtures import (
    CHART_COLUMNS,
    CO_CONTINUOUS,
    CO_THERMODILUTION,
    CVP,
    HEART_RATE,
    PA_DIASTOLIC,
    PA_MEAN,
    PA_SYSTOLIC,
    WEDGE,
    chart_row,
    csv_text,
    write_chart,
)

Event = tuple[str, float, dict[str, float]]


def events_of(path: Path) -> list[Event]:
    table = read_events(path)
    return [(table.patients[place], at, values) for place, at, values in table.events()]


def at(time: str) -> float:
    return unix_seconds(f"2180-07-23 {time}:00")


def own(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_of_catheterisations(tmp_path: Path) -> None:
    path = own(
        tmp_path / "cath.csv",
        "\ufeffpatient_id, measured_at,mpcwp_mmhg,mpap_mmhg,ntprobnp,age_years,ward\n"
        "P1,2024-05-01T10:00:00,21.5,30,1200,67,CCU\n"
        "P2,2024-05-01T10:00:00+02:00,,28,,50,\n"
        "\n"
        "P1,2024-04-01,nd,NA,900,67,CCU\n",
    )
    assert events_of(path) == [
        ("P1", unix_seconds("2024-04-01"), {"ntprobnp": 900}),
        ("P1", unix_seconds("2024-05-01T10:00"), {"mpcwp_mmhg": 21.5, "mpap_mmhg": 30, "ntprobnp": 1200}),
        ("P2", unix_seconds("2024-05-01T10:00"), {"mpap_mmhg": 28}),
    ]
    table = read_events(path)
    assert (table.rows, table.read, table.dropped, table.text_columns) == (3, 5, {}, ("ward",))


def test_what_a_table_loses_is_counted(tmp_path: Path) -> None:
    table = read_events(
        own(
            tmp_path / "cath.csv",
            "patient_id,measured_at,mpcwp_mmhg,mpap_mmhg\n"
            "P1,2024-05-01T10:00,0,30\nP1,2024-05-02T10:00,999,30\nP1,2024-05-03T10:00,high,30\n"
            "P1,2024-05-04T10:00,33,30\nP1,2024-05-05T10:00,32,30\n"
            "P1,01.05.2024,20,30\n,2024-05-01T10:00,20,30\nP1,2024-05-01T10:00,20\n"
            "P1,2024-05-05T10:00,32,31\nP1,2024-05-05T10:00,32,30\nP1,,20,30\nP1,2024-05-06,nan,inf\n",
        )
    )
    assert table.dropped == {
        "row_length": 1,
        "no_patient": 1,
        "unreadable_time": 2,
        "not_a_number": 1,
        "out_of_range": 3,
        "wedge_above_pa_mean": 1,
        "repeated": 1,
    }
    values = [values for _, _, values in table.events()]
    assert values == [{"mpap_mmhg": 30}] * 4 + [{"mpcwp_mmhg": 32, "mpap_mmhg": 30}]
    assert table.rows == 12


def test_chartevents_as_mimic_iv_has_it(tmp_path: Path) -> None:
    rows = [
        chart_row(10, "08:00", HEART_RATE, 80),
        chart_row(10, "08:00", WEDGE, 18),
        chart_row(10, "08:00", PA_MEAN, 30),
        chart_row(10, "08:20", PA_SYSTOLIC, 45),
        chart_row(10, "08:20", PA_DIASTOLIC, 20),
        chart_row(10, "08:59", CVP, 9),
        chart_row(10, "08:30", CO_THERMODILUTION, 4.5),
        chart_row(10, "09:00", CO_CONTINUOUS, 5),
        chart_row(10, "07:50", CVP, 11),
        chart_row(11, "08:00", CVP, 7),
    ]
    names = ("mpcwp_mmhg", "mpap_mmhg", "pasp_mmhg", "padp_mmhg", "cvp_mmhg", "co_thermodilution_l_min")
    expected = [
        ("10", at("07:50"), {"cvp_mmhg": 11}),
        ("10", at("08:00"), dict(zip(names, (18, 30, 45, 20, 9, 4.5), strict=True))),
        ("10", at("09:00"), {"co_continuous_l_min": 5}),
        ("11", at("08:00"), {"cvp_mmhg": 7}),
    ]
    for name in ("chartevents.csv", "chartevents.csv.gz"):
        table = read_events(write_chart(tmp_path / name, rows))
        assert (table.source, table.rows, table.read, table.dropped) == ("chartevents.csv", 10, 9, {})
        assert events_of(tmp_path / name) == expected


def test_one_hour_is_one_event_with_medians(tmp_path: Path) -> None:
    """The hour begins with a wedge, and an hour after it the next one; a duplicated charttime is two values."""
    rows = [
        *(chart_row(10, time, WEDGE, value) for time, value in (("08:00", 10), ("08:00", 20), ("08:59", 12))),
        *(chart_row(10, time, WEDGE, value) for time, value in (("09:00", 15), ("10:00", 16))),
        *(chart_row(10, time, CVP, value) for time, value in (("07:30", 5), ("08:10", 6), ("09:59", 8))),
    ]
    assert events_of(write_chart(tmp_path / "chartevents.csv", rows)) == [
        ("10", at("07:30"), {"cvp_mmhg": 5}),
        ("10", at("08:00"), {"mpcwp_mmhg": 12, "cvp_mmhg": 6}),
        ("10", at("09:00"), {"mpcwp_mmhg": 15, "cvp_mmhg": 8}),
        ("10", at("10:00"), {"mpcwp_mmhg": 16}),
    ]


def test_what_a_chart_loses_is_counted(tmp_path: Path) -> None:
    rows = [
        chart_row(10, "08:00", WEDGE, 0),
        chart_row(10, "08:00", WEDGE, 999),
        chart_row(10, "08:00", WEDGE, "nd"),
        chart_row(10, "08:00", WEDGE, ""),
        chart_row(10, "08:00", WEDGE, 12, warning=1),
        chart_row(10, "08:00", PA_MEAN, 2.9),
        chart_row(10, "08:00", CVP, 40.1),
        chart_row(10, "23.07.2180 08:00", CVP, 4),
        chart_row(10, "08:00", CVP, 40),
        chart_row(10, "08:00", CVP, 4)[:-1],
        chart_row(10, "20:00", WEDGE, 33),
        chart_row(10, "21:00", PA_MEAN, 30),
        chart_row(10, "22:01", WEDGE, 33),
    ]
    table = read_events(write_chart(tmp_path / "chartevents.csv", rows))
    assert table.dropped == {
        "no_value": 1,
        "not_a_number": 1,
        "out_of_range": 4,
        "row_length": 1,
        "unreadable_time": 1,
        "warning": 1,
        "wedge_above_pa_mean": 1,
    }
    # 20:00 has a mean PA pressure within the hour, 22:01 has not.
    assert [values for _, _, values in table.events()] == [{"cvp_mmhg": 40}, {"mpap_mmhg": 30}, {"mpcwp_mmhg": 33}]


ITEM = st.sampled_from([WEDGE, CVP])
VALUES = st.lists(st.tuples(st.integers(1, 2), st.integers(0, 300), ITEM, st.integers(1, 40)), min_size=1, max_size=25)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=VALUES, random=st.randoms(use_true_random=False))
def test_hours_are_those_of_explicit_loops(
    tmp_path: Path, values: list[tuple[int, int, int, int]], random: object
) -> None:
    """Whatever the order of the rows; and no event begins after one of its values."""
    expected: list[Event] = []
    for subject in (1, 2):
        left = sorted((minute, item, value) for who, minute, item, value in values if who == subject)
        for only_wedges in (True, False):
            hours: list[int] = []
            for minute, item, _ in left:
                if (item == WEDGE) == only_wedges and (not hours or minute >= hours[-1] + 60):
                    hours.append(minute)
            for hour in hours:
                within = [entry for entry in left if hour <= entry[0] < hour + 60]
                left = [entry for entry in left if entry not in within]
                medians = {
                    name: statistics.median(value for _, item, value in within if item == wanted)
                    for name, wanted in (("mpcwp_mmhg", WEDGE), ("cvp_mmhg", CVP))
                    if any(item == wanted for _, item, _ in within)
                }
                expected.append((str(subject), at("00:00") + 60 * hour, medians))
    rows = [
        chart_row(subject, f"2180-07-23 {minute // 60:02}:{minute % 60:02}:00", item, value)
        for subject, minute, item, value in values
    ]
    random.shuffle(rows)  # type: ignore[attr-defined]
    found = events_of(write_chart(tmp_path / "chartevents.csv", rows))
    assert sorted(found, key=lambda event: event[:2]) == sorted(expected, key=lambda event: event[:2])


def packed_and_cut(path: Path) -> None:
    content = csv_text([CHART_COLUMNS, *(chart_row(n, "08:00", WEDGE, n % 40 + 1) for n in range(2000))])
    path.write_bytes(gzip.compress(content.encode())[:-400])


def written(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


HEADER = "patient_id,measured_at,mpcwp_mmhg\n"
BAD_TABLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "cannot be read"),
    "empty": (written(""), "no column 'patient_id'"),
    "no CSV": (written(bytes(range(256)) * 9), "save it as CSV in UTF-8"),
    "not UTF-8": (written("patient_id,measured_at,h\xf6he\n1,2024-01-01,3\n".encode("latin-1")), "UTF-8"),
    "semicolons": (written(HEADER.replace(",", ";") + "P1;2024-05-01;12,5\n"), "separated by commas"),
    "no time": (written("patient_id,date,mpcwp_mmhg\n"), "no column 'measured_at'"),
    "no patient": (written("measured_at,mpcwp_mmhg\n"), "no column 'patient_id'"),
    "a column twice": (written("patient_id,measured_at,co,co\n"), "stands twice"),
    "a table of records": (written("record,patient_id,measured_at\n"), "column 'record'"),
    "chartevents without subject": (written("charttime,itemid,valuenum,warning\n"), "no column 'subject_id'"),
    "packed and cut": (packed_and_cut, "cut short"),
    "packed and damaged": (written(gzip.compress(HEADER.encode())[:12] + bytes(30)), "damaged"),
    "a quote that does not end": (written(HEADER + '"P1,2024-05-01,12\nP2,2024-05-01,14\n'), "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables_that_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    write, said = BAD_TABLES[name]
    path = tmp_path / "table.csv"
    write(path)
    with pytest.raises(HemoFedError, match=said) as caught:
        read_events(path)
    assert caught.value.message.startswith(str(path))
    assert len(caught.value.message.splitlines()) == 1
    assert caught.value.exit_code == ExitCode.BAD_SOURCE


def test_progress_goes_to_the_end_of_the_packed_file(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    rows = [chart_row(10, "08:00", HEART_RATE, 60)] * 70_000
    read_events(write_chart(tmp_path / "chartevents.csv.gz", rows), lambda done, total: seen.append((done, total)))
    assert len(seen) == 3
    assert seen[-1] == (1, 1)
    assert all(done <= total for done, total in seen)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEADER, True),
        ("\ufeffpatient_id , measured_at\n", True),
        ("record,patient_id,measured_at\n", False),
        ("patient_id,mpcwp_mmhg\n", False),
        ("", False),
    ],
)
def test_the_event_form_of_labels_csv(tmp_path: Path, text: str, expected: bool) -> None:
    path = own(tmp_path / "labels.csv", text)
    assert is_event_form(path) == expected
    if expected:
        assert not read_labels(path).rows
    assert not is_event_form(tmp_path / "absent.csv")
