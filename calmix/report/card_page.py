"""A report card as one HTML page, as the model's own card, and several models side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path

from calmix.analysis.bootstrap import Estimate as Told
from calmix.analysis.ranking import Candidate
from calmix.errors import InputError
from calmix.evaluation.retention import Estimate, total_gap
from calmix.evaluation.scores import check_same_suite
from calmix.report import card_figures, words
from calmix.report.card import Card
from calmix.report.parts import (
    Cell,
    Column,
    escape,
    figure,
    flat,
    fold,
    key_figures,
    plain,
    shell,
    table,
)
from calmix.sources.licences import use_of

FOOTER = (
    "Written by calmix from the files beside this page. 100 % retention is the dense model, 0 one "
    "without the knowledge; brackets are 95 % intervals over items: docs/evaluation.md."
)
SMALLER = (
    "The weights are plain dense safetensors: zeros alone make a model neither smaller nor faster "
    "in most engines. calmix export --to pack makes it smaller, without loss; docs/deploy.md says "
    "what else there is."
)
DIFFER = "Only those that differ"


def card_page(card: Card) -> str:
    """Return the report card as HTML."""
    return shell(
        f"{card.model} at {card.target} · calmix report card",
        _header(card),
        [
            _figures(card),
            f"<section><h2>What is kept</h2>{_kept(card)}"
            f"{figure(card_figures.kept([card]))}"
            f"{fold('Task by task', 'scores of both models', _tasks(card))}</section>",
            "<section><h2>Where it was lost</h2>"
            + "".join(figure(one) for one in _drawn(card)) + "</section>",
            _answers([card]),
            f"<section><h2>What it was made of</h2>{_made_of(card)}</section>",
            f"<section><h2>How it was made</h2>{_made(card)}</section>",
        ],
        escape(FOOTER),
    )  # fmt: skip


def _drawn(card: Card) -> Iterator[card_figures.Drawing]:
    lost = card_figures.lost(card)
    if lost is not None:
        yield lost
    yield from card_figures.recovery(card)


def sentence(card: Card) -> str:
    """Return what the card comes to."""
    text = f"With {card.target} of its weights pruned"
    if card.record.request["pattern"]:
        text = f"Pruned to {card.target}"
    if card.kept.total.value is None:
        return f"{text}, nothing can be said of what is kept: no task has signal."
    text += f", this model keeps {_spanned(card.kept.total)} % of {card.model}'s abilities"
    if card.kept.worst is not None and len(card.kept.dimensions) > 1:
        worst = card.kept.of(card.kept.worst)
        text += f", and least of {card.kept.worst}: {_spanned(worst)} %"
    return f"{text}."


def _header(card: Card) -> str:
    asked = card.record.request
    written = "generated" in card.calibration
    facts = [
        f"effort {asked['effort']}",
        "calibrated on its own text" if written else words.counted(len(card.sources), "source"),
        f"suite {_suite(card)}",
        f"{card.size / 1e6:,.0f} MB",
        f"dense model: {card.licence}",
    ]
    return (
        '<header><p class="kicker">calmix report card</p>'
        f"<h1>{escape(card.model)} at {escape(card.target)}</h1>"
        f'<p class="facts">{escape(" · ".join(facts))}</p>'
        f'<p class="lead">{escape(words.held(sentence(card)))}</p></header>'
    )


def _suite(card: Card) -> str:
    return f"{card.scores.suite['name']} version {card.scores.suite.get('version', '-')}"


def _figures(card: Card) -> str:
    total = card.kept.total
    found = [("kept", "all dimensions", f"{words.percent(total.value)} %",
              words.span(total.low, total.high))]  # fmt: skip
    if card.kept.worst is not None and len(card.kept.dimensions) > 1:
        worst = card.kept.of(card.kept.worst)
        found.append(("worst dimension", card.kept.worst, f"{words.percent(worst.value)} %",
                      words.span(worst.low, worst.high)))  # fmt: skip
    if card.distance is not None:
        told = card.distance["total"]
        found.append(("distance to the dense model", "KL, nats a token", _nats(told["kl_mean"]),
                      f"same likeliest token {words.percent(told['top1'])} %"))  # fmt: skip
    if card.flipped.total is not None:
        flips = card.flipped.total
        note = f"{words.percent(flips.lost)} % lost, {words.percent(flips.gained)} % gained"
        found.append(("flips", "items that changed sides",
                      f"{words.percent(flips.share.value)} %", note))  # fmt: skip
    return key_figures(found)


def _rows_kept(card: Card) -> list[list[str]]:
    """Return the main table in words: a row a dimension, and the total."""
    rows = []
    far = {} if card.distance is None else dict(card.distance["dimensions"])
    for one in [*card.kept.dimensions, None]:
        name = "total" if one is None else one.name
        estimate = card.kept.total if one is None else one.kept
        accuracy = card.by_accuracy.total if one is None else card.by_accuracy.of(name)
        flips = card.flipped.total if one is None else card.flipped.dimensions.get(name)
        told = (card.distance or {}).get("total") if one is None else far.get(name)
        rows.append([
            name, _spanned(estimate), _spanned(accuracy),
            "–" if told is None else _nats(told["kl_mean"]),
            "–" if told is None else words.percent(told["top1"]),
            "–" if flips is None else _spanned(flips.share),
        ])  # fmt: skip
    return rows


HEADS = ("dimension", "retention %", "by accuracy %", "KL", "top-1 %", "flips %")


def _kept(card: Card) -> str:
    rows = [[_cell(text) for text in row] for row in _rows_kept(card)]
    columns = [Column(head, number=bool(at)) for at, head in enumerate(HEADS)]
    told = (
        "KL(dense || pruned) in nats a token, on held-out text. Top-1: tokens with the dense "
        "model's likeliest next one. Flips: items right under one model alone."
    )
    return f'<div class="panel scroll" tabindex="0">{table(columns, rows)}</div><p>{told}</p>'


def _cell(text: str) -> Cell:
    """Return a cell whose interval is small, and that sorts by its first number."""
    value, bracket, rest = text.partition(" [")
    try:
        key: str | float = float(value.replace(words.MINUS, "-"))
    except ValueError:
        key = "" if value == "–" else value
    shown = escape(value) + (f" <small>[{escape(rest)}</small>" if bracket else "")
    return Cell(shown, key)


def _tasks(card: Card) -> str:
    columns = [
        Column("task", number=False), Column("dimension", number=False),
        Column("scored by", number=False), Column("items"), Column("dense"), Column("pruned"),
        Column("accuracy, dense"), Column("accuracy, pruned"), Column("retention %"),
    ]  # fmt: skip
    rows = [
        [
            plain(task.name), plain(task.dimension), plain(task.score),
            Cell(str(task.items), task.items), _three(task.dense), _three(task.pruned),
            _three(task.dense_accuracy), _three(task.pruned_accuracy),
            _cell(_spanned(task.kept)) if task.signal else Cell("no signal", None),
        ]
        for task in card.kept.tasks
    ]  # fmt: skip
    return table(columns, rows)


def _three(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{value:.3f}", value)


def _nats(value: float) -> str:
    return f"{value:.3f}"


def _spanned(one: Estimate) -> str:
    return f"{words.percent(one.value)} {words.span(one.low, one.high)}".strip()


def _answers(cards: Sequence[Card]) -> str:
    """Return prompts with what the dense model and each other wrote, side by side."""
    answered = [card.answers for card in cards]
    first = answered[0]
    if first is None or any(
        other is None or other.prompts != first.prompts or other.answers[0] != first.answers[0]
        for other in answered
    ):
        return ""
    names = ["pruned"] if len(cards) == 1 else [card.name for card in cards]
    articles = []
    for number, prompt in enumerate(first.prompts):
        texts = [told.answers[1][number] for told in answered if told is not None]
        dense = first.answers[0][number]
        same = len({dense, *texts}) == 1
        boxes = "".join(
            f'<div class="box"><h4>{escape(name)}</h4>'
            f"<p>{escape(text) or '<i>nothing</i>'}</p></div>"
            for name, text in [("dense", dense), *zip(names, texts, strict=True)]
        )
        expected = (
            ""
            if prompt.expected is None
            else (f'<p class="expected">expected: <b>{escape(prompt.expected)}</b></p>')
        )
        articles.append(
            f'<article class="panel"{" data-same" if same else ""}><p class="facts">'
            f"{escape(prompt.dimension)} · {escape(prompt.task)}</p>"
            f'<p class="asked">{escape(prompt.shown)}</p>{expected}'
            f'<div class="beside">{boxes}</div></article>'
        )  # fmt: skip
    differ = sum("data-same" not in article[:40] for article in articles)
    return (
        f'<section id="answers"><h2>Answers side by side</h2><p>{len(articles)} prompts, {differ} '
        "answered differently; each model's likeliest tokens. They show what figures do not, and "
        f"prove nothing.</p>{_filter('answers')}{''.join(articles)}</section>"
    )  # fmt: skip


def _filter(where: str) -> str:
    return (
        f'<label class="filter" hidden><input type="checkbox" data-differ="{where}"> '
        f"{DIFFER}</label>"
    )


def _made_of(card: Card) -> str:
    made = "rows the model wrote, of each dimension" if "generated" in card.calibration else ""
    columns = [
        Column("source", number=False), Column("dimension", number=False), Column("rows"),
        Column("tokens"), Column("licence", number=False), Column("use", number=False),
        Column("version", number=False),
    ]  # fmt: skip
    rows = [
        [
            plain(one.name), plain(one.dimension), Cell(str(one.rows), one.rows),
            Cell(f"{one.tokens:,}", one.tokens), plain(one.licence, "wrap"),
            plain(_use(one.licence)), plain(one.version),
        ]
        for one in card.sources
    ]  # fmt: skip
    scored = [
        [plain(name), plain(told["licence"]), plain(use_of(told["licence"])),
         plain(told["origin"])]
        for name, told in card.tasks.items()
    ]  # fmt: skip
    heads = [Column(name, number=False) for name in ("task", "licence", "use", "origin")]
    tokens = sum(one.tokens for one in card.sources)
    return (
        f"<p>{escape(card.model)} ({escape(card.origin)}), licence: {escape(card.licence)}. "
        f"{escape(_guarded(card))}</p>"
        + fold("Calibration set", f"{tokens:,} tokens {made}".strip(), table(columns, rows),
               open_=True)
        + (fold("Scored tasks", "whose items they are", table(heads, scored)) if scored else "")
    )  # fmt: skip


def _use(licence: str) -> str:
    return "–" if licence == "written by the model" else use_of(licence)


def _guarded(card: Card) -> str:
    leakage = card.calibration.get("leakage")
    if not isinstance(leakage, dict):
        return "The calibration text was not checked for items of the suite."
    dropped = sum(len(entries) for entries in leakage.get("dropped", {}).values())
    return (
        f"No calibration row shares {leakage['tokens']} tokens in a row with an item of suite "
        f"{leakage['suite']} ({words.counted(dropped, 'document')} dropped)."
    )


def _made(card: Card) -> str:
    commands = "\n".join(card.record.commands.values())
    facts = [*flat(card.record.request, "request"), *flat(card.record.versions),
             *flat({k: f"{v:.1f}" for k, v in card.seconds.items()}, "seconds")]  # fmt: skip
    columns = [Column("what", number=False), Column("value", number=False)]
    hashes = [[plain(name, "wrap"), plain(value, "wrap")] for name, value in card.hashes.items()]
    return (
        f'<div class="panel scroll" tabindex="0"><pre>{escape(commands)}</pre></div>'
        f"<p>{escape(_pruned(card))} {escape(SMALLER)}</p>"
        + fold("Hashes", "SHA-256 of what went in and came out", table(columns, hashes))
        + fold("Request", "versions and seconds",
               table(columns, [[plain(name), plain(value, "wrap")] for name, value in facts]))
    )  # fmt: skip


def _pruned(card: Card) -> str:
    return (
        f"{card.pruned:,} of {card.weights:,} weights of its linear maps are pruned "
        f"({card.pruned / card.weights:.2%})."
    )


# The model's own card


def model_card(card: Card) -> str:
    """Return the README.md of the pruned model: the same figures, in Markdown."""
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", card.origin) and not Path(card.origin).exists()
    listed = [f"base_model: {card.origin}"] if hub else []
    if re.fullmatch(r"[\w.-]+", card.licence):
        listed.append(f"license: {card.licence.lower()}")
    front = "\n".join(
        ["---", *listed, "library_name: transformers", "tags: [pruned, sparse, calmix]", "---"]
    )
    heads = "| " + " | ".join(HEADS) + " |\n|---|" + "---:|" * (len(HEADS) - 1)
    kept = "\n".join(f"| {' | '.join(row)} |" for row in _rows_kept(card))
    sources = "\n".join(
        f"| {_bar(one.name)} | {one.dimension} | {one.rows} | {one.tokens:,} "
        f"| {_bar(one.licence)} |"
        for one in card.sources
    )
    recovered = "\n".join(
        f"- recovery by {told['method']}: held-out rows {told['before']:.4f} before, "
        f"{told['after']:.4f} after" for told in card.recoveries
    )  # fmt: skip
    commands = "\n".join(card.record.commands.values())
    hashes = "\n".join(f"| {name} | `{value}` |" for name, value in card.hashes.items())
    return f"""{front}

# {card.model} at {card.target}

{sentence(card)} {_pruned(card)}

{heads}
{kept}

Suite {_suite(card)}{", quick slice" if card.record.request["effort"] == "quick" else ""}. {FOOTER}

{SMALLER}

## Made with

{recovered}

| source | dimension | rows | tokens | licence |
|---|---|---:|---:|---|
{sources}

The dense model: {card.origin}, licence: {card.licence}. {_guarded(card)}

```
{commands}
```

| | SHA-256 |
|---|---|
{hashes}
"""


def _bar(text: str) -> str:
    return text.replace("|", "\\|")


# Several models


def several_page(cards: Sequence[Card]) -> str:
    """Return a page that puts several models side by side.

    Raises:
        InputError: they were scored on different suites, or against different dense models.
    """
    first = cards[0]
    for card in cards[1:]:
        check_same_suite(card.scores.suite, first.scores.suite)
        if card.dense.fingerprint != first.dense.fingerprint:
            raise InputError(
                f"{card.name} is of another dense model than {first.name}: there is no common "
                "measure"
            )
    cards = [replace(card, name=name) for card, name in zip(cards, _names(cards), strict=True)]
    facts = [f"{len(cards)} models", f"against {first.model}", f"suite {_suite(first)}"]
    ordered = _ordered(cards)
    lead = f"The dense model is 100 %; {words.which_is_best(ordered)}." if ordered else ""
    return shell(
        "Models side by side · calmix",
        '<header><p class="kicker">calmix report card</p><h1>Models side by side</h1>'
        f'<p class="facts">{escape(" · ".join(facts))}</p>'
        f'<p class="lead">{escape(words.held(lead))}</p></header>',
        [
            f"<section><h2>What is kept</h2>{_beside(cards)}"
            f"{figure(card_figures.kept(cards))}</section>",
            _answers(cards),
            _items(cards),
        ],
        escape(FOOTER),
    )


def _ordered(cards: Sequence[Card]) -> list[Candidate]:
    """Return the models by total, and how far each is behind the first."""
    known = [card for card in cards if card.kept.total.value is not None]
    known.sort(key=lambda card: -(card.kept.total.value or 0))
    made = []
    for card in known:
        kept, behind = Told(*astuple(card.kept.total)), None
        if card is not known[0]:
            gap = total_gap(card.dense.tasks, known[0].scores.tasks, card.scores.tasks)
            behind = Told(*astuple(gap))
        made.append(Candidate(card.name, "", kept, kept, None, behind))
    return made


def _names(cards: Sequence[Card]) -> list[str]:
    """Return a name for each, numbered where two folders have the same."""
    counts, seen = Counter(card.name for card in cards), Counter[str]()
    found = []
    for card in cards:
        seen[card.name] += 1
        found.append(f"{card.name} ({seen[card.name]})" if counts[card.name] > 1 else card.name)
    return found


def _beside(cards: Sequence[Card]) -> str:
    dimensions = [one.name for one in cards[0].kept.dimensions]
    columns = [
        *(Column(name, number=False) for name in ("model", "target", "effort")),
        Column("total %"), *(Column(f"{name} %") for name in dimensions), Column("KL"),
        Column("top-1 %"), Column("flips %"), Column("calibration", number=False),
    ]  # fmt: skip
    rows = []
    for card in cards:
        far = None if card.distance is None else card.distance["total"]
        flips = card.flipped.total
        rows.append([
            plain(card.name), plain(card.target), plain(str(card.record.request["effort"])),
            _cell(_spanned(card.kept.total)),
            *(_cell(_spanned(card.kept.of(each))) for each in dimensions),
            Cell("–", None) if far is None else _cell(_nats(far["kl_mean"])),
            Cell("–", None) if far is None else _cell(words.percent(far["top1"])),
            Cell("–", None) if flips is None else _cell(_spanned(flips.share)),
            plain(str(card.record.request["calibration"])),
        ])  # fmt: skip
    return f'<div class="panel scroll" tabindex="0">{table(columns, rows)}</div>'


def _items(cards: Sequence[Card]) -> str:
    """Return every scored item that is right or wrong, with a filter for those that differ."""
    columns = [
        Column("item", number=False), Column("task", number=False), Column("dense", number=False),
        *(Column(card.name, number=False) for card in cards),
    ]  # fmt: skip
    rows, same = [], []
    for at, task in enumerate(cards[0].dense.tasks):
        for number, item in enumerate(task.items if task.values else ()):
            right = [card.scores.tasks[at].values[number] for card in cards]
            rows.append([plain(item), plain(task.name), _mark(task.values[number]),
                         *map(_mark, right)])  # fmt: skip
            same.append(len(set(right)) == 1)
    if not rows:
        return ""
    told = table(columns, rows, same=same)
    return (
        f'<section id="items"><h2>Item by item</h2><p>{len(rows):,} items with a right answer; '
        f"the models differ in {same.count(False):,}.</p>{_filter('items')}"
        + fold("Items", "right or wrong under each model", told) + "</section>"
    )  # fmt: skip


def _mark(value: float) -> Cell:
    return Cell("right" if value else '<span class="wrong">wrong</span>', float(value))
