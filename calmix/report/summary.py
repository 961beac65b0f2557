"""What a study shows in plain words: what was found, what was not, and how sure that is.

Every sentence is written from the analysis; nothing is said that its tables do not hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.cells import TOTAL
from calmix.analysis.correlations import TradeOff
from calmix.analysis.differences import BEST, SINGLES, Growth
from calmix.analysis.gains import MEAN, Gain, Shift
from calmix.analysis.ranking import leaders
from calmix.analysis.statistics import ALPHA, LEAST
from calmix.report import words
from calmix.report.claims import Claim, claims, claims_text

ROWS = 8  # of the ranking in the text
MANY = 4  # conditions, of more than which a terminal is told the best set and the tallies alone


@dataclass(frozen=True)
class Findings:
    """What was found and what was not, about one condition or across them; `brief` in a line,
    `table` the ranking's first rows as plain text."""

    about: str
    found: tuple[str, ...]
    not_found: tuple[str, ...]
    brief: str = ""
    table: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """Sentences: one for the top, those about each condition, across sparsities and methods, and
    on certainty; the claims; and each condition's best set as rows of a table."""

    headline: str
    best: tuple[str, ...]
    conditions: tuple[Findings, ...]
    across: Findings
    methods: Findings
    claims: tuple[Claim, ...]
    certainty: tuple[str, ...]

    def short(self) -> str:
        """Return what fits a terminal: all of a few conditions, of many what they say together."""
        if len(self.conditions) <= MANY:
            return self.text()
        tallies = [f"{one.text}: {one.tally or one.told[0].verdict}" for one in self.claims]
        parts = [words.wrapped(self.headline),
                 "\n".join(["Most kept, condition by condition", *self.best])]  # fmt: skip
        for head, lines in (("The claims", tallies), (self.across.about, self.across.found),
                            ("How sure this is", self.certainty)):  # fmt: skip
            if lines:
                parts.append(_block(head, lines))
        return "\n\n".join([*parts, words.wrapped(
            "In full: summary.txt of calmix study report, or a few conditions by --method and "
            "--sparsity."
        )])  # fmt: skip

    def text(self) -> str:
        """Return all of the summary as plain text of 80 columns."""
        parts = [words.wrapped(self.headline)]
        for each in (*self.conditions, self.across, self.methods):
            if each.table:
                head = f"{each.about}: retention in % (acc.: of accuracy)"
                parts.append("\n".join([head, *each.table]))
            for head, lines in (("found", each.found), ("not found", each.not_found)):
                if lines:
                    parts.append(_block(f"{each.about}: {head}", lines))
        if self.claims:
            parts.append(claims_text(self.claims))
        return "\n\n".join([*parts, _block("How sure this is", self.certainty)])


def _block(head: str, lines: Sequence[str]) -> str:
    return "\n".join([head, *(words.wrapped(line, "  - ", "    ") for line in lines)])


def main_condition(analysis: Analysis) -> ConditionAnalysis:
    """Return the condition to look at first: most sets, then of the first method the one with most
    draws, then the sparsest."""
    first = analysis.conditions[0].condition.method
    return max(
        analysis.conditions,
        key=lambda found: (
            len(found.ranking),
            found.condition.method == first,
            sum(one.total.draws for one in found.ranking),
            found.condition.sparsity,
        ),
    )


def summarise(analysis: Analysis) -> Summary:
    """Return the summary of an analysis."""
    conditions = []
    for each in analysis.conditions:
        found: list[str] = []
        missing: list[str] = []
        brief = _best(each, found, missing)
        _contest(each, found, missing)
        _trade_offs(analysis, each, found, missing)
        _averaging(each, found, missing)
        _distance(each, found, missing)
        _noise(each, missing)
        if each.correlations:
            brief += f" {'An' if each.trade_offs else 'No'} opposite-sign trade-off was found."
        conditions.append(
            Findings(each.condition.label, tuple(found), tuple(missing), brief, _table(each))
        )
    return Summary(
        _headline(analysis), _most(analysis), tuple(conditions), _across(analysis),
        _methods(analysis), tuple(claims(analysis)), tuple(_certainty(analysis)),
    )  # fmt: skip


def _table(each: ConditionAnalysis) -> tuple[str, ...]:
    rows: list[tuple[str, ...]] = [("", "total", "acc.", "shrunken", "best", "worst dimension")]
    for one in each.ranking[:ROWS]:
        rows.append((
            one.calibration, words.with_span(one.total),
            words.percent(one.accuracy[TOTAL]), words.percent(one.shrunken.value),
            "–" if one.best is None else words.sure(one.best),
            f"{words.percent(one.lowest.value)} {words.short(one.worst or '', 16)}".strip(),
        ))  # fmt: skip
    lines = _columns(rows)
    if len(each.ranking) > ROWS:
        lines.append(f"  and {len(each.ranking) - ROWS} more")
    return tuple(lines)


def _most(analysis: Analysis) -> tuple[str, ...]:
    rows: list[tuple[str, ...]] = [("", "set", "total", "tied with", "worst dimension")]
    for each in analysis.conditions:
        best, *ties = leaders(each.ranking) or each.ranking[:1]
        tied = [words.short(one.calibration, 12) for one in ties]
        rows.append((
            each.condition.label, words.short(best.calibration, 18), words.with_span(best.total),
            tied[0] if len(tied) == 1 else f"{len(tied)} sets" if tied else "",
            f"{words.percent(best.lowest.value)} {words.short(best.worst or '', 12)}".strip(),
        ))  # fmt: skip
    return tuple(_columns(rows))


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table, the first column as wide as the others leave room for."""
    wide = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    wide[0] = min(wide[0], max(8, words.WIDTH - sum(2 + width for width in wide[1:]) - 2))
    rows = [(words.short(name, wide[0]), *rest) for name, *rest in rows]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, wide, strict=True)).rstrip()
        for row in rows
    ]


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
    best_sets = leaders(main.ranking)
    text = f"{where} (the dense model is 100 %), {words.which_is_best(main.ranking)}."
    worst = [f"{one.calibration} {words.percent(one.lowest.value)} % in {one.worst}"
             for one in best_sets[:3] if one.worst is not None]  # fmt: skip
    if worst:
        text += f" In the worst dimension: {words.listed(worst)}."
    last = next(one for one in reversed(main.ranking) if one.total.value is not None)
    if last not in best_sets:
        text += f" The lowest total is that of {last.calibration}: "
        text += f"{words.percent(last.total.value)} %."
    return text


def _best(each: ConditionAnalysis, found: list[str], missing: list[str]) -> str:
    """Say who leads by total, or is tied for it, and by worst dimension."""
    ranked = [one for one in each.ranking if one.total.value is not None]
    if len(ranked) < 2:
        return ""
    first = ranked[0]
    told = f"{words.which_is_best(ranked)}."
    (found if len(leaders(ranked)) == 1 else missing).append(told)
    chance = (
        "" if first.best is None else f"; best of all with {words.sure(first.best)} probability"
    )
    if chance and not each.joint.freedom:
        chance += " on other items, other draws left aside"
    found.append(
        f"Expected total of {first.calibration}, shrunk because it was picked: "
        f"{words.percent(first.shrunken.value)} %{chance}."
    )
    low = next((one for one in ranked if one.rank_worst == 1), None)
    if low is not None:
        found.append(
            f"Highest measured worst dimension: {low.calibration} with "
            f"{words.with_span(low.lowest)} % in {low.worst}."
        )
    return told


def _contest(each: ConditionAnalysis, found: list[str], missing: list[str]) -> None:
    """Each way to calibrate against the mean of the single sources, and against the best."""
    for right in dict.fromkeys(one.right for one in each.differences):
        if right != SINGLES and not right.startswith(BEST):
            continue
        told: dict[str, list[str]] = {"more": [], "less": [], "these": [], "none": []}
        for one in each.differences:
            if one.quantity != TOTAL or one.right != right:
                continue
            ahead = (one.gap.value or 0) > 0
            drawn = one.draw_p_corrected is not None and one.draw_p_corrected <= ALPHA
            key = ("more" if ahead else "less") if one.significant else "these" if drawn else "none"
            told[key].append(f"{one.left} ({words.with_points(one.gap)})")
        for key in ("more", "less"):
            if names := told[key]:
                verb = "keeps" if len(names) == 1 else "keep"
                aside = "" if each.joint.freedom else ", other draws left aside"
                found.append(
                    f"{words.listed(names)} {verb} {key} in total than the {right}{aside}."
                )
        if names := told["these"]:
            missing.append(
                f"Set apart on these items only, not were they drawn anew, from the {right}: "
                f"{words.listed(names)}."
            )
        if names := told["none"]:
            missing.append(
                f"No difference in total that survives correction from the {right}: "
                f"{words.listed(names)}."
            )


def _averaging(each: ConditionAnalysis, found: list[str], missing: list[str]) -> None:
    spread = {one.quantity: one for one in each.spreads if one.over == "single"}
    total = spread.pop(TOTAL, None)
    if total is None or len(spread) < 2:
        return
    widest = max(spread.values(), key=lambda one: one.range)
    text = (
        f"Single sources are {100 * widest.range:.1f} points apart in {widest.quantity} "
        f"({widest.lowest} to {widest.highest}) but {100 * total.range:.1f} in total"
    )
    if total.p_cancel is not None and total.p_cancel <= ALPHA:
        found.append(
            f"{text}: gains in one dimension go with losses in another "
            f"(p {words.p_value(total.p_cancel)} against unrelated dimensions)."
        )
    elif widest.range > total.range:
        missing.append(f"{text}; unrelated dimensions would average out much the same.")


def _distance(each: ConditionAnalysis, found: list[str], missing: list[str]) -> None:
    """Whether KL to the dense model orders the sets as their total retention does."""
    one = next((one for one in each.agreements if one.quantity == TOTAL), None)
    if one is None or one.rho is None:
        return
    told = f"over {one.n} sets (ρ {words.rho(one.rho)}, p {words.p_value(one.p)}"
    if one.agrees:
        found.append(
            "The lower the KL to the dense model, which needs no labels, the higher the total "
            f"retention, {told}; −1 would be the very same order)."
        )
    else:
        missing.append(
            "The KL to the dense model, which needs no labels, does not give the order by total "
            f"retention beyond chance {told})."
        )


def _noise(each: ConditionAnalysis, missing: list[str]) -> None:
    """Quantities whose signal one trial's noise exceeds."""
    told = [one for one in each.noise if one.kind != "task" and one.ratio is not None]
    faint = [one for one in told if (one.ratio or 0) < 1]
    if faint:
        names = [f"{one.quantity} ({one.ratio:.1f})" for one in faint]
        missing.append(
            "One trial a source does not tell the sources apart, signal over noise being below 1, "
            f"in {words.listed(names)}."
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
    for among in dict.fromkeys(one.among for one in each.correlations):
        where = "" if among == "sources" else f" {words.AMONG[among]}"
        own = [one for one in each.trade_offs if one.among == among]
        told = [one for one in each.correlations if one.among == among and not one.task]
        strong = [one for one in told if one.significant and one.quantity != TOTAL]
        if own:
            names = list(dict.fromkeys(one.metric for one in own))
            names.sort(key=lambda name: -_strength(own, name))
            texts = [_told([one for one in own if one.metric == name]) for name in names[:2]]
            more = f" {words.counted(len(names) - 2, 'more metric')} likewise." if names[2:] else ""
            found.append(f"Opposite-sign trade-off{where}: {'; '.join(texts)}.{more}")
            continue
        missing.append(
            f"No opposite-sign trade-off{where}: no metric rises with one dimension and falls "
            f"with another, both surviving correction over {analysis.families[among]} tests."
        )
        known = [one for one in strong or told if one.rho is not None]
        if known:
            best = max(known, key=lambda one: abs(one.rho or 0))
            text = (
                f"{words.metric_name(best.metric)} with {best.quantity} (ρ {words.rho(best.rho)}, "
                f"corrected p {words.p_value(best.p_corrected)})"
            )
            if strong:
                found.append(
                    f"{words.counted(len(strong), 'correlation')} of a metric with a dimension"
                    f"{where} survive correction; the strongest is {text}."
                )
            else:
                missing.append(f"No correlation{where} survives correction; the nearest is {text}.")


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


def _across(analysis: Analysis) -> Findings:
    found: list[str] = []
    missing: list[str] = []
    for series in dict.fromkeys(one.series for one in analysis.growths):
        own = [one for one in analysis.growths if (one.series, one.quantity) == (series, TOTAL)]
        if own:
            first, last = (f"{100 * own[0].sparsities[at]:g} %" for at in (0, -1))
            _leads(series, own, f"from {first} to {last} sparsity ", found, missing)
    return Findings("Against sparsity", tuple(found), tuple(missing))


def _methods(analysis: Analysis) -> Findings:
    """Each method against the one that keeps next less, and what becomes of leads between them."""
    totals = [one for one in analysis.gains if one.quantity == TOTAL]
    nearest: dict[str, Gain] = {}
    for one in sorted((one for one in totals if one.calibration == MEAN), key=_value):
        nearest.setdefault(one.more, one)
    found: list[str] = []
    missing: list[str] = []
    for each in analysis.conditions:
        if (mean := nearest.get(each.condition.label)) is None:
            continue
        pair = f"{mean.more} against {mean.less}"
        sets = [
            one for one in totals
            if (one.more, one.less) == (mean.more, mean.less) and one is not mean
        ]  # fmt: skip
        text = f"{pair}: {words.with_points(mean.gap)} points in total, "
        if mean.sets == 1:
            text += f"of {sets[0].calibration}."
        else:
            ends = [pick(sets, key=_value) for pick in (min, max)]
            told = [f"{words.points(one.gap.value)} ({one.calibration})" for one in ends]
            text += f"mean of {mean.sets} sets, {' to '.join(told)}."
        (found if mean.gap.clear else missing).append(text)
        moved = [
            one for one in analysis.shifts
            if (one.more, one.less, one.quantity) == (mean.more, mean.less, TOTAL)
        ]  # fmt: skip
        _leads(pair, moved, "", found, missing)
    return Findings("Method by method", tuple(found), tuple(missing))


def _value(one: Gain) -> float:
    return one.gap.value or 0.0


def _leads(
    about: str, moved: Sequence[Growth | Shift], where: str, found: list[str], missing: list[str]
) -> None:
    """Say how leads over the default change, those that clearly do apart."""
    told: dict[bool, list[str]] = {True: [], False: []}
    for one in moved:
        told[one.gap.clear].append(f"{one.calibration} {words.with_points(one.gap)}")
    if moved:
        lead = f"{about}: the lead over the {_default(moved[0].default)} {where}".rstrip()
        if told[True]:
            found.append(f"{lead} changes by {words.listed(told[True])} points.")
        if told[False]:
            missing.append(f"{lead}: {words.listed(told[False])} points; no clear change.")


def _default(name: str) -> str:
    return name if name == SINGLES else f"default {name}"


def _certainty(analysis: Analysis) -> list[str]:
    lines = []
    waiting = analysis.planned - analysis.finished - analysis.failed
    if waiting > 0 or analysis.failed:
        lines.append(
            f"{analysis.finished} of {words.counted(analysis.planned, 'planned trial')} finished, "
            f"{analysis.failed} failed, {max(0, waiting)} still to come. All figures are of "
            "the finished ones and may change."
        )
    gaps = sum(len(each.missing) for each in analysis.conditions)
    if gaps:
        why = "by plan" if analysis.finished == analysis.planned else "by plan, failed or to come"
        lines.append(
            f"Not every set has every seed ({words.counted(gaps, 'empty cell')}, {why}); means are "
            "over the draws that are there."
        )
    once = [each.condition for each in analysis.conditions if not each.joint.freedom]
    if len(once) < len(analysis.conditions):
        lines.append(
            "Intervals are for other test items and other calibration draws at once; the spread "
            f"over draws is pooled over all sets of a condition.{_parts(analysis)}"
        )
    if once:
        more = {each.condition.way for each in analysis.conditions if each.joint.freedom}
        names = [each.label if each.way in more else each.way for each in once]
        listed = words.listed(list(dict.fromkeys(names)))  # a way of all models alike once
        where = f"{listed}: e" if len(once) < len(analysis.conditions) else "E"
        lines.append(
            f"{where}very set was drawn once. Intervals there are about the "
            "test items alone; how much a new draw would change cannot be told."
        )
    shared = dict.fromkeys(
        one.calibration for each in analysis.conditions for one in each.ranking if one.without_own
    )
    if shared:
        lines.append(
            f"{words.counted(len(shared), 'set was', 'sets were')} made of the other half of a "
            "benchmark that is tested; the ranking gives them without those tasks too."
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
            f"Correlations are over {words.listed([str(n) for n in points])} points, draws "
            f"averaged first: {kind}. p is two-sided, by permutation, corrected over "
            f"{words.listed([f'{n} tests ({name})' for name, n in analysis.families.items()])} "
            f"(Benjamini-Hochberg at {ALPHA:g})."
        )
        weak = [p for each in told for p in each.least_p.values() if p > ALPHA]
        least = min(each.least_p["sources"] for each in told)
        tests = analysis.families["sources"]
        if not weak and (needed := math.ceil(least * tests / ALPHA)) > 1:
            lines.append(
                f"So few points give no p below {least:.2g}: a correlation survives only if at "
                f"least {needed} of the {tests} tests (sources) have it at once."
            )
        if weak:
            lines.append(
                f"So few points cannot give p below {max(weak):.2g}: no correlation could have "
                "been found, however strong."
            )
    models = sorted({each.condition.model for each in analysis.conditions})
    lines.append(
        f"This is about {words.listed(models)} and this suite; it says nothing of other models."
        + (" A correlation over sources is no cause." if told else "")
    )
    return lines


def _parts(analysis: Analysis) -> str:
    """Say how large each doubt is in the first condition's best total."""
    main = main_condition(analysis)
    best = main.ranking[0].total
    if best.item_low is None or best.item_high is None:
        return ""
    if best.draw_low is None or best.draw_high is None:
        return ""
    return (
        f" For the total of {main.ranking[0].calibration} ({main.condition.label}) items alone "
        f"make ±{50 * (best.item_high - best.item_low):.1f}, draws alone "
        f"±{50 * (best.draw_high - best.draw_low):.1f} points."
    )
