"""The results of a study in sentences: what was declared, findings, how certain they are.

All numbers come from the analysis, which corrects p; nothing is tested here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from calmix import words
from calmix.evaluation.measures import ALPHA
from calmix.study.analyse import Analysis, ConditionAnalysis
from calmix.study.cells import TOTAL
from calmix.study.declaration import Declaration, Declared
from calmix.study.differences import Gain
from calmix.study.hypotheses import TestedComparison
from calmix.study.ranking import Ranked, leaders
from calmix.study.trials import Key

SEEDS = {
    "own": "items and seeds",
    "pooled": "items and seeds (pooled over the model's conditions)",
    "unknown": "items alone",
}
NO_ANSWERS = (
    "Generated answers were not measured; calmix evaluate MODEL --against DENSE --suite abilities "
    "measures them."
)


def summarise(analysis: Analysis) -> dict[str, Any]:
    """Return the sentences of an analysis: what was declared, with its verdicts; then the
    exploratory headline, findings by condition and methods; and how certain they are."""
    return {
        "opening": list(_opening(analysis)),
        "declared": list(_declared(analysis)),
        "judged": any(one.gap.value is not None for one in analysis.comparisons),
        "exploratory": _exploratory(analysis),
        "headline": _headline(analysis),
        "conditions": [list(_condition(each)) for each in analysis.conditions],
        "methods": list(_methods(analysis)),
        "certainty": list(_certainty(analysis)),
    }


def _opening(analysis: Analysis) -> Iterator[str]:
    """Say what was declared and when, and all that differs from it."""
    last = analysis.declarations[-1] if analysis.declarations else None
    declared = Declaration() if last is None else last.declaration
    if last is None or not analysis.comparisons:
        yield f"Study {analysis.study} {declared}."
    else:
        yield f"Study {last.study} {declared}, declared {_date(last)}."
        if not last.intact:
            yield f"The declaration was changed: its hash was {last.hash[:12]}."
        for before, after in pairwise(analysis.declarations):
            why = f": {after.amends.reason}" if after.amends else ""
            yield f"Study {after.study} amends {before.study}, declared {_date(before)}{why}."
        if analysis.older:
            older = words.counted(analysis.older, "trial")
            yield f"Older than the declaration: {older} of {len(declared.keys)} that are compared."
        ran = {_without_seed(key) for key in declared.keys if key not in analysis.missing}
        for what, some in (("Declared and not run", False), ("Missing seeds", True)):
            keys = [key for key in analysis.missing if (_without_seed(key) in ran) == some]
            if keys:
                names = ["{1} {2} {3} seed {6} ({0})".format(*key) for key in keys]
                yield f"{what}: {_first(names)}."
    if declared.exclude:
        left_out = [f"{task} ({reason})" for task, reason in declared.exclude.items()]
        yield f"Left out, as declared: {words.listed(left_out)}."
    if analysis.settings.without:
        yield f"Left out afterwards, not declared: {words.listed(analysis.settings.without)}."


def _exploratory(analysis: Analysis) -> str:
    tests = words.counted(analysis.tests, "exploratory test")
    text = f"Corrected together (Benjamini-Hochberg at {ALPHA:g}): {tests}."
    return f"All else is exploratory. {text}" if analysis.comparisons else text


def _date(declared: Declared) -> str:
    return f"{declared.since[:16].replace('T', ' ')} UTC"


def _without_seed(key: Key) -> Key:
    return *key[:6], *key[7:]


def _first(names: Sequence[str], most: int = 3) -> str:
    more = len(names) - most
    return words.listed([*names[:most], f"{more} more"] if more > 0 else names)


def _declared(analysis: Analysis) -> Iterator[str]:
    """Say what each declared comparison shows, and what it shows with a later exclusion."""
    several = len({one.model for one in analysis.comparisons}) > 1
    later = {(one.name, one.model): one for one in analysis.afterwards}
    waiting: dict[str, list[str]] = {}
    for one in analysis.comparisons:
        if one.gap.value is None:
            waiting.setdefault(one.name, []).append(one.model)
            continue
        text = f"{one.name}{f' ({one.model})' if several else ''}: {_verdict(one)}"
        said = analysis.declarations[-1].declaration.comparisons[one.name]
        if one.best:
            text += f"; best: {words.listed(dict.fromkeys(one.best))}"
        if one.predicted is not None:
            low, high = said["predict"]
            text += f"; prediction {low:g} to {high:g}: {'' if one.predicted else 'not '}met"
        if one.refuted is not None:
            text += f"; {'' if one.refuted else 'not '}refuted"
        if (after := later.get((one.name, one.model))) is not None:
            without = words.listed(analysis.settings.without)
            text += f". Afterwards, without {without}: {_verdict(after)}"
        yield f"{text}."
    if waiting:
        names = [
            f"{name} ({words.listed(models)})" if several else name
            for name, models in waiting.items()
        ]
        yield f"Without trials on both sides: {'; '.join(names)}."


def _verdict(one: TestedComparison) -> str:
    if one.gap.value is None:
        return "without trials on both sides"
    return (
        f"{one.verdict}, {words.with_span(one.gap, sign=True)} points over {SEEDS[one.seeds]}, "
        f"p {words.p_value(one.gap.p)}, corrected {words.p_value(one.p_corrected)}"
    )


def main_condition(conditions: Sequence[ConditionAnalysis]) -> ConditionAnalysis:
    """Return the condition to show first: the most sets, then the method with the most trials, the
    most trials, the highest sparsity."""
    methods = Counter(each.condition.method for each in conditions for _ in each.cells.trials)
    return max(
        conditions,
        key=lambda each: (
            len(each.ranking),
            methods[each.condition.method],
            len(each.cells.trials),
            each.condition.sparsity,
        ),
    )


def _headline(analysis: Analysis) -> str:
    main = main_condition(analysis.conditions)
    scores = {task.score for each in analysis.conditions for task in each.cells.tasks}
    named = {
        "right answers": scores & {"right"},
        "generated answers": scores & {"kept"},
        "right choices": scores & {"accuracy"},
        "likelihood": scores - {"right", "kept", "accuracy"},
    }
    what = words.listed(name for name, some in named.items() if some)
    ranked = [one for one in main.ranking if one.total.value is not None]
    where = f"after {main.condition.label}"
    if not ranked:
        return f"No calibration set has retention {where}: no task of the suite has signal."
    if len(main.ranking) == 1:
        share = f"{words.with_span(ranked[0].total)} %"
        phrase = f"keeps {share} of the dense model's {what}"
        if analysis.measure == "right":
            phrase = f"gives {share} as many right answers as the dense model"
        text = (
            f"{ranked[0].calibration} {phrase} {where}. It is the only calibration set: there is "
            "nothing to compare."
        )
    else:
        sets, last = leaders(main.ranking), ranked[-1]
        phrase = "relative to the dense model" if analysis.measure == "right" else "kept"
        text = f"{what.capitalize()} {phrase} {where} (dense model: 100 %): "
        text += f"{which_is_best(main.ranking)}."
        if worst := [
            f"{one.calibration} {words.percent(one.lowest.value)} % in {one.worst}"
            for one in sets[:3]
            if one.worst is not None
        ]:
            text += f" In the worst dimension: {words.listed(worst)}."
        if last not in sets:
            text += f" {last.calibration} keeps the least: {words.percent(last.total.value)} %."
    return text if "answers" in what else f"{text} {NO_ANSWERS}"


def _condition(each: ConditionAnalysis) -> Iterator[str]:
    ranked = [one for one in each.ranking if one.total.value is not None]
    if len(ranked) > 1:
        yield f"{which_is_best(ranked)}."
    elif ranked:
        yield f"{ranked[0].calibration}: {words.with_span(ranked[0].total)} %."


def _methods(analysis: Analysis) -> Iterator[str]:
    """Compare each method with the one that keeps next less."""
    nearest: dict[str, Gain] = {}
    totals = (one for one in analysis.gains if one.quantity == TOTAL)
    for one in sorted(totals, key=lambda one: one.gap.value or 0.0):
        nearest.setdefault(one.more, one)
    for each in analysis.conditions:
        if (gain := nearest.get(each.condition.label)) is not None:
            yield (
                f"{gain.more} against {gain.less}: {words.with_span(gain.gap, sign=True)} points "
                f"in total, mean of {words.counted(gain.sets, 'set')} (corrected p "
                f"{words.p_value(gain.p_corrected)})."
            )


def _certainty(analysis: Analysis) -> Iterator[str]:
    conditions = analysis.conditions
    waiting = max(0, analysis.planned - analysis.finished - analysis.failed)
    if waiting or analysis.failed:
        yield (
            f"{analysis.finished} of {words.counted(analysis.planned, 'planned trial')} finished, "
            f"{analysis.failed} failed, {waiting} not run (calmix study status lists them). All "
            "figures are of finished trials."
        )
    if gaps := sum(len(each.missing) for each in conditions):
        yield (
            f"Not every set has every seed ({words.counted(gaps, 'empty cell')}); means are over "
            "the seeds that exist."
        )
    if analysis.ceilings:
        reached = [f"{words.percent(one)} % ({name})" for name, one in analysis.ceilings.items()]
        yield f"The dense model against itself, in other batches: {words.listed(reached)}."
    once = [each.condition.label for each in conditions if not each.joint.freedom]
    if len(once) < len(conditions):
        yield (
            "Intervals are over both test items and seeds; the spread over seeds is pooled over "
            "all sets of a condition."
        )
    if pooled := [each.condition.label for each in conditions if each.joint.pooled]:
        yield (
            f"Few sets have two seeds in {words.listed(pooled)}: there the spread over seeds is "
            "pooled over all conditions of the model."
        )
    if once:
        where = f" in {words.listed(once)}" if len(once) < len(conditions) else ""
        yield (
            f"Every set has one seed{where}: intervals are over test items alone, and the effect "
            "of the seed is unknown."
        )
    models = words.listed(sorted({each.condition.model for each in conditions}))
    yield f"This holds for {models} and this suite; other models were not measured."


def which_is_best(placed: Sequence[Ranked]) -> str:
    """Say which set keeps the most and by how much, or which are tied; at least one has a value."""
    first, *ties = sets = leaders(placed)
    if not ties:
        text = f"{first.calibration} keeps the most: {words.with_span(first.total)} %"
        for second in placed[1:2]:
            if second.behind and second.behind.value is not None:
                text += (
                    f", ahead of {second.calibration} by {words.with_span(second.behind)} points"
                )
        return text
    names, gap, apart = [one.calibration for one in sets], ties[0].behind, "no difference expected"
    shown = names if len(names) < 4 else [*names[:3], f"{len(names) - 3} more"]
    if gap and gap.value is not None:
        apart = f"expected difference {words.with_span(gap)} points"
    if len(ties) > 1:
        apart = f"{names[0]} and {names[1]}: {apart}"
    totals = words.listed(words.with_span(one.total) for one in sets[:3])
    return f"{words.listed(shown)} are tied ({apart}): {totals} %"
