"""From the name of a method of self-generation to a calibration set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from calmix.calibration.build import begin_token, check_request, model_record, own_record
from calmix.calibration.leakage import Guard
from calmix.calibration.selfgen import igsp, self_cal, sgs
from calmix.calibration.selfgen.made import ANOTHER, ROUNDS, Made
from calmix.calibration.selfgen.openers import STARTS, Start, load_openers, tokenised
from calmix.calibration.selfgen.sampling import Sampling
from calmix.calibration.selfgen.writing import Request, Written, write
from calmix.calibration.set import CalibrationSet
from calmix.errors import InputError, nearest
from calmix.files import sha256_json
from calmix.information.metrics import aggregation
from calmix.models import OpenModel
from calmix.sources import Source, get_source
from calmix.sources.registry import documents_hash

METHODS: dict[str, dict[str, Any]] = {
    igsp.NAME: igsp.DEFAULTS,
    self_cal.NAME: self_cal.DEFAULTS,
    sgs.NAME: sgs.DEFAULTS,
}
CHECKS: dict[str, Callable[..., None]] = {igsp.NAME: igsp.check, sgs.NAME: sgs.check}
SAMPLED = [field.name for field in fields(Sampling)]


class Options(BaseModel):
    """What a user can set of the methods; None is the method's default."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    openers: Path | None = None
    seeds: str | None = None
    start: Start | None = None
    temperature: float | None = None
    start_temperature: float | None = None
    ramp: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    drop: float | None = None
    candidates: float | None = None
    lambda_: float | None = Field(default=None, alias="lambda")
    piece: int | None = None
    band: float | None = None
    repeats: float | None = None


Writing = Callable[[str, int, int], None]


def settings(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's settings: its defaults, and what is given.

    Raises:
        InputError: unknown method or start, an option the method has no use for, or a value out of
            range.
    """
    if method not in METHODS:
        raise InputError(f"unknown method '{method}': {nearest(method, METHODS)}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in METHODS[method]:
            shown = name.rstrip("_").replace("_", "-")
            raise InputError(f"--{shown} has no effect with {method}: leave it out")
    if given.get("start", "auto") not in STARTS:
        raise InputError(f"unknown start '{given['start']}': {nearest(given['start'], STARTS)}")
    chosen = METHODS[method] | given
    Sampling(**{name: chosen[name] for name in SAMPLED if name in chosen})
    if method in CHECKS:
        CHECKS[method](**chosen)
    return chosen


def check_generation(
    method: str,
    *,
    rows: int,
    length: int,
    seed: int,
    batch: int | None = None,
    own: Mapping[str, Source] | None = None,
    context: int | None = None,
    **options: Any,
) -> list[Path | None]:
    """Check what `generate` is asked for, without the model; return the files that are read.

    Raises:
        InputError, SourceError: as `generate`.
    """
    settings(method, options)
    check_request(rows, length, "concat", "random", context)
    if seed < 0:
        raise InputError(f"seed {seed} is negative")
    if batch is not None and batch < 1:
        raise InputError(f"--batch {batch} is not positive")
    files = [options.get("openers")]
    if files[0] is not None:
        load_openers(files[0])
    if (name := options.get("seeds")) is not None:
        source = get_source(name, own)
        source.check()
        files.append(getattr(source.reader, "path", None))
    return files


def generate(
    method: str,
    opened: OpenModel,
    *,
    rows: int,
    length: int,
    seed: int = 0,
    guard: Guard | None = None,
    own: Mapping[str, Source] | None = None,
    batch: int | None = None,
    writing: Writing | None = None,
    note: Callable[[str], None] | None = None,
    **options: Any,
) -> CalibrationSet:
    """Make a calibration set of text the model writes itself.

    Args:
        method: `igsp`, `self-cal` or `sgs`.
        opened: the model, with its own (dense) weights.
        rows, length: size of the set; every row is full.
        seed: decides every token, for one batch size in half types (see `write`).
        guard: refuses text that shares a run of tokens with an item of a suite.
        own: the user's own sources by name, for SGS's seed texts.
        batch: rows written at a time.
        writing: called with what is being written, tokens done and tokens in all.
        note: called with a line the user should see.
        **options: the method's settings; None for its default.

    Raises:
        InputError: unknown method or setting, a value out of range, a tokenizer without what the
            method needs, or a model that writes nothing.
        SourceError: SGS's source of seed texts is unknown or unreadable.
    """
    check_generation(
        method, rows=rows, length=length, seed=seed, batch=batch, own=own,
        context=opened.context, **options,
    )  # fmt: skip
    chosen = settings(method, options)

    def writer(request: Request, label: str) -> Written:
        total, done = len(request.openers) * request.length, 0

        def tick(tokens: int) -> None:
            nonlocal done
            done += tokens
            if writing is not None:
                writing(label, done, total)

        return write(opened, request, batch=batch, tick=tick, note=note)

    tokenizer = opened.tokenizer
    asked: dict[str, Any] = {"rows": rows, "length": length, "seed": seed}
    if method == igsp.NAME:
        openers = load_openers(chosen.pop("openers"))
        made = igsp.igsp(
            writer, tokenised(openers, tokenizer), **asked, **chosen,
            accept=None if guard is None else lambda ids: _accepted(guard, method, ids),
        )  # fmt: skip
        chosen |= {"openers": openers.name, "openers_sha256": openers.sha256}
    elif method == sgs.NAME:
        name = chosen.pop("seeds")
        made, drawn = _seeded(writer, opened, name, guard, own, asked, chosen)
        chosen |= {"seeds": name, "seeds_sha256": drawn}
    else:
        made = _without_leaks(
            lambda count, number: self_cal.self_cal(
                writer, tokenizer, rows=count, length=length, seed=number, **chosen
            ),
            rows, seed, guard, method,
        )  # fmt: skip
    manifest = {
        "kind": "calibration set",
        "generated": method,
        "settings": {name.rstrip("_"): value for name, value in sorted(chosen.items())},
        "model": model_record(opened),
        **({} if batch is None else {"batch": batch}),
        "own": own_record(own, [chosen["seeds"]] if "seeds" in chosen else []),
        **asked,
        "begin_token": begin_token(tokenizer),
        "tokenizer": opened.tokenizer_fingerprint,
        "leakage": "off" if guard is None else guard.report(),
        "aggregation_4": aggregation(made.ids.numpy(), 4),
        **made.record,
    }
    result = CalibrationSet(made.ids, made.tags, manifest)
    manifest["sha256"] = result.sha256
    return result


def _accepted(guard: Guard, name: str, ids: Tensor) -> list[bool]:
    return [guard.passes(name, str(i), row) for i, row in enumerate(ids.tolist())]


def _without_leaks(
    make: Callable[[int, int], Made], rows: int, seed: int, guard: Guard | None, name: str
) -> Made:
    """Make rows, and others in place of those the guard refuses."""
    made = make(rows, seed)
    if guard is None:
        return made
    ids, record = made.ids[torch.tensor(_accepted(guard, name, made.ids))], made.record
    for number in range(1, ROUNDS):
        if len(ids) == rows:
            return Made(ids, made.tags, record)
        more = make(rows - len(ids), seed + number * ANOTHER)
        ids = torch.cat([ids, more.ids[torch.tensor(_accepted(guard, name, more.ids))]])
    if len(ids) < rows:
        raise InputError(
            f"most rows of {name} share {guard.index.n} tokens in a row with items of suite "
            f"{guard.suite}: the model recites them; --leakage off to use such rows"
        )
    return Made(ids, made.tags, record)


def _seeded(
    writer: Any,
    opened: OpenModel,
    name: str,
    guard: Guard | None,
    own: Mapping[str, Source] | None,
    asked: dict[str, Any],
    chosen: dict[str, Any],
) -> tuple[Made, str]:
    """Run SGS on a source's documents in seeded order; return it with their hash."""
    documents = list(get_source(name, own).documents())
    order = np.random.default_rng(asked["seed"]).permutation(len(documents))
    texts = [documents[i].text for i in order]

    def accept(ids: list[int]) -> bool:
        return guard is None or guard.passes(sgs.NAME, str(guard.checked[sgs.NAME]), ids)

    made = sgs.sgs(writer, opened.tokenizer, documents=texts, accept=accept, **asked, **chosen)
    return made, sha256_json(documents_hash(documents))
