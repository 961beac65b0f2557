"""The page of answers to a user's prompts, side by side, and its figures in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from calmix.evaluation.answers import Answers, compare_answers, rows
from calmix.evaluation.behaviour import Pair, proportion, repeat_pairs
from calmix.evaluation.choosing import Candidate, Choice
from calmix.evaluation.prompts import FAULTS
from calmix.report import words
from calmix.report.pages import render

UNFOLDED = 20  # prompts that the page shows at first


def sentences(answers: Answers, distance: Mapping[str, Any] | None = None) -> list[str]:
    """Return what changed in the answers, in words."""
    count = round((answers.identical.value or 0.0) * answers.asked)
    text = (
        f"Identical answers: {count} of {answers.asked:,}, {words.with_span(answers.identical)} %"
    )
    if answers.repeat is not None:
        text += f" (the dense model's own repeat: {words.percent(answers.repeat)} %)"
    if answers.parted is not None:
        text += f". Different ones part after {answers.parted:g} words (median)"
    lines = [f"{text}."]
    if distance is not None:
        far = distance["total"]
        low, high = far["kl_low"], far["kl_high"]
        span = "" if low is None else f" [{words.number(low)}, {words.number(high)}]"
        lines.append(
            f"KL on the dense model's answers: {words.number(far['kl_mean'])} nats per token{span}"
            f", same next token: {words.percent(far['top1'])} %."
        )
    for name, one in (("Right answers", answers.right), ("Answers without a fault", answers.sound)):
        if one is not None:
            lines.append(
                f"{name}: {one.pruned} of {one.asked:,} (dense model: {one.dense}), {one.lost} "
                f"lost, {one.gained} gained, p = {words.p_value(one.p)}.".replace("= <", "< ")
            )
    return lines


def fault_rows(answers: Answers) -> list[dict[str, Any]]:
    """Return the rows of the table of faults; a # marks a column of numbers."""
    return [
        {
            "fault": FAULTS[one.name],
            "#of": one.asked,
            "#dense %": words.percent(1 - one.dense / one.asked),
            **({"#repeat %": words.percent(answers.again.get(one.name))} if answers.again else {}),
            "#small %": words.percent(1 - one.pruned / one.asked),
            "#new": one.lost,
            "#gone": one.gained,
            "#p": words.p_value(one.p),
        }
        for one in answers.faults
    ]


def model_rows(candidates: Sequence[Candidate], choice: Choice) -> list[dict[str, Any]]:
    """Return the rows of the table of several models, the smallest first, and last the dense
    model and its own repeat."""
    rows = list[dict[str, Any]]()
    timed = any(one.speed for one in candidates)  # servers are
    pair = candidates[0].pair
    dense = [Candidate("dense", (pair[0], pair[0]))]
    repeated = [Candidate("dense, again", one) for one in repeat_pairs([pair])]
    ordered = sorted(candidates, key=lambda one: one.size or math.inf)
    for one in (*ordered, *dense, *repeated):
        counts, changed, far = one.counted, one.answers, one.pair[1].distance
        if one in dense:
            good = words.with_span(proportion(counts.pruned, counts.asked))
            best = {} if choice.best in choice.behind else {"#behind best": "0.0"}
            rows.append({**dict.fromkeys(rows[0]), "model": one.name, "#good %": good, **best})
            continue
        rows.append(
            {
                "model": one.name,
                "#MB": one.size and words.megabytes(one.size),
                "#bits": one.bits and f"{one.bits:.2f}",
                **({"#tokens/s": one.speed and f"{one.speed:.0f}"} if timed else {}),
                "#good %": words.with_span(proportion(counts.pruned, counts.asked)),
                "#lost": counts.lost,
                "#gained": counts.gained,
                "#p": words.p_value(counts.p),
                "#behind best": "0.0"
                if one.name == choice.best
                else words.with_span(choice.behind.get(one.name)),
                "#identical %": changed and words.with_span(changed.identical),
                "#KL": far and words.number(far["total"]["kl_mean"]),
            }
        )
    return rows


def choice_text(candidates: Sequence[Candidate], choice: Choice) -> str:
    """Return which model to use, and what that rests on."""
    margin, best = f"{words.percent(choice.margin)} points", choice.best
    sizes = {one.name: one.size for one in candidates if one.size is not None}
    unknown = [one.name for one in candidates if one.name not in sizes]
    if choice.smallest is None and choice.near:
        text = (
            f"Not worse than the best ({best}) by {margin} or more: {words.listed(choice.near)}. "
        )
        text += "Which is the smallest is not known."
    elif choice.smallest is None:
        nearest, apart = min(choice.behind.items(), key=lambda one: one[1].value or 0.0)
        text = f"No model is shown to be within {margin} of the best ({best}). Nearest is "
        text += f"{nearest}, {words.percent(apart.value)} behind, at most "
        text += f"{words.percent(apart.high)}: use a larger one, or ask more prompts."
    elif choice.smallest == best == min(sizes, key=lambda name: sizes[name]):
        text = f"Use {best}: the best, and the smallest."
    elif choice.smallest == best:
        text = f"Use {best}: the best; no smaller one is shown to be within {margin} of it."
        open_ = [
            f"{name} ({words.with_span(apart)} behind)"
            for name, apart in choice.behind.items()
            if sizes.get(name, math.inf) < sizes[best] and (apart.low or 0.0) <= 0
        ]
        if open_:
            text += f" Nor shown to be worse: {words.listed(open_)}; more prompts would tell."
    else:
        name = choice.smallest
        text = f"Use {name}: the smallest that is not worse than the best ({best}) by {margin}"
        text += f" or more; at most {words.percent(choice.behind[name].high)} behind."
    if unknown:
        text += f" Size unknown: {words.listed(unknown)}."
    changed = candidates[0].answers
    if changed is not None and changed.right is None:
        text += " No prompt has an answer or a check, so this rests on faults alone."
    return text


def short_names(models: Sequence[str]) -> list[str]:
    """Return names of models for columns: addresses of servers, and the shortest ends of paths that
    tell them apart."""
    for parts in range(1, max(map(len, models))):
        names = [
            one if "://" in one else "/".join(one.rstrip("/").split("/")[-parts:]) for one in models
        ]
        if len({*names}) == len(names):
            return names
    return [*models]


def answers_page(
    pairs: Mapping[str, Pair], table: list[dict[str, Any]] | None = None, choice: str = ""
) -> str:
    """Return the page that shows the answers of one or several smaller models beside those of their
    dense model, worst first; `table` and `choice` compare several."""
    compared = {name: compare_answers(pair) for name, pair in pairs.items()}
    known = {name: one for name, one in compared.items() if one is not None}
    dense = next(iter(pairs.values()))[0]
    said = {name: sentences(one, pairs[name][1].distance) for name, one in known.items()}
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
