"""What of a hospital's counts may leave it, and what of the sum may be printed.

Tiers, chosen by the hospital and refused when unset: `clear` (coarse cells, small counts merged or
suppressed), `masked` (fine bins inside a secure sum), `noised` (differential privacy).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, product
from operator import add

import numpy as np
from numpy.typing import NDArray

from shared_model.errors import ExitCode, HemoFedError
from shared_model.histograms import Counts, ScoreHistogram, clean_edges, coarsen
from shared_model.score_grid import COARSE_EDGES
from shared_model.subgroups import ALL, factors_of, group_levels, partition_of

TIERS = ("clear", "masked", "noised")
DEFAULT_MINIMUM_CELL = 11  # CMS cell size policy: no cell of 1 to 10 shown or derivable (ResDAC)
ROUND_PUBLISHED_TO = 5

Sizes = Mapping[str, tuple[int, int]]  # group -> (patients with, patients without the condition)


@dataclass(frozen=True)
class Suppressed:
    """There are figures, but they are not shown. Never a zero, never an empty cell."""

    reason: str


def check_tier(tier: str | None, minimum_cell: int | None, secure_sum_available: bool, private: bool = False) -> str:
    """The tier, if counts may leave under it; else HemoFedError (exit code DISCLOSURE_REFUSED).

    Guarantee
    ---------
    Fails closed: an unset or unknown tier, an unset minimum cell, `masked` without a secure sum, `noised` without
    a private study whose release the ledger pays for, and any other tier in a `private` study (one with a
    `[privacy]` table) are refused, each with its reason. Nothing falls back to another tier.
    """
    if tier not in TIERS:
        raise _refused(f"the disclosure tier is {tier!r}; set it in the site's policy to one of {', '.join(TIERS)}")
    if tier != "noised" and private:
        raise _refused(
            f"the study is private and the site's tier is {tier!r}: exact counts would break its claim; "
            "set it to 'noised'"
        )
    if minimum_cell is None or minimum_cell < 1:
        raise _refused(
            f"minimum_cell is {minimum_cell!r}; set it in the site's policy ({DEFAULT_MINIMUM_CELL} is usual)"
        )
    if tier == "masked" and not secure_sum_available:
        raise _refused("tier 'masked' needs a secure sum and this run has none; use 'clear' or a secure sum")
    if tier == "noised" and not private:
        raise _refused(
            "tier 'noised' debits a privacy ledger, and a study without [privacy] has nothing to debit; "
            "add the table, or use 'clear' or 'masked'"
        )
    return tier


def protect(
    histograms: Mapping[str, ScoreHistogram], minimum_cell: int, keep_edge: int | None = None
) -> tuple[dict[str, ScoreHistogram], dict[str, Suppressed]]:
    """The `clear` tier: (blurred histograms that may leave, groups that may not and why).

    `histograms` are fine, by group name, each partition whole. `keep_edge` is the study's threshold; it stays
    an edge where the counts allow, so that the 2x2 table is exact.

    Guarantee
    ---------
    Unit: a patient (histograms hold one ECG each). With k = `minimum_cell`: in each released cell of a group
    both classes are empty or both have at least k patients. So no cell shows 1 to k - 1 patients, and none
    says of everybody in it that they have, or lack, the condition. The same holds for every set of patients
    (groups at intervals of the score) whose count is a sum or difference of released counts, because
    (1) the suppressed groups of a factor are treated as one more group, the rest, which must keep the rule
    itself: where it would not, the next smallest group joins it (complementary suppression);
    (2) a partition of several factors is released whole or not at all, and only one of those that overlap
    without being nested (the three two-way tables of three factors determine more than their own cells);
    (3) all groups of such a partition, of those nested in it, or of a factor by itself share their cells,
    and these are unions of the cells of "all". A count that follows is thus additive over unrelated
    partitions; being 0 or 1 for each patient, it depends on one of them only, within whole cells.

    It is broken by a second release about nearly the same patients under another threshold, minimum or
    partition list, and by patients with several rows; bounds that follow from counts being non-negative
    remain possible. Release once.
    """
    sizes = {name: (h.positives, h.negatives) for name, h in histograms.items()}
    suppressed = suppressed_groups(sizes, minimum_cell, whole_intersections=True)
    partitions: dict[str, list[str]] = {}
    for name in histograms:
        partitions.setdefault(partition_of(name), []).append(name)
    shown = {p: names for p, names in partitions.items() if any(n not in suppressed for n in names)}
    if ALL not in shown:
        return {}, suppressed
    wanted = set(COARSE_EDGES.tolist()) | ({keep_edge} if keep_edge is not None else set())
    edges_of_all = merged_edges([histograms[ALL]], sorted(wanted), minimum_cell, keep_edge)
    released = {ALL: coarsen(histograms[ALL], edges_of_all)}
    for leading in _not_nested(set(shown) - {ALL}):
        rest = [histograms[name] for name in shown[leading] if name in suppressed]
        guarded = [histograms[name] for name in shown[leading] if name not in suppressed]
        guarded += [reduce(add, rest)] if rest else []
        edges = merged_edges(guarded, edges_of_all, minimum_cell, keep_edge)
        for partition, names in shown.items():
            if partition != ALL and set(factors_of(partition)) <= set(factors_of(leading)):
                released |= {n: coarsen(histograms[n], edges) for n in names if n not in suppressed}
    return {name: released[name] for name in histograms if name in released}, suppressed


def suppressed_groups(sizes: Sizes, minimum_cell: int, whole_intersections: bool = False) -> dict[str, Suppressed]:
    """Groups that must not be shown: those with 1 to `minimum_cell` - 1 patients in a class (or a class empty
    and the other not), and those whose display would give these away.

    Guarantee
    ---------
    From the shown groups, sums and differences yield no suppressed small group and no two of one partition
    that together stay below the minimum; and in each shown group, the suppressed part of it is empty or at
    least the minimum in both classes. Bounds that follow from counts being non-negative remain possible.
    `whole_intersections` is the stricter rule (2) of `protect`, for releases that also show cells.
    """
    small = {name for name, size in sizes.items() if not _enough(size, minimum_cell)}
    hidden = set(small)
    if whole_intersections:
        hidden |= _unsafe_intersections(sizes, small)
    families = _families(sizes)
    while (culprit := _gives_away(sizes, families, small, hidden, minimum_cell)) is not None:
        hidden.add(culprit)
    why = f"fewer than {minimum_cell} patients with or without the condition"
    also = f"could reveal a group of fewer than {minimum_cell} patients by subtraction"
    return {name: Suppressed(why if name in small else also) for name in sizes if name in hidden}


def suppress_published(
    groups: Mapping[str, ScoreHistogram], minimum_cell: int
) -> dict[str, ScoreHistogram | Suppressed]:
    """What may be printed of summed histograms (after a secure sum, or over sites): apply before any figure
    is made.

    Guarantee: as `suppressed_groups`. Print counts through `round_count`, rates to three decimals, curves and
    calibration from `publishable_curve`.
    """
    sizes = {name: (h.positives, h.negatives) for name, h in groups.items()}
    suppressed = suppressed_groups(sizes, minimum_cell)
    return {name: suppressed.get(name, histogram) for name, histogram in groups.items()}


def publishable_curve(
    histogram: ScoreHistogram, minimum_cell: int, keep_edge: int | None = None
) -> ScoreHistogram | Suppressed:
    """A histogram blurred to cells with no class count from 1 to `minimum_cell` - 1, for an ROC or
    reliability plot."""
    if not _enough((histogram.positives, histogram.negatives), minimum_cell):
        return Suppressed(f"fewer than {minimum_cell} patients with or without the condition")
    clean = clean_edges(histogram)
    wanted = set(COARSE_EDGES.tolist()) | ({keep_edge} if keep_edge is not None else set())
    allowed = [edge for edge in clean.tolist() if edge in wanted]
    return coarsen(histogram, merged_edges([histogram], allowed, minimum_cell, keep_edge))


def publishable_counts(counts: Mapping[str, int], minimum_cell: int) -> dict[str, int] | Suppressed:
    """The cells of a 2x2 table rounded to 5; suppressed as a whole when one cell is between 1 and
    `minimum_cell` - 1, because the margins would give a single hidden cell away. Suppress the rates made from
    it as well."""
    if any(0 < count < minimum_cell for count in counts.values()):
        return Suppressed(f"a cell of fewer than {minimum_cell} patients")
    return {name: round_count(count) for name, count in counts.items()}


def round_count(count: int, to: int = ROUND_PUBLISHED_TO) -> int:
    """The nearest multiple of `to`, halves upwards."""
    return (2 * count + to) // (2 * to) * to


def merged_edges(
    guarded: Sequence[ScoreHistogram], allowed: Sequence[int], minimum_cell: int, keep_edge: int | None = None
) -> list[int]:
    """Edges, out of `allowed`, of the narrowest cells (from the left) that keep the rule in all guarded
    histograms.

    The rule: both classes empty, or both at least `minimum_cell`. `keep_edge` stays if both its sides can
    keep the rule. Raises HemoFedError where even one single cell breaks it (the groups should have been
    suppressed).
    """
    counts = np.stack([h.table[[0, 2]] for h in guarded])  # (group, class, bin)
    cumulative = np.concatenate([np.zeros((len(guarded), 2, 1), np.int64), counts.cumsum(axis=2)], axis=2)
    edges = sorted(set(allowed))
    if keep_edge in edges and keep_edge not in (edges[0], edges[-1]):
        middle = edges.index(keep_edge)
        left = _merge(cumulative, edges[: middle + 1], minimum_cell)
        right = _merge(cumulative, edges[middle:], minimum_cell)
        if left and right:
            return left[:-1] + right
    merged = _merge(cumulative, edges, minimum_cell)
    if merged is None:
        raise HemoFedError(f"a group has a class of 1 to {minimum_cell - 1} patients and was not suppressed")
    return merged


def _merge(cumulative: Counts, edges: list[int], minimum_cell: int) -> list[int] | None:
    """Close a cell as soon as it keeps the rule; what is left over at the right joins the cells before it."""

    def keeps_rule(start: int, end: int) -> bool:
        cell = cumulative[:, :, end] - cumulative[:, :, start]  # (group, class)
        return bool(((cell == 0).all(axis=1) | (cell >= minimum_cell).all(axis=1)).all())

    kept = [edges[0]]
    for edge in edges[1:]:
        if keeps_rule(kept[-1], edge):
            kept.append(edge)
    while kept[-1] != edges[-1]:
        if keeps_rule(kept[-1], edges[-1]):
            kept.append(edges[-1])
        elif len(kept) == 1:
            return None
        else:
            kept.pop()
    return kept


def _not_nested(partitions: set[str]) -> list[str]:
    """The partitions whose factors are not all among those of another one."""
    factors = {partition: set(factors_of(partition)) for partition in partitions}
    return sorted(p for p in partitions if not any(factors[p] < factors[other] for other in partitions))


def _unsafe_intersections(sizes: Sizes, small: set[str]) -> set[str]:
    """Groups of the partitions of several factors that have a small group or overlap an accepted one."""
    partitions = {partition_of(name) for name in sizes}
    crossed = [p for p in partitions if len(factors_of(p)) > 1]
    torn = {partition_of(name) for name in small}
    accepted: list[set[str]] = []
    refused = set()
    for partition in sorted(crossed, key=lambda p: (-len(factors_of(p)), p)):
        factors = set(factors_of(partition))
        if partition in torn or any(factors & other and not factors <= other for other in accepted):
            refused.add(partition)
        else:
            accepted.append(factors)
    return {name for name in sizes if partition_of(name) in refused}


def _enough(size: tuple[int, int], minimum_cell: int) -> bool:
    return max(size) == 0 or min(size) >= minimum_cell


def _families(sizes: Sizes) -> list[tuple[str, list[str]]]:
    """(parent, its children in one finer partition), for every parent and finer partition."""
    levels = {name: group_levels(name) for name in sizes}
    families = []
    for parent, finer in product(sizes, {partition_of(name) for name in sizes}):
        if not set(levels[parent]) < set(factors_of(finer)):
            continue
        children = [
            name for name in sizes if partition_of(name) == finer and levels[parent].items() <= levels[name].items()
        ]
        families.append((parent, children))
    return families


def _gives_away(
    sizes: Sizes,
    families: list[tuple[str, list[str]]],
    small: set[str],
    hidden: set[str],
    minimum_cell: int,
) -> str | None:
    """One more group to suppress, the smallest that helps; None when nothing is given away."""
    total = {name: size[0] + size[1] for name, size in sizes.items()}
    for parent, children in families:
        inside = [sizes[name] for name in children if name in hidden]
        rest = (sum(s[0] for s in inside), sum(s[1] for s in inside))
        if parent not in hidden and not _enough(rest, minimum_cell):
            shown = [name for name in children if name not in hidden and max(sizes[name])]
            return min(shown, key=lambda name: (total[name], name)) if shown else parent
    return _derivable(sizes, small, hidden, minimum_cell)


def _derivable(sizes: Sizes, small: set[str], hidden: set[str], minimum_cell: int) -> str | None:
    """The smallest shown group in a sum or difference that equals a small group, or two of one partition.

    Groups are indicator vectors over the cross product of all levels; a hidden one is derivable when it is a
    linear combination of the shown ones.
    """
    shown = [name for name in sizes if name not in hidden]
    if not shown or not small:
        return None
    vectors = _indicators(list(sizes))
    basis = np.stack([vectors[name] for name in shown], axis=1)  # (atom, shown group)
    pairs = (
        pair
        for pair in combinations(sorted(small), 2)
        if partition_of(pair[0]) == partition_of(pair[1])
        and not _enough((sizes[pair[0]][0] + sizes[pair[1]][0], sizes[pair[0]][1] + sizes[pair[1]][1]), minimum_cell)
    )
    targets = [vectors[name] for name in sorted(small)] + [vectors[a] + vectors[b] for a, b in pairs]
    wanted = np.stack(targets, axis=1)  # (atom, target)
    weights = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    exact = np.abs(basis @ weights - wanted).max(axis=0) < 1e-8
    total = {name: size[0] + size[1] for name, size in sizes.items()}
    for target in np.flatnonzero(exact).tolist():
        used = np.abs(weights[:, target]) > 1e-8
        helpful = [name for name, uses in zip(shown, used, strict=True) if uses and max(sizes[name])]
        # None where only empty groups are used: the sites behind them are not those behind the target.
        if helpful:
            return min(helpful, key=lambda name: (total[name], name))
    return None


def _indicators(names: list[str]) -> dict[str, NDArray[np.float64]]:
    """Each group as 0/1 over the cross product of all levels that occur in the names."""
    levels = {name: group_levels(name) for name in names}
    seen: dict[str, list[str]] = {}
    for stated in levels.values():
        for factor, level in stated.items():
            if level not in seen.setdefault(factor, []):
                seen[factor].append(level)
    atoms = [dict(zip(seen, combination, strict=True)) for combination in product(*seen.values())]
    return {
        name: np.array([stated.items() <= atom.items() for atom in atoms], dtype=np.float64)
        for name, stated in levels.items()
    }


def _refused(message: str) -> HemoFedError:
    return HemoFedError(message, ExitCode.DISCLOSURE_REFUSED)
