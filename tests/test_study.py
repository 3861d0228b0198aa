"""A study file: what is refused and how that reads, and what follows from its values."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import BaseModel

from shared_model.errors import ExitCode, HemoFedError
from shared_model.study import Finetune, Phase, Settings, Study, Target, derive_seed, load_study
from simulation.plan import load_plan
from tests.federations import tiny_study
from tests.private_studies import private_study

DEMO = Path(__file__).resolve().parents[1] / "simulation" / "studies" / "demo.toml"


def refusal(path: Path) -> str:
    """The one line a bad study file is refused with."""
    with pytest.raises(HemoFedError) as caught:
        load_study(path)
    assert int(caught.value.exit_code) == int(ExitCode.BAD_STUDY) == 10
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    return caught.value.message


BAD = {
    'name = "x"\ncolour = 1': "unknown key colour",
    'name = "x"\n[finetune]\nrate = 1': "unknown key finetune.rate",
    'name = "x"\n[encoder]\ndepth = 3': "unknown key encoder.depth",
    'name = "x"\n[objective]\nheat = 3': "unknown key objective.heat",
    "seed = 1": "name",
    'name = ""': "name",
    'name = "x"\nseed = -1': "seed",
    'name = "x"\n[finetune]\nrounds = 0': "finetune.rounds = 0",
    'name = "x"\n[pretrain]\nlearning_rate = 0': "pretrain.learning_rate",
    'name = "x"\n[pretrain]\nlearning_rate = nan': "pretrain.learning_rate",
    'name = "x"\n[pretrain]\nlearning_rate = inf': "pretrain.learning_rate",
    'name = "x"\n[target]\nthreshold = nan': "target.threshold",
    'name = "x"\n[objective]\nmargin = inf': "objective.margin",
    'name = "x"\n[objective]\nname = "magic"': "unknown objective 'magic'",
    'name = "x"\n[federation]\nrule = "fedmagic"': "federation.rule",
    'name = "x"\n[federation]\nrule = "fedbn"': 'encoder.norm = "batch"',
    'name = "x"\n[evaluation]\npartitions = ["shoe size"]': "evaluation.partitions",
    'name = "x"\n[evaluation]\nminimum_cell = 0': "evaluation.minimum_cell",
    'name = "x': "not TOML",
}


@pytest.mark.parametrize(("text", "said"), BAD.items())
def test_a_bad_study_is_refused_in_one_line_that_names_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text)
    assert said in refusal(path)


def test_an_absent_or_binary_file_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "absent.toml")
    assert "cannot be read" in refusal(tmp_path)
    binary = tmp_path / "study.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not TOML" in refusal(binary)


def test_a_good_study_is_read_and_travels_as_json(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text('name = "x"\nseed = 7\n[finetune]\nrounds = 3\nshare_head = false\n')
    study = load_study(path)
    assert (study.seed, study.finetune.rounds, study.finetune.share_head) == (7, 3, False)
    again = Study.model_validate_json(study.model_dump_json())
    assert again == study
    assert again.digest == study.digest


def test_the_demo_study_and_its_hospitals_are_valid() -> None:
    study, plan = load_plan(DEMO)
    assert study.target.name == "mpcwp_gt_18"
    assert plan is not None
    assert len(plan.hospitals) == 4


@pytest.mark.parametrize(
    ("column", "threshold", "name"),
    [
        ("mpcwp_mmhg", 18.0, "mpcwp_gt_18"),
        ("mpcwp_mmhg", 12.5, "mpcwp_gt_12p5"),
        ("not_norm", 0.5, "not_norm"),
        ("not_norm", 0.0, "not_norm"),
        ("nt_probnp", 300.0, "nt_probnp_gt_300"),
    ],
)
def test_the_name_of_a_target(column: str, threshold: float, name: str) -> None:
    assert Target(column=column, threshold=threshold).name == name


def follows_a_schedule(rate_at: Callable[[int], float], rounds: int) -> bool:
    """Published fault 17: the scheduler was made and never stepped, so that every round had one rate."""
    rates = [rate_at(number) for number in range(1, rounds + 1)]
    falling = all(later < earlier for earlier, later in pairwise(rates[1:]))
    return rates[0] < rates[1] and falling


def test_17_the_learning_rate_warms_up_and_falls() -> None:
    phase = Phase(rounds=8, learning_rate=2e-3, warmup_rounds=1)
    assert follows_a_schedule(phase.learning_rate_at, 8)
    assert not follows_a_schedule(lambda number: 2e-3, 8)
    assert phase.learning_rate_at(1) == pytest.approx(1e-3)
    assert phase.learning_rate_at(2) == pytest.approx(2e-3)
    assert 2e-4 <= phase.learning_rate_at(8) < 5e-4


@pytest.mark.parametrize("warmup", [0, 1, 3, 20])
@pytest.mark.parametrize("rounds", [1, 2, 8])
def test_every_round_has_a_learning_rate_between_nothing_and_the_peak(rounds: int, warmup: int) -> None:
    phase = Finetune(rounds=rounds, warmup_rounds=warmup, learning_rate=1e-2)
    assert all(0 < phase.learning_rate_at(number) <= 1e-2 for number in range(1, rounds + 1))


def variants(model: BaseModel, at: str = "") -> Iterator[tuple[str, BaseModel]]:
    """The model with one value changed, for every value in it. Not validated: only the digest is asked."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            for key, changed in variants(value, f"{at}{name}."):
                yield key, model.model_copy(update={name: changed})
        else:
            yield at + name, model.model_copy(update={name: altered(value)})


def altered(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value[:-1] if isinstance(value, tuple) else f"{value}x"


def test_the_digest_differs_when_any_key_differs() -> None:
    study = tiny_study()
    changed = dict(variants(study))
    assert len(changed) > 40
    assert all(isinstance(other, Settings) for other in changed.values())
    digests = {key: other.digest for key, other in changed.items() if isinstance(other, Study)}
    assert study.digest not in digests.values()
    assert len(set(digests.values())) == len(changed)
    assert study.model_copy().digest == study.digest


def test_no_two_sites_rounds_or_phases_share_a_seed() -> None:
    parts = [
        (seed, phase, number, site)
        for seed in (1, 2)
        for phase in ("pretrain", "finetune")
        for number in range(1, 20)
        for site in ("alpha", "beta", "alpha1")
    ]
    assert len({derive_seed(*each) for each in parts}) == len(parts)
    assert derive_seed(1, "a") == derive_seed(1, "a")
    assert all(0 <= derive_seed(*each) < 2**63 for each in parts)


def test_a_private_study_survives_the_wire() -> None:
    study = private_study()
    assert Study.model_validate_json(study.model_dump_json()) == study
    assert private_study(accounting="filter", order=12.0).privacy is not None
    with pytest.raises(HemoFedError, match="order is used with accounting"):
        private_study(order=12.0)
