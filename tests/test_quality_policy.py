"""What a site does about a finding: its site.toml decides, and the docs say what happens if it does not."""

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from client.quality_policy import (
    EXPLANATIONS,
    Finding,
    LeadAction,
    Quality,
    QualityPolicy,
    RecordAction,
    apply_policy,
    explain,
)
from client.records.record import Reason, Unusable
from client.signal_quality import LARGEST_QRS_SUM_MV, LIMITS
from client.site import SITE_FILE, SiteSettings, load_site, write_site
from shared_model.errors import HemoFedError
from shared_model.leads import LEADS

DOCS = Path(__file__).parents[1] / "docs"
ABOUT_THE_RECORD = {Finding.WRONG_GAIN, Finding.SHORT_DURATION}


def found(finding: Finding, score: float = 0.7, recorded: tuple[str, ...] = LEADS) -> Quality:
    return Quality(score, {finding: () if finding in ABOUT_THE_RECORD else ("I", "V2")}, recorded)


@pytest.mark.parametrize("finding", Finding)
def test_each_finding_is_accepted_masked_or_turned_away(finding: Finding) -> None:
    quality = found(finding)
    assert apply_policy(QualityPolicy.model_validate({finding: "accept"}), quality) == ()
    with pytest.raises(Unusable) as caught:
        apply_policy(QualityPolicy.model_validate({finding: "turn_away"}), quality)
    assert EXPLANATIONS[finding] in caught.value.detail
    assert len(caught.value.detail.splitlines()) == 1
    if finding in ABOUT_THE_RECORD:
        with pytest.raises(ValidationError):
            QualityPolicy.model_validate({finding: "mask"})
    else:
        assert caught.value.reason == Reason.LOW_QUALITY
        assert "in I, V2" in caught.value.detail
        assert apply_policy(QualityPolicy.model_validate({finding: "mask"}), quality) == ("I", "V2")


def test_a_wrong_gain_names_the_remedy_by_default() -> None:
    with pytest.raises(Unusable, match="check the gain and unit in the header") as caught:
        apply_policy(QualityPolicy(), found(Finding.WRONG_GAIN))
    assert caught.value.reason == Reason.WRONG_GAIN


def test_masks_of_several_findings_are_one_set_in_canonical_order() -> None:
    quality = Quality(0.5, {Finding.OFF_SCALE: ("V6", "V1"), Finding.FLAT_LEAD: ("aVR", "V1")}, LEADS)
    assert apply_policy(QualityPolicy(), quality) == ("aVR", "V1", "V6")


def test_nothing_left_is_turned_away() -> None:
    with pytest.raises(Unusable, match="no lead is usable") as caught:
        apply_policy(QualityPolicy(), Quality(0.3, {Finding.FLAT_LEAD: ("I", "II")}, ("I", "II")))
    assert caught.value.reason == Reason.LOW_QUALITY
    assert apply_policy(QualityPolicy(), Quality(0.3, {Finding.FLAT_LEAD: ("I",)}, ("I", "II"))) == ("I",)


def test_the_minimum_score() -> None:
    policy = QualityPolicy(minimum_score=0.5)
    assert apply_policy(policy, Quality(0.5, {}, LEADS)) == ()
    with pytest.raises(Unusable, match=r"quality 0\.49 of 1 \(noise\)") as caught:
        apply_policy(policy, Quality(0.49, {Finding.NOISE: ("V1",)}, LEADS))
    assert caught.value.reason == Reason.LOW_QUALITY


def test_the_policy_is_a_table_of_site_toml(tmp_path: Path) -> None:
    policy = QualityPolicy(minimum_score=0.4, noise="mask", wrong_gain="accept")
    settings = SiteSettings(name="north", disclosure="clear", threads=2, quality=policy)
    write_site(tmp_path, settings)
    assert load_site(tmp_path) == settings
    (tmp_path / SITE_FILE).write_text('name = "north"\ndisclosure = "clear"\n[quality]\nnoise = "turn_away"\n')
    assert load_site(tmp_path).quality == QualityPolicy(noise="turn_away")
    (tmp_path / SITE_FILE).write_text('name = "north"\ndisclosure = "clear"\n')
    assert load_site(tmp_path).quality == QualityPolicy()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('nois = "mask"', r"unknown key 'quality.nois'; allowed keys: minimum_score, flat_lead"),
        ('noise = "drop"', r"quality.noise: Input should be 'accept', 'mask' or 'turn_away'"),
        ('wrong_gain = "mask"', r"quality.wrong_gain: Input should be 'accept' or 'turn_away'"),
        ("minimum_score = 2", r"quality.minimum_score: Input should be less than or equal to 1"),
    ],
)
def test_a_slip_in_the_table_is_named(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / SITE_FILE).write_text(f'name = "north"\ndisclosure = "clear"\n[quality]\n{line}\n')
    with pytest.raises(HemoFedError, match=said):
        load_site(tmp_path)


def test_each_finding_has_a_line_and_a_place_in_the_policy() -> None:
    assert set(EXPLANATIONS) == set(Finding)
    assert set(QualityPolicy.model_fields) == {"minimum_score", *Finding}
    assert explain(Finding.NOISE, ("V1", "V2")).startswith("noise in V1, V2: ")
    assert explain(Finding.WRONG_GAIN, ()).startswith("wrong_gain: ")


def test_docs_name_each_finding_with_its_default_and_limit() -> None:
    text = (DOCS / "quality.md").read_text(encoding="utf-8")
    rows = {cells[0].strip("` "): cells for cells in (line.strip("|\n").split("|") for line in text.splitlines())}
    for finding in Finding:
        default = getattr(QualityPolicy(), finding)
        assert f"`{default}`" in rows[finding][2], finding
        assert default in get_args(RecordAction if finding in ABOUT_THE_RECORD else LeadAction)
    shown = {Finding.FLAT_LEAD: "30%", Finding.MISSING_SAMPLES: "50%", Finding.CLIPPED: "2%", Finding.OFF_SCALE: "10%"}
    for finding, limit in LIMITS.items():
        assert shown.get(finding, f"{limit:g} mV") in rows[finding][1], finding
    assert f"{LARGEST_QRS_SUM_MV:g} mV" in rows[Finding.WRONG_GAIN][1]


def test_docs_explain_each_reason() -> None:
    text = (DOCS / "site-store.md").read_text(encoding="utf-8")
    assert set(Reason) <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
