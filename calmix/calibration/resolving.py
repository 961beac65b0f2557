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
from calmix.calibration.leakage import guard_of
from calmix.calibration.selfgen.generators import Generator, generate
from calmix.calibration.spec import YAML, Mix, Spec, make_mix, parse_spec, rows_per_source
from calmix.calibration.tokenizer import HasTokenizer, check_length
from calmix.errors import InputError
from calmix.files import user_path
from calmix.models import OpenModel
from calmix.options import DrawOptions, checked
from calmix.sources import get_source, own_sources
from calmix.sources.licences import refuse


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
        from calmix.evaluation.suites import load_suite

        load_suite(draw.leakage)
    files = [path] if path.suffix.lower() in YAML else []
    if spec.generator is not None:
        if "packing" in draw.model_fields_set:
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
    if asked.saved is not None:
        return CalibrationSet.open(user_path(text), opened)
    spec, draw = asked.spec, asked.draw
    guard = guard_of(draw.leakage, draw.leakage_tokens, opened)
    return make(
        spec, opened, rows=draw.rows, length=draw.length, seed=draw.seed, packing=draw.packing,
        guard=guard, tick=tick, writing=writing, note=note,
    )  # fmt: skip


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

    if spec.generator is not None:
        return written(spec.generator, rows)
    if not spec.written:
        return drawn(spec.mix, rows)
    counts = rows_per_source(spec.mix, rows)
    parts = {n: written(one, counts[n]) for n, one in spec.written.items() if counts[n]}
    if rest := {name: float(counts[name]) for name in spec.sources if counts[name]}:
        parts = {
            "sources": drawn(make_mix(rest, str(spec.mix)), round(sum(rest.values()))),
            **parts,
        }
    return _together(parts, spec, draw["seed"])


def _together(parts: Mapping[str, CalibrationSet], spec: Spec, seed: int) -> CalibrationSet:
    """Return the rows of sets of one mix as one set, shuffled; each set's rows keep their order."""
    owner = np.repeat(list(parts), [part.rows for part in parts.values()])
    owner = np.random.default_rng(seed).permutation(owner)
    left = {name: iter(range(part.rows)) for name, part in parts.items()}
    places = [(name, next(left[name])) for name in owner.tolist()]
    names = tuple(parts[name].sources[at] if name == "sources" else name for name, at in places)
    of_text = ("generated", "settings", "pieces", "perplexity", "temperature", "aggregation_4", "J")
    first, model = next(iter(parts.values())).manifest, list(parts.values())[-1].manifest["model"]
    manifest = {
        **{key: value for key, value in first.items() if key not in of_text},
        "model": model,
        "mix": spec.mix.weights,
        "rows": len(places),
        "written": {name: part.manifest for name, part in parts.items() if name != "sources"},
    }
    made = CalibrationSet(
        torch.stack([parts[name].ids[at] for name, at in places]), names, manifest
    )
    manifest["sha256"] = made.sha256
    return made


def _saved(path: Path, given: Mapping[str, Any], licence: str | None) -> CalibrationSet:
    found = CalibrationSet.open(path)
    for name, source in (found.manifest.get("sources") or {}).items():
        if isinstance(source, dict):
            refuse(name, source.get("licence", "unstated"), licence)
    seeds = (found.manifest.get("settings") or {}).get("seeds")
    if licence is not None and seeds is not None:
        refuse(seeds, get_source(seeds).licence, licence)
    has = dict(found.manifest)
    if isinstance(guard := has.get("leakage"), dict):
        has |= {"leakage": guard["suite"], "leakage_tokens": guard["tokens"]}
    for key, value in given.items():
        if has.get(key) != value:
            raise InputError(
                f"calibration set {path} has {key} {has.get(key)}, not {value}: leave "
                f"--{key.replace('_', '-')} out, or make another set"
            )
    return found
