"""From what a user writes to a calibration set: a name, a mix, a YAML file, a saved folder, or a
method by which the model writes the text itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from calmix.calibration.build import (
    HasTokenizer,
    as_model,
    build,
    check_request,
    tokenizer_function,
)
from calmix.calibration.leakage import TOKENS, Guard, Item, ItemIndex
from calmix.calibration.mix import Mix, make_mix, parse_mix
from calmix.calibration.packing import Packing
from calmix.calibration.select import Selection
from calmix.calibration.selfgen.making import (
    METHODS,
    Options,
    Writing,
    check_generation,
    generate,
    settings,
)
from calmix.calibration.set import CalibrationSet, is_saved_set
from calmix.errors import InputError, nearest
from calmix.files import user_path
from calmix.sources import Source, get_source, offline_sources
from calmix.sources.licences import Licence, allowed, check_licence, refuse
from calmix.sources.registry import parse_sources
from calmix.specs import LENGTH, ROWS, SEED, named_options
from calmix.yaml_files import first_problem, read_yaml

SUITE = "offline"
YAML = (".yaml", ".yml")
REQUEST = ("rows", "length", "packing", "select")
GROUP = "offline"  # in a mix: every builtin source that needs no hub


class SpecFile(BaseModel):
    """A YAML file that describes a calibration set; options on the command line come first.

    Exactly one of `mix` (a mapping of weights, or text as on the command line), `uniform` (a
    list of names) and `generate` (a method, with its settings in `options`). `sources` describes
    the user's own, as in a file of sources.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mix: dict[str, float] | str | None = None
    uniform: list[str] | None = None
    generate: Literal["igsp", "self-cal", "sgs"] | None = None
    options: Options = Options()
    sources: dict[str, Any] = {}
    rows: int | None = None
    length: int | None = None
    seed: int | None = None
    packing: Packing | None = None
    select: Selection | None = None
    leakage: str | None = None
    leakage_tokens: int | None = None
    licence: Licence | None = None

    @field_validator("leakage", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false


@dataclass(frozen=True)
class Spec:
    """A parsed specification: a mix or a method that generates, and what the file fixes.

    Attributes:
        mix: empty if the text is generated.
        own: the user's own sources.
        fixed: options the file gives.
        generate: the method; None for a mix.
        options: the method's settings.
    """

    mix: Mix
    own: dict[str, Source] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    generate: str | None = None
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Asked:
    """A calibration set that is asked for, checked as far as that goes without its model.

    Attributes:
        saved: the set, if it lies in a folder already.
        spec: what it is made from otherwise.
        options: of the draw or the generation; a saved set's `rows` and `length` alone.
        guard: the suite whose items the set must not share runs with, and a run's tokens.
        files: the files and folders it is made from, among None.
    """

    saved: CalibrationSet | None
    spec: Spec
    options: dict[str, Any]
    guard: tuple[str, int]
    files: Sequence[Path | None]

    @property
    def rows(self) -> int:
        """Rows of the set."""
        return self.options["rows"]

    @property
    def length(self) -> int:
        """Tokens in each row."""
        return self.options["length"]

    @property
    def runs_model(self) -> bool:
        """Whether making it takes the model, and not its tokenizer alone."""
        return self.spec.generate is not None or self.options.get("select") == "igsp"


def ask(
    text: str,
    *,
    own: Mapping[str, Source] | None = None,
    licence: str | None = None,
    context: int | None = None,
    **draw: Any,
) -> Asked:
    """Check what a user asks for as a calibration set, before a model is opened or text fetched.

    Args:
        context: of the model, in tokens, where it is known.
        text, own, licence, **draw: as for `resolve`; None means not given.

    Raises:
        InputError, SourceError: as `resolve`, as far as it can be known.
    """
    given = {key: value for key, value in draw.items() if value is not None}
    path = user_path(text)
    if is_saved_set(path):
        saved = _saved(path, given, licence)
        size = {"rows": saved.rows, "length": saved.length}
        return Asked(saved, Spec(Mix({})), size, ("off", TOKENS), [path])
    spec = parse_spec(text, own, licence)
    options: dict[str, Any] = {
        "rows": ROWS, "length": LENGTH, "seed": SEED, "leakage": SUITE, "leakage_tokens": TOKENS,
    }  # fmt: skip
    options |= spec.fixed | given
    guard = options.pop("leakage"), options.pop("leakage_tokens")
    check_guard(*guard)
    files = [path if path.suffix.lower() in YAML else None]
    if spec.generate is not None:
        for name in ("packing", "select"):
            if name in options:
                raise InputError(f"'{name}' has no effect with {spec.generate}: leave it out")
        written = options | spec.options.model_dump(exclude_none=True)
        files += check_generation(spec.generate, own=spec.own, context=context, **written)
    else:
        options = {"packing": "concat", "select": "random"} | options
        if options["seed"] < 0:
            raise InputError(f"seed {options['seed']} is negative")
        check_request(**{key: options[key] for key in REQUEST}, context=context)
        for source in (get_source(name, spec.own) for name in spec.mix.weights):
            source.check()
            files.append(getattr(source.reader, "path", None))
    return Asked(None, spec, options, guard, files)


def parse_spec(
    text: str, own: Mapping[str, Source] | None = None, licence: str | None = None
) -> Spec:
    """Parse `name`, `a:0.5,b:0.5`, `uniform:a,b`, `igsp`, `igsp,temperature=0.8,...` or the path of
    a YAML file.

    Among the names, `offline` stands for every builtin source that needs no hub.

    Args:
        text: what the user wrote.
        own: the user's own sources by name.
        licence: `permissive` leaves other sources out of `offline`.

    Raises:
        InputError: the text or the file cannot be used as it is, an option has no effect, or it
            names a source that the licence asked for leaves out.
        SourceError: a licence is asked for, and a source is unknown.
    """
    check_licence(licence)
    spec = _parsed(text, own)
    wanted = licence or spec.fixed.pop("licence", None)
    spec.fixed.pop("licence", None)
    if spec.generate is not None:
        settings(spec.generate, spec.options.model_dump())
        check_seeds(spec.generate, spec.options.seeds, wanted, spec.own)
        return spec
    return replace(spec, mix=_grouped(spec.mix, spec.own, text, wanted))


def check_seeds(
    method: str, seeds: str | None, licence: str | None, own: Mapping[str, Source] | None
) -> None:
    """Refuse seed texts of a method that generates, if their licence is not the one asked for.

    Raises:
        InputError: unknown licence, or that of the source of seed texts is another.
        SourceError: a licence is asked for, and the source is unknown.
    """
    check_licence(licence)
    if licence is not None and "seeds" in METHODS[method]:
        name = seeds or METHODS[method]["seeds"]
        refuse(name, get_source(name, own).licence, licence)


def _grouped(mix: Mix, own: Mapping[str, Source], text: str, wanted: str | None) -> Mix:
    """Put the members in the place of a group, and refuse what the licence leaves out."""
    weights: dict[str, float] = {}
    for name, weight in mix.weights.items():
        if name != GROUP or name in own:
            if wanted is not None:
                refuse(name, get_source(name, own).licence, wanted)
            members = [name]
        else:
            held = offline_sources()
            members = [member for member in held if allowed(held[member].licence, wanted)]
        for member in members:
            if member in weights or (member in mix.weights and member != name):
                raise InputError(f"calibration '{text}' names '{member}' twice: {GROUP} holds it")
            weights[member] = weight / len(members)
    return mix if list(weights) == list(mix.weights) else Mix(weights)


def _parsed(text: str, own: Mapping[str, Source] | None) -> Spec:
    method = text.partition(",")[0].strip()
    if method in METHODS:
        return Spec(Mix({}), dict(own or {}), generate=method, options=_options(text))
    path = user_path(text)
    if path.suffix.lower() not in YAML:
        return Spec(parse_mix(text), dict(own or {}))
    try:
        file = SpecFile(**read_yaml(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from error
    except TypeError as error:
        raise InputError(f"{path}: its keys must be text") from error
    if sum(part is not None for part in (file.mix, file.uniform, file.generate)) != 1:
        raise InputError(
            f"{path}: give exactly one of 'mix' (names with weights), 'uniform' (names) and "
            "'generate' (igsp, self-cal or sgs)"
        )
    if file.generate is None and file.options != Options():
        raise InputError(f"{path}: 'options' are those of a method that generates")
    if file.generate is not None:
        mix = Mix({})
    elif isinstance(file.mix, str):
        mix = parse_mix(file.mix)
    elif file.mix is not None:
        mix = make_mix(file.mix, str(path))
    else:
        mix = parse_mix("uniform:" + ",".join(file.uniform or ()))
    apart = {"mix", "uniform", "sources", "generate", "options"}
    fixed = file.model_dump(exclude=apart, exclude_none=True)
    sources = {**(own or {}), **parse_sources(file.sources, path)}
    return Spec(mix, sources, fixed, file.generate, file.options)


def _options(text: str) -> Options:
    """Return the settings behind the name of a method that generates."""
    _, given = named_options("calibration", text)
    known = [field.alias or name for name, field in Options.model_fields.items()]
    for key in given:
        if key not in known:
            hint = nearest(key, known)
            raise InputError(f"calibration '{text}': unknown option '{key}': {hint}")
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        raise InputError(f"calibration '{text}': {first_problem(error)}") from error


def resolve(
    text: str,
    opened: HasTokenizer,
    *,
    rows: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    packing: Packing | None = None,
    select: Selection | None = None,
    leakage: str | None = None,
    leakage_tokens: int | None = None,
    licence: str | None = None,
    own: Mapping[str, Source] | None = None,
    tick: Callable[[str], None] | None = None,
    writing: Writing | None = None,
    note: Callable[[str], None] | None = None,
) -> CalibrationSet:
    """Return the calibration set a user asks for: drawn anew, or read from a saved folder.

    Args:
        text: a source's name or path, `a:0.5,b:0.5`, `uniform:a,b`, a YAML file, the folder of
            a saved set, or `igsp`, `self-cal` or `sgs`, with options behind commas.
        opened: the model; its tokenizer alone will do unless `needs_model` says otherwise.
        rows, length, seed, packing, select: as for `build`; None means not given (64 rows of
            512 tokens, seed 0, concat, random, or what the YAML file says).
        leakage: the suite whose items the set must not share runs with; `off` for no check.
        leakage_tokens: the length of such a run in tokens.
        licence: `permissive` leaves sources with other licences out; one that is named is an
            error.
        own: the user's own sources by name.
        tick: called with the name of each source once it is drawn.
        writing: called with what the model writes, tokens done and tokens in all.
        note: called with a line the user should see.

    Raises:
        InputError: the text cannot be used, an option has no effect or contradicts a saved set.
        SourceError: a source is unknown, unreadable, too small, or leaks.
    """
    asked = ask(
        text, own=own, licence=licence, rows=rows, length=length, seed=seed, packing=packing,
        select=select, leakage=leakage, leakage_tokens=leakage_tokens,
    )  # fmt: skip
    if asked.saved is not None:
        return _fitting(user_path(text), opened)
    spec, guard = asked.spec, guard_of(*asked.guard, opened)
    if spec.generate is not None:
        return generate(
            spec.generate, as_model(opened, spec.generate), guard=guard, own=spec.own,
            writing=writing, note=note, **asked.options,
            **spec.options.model_dump(exclude_none=True),
        )  # fmt: skip
    return build(spec.mix, opened, guard=guard, own=spec.own, tick=tick, **asked.options)


def _saved(path: Path, given: dict[str, Any], licence: str | None) -> CalibrationSet:
    check_licence(licence)
    found = CalibrationSet.open(path)
    for name, source in (found.manifest.get("sources") or {}).items():
        if isinstance(source, dict):
            refuse(name, source.get("licence", "unstated"), licence)
    seeds = (found.manifest.get("settings") or {}).get("seeds")
    if licence is not None and seeds is not None:
        refuse(seeds, get_source(seeds).licence, licence)
    leakage = found.manifest.get("leakage")
    has = {**found.manifest, "leakage": leakage, "leakage_tokens": None}
    if isinstance(leakage, dict):
        has |= {"leakage": leakage["suite"], "leakage_tokens": leakage["tokens"]}
    for key, value in given.items():
        if has.get(key) != value:
            raise InputError(
                f"calibration set {path} has {key} {has.get(key)}, not {value}: leave "
                f"--{key.replace('_', '-')} out, or make another set"
            )
    return found


def _fitting(path: Path, opened: HasTokenizer) -> CalibrationSet:
    found = CalibrationSet.open(path, opened)
    if opened.context is not None and found.length > opened.context:
        raise InputError(
            f"calibration set {path} has rows of {found.length} tokens, beyond the model's "
            f"context of {opened.context}"
        )
    return found


def guard_of(suite: str | None, tokens: int | None, opened: HasTokenizer) -> Guard | None:
    """Return the guard a user asks for: of suite `offline` and 13 tokens if not given, or none.

    Raises:
        InputError: as `check_guard`.
        AssetError: as `suite_guard`.
    """
    if suite == "off":
        return None
    return suite_guard(suite or SUITE, opened, TOKENS if tokens is None else tokens)


def check_guard(suite: str | None, tokens: int | None = None) -> None:
    """Refuse a guard there cannot be.

    Raises:
        InputError: the suite is unknown, or a run too short to tell a leak.
    """
    from calmix.capability.suites import load_suite

    if tokens is not None and tokens < 2:
        raise InputError(f"a run of {tokens} tokens is too short to tell a leak: use 2 or more")
    if suite not in (None, "off"):
        load_suite(suite)


def suite_guard(suite: str, opened: HasTokenizer, n: int = TOKENS) -> Guard:
    """Return a guard against the items of a suite.

    Raises:
        InputError: as `check_guard`.
        AssetError: the suite's archive is missing and cannot be fetched.
    """
    check_guard(suite, n)
    tokenizer = _Tokenizer(opened.tokenizer_fingerprint, opened.tokenizer)
    return Guard(suite, _index(tuple(suite_items(suite)), tokenizer, n))


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer, which is the same as another that gives the same ids."""

    fingerprint: str
    tokenizer: Any = field(compare=False)


@functools.lru_cache(maxsize=2)
def _index(items: tuple[Item, ...], tokenizer: _Tokenizer, n: int) -> ItemIndex:
    """Return the items' windows: a study draws many sets beside the same ones."""
    return ItemIndex(items, tokenizer_function(tokenizer.tokenizer), n)


def suite_items(suite: str) -> list[Item]:
    """Return task, item id and text of every item a suite scores.

    Raises:
        InputError: the suite is unknown.
        AssetError: the suite's archive is missing and cannot be fetched.
    """
    from calmix.capability.suites import load_suite
    from calmix.capability.tasks import suite_items as items_of

    return list(items_of(load_suite(suite)))
