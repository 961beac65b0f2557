"""Measure sources, mixes and saved sets at one token budget, over several seeded draws."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calmix.calibration.build import HasTokenizer, held_documents
from calmix.calibration.packing import Packing
from calmix.calibration.resolving import ask, resolve
from calmix.calibration.set import CalibrationSet, is_saved_set
from calmix.errors import InputError
from calmix.files import check_output_file, user_path, write_json, write_text
from calmix.information import metrics
from calmix.information.ngrams import Ids
from calmix.sources import Source

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
       2.052, 2.048, 2.045, 2.042)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """The mean of a metric over draws, with a 95 % interval of that mean (Student's t)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measured:
    """One source, mix or saved set: every metric of every draw.

    Attributes:
        name: what the user wrote.
        draws: for each draw, metric name to value; a metric without meaning there is absent.
        note: why there are fewer draws than asked for, if so.
    """

    name: str
    draws: tuple[dict[str, float], ...]
    note: str = ""

    @property
    def metrics(self) -> dict[str, Interval]:
        """Mean and interval of every metric over the draws."""
        return {key: interval([draw[key] for draw in self.draws]) for key in self.draws[0]}


@dataclass(frozen=True)
class Measurement:
    """What was measured and how.

    Attributes:
        budget: rows, length, tokens, draws, seed, packing, model and tokenizer.
        results: one entry a source.
    """

    budget: dict[str, Any]
    results: tuple[Measured, ...]

    def __getitem__(self, name: str) -> dict[str, Interval]:
        """Return the metrics of one source by name."""
        return next(result.metrics for result in self.results if result.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-serialisable value."""
        return {
            "kind": "measurement",
            "definitions": "calmix's own, after Objective Information Theory (method section 3)",
            "budget": self.budget,
            "results": [
                {
                    "name": result.name,
                    "note": result.note,
                    "metrics": {
                        key: {"mean": value.mean, "low": value.low, "high": value.high}
                        for key, value in result.metrics.items()
                    },
                    "draws": list(result.draws),
                }
                for result in self.results
            ],
        }

    def to_csv(self) -> str:
        """Return one line a source and metric: name, metric, mean, low, high, tokens, draws."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", "metric", "mean", "low", "high", "budget_tokens", "draws"])
        for result in self.results:
            for key, value in result.metrics.items():
                ends = ["" if end is None else repr(end) for end in (value.low, value.high)]
                count = len(result.draws)
                writer.writerow(
                    [result.name, key, repr(value.mean), *ends, self.budget["tokens"], count]
                )
        return text.getvalue()

    def save(self, path: Path | str) -> None:
        """Write to a `.json` or `.csv` file, all of it or nothing.

        Raises:
            InputError: another ending, or the file cannot be written.
        """
        path = Path(path)
        check_result_file(path)
        if path.suffix.lower() == ".csv":
            write_text(path, self.to_csv())
        else:
            write_json(path, self.to_dict())


def check_result_file(path: Path, inputs: Iterable[object] = ()) -> None:
    """Refuse a result file before any work is done.

    Raises:
        InputError: the ending is neither .json nor .csv, the path is or lies in one of the inputs,
            or no file can be written there.
    """
    if path.suffix.lower() not in (".json", ".csv"):
        raise InputError(f"cannot write results to {path}: name a .json or .csv file")
    check_output_file(path, inputs=inputs, overwrite=True)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and its 95 % interval; none for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    quantile = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.960
    half = quantile * spread / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def measure(
    specs: Sequence[str],
    opened: HasTokenizer,
    *,
    rows: int = 32,
    length: int = 512,
    draws: int = 3,
    seed: int = 0,
    packing: Packing = "concat",
    reference: str | None = None,
    perplexity: bool = True,
    own: Mapping[str, Source] | None = None,
    tick: Callable[[str], None] | None = None,
) -> Measurement:
    """Measure sources, mixes and saved sets, all at the budget of `rows` x `length` tokens.

    Draw i uses seed + i. A saved set is one draw; if it has more rows than asked, each draw is
    a seeded choice among them, with the documents of those rows (absent for a set saved before
    its manifest knew them). Coverage and mismatch compare with the other specs pooled (the
    same draw of each), or with `reference`; with neither they have no meaning and are absent.

    Args:
        specs: sources, mixes, YAML files or saved folders, as for `resolve`.
        opened: the model; its tokenizer alone will do without perplexity.
        rows, length, packing: the budget, and how rows are cut.
        draws: number of draws.
        seed: of the first draw.
        reference: a spec to compare with, drawn at the same budget.
        perplexity: whether to compute distortion, which needs the model.
        own: the user's own sources by name.
        tick: called with the name of a spec after each of its draws.

    Raises:
        InputError: no or doubled specs, a non-positive number, a saved set of another length.
        SourceError: a source is unknown, unreadable or too small.
    """
    check_request(
        specs, rows=rows, length=length, draws=draws, seed=seed, packing=packing,
        reference=reference, perplexity=perplexity, own=own,
    )  # fmt: skip
    if perplexity and not hasattr(opened, "model"):
        raise InputError("perplexity needs the model, not its tokenizer alone")

    def drawn(spec: str, number: int) -> CalibrationSet:
        path = user_path(spec)
        if is_saved_set(path):
            return _part(CalibrationSet.open(path, opened), rows, seed + number)
        return resolve(
            spec, opened, rows=rows, length=length, seed=seed + number, packing=packing,
            leakage="off", own=own,
        )  # fmt: skip

    vocabulary = len(opened.tokenizer)
    whole = {spec for spec in specs if _is_whole(user_path(spec), rows)}
    found: dict[str, list[dict[str, float]]] = {spec: [] for spec in specs}
    for number in range(draws):
        sets = [drawn(spec, number) for spec in specs]
        ids = [made.ids.numpy() for made in sets]
        target = drawn(reference, number).ids.numpy() if reference is not None else None
        compared = _compared(ids, target)
        for spec, made, extra in zip(specs, sets, compared, strict=True):
            if number and spec in whole:
                continue
            found[spec].append(measure_set(made, opened, perplexity=perplexity) | extra)
            if tick is not None:
                tick(spec)
    notes = {spec: "a saved set of just this size: one draw" for spec in whole if draws > 1}
    budget = {
        "rows": rows,
        "length": length,
        "tokens": rows * length,
        "draws": draws,
        "seed": seed,
        "packing": packing,
        "reference": reference or ("all others pooled" if len(specs) > 1 else None),
        "vocabulary": vocabulary,
        "model": getattr(opened, "name", None),
        "tokenizer": opened.tokenizer_fingerprint,
    }
    return Measurement(
        budget,
        tuple(Measured(spec, tuple(found[spec]), notes.get(spec, "")) for spec in specs),
    )


def check_request(
    specs: Sequence[str],
    *,
    rows: int,
    length: int,
    draws: int,
    seed: int,
    packing: str,
    reference: str | None,
    perplexity: bool,
    own: Mapping[str, Source] | None,
) -> list[Path | None]:
    """Check what `measure` is asked for, without the model; return the files that are read.

    Raises:
        InputError, SourceError: as `measure`.
    """
    if not specs:
        raise InputError("name at least one source to measure")
    doubles = sorted({spec for spec in specs if list(specs).count(spec) > 1})
    if doubles:
        raise InputError(f"'{doubles[0]}' is named twice")
    if draws < 1 or rows < 1 or length < 1:
        raise InputError(f"rows, length and draws must be positive, not {rows}, {length}, {draws}")
    if perplexity and length < 2:
        raise InputError(f"length {length} is too short to predict anything")
    if seed < 0:
        raise InputError(f"seed {seed} is negative")
    files: list[Path | None] = []
    for spec in (*specs, *([] if reference is None else [reference])):
        path = user_path(spec)
        if is_saved_set(path):
            files.append(path)
            held = CalibrationSet.open(path)
            if held.length != length or held.rows < rows:
                raise InputError(
                    f"calibration set {path} has {held.rows} rows of {held.length} tokens, not "
                    f"{rows} of {length}: measure everything with --rows {min(rows, held.rows)} "
                    f"--length {held.length}"
                )
        else:
            made = ask(spec, own=own, rows=rows, length=length, packing=packing, leakage="off")
            files += made.files
    return files


def measure_set(
    made: CalibrationSet, opened: HasTokenizer, *, perplexity: bool = True
) -> dict[str, float]:
    """Return every metric that needs one calibration set alone, by name.

    Args:
        made: the set.
        opened: the model; its tokenizer alone will do without perplexity.
        perplexity: whether to compute distortion, which needs the model.
    """
    values = metrics.of_ids(made.ids.numpy(), len(opened.tokenizer)) | _of_manifest(made.manifest)
    values["bytes"] = text_bytes(opened.tokenizer, made.ids.numpy())
    return values | distortion(opened, made) if perplexity else values


def _is_whole(path: Path, rows: int) -> bool:
    return is_saved_set(path) and CalibrationSet.open(path).rows == rows


def _part(found: CalibrationSet, rows: int, seed: int) -> CalibrationSet:
    if found.rows == rows:
        return found
    chosen = np.sort(np.random.default_rng(seed).permutation(found.rows)[:rows]).tolist()
    manifest = {**found.manifest, "sources": _documents_of(found, chosen)}
    return CalibrationSet(found.ids[chosen], tuple(found.sources[i] for i in chosen), manifest)


def _documents_of(found: CalibrationSet, rows: Sequence[int]) -> dict[str, Any]:
    """Return the documents some rows hold text of, by source; nothing for a set saved before
    the manifest told them apart.
    """
    documents = {}
    for name, described in found.manifest.get("sources", {}).items():
        if "spans" not in described:
            return {}
        own = [row for row, source in enumerate(found.sources) if source == name]
        spans = dict(zip(own, described["spans"], strict=True))
        held = held_documents(spans[row] for row in rows if row in spans)
        documents[name] = {
            "drawn": [described["drawn"][document] for document in held],
            "drawn_tokens": sum(described["lengths"][document] for document in held),
        }
    return documents


def _compared(sets: list[Ids], target: Ids | None) -> list[dict[str, float]]:
    """Return coverage and mismatch of every set: against the target, or against the others."""
    if target is None and len(sets) < 2:
        return [{}]
    found: list[dict[str, float]] = [{} for _ in sets]
    reference = None if target is None else [target]
    for n in metrics.ORDERS:
        for values, share in zip(found, metrics.coverage(sets, n, reference), strict=True):
            values[f"coverage_{n}"] = share
    for number, (values, ids) in enumerate(zip(found, sets, strict=True)):
        others = reference or [other for at, other in enumerate(sets) if at != number]
        values["mismatch"] = metrics.mismatch(ids, others)
    return found


def _of_manifest(manifest: dict[str, Any]) -> dict[str, float]:
    described = [source for source in manifest.get("sources", {}).values() if "drawn" in source]
    if not described:  # text that was drawn from no documents
        return {}
    documents = sum(len(source["drawn"]) for source in described)
    tokens = sum(source["drawn_tokens"] for source in described)
    return {"scope_documents": documents, "granularity": tokens / max(1, documents)}


def text_bytes(tokenizer: Any, ids: Ids) -> int:
    """Return the UTF-8 bytes of the text of rows of ids, special tokens included.

    A row that begins or ends within a character counts a replacement character there.
    """
    return sum(
        len(text.encode())
        for text in tokenizer.batch_decode(ids.tolist(), skip_special_tokens=False)
    )


def distortion(opened: Any, made: CalibrationSet) -> dict[str, float]:
    """Return distortion, the model's own perplexity on a set, and its bits per byte, by name."""
    from calmix.capability.likelihood import row_nll

    nll = float(row_nll(opened.model, made.ids).double().sum())
    return {
        "distortion": metrics.distortion(nll, made.rows * (made.length - 1)),
        "bits_per_byte": metrics.bits_per_byte(
            nll, text_bytes(opened.tokenizer, made.ids[:, 1:].numpy())
        ),
    }


def table(measurement: Measurement) -> list[dict[str, str]]:
    """Return the metrics as records of text for a table.

    Up to four sources stand side by side with every metric; of more, each is one record with
    the metrics that tell sources apart best.
    """
    if len(measurement.results) <= 4:
        keys = dict.fromkeys(key for result in measurement.results for key in result.metrics)
        return [
            {"metric": key}
            | {result.name: _shown(result.metrics.get(key)) for result in measurement.results}
            for key in keys
        ]
    return [
        {"name": result.name}
        | {title: _shown(result.metrics.get(key)) for title, key in COMPACT.items()}
        for result in measurement.results
    ]


COMPACT = {
    "docs": "scope_documents",
    "entropy": "entropy",
    "aggr.4": "aggregation_4",
    "cover.1": "coverage_1",
    "ppl": "distortion",
    "mismatch": "mismatch",
}


def _shown(value: Interval | None) -> str:
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{value.mean:.4g}"
    half = (value.high - value.low) / 2
    return f"{value.mean:.4g}" + (f"±{half:.2g}" if half > 0 else "")
