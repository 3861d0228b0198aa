"""Results in words: how figures, intervals, targets and findings are written, on the page and in the card."""

import re
from collections.abc import Iterable

from server.report.results import Estimate, GroupResult, Oracle, Privacy, Results
from shared_model.page import NOT_COMPUTED
from shared_model.page import count as count
from shared_model.page import number as number
from shared_model.page import percent as percent


def with_interval(estimate: Estimate | None, digits: int = 3, signed: bool = False) -> str:
    """For example `0.79 (0.76 to 0.83)`."""
    if estimate is None or estimate.value is None:
        return NOT_COMPUTED
    value = number(estimate.value, digits, signed)
    if estimate.low is None or estimate.high is None:
        return f"{value} (no interval)"
    return f"{value} ({number(estimate.low, digits)} to {number(estimate.high, digits)})"


def target_label(target: str) -> str:
    """`mpcwp_gt_18` is `mPCWP > 18 mmHg`; `mpcwp` is `mPCWP`; any other name keeps its own words."""
    match = re.fullmatch(r"(.+)_gt_(\d+(?:p\d+)?)", target)
    stem, threshold = match.groups() if match else (target, None)
    pressure = stem == "mpcwp"
    label = "mPCWP" if pressure else stem.replace("_", " ")
    if threshold is None:
        return label
    return f"{label} > {threshold.replace('p', '.')}{' mmHg' if pressure else ''}"


def group_label(group: str) -> str:
    """`>=75` is `≥75`; `sex=female & age=50-75` is `female & 50-75`."""
    return re.sub(r"(^| & )\w+=", r"\1", group).replace(">=", "≥")


def upper_first(text: str) -> str:
    """`sex x age` is `Sex x age`; the rest keeps its case."""
    return text[:1].upper() + text[1:]


def suppressed_text(group: GroupResult) -> str:
    """What stands in place of a suppressed group's figures: its reason, never a zero or a blank."""
    reason = group.reason or "suppressed"
    return reason if reason.startswith("suppressed") else f"suppressed ({reason})"


def hospitals(results: Results) -> str:
    """For example `4 simulated hospitals`."""
    kind = "simulated " if results.simulated else ""
    return f"{len(results.sites)} {kind}hospital{'' if len(results.sites) == 1 else 's'}"


def headline(results: Results) -> str:
    """The main result in one sentence."""
    own = results.own
    patients = "test patients" if own.patients is None else f"{count(own.patients)} test patients"
    where = f"In {patients} of {hospitals(results)}"
    label = target_label(results.own_target).replace(" ", "\u00a0")
    if own.regression is not None and own.regression.rmse is not None:
        return (
            f"{where}, the federated model read {label} from the ECG with a root mean square error of "
            f"{number(own.regression.rmse, 2)}; always saying the mean gives "
            f"{number(own.regression.mean_predictor_rmse, 2)}."
        )
    if own.auroc.value is None:
        return f"{where}, the AUROC for {label} was not computed: {own.auroc.reason}."
    span = "without an interval"
    if own.auroc.low is not None and own.auroc.high is not None:
        span = f"95% interval {number(own.auroc.low, 2)} to {number(own.auroc.high, 2)}"
    return (
        f"{where}, the federated model told {label} from the ECG with an AUROC of "
        f"{number(own.auroc.value, 2)} ({span})."
    )


def findings(results: Results) -> list[str]:
    """Against hospitals alone, against pooled records, against the oracle: a sentence each."""
    compared = results.baselines.comparisons
    sentences = [
        against(compared.federated_minus_local_only, "hospitals training alone"),
        against(compared.federated_minus_pooled, "one model trained on all records in one place"),
        against_oracle(results),
    ]
    return [sentence for sentence in sentences if sentence]


def against(difference: Estimate, other: str) -> str:
    """Federated minus another, in AUROC; a difference is called one only if its interval leaves out zero."""
    if difference.value is None:
        return f"Against {other}: not computed ({difference.reason})."
    if difference.low is None or difference.high is None:
        change = number(difference.value, signed=True)
        return f"Against {other}: {change}, without an interval ({difference.reason})."
    if difference.low <= 0 <= difference.high:
        return f"No clear difference from {other}: {with_interval(difference, signed=True)}."
    verb, side = ("gained", "over") if difference.value > 0 else ("lost", "against")
    size = number(abs(difference.value))
    span = f"95% interval of the paired difference {number(difference.low)} to {number(difference.high)}"
    return f"Training together {verb} {size} {side} {other}, on average over the hospitals ({span})."


def against_oracle(results: Results) -> str:
    """How far the best possible reader of these ECGs is; nothing on real ECGs, where nobody knows."""
    best, auroc = oracle_auroc(results.oracle), results.own.auroc.value
    if best is None or auroc is None:
        return ""
    gap = best - auroc
    place = "above" if gap >= 0 else "below"
    return (
        f"The best possible reader of these simulated ECGs reaches {number(best)}, "
        f"{number(abs(gap))} {place} the federated model."
    )


def oracle_auroc(oracle: Oracle) -> float | None:
    """The oracle on the same test patients where that is known, else on fresh ones."""
    return oracle.value if oracle.on_test_patients is None else oracle.on_test_patients


def reasons_by_name(named: Iterable[tuple[str, str | None]]) -> list[str]:
    """Why figures are missing, each reason once, after the names it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in named:
        if reason:
            names.setdefault(reason, []).append(name)
    return [f"{', '.join(each)}: {reason}." for reason, each in names.items()]


def fairness_sentences(results: Results) -> list[str]:
    """The worst group and the widest gap, or why there is none."""
    fairness, sentences = results.fairness, []
    if fairness.worst_group is not None:
        worst = fairness.worst_group
        sentences.append(
            f"Lowest AUROC among the groups shown: {worst.partition} {group_label(worst.group)}, "
            f"{with_interval(worst.auroc, 2)}."
        )
    gap = fairness.largest_gap
    if gap is not None and gap.value is not None:
        between = " and ".join(group_label(group) for group in gap.groups)
        note = f" {gap.note}" if gap.note else ""
        sentences.append(f"Largest gap: {gap.partition} {between}, {with_interval(gap, 2)}.{note}")
    if fairness.reason:
        sentences.append(f"Not computed: {fairness.reason}.")
    return sentences


def privacy_statement(results: Results) -> str:
    """What the model may and may not reveal of its training patients, plainly."""
    privacy = results.privacy
    if privacy.differentially_private:
        spent = f"epsilon {number(privacy.epsilon, 2)} at delta {privacy.delta:g}" if privacy.delta else "see log"
        training = (
            f"Training was differentially private for each patient: {spent}, for one patient more or less at one "
            "hospital, figures included."
        )
    else:
        training = (
            "Training was NOT differentially private. ECGs stayed at the hospitals, but model weights may "
            "reveal who was trained on: until the hospitals decide otherwise, the model is patient data."
        )
    sums = "inside a secure sum" if privacy.secure_aggregation else "without a secure sum: the centre saw each"
    return f"{training} Weights travelled {sums}. {counts_statement(privacy)}"


def counts_statement(privacy: Privacy) -> str:
    """How the counts behind the test figures left the hospitals."""
    bins = f", scores in {privacy.score_bins} bins" if privacy.score_bins else ""
    left = f"Test figures left the hospitals at disclosure tier {privacy.disclosure_tier}{bins}"
    if privacy.release_epsilon is None:
        return (
            f"{left}; cells of fewer than {privacy.minimum_cell} patients are suppressed, counts are rounded to "
            f"{privacy.rounded_to}."
        )
    return (
        f"{left}: noise was added to every count (epsilon {privacy.release_epsilon:g} for all counts of test patients; "
        f"SD {number(privacy.count_noise_sd, 1)} patients in a count of one hospital), and the intervals include it. "
        f"Groups too small beside the noise are not shown; numbers of patients are noisy too, and rounded to "
        f"{privacy.rounded_to}."
    )


def limits(results: Results) -> list[str]:
    """What a reader must not conclude."""
    found = []
    if results.simulated:
        found.append(
            "The hospitals, patients and ECGs are simulated. The figures say that the software works and how "
            "methods compare; they say nothing about any patient."
        )
    found.append("Research software: not a medical device, not for decisions about a patient.")
    ceiling = results.oracle.noise_ceiling_auroc
    if results.own_target.startswith("mpcwp"):
        here = f": here at {number(ceiling)}" if ceiling is not None else ""
        found.append(f"The wedge pressure is itself read with error, which bounds any AUROC{here}.")
    if results.own.auroc.bound:
        found.append(
            f"AUROCs come from binned scores; binning moves the main one by at most "
            f"{number(results.own.auroc.bound, 4)}."
        )
    if results.privacy.release_epsilon is not None:
        found.append(
            "AUROCs come from noisy counts in a few wide score bins, corrected for binning as if the scores of each "
            "class were normal; where they are not, an error of up to some 0.006 is left, which no interval holds."
        )
    if any(group.suppressed for group in (*results.subgroups, *results.site_results)):
        found.append("Groups too small to show are suppressed: performance in them is unknown, not good.")
    found.append(
        "Subgroup intervals are not corrected for multiplicity: with a dozen groups, a low one is expected by chance."
    )
    found.append("Judged on patients of the hospitals that trained it; no outside hospital has tested it.")
    found.append(
        "Intervals are over test patients, for this one trained model: another seed, or other training patients, would "
        "move the figures as well."
    )
    for name, reason in sorted(results.left_out.items()):
        found.append(f"{name} took no part: {reason}.")
    return found
