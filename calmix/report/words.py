"""How numbers and names are written, the same in figures, tables and text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from calmix.analysis.bootstrap import Estimate
from calmix.analysis.cells import APART, TOTAL, WORST
from calmix.analysis.ranking import Placed, leaders

STRATEGIES = {
    "single": "single source",
    "mix": "mix",
    "self-cal": "Self-Cal",
    "sgs": "SGS",
    "igsp": "IGSP",
    "self-written": "self-written",
    "none": "no calibration",
}
MEASURES = {
    "primary": "retention by each task's primary score",
    "probability": "retention of the right choices' probability",
    "bits": "retention of bits",
    "smoothed": "retention of smoothed bits",
    "margin": "retention of the right choices' margin",
    "accuracy": "retention of accuracy, corrected for chance",
    "ratio": "ratio of accuracies, not corrected for chance",
}
AMONG = {"sources": "all at once", "kinds": "within kinds of text"}
METRICS = {
    "perplexity": "perplexity",
    "distortion": "perplexity",
    "bits_per_byte": "bits per byte",
    "entropy": "unigram entropy",
    "volume": "volume",
    "scope_documents": "documents",
    "scope_tokens": "share of the vocabulary",
    "granularity": "tokens a document",
    "mismatch": "mismatch",
    "bytes": "bytes",
    "tokens": "tokens",
}
MINUS = "\N{MINUS SIGN}"
HOLD = "\N{NO-BREAK SPACE}"
WIDTH = 80  # of text for a terminal


def metric_name(key: str) -> str:
    """Return a metric's name in words: `aggregation_4` is `4-gram aggregation`."""
    if key.startswith("-"):
        return f"less {metric_name(key[1:])}"
    if key in METRICS:
        return METRICS[key]
    stem, _, order = key.rpartition("_")
    if stem in ("aggregation", "variety", "coverage") and order.isdigit():
        return f"{order}-gram {stem}"
    return key.replace("_", " ")


def percent(value: float | None) -> str:
    """Return a share as a percentage with one decimal."""
    return "–" if value is None else _signless(100 * value, 1)


def whole_percent(value: float) -> str:
    """Return a share in whole percent."""
    return _signless(100 * value, 0)


def points(value: float | None) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    if value is None:
        return "–"
    text = _signless(100 * value, 1)
    return text if text.startswith(MINUS) or text == "0.0" else f"+{text}"


def span(low: float | None, high: float | None) -> str:
    """Return an interval of shares in percent, in brackets; empty if it is unknown."""
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def with_span(one: Estimate) -> str:
    """Return an estimate in percent with its interval."""
    return f"{percent(one.value)} {span(one.low, one.high)}".strip()


def with_points(one: Estimate) -> str:
    """Return a difference in percentage points with its interval."""
    return f"{points(one.value)} {span(one.low, one.high)}".strip()


def rho(value: float | None) -> str:
    """Return a correlation with its sign and two decimals."""
    if value is None:
        return "–"
    text = _signless(value, 2)
    return text if text.startswith(MINUS) or float(text) == 0 else f"+{text}"


def p_value(value: float | None) -> str:
    """Return a p-value; below 0.001 only that it is."""
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def sure(value: float) -> str:
    """Return a probability in whole percent, never 0 or 100."""
    return f"{min(99, max(1, round(100 * value)))} %"


def short(name: str, width: int = 26) -> str:
    """Return a name cut to a width, with an ellipsis."""
    return name if len(name) <= width else name[: width - 1] + "…"


def quantity_name(name: str) -> str:
    """Return a quantity's name in words."""
    known = {TOTAL: "total", WORST: "worst dimension", APART: "total on other benchmarks"}
    return known.get(name, name)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def listed(names: list[str]) -> str:
    """Return names joined by commas and `and`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def some(names: list[str]) -> str:
    """Return the first three names, and how many more there are."""
    return listed(names if len(names) < 4 else [*names[:3], f"{len(names) - 3} more"])


def which_is_best(placed: Sequence[Placed]) -> str:
    """Say which set keeps the most and by how much, or which are tied; one has a value at least."""
    first, *ties = sets = leaders(placed)
    if not ties:
        text = f"{first.calibration} keeps the most: {with_span(first.total)} %"
        for second in placed[1:2]:
            if second.behind and second.behind.value is not None:
                text += f", ahead of {second.calibration} by {with_span(second.behind)} points"
        return text
    gap = ties[0].behind
    apart = "no difference is expected"
    if gap and gap.value is not None:
        apart = f"difference {with_span(gap)} points"
    if len(ties) > 1:
        apart = f"{first.calibration} and {ties[0].calibration}: {apart}"
    kept = listed([with_span(one.total) for one in sets[:3]])
    return f"{some([one.calibration for one in sets])} are tied ({apart}): {kept} %"


def held(text: str) -> str:
    """Return text in which no line break parts a number from its unit or interval."""
    text = re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", HOLD), text)
    return re.sub(r"(?<=[\d\]]) (?=%)|(?<=\d) (?=\[)|(?<=\b[ρp]) (?=[<+\d−])", HOLD, text)


def wrapped(text: str, first: str = "", rest: str = "") -> str:
    """Return text in lines of a terminal's width, words and intervals whole.

    Args:
        first, rest: what the first and every other line begin with.
    """
    lines = textwrap.wrap(
        held(text), WIDTH, initial_indent=first, subsequent_indent=rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines).replace(HOLD, " ")


def _signless(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)
