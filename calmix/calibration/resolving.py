"""From what a user writes to a calibration set: drawn, written by the model, or read from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from calmix.calibration.build import Mix, Packing, build, make_mix, parse_mix, rows_per_source
from calmix.calibration.dataset import CalibrationSet, is_saved_set
from calmix.calibration.leakage import TOKENS, guard_of, guarded_suites
from calmix.calibration.selfgen.generators import (
    GENERATORS,
    WITHOUT_CHATS,
    Chat,
    Generator,
    generate,
)
from calmix.calibration.selfgen.prompts import chat_turns, count_turns
from calmix.calibration.tokenizer import HasTokenizer, check_length
from calmix.errors import InputError, nearest
from calmix.files import user_path
from calmix.models import OpenModel
from calmix.options import DrawOptions, checked, named_options
from calmix.sources import Source, get_source, offline_sources, own_sources
from calmix.sources.licences import allowed, check_licence, refuse
from calmix.sources.readers import LocalFile
from calmix.sources.registry import MIXES, parse_sources
from calmix.yaml_files import parse_model, read_text

YAML = (".yaml", ".yml")
GROUP = "offline"  # in a mix: every builtin source that needs no hub
# Of the manifest of written text, what does not hold for a mix that it is a part of.
OF_TEXT = ("generated", "settings", "pieces", "perplexity", "temperature", "aggregation_4", "J")
CHATLESS = (
    "has no row in this model's chat format, and a model pruned on it forgets how to answer: give "
    "chats a share, such as chat:0.25 beside the others"
)
UNWRITABLE = (
    "calmix finds no token that ends a turn in this model's template, so it writes no chats. "
    "A model pruned without them forgets how to answer: give your own (rows with 'messages')"
)


class SpecFile(DrawOptions):
    """A YAML file that describes a calibration set; options on the command line come first.

    Exactly one of `mix` (a mapping of weights, or text as on the command line), `uniform` (a
    list of names) and `generate` (a generator, with its settings in `options`). `sources`
    describes the user's own, as in a file of sources.
    """

    mix: dict[str, float] | str | None = None
    uniform: list[str] | None = None
    generate: str | None = None
    options: dict[str, Any] = Field(default={})
    sources: dict[str, Any] = Field(default={})


@dataclass(frozen=True)
class Spec:
    """A parsed specification: a mix of sources, or a generator, and what its file says.

    Attributes:
        mix: empty if the model writes the text.
        own: the user's own sources.
        fixed: the options of the draw that the file gives.
        generator: how the model writes the text; None for a mix.
    """

    mix: Mix
    own: dict[str, Source] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    generator: Generator | None = None

    @property
    def written(self) -> dict[str, Generator]:
        """The generators that have a share in the mix, by name; chats have a share of their own."""
        names = [name for name in self.mix.weights if name in GENERATORS and name not in self.own]
        return {n: WITHOUT_CHATS if n == "self-written" else GENERATORS[n]() for n in names}

    @property
    def sources(self) -> list[str]:
        """The names of the sources that have a share in the mix."""
        return [name for name in self.mix.weights if name not in self.written]

    @property
    def generate(self) -> str | None:
        """The generator's name."""
        return None if self.generator is None else self.generator.name


def parse_spec(
    text: str, own: Mapping[str, Source] | None = None, licence: str | None = None
) -> Spec:
    """Parse `name`, `a:0.5,b:0.5`, `uniform:a,b`, `self-written,temperature=0.8` or a YAML path.

    Among the names, those of `MIXES` stand for their sources, and `offline` for every builtin
    source that needs no hub.
    """
    check_licence(licence)
    spec = _parsed(text, dict(own or {}))
    named = spec.fixed.pop("licence", None)
    for name in [] if spec.generator is None else spec.generator.sources:
        refuse(name, get_source(name, spec.own).licence, licence or named)
    return replace(spec, mix=_grouped(spec.mix, spec.own, text, licence or named))


def _parsed(text: str, known: dict[str, Source]) -> Spec:
    mix, fixed, generator = Mix({}), {}, None
    path = user_path(text)
    if text.partition(",")[0].strip() in GENERATORS:
        generator = read_generator(*named_options("calibration", text), f"calibration '{text}'")
    elif path.suffix.lower() not in YAML:
        mix = parse_mix(text)
    else:
        file = parse_model(SpecFile, read_text(path), str(path))
        if sum(part is not None for part in (file.mix, file.uniform, file.generate)) != 1:
            raise InputError(
                f"{path}: give exactly one of 'mix' (names with weights), 'uniform' (names) and "
                f"'generate' ({', '.join(GENERATORS)})"
            )
        if file.generate is not None:
            generator = read_generator(file.generate, file.options, str(path))
        elif file.options:
            raise InputError(f"{path}: 'options' are those of 'generate'")
        elif isinstance(file.mix, dict):
            mix = make_mix(file.mix, str(path))
        else:
            mix = parse_mix(file.mix or "uniform:" + ",".join(file.uniform or ()))
        known |= parse_sources(file.sources, path)
        fixed = {key: value for key, value in file.drawn().items() if key != "sources"}
    return Spec(mix, known, fixed, generator)


def read_generator(name: str, options: Mapping[str, Any], where: str) -> Generator:
    """Return a generator with its settings."""
    if name not in GENERATORS:
        raise InputError(f"unknown generator '{name}': {nearest(name, GENERATORS)}")
    try:
        return checked(GENERATORS[name], options)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _grouped(mix: Mix, own: Mapping[str, Source], text: str, wanted: str | None) -> Mix:
    """Put the members in the place of a named mix, and refuse what the licence leaves out."""
    weights: dict[str, float] = {}
    for name, weight in mix.weights.items():
        members = {name: 1.0} if name in own else MIXES.get(name, {name: 1.0})
        if name == GROUP and name not in own:
            held = offline_sources()
            members = {one: 1.0 for one in held if allowed(held[one].licence, wanted)}
        for member, share in members.items():
            if wanted is not None and (member not in GENERATORS or member in own):
                refuse(member, get_source(member, own).licence, wanted)
            if member in weights or (member in mix.weights and member != name):
                raise InputError(f"calibration '{text}' names '{member}' twice: {name} holds it")
            weights[member] = weight * share / sum(members.values())
    return mix if list(weights) == list(mix.weights) else Mix(weights)


@dataclass(frozen=True)
class Asked:
    """A calibration set that is asked for, checked as far as that goes without its model.

    Attributes:
        saved: the set, if it lies in a folder already.
        spec: what it is made from otherwise.
        draw: how it is drawn or written; of a saved set `rows` and `length` alone.
        files: the user's own files and folders it is made from.
    """

    saved: CalibrationSet | None
    spec: Spec
    draw: DrawOptions
    files: list[Path]

    @property
    def runs_model(self) -> bool:
        """Whether making it takes the model, and not its tokenizer alone."""
        return self.spec.generator is not None or bool(self.spec.written)


def ask(text: str, *, context: int | None = None, **options: Any) -> Asked:
    """Check what a user asks for as a calibration set, before a model is opened or text fetched.

    Args:
        context: of the model, in tokens, where it is known.
        text, **options: as for `resolve`.
    """
    given = checked(DrawOptions, options).drawn()
    own, licence = own_sources(given.pop("sources", None)), given.pop("licence", None)
    path = user_path(text)
    if is_saved_set(path):
        found = _saved(path, given, licence)
        check_length(found.length, context)
        size = DrawOptions(rows=found.rows, length=found.length)
        return Asked(found, Spec(Mix({})), size, [path])
    spec = parse_spec(text, own, licence)
    draw = DrawOptions(**(spec.fixed | given))
    check_length(draw.length, context)
    if draw.leakage != "off":
        guarded_suites(draw.leakage)
    files = [path] if path.suffix.lower() in YAML else []
    if spec.generator is not None:
        if draw.packing != DrawOptions().packing:
            raise InputError(f"'packing' has no effect with {spec.generate}: leave it out")
        files += spec.generator.check(spec.own)
    for name in spec.sources:
        files += get_source(name, spec.own).check()
    for generator in spec.written.values():
        files += generator.check(spec.own)
    return Asked(None, spec, draw, files)


def resolve(
    text: str,
    opened: HasTokenizer,
    *,
    tick: Callable[[str], None] | None = None,
    writing: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
    **options: Any,
) -> CalibrationSet:
    """Return the calibration set a user asks for: drawn anew, or read from a saved folder.

    Args:
        text: a source's name or path, `a:0.5,b:0.5`, `uniform:a,b`, a YAML file, the folder of a
            saved set, or `self-written`, `chat`, `igsp`, `self-cal` or `sgs`, with options behind
            commas. Of these, those without options may have a share in a mix: `chat:0.5,news:0.5`.
        opened: the model; its tokenizer alone will do where the model does not write the text.
        tick: called with the name of each source once it is drawn.
        writing: called with what the model writes, tokens done and tokens in all.
        note: called with a line the user should see.
        **options: those of `DrawOptions`. They come before those of a YAML file; `sources` may
            also be `Source` objects by name.

    Raises:
        InputError: the text cannot be used, an option has no effect or contradicts a saved set.
        SourceError: a source is unknown, unreadable, too small, or leaks.
    """
    asked = ask(text, context=opened.context, **options)
    spec, draw = asked.spec, asked.draw
    if asked.saved is not None:
        made = CalibrationSet.open(user_path(text), opened)
    else:
        made = make(
            spec, opened, rows=draw.rows, length=draw.length, seed=draw.seed,
            packing=draw.packing, guard=guard_of(draw.leakage, TOKENS, opened),
            tick=tick, writing=writing, note=note,
        )  # fmt: skip
    if note is not None:
        for name in spec.sources:
            reader = get_source(name, spec.own).reader
            if isinstance(reader, LocalFile) and (left := reader.left):
                note(f"{name}: left out are {left}")
        turns = count_turns(made.ids, opened.tokenizer)
        if turns == 0:
            note(f"warning: {text} {CHATLESS}")
        elif turns is None and getattr(opened.tokenizer, "chat_template", None):
            note(f"warning: {UNWRITABLE}")
    return made


def make(
    spec: Spec,
    opened: HasTokenizer,
    *,
    rows: int,
    packing: Packing,
    tick: Callable[[str], None] | None = None,
    writing: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
    **draw: Any,
) -> CalibrationSet:
    """Return a set as a parsed specification says; `draw` has length, seed and guard."""
    if spec.generator is None:
        counts, generators = rows_per_source(spec.mix, rows), spec.written
    else:
        share = getattr(spec.generator, "chat", 0.0) if chat_turns(opened.tokenizer) else 0.0
        counts = rows_per_source(Mix({"own": 1 - share, "chat": share}), rows)
        generators = {"own": spec.generator, "chat": Chat(batch=spec.generator.batch)}
    parts: dict[str, CalibrationSet] = {}
    if drawn := {name: float(counts[name]) for name in spec.sources if counts[name]}:
        mix = make_mix(drawn, str(spec.mix)) if spec.written else spec.mix
        how = {"own": spec.own, "packing": packing, "tick": tick, **draw}
        parts["own"] = build(mix, opened, rows=round(sum(drawn.values())), **how)
    for name, generator in generators.items():
        if counts[name]:
            if not isinstance(opened, OpenModel):
                line = f"{generator.name} runs the model: open it, not its tokenizer alone"
                raise InputError(line)
            how = {"own": spec.own, "writing": writing, "note": note, **draw}
            parts[name] = generate(generator, opened, rows=counts[name], **how)
    made = _together(parts, spec, draw["seed"])
    if (turns := count_turns(made.ids, opened.tokenizer)) is not None:
        made.manifest["chat_turns"] = turns
    return made


def _together(parts: Mapping[str, CalibrationSet], spec: Spec, seed: int) -> CalibrationSet:
    """Return the parts of a set as one, shuffled; the rows of each keep their order."""
    each = list(parts.values())
    if len(each) == 1 and not spec.written:
        return each[0]
    first, last = each[0].manifest, each[-1].manifest
    if spec.generator is None:
        first = {key: value for key, value in first.items() if key not in OF_TEXT}
        first["mix"] = spec.mix.weights
    owner = np.repeat(list(parts), [part.rows for part in each])
    owner = np.random.default_rng(seed).permutation(owner)
    left = {name: iter(range(part.rows)) for name, part in parts.items()}
    places = [(name, next(left[name])) for name in owner.tolist()]
    manifest = first | {
        "model": last["model"],
        "rows": len(places),
        "leakage": last["leakage"],
        "written": {name: part.manifest for name, part in parts.items() if name != "own"},
    }
    names = tuple(parts[name].sources[at] if name == "own" else name for name, at in places)
    ids = torch.stack([parts[name].ids[at] for name, at in places])
    made = CalibrationSet(ids, names, manifest)
    manifest["sha256"] = made.sha256
    return made


def _saved(path: Path, given: Mapping[str, Any], licence: str | None) -> CalibrationSet:
    found = CalibrationSet.open(path)
    for name, source in (found.manifest.get("sources") or {}).items():
        if isinstance(source, dict):
            refuse(name, source.get("licence", "unstated"), licence)
    seeds = (found.manifest.get("settings") or {}).get("seeds")
    for seed in [] if seeds is None else MIXES.get(seeds, [seeds]):
        refuse(seed, get_source(seed).licence, licence)
    has = dict(found.manifest)
    if isinstance(guard := has.get("leakage"), dict):
        has |= {"leakage": guard["suite"]}
    for key, value in given.items():
        if has.get(key) != value:
            raise InputError(
                f"calibration set {path} has {key} {has.get(key)}, not {value}: leave "
                f"--{key.replace('_', '-')} out, or make another set"
            )
    return found
