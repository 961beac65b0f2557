"""What is said of calibration text, and whether a study bears it out: one row a claim.

All but the last two are claims of the paper (arXiv 2606.03328) or what it implies; verdicts are
ours. They are read off the analysis, where p is corrected; nothing is tested anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.bootstrap import Estimate
from calmix.analysis.cells import APART, TOTAL
from calmix.analysis.correlations import Among
from calmix.analysis.differences import BEST, SINGLES
from calmix.analysis.statistics import ALPHA
from calmix.report import words

HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
OPEN, NOT_FOUND = "cannot be told", "not found"
COMPARED = (  # sets made one way, against sets made another way or a contender among the sources
    ("A mix keeps more than the best single source", "mix", BEST, TOTAL),
    ("The same on the benchmarks that neither holds text of", "mix", BEST, APART),
    ("A mix keeps more than single sources do on the whole", "mix", SINGLES, TOTAL),
    ("IGSP keeps more than the best single source", "igsp", BEST, TOTAL),
    ("IGSP keeps more than Self-Cal", "igsp", "self-cal", TOTAL),
    ("IGSP keeps more than SGS", "igsp", "sgs", TOTAL),
    ("A mix keeps more than IGSP", "mix", "igsp", TOTAL),
    ("The same on the benchmarks that the mix holds no text of", "mix", "igsp", APART),
)


@dataclass(frozen=True)
class Told:
    """What a study says of a claim under one condition.

    Attributes:
        model, way: whose condition it is, and its label without the model; of a series of
            sparsities the sparsest's.
        where: the condition's label; of a series, what they have in common.
        verdict: `does not hold` where the opposite was found, `cannot be told` where neither was
            or too few sources were looked at, `not found` of a relation among enough of them.
        because: the figures: points and correlations with their intervals and draws.
    """

    model: str
    way: str
    where: str
    verdict: str
    because: str


@dataclass(frozen=True)
class Gap:
    """How far one set is ahead of another or of several, and whether that is found."""

    ours: str
    theirs: str
    gap: Estimate
    found: bool


@dataclass(frozen=True)
class Claim:
    """A claim in words, and what each condition says of it that can say anything.

    Conditions that differ in the model alone stand side by side.
    """

    text: str
    told: tuple[Told, ...]

    @property
    def tally(self) -> str:
        """In how many of the conditions it holds; empty of a single one."""
        held = sum(one.verdict == HOLDS for one in self.told)
        return f"holds in {held} of {len(self.told)}" if len(self.told) > 1 else ""


def claims(analysis: Analysis) -> list[Claim]:
    """Return the claims that this study can say anything of."""
    found = analysis.conditions
    compared = [
        (text, [_compared(each, left, right, quantity) for each in found])
        for text, left, right, quantity in COMPARED
    ]
    made = [
        *compared[:3],
        (f"A mix keeps more than {analysis.settings.default}",
         [_over_default(analysis, each) for each in found]),
        *compared[3:],
        ("Dimensions are far apart where the total is close", [_cancelled(each) for each in found]),
        ("A metric of the text raises one dimension and lowers another",
         [_pulled(each, "sources") for each in found]),
        ("The same among texts of one kind", [_pulled(each, "kinds") for each in found]),
        ("The lead of a mix grows with sparsity", _grown(analysis)),
        ("The lead of a mix shrinks with recovery", _evened(analysis)),
    ]  # fmt: skip
    ways = list(dict.fromkeys(each.condition.way for each in found))

    def by_way(told: Iterable[Told | None]) -> tuple[Told, ...]:
        return tuple(sorted((one for one in told if one), key=lambda one: ways.index(one.way)))

    some = [Claim(text, by_way(told)) for text, told in made]
    return [claim for claim in some if claim.told]


def claims_text(made: Sequence[Claim]) -> str:
    """Return claims as plain text for a terminal of 80 columns."""
    lines = []
    for claim in made:
        tally = f" ({claim.tally})" if claim.tally else ""
        lines.append(words.wrapped(f"{claim.text}{tally}", "  - ", "    "))
        lines += [
            words.wrapped(f"{one.where}: {one.verdict} ({one.because})", "      ", "        ")
            for one in claim.told
        ]
    return "\n".join(["The claims", *lines])


def _verdict(signs: Iterable[int]) -> str:
    """Tell what differences say together: 1 or -1 where one was found, else 0."""
    seen = set(signs)
    if seen == {1}:
        return HOLDS
    if 1 in seen:
        return IN_PART
    return FAILS if -1 in seen else OPEN


def _at(each: ConditionAnalysis, verdict: str, because: str) -> Told:
    at = each.condition
    return Told(at.model, at.way, at.label, verdict, because)


def _sign(gap: Estimate, found: bool) -> int:
    return 0 if not found or not gap.value else 1 if gap.value > 0 else -1


def _drawn(each: ConditionAnalysis, names: Iterable[str]) -> str:
    """Say how often sets were drawn."""
    counts = Counter(each.cells.sets[at] for at, _ in each.cells.trials)
    return "draws " + ", ".join(f"{name} {counts[name]}" for name in dict.fromkeys(names))


def _told(each: ConditionAnalysis, gaps: Sequence[Gap]) -> Told | None:
    if not gaps:
        return None
    single = SINGLES in {one.theirs for one in gaps}
    because = [
        f"{one.ours if single else f'{one.ours} over {one.theirs}'} {words.with_points(one.gap)}"
        for one in gaps
    ]
    names = [name for one in gaps for name in (one.ours, one.theirs) if name in each.cells.sets]
    because.append(_drawn(each, names))
    if not each.joint.freedom:
        because.append("other draws left aside")
    verdict = _verdict(_sign(one.gap, one.found) for one in gaps)
    return _at(each, verdict, "; ".join(because))


def _made(each: ConditionAnalysis, how: str) -> set[str]:
    """Return the sets that were made in one way."""
    return {each.cells.sets[at] for at in each.cells.of(how)}


def _compared(each: ConditionAnalysis, left: str, right: str, quantity: str) -> Told | None:
    def names(contender: str, wanted: str) -> bool:
        if wanted in (BEST, SINGLES):
            return contender.startswith(wanted)
        return contender in _made(each, wanted)

    gaps = []
    for one in each.differences:
        if one.quantity != quantity or one.gap.value is None:
            continue
        if names(one.left, left) and names(one.right, right):
            theirs = one.right.removeprefix(BEST)
            gaps.append(Gap(one.left, theirs, one.gap, one.significant))
        elif names(one.right, left) and names(one.left, right):
            gaps.append(Gap(one.right, one.left, -one.gap, one.significant))
    return _told(each, gaps)


def _over_default(analysis: Analysis, each: ConditionAnalysis) -> Told | None:
    if analysis.settings.default is None:
        return None
    mixes = _made(each, "mix")
    return _told(
        each,
        [
            Gap(one.calibration, one.default, one.gap, one.gap.clear)
            for one in analysis.margins
            if one.condition == each.condition.label
            and one.quantity == TOTAL
            and one.calibration in mixes
        ],
    )


def _cancelled(each: ConditionAnalysis) -> Told | None:
    spread = {one.quantity: one for one in each.spreads if one.over == "single"}
    total = spread.pop(TOTAL, None)
    if total is None or len(spread) < 2 or total.p_cancel is None:
        return None
    widest = max(spread.values(), key=lambda one: one.range)
    because = (
        f"single sources {100 * widest.range:.1f} points apart in {widest.quantity}, "
        f"{100 * total.range:.1f} in total; p {words.p_value(total.p_cancel)} against unrelated "
        "dimensions"
    )
    verdict = HOLDS if total.p_cancel <= ALPHA else NOT_FOUND
    return _at(each, verdict, because)


def _pulled(each: ConditionAnalysis, among: Among) -> Told | None:
    tested = [one for one in each.correlations if one.among == among and not one.task]
    if not tested:
        return None
    n = words.counted(max(one.n for one in tested), "source")
    own = [one for one in each.trade_offs if one.among == among]
    if own:
        best = max(own, key=lambda one: min(one.rho_rises, -one.rho_falls))
        because = (
            f"{words.metric_name(best.metric)}: {best.rises} {words.rho(best.rho_rises)}, "
            f"{best.falls} {words.rho(best.rho_falls)}; {n}"
        )
        return _at(each, HOLDS, because)
    verdict = OPEN if each.least_p.get(among, 1.0) > ALPHA else NOT_FOUND
    return _at(each, verdict, f"no two signs survive correction; {n}")


def _grown(analysis: Analysis) -> list[Told | None]:
    told: list[Told | None] = []
    for series in dict.fromkeys(one.series for one in analysis.growths):
        members = [each for each in analysis.conditions if each.condition.series == series]
        mixes = {name for each in members for name in _made(each, "mix")}
        own = [
            one for one in analysis.growths
            if (one.series, one.quantity) == (series, TOTAL) and one.calibration in mixes
        ]  # fmt: skip
        if own:
            ends = [f"{100 * share:g} %" for share in own[0].sparsities]
            because = "; ".join(f"{one.calibration} {words.with_points(one.gap)}" for one in own)
            verdict = _verdict(_sign(one.gap, one.gap.clear) for one in own)
            last = members[-1].condition  # lowest sparsity first
            told.append(
                Told(last.model, last.way, series, verdict, f"{ends[0]} to {ends[-1]}: {because}")
            )
    return told


def _evened(analysis: Analysis) -> list[Told | None]:
    """Whether a mix is less far ahead with a recovery than without."""
    told: list[Told | None] = []
    for each in analysis.conditions:
        own = [
            one for one in analysis.shifts
            if one.recovered and (one.more, one.quantity) == (each.condition.label, TOTAL)
            and one.calibration in _made(each, "mix")
        ]  # fmt: skip
        if own:
            lead = "; ".join(f"{one.calibration} {words.with_points(one.gap)}" for one in own)
            verdict = _verdict(_sign(-one.gap, one.gap.clear) for one in own)
            told.append(_at(each, verdict, f"the lead over the {own[0].default}: {lead}"))
    return told
