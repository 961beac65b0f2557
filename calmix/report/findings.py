"""The results of a study in sentences: findings, claims and their verdicts, certainty.

All numbers come from the analysis, which corrects p; nothing is tested here. All but the last two
claims are the paper's (arXiv 2606.03328) or follow from it; verdicts are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.bootstrap import ALPHA, Estimate
from calmix.analysis.cells import TOTAL
from calmix.analysis.correlations import LEAST
from calmix.analysis.differences import BEST, SINGLES, Gain
from calmix.analysis.ranking import leaders
from calmix.report import words

HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
OPEN, NOT_FOUND = "undecided", "not found"
NO_ANSWERS = (
    "Generated answers were not measured; calmix evaluate MODEL --against DENSE --suite abilities "
    "measures them."
)
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


def tally(verdicts: Sequence[Verdict]) -> str:
    """Return in how many conditions a claim holds, or the verdict of a single one."""
    if len(verdicts) == 1:
        return verdicts[0]["verdict"]
    held = sum(one["verdict"] == HOLDS for one in verdicts)
    return f"holds in {held} of {len(verdicts)}"


def summarise(analysis: Analysis) -> dict[str, Any]:
    """Return the sentences of an analysis: the headline, findings by condition, methods, claims
    with their verdicts, and how certain they are."""
    return {
        "headline": _headline(analysis),
        "conditions": [list(_condition(each)) for each in analysis.conditions],
        "methods": list(_methods(analysis)), "claims": claims(analysis),
        "certainty": list(_certainty(analysis)),
    }  # fmt: skip


def main_condition(conditions: Sequence[ConditionAnalysis]) -> ConditionAnalysis:
    """Return the condition to show first: the most sets, then the method with the most trials, the
    most trials, the highest sparsity."""
    methods = Counter(each.condition.method for each in conditions for _ in each.cells.trials)
    return max(
        conditions,
        key=lambda each: (
            len(each.ranking), methods[each.condition.method], len(each.cells.trials),
            each.condition.sparsity,
        ),
    )  # fmt: skip


def _headline(analysis: Analysis) -> str:
    main = main_condition(analysis.conditions)
    scores = {task.score for each in analysis.conditions for task in each.cells.tasks}
    named = {"generated answers": scores & {"kept"}, "right choices": scores & {"accuracy"},
             "likelihood": scores - {"kept", "accuracy"}}  # fmt: skip
    what = words.listed(name for name, some in named.items() if some)
    ranked = [one for one in main.ranking if one.total.value is not None]
    where = f"after {main.condition.label}"
    if not ranked:
        return f"No calibration set has retention {where}: no task of the suite has signal."
    if len(main.ranking) == 1:
        text = (
            f"{ranked[0].calibration} keeps {words.with_span(ranked[0].total)} % of the dense "
            f"model's {what} {where}. It is the only calibration set: there is nothing to compare."
        )
    else:
        sets, last = leaders(main.ranking), ranked[-1]
        text = f"{what.capitalize()} kept {where} (dense model: 100 %): "
        text += f"{words.which_is_best(main.ranking)}."
        if worst := [f"{one.calibration} {words.percent(one.lowest.value)} % in {one.worst}"
                     for one in sets[:3] if one.worst is not None]:  # fmt: skip
            text += f" In the worst dimension: {words.listed(worst)}."
        if last not in sets:
            text += f" {last.calibration} keeps the least: {words.percent(last.total.value)} %."
    return text if "answers" in what else f"{text} {NO_ANSWERS}"


def _condition(each: ConditionAnalysis) -> Iterator[str]:
    ranked = [one for one in each.ranking if one.total.value is not None]
    if len(ranked) > 1:
        yield f"{words.which_is_best(ranked)}."
    if len(each.ranking) > 1 and each.points and not each.correlations:
        yield (
            f"With {words.counted(each.points, 'single source')} no metric can be correlated with "
            f"retention: it takes at least {LEAST}, with different values."
        )
    for one in each.agreements:
        if one.quantity == TOTAL and one.rho is not None and one.p is not None:
            agrees = "ranks" if one.p <= ALPHA else "cannot be said to rank"
            yield (
                f"KL to the dense model, which needs no labels, "
                f"{agrees if one.rho < 0 else 'does not rank'} {one.n} sets as total retention "
                f"does (ρ {words.rho(one.rho)}, p {words.p_value(one.p)}; −1 is the same order)."
            )
    if faint := [f"{one.quantity} ({one.ratio:.2f})" for one in each.noise
                 if one.kind != "task" and one.ratio is not None and one.ratio < 1]:  # fmt: skip
        yield (
            "One trial per source cannot separate the sources (signal over noise below 1) in "
            f"{words.listed(faint)}."
        )


def _methods(analysis: Analysis) -> Iterator[str]:
    """Compare each method with the one that keeps next less."""
    nearest: dict[str, Gain] = {}
    totals = (one for one in analysis.gains if one.quantity == TOTAL and not one.over)
    for one in sorted(totals, key=lambda one: one.gap.value or 0.0):
        nearest.setdefault(one.more, one)
    for each in analysis.conditions:
        if (gain := nearest.get(each.condition.label)) is not None:
            yield (
                f"{gain.more} against {gain.less}: {words.with_span(gain.gap, sign=True)} points "
                f"in total, mean of {words.counted(gain.sets, 'set')}."
            )


def claims(analysis: Analysis) -> dict[str, list[Verdict]]:
    """Return the claims that this study can judge, each with the verdicts of conditions."""
    found = analysis.conditions
    compared: list[tuple[Any, ...]] = [(*one, False) for one in COMPARED]
    if (default := analysis.settings.default) is not None:
        compared.insert(2, (f"A mix keeps more than {default}", "mix", default, True))
    judged = {text: [_compared(each, *sides) for each in found] for text, *sides in compared} | {
        "Dimensions are far apart where the total is close": [_cancelled(each) for each in found],
        "A metric of the text raises one dimension and lowers another":
            [_pulled(each) for each in found],
        "The lead of a mix grows with sparsity":
            [_moved(analysis, each, "sparsity", 1) for each in found],
        "The lead of a mix shrinks with recovery":
            [_moved(analysis, each, "recovery", -1) for each in found],
    }  # fmt: skip
    return {text: some for text, verdicts in judged.items() if (some := [*filter(None, verdicts)])}


Gap = tuple[str, Estimate, bool]  # the sets' names, the lead, and whether it is significant


def _judged(where: str, gaps: Sequence[Gap], wanted: int = 1) -> Verdict | None:
    """Judge gaps together: a significant one with the wanted sign supports the claim."""
    if not gaps:
        return None
    signs = {0 if not significant or not gap.value else wanted if gap.value > 0 else -wanted
             for _, gap, significant in gaps}  # fmt: skip
    verdict = HOLDS if signs == {1} else IN_PART if 1 in signs else FAILS if -1 in signs else OPEN
    figures = "; ".join(
        f"{name} {words.with_span(gap, sign=True)}"
        + (" (not after correction for the number of tests)" * (gap.clear and not significant))
        for name, gap, significant in gaps
    )
    return {"where": where, "verdict": verdict, "figures": figures}


def _compared(each: ConditionAnalysis, left: str, right: str, named: bool) -> Verdict | None:
    """Compare sets of one strategy with those of another, or with a set `named` by its label."""
    made = {one.calibration: one.strategy for one in each.cells.made}
    gaps = [
        (ours if right == SINGLES else f"{ours} over {theirs.removeprefix(BEST)}", gap,
         one.significant)
        for one in each.differences if one.quantity == TOTAL
        for ours, theirs, gap in ((one.left, one.right, one.gap), (one.right, one.left, -one.gap))
        if made.get(ours) == left
        and right == (theirs if named or theirs == SINGLES
                      else BEST if theirs.startswith(BEST) else made.get(theirs))
    ]  # fmt: skip
    return _judged(each.condition.label, gaps)


def _moved(analysis: Analysis, each: ConditionAnalysis, by: str, wanted: int) -> Verdict | None:
    """Judge whether mixes lead by more than at the lowest sparsity, or by less than without
    recovery."""
    mixes = {one.calibration for one in each.cells.made if one.strategy == "mix"}
    gains = [one for one in analysis.gains
             if (one.by, one.more, one.quantity) == (by, each.condition.label, TOTAL)
             and one.over and one.calibration in mixes]  # fmt: skip
    if by == "recovery":
        gaps = [(f"{one.calibration} over {one.over}", one.gap, one.significant) for one in gains]
        return _judged(each.condition.label, gaps, wanted)
    at = {one.condition.label: f"{100 * one.condition.sparsity:g} %" for one in analysis.conditions}
    gaps = [(f"{one.calibration} from {at[one.less]} to {at[one.more]}", one.gap, one.significant)
            for one in gains]  # fmt: skip
    return _judged(each.condition.series, gaps, wanted)


def _cancelled(each: ConditionAnalysis) -> Verdict | None:
    spread = {one.quantity: one for one in each.spread}
    total = spread.pop(TOTAL, None)
    if total is None or len(spread) < 2 or total.p_cancel is None:
        return None
    widest = max(spread.values(), key=lambda one: one.range)
    figures = (
        f"single sources {words.percent(widest.range)} points apart in {widest.quantity} "
        f"({widest.lowest} to {widest.highest}), {100 * total.range:.1f} in total; "
        f"p {words.p_value(total.p_cancel)} against unrelated dimensions"
    )
    verdict = HOLDS if total.p_cancel <= ALPHA else NOT_FOUND
    return {"where": each.condition.label, "verdict": verdict, "figures": figures}


def _pulled(each: ConditionAnalysis) -> Verdict | None:
    """Judge whether a metric rises with one dimension and falls with another, both significant
    after correction."""
    if not (tested := each.correlations):
        return None
    pairs, verdict = [], HOLDS
    for metric in dict.fromkeys(one.metric for one in tested):
        strong = sorted((one.rho or 0.0, one.quantity) for one in tested if one.significant
                        and one.metric == metric and one.quantity != TOTAL)  # fmt: skip
        if strong and strong[0][0] < 0 < strong[-1][0]:
            (low, falls), (high, rises) = strong[0], strong[-1]
            pairs.append((max(low, -high), f"{metric}: {rises} "
                          f"{words.rho(high)}, {falls} {words.rho(low)}"))  # fmt: skip
    figures = [text for _, text in sorted(pairs)]  # the strongest first
    if more := figures[2:]:
        figures[2:] = [words.counted(len(more), "more metric")]
    if not pairs:
        verdict = OPEN if min(one.least_p or 0.0 for one in tested) > ALPHA else NOT_FOUND
        near = max(tested, key=lambda one: (one.significant, abs(one.rho or 0)))
        figures = [
            "no opposite signs survive correction",
            f"strongest: {near.metric} with {near.quantity}, ρ {words.rho(near.rho)}, corrected p "
            f"{words.p_value(near.p_corrected)}",
        ]
    figures.append(words.counted(max(one.n for one in tested), "source"))
    return {"where": each.condition.label, "verdict": verdict, "figures": "; ".join(figures)}


def _certainty(analysis: Analysis) -> Iterator[str]:
    found = analysis.conditions
    waiting = max(0, analysis.planned - analysis.finished - analysis.failed)
    if waiting or analysis.failed:
        yield (
            f"{analysis.finished} of {words.counted(analysis.planned, 'planned trial')} finished, "
            f"{analysis.failed} failed, {waiting} to come (calmix study status lists them). All "
            "figures are of finished trials and may change."
        )
    if gaps := sum(len(each.missing) for each in found):
        yield (
            f"Not every set has every seed ({words.counted(gaps, 'empty cell')}); means are over "
            "the seeds that exist."
        )
    once = [each.condition.label for each in found if not each.joint.freedom]
    if len(once) < len(found):
        yield (
            "Intervals are over both test items and seeds; the spread over seeds is pooled over "
            "all sets of a condition."
        )
    if once:
        where = f" in {words.listed(once)}" if len(once) < len(found) else ""
        yield (
            f"Every set has one seed{where}: intervals are over test items alone, and the effect "
            "of the seed is unknown."
        )
    tested = [each for each in found if each.correlations]
    if tested:
        numbers = words.listed(str(n) for n in sorted({each.points for each in tested}))
        yield (
            f"Correlations are over {numbers} single sources, averaged over seeds; a mix would "
            f"count its parts twice. p is two-sided, by permutation, corrected over "
            f"{analysis.tests} tests (Benjamini-Hochberg at {ALPHA:g})."
        )
        least = min(one.least_p or 0.0 for each in tested for one in each.correlations)
        if least > ALPHA:
            yield (
                f"With so few sources p cannot fall below {least:.2g}: no correlation could have "
                "been found."
            )
    models = words.listed(sorted({each.condition.model for each in found}))
    yield (
        f"This holds for {models} and this suite; other models were not measured."
        + " A correlation over sources does not show a cause." * bool(tested)
    )
