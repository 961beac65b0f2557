"""What a study shows in plain words: what was found, what was not, and how sure that is.

Every sentence is written from the analysis; nothing is said that its tables do not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.cells import TOTAL
from calmix.analysis.correlations import ALPHA, TradeOff
from calmix.analysis.differences import SINGLES
from calmix.analysis.statistics import LEAST
from calmix.report import words

NEAR_NULL = 0.2  # a correlation weaker than this is called none at all


@dataclass(frozen=True)
class Findings:
    """What was found and what was not, about one condition or across them; `brief` in a line."""

    about: str
    found: tuple[str, ...]
    not_found: tuple[str, ...]
    brief: str = ""


@dataclass(frozen=True)
class Summary:
    """Sentences: one for the top, those about each condition, across them, and on certainty."""

    headline: str
    conditions: tuple[Findings, ...]
    across: Findings
    certainty: tuple[str, ...]

    def text(self) -> str:
        """Return the summary as plain text for a terminal."""
        parts = [self.headline]
        for each in (*self.conditions, self.across):
            for head, lines in (("found", each.found), ("not found", each.not_found)):
                if lines:
                    parts.append(_block(f"{each.about}: {head}", lines))
        return "\n\n".join([*parts, _block("How sure this is", self.certainty)])


def _block(head: str, lines: Sequence[str]) -> str:
    return "\n".join([head, *(f"  - {line}" for line in lines)])


def main_condition(analysis: Analysis) -> ConditionAnalysis:
    """Return the condition to look at first: most sets, then the first method's sparsest."""
    first = analysis.conditions[0].condition.method
    return max(
        analysis.conditions,
        key=lambda found: (
            len(found.ranking) > 1,
            found.condition.method == first,
            found.condition.sparsity,
        ),
    )


def summarise(analysis: Analysis) -> Summary:
    """Return the summary of an analysis."""
    conditions = []
    for each in analysis.conditions:
        found: list[str] = []
        missing: list[str] = []
        _best(each, found, missing)
        _contest(each, found, missing)
        _trade_offs(analysis, each, found, missing)
        _averaging(each, found, missing)
        brief = found[0] if found else ""
        if each.correlations:
            brief += f" {'An' if each.trade_offs else 'No'} opposite-sign trade-off was found."
        conditions.append(Findings(each.condition.label, tuple(found), tuple(missing), brief))
    grown: list[str] = []
    level: list[str] = []
    _growth(analysis, grown, level)
    across = Findings("Against sparsity", tuple(grown), tuple(level))
    return Summary(_headline(analysis), tuple(conditions), across, tuple(_certainty(analysis)))


def _headline(analysis: Analysis) -> str:
    main = main_condition(analysis)
    best = main.ranking[0]
    where = f"After {main.condition.label}"
    if best.total.value is None:
        return f"{where} no calibration set has a retention: no task of the suite has signal."
    if len(main.ranking) == 1:
        return (
            f"{where}, {best.calibration} keeps {words.with_span(best.total)} % of the dense "
            "model's ability. It is the only calibration set, so nothing can be compared."
        )
    text = (
        f"{where}, {best.calibration} keeps the most of the dense model's ability: "
        f"{words.with_span(best.total)} % in total"
    )
    if best.worst is not None:
        text += f", {words.percent(best.lowest.value)} % in its worst dimension, {best.worst}"
    last = next(one for one in reversed(main.ranking) if one.total.value is not None)
    return text + (
        f". {last.calibration} keeps the least: {words.percent(last.total.value)} % in total"
        + (f", {words.percent(last.lowest.value)} % in {last.worst}." if last.worst else ".")
    )


def _best(each: ConditionAnalysis, found: list[str], missing: list[str]) -> None:
    """Who leads by total and by worst dimension, and who cannot be told apart from the leader."""
    ranked = [one for one in each.ranking if one.total.value is not None]
    if len(ranked) < 2:
        return
    best, second = ranked[0], ranked[1]
    lead = second.behind
    text = (
        f"Highest total: {best.calibration} with {words.with_span(best.total)} %, "
        f"ahead of {second.calibration} by {words.percent(lead.value if lead else None)} points"
    )
    low = min(
        (one for one in ranked if one.rank_worst is not None),
        key=lambda one: one.rank_worst or 0,
        default=None,
    )
    if low is not None:
        same = "also " if low is best else ""
        text += (
            f". Highest worst dimension: {same}{low.calibration} with "
            f"{words.with_span(low.lowest)} % in {low.worst}"
        )
    found.append(text + ".")
    if lead is None or lead.draw_low is None or lead.low is None:
        missing.append(
            f"With one seed a set, whether {best.calibration} would lead again on "
            "other draws cannot be told."
        )
        return
    near = [one for one in ranked[1:] if one.behind and one.behind.draw_low is not None
            and one.behind.draw_low <= 0]  # fmt: skip
    level = [one for one in ranked[1:] if one.behind and one.behind.low is not None
             and one.behind.low <= 0]  # fmt: skip
    if near:
        missing.append(
            f"{best.calibration} is not set apart from {_some(near)}, whose distance "
            "other calibration draws could undo."
        )
    if len(level) > len(near):
        missing.append(
            f"Were the test items drawn anew too, {best.calibration} would not be set "
            f"apart from {words.counted(len(level), 'other set')} of {len(ranked) - 1} (a "
            "cautious count: it ignores that all sets share their items)."
        )


def _some(ranked: Sequence[object]) -> str:
    names = [str(getattr(one, "calibration", one)) for one in ranked]
    if len(names) <= 3:
        return words.listed(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"


def _contest(each: ConditionAnalysis, found: list[str], missing: list[str]) -> None:
    """Each way to calibrate against the mean of the single sources, and against the best."""
    rights = dict.fromkeys(one.right for one in each.differences)
    for right in [name for name in rights if _is_single(each, name)]:
        against = f"the {SINGLES}" if right == SINGLES else f"the best single source, {right}"
        if all(one.p is None for one in each.differences):
            continue
        ahead: list[str] = []
        open_: list[str] = []
        behind: list[str] = []
        for one in each.differences:
            if one.quantity != TOTAL or one.right != right or _is_single(each, one.left):
                continue
            told = f"{one.left} ({words.points(one.value)} {words.span(one.low, one.high)})"
            told = told.replace(" )", ")")
            certain = one.p_corrected is not None and one.p_corrected <= ALPHA
            (open_ if not certain else ahead if one.value > 0 else behind).append(told)
        for names, more in ((ahead, "more"), (behind, "less")):
            if names:
                verb = "keeps" if len(names) == 1 else "keep"
                found.append(
                    f"{words.listed(names)} {verb} {more} in total than {against} (in points)."
                )
        if open_:
            missing.append(
                f"No difference in total from {against} that survives correction (a bracket is "
                f"of one comparison alone): {words.listed(open_)}."
            )


def _is_single(each: ConditionAnalysis, name: str) -> bool:
    return name == SINGLES or name in [
        one.calibration for one in each.ranking if one.strategy == "single"
    ]


def _averaging(each: ConditionAnalysis, found: list[str], missing: list[str]) -> None:
    spread = {one.quantity: one for one in each.spreads if one.over == "single"}
    kind = "single sources"
    if len(spread) < 3:
        spread = {one.quantity: one for one in each.spreads if one.over == "all"}
        kind = "calibration sets"
    total = spread.pop(TOTAL, None)
    if total is None or len(spread) < 2:
        return
    widest = max(spread.values(), key=lambda one: one.range)
    cancels = total.p_cancel is not None and total.p_cancel <= ALPHA
    text = (
        f"{kind.capitalize()} are {100 * widest.range:.1f} points apart in {widest.quantity} "
        f"({widest.lowest} to {widest.highest}) but {100 * total.range:.1f} in total"
    )
    if cancels:
        text += (
            ": gains in one dimension go with losses in another, and the average hides them "
            f"(p {words.p_value(total.p_cancel)} against unrelated dimensions)"
        )
    if widest.range > total.range:
        found.append(f"{text}.")
    if not cancels:
        tested = f" (p {words.p_value(total.p_cancel)})" if total.p_cancel is not None else ""
        missing.append(
            "That losses in one dimension cancel gains in another is not shown: unrelated "
            f"dimensions would average out much the same{tested}."
        )
    if total.p_alike is not None and total.p_alike > ALPHA:
        missing.append(
            f"The totals of the {kind} differ by no more than redrawing them would "
            f"(p {words.p_value(total.p_alike)})."
        )


def _trade_offs(
    analysis: Analysis, each: ConditionAnalysis, found: list[str], missing: list[str]
) -> None:
    kind = "single sources" if analysis.settings.over == "single" else "calibration sets"
    if not each.correlations:
        if len(each.ranking) > 1:
            missing.append(
                f"With {words.counted(each.points, kind[:-1], kind)} no metric can be "
                f"correlated with retention (at least {LEAST}, with metrics that differ)."
            )
        return
    strong = [one for one in each.correlations if one.significant and one.dimension != TOTAL]
    if each.trade_offs:
        names = list(dict.fromkeys(one.metric for one in each.trade_offs))
        names.sort(key=lambda name: -_strength(each.trade_offs, name))
        texts = [
            _told([one for one in each.trade_offs if one.metric == name]) for name in names[:2]
        ]
        more = f" {words.counted(len(names) - 2, 'more metric')} likewise." if names[2:] else ""
        found.append(f"Opposite-sign trade-off: {'; '.join(texts)}.{more}")
    else:
        missing.append(
            f"No opposite-sign trade-off: no metric rises with one dimension and falls "
            f"with another, both surviving correction over {analysis.family} tests."
        )
    if strong and not each.trade_offs:
        best = max(strong, key=lambda one: abs(one.rho or 0))
        found.append(
            f"{words.counted(len(strong), 'correlation')} of a metric with a dimension "
            f"survive correction; the strongest is {words.metric_name(best.metric)} with "
            f"{best.dimension} (ρ {words.rho(best.rho)})."
        )
    touched = {one.dimension for one in strong}
    dimensions = dict.fromkeys(one.dimension for one in each.correlations if one.rho is not None)
    silent = [name for name in dimensions if name not in touched and name != TOTAL]
    if not silent:
        return
    text = f"No metric goes with {words.listed(silent)} after correction"
    best = max(
        (one for one in each.correlations if one.dimension in silent and one.rho is not None),
        key=lambda one: abs(one.rho or 0),
    )
    strength = (
        "which is next to nothing" if abs(best.rho or 0) < NEAR_NULL
        else f"over {words.counted(best.n, kind[:-1], kind)}"
    )  # fmt: skip
    missing.append(
        f"{text}; the nearest is {words.metric_name(best.metric)} with {best.dimension} "
        f"(ρ {words.rho(best.rho)}, corrected p {words.p_value(best.p_corrected)}, {strength})."
    )


def _strength(found: Sequence[TradeOff], metric: str) -> float:
    return max(min(one.rho_rises, -one.rho_falls) for one in found if one.metric == metric)


def _told(found: Sequence[TradeOff]) -> str:
    up = {one.rises: one.rho_rises for one in found}
    down = {one.falls: one.rho_falls for one in found}

    def each(parts: dict[str, float]) -> str:
        return words.listed([f"{name} (ρ {words.rho(value)})" for name, value in parts.items()])

    return (
        f"the higher a text's {words.metric_name(found[0].metric)}, the more of {each(up)} and "
        f"the less of {each(down)} survives"
    )


def _growth(analysis: Analysis, found: list[str], missing: list[str]) -> None:
    for method in dict.fromkeys(one.method for one in analysis.growths):
        certain: list[str] = []
        open_: list[str] = []
        own = [one for one in analysis.growths if (one.method, one.quantity) == (method, TOTAL)]
        for one in own:
            told = f"{one.calibration} {words.points(one.value)} {words.span(one.low, one.high)}"
            clear = one.low is not None and one.high is not None and not one.low <= 0 <= one.high
            (certain if clear else open_).append(told.strip())
        if not own:
            continue
        first, last = (
            f"{100 * share:g} %" for share in (own[0].sparsities[0], own[0].sparsities[-1])
        )
        name = words.METHODS.get(method, method)
        lead = f"the lead over the {_default(own[0].default)} from {first} to {last} sparsity"
        if certain:
            found.append(f"{name}: {lead} changes by {words.listed(certain)} points.")
        if open_:
            why = "no clear change" if any(one.low is not None for one in own) else (
                "whether other draws would change it likewise cannot be told"
            )  # fmt: skip
            missing.append(f"{name}: {lead}: {words.listed(open_)} points; {why}.")


def _default(name: str) -> str:
    return name if name == SINGLES else f"default {name}"


def _certainty(analysis: Analysis) -> list[str]:
    lines = []
    waiting = analysis.planned - analysis.finished - analysis.failed
    if waiting > 0 or analysis.failed:
        lines.append(
            f"{analysis.finished} of {words.counted(analysis.planned, 'planned trial')} have "
            f"finished, {analysis.failed} failed, {max(0, waiting)} are still to come. All figures "
            "are of the finished ones and may change."
        )
    gaps = sum(len(each.missing) for each in analysis.conditions)
    if gaps:
        why = "by plan" if analysis.finished == analysis.planned else "by plan, failed or to come"
        lines.append(
            f"Not every set has every seed ({words.counted(gaps, 'empty cell')}, {why}). Means are "
            "over the seeds that are there; paired differences over seeds that both sides have."
        )
    seeds = sorted({len(each.cells.seeds) for each in analysis.conditions})
    if seeds[-1] == 1:
        lines.append(
            "Every set was drawn once. Intervals are about the test items alone; how much a new "
            "draw would change cannot be told."
        )
    else:
        lines.append(
            f"Intervals join two doubts: other test items (the same for all seeds) and other "
            f"calibration draws (up to {seeds[-1]} seeds a set; their spread is pooled over the "
            f"sets, which takes all sets' draws to spread alike).{_parts(analysis)}"
        )
        once = [each.condition.label for each in analysis.conditions if len(each.cells.seeds) == 1]
        if once:
            lines.append(
                f"{words.listed(once)}: every set was drawn once. Intervals there are about the "
                "test items alone; how much a new draw would change cannot be told."
            )
    if 1 < seeds[-1] < 6:
        least = 2 / 2 ** seeds[-1]
        lines.append(
            f"With {seeds[-1]} seeds a sign-flip test cannot go below p = {least:g}; the intervals "
            "over draws stand on Student's t, that is, on normal spread."
        )
    told = [each for each in analysis.conditions if each.correlations]
    if told:
        points = sorted({each.points for each in told})
        kind = "single sources only (a mix is made of them and would count its parts twice)"
        if analysis.settings.over == "all":
            kind = (
                "all calibration sets, mixes among them, which are not independent of their parts"
            )
        lines.append(
            f"Correlations are over {words.listed([str(n) for n in points])} points, seeds "
            f"averaged first: {kind}. p is two-sided, by permutation, corrected over "
            f"{analysis.family} tests (Benjamini-Hochberg at {ALPHA:g})."
        )
        weak = [each.least_p for each in told if each.least_p and each.least_p > ALPHA]
        if weak:
            lines.append(
                f"So few points cannot give p below {max(weak):.2g}: no correlation could have "
                "been found, however strong."
            )
    models = sorted({each.condition.model for each in analysis.conditions})
    lines.append(
        f"This is about {words.listed(models)} and this suite; it says nothing of other models. "
        "A correlation over sources is no cause."
    )
    return lines


def _parts(analysis: Analysis) -> str:
    """Say how large each doubt is in the first condition's best total."""
    main = main_condition(analysis)
    best = main.ranking[0].total
    if best.item_low is None or best.item_high is None or best.draw_low is None:
        return ""
    if best.draw_high is None:
        return ""
    return (
        f" For the total of {main.ranking[0].calibration} ({main.condition.label}) they are "
        f"±{50 * (best.item_high - best.item_low):.1f} and "
        f"±{50 * (best.draw_high - best.draw_low):.1f} points."
    )
