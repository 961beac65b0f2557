"""A comparison in words and tables, and the page of answers to a user's prompts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from calmix.evaluation.answers import Answers, compare_answers, rows
from calmix.evaluation.behaviour import Behaviour, Pair
from calmix.evaluation.comparison import Comparison
from calmix.evaluation.measures import ALPHA, FEW, PRIMARY
from calmix.evaluation.prompts import FAULTS
from calmix.evaluation.retention import flips
from calmix.pages import render
from calmix.words import TOO_FEW, counted, listed, number, p_value, percent, with_span

PLURALS = {
    "chat template": ", all in the chat template; worked examples precede those with short answers",
    "worked examples": ", all with worked examples",
}
UNFOLDED = 20  # prompts that the page shows at first


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


def comparison_row(one: Comparison, by: str, alone: bool = False) -> dict[str, Any]:
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


def distance_row(one: Comparison) -> dict[str, Any]:
    """Return the distance of a model to the dense one, and its flips."""
    dense, small = one.pairs[0]
    total = small.distance and small.distance.get("total")
    changed = flips(dense.tasks, small.tasks).get("total")
    return {
        "KL to dense": total and number(total["kl_mean"]),
        "top-1 %": total and percent(total["top1"]),
        "flips %": changed and with_span(changed),
    }


def measuring(model: object, dense: object, *more: object) -> str:
    """Return the command that measures generated answers, with more options."""
    line = ["calmix", "evaluate", model, "--against", dense, "--suite", "abilities", *more]
    return shlex.join(map(str, line))


def answer_lines(answers: Answers, distance: Mapping[str, Any] | None = None) -> list[str]:
    """Return what changed in the answers, in words."""
    count = round((answers.identical.value or 0.0) * answers.asked)
    text = f"Identical answers: {count} of {answers.asked:,}, {with_span(answers.identical)} %"
    if answers.repeat is not None:
        text += f" (the dense model's own repeat: {percent(answers.repeat)} %)"
    if answers.parted is not None:
        text += f". Different ones part after {answers.parted:g} words (median)"
    lines = [f"{text}."]
    if distance is not None:
        total = distance["total"]
        low, high = total["kl_low"], total["kl_high"]
        span = "" if low is None else f" [{number(low)}, {number(high)}]"
        lines.append(
            f"KL on the dense model's answers: {number(total['kl_mean'])} nats per token{span}"
            f", same next token: {percent(total['top1'])} %."
        )
    for name, one in (("Right answers", answers.right), ("Answers without a fault", answers.sound)):
        if one is not None:
            lines.append(
                f"{name}: {one.pruned} of {one.asked:,} (dense model: {one.dense}), {one.lost} "
                f"lost, {one.gained} gained, p = {p_value(one.p)}.".replace("= <", "< ")
            )
    return lines


def fault_rows(answers: Answers) -> list[dict[str, Any]]:
    """Return the rows of the table of faults; a # marks a column of numbers."""
    return [
        {
            "fault": FAULTS[one.name],
            "#of": one.asked,
            "#dense %": percent(1 - one.dense / one.asked),
            **({"#repeat %": percent(answers.again.get(one.name))} if answers.again else {}),
            "#small %": percent(1 - one.pruned / one.asked),
            "#new": one.lost,
            "#gone": one.gained,
            "#p": p_value(one.p),
        }
        for one in answers.faults
    ]


def answers_page(
    pairs: Mapping[str, Pair], table: list[dict[str, Any]] | None = None, choice: str = ""
) -> str:
    """Return the page that shows the answers of one or several smaller models beside those of their
    dense model, worst first; `table` and `choice` compare several."""
    compared = {name: compare_answers(pair) for name, pair in pairs.items()}
    known = {name: one for name, one in compared.items() if one is not None}
    dense = next(iter(pairs.values()))[0]
    said = {name: answer_lines(one, pairs[name][1].distance) for name, one in known.items()}
    return render(
        "prompts.html",
        dense=dense.model,
        said=said,
        faults={name: fault_rows(one) for name, one in known.items()},
        rows=rows([*pairs.values()]) if known else [],
        open=UNFOLDED,
        names=["dense", *pairs],
        suite=dense.suite["name"],
        models=[{k: "–" if v is None else v for k, v in row.items()} for row in table or []],
        choice=choice,
    )
