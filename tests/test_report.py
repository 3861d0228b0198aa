"""results.json, the page and the card: what they refuse, what they show, and that a browser agrees."""

import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from server.report import results as schema
from server.report import words
from server.report.card import card_markdown, model_card, write_card
from server.report.files import append_metrics, load_metrics, load_results, write_metrics, write_results
from server.report.page import page_text, write_page
from server.report.results import Estimate, Results, RoundMetrics, SiteSummary, SubgroupResult
from shared_model.ecg_paper import LAYOUT, ExampleEcg, ecg_paper
from shared_model.errors import HemoFedError
from tests.browser import Page, asked_for, browse, measured_widths, needs_browser
from tests.example_results import (
    example_classification,
    example_ecg,
    example_metrics,
    example_regression,
    example_results,
    example_sites,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "results-format.md"
HOSTILE = '"><script>document.title="owned"</script><img src=x onerror=alert(1)> --> {{ 7*7 }} $\\frac{'


def uncomputed_results(**changes: object) -> Results:
    """Real hospitals, nothing else asked for: every optional figure is null with a reason."""
    absent = Estimate(reason="the study ran without baselines")
    return example_results(
        simulated=False,
        oracle_auroc=None,
        oracle=schema.Oracle(reason="nobody knows it for real ECGs"),
        threshold=schema.Threshold(reason="no labelled validation patients"),
        targets=("mpcwp_gt_18",),
        test={
            "mpcwp_gt_18": schema.TargetResult(
                kind="classification",
                auroc=Estimate(reason="fewer than 11 positive patients"),
                auprc=schema.PrecisionRecall(reason="fewer than 11 positive patients"),
                calibration=schema.Calibration(reason="fewer than 11 positive patients"),
                operating_point=schema.OperatingPoint(reason="no threshold"),
                all_ecg_auroc=Estimate(reason="no bootstrap"),
                reason="suppressed (<11)",
            )
        },
        site_results=(),
        subgroups=(),
        fairness=schema.Fairness(reason="no two groups could be shown"),
        baselines=schema.Baselines(
            local_only={"mpcwp_gt_18": schema.LocalOnly(reason="the study ran without baselines")},
            pooled={"mpcwp_gt_18": schema.Pooled(auroc=absent)},
            comparisons=schema.Comparisons(federated_minus_local_only=absent, federated_minus_pooled=absent),
        ),
        **changes,
    )


def regression_results() -> Results:
    """A study whose own target is a pressure in mmHg."""
    base = example_results()
    baselines = schema.Baselines(
        local_only={"mpcwp": base.baselines.local_only["mpcwp_gt_18"]},
        pooled={"mpcwp": base.baselines.pooled["mpcwp_gt_18"]},
        comparisons=base.baselines.comparisons,
    )
    return example_results(targets=("mpcwp",), test={"mpcwp": example_regression()}, baselines=baselines)


# --- the schema


@pytest.mark.parametrize("results", [example_results(), uncomputed_results(), regression_results()])
def test_results_survive_the_disk(results: Results, tmp_path: Path) -> None:
    path = write_results(results, tmp_path / "new")
    assert load_results(path) == results
    assert load_results(tmp_path / "new") == results
    assert [item.name for item in path.parent.iterdir()] == ["results.json"]


def test_results_json_has_the_promised_keys(tmp_path: Path) -> None:
    table = json.loads(write_results(example_results(), tmp_path).read_text())
    assert next(iter(table["test"])) == "mpcwp_gt_18"
    for measure in ("auroc", "auprc"):
        assert {"value", "low", "high", "bound"} <= table["test"]["mpcwp_gt_18"][measure].keys()
    local = table["baselines"]["local_only"]["mpcwp_gt_18"]
    assert local["auroc"]["mean"] == 0.709
    assert local["auroc"]["sites"]["Invented Heart Centre"] is None
    assert "no labels" in local["reason"]
    assert table["baselines"]["pooled"]["mpcwp_gt_18"]["auroc"]["value"] == 0.806
    assert {"engine", "seed", "sites", "oracle_auroc", "subgroups"} <= table.keys()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Estimate(),
        lambda: Estimate(value=0.7),
        lambda: Estimate(value=math.nan, low=0.0, high=1.0),
        lambda: Estimate(value=0.5, low=0.8, high=0.1),
        lambda: Estimate(low=0.1, high=0.8, reason="no value"),
        lambda: Estimate(value=0.7, low=0.6, high=0.8, surprise=1),
        lambda: SubgroupResult(partition="sex", group="male", suppressed=True),
        lambda: SubgroupResult(partition="sex", group="male", suppressed=True, reason="<11", patients=0),
        lambda: SubgroupResult(partition="sex", group="male"),
        lambda: SiteSummary(name="A", simulated=True, patients=7, reason="the rest is not known"),
        lambda: SiteSummary(name="A", simulated=True),
        lambda: example_results(oracle_auroc=0.5),
        lambda: example_results(targets=("mpcwp", "other")),
        lambda: example_results(targets=()),
        lambda: example_results(schema_version=2),
        lambda: example_results(surprise=1),
        lambda: schema.LocalOnly(auroc=schema.SiteMean(mean=0.7, sites={"A": None})),
        lambda: schema.TargetResult(**(dict(example_classification()) | {"kind": "regression"})),
    ],
)
def test_what_breaks_a_rule_is_refused(wrong: object) -> None:
    with pytest.raises(ValidationError):
        wrong()


def test_the_same_things_unbroken_are_accepted() -> None:
    assert Estimate(value=0.7, reason="no interval: one replicate").low is None
    assert SubgroupResult(partition="sex", group="male", suppressed=True, reason="<11").patients is None
    assert SiteSummary(name="A", simulated=True, patients=10, reason="the rest is not known").patients == 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "JSON"),
        ('{"schema_version": 1}', "name"),
        (example_results().model_dump_json()[:-1] + ', "surprise": 1}', "unknown key surprise"),
        (example_results().model_dump_json().replace('"seed":7', '"seed":"x"'), "seed"),
        ("\udcff", "UTF-8"),
    ],
)
def test_a_bad_results_file_gives_one_line(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(HemoFedError) as caught:
        load_results(path)
    assert str(path) in caught.value.message
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_metrics_survive_the_disk(tmp_path: Path) -> None:
    rows = example_metrics()
    for row in rows:
        append_metrics(row, tmp_path)
    assert load_metrics(tmp_path) == rows
    write_metrics(rows[:3], tmp_path)
    assert load_metrics(tmp_path / "metrics.jsonl") == rows[:3]


def test_a_metrics_line_cut_by_a_crash_is_left_out_but_a_bad_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"phase": "pretrain", "round": 1}\n{"phase": "pretr')
    assert load_metrics(path) == (RoundMetrics(phase="pretrain", round=1),)
    path.write_text('{"phase": "pretrain", "round": 1}\n{"phase": "pretr\n')
    with pytest.raises(HemoFedError, match="line 2"):
        load_metrics(path)


def test_a_loss_that_is_not_finite_is_null() -> None:
    row = RoundMetrics(phase="finetune", round=1, train_loss=math.nan, learning_rate=math.inf)
    assert row.train_loss is None
    assert row.learning_rate is None


def documented_fields() -> dict[str, set[str]]:
    """Section heading of docs/results-format.md -> the fields its table names."""
    sections = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {
        section.split("\n", 1)[0].strip("` "): set(re.findall(r"^\| `(\w+)` \|", section, flags=re.M))
        for section in sections
    }


def test_the_document_names_each_field_and_no_other() -> None:
    described = documented_fields()
    models = {
        name: {field for field in value.model_fields if field in value.__annotations__}
        for name, value in vars(schema).items()
        if isinstance(value, type) and issubclass(value, schema.Record) and value.model_fields
    }
    assert described == models


# --- words


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.05, 0.02, 0.08, "gained 0.050 over"),
        (-0.05, -0.08, -0.02, "lost 0.050 against"),
        (0.05, -0.02, 0.08, "No clear difference"),
        (0.0, 0.0, 0.0, "No clear difference"),
    ],
)
def test_a_difference_is_called_one_only_if_its_interval_leaves_out_zero(
    value: float, low: float, high: float, said: str
) -> None:
    assert said in words.against(Estimate(value=value, low=low, high=high), "others")


def test_words_for_targets_and_numbers() -> None:
    assert words.target_label("mpcwp_gt_18") == "mPCWP > 18 mmHg"
    assert words.target_label("ejection_gt_2p5") == "ejection > 2.5"
    assert words.target_label("not_norm") == "not norm"
    assert words.group_label("age=>=75") == words.group_label(">=75") == "\u226575"
    assert words.group_label("sex=female & age=50-75") == "female & 50-75"
    named = [("A", "no labels"), ("B", None), ("C", "no labels"), ("D", "withheld")]
    assert words.reasons_by_name(named) == ["A, C: no labels.", "D: withheld."]
    assert words.number(-0.5, 1) == "\u22120.5"
    assert words.number(None) == words.with_interval(None) == "not computed"
    assert words.percent(0.345) == "34%"


def test_privacy_is_stated_plainly() -> None:
    assert "NOT differentially private" in words.privacy_statement(example_results())
    private = schema.Privacy(differentially_private=True, epsilon=3.0, delta=1e-5, secure_aggregation=True)
    said = words.privacy_statement(example_results(privacy=private))
    assert "epsilon 3.00 at delta 1e-05" in said
    assert "NOT" not in said


# --- the page, read as text


@pytest.fixture(scope="module")
def page() -> str:
    return page_text(example_results(), example_metrics(), [example_ecg()])


def test_the_page_says_what_was_found(page: str) -> None:
    said = Page(page).words
    for phrase in (
        "SIMULATED HOSPITALS",
        "told mPCWP > 18 mmHg from the ECG with an AUROC of 0.79 (95% interval 0.76 to 0.83)",
        "gained 0.084 over hospitals training alone",
        "No clear difference from one model trained on all records",
        "No figure for Invented Heart Centre, which has no labels",
        "0.058 above the federated model",
        "suppressed (<11)",
        "suppressed (would reveal another group)",
        "sensitivity of at least 0.80",
        "NOT differentially private",
        "hemofed-sim run studies/demo.toml --out runs/demo",
        "0123456789abcdef" * 4,
        "25 mm/s and 10 mm/mV",
    ):
        assert phrase in said, phrase


def test_a_suppressed_group_has_no_figure_on_the_page(page: str) -> None:
    row = re.search(r'<tr><th scope="row" class="indent">18-35</th>(.*?)</tr>', page, flags=re.S)
    assert row is not None
    assert re.findall(r"\d+", re.sub(r'colspan="7"|&lt;11', "", row[1])) == []


def test_the_page_is_well_formed_and_can_be_read_aloud(page: str) -> None:
    parsed = Page(page)
    ids = parsed.values("id")
    assert [name for name, times in Counter(ids).items() if times > 1] == []
    named = " ".join(parsed.values("aria-labelledby")).split()
    assert set(named) <= set(ids)
    assert parsed.tags.count("svg") == parsed.values("role").count("img") == 7
    assert parsed.tags.count("title") == 1 + 7
    assert parsed.tags.count("h1") == 1
    assert len(page.encode()) < 3_000_000


def test_the_page_asks_for_nothing(page: str) -> None:
    assert asked_for(page) == []
    assert "script" not in Page(page).tags
    assert re.findall(r"https?://", page) == []
    assert asked_for('<p><img src="//elsewhere/x.png"></p>') == ["//elsewhere/x.png"]


def test_the_page_is_the_same_twice(page: str) -> None:
    assert page_text(example_results(), example_metrics(), [example_ecg()]) == page


def outside_figures(page: Page) -> list[str]:
    """The elements in order, less those a figure is drawn with: their number follows the length of names."""
    return [tag for tag in page.tags if tag not in {"g", "path", "text", "use", "defs", "clippath", "rect"}]


@cache
def hostile_page(name: str) -> str:
    """A page in which every name that others choose is `name`."""
    sites = tuple(site.model_copy(update={"name": name, "note": name}) for site in example_sites())
    subgroups = tuple(
        group.model_copy(update={"partition": name, "group": name, "reason": name if group.suppressed else None})
        for group in example_results().subgroups
    )
    metrics = [row.model_copy(update={"warning": name, "sites_failed": (name,)}) for row in example_metrics()]
    results = example_results(
        name=name, command=name, engine=name, sites=sites, subgroups=subgroups, study={name: {name: [name]}}
    )
    return page_text(results, metrics, [example_ecg(caption=name)])


def test_names_are_text_and_never_markup() -> None:
    hostile, harmless = Page(hostile_page(HOSTILE)), Page(hostile_page("harmless"))
    assert outside_figures(hostile) == outside_figures(harmless)
    assert set(hostile.tags) == set(harmless.tags)
    assert {name for _, name, _ in hostile.attributes} == {name for _, name, _ in harmless.attributes}
    assert hostile.words.count('<script>document.title="owned"</script>') > 20


@settings(max_examples=5, deadline=None)
@given(st.text(min_size=1, max_size=40))
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_text_as_a_name_leaves_the_page_as_it_was(name: str) -> None:
    assert outside_figures(Page(hostile_page(name))) == outside_figures(Page(hostile_page("harmless")))


def test_a_page_without_figures_says_why(tmp_path: Path) -> None:
    text = write_page(uncomputed_results(), [], [], tmp_path).read_text(encoding="utf-8")
    said = Page(text).words
    for phrase in (
        "the study ran without baselines",
        "fewer than 11 positive patients",
        "nobody knows it for real ECGs",
        "ECGs never leave a hospital",
        "no pretraining round was logged",
        "no two groups could be shown",
    ):
        assert phrase in said, phrase
    assert "SIMULATED HOSPITALS" not in said
    assert "None" not in said.replace("None: ECGs never", "")


def test_a_regression_study_is_headed_by_its_error() -> None:
    said = Page(page_text(regression_results(), [], [])).words
    assert "root mean square error of 6.71; always saying the mean gives 8.02" in said


def test_ecgs_of_real_patients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="real patients"):
        write_page(uncomputed_results(), [], [example_ecg()], tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- ECG paper


def traces_mm(svg: str) -> list[np.ndarray]:
    """Each trace of an ECG drawing as (point, x and y) in millimetres."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="[^"]*var\(--trace\)', svg)
    points = [re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path) for path in paths]
    return [np.array(each, dtype=float) / 72 * 25.4 for each in points]


def test_the_paper_is_to_scale() -> None:
    signal = np.zeros((12, 2500), dtype=np.float32)
    signal[1, 500:750] = 1.5  # lead II at 1.5 mV from 2 to 3 s
    svg = str(ecg_paper(ExampleEcg("step", signal), "ecg"))
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    assert width / 72 * 25.4 == pytest.approx(270, abs=0.01)
    assert height / 72 * 25.4 == pytest.approx(130, abs=0.01)
    traces = traces_mm(svg)
    pulses = [trace for trace in traces if np.ptp(trace[:, 0]) == pytest.approx(9, abs=0.02)]
    assert len(pulses) == 4
    assert all(np.ptp(pulse[:, 1]) == pytest.approx(10, abs=0.02) for pulse in pulses)
    rhythm = max(traces, key=lambda trace: np.ptp(trace[:, 0]))
    assert np.ptp(rhythm[:, 0]) == pytest.approx(2499 / 250 * 25, abs=0.02)
    raised = rhythm[rhythm[:, 1] < rhythm[:, 1].max() - 1]
    assert np.ptp(rhythm[:, 1]) == pytest.approx(15, abs=0.02)
    assert raised[:, 0].min() == pytest.approx(15 + 2 * 25, abs=0.2)
    assert raised[:, 0].max() == pytest.approx(15 + 3 * 25, abs=0.2)


def test_the_paper_shows_every_lead_once_and_leaves_gaps_open() -> None:
    assert sorted(lead for row in LAYOUT for lead in row) == sorted(
        ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
    )
    signal = example_ecg().signal_mv.copy()
    signal[:, 1000:1500] = np.nan
    rhythm = max(traces_mm(str(ecg_paper(ExampleEcg("gap", signal), "ecg"))), key=lambda t: np.ptp(t[:, 0]))
    assert np.diff(rhythm[:, 0]).max() == pytest.approx(501 / 250 * 25, abs=0.05)
    with pytest.raises(ValueError, match="shape"):
        ecg_paper(ExampleEcg("short", signal[:, :100]), "ecg")


# --- the card


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    as_json, as_markdown = write_card(example_results(), tmp_path)
    text = as_markdown.read_text(encoding="utf-8")
    for phrase in ("SIMULATED HOSPITALS", "NOT differentially private", "suppressed (&lt;11)", "V6", "0.793"):
        assert phrase in text, phrase
    table = json.loads(as_json.read_text(encoding="utf-8"))
    assert table["input"]["sampling_rate_hz"] == 250
    assert table["input"]["leads"][3] == "aVR"
    assert any(not item["answered"] for item in table["tripod_ai"])


def test_the_card_of_uncomputed_results_gives_reasons() -> None:
    text = card_markdown(model_card(uncomputed_results()))
    assert "fewer than 11 positive patients" in text
    assert "None" not in text


def test_a_name_in_the_card_is_neither_markup_nor_a_link_nor_a_new_line() -> None:
    name = "A ![x](http://elsewhere/x) <script>|`b`\n# heading"
    sites = tuple(site.model_copy(update={"name": name}) for site in example_sites())
    text = card_markdown(model_card(example_results(name=name, sites=sites)))
    assert "<script" not in text
    assert "\n# heading" not in text
    assert re.search(r"(?<!\\)\[x", text) is None
    rows = [line for line in text.splitlines() if line.startswith("| A ")]
    assert len(rows) == 4
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)


# --- the page, in a real browser


@needs_browser
def test_a_browser_shows_the_page_and_complains_of_nothing(page: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    dom, complaints = browse(path, tmp_path / "profile")
    assert complaints == []
    assert Page(dom).tags.count("svg") == 7
    assert "an AUROC of 0.79 (95% interval 0.76 to 0.83)" in Page(dom).words


@needs_browser
def test_a_complaint_would_have_been_seen(page: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page.replace("</main>", '<script>1</script><img src="x.png"></main>'), encoding="utf-8")
    _, complaints = browse(path, tmp_path / "profile")
    assert len(complaints) >= 2  # the Content-Security-Policy stops both


@needs_browser
def test_a_browser_takes_hostile_names_for_text(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    without_policy = re.sub(r"<meta http-equiv[^>]*>", "", hostile_page(HOSTILE))
    path.write_text(without_policy, encoding="utf-8")
    dom, complaints = browse(path, tmp_path / "profile")
    assert complaints == []
    assert "<title>owned" not in dom
    assert not {"script", "img"} & set(Page(dom).tags)


@needs_browser
@pytest.mark.parametrize("name", ["Invented", "Unbreakable" * 12])
def test_the_page_fits_a_phone_and_a_desk(name: str, tmp_path: Path) -> None:
    for each in measured_widths(hostile_page(name), tmp_path):
        assert each["scroll"] <= each["inner"], each
        assert each["wide"] == [], each
