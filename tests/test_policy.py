"""policy.toml: nothing is assumed, and whatever a study asks beyond it is refused before any record is read."""

import re
from pathlib import Path
from typing import Any

import pytest

from client.policy import POLICY_FILE, Policy, breaches, check_study, load_policy, write_policy
from shared_model.errors import ExitCode, HemoFedError
from shared_model.study import Study, study_from_table
from tests.private_studies import POLICY, policy_of, private_study, private_table, site_with

ROOT = Path(__file__).resolve().parents[1]


def refusal(site_dir: Path) -> str:
    with pytest.raises(HemoFedError) as caught:
        load_policy(site_dir)
    assert caught.value.exit_code == ExitCode.POLICY_REFUSED
    assert "\n" not in caught.value.message
    return caught.value.message


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    policy = policy_of(delta=1.25e-7, partitions=["sex x age"], require_privacy=False)
    write_policy(tmp_path, policy)
    assert load_policy(tmp_path) == policy


def test_an_absent_or_unreadable_policy_allows_nothing(tmp_path: Path) -> None:
    assert "what no policy allows is refused" in refusal(tmp_path)
    (tmp_path / POLICY_FILE).write_text("epsilon = ")
    assert "not TOML" in refusal(tmp_path)
    (tmp_path / POLICY_FILE).write_bytes(b"\xff")
    assert "not TOML" in refusal(tmp_path)


@pytest.mark.parametrize("key", Policy.model_fields)
def test_no_key_has_a_default(tmp_path: Path, key: str) -> None:
    site_with(tmp_path)
    path = tmp_path / POLICY_FILE
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(f"{key} =")]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(kept))
    assert refusal(tmp_path).startswith(f"{path}: {key} not set")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('epsilom = "8"', "unknown key epsilom"),
        ("declared_patients = 407", "multiple of 10"),
        ("declared_labelled_patients = 410", "above declared_patients"),
        ("epsilon = inf", "finite"),
        ("epsilon = 0", "greater than 0"),
        ("delta = 1.0", "less than 1"),
        ('tasks = ["train"]', "tasks"),
        ('objectives = ["ssl"]', "not a row of the catalogue"),
        ('partitions = ["age x postcode"]', "use sex, age and race"),
    ],
)
def test_a_key_that_is_unknown_or_out_of_range_is_named(tmp_path: Path, line: str, said: str) -> None:
    site_with(tmp_path)
    path, key = tmp_path / POLICY_FILE, line.split(" =")[0]
    lines = [kept for kept in path.read_text().splitlines() if not kept.startswith(f"{key} =")]
    path.write_text("\n".join([*lines, line]))
    assert said in refusal(tmp_path)


def open_study(**tables: Any) -> Study:
    """A study without [privacy]."""
    table = {**private_table(), **tables}
    del table["privacy"]
    return study_from_table(table, "test")


def test_a_study_within_the_policy_passes() -> None:
    check_study(policy_of(), private_study())
    check_study(policy_of(require_privacy=False), open_study())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["finetune", "evaluate"]}, "the task pretrain is not in tasks"),
        ({"tasks": ["pretrain", "finetune"]}, "the task evaluate is not in tasks"),
        ({"objectives": ["supervised"]}, "the objective ssl_dml_median_beat is not in objectives"),
        ({"partitions": ["sex"]}, "subgroups by age are not in partitions"),
        ({"epsilon": 2.9}, "its epsilon of 3 is above 2.9"),
        ({"delta": 9e-6}, "its delta of 1e-05 is above 9e-06"),
        ({"declared_patients": 10_010}, "above 1 / (10 x declared_patients) = 9.99001e-06"),
        ({"minimum_cohort": 210}, "200 patients are declared for finetune, minimum_cohort is 210"),
    ],
)
def test_each_breach_has_its_own_line(changes: dict[str, Any], said: str) -> None:
    policy = policy_of(**changes)
    found = breaches(policy, private_study())
    assert len(found) == 1
    assert said in found[0]
    with pytest.raises(HemoFedError) as caught:
        check_study(policy, private_study())
    assert caught.value.exit_code == ExitCode.POLICY_REFUSED
    assert found[0] in caught.value.message


def test_the_largest_delta_is_exact() -> None:
    assert breaches(policy_of(declared_patients=10_000), private_study()) == []


def test_a_study_without_privacy_is_refused_where_it_is_required() -> None:
    assert breaches(policy_of(), open_study()) == ["it has no [privacy], which require_privacy asks for"]


def test_learning_a_distance_counts_as_pretraining() -> None:
    study = open_study(objective={"name": "ssl_dml_learned"})
    assert "distance" in study.phases
    policy = policy_of(require_privacy=False, objectives=["ssl_dml_learned"], tasks=["finetune", "evaluate"])
    assert breaches(policy, study) == ["the task pretrain is not in tasks"]


def test_all_breaches_are_named_together() -> None:
    policy = policy_of(tasks=[], objectives=[], partitions=[], epsilon=0.1, delta=1e-9)
    assert len(breaches(policy, private_study())) == 8
    assert set(POLICY) == set(Policy.model_fields)


def test_the_policy_in_the_docs_is_whole_and_its_keys_are_explained(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "privacy-ledger.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / POLICY_FILE).write_text(example)
    assert load_policy(tmp_path).epsilon == 8.0
    section = text[text.index("## The policy") : text.index("## The budget")]
    explained = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.+?) \|", section, re.MULTILINE)))
    assert explained == list(Policy.model_fields)
