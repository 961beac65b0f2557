"""From a user's request to a calibration set: sampled, written by the model, or saved on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calmix.calibration.build import build, hashed, rows_per_source
from calmix.calibration.dataset import CalibrationSet, saved_set
from calmix.calibration.leakage import guard_of, guarded_suites
from calmix.calibration.selfgen.generators import GENERATORS, Generator, Prompted, generate
from calmix.calibration.selfgen.prompts import chat_turns, count_turns, load_prompts
from calmix.calibration.tokenizer import HasTokenizer
from calmix.errors import InputError
from calmix.files import content_sha256, sha256_json, user_path
from calmix.models.loading import check_length
from calmix.models.opening import OpenModel
from calmix.options import DrawOptions, Strategy, checked, named_options
from calmix.sources.licences import allowed, refuse
from calmix.sources.local import LocalFile
from calmix.sources.mixes import MIXES, OFFLINE, Mix, parse_mix
from calmix.sources.registry import (
    Source,
    get_source,
    local_file,
    offline_sources,
    own_sources,
)

# Manifest entries of written text that do not apply to a mix with other text.
OF_TEXT = ("generated", "settings", "pieces", "perplexity", "temperature", "aggregation_4", "J")
CHATLESS = (
    "has no row in this model's chat format, which can cost it answers: add a share of chats, such "
    "as chat:0.25 beside the others"
)
UNWRITABLE = (
    "this model's chat template has no token that ends a turn, or none before the first, so calmix "
    "cannot write chats. A set without chats can cost it answers: add your own (rows with "
    "'messages')"
)


@dataclass(frozen=True)
class CalibrationRequest:
    """A request for a calibration set, checked as far as possible without its model.

    Attributes:
        mix: sources and generators with their shares; empty for one generator, or a saved set.
        generator: the generator of all the text, if there is one.
        saved: the set, if it is saved in a folder.
        own: the user's own sources by name.
        draw: how it is sampled or written; for a saved set only `rows` and `length`.
        files: the user's own files and folders it is made from.
        text: the request as it was written.
    """

    mix: Mix
    generator: Generator | None = None
    saved: CalibrationSet | None = None
    own: dict[str, Source] = field(default_factory=dict)
    draw: DrawOptions = field(default_factory=DrawOptions)
    files: list[Path] = field(default_factory=list)
    text: str = field(default="", compare=False)

    @property
    def written(self) -> dict[str, Generator]:
        """The generators by name; in a mix chats have their own share."""
        if self.generator is not None:
            return {self.generator.name: self.generator}
        settings: dict[str, dict[str, Any]] = {
            "self-written": {"chat": 0},
            "prompts": {"file": self.draw.prompts},
        }
        names = [name for name in self.mix if name not in self.sources]
        return {name: GENERATORS[name](**settings.get(name, {})) for name in names}

    @property
    def sources(self) -> list[str]:
        """The names of the sources with a share in the mix."""
        return [name for name in self.mix if name in self.own or name not in GENERATORS]

    @property
    def strategy(self) -> Strategy:
        """How the set is made; a source with chats beside it is a mix."""
        method: Any = None if self.generator is None else self.generator.name
        names, written = list(self.mix), self.written
        if self.saved is not None:
            manifest = self.saved.manifest
            method, names, written = (
                manifest.get("generated"),
                manifest["names"],
                manifest.get("written", {}),
            )
        if method == "chat" or not (method or set(names) - written.keys()):
            return "self-written"
        return method or ("mix" if len(names) > 1 else "single")

    def record(self) -> dict[str, Any]:
        """Return the request as the set that it gave records it."""
        record = {
            "calibration": self.text,
            **self.draw.model_dump(mode="json", exclude={"sources"}),
        }
        if self.files:
            record["files"] = sha256_json([content_sha256(path) for path in self.files])
        return record


def _generator(text: str, own: Mapping[str, Source]) -> Generator | None:
    """Return the generator that writes all of the text, with its settings, if one is named."""
    first = text.partition(",")[0].strip()
    if first not in GENERATORS or first in own:
        return None
    name, options = named_options("calibration", text)
    try:
        return checked(GENERATORS[name], options)
    except InputError as error:
        raise InputError(f"calibration '{text}': {error}") from error


def _grouped(mix: Mix, own: Mapping[str, Source], text: str, wanted: str | None) -> Mix:
    """Replace each named mix by its members, with only allowed licences in `offline`."""
    offline = [n for n, one in offline_sources().items() if allowed(one.licence, wanted)]
    known = MIXES | {OFFLINE: dict.fromkeys(offline, 1.0)}
    weights: dict[str, float] = {}
    for name, weight in mix.items():
        members = {name: 1.0} if name in own else known.get(name, {name: 1.0})
        for member, share in members.items():
            if member in weights or (member in mix and member != name):
                raise InputError(f"calibration '{text}' names '{member}' twice: {name} has it")
            weights[member] = weight * share / sum(members.values())
    return weights


def parse_calibration(text: str, **options: Any) -> CalibrationRequest:
    """Check a request for a calibration set, before a model is opened or text fetched. Text and
    options are as for `calibration_set`."""
    settings = checked(DrawOptions, options).drawn()
    own = own_sources(settings.pop("sources", None))
    if (path := saved_set(text)) is not None:
        saved = _saved(path, settings)
        size = DrawOptions(rows=saved.rows, length=saved.length)
        return CalibrationRequest({}, saved=saved, draw=size, files=[path], text=text)
    generator = _generator(text, own)
    mix = parse_mix(text) if generator is None else {}
    draw = DrawOptions(**settings)
    if draw.leakage != "off":
        guarded_suites(draw.leakage)
    if generator is not None and draw.packing != DrawOptions().packing:
        raise InputError(f"'packing' has no effect with {generator.name}: leave it out")
    if isinstance(generator, Prompted):
        generator = generator.model_copy(update={"file": draw.prompts})
    files: list[Path] = []
    request = CalibrationRequest(
        _grouped(mix, own, text, draw.licence), generator, None, own, draw, files, text
    )
    generators = request.written.values()
    for name in [*request.sources, *(name for one in generators for name in one.sources)]:
        source = get_source(name, own)
        refuse(name, source.licence, draw.licence)
        files += source.check()
    for path in (getattr(one, "prompts", None) for one in generators):
        if path is not None:
            load_prompts(path)  # an error is told now
            files.append(path)
    prompted = [one for one in generators if isinstance(one, Prompted)]
    for one in prompted:
        one.half()
    if draw.prompts is not None:
        if not prompted:
            raise InputError(
                "--prompts needs a share of the source 'prompts' in the calibration text, such as "
                "prompts:0.25,stories:0.75"
            )
        files.append(local_file(str(draw.prompts)).path)
    return request


def calibration_set(
    request: CalibrationRequest | str,
    opened: HasTokenizer,
    *,
    tick: Callable[[str], None] = lambda name: None,
    writing: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
    **options: Any,
) -> CalibrationSet:
    """Return the calibration set that a user requests, newly made or read from a folder.

    Args:
        request: checked by `parse_calibration`, or its text: a source's name or path,
            `a:0.5,b:0.5`, `uniform:a,b`, the folder of a saved set, or `self-written`, `chat`,
            `prompts`, `igsp`, `self-cal` or `sgs`, with options after commas. Without options
            these can have a share in a mix: `chat:0.5,news:0.5`.
        opened: the model; its tokenizer is enough if the model does not write the text.
        tick: called with the name of each source once it is sampled.
        writing: called with what the model writes, tokens done and tokens in total.
        note: called with a line the user should see.
        **options: of a text, those of `DrawOptions`. `sources` can also be `Source` objects by
            name.

    Raises:
        InputError: the text cannot be used, an option has no effect or contradicts a saved set.
        SourceError: a source is unknown, unreadable, too small, or leaks.
    """
    if isinstance(request, str):
        request = parse_calibration(request, **options)
    check_length(request.draw.length, opened.context)
    if request.saved is not None:
        drawn = CalibrationSet.open(user_path(request.text), opened)
    else:
        drawn = _make(request, opened, tick, writing=writing, note=note)
        drawn.manifest["request"] = request.record()
    if note is not None:
        for name in request.mix:
            if name not in drawn.sources:
                note(f"{name} gets no rows: its share of {drawn.rows} rows rounds to zero")
        for name in request.sources:
            reader = get_source(name, request.own).reader
            if isinstance(reader, LocalFile) and (left := reader.files()[1]):
                note(f"{name}: not read: {left}")
        turns = count_turns(drawn.ids, opened.tokenizer)
        if turns == 0:
            note(f"warning: {request.text} {CHATLESS}")
        elif turns is None and getattr(opened.tokenizer, "chat_template", None):
            note(f"warning: {UNWRITABLE}")
    return drawn


def _make(
    request: CalibrationRequest, opened: HasTokenizer, tick: Callable[[str], None], **calls: Any
) -> CalibrationSet:
    """Sample or write a requested set; `calls` are `writing` and `note`."""
    draw, rows, guard = request.draw, request.draw.rows, guard_of(request.draw.leakage)
    common: dict[str, Any] = {"length": draw.length, "seed": draw.seed, "guard": guard}
    common["own"] = request.own
    if request.generator is None:
        counts, generators = rows_per_source(request.mix, rows), request.written
    else:
        share = getattr(request.generator, "chat", 0.0) if chat_turns(opened.tokenizer) else 0.0
        counts = rows_per_source({"own": 1 - share, "chat": share}, rows)
        chats = GENERATORS["chat"](batch=request.generator.batch)
        generators = {"own": request.generator, "chat": chats}
    parts: dict[str, CalibrationSet] = {}
    if drawn := sum(counts[name] for name in request.sources):
        mix = request.mix
        if request.written:
            mix = {name: counts[name] / drawn for name in request.sources if counts[name]}
        parts["own"] = build(
            mix,
            opened,
            rows=drawn,
            packing=draw.packing,
            tick=tick,
            **common,
        )
    for name, generator in generators.items():
        if counts[name]:
            if not isinstance(opened, OpenModel):
                raise InputError(f"{generator.name} needs the model, not only its tokenizer")
            parts[name] = generate(generator, opened, rows=counts[name], **calls, **common)
    joined = _together(parts, request)
    if (turns := count_turns(joined.ids, opened.tokenizer)) is not None:
        joined.manifest["chat_turns"] = turns
    return joined


def _together(parts: Mapping[str, CalibrationSet], request: CalibrationRequest) -> CalibrationSet:
    """Join the parts of a set, shuffled; the rows of each part keep their order."""
    each = list(parts.values())
    if len(each) == 1 and (request.generator is not None or not request.written):
        return each[0]
    first, last = each[0].manifest, each[-1].manifest
    if request.generator is None:
        first = {key: value for key, value in first.items() if key not in OF_TEXT}
        first["mix"] = request.mix
    owner = np.repeat(list(parts), [part.rows for part in each])
    owner = np.random.default_rng(request.draw.seed).permutation(owner)
    left = {name: zip(part.ids, part.sources, strict=True) for name, part in parts.items()}
    rows = [(name, *next(left[name])) for name in owner.tolist()]
    manifest = first | {
        "model": last["model"],
        "rows": len(rows),
        "leakage": last["leakage"],
        "written": {name: part.manifest for name, part in parts.items() if name != "own"},
    }
    names = tuple(source if name == "own" else name for name, _, source in rows)
    return hashed(torch.stack([ids for _, ids, _ in rows]), names, manifest)


def _saved(path: Path, settings: dict[str, Any]) -> CalibrationSet:
    """Return the set in a folder; InputError if it does not fit the given options."""
    saved, licence = CalibrationSet.open(path), settings.pop("licence", None)
    has = dict(saved.manifest)
    parts = [has, *(has.get("written") or {}).values()]
    licences = {
        name: source.get("licence", "unstated")
        for part in parts
        for kind in ("own", "sources")
        for name, source in (part.get(kind) or {}).items()
    }
    seeds = filter(None, ((part.get("settings") or {}).get("seeds") for part in parts))
    names = [*licences, *(name for one in seeds for name in MIXES.get(one, [one]))]
    for name in names if licence else ():
        refuse(name, licences.get(name) or get_source(name).licence, licence)
    if isinstance(guard := has.get("leakage"), dict):
        has["leakage"] = guard["suite"]
    for key, value in settings.items():
        if has.get(key) != value:
            raise InputError(
                f"calibration set {path} has {key} {has.get(key)}, not {value}: leave "
                f"--{key.replace('_', '-')} out, or make another set"
            )
    return saved
