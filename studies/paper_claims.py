"""Judge the claims of arXiv 2606.03328, and two that follow from it, by the trials of a study.

    python studies/paper_claims.py STORE [--default SET] [--measure NAME]

Printed are each claim, its verdict (holds, holds in part, does not hold, undecided, not found) and
the figures under every condition. No study declared these claims: they are exploratory. The p of
differences are those of the analysis, correlations are those of `text_metrics.py`; the changes of
leads are corrected together (Benjamini-Hochberg).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from text_metrics import FEWEST_SETS, Correlation, correlate, information_of, rho

from calmix import words
from calmix.evaluation.measures import ALPHA, Array
from calmix.options import RECOVERIES, Settings
from calmix.study.analyse import Analysis, ConditionAnalysis, analyse
from calmix.study.bootstrap import ROUNDING, Contrast, Interval, Joint, Testable, corrected
from calmix.study.cells import TOTAL
from calmix.study.differences import BEST, SINGLES, between, every
from calmix.study.store import open_store, read_results

HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
OPEN, NOT_FOUND = "undecided", "not found"
COMPARED = (  # a claim, a strategy, and the strategy, source or contender it is compared with
    ("A mix keeps more than the best single source", "mix", BEST),
    ("A mix keeps more than single sources do on average", "mix", SINGLES),
    ("IGSP keeps more than the best single source", "igsp", BEST),
    ("IGSP keeps more than Self-Cal", "igsp", "self-cal"),
    ("IGSP keeps more than SGS", "igsp", "sgs"),
    ("A mix keeps more than IGSP", "mix", "igsp"),
)

# On a claim: `where` (a condition, or a series of sparsities), the `verdict` and its `figures`.
Verdict = dict[str, str]
Gap = tuple[str, Interval, bool]  # the sets' names, the lead, and whether it is significant
Leads = dict[tuple[str, str], Contrast]  # over the default, by (set, quantity)


@dataclass(frozen=True)
class Change(Testable):
    """How much a set's lead `over` another, or over the mean of single sources, is larger under one
    condition than under another that differs only in method, in recovery or in sparsity."""

    more: str
    less: str
    by: str  # method, recovery or sparsity
    calibration: str
    over: str
    quantity: str
    gap: Interval
    p_corrected: float | None = None


def claims(
    analysis: Analysis, correlations: Sequence[Correlation] = ()
) -> dict[str, list[Verdict]]:
    """Return the claims that a study can judge, each with the verdicts of conditions."""
    found, default = analysis.conditions, analysis.settings.default
    compared: list[tuple[Any, ...]] = [(*one, False) for one in COMPARED]
    if default is not None:
        compared.insert(2, (f"A mix keeps more than {default}", "mix", default, True))
    moved = changes([each.joint for each in found], default)
    judged = {text: [_compared(each, *sides) for each in found] for text, *sides in compared} | {
        "Dimensions are far apart where the total is close": [
            _cancelled(each, analysis.settings) for each in found
        ],
        "A metric of the text raises one dimension and lowers another": [
            _pulled(each, correlations) for each in found
        ],
        "The lead of a mix grows with sparsity": [
            _moved(moved, each, "sparsity", 1, found) for each in found
        ],
        "The lead of a mix shrinks with recovery": [
            _moved(moved, each, "recovery", -1, found) for each in found
        ],
    }
    return {text: some for text, verdicts in judged.items() if (some := [*filter(None, verdicts)])}


def tally(verdicts: Sequence[Verdict]) -> str:
    """Return in how many conditions a claim holds, or the verdict of a single one."""
    if len(verdicts) == 1:
        return verdicts[0]["verdict"]
    held = sum(one["verdict"] == HOLDS for one in verdicts)
    return f"holds in {held} of {len(verdicts)}"


def _judged(where: str, gaps: Sequence[Gap], wanted: int = 1) -> Verdict | None:
    """Judge gaps together: a significant one with the wanted sign supports the claim."""
    if not gaps:
        return None
    signs = {
        0 if not significant or not gap.value else wanted if gap.value > 0 else -wanted
        for _, gap, significant in gaps
    }
    verdict = HOLDS if signs == {1} else IN_PART if 1 in signs else FAILS if -1 in signs else OPEN
    figures = "; ".join(
        f"{name} {words.with_span(gap, sign=True)}"
        + (" (not after correction for the number of tests)" * (gap.clear and not significant))
        for name, gap, significant in gaps
    )
    return {"where": where, "verdict": verdict, "figures": figures}


def turned(gap: Interval) -> Interval:
    """Return a difference and its interval with the opposite sign."""
    return Interval(*(None if end is None else -end for end in (gap.value, gap.high, gap.low)))


def _compared(each: ConditionAnalysis, left: str, right: str, named: bool) -> Verdict | None:
    """Compare sets of one strategy with those of another, or with a set `named` by its label."""
    made = {one.calibration: one.strategy for one in each.cells.per_set}
    gaps = [
        (
            ours if right == SINGLES else f"{ours} over {theirs.removeprefix(BEST)}",
            gap,
            one.significant,
        )
        for one in each.differences
        if one.quantity == TOTAL
        for ours, theirs, gap in (
            (one.left, one.right, one.gap),
            (one.right, one.left, turned(one.gap)),
        )
        if made.get(ours) == left
        and right
        == (
            theirs
            if named or theirs == SINGLES
            else BEST
            if theirs.startswith(BEST)
            else made.get(theirs)
        )
    ]
    return _judged(each.condition.label, gaps)


def leads_over(made: Sequence[Joint], default: str | None) -> list[Leads]:
    """Return the leads over the default under each of several conditions.

    The default is a calibration set or, if None, the mean of the single sources that all conditions
    with sources share, so that leads do not depend on which other sources were run.
    """
    singles = [{one.cells.sets[at] for at in one.cells.of("single")} for one in made]
    defaults = [names for names in singles if names] if default is None else [{default}]
    common, leads = set.intersection(*defaults) if defaults else set(), list[Leads]()
    for found in made:
        against = [at for at, name in enumerate(found.cells.sets) if name in common]
        theirs = every(found, against) if against else {}
        leads.append(
            {
                (one.calibration, name): gap
                for at, one in enumerate(found.cells.per_set)
                if one.strategy != "single" and at not in against
                for name, gap in between(every(found, [at]), theirs).items()
            }
        )
    return leads


def changes(made: Sequence[Joint], default: str | None) -> list[Change]:
    """Compare the leads of mixes and self-written sets between methods, and between the lowest and
    the highest sparsity."""
    over, found = default or SINGLES, list[Change]()
    for more, less, by in [*_methods(made), *_sparsities(made)]:
        head = more.cells.condition.label, less.cells.condition.label, by
        for (name, quantity), gap in between(*leads_over((more, less), default)).items():
            found.append(Change(*head, name, over, quantity, gap.estimate(test=True)))
    (rows,) = corrected(found)
    return rows


def _methods(made: Sequence[Joint]) -> Iterator[tuple[Joint, Joint, str]]:
    """Yield conditions that differ only in method, the one with recovery or more kept first."""
    for at, one in enumerate(made):
        for other in made[at + 1 :]:
            first, second = one.cells.condition, other.cells.condition
            alike = all(
                getattr(first, key) == getattr(second, key)
                for key in ("model", "pattern", "propagation", "rows", "length", "suite")
            )
            common = [name for name in one.cells.sets if name in other.cells.sets]
            if not alike or not common:
                continue
            for more, less in ((one, other), (other, one)):
                before, _, added = more.cells.condition.method.rpartition(" + ")
                if before == less.cells.condition.method and added.split(",")[0] in RECOVERIES:
                    yield more, less, "recovery"
                    break
            else:
                kept = [
                    every(each, [each.cells.sets.index(name) for name in common])[TOTAL].value
                    for each in (one, other)
                ]
                yield (other, one, "method") if kept[1] > kept[0] else (one, other, "method")


def _sparsities(made: Sequence[Joint]) -> Iterator[tuple[Joint, Joint, str]]:
    """Yield the highest and the lowest sparsity of conditions that are otherwise alike, without N:M
    patterns."""
    series: dict[str, list[Joint]] = {}
    for one in made:
        if one.cells.condition.rows and one.cells.condition.pattern.endswith("%"):
            series.setdefault(one.cells.condition.series, []).append(one)
    for members in series.values():
        if len(members) > 1:
            yield members[-1], members[0], "sparsity"


def _moved(
    moved: Sequence[Change],
    each: ConditionAnalysis,
    by: str,
    wanted: int,
    conditions: Sequence[ConditionAnalysis],
) -> Verdict | None:
    """Judge whether mixes lead by more than at the lowest sparsity, or by less than without
    recovery."""
    mixes = {one.calibration for one in each.cells.per_set if one.strategy == "mix"}
    some = [
        one
        for one in moved
        if (one.by, one.more, one.quantity) == (by, each.condition.label, TOTAL)
        and one.calibration in mixes
    ]
    if by == "recovery":
        gaps = [(f"{one.calibration} over {one.over}", one.gap, one.significant) for one in some]
        return _judged(each.condition.label, gaps, wanted)
    at = {one.condition.label: f"{100 * one.condition.sparsity:g} %" for one in conditions}
    gaps = [
        (f"{one.calibration} from {at[one.less]} to {at[one.more]}", one.gap, one.significant)
        for one in some
    ]
    return _judged(each.condition.series, gaps, wanted)


def cancellation(parts: Array, *, permutations: int, seed: int) -> float:
    """Return the one-sided p of a mean over dimensions that varies this little between sets if the
    dimensions were unrelated; `parts` is retention, shape (sets, dimensions)."""
    tiled = np.tile(parts.T, (permutations, 1, 1))
    permuted = np.random.default_rng([seed, len(parts)]).permuted(tiled, axis=2).mean(1).std(1)
    return float(((permuted <= parts.mean(1).std() + ROUNDING).sum() + 1) / (permutations + 1))


def _cancelled(each: ConditionAnalysis, settings: Settings) -> Verdict | None:
    """Judge whether single sources that differ a lot in the dimensions look alike in the total."""
    cells, chosen = each.cells, each.cells.of("single")
    total, *parts = cells.means[chosen][:, : len(cells.quantities)].T if chosen else [np.array([])]
    known = {
        name: values
        for name, values in zip(cells.dimensions, parts, strict=True)
        if not np.isnan(values).any()
    }
    if len(chosen) < FEWEST_SETS or len(known) < 2 or np.isnan(total).any():
        return None
    how = {"permutations": settings.resamples, "seed": settings.seed}
    p = cancellation(np.stack([*known.values()], 1), **how)
    widest, values = max(known.items(), key=lambda one: float(np.ptp(one[1])))
    low, high = (cells.sets[chosen[int(at)]] for at in (values.argmin(), values.argmax()))
    figures = (
        f"single sources {words.percent(float(np.ptp(values)))} points apart in {widest} ({low} to "
        f"{high}), {100 * np.ptp(total):.1f} in total; p {words.p_value(p)} against unrelated "
        "dimensions"
    )
    verdict = HOLDS if p <= ALPHA else NOT_FOUND
    return {"where": each.condition.label, "verdict": verdict, "figures": figures}


def _pulled(each: ConditionAnalysis, correlations: Sequence[Correlation]) -> Verdict | None:
    """Judge whether a metric rises with one dimension and falls with another, both significant
    after correction."""
    label = each.condition.label
    tested = [one for one in correlations if one.condition == label and one.metric != "kl"]
    if not tested:
        return None
    pairs, verdict = list[tuple[float, str]](), HOLDS
    for metric in dict.fromkeys(one.metric for one in tested):
        strong = sorted(
            (one.rho or 0.0, one.quantity)
            for one in tested
            if one.significant and one.metric == metric and one.quantity != TOTAL
        )
        if strong and strong[0][0] < 0 < strong[-1][0]:
            (low, falls), (high, rises) = strong[0], strong[-1]
            text = f"{metric}: {rises} {rho(high)}, {falls} {rho(low)}"
            pairs.append((max(low, -high), text))
    figures = [text for _, text in sorted(pairs)]  # the strongest first
    if more := figures[2:]:
        figures[2:] = [words.counted(len(more), "more metric")]
    if not pairs:
        verdict = OPEN if min(one.least_p or 0.0 for one in tested) > ALPHA else NOT_FOUND
        near = max(tested, key=lambda one: (one.significant, abs(one.rho or 0)))
        figures = [
            "no opposite signs survive correction",
            f"strongest: {near.metric} with {near.quantity}, ρ {rho(near.rho)}, corrected p "
            f"{words.p_value(near.p_corrected)}",
        ]
    figures.append(words.counted(max(one.n for one in tested), "source"))
    return {"where": each.condition.label, "verdict": verdict, "figures": "; ".join(figures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--default")
    parser.add_argument("--measure")
    options = parser.parse_args()
    settings = Settings(default=options.default, measure=options.measure)
    analysis = analyse(results := read_results(options.store), settings)
    cells = [each.cells for each in analysis.conditions]
    information = information_of(open_store(options.store))
    correlations = correlate(cells, results.trials, information)
    for claim, verdicts in claims(analysis, correlations).items():
        print(words.wrapped(f"{claim}: {tally(verdicts)}", "- ", "  "))
        for one in verdicts:
            print(words.wrapped("{where}: {verdict} ({figures})".format(**one), "    ", "      "))


if __name__ == "__main__":
    main()
