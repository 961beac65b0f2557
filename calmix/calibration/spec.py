"""What a user writes for a calibration set: a source, a mix, a YAML file, or a generator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field, ValidationError

from calmix.calibration.selfgen.generators import GENERATORS, WITHOUT_CHATS, Generator
from calmix.errors import InputError, nearest
from calmix.files import user_path
from calmix.options import DrawOptions, checked, named_options
from calmix.sources import Source, get_source, offline_sources
from calmix.sources.licences import allowed, check_licence, refuse
from calmix.sources.registry import MIXES, parse_sources
from calmix.yaml_files import first_problem, read_yaml

YAML = (".yaml", ".yml")
GROUP = "offline"  # in a mix: every builtin source that needs no hub


@dataclass(frozen=True)
class Mix:
    """Source names with positive weights that sum to 1, in the order they were written."""

    weights: dict[str, float]

    def __str__(self) -> str:
        return ",".join(f"{name}:{weight:.4g}" for name, weight in self.weights.items())


def parse_mix(text: str) -> Mix:
    """Parse `name`, `a:0.5,b:0.3,c:0.2` or `uniform:a,b,c` into a mix.

    Names may be paths. Weights are relative; those of 0 drop their source.
    """
    text = text.strip()
    names = [part.strip() for part in text.removeprefix("uniform:").split(",")]
    if not all(names):
        raise InputError(f"calibration '{text}' names no source between its commas")
    pairs: list[tuple[str, float]] = []
    for part in names:
        name, colon, number = part.rpartition(":")
        try:
            if text.startswith("uniform:") or not (colon and name):
                raise ValueError
            pairs.append((name.strip(), float(number)))
        except ValueError:
            if len(names) > 1 and not text.startswith("uniform:"):
                raise InputError(
                    f"calibration '{text}': '{part}' has no weight: write {part}:0.5, or "
                    "uniform:a,b,c for equal weights"
                ) from None
            pairs.append((part, 1.0))
    names = [name for name, _ in pairs]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"calibration '{text}' names '{doubles[0]}' twice")
    return make_mix(dict(pairs), text)


def make_mix(weights: Mapping[str, float], text: str) -> Mix:
    """Return a mix with its weights normalised to sum to 1."""
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise InputError(f"calibration '{text}': the weight of '{name}' is {weight}, not >= 0")
    total = sum(weights.values())
    if not total > 0:
        raise InputError(f"calibration '{text}': all weights are zero")
    return Mix({name: weight / total for name, weight in weights.items() if weight > 0})


def rows_per_source(mix: Mix, rows: int) -> dict[str, int]:
    """Share out `rows` by weight with the largest-remainder method; the counts add up to `rows`.

    Ties between remainders go to the source written first.
    """
    exact = {name: weight * rows for name, weight in mix.weights.items()}
    # Weights such as 0.1 are not exact in binary: what is an integer but for rounding is one.
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: round(counts[name] - exact[name], 9))
    for name in order[: rows - sum(counts.values())]:
        counts[name] += 1
    return counts


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
        try:
            file = SpecFile.model_validate(read_yaml(path))
        except ValidationError as error:
            raise InputError(f"{path}: {first_problem(error)}") from error
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
        elif name == "mix-8-apart" and name not in own:
            raise InputError("mix-8-apart is now mix-clean, of better sources: name that")
        for member, share in members.items():
            if wanted is not None and (member not in GENERATORS or member in own):
                refuse(member, get_source(member, own).licence, wanted)
            if member in weights or (member in mix.weights and member != name):
                raise InputError(f"calibration '{text}' names '{member}' twice: {name} holds it")
            weights[member] = weight * share / sum(members.values())
    return mix if list(weights) == list(mix.weights) else Mix(weights)
