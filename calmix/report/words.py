"""How numbers, names and results are written in charts, tables, text and on the command line."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from calmix.evaluation.behaviour import Behaviour
from calmix.evaluation.comparison import Comparison
from calmix.evaluation.measures import ALPHA, FEW, PRIMARY
from calmix.evaluation.retention import flips

STRATEGIES = {  # of making a calibration set; `--s-` before a key is a colour of the pages
    "single": "single source",
    "mix": "mix",
    "self-cal": "Self-Cal",
    "sgs": "SGS",
    "igsp": "IGSP",
    "self-written": "self-written",
    "none": "no calibration",
}
PLURALS = {
    "chat template": ", all in the chat template; worked examples precede those with short answers",
    "worked examples": ", all with worked examples",
}
DISTANCE = (
    "KL(dense || pruned) in nats per token, on held-out text; top-1: tokens with the same most "
    "likely successor; flips: items right under one model only"
)
FOOTER = (
    "Written by calmix from the files beside it. Right answers: those of this model over those of "
    "the dense model, by ability, then the mean; lost and gained: right under one model only, in "
    "the abilities of the mean; p: McNemar's exact test. Kept: of the dense model's right answers, "
    "the share that is still right. Brackets: 95 % intervals over items."
)
LIKELIHOOD = "Likelihood kept: 100 % = dense model, 0 = no task knowledge."
TOO_FEW = "too few to tell"  # an ability in which the dense model gets few answers right
MINUS = "\N{MINUS SIGN}"
WIDTH = 80  # columns of a terminal


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Return a number with a true minus and no sign on zero; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:z.{digits}f}"
    plus = "+" if sign and float(text) > 0 else ""
    return plus + text.replace("-", MINUS)


def megabytes(count: float) -> str:
    """Return bytes in megabytes: whole from 10 on, three digits below."""
    return f"{count / 1e6:.0f}" if count >= 1e7 else f"{count / 1e6:.3g}"


def percent(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """Return a share as a percentage, without the sign for it."""
    return number(None if value is None else 100 * value, digits, sign=sign)


def span(low: float | None, high: float | None) -> str:
    """Return an interval of shares in percent, in brackets; empty if unknown."""
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def with_span(one: Any, *, sign: bool = False) -> str:
    """Return an estimate in percent with its interval; a dash for None."""
    if one is None:
        return "–"
    return f"{percent(one.value, sign=sign)} {span(one.low, one.high)}".strip()


def p_value(value: float | None) -> str:
    """Return a p-value; below 0.001 as `<0.001`."""
    return "<0.001" if value is not None and value < 0.001 else number(value)


def sure(value: float | None) -> str:
    """Return a probability in whole percent, never 0 or 100."""
    return "–" if value is None else f"{min(99, max(1, round(100 * value)))} %"


def short(name: str, width: int = 26) -> str:
    """Return a name cut to a width, with an ellipsis."""
    return name if len(name) <= width else name[: width - 1] + "…"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural if needed."""
    return f"{number} {noun}{'s' * (number != 1)}"


def listed(names: Iterable[str]) -> str:
    """Return names joined by commas and `and`."""
    *first, last = names = list(names) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def right_answers(behaviour: Behaviour) -> str:
    """Return the primary measure with losses, gains and their test; empty without answers."""
    counts, text = behaviour.counts, TOO_FEW
    if behaviour.right is None or counts is None:
        return ""
    if judged := [one.name for one in behaviour.judged]:
        text = f"{loss(behaviour)}; {with_span(behaviour.right.total)} % of the dense model's"
        few = [one.name for one in behaviour.abilities if one.name not in judged]
        mean = f"mean of {len(judged)} abilities" if len(judged) > 1 else f"in {judged[0]}"
        text += f" ({mean}{f'; {TOO_FEW}: {listed(few)}' if few else ''})"
    return (
        f"{text}, {counts.lost} of {counts.dense} lost, {counts.gained} gained, "
        f"p = {p_value(counts.p)}".replace("= <", "< ")
    )


def loss(behaviour: Behaviour) -> str:
    """Say whether a loss of right answers is shown: by McNemar's test or by the interval of the
    mean."""
    assert behaviour.right is not None
    assert behaviour.counts is not None
    counts, total = behaviour.counts, behaviour.right.total
    if (counts.lost > counts.gained and counts.p < ALPHA) or (total.high or 1.0) < 1.0:
        return "a loss is shown"
    most = 1.0 - (total.low or 0.0)
    return "no loss is shown" + (f", up to {percent(most)} % is not ruled out" if most > 0 else "")


def against_itself(behaviour: Behaviour) -> str:
    """Return a sentence on the dense model's answers generated twice, the ceiling of every
    comparison with it; empty if not measured."""
    again = behaviour.repeat
    if again is None or (counts := again.counts) is None or not counts.dense:
        return ""
    right = again.right and again.right.total
    total = f"{with_span(right)} %, " if right and right.value is not None else ""
    share = again.answers.same if again.answers else None
    same = "" if share is None else f", {percent(share)} % of its answers identical"
    return (
        f"The dense model against itself, in other batches: {total}{counts.lost} of "
        f"{counts.dense} lost, {counts.gained} gained; {percent(counts.share.value)} % kept{same}."
    )


def kept_answers(behaviour: Behaviour) -> str:
    """Return how many of the dense model's right answers stay right, the worst ability, and how
    many were asked; empty without answers."""
    counts, answers = behaviour.counts, behaviour.answers
    if counts is None or answers is None:
        return ""
    summary = (
        f"{counts.kept} of {counted(counts.dense, 'right answer')}, {with_span(counts.share)} %"
    )
    if (worst := behaviour.worst) is not None:
        summary += f", least in {worst.name}, {worst.kept} of {worst.dense}"
    how = PLURALS.get(behaviour.form, "")
    return f"{summary}. Asked: {answers.asked:,} questions{how}"


def ability_rows(behaviour: Behaviour) -> list[dict[str, Any]]:
    """Return the rows of the table of generated answers; a # marks a column of numbers."""
    rows = list[dict[str, Any]]()
    if (right := behaviour.right) is None:
        return rows
    for one in behaviour.abilities:
        row: dict[str, Any] = {"ability": one.name, "#asked": one.asked, "#dense right": one.dense}
        few = one.dense < FEW
        row |= {"#small right": one.pruned, "#lost": one.lost, "#gained": one.gained}
        row["#p"] = "–" if few else p_value(one.p)
        rows.append(row | {"#right %": TOO_FEW if few else with_span(right.of(one.name))})
    return rows


def comparison(one: Comparison, by: str, alone: bool = False) -> dict[str, Any]:
    """Return the figures of a model in a table of several: by ability and in total, and for answers
    what was lost and gained; `alone` without accuracy, which other lines show."""
    does, counts, parts = one.behaviour, one.behaviour.counts, one.retention.dimensions
    total, more = one.retention.total, dict[str, Any]()
    cells = {part.name: with_span(part.kept) for part in parts}
    if by == PRIMARY and counts is not None:
        cells |= {part.name: TOO_FEW for part in parts if part.kept.value is None}
        more = {"lost": counts.lost, "gained": counts.gained, "p": p_value(counts.p)}
        more["kept %"] = with_span(counts.share)
        more["likelihood %"] = one.likelihood and with_span(one.likelihood.total)
    else:
        more["worst"] = one.retention.worst
    if does.choices and not alone:
        more["accuracy %"] = with_span(does.choices.accuracy[1])
    return {**cells, "total": with_span(total), **more}


def distances(one: Comparison) -> dict[str, Any]:
    """Return the distance of a model to the dense one, and its flips."""
    dense, small = one.pairs[0]
    far = small.distance and small.distance.get("total")
    changed = flips(dense.tasks, small.tasks).get("total")
    return {
        "KL to dense": far and number(far["kl_mean"]),
        "top-1 %": far and percent(far["top1"]),
        "flips %": changed and with_span(changed),
    }


def summary_lines(behaviour: Behaviour, likelihood: Any, measure: str) -> list[str]:
    """Return sentences on generated answers, choices and likelihood kept; `measure` is the command
    that measures missing answers."""
    lines = []
    if (all_ := behaviour.answers) is None:
        lines.append(f"Generated answers were not measured; to measure them: {measure}")
    elif not all_.dense:
        lines.append(
            f"The dense model gets none of {all_.asked:,} generated answers right: "
            "nothing can be kept."
        )
    else:
        lines.append(f"Right answers: {right_answers(behaviour)}.")
        lines += [text] if (text := against_itself(behaviour)) else []
        lines.append(f"Kept: {kept_answers(behaviour)}.")
    if behaviour.not_run:
        lines.append(
            f"Programs: not run ({listed(behaviour.not_run)}; --allow-code-execution runs them)."
        )
    if (choices := behaviour.choices) is not None:
        before, after = choices.accuracy
        text = (
            f"Accuracy: {with_span(after)} % of {choices.asked:,} choices are right "
            f"(dense model: {percent(before.value)} %, chance: {percent(choices.chance)} %)"
        )
        left = f"; left out, because the dense model is at chance: {listed(behaviour.at_chance)}"
        lines.append(f"{text}{left if behaviour.at_chance else ''}.")
    elif behaviour.at_chance:
        lines.append(f"Accuracy: the dense model is at chance ({listed(behaviour.at_chance)}).")
    if likelihood is not None and likelihood.total.value is None:
        lines.append("Likelihood: the dense model is not above its baseline: nothing can be kept.")
    elif likelihood is not None:
        text = f"Likelihood kept: {with_span(likelihood.total)} %"
        if (low := likelihood.worst) is not None and len(likelihood.dimensions) > 1:
            text += f", least in {low}: {with_span(likelihood.of(low))} %"
        lines.append(f"{text}.")
    return lines


def measuring(model: object, dense: object, *more: object) -> str:
    """Return the command that measures generated answers, with more options."""
    line = ["calmix", "evaluate", model, "--against", dense, "--suite", "abilities", *more]
    return shlex.join(map(str, line))


def wrapped(text: str, first: str = "", rest: str = "") -> str:
    """Return text wrapped to the terminal's width; `first` and `rest` are the indents."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return an indented table of the terminal's width; the first column is cut to fit."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    wide[0] = min(wide[0], max(8, WIDTH - sum(2 + width for width in wide[1:]) - 2))
    return "\n".join(
        "  "
        + "  ".join(
            short(text, width).ljust(width) for text, width in zip(row, wide, strict=True)
        ).rstrip()
        for row in rows
    )
