"""What a study declares before its first trial: its primary measure, the margin of "level", the
tasks left out, and its comparisons with every trial that belongs to them.

The store records the declaration with its hash and the time. It may change as long as no trial is
finished; after that only another study that `amends` it may declare something else.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from calmix.errors import InputError
from calmix.files import sha256_json
from calmix.manifest import differences
from calmix.options import Measure
from calmix.study.spec import ASPECTS, WITHOUT, Amends, DeclaredComparison, Study
from calmix.study.trials import Key, Planned
from calmix.yaml_files import locate, parse_yaml


class Pair(BaseModel, frozen=True):
    """The trials of both sides of a comparison that are alike in everything else, by key."""

    of: tuple[Key, ...]
    over: tuple[Key, ...]

    @property
    def sides(self) -> tuple[tuple[Key, ...], ...]:
        """Both sides."""
        return self.of, self.over

    @property
    def model(self) -> str:
        """The label of the model."""
        return str(self.of[0][0])


class Declaration(BaseModel, frozen=True):
    """What a study declares.

    Attributes:
        margin: in points.
        exclude: the reason for leaving out each task.
        comparisons: as in the study file, by name; `pairs` are their trials.
        suite: its name, and how much of it is asked, if anything is compared.
        models, calibrations: those compared, as in the study file, by label.
    """

    primary: Measure = "primary"
    margin: float | None = None
    exclude: dict[str, str] = {}
    comparisons: dict[str, dict[str, Any]] = {}
    suite: dict[str, Any] = {}
    models: dict[str, Any] = {}
    calibrations: dict[str, Any] = {}
    pairs: dict[str, tuple[Pair, ...]] = {}

    @property
    def keys(self) -> dict[Key, None]:
        """The keys of all trials that are compared, each once."""
        pairs = (pair for some in self.pairs.values() for pair in some)
        return dict.fromkeys(key for pair in pairs for side in pair.sides for key in side)

    @property
    def hash(self) -> str:
        """SHA-256 of the declaration."""
        return sha256_json(self.model_dump(mode="json"))

    def __str__(self) -> str:
        number = len(self.comparisons)
        if not number:
            return "declares no comparisons: everything here is exploratory"
        margin = "" if self.margin is None else f", margin {self.margin:g} points"
        some = f"{number} comparison{'s' * (number > 1)}"
        return f"declares {some} by measure {self.primary}{margin} (hash {self.hash[:12]})"


class Declared(BaseModel, frozen=True):
    """A declaration in a store: by which study, from when on (UTC), and what it amends."""

    study: str
    since: str
    hash: str
    amends: Amends | None = None
    declaration: Declaration

    @property
    def intact(self) -> bool:
        """Whether the declaration is the one that was recorded."""
        return self.declaration.hash == self.hash


def declaration(study: Study, planned: Sequence[Planned]) -> Declaration:
    """Return what a study declares; an `InputError` if a comparison lacks trials."""
    pairs, file = dict[str, tuple[Pair, ...]](), study.file
    aspects = {trial.key: _aspects(trial) for trial in planned}
    for number, one in enumerate(file.comparisons):
        pairs[one.name] = tuple(_pairs(one, planned, aspects))
        compared = [aspects[key] for pair in pairs[one.name] for key in pair.of]
        lacks = [
            value
            for key, values in one.where.limits.items()
            for value in values
            if value not in {each[key] for each in compared}
        ]
        if lacks or not compared:
            line, _ = locate(parse_yaml(study.text, "")[1], ["comparisons", number])
            where = f" at {lacks[0]}" if lacks else ""
            raise InputError(
                f"{study.path} line {line}: comparison '{one.name}' has no trials on both sides "
                f"that are otherwise alike{where}: add them to the grid"
            )
    keys = Declaration(pairs=pairs).keys
    models, sets = ({key[at] for key in keys} for at in (0, 1))
    return Declaration(
        primary=study.primary,
        suite=file.model_dump(include={"suite", "quick", "limit"}) if pairs else {},
        margin=file.margin,
        exclude=file.exclude,
        models={name: one.model_dump() for name, one in file.models.items() if name in models},
        calibrations={
            name: {"from": one.written, **file.explicit(), **one.explicit()}
            for name, one in file.calibrations.items()
            if name in sets
        },
        comparisons={
            one.name: one.model_dump(mode="json", exclude={"name"}, exclude_none=True)
            for one in file.comparisons
        },
        pairs=pairs,
    )


def _aspects(trial: Planned) -> dict[str, str]:
    """Return what a comparison may name of a trial."""
    recovery = WITHOUT if trial.recovery is None else trial.recovery.text
    values = trial.model, trial.calibration, trial.request.chosen.text, trial.pattern, recovery
    return dict(zip(ASPECTS, values, strict=True))


def _pairs(
    one: DeclaredComparison, planned: Sequence[Planned], aspects: Mapping[Key, Mapping[str, str]]
) -> Iterator[Pair]:
    """Yield the pairs of a comparison, each with all seeds of both sides."""
    sides, limits = (one.of.aspects, one.over.aspects), one.where.limits
    cells: dict[Key, tuple[list[Key], list[Key]]] = {}
    for trial in planned:
        aspect = aspects[trial.key]
        if any(aspect[key] not in values for key, values in limits.items()):
            continue
        same: list[Any] = [value for key, value in aspect.items() if key not in sides[0]]
        same += [trial.request.embeddings, *trial.condition[3:]]
        for side, keys in zip(sides, cells.setdefault(tuple(same), ([], [])), strict=True):
            if all(aspect[key] in values for key, values in side.items()):
                keys.append(trial.key)
    for both in cells.values():
        sets = [len({calibration for _, calibration, *_ in keys}) for keys in both]
        if sets == [len(side.get("calibration", "1")) for side in sides]:
            yield Pair(of=tuple(both[0]), over=tuple(both[1]))


def declare(
    study: Study, now: Declaration, earlier: Sequence[Declared], finished: str | None
) -> tuple[Declared, ...]:
    """Return the declarations of a store for a run that begins now; the last one is valid.

    `finished` names the study whose finished trials the store has, if any; then an `InputError` is
    raised unless the study declares the same as before or amends it.
    """
    last = earlier[-1] if earlier else None
    known = Declaration(primary=now.primary) if last is None else last.declaration
    if last is not None and known.hash == now.hash:
        return tuple(earlier)
    if finished is not None and known.hash != now.hash:
        before, amends = finished if last is None else last.study, study.file.amends
        if study.file.name == before or amends is None or amends.study != before:
            what = next(differences(known.model_dump(mode="json"), now.model_dump(mode="json")))
            raise InputError(
                f"the store has trials, and what study {before} declared has changed ({what}): "
                f"name {study.path} anew, with amends: {{study: {before}, reason: ...}}"
            )
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    new = Declared(
        study=study.file.name, since=since, hash=now.hash, amends=study.file.amends, declaration=now
    )
    return (*(earlier if finished is not None else earlier[:-1]), new)
