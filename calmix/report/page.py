"""The report as one HTML page: figures, tables and text in a single file that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.bootstrap import Estimate
from calmix.analysis.cells import APART, TOTAL, WORST
from calmix.analysis.differences import Margin
from calmix.analysis.gains import Gain, Shift
from calmix.analysis.ranking import leaders
from calmix.report import words
from calmix.report.claims import FAILS, HOLDS, IN_PART, NOT_FOUND, OPEN, Told
from calmix.report.drawing import Drawing
from calmix.report.figures import slug
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
from calmix.report.summary import Findings, Summary, main_condition
from calmix.study.results import StudyResults

FIGURES = "figures"
MARKS = {HOLDS: "✓", IN_PART: "◐", OPEN: "?", NOT_FOUND: "–", FAILS: "✗"}


def page(
    results: StudyResults,
    analysis: Analysis,
    summary: Summary,
    by_condition: Sequence[tuple[ConditionAnalysis, Sequence[Drawing]]],
    across: Sequence[Drawing],
) -> str:
    """Return the report as HTML."""
    main = main_condition(analysis)
    several = len(by_condition) > 1
    return shell(
        f"{results.name} · calmix study",
        _header(results, analysis, summary),
        [
            _cards(analysis, main),
            _short(summary),
            *([_tabs(by_condition, main)] if several else []),
            *(
                _condition(analysis, found, findings, drawings, several)
                for (found, drawings), findings in zip(
                    by_condition, summary.conditions, strict=True
                )
            ),
            _across(analysis, summary.across, across),
            _methods(analysis, summary.methods),
            claims_section(summary),
            certainty(summary),
            _behind(results, analysis),
        ],
        "Written by calmix from the study's results. What each number means, and which "
        "definitions are calmix's own: docs/studies.md.",
    )


def _header(results: StudyResults, analysis: Analysis, summary: Summary) -> str:
    models = dict.fromkeys(found.condition.model for found in analysis.conditions)
    sets = dict.fromkeys(one.calibration for found in analysis.conditions for one in found.ranking)
    seeds = max(len(found.cells.seeds) for found in analysis.conditions)
    suite = " version ".join(
        str(results.suite[key]) for key in ("name", "version") if key in results.suite
    )
    facts = [
        ", ".join(models),
        words.counted(len(sets), "calibration set"),
        words.listed([found.condition.label for found in analysis.conditions]),
        ("up to " if seeds > 1 else "") + words.counted(seeds, "seed"),
        f"suite {suite}" if suite else "",
        words.MEASURES[analysis.settings.measure],
        f"{analysis.finished} of {words.counted(analysis.planned, 'trial')} finished",
    ]  # fmt: skip
    waiting = analysis.planned - analysis.finished - analysis.failed
    notes = []
    if waiting > 0:
        notes.append(f"{words.counted(waiting, 'trial')} still to come")
    if analysis.failed:
        notes.append(f"{analysis.failed} failed")
    warning = (
        f'<p class="warning"><b>Not complete:</b> {escape(", ".join(notes))}. Everything below is '
        "about the finished trials and may change.</p>"
        if notes else ""
    )  # fmt: skip
    return (
        '<header><p class="kicker">calmix study</p>'
        f"<h1>{escape(results.name)}</h1>"
        f'<p class="facts">{escape(" · ".join(fact for fact in facts if fact))}</p>'
        f'{warning}<p class="lead">{escape(words.held(summary.headline))}</p></header>'
    )


def _cards(analysis: Analysis, main: ConditionAnalysis) -> str:
    cards = []
    best, several = leaders(main.ranking), len(main.ranking) > 1
    if best:
        kept = best[0].total
        tied = f" ({best[0].calibration})" if len(best) > 1 else ""
        cards.append(
            (
                "tied for the best total" if tied else "best total" if several else "total",
                words.some([one.calibration for one in best]),
                f"{words.percent(kept.value)} %",
                f"{words.span(kept.low, kept.high)} after {main.condition.label}{tied}",
            )
        )
    low = next((one for one in main.ranking if one.rank_worst == 1), None)
    if low is not None:
        cards.append(
            (
                "highest worst dimension" if several else "worst dimension",
                low.calibration,
                f"{words.percent(low.lowest.value)} %",
                f"in {low.worst} {words.span(low.lowest.low, low.lowest.high)}",
            )
        )
    spread = [one for one in main.spreads if one.over == "all"]
    total = next((one for one in spread if one.quantity == TOTAL), None)
    rest = [one for one in spread if one.quantity != TOTAL]
    if total is not None and rest:
        widest = max(rest, key=lambda one: one.range)
        cards.append(
            (
                f"apart in {widest.quantity}",
                f"{widest.lowest} to {widest.highest}",
                f"{100 * widest.range:.0f} points",
                f"but {100 * total.range:.0f} points in total",
            )
        )
    told = [found for found in analysis.conditions if found.trade_offs]
    tested = [found for found in analysis.conditions if found.correlations]
    tests = sum(n for name, n in analysis.families.items() if not name.startswith("tasks"))
    where = f"{len(told)} of {words.counted(len(tested), 'condition')}"
    cards.append(
        (
            "opposite-sign trade-off",
            "after correction",
            "not testable" if not tested else "found" if told else "none",
            f"in {where}, {tests} tests" if tested else "too few calibration sets",
        )
    )
    return key_figures(cards)


def _panel(head: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(words.held(line))}</li>" for line in lines)
    return f'<div class="panel"><h3>{escape(head)}</h3><ul>{items}</ul></div>' if items else ""


def _panels(findings: Findings) -> str:
    return (
        f'<div class="summary">{_panel("Found", findings.found)}'
        f"{_panel('Not found', findings.not_found)}</div>"
    )


def _short(summary: Summary) -> str:
    """One line a condition, where there are several; each has its own section below."""
    told = [each for each in summary.conditions if each.brief]
    if len(summary.conditions) < 2 or not told:
        return ""
    items = "".join(f"<li><b>{escape(each.about)}.</b> {escape(words.held(each.brief))}</li>"
                    for each in told)  # fmt: skip
    return f'<section><h2>In short</h2><div class="panel"><ul>{items}</ul></div></section>'


def certainty(summary: Summary) -> str:
    items = "".join(f"<li>{escape(words.held(line))}</li>" for line in summary.certainty)
    return f'<section><h2>How sure this is</h2><div class="panel"><ul>{items}</ul></div></section>'


def claims_section(summary: Summary) -> str:
    """Return the claims: verdicts at a glance where there are several conditions, then figures.

    A row of the first table is a claim, of the second a claim and a way to prune; models stand
    side by side in both.
    """
    told = [one for claim in summary.claims for one in claim.told]
    if not told:
        return ""
    models, ways = dict.fromkeys(one.model for one in told), dict.fromkeys(one.way for one in told)
    several = len(models) > 1 or len(ways) > 1
    glance, rows = [], []
    for claim in summary.claims:
        found = {(one.way, one.model): one for one in claim.told}
        cells = []
        for way in ways:
            own = [found.get((way, model)) for model in models]
            cells.append(Cell("".join(map(_mark, own)), sum(_rank(one) for one in own)))
            if any(own):
                rows.append([plain(claim.text, "wrap"), plain(way), *map(_figures, own)])
        glance.append([plain(claim.text, "wrap"), *cells])
    legend = ", ".join(f"{mark} {verdict}" for verdict, mark in MARKS.items())
    if len(models) > 1:
        legend += f"; in each cell {words.listed(list(models))}, in this order"
    heads = ["claim", "where", *(models if len(models) > 1 else ["verdict"])]
    columns = [Column(name, number=False) for name in heads]
    ahead = [Column("claim", number=False), *(Column(way) for way in ways)]
    folded = fold("At a glance", legend, table(ahead, glance), open_=True)
    at_a_glance = f'<div class="glance">{folded}</div>' if several else ""
    figures = fold("Claim by claim", "points of total retention, correlations",
                   table(columns, rows), open_=not several)  # fmt: skip
    return f'<section class="claims"><h2>The claims</h2>{at_a_glance}{figures}</section>'


def _rank(one: Told | None) -> float:
    return 0 if one is None else 1 + list(reversed(MARKS)).index(one.verdict)


def _mark(one: Told | None) -> str:
    if one is None:
        return '<span class="mark"></span>'
    kind = " strong" if one.verdict == HOLDS else " wrong" if one.verdict == FAILS else ""
    told = escape(f"{one.where}: {one.verdict} ({one.because})")
    return (
        f'<span class="mark{kind}" role="img" aria-label="{told}" title="{told}">'
        f"{MARKS[one.verdict]}</span>"
    )


def _figures(one: Told | None) -> Cell:
    if one is None:
        return Cell("", "")
    kind = ' class="strong"' if one.verdict == HOLDS else ""
    told = f"<b{kind}>{escape(one.verdict)}</b>: {escape(words.held(one.because))}"
    return Cell(told, f"{one.verdict} {one.because}", "wrap")


def _tabs(
    by_condition: Sequence[tuple[ConditionAnalysis, Sequence[Drawing]]], main: ConditionAnalysis
) -> str:
    tabs = "".join(
        f'<button role="tab" id="tab-{slug(found.condition.label)}" '
        f'aria-controls="{slug(found.condition.label)}" aria-selected="false"'
        f"{' data-first' if found is main else ''}>{escape(found.condition.label)}</button>"
        for found, _ in by_condition
    )
    return (
        "<h2>Condition by condition</h2>"
        f'<div role="tablist" aria-label="Method and sparsity" hidden>{tabs}</div>'
    )


def _condition(
    analysis: Analysis,
    found: ConditionAnalysis,
    findings: Findings,
    drawings: Sequence[Drawing],
    several: bool,
) -> str:
    name = slug(found.condition.label)
    role = f' role="tabpanel" aria-labelledby="tab-{name}"' if several else ""
    tables = [
        fold("Distance to the dense model", "KL, top-1 and flips",
              _told_distance(found) + _distance(analysis, found)),
        fold("Correlations", f"Spearman; {_families(analysis, tasks=False)}",
              _correlations(found, tasks=False)),
        fold("Correlations with single tasks", f"Spearman; {_families(analysis, tasks=True)}",
              _correlations(found, tasks=True)),
        fold("Differences between ways to calibrate", "points", _differences(found)),
        fold("Signal and noise", "points; by the draw of the rows, and by test items",
              _noise(found)),
        fold("Spread over calibration sets", "points", _spreads(found)),
    ]  # fmt: skip
    draws = "and other draws" if found.joint.freedom else "alone: one draw each"
    far = any(told[TOTAL] is not None for one in found.ranking for told in one.distance.values())
    noise = any(one.item is not None or one.draw is not None for one in found.noise)
    shown = [far, *[bool(found.correlations)] * 2, bool(found.differences), noise,
             bool(found.spreads)]  # fmt: skip
    return (
        f'<section class="condition" id="{name}"{role}>'
        f"<h2>{escape(found.condition.label)}</h2>"
        + fold("Ranking", f"retention with 95 % intervals, for other items {draws}",
                _ranking(analysis, found), open_=True)
        + figure(drawings[0], FIGURES)
        + _panels(findings)
        + "".join(figure(drawing, FIGURES) for drawing in drawings[1:])
        + "".join(table for table, told in zip(tables, shown, strict=True) if told)
        + "</section>"
    )  # fmt: skip


def _families(analysis: Analysis, *, tasks: bool) -> str:
    """Say how many tests p is corrected over."""
    counts = {
        how: analysis.families.get(f"tasks of {name}" if tasks else name, 0)
        for name, how in words.AMONG.items()
    }
    told = [f"{words.counted(count, 'test')} {how}" for how, count in counts.items() if count]
    return f"corrected over {words.listed(told) or 'no tests'}"


def _estimate(one: Estimate) -> Cell:
    ends = words.span(one.low, one.high)
    shown = words.percent(one.value) + (f" <small>{ends}</small>" if ends else "")
    return Cell(shown, None if one.value is None else float(one.value))


def _points(one: Estimate) -> Cell:
    ends = words.span(one.low, one.high)
    shown = words.points(one.value) + (f" <small>{ends}</small>" if ends else "")
    return Cell(shown, None if one.value is None else float(one.value))


def _p(value: float | None) -> Cell:
    shown = escape(words.p_value(value))
    return Cell(shown, value, "strong" if value is not None and value <= 0.05 else "")


def _ranking(analysis: Analysis, found: ConditionAnalysis) -> str:
    own = any(one.without_own for one in found.ranking)
    columns = [
        Column("calibration set", number=False), Column("made", number=False), Column("draws"),
        Column("total %"), Column("accuracy %"), Column("shrunken %"), Column("best"),
        Column("behind the first"), Column("worst", number=False), Column("worst %"),
        *(Column(name) for dimension in analysis.dimensions
          for name in (f"{dimension} %", f"{dimension}, accuracy %")),
        *([Column("without its own benchmark", number=False)] if own else []),
    ]  # fmt: skip
    rows = []
    for one in found.ranking:
        dot = f'<span class="dot" style="background:var(--s-{one.strategy})"></span>'
        behind = one.behind
        rows.append([
            Cell(dot + escape(one.calibration), one.calibration),
            plain(words.STRATEGIES[one.strategy]), Cell(str(one.total.draws), one.total.draws),
            _estimate(one.total), _share(one.accuracy[TOTAL]), _share(one.shrunken.value),
            Cell("–" if one.best is None else words.sure(one.best), one.best),
            Cell("", 0.0) if behind is None else _points(behind),
            plain(one.worst or "–"), _estimate(one.lowest),
            *(cell for name in analysis.dimensions
              for cell in (_estimate(one.dimensions[name]), _share(one.accuracy[name]))),
            *([plain(", ".join(f"{name} {words.percent(kept.value)}"
                               for name, kept in one.without_own.items()))] if own else []),
        ])  # fmt: skip
    return table(columns, rows)


def _share(value: float | None) -> Cell:
    return Cell(words.percent(value), value)


def _told_distance(found: ConditionAnalysis) -> str:
    text = (
        "KL(dense || pruned) is in nats a token. Top-1: tokens with the dense model's likeliest "
        "next one. Flips: items right under one model alone."
    )
    rho = [f"{one.quantity} {words.rho(one.rho)} (p {words.p_value(one.p)})"
           for one in found.agreements if one.rho is not None]  # fmt: skip
    if rho:
        text += f" Spearman's ρ of KL with retention: {words.listed(rho)}."
    return f"<p>{escape(words.held(text))}</p>"


def _distance(analysis: Analysis, found: ConditionAnalysis) -> str:
    columns = [
        Column("calibration set", number=False), Column("total %"), Column("KL"),
        Column("top-1 %"), Column("flips %"),
        *(Column(f"KL, {name}") for name in analysis.dimensions),
    ]  # fmt: skip
    rows = [
        [
            plain(one.calibration), _share(one.total.value), _nats(one.distance["kl"][TOTAL]),
            _share(one.distance["top1"][TOTAL]), _share(one.distance["flips"][TOTAL]),
            *(_nats(one.distance["kl"][name]) for name in analysis.dimensions),
        ]
        for one in found.ranking
    ]  # fmt: skip
    return table(columns, rows)


def _nats(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{value:.3f}", value)


def _correlations(found: ConditionAnalysis, *, tasks: bool) -> str:
    columns = [
        Column("metric", number=False), Column("task" if tasks else "dimension", number=False),
        Column("sources", number=False), Column("ρ"), Column("95 % interval", number=False),
        Column("p"), Column("corrected p"), Column("sets"), Column("same metric", number=False),
    ]  # fmt: skip
    rows = []
    for one in found.correlations:
        if one.task != tasks or (tasks and one.rho is None):
            continue
        ends = "–" if one.low is None else f"[{words.rho(one.low)}, {words.rho(one.high)}]"
        rows.append([
            plain(words.metric_name(one.metric)), plain(one.quantity),
            plain(words.AMONG[one.among]), Cell(words.rho(one.rho), one.rho), plain(ends),
            Cell(escape(words.p_value(one.p)), one.p), _p(one.p_corrected), Cell(str(one.n), one.n),
            plain(", ".join(map(words.metric_name, one.aliases))),
        ])  # fmt: skip
    return table(columns, rows)


def _differences(found: ConditionAnalysis) -> str:
    columns = [
        Column("this", number=False), Column("over that", number=False),
        Column("in", number=False), Column("points"), Column("p"), Column("corrected p"),
        Column("for other draws alone"), Column("corrected p"),
    ]  # fmt: skip
    rows = [
        [
            plain(one.left), plain(one.right), plain(words.quantity_name(one.quantity)),
            _points(one.gap), Cell(escape(words.p_value(one.gap.p)), one.gap.p),
            _p(one.p_corrected),
            Cell(words.span(one.gap.draw_low, one.gap.draw_high), one.gap.draw_low),
            _p(one.draw_p_corrected),
        ]
        for one in found.differences if one.quantity in (TOTAL, APART, WORST)
    ]  # fmt: skip
    return table(columns, rows)


def _noise(found: ConditionAnalysis) -> str:
    columns = [
        Column("quantity", number=False), Column("kind", number=False), Column("items"),
        Column("signal, single sources"), Column("signal, all sets"), Column("one draw"),
        Column("items, of a difference"), Column("signal over noise of one trial"),
    ]  # fmt: skip
    rows = [
        [
            plain(one.quantity), plain(one.kind), Cell(str(one.items), one.items),
            _share(one.signal), _share(one.signal_all), _share(one.draw), _share(one.item),
            Cell("–" if one.ratio is None else f"{one.ratio:.2f}", one.ratio),
        ]
        for one in found.noise
    ]  # fmt: skip
    return table(columns, rows)


def _spreads(found: ConditionAnalysis) -> str:
    columns = [
        Column("over", number=False), Column("in", number=False), Column("sets"),
        Column("range"), Column("deviation"), Column("if dimensions were unrelated"),
        Column("p of cancelling"), Column("lowest", number=False), Column("highest", number=False),
    ]  # fmt: skip
    rows = [
        [
            plain("single sources" if one.over == "single" else "all sets"), plain(one.quantity),
            Cell(str(one.n), one.n), _share(one.range), _share(one.deviation),
            _share(one.if_independent), _p(one.p_cancel), plain(one.lowest), plain(one.highest),
        ]
        for one in found.spreads
    ]  # fmt: skip
    return table(columns, rows)


def _across(analysis: Analysis, findings: Findings, drawings: Sequence[Drawing]) -> str:
    if not drawings and not analysis.margins:
        return ""
    margins = _gaps(
        "Margins over the default", analysis.margins,
        {"condition": "condition", "this": "calibration", "over the default": "default"},
    )  # fmt: skip
    figures = "".join(figure(drawing, FIGURES) for drawing in drawings)
    return f"<section><h2>Against sparsity</h2>{figures}{_panels(findings)}{margins}</section>"


def _methods(analysis: Analysis, findings: Findings) -> str:
    if not analysis.gains:
        return ""
    sides = {"method": "more", "against": "less"}
    gains = _gaps(
        "What a method keeps more", analysis.gains, sides | {"calibration set": "calibration"}
    )
    shifts = _gaps(
        "What becomes of leads", analysis.shifts,
        sides | {"lead of": "calibration", "over": "default"},
    )  # fmt: skip
    return f"<section><h2>Method by method</h2>{_panels(findings)}{gains}{shifts}</section>"


def _gaps(title: str, found: Sequence[Margin | Gain | Shift], heads: Mapping[str, str]) -> str:
    """Return a folded table of differences in points, empty without any.

    Args:
        heads: of the columns before quantity and points, and which attribute each shows.
    """
    columns = [*(Column(head, number=False) for head in (*heads, "in")), Column("points")]
    rows = [
        [*(plain(getattr(one, name)) for name in heads.values()),
         plain(words.quantity_name(one.quantity)), _points(one.gap)]
        for one in found
    ]  # fmt: skip
    return fold(title, "points", table(columns, rows)) if rows else ""


def _behind(results: StudyResults, analysis: Analysis) -> str:
    parts = ["<section><h2>Behind the figures</h2>"]
    if results.failed:
        rows = [
            [plain(one.label), plain(one.error, "wrap"), plain(one.id)] for one in results.failed
        ]
        columns = [Column(name, number=False) for name in ("trial", "error", "id")]
        parts.append(
            fold("Failed trials", str(len(results.failed)), table(columns, rows), open_=True)
        )
    gaps = [
        [plain(found.condition.label), plain(name), Cell(str(seed), seed)]
        for found in analysis.conditions
        for name, seed in found.missing
    ]
    if gaps:
        columns = [Column("condition", number=False), Column("calibration set", number=False),
                   Column("seed")]  # fmt: skip
        parts.append(
            fold(
                "Cells without a finished trial",
                f"{len(gaps)}: not asked for, failed or still to come",
                table(columns, gaps),
            )
        )
    parts.append(fold("All trials", str(len(results.trials)), _trials(results, analysis)))
    parts.append(fold("Study file", "as it was run", f"<pre>{escape(results.text.rstrip())}</pre>"))
    facts = [*flat(results.environment), *flat(results.suite, "suite"),
             *flat({"analysis": analysis.to_dict()["settings"]})]  # fmt: skip
    rows = [[plain(name), plain(value, "wrap")] for name, value in facts]
    columns = [Column("what", number=False), Column("value", number=False)]
    parts.append(fold("Environment", "machine, versions, settings", table(columns, rows)))
    return "".join(parts) + "</section>"


def _trials(results: StudyResults, analysis: Analysis) -> str:
    """Every finished trial as stored (primary scores), whatever the analysis leaves out."""
    columns = [
        Column("calibration set", number=False), Column("method", number=False),
        Column("pattern", number=False), Column("seed"), Column("total %"),
        *(Column(f"{name} %") for name in analysis.dimensions), Column("seconds"),
    ]  # fmt: skip
    rows = []
    for trial in results.trials:
        kept = [trial.dimensions.get(name) for name in analysis.dimensions]
        values = [trial.total.value, *(one.value if one is not None else None for one in kept)]
        seconds = sum(trial.seconds.values())
        rows.append([
            plain(trial.calibration), plain(trial.method), plain(trial.pattern),
            Cell(str(trial.seed), trial.seed),
            *(Cell(words.percent(value), value) for value in values),
            Cell(f"{seconds:.0f}", seconds),
        ])  # fmt: skip
    return table(columns, rows)
