"""Measure sources, mixes and saved sets at one token budget, over several seeded draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calmix.calibration.dataset import CalibrationSet, saved_set
from calmix.calibration.resolving import parse_calibration, resolve
from calmix.calibration.text_metrics import compared, of_ids
from calmix.calibration.tokenizer import HasTokenizer
from calmix.errors import InputError
from calmix.evaluation.likelihood import perplexity_of_rows
from calmix.models import OpenModel
from calmix.options import DrawOptions, checked
from calmix.shown import Shown
from calmix.sources import Source


def measure_set(
    drawn: CalibrationSet, opened: HasTokenizer, *, perplexity: bool = True
) -> dict[str, float]:
    """Return every metric of one calibration set alone, by name."""
    values = of_ids(drawn.ids.numpy(), len(opened.tokenizer))
    sources = drawn.manifest.get("sources", {}).values()
    if described := [source for source in sources if "drawn" in source]:
        documents = sum(len(source["drawn"]) for source in described)
        tokens = sum(source["drawn_tokens"] for source in described)
        values |= {"scope_documents": documents, "granularity": tokens / max(1, documents)}
    texts = opened.tokenizer.batch_decode(drawn.ids.tolist(), skip_special_tokens=False)
    values["bytes"] = sum(len(text.encode()) for text in texts)
    return values | distortion(opened, drawn) if perplexity else values


def distortion(opened: Any, drawn: CalibrationSet) -> dict[str, float]:
    """Return distortion, the model's own perplexity on a set, and its bits per byte, by name."""
    measured = perplexity_of_rows(opened, drawn.ids)
    return {"distortion": measured["perplexity"], "bits_per_byte": measured["bits_per_byte"]}


@dataclass(frozen=True)
class Interval:
    """The mean of a metric over draws, with a 95 % interval of that mean (Student's t)."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        half = 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2
        return f"{self.mean:.4g}" + (f"±{half:.2g}" if half > 0 else "")


@dataclass(frozen=True, repr=False)
class Measurement(Shown):
    """Measured metrics, and how they were measured.

    Attributes:
        budget: rows, length, tokens, draws, seed, packing, model and tokenizer.
        draws: every metric of every draw, by source, mix or saved set.
        notes: why a saved set has fewer draws than requested.
    """

    budget: dict[str, Any]
    draws: dict[str, list[dict[str, float]]]
    notes: dict[str, str]

    def __getitem__(self, name: str) -> dict[str, Interval]:
        """Return the mean and interval of every metric of one source by name."""
        draws = self.draws[name]
        return {key: interval([draw[key] for draw in draws]) for key in draws[0]}

    def _line(self) -> str:
        return f"{len(self.draws)} texts at {self.budget['tokens']} tokens per draw"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "metric": key,
                **asdict(value),
                "budget_tokens": self.budget["tokens"],
                "draws": len(draws),
            }
            for name, draws in self.draws.items()
            for key, value in self[name].items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-serialisable value."""
        results = [
            {
                "name": name,
                "note": self.notes.get(name, ""),
                "metrics": {key: asdict(value) for key, value in self[name].items()},
                "draws": draws,
            }
            for name, draws in self.draws.items()
        ]
        return {
            "kind": "measurement",
            "definitions": "calmix's own, after Objective Information Theory (method section 3)",
            "budget": self.budget,
            "results": results,
        }


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and its 95 % interval; a single value has no interval."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return Interval(mean, None, None)
    from scipy.stats import t

    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def measure(
    specs: Sequence[str],
    opened: HasTokenizer,
    *,
    rows: int | None = None,
    length: int = 512,
    draws: int = 3,
    seed: int = 0,
    packing: str = "concat",
    perplexity: bool = True,
    sources: Mapping[str, Source] | Path | None = None,
    tick: Callable[[str], None] = lambda name: None,
) -> Measurement:
    """Measure sources, mixes and saved sets, all at the budget of `rows` x `length` tokens.

    Draw i uses seed + i; a saved set must have this size and is one draw. Coverage is of all specs
    pooled, mismatch is with the others pooled (same draw of each); both need at least two specs.

    Args:
        specs: sources, mixes, YAML files or saved folders, as for `resolve`.
        opened: the model; its tokenizer is enough without perplexity.
        rows: by default 32, or those of the first saved set.
        sources: the user's own, by name or as a YAML file.
        tick: called with the name of a spec after each of its draws.

    Raises:
        InputError: no or doubled specs, a number out of range, a saved set of another length.
        SourceError: a source is unknown, unreadable or too small.
    """
    rows = rows_of(specs, rows)
    draw: dict[str, Any] = {"rows": rows, "length": length, "packing": packing, "sources": sources}
    check_request(specs, draws=draws, perplexity=perplexity, seed=seed, **draw)
    if perplexity and not isinstance(opened, OpenModel):
        raise InputError("perplexity needs the model, not only its tokenizer")

    saved = {
        spec: CalibrationSet.open(path, opened)
        for spec in specs
        if (path := saved_set(spec)) is not None
    }
    values: dict[str, list[dict[str, float]]] = {spec: [] for spec in specs}
    for number in range(draws):
        sets = [
            saved.get(spec) or resolve(spec, opened, seed=seed + number, leakage="off", **draw)
            for spec in specs
        ]
        named = [(spec, drawn.ids.numpy()) for spec, drawn in zip(specs, sets, strict=True)]
        extras = compared(named, dict(named)) if len(named) > 1 else [{}]
        for spec, drawn, extra in zip(specs, sets, extras, strict=True):
            if number and spec in saved:
                continue
            values[spec].append(measure_set(drawn, opened, perplexity=perplexity) | extra)
            tick(spec)
    budget = {
        "rows": rows,
        "length": length,
        "tokens": rows * length,
        "draws": draws,
        "seed": seed,
        "packing": packing,
        "reference": "all others pooled" if len(specs) > 1 else None,
        "vocabulary": len(opened.tokenizer),
        "model": opened.name,
        "tokenizer": opened.tokenizer_fingerprint,
    }
    return Measurement(budget, values, dict.fromkeys(saved if draws > 1 else (), "saved: one draw"))


def rows_of(specs: Sequence[str], rows: int | None) -> int:
    """Return the rows of each sample, by default 32 or those of the first saved set."""
    if rows is None:
        saved = next((path for spec in specs if (path := saved_set(spec)) is not None), None)
        return 32 if saved is None else CalibrationSet.open(saved).rows
    return rows


def check_request(specs: Sequence[str], *, draws: int, perplexity: bool, **draw: Any) -> list[Path]:
    """Check a request to `measure`, without the model; return the user's files that it reads."""
    if isinstance(specs, str):
        raise InputError(f"'{specs}' is one name: give a list of them, ['{specs}']")
    if not specs:
        raise InputError("name at least one source to measure")
    if doubles := sorted({spec for spec in specs if list(specs).count(spec) > 1}):
        raise InputError(f"'{doubles[0]}' is named twice")
    options = checked(DrawOptions, draw | {"leakage": "off"})
    if draws < 1:
        raise InputError(f"--draws {draws}: must be 1 or more")
    if perplexity and options.length < 2:
        raise InputError(f"length {options.length} is too short to predict anything")
    files: list[Path] = []
    for spec in specs:
        if (path := saved_set(spec)) is None:
            files += parse_calibration(spec, **options.drawn()).files
            continue
        files.append(path)
        saved = CalibrationSet.open(path)
        if (saved.rows, saved.length) != (options.rows, options.length):
            raise InputError(
                f"calibration set {path} has {saved.rows} rows of {saved.length} tokens, not "
                f"{options.rows} of {options.length}: measure everything with --rows "
                f"{saved.rows} --length {saved.length}"
            )
    return files


COMPACT = {
    "docs": "scope_documents",
    "entropy": "entropy",
    "aggr.4": "aggregation_4",
    "cover.1": "coverage_1",
    "ppl": "distortion",
    "mismatch": "mismatch",
}


def table(measurement: Measurement) -> list[dict[str, str]]:
    """Return the metrics as records of text: up to four sources as columns with every metric, more
    as one record each with the metrics that distinguish sources best.
    """
    metrics_of = {name: measurement[name] for name in measurement.draws}
    if len(metrics_of) <= 4:
        keys = dict.fromkeys(key for metrics in metrics_of.values() for key in metrics)
        return [
            {"metric": key} | {name: str(one.get(key, "-")) for name, one in metrics_of.items()}
            for key in keys
        ]
    return [
        {"name": name} | {title: str(one.get(key, "-")) for title, key in COMPACT.items()}
        for name, one in metrics_of.items()
    ]
