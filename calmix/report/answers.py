"""The page of answers to a user's prompts, side by side, and its figures in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calmix.evaluation.answers import Answers, compare_answers, rows
from calmix.evaluation.behaviour import Pair
from calmix.evaluation.prompts import FAULTS
from calmix.report import words
from calmix.report.pages import render


def sentences(found: Answers, distance: Mapping[str, Any] | None = None) -> list[str]:
    """Return what changed in the answers, in words."""
    count = round((found.identical.value or 0.0) * found.asked)
    text = f"Identical answers: {count} of {found.asked:,}, {words.with_span(found.identical)} %"
    if found.repeat is not None:
        text += f" (the dense model's own repeat: {words.percent(found.repeat)} %)"
    if found.parted is not None:
        text += f". Different ones part after {found.parted:g} words (median)"
    lines = [f"{text}."]
    if distance is not None:
        far = distance["total"]
        lines.append(
            f"KL on the dense model's answers: {words.number(far['kl_mean'])} nats per token "
            f"[{words.number(far['kl_low'])}, {words.number(far['kl_high'])}], same next token: "
            f"{words.percent(far['top1'])} %."
        )
    for name, one in (("Right answers", found.right), ("Answers without a fault", found.sound)):
        if one is not None:
            lines.append(
                f"{name}: {one.pruned} of {one.asked:,} (dense model: {one.dense}), {one.lost} "
                f"lost, {one.gained} gained, p = {words.p_value(one.p)}.".replace("= <", "< ")
            )
    return lines


def fault_rows(found: Answers) -> list[dict[str, Any]]:
    """Return the rows of the table of faults; a # marks a column of numbers."""
    return [
        {
            "fault": FAULTS[one.name],
            "#of": one.asked,
            "#dense %": words.percent(1 - one.dense / one.asked),
            "#repeat %": words.percent(found.again.get(one.name)),
            "#small %": words.percent(1 - one.pruned / one.asked),
            "#lost": one.lost,
            "#gained": one.gained,
            "#p": words.p_value(one.p),
        }
        for one in found.faults
    ]


def answers_page(
    pairs: Mapping[str, Pair], table: list[dict[str, Any]] | None = None, choice: str = ""
) -> str:
    """Return the page that shows the answers of one or several smaller models beside those of their
    dense model, worst first; `table` and `choice` compare several."""
    found = {name: compare_answers(pair) for name, pair in pairs.items()}
    known = {name: one for name, one in found.items() if one is not None}
    dense = next(iter(pairs.values()))[0]
    said = {name: sentences(one, pairs[name][1].distance) for name, one in known.items()}
    return render(
        "prompts.html",
        dense=dense.model,
        said=said,
        faults={name: fault_rows(one) for name, one in known.items()},
        rows=rows([*pairs.values()]) if known else [],
        names=["dense", *pairs],
        suite=dense.suite["name"],
        models=table or [],
        choice=choice,
    )
