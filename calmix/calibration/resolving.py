"""From what a user writes to a calibration set: drawn, written by the model, or read from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calmix.calibration.build import Packing, build
from calmix.calibration.dataset import CalibrationSet, is_saved_set
from calmix.calibration.leakage import TOKENS, guard_of, guarded_suites
from calmix.calibration.selfgen.generators import Chat, Generator, generate
from calmix.calibration.selfgen.prompts import chat_turns, count_turns
from calmix.calibration.spec import YAML, Mix, Spec, make_mix, parse_spec, rows_per_source
from calmix.calibration.tokenizer import HasTokenizer, check_length
from calmix.errors import InputError
from calmix.files import user_path
from calmix.models import OpenModel
from calmix.options import DrawOptions, checked
from calmix.sources import builtin_sources, get_source, own_sources
from calmix.sources.licences import refuse
from calmix.sources.readers import LocalFile
from calmix.sources.registry import MIXES

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

    def chatless(self, tokenizer: Any) -> bool:
        """Whether the set is known to hold no chats, and the model has a chat template."""
        if self.saved is not None:
            return count_turns(self.saved.ids, tokenizer) == 0
        spec = self.spec
        if getattr(spec.generator, "chat", 0) or "chat" in (spec.generate, *spec.written):
            return False
        known = all(name in builtin_sources() and name not in spec.own for name in spec.sources)
        return known and chat_turns(tokenizer) is not None


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
        turns = made.manifest.get("chat_turns")
        if turns is None:  # a set of before they were counted, or of a model without chats
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

    def written(generator: Generator, rows: int) -> CalibrationSet:
        if not isinstance(opened, OpenModel):
            raise InputError(f"{generator.name} runs the model: open it, not its tokenizer alone")
        how = {"own": spec.own, "writing": writing, "note": note, **draw}
        return generate(generator, opened, rows=rows, **how)

    def drawn(mix: Mix, rows: int) -> CalibrationSet:
        how = {"own": spec.own, "packing": packing, "tick": tick, **draw}
        return build(mix, opened, rows=rows, **how)

    parts: dict[str, CalibrationSet] = {}
    if spec.generator is not None:
        share = getattr(spec.generator, "chat", 0.0) if chat_turns(opened.tokenizer) else 0.0
        counts = rows_per_source(Mix({"own": 1 - share, "chat": share}), rows)
        if counts["own"]:
            parts["own"] = written(spec.generator, counts["own"])
        if counts["chat"]:
            parts["chat"] = written(Chat(batch=spec.generator.batch), counts["chat"])
    else:
        counts = rows_per_source(spec.mix, rows)
        if rest := {name: float(counts[name]) for name in spec.sources if counts[name]}:
            mix = make_mix(rest, str(spec.mix)) if spec.written else spec.mix
            parts["own"] = drawn(mix, round(sum(rest.values())))
        parts |= {n: written(one, counts[n]) for n, one in spec.written.items() if counts[n]}
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
