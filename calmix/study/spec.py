"""The study file: a grid of trials in YAML. Every mistake is reported with its line.

Paths are relative to the working directory, as on the command line; only those in `sources` are
relative to the file's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    ValidationError,
    WrapValidator,
    model_validator,
)

from calmix.calibration.request import parse_calibration
from calmix.errors import CalmixError, InputError, nearest
from calmix.evaluation.suites import Suite, choose
from calmix.models.hub import known_model
from calmix.options import (
    MOST_EMBEDDING,
    Leakage,
    Licence,
    Measure,
    Options,
    Propagation,
    Statistics,
)
from calmix.pruning.methods import get_method
from calmix.pruning.requests import printed, recovery_of, target_of
from calmix.sources.registry import Source, own_sources
from calmix.yaml_files import locate, parse_yaml, read_text, yaml_problems

WITHOUT = "none"  # no calibration set, or no recovery


def _by(act: Callable[[Any], Any]) -> AfterValidator:
    """Return a validator that converts a value and turns a `CalmixError` into its message."""

    def check(value: Any) -> Any:
        try:
            return act(value)
        except CalmixError as error:
            raise ValueError(str(error)) from None

    return AfterValidator(check)


Count = Annotated[int, Field(ge=1, strict=True)]
Listed = BeforeValidator(
    lambda value: value if isinstance(value, list | dict) or value is None else [value]
)
Method = Annotated[str, _by(lambda text: get_method(text).text)]  # `sparsegpt,damping=0.1`
Recovery = Annotated[str, _by(lambda text: WITHOUT if text == WITHOUT else recovery_of(text).text)]
Filled = Field(min_length=1)
Targets = Annotated[list[Annotated[Any, _by(target_of)]], Listed, Filled]
Target = Annotated[Any, _by(lambda value: printed(target_of(value)))]  # as printed: `60%` or `2:4`
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Text = Annotated[str, Field(pattern=r"\S")]


def _apart(value: Any, handler: Callable[[Any], Any]) -> Any:
    """Refuse two spellings of one method, of which a mapping would keep the last."""
    methods = handler(value)
    if len(methods) < len(value):
        raise ValueError("two names mean the same method: name it once, with all its targets")
    return methods


Methods = Annotated[dict[Method, Targets], Filled, WrapValidator(_apart)]


class Model(Options):
    """A model as named for `open_model`."""

    name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class _Draw(Options):
    """How rows are drawn; `calmix.calibration.request` has the defaults."""

    rows: Count | None = None
    length: Count | None = None
    packing: Literal["concat", "window"] | None = None
    leakage: Leakage | None = None
    licence: Licence = None

    def explicit(self) -> dict[str, Any]:
        """Return the options that were given."""
        return {key: getattr(self, key) for key in _Draw.model_fields if getattr(self, key)}


class Calibration(_Draw):
    """A calibration set: exactly one of `from` (text as on the command line), `mix` (a mapping of
    weights) and `uniform` (a list of names)."""

    text: str | None = Field(default=None, alias="from")
    mix: dict[str, float] | None = None
    uniform: list[str] | None = None

    @model_validator(mode="after")
    def _one(self) -> Calibration:
        if sum(part is not None for part in (self.text, self.mix, self.uniform)) != 1:
            raise ValueError("give exactly one of 'from', 'mix' and 'uniform'")
        return self

    @property
    def written(self) -> str:
        """The set as a specification for `calmix.calibration_set`."""
        if self.text is not None:
            return self.text
        if self.uniform is not None:
            return "uniform:" + ",".join(self.uniform)
        return ",".join(f"{name}:{weight!r}" for name, weight in (self.mix or {}).items())


class StudyGrid(Options):
    """Part of a study: how models are pruned with each calibration set, and with which seeds. Its
    keys override those at the top of the file.

    Models and calibrations are referred to by their labels. `recovery` (`none`, or e.g.
    `blocks,epochs=3`) may be a list; it does not apply to methods without a calibration set.
    """

    models: Annotated[list[str], Filled] | None = None
    calibrations: Annotated[list[str], Filled] | None = None
    rows: Count | None = None
    length: Count | None = None
    methods: Methods | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Filled] | None = None
    propagation: Propagation | None = None
    embeddings: Annotated[float, Field(ge=2, le=MOST_EMBEDDING)] | None = None
    recovery: Annotated[list[Recovery], Listed, Filled] | None = None


def _by_label(key: str, value: Any) -> Any:
    """Expand a list of names or texts to a mapping by label, each text to a mapping by `key`."""
    if isinstance(value, list):
        if doubles := [name for name in value if value.count(name) > 1]:
            raise ValueError(f"'{doubles[0]}' is listed twice")
        value = {str(name): name for name in value}
    if not isinstance(value, dict):
        return value
    return {k: {key: v} if isinstance(v, str) else v for k, v in value.items()}


# What a comparison may name of a trial, with the key of `where` that restricts it.
ASPECTS = {
    "model": "models",
    "calibration": "calibrations",
    "method": "methods",
    "target": "targets",
    "recovery": "recoveries",
}


class Side(Options):
    """One side of a comparison: a calibration set, or the best of several, and how models are
    pruned with it. `best_of` is chosen on the items of odd position and compared on the others."""

    calibration: str | None = None
    best_of: Annotated[list[str], Field(min_length=2)] | None = None
    method: Method | None = None
    target: Target | None = None
    recovery: Recovery | None = None

    @model_validator(mode="after")
    def _one_set(self) -> Side:
        if self.calibration is not None and self.best_of is not None:
            raise ValueError("give one of 'calibration' and 'best_of'")
        if len(set(self.best_of or ())) < len(self.best_of or ()):
            raise ValueError("'best_of' names a set twice")
        return self

    @property
    def aspects(self) -> dict[str, list[str]]:
        """What defines the side's trials, and its possible values."""
        aspects = {key: getattr(self, key, None) for key in ASPECTS}
        values = {key: [value] for key, value in aspects.items() if value is not None}
        return {"calibration": self.best_of, **values} if self.best_of else values


class Where(Options):
    """The trials to which a comparison is restricted."""

    models: Annotated[list[str], Listed, Filled] | None = None
    calibrations: Annotated[list[str], Listed, Filled] | None = None
    methods: Annotated[list[Method], Listed, Filled] | None = None
    targets: Annotated[list[Target], Listed, Filled] | None = None
    recoveries: Annotated[list[Recovery], Listed, Filled] | None = None

    @property
    def limits(self) -> dict[str, list[str]]:
        """The values that each restricted aspect may have."""
        values = {key: getattr(self, plural) for key, plural in ASPECTS.items()}
        return {key: value for key, value in values.items() if value is not None}


class Refuted(Options):
    """What refutes a prediction: an interval that ends below or begins above so many points."""

    below: FiniteFloat | None = None
    above: FiniteFloat | None = None

    @model_validator(mode="after")
    def _some(self) -> Refuted:
        if self.below is None and self.above is None:
            raise ValueError("give 'below' or 'above', e.g. {below: 5}")
        return self


class DeclaredComparison(Options):
    """A declared comparison: `of` minus `over`, in points of the primary measure. All else is the
    same on both sides; each model is compared by itself, everything else in the mean."""

    name: Text
    of: Side
    over: Side
    where: Where = Where()
    predict: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None = None
    refuted: Refuted | None = None

    @model_validator(mode="after")
    def _consistent(self) -> DeclaredComparison:
        of, over = self.of.aspects, self.over.aspects
        if set(of) != set(over):
            odd = min(set(of) ^ set(over))
            raise ValueError(f"'of' and 'over' must name the same keys: one lacks '{odd}'")
        if of == over:
            raise ValueError("'of' and 'over' are the same")
        for key in self.where.limits:
            if key in of:
                raise ValueError(f"'where.{ASPECTS[key]}' has no effect: 'of' and 'over' name it")
        if self.predict is not None and self.predict[0] > self.predict[1]:
            raise ValueError("'predict' must be two numbers, the lower one first")
        return self


def _reasons(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("give a reason for each task, e.g. {sums: one text can swing them}")
    return value


class Amends(Options):
    """The study whose declaration a file changes, and why."""

    study: Name
    reason: Text


class StudyFile(_Draw, StudyGrid):
    """A study: models and calibrations by label. Without `grids` its top level is the only grid.
    `primary`, `margin` (in points), `exclude` (a reason for each task) and `comparisons` are
    declared before the first trial; `statistics` is as for `calmix prune`."""

    name: Name
    description: str = ""
    models: Annotated[  # type: ignore[assignment]
        dict[str, Model], Filled, BeforeValidator(partial(_by_label, "name"))
    ]
    suite: str = "offline"
    quick: bool = False
    limit: Count | None = None
    statistics: Statistics | None = None
    calibrations: Annotated[  # type: ignore[assignment]
        dict[str, Calibration], Filled, BeforeValidator(partial(_by_label, "from"))
    ]
    sources: dict[str, Any] = Field(default={})
    grids: list[StudyGrid] = Field(default=[])
    primary: Measure | None = None
    margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    exclude: Annotated[dict[str, Text], BeforeValidator(_reasons)] = Field(default={})
    comparisons: list[DeclaredComparison] = Field(default=[])
    amends: Amends | None = None
    keep_checkpoints: bool = False


@dataclass(frozen=True)
class Study:
    """A study file after reading and checking.

    Attributes:
        file: its content; `text` is the original YAML, `path` its path.
        own: the user's own sources by name.
        suite: the part of the suite to run.
    """

    file: StudyFile
    text: str
    path: Path
    own: dict[str, Source]
    suite: Suite

    @property
    def primary(self) -> Measure:
        """The primary measure: if none is named, right answers where answers are generated."""
        return self.file.primary or ("right" if self.suite.asks else "primary")


def load_study(path: Path) -> Study:
    """Read a study file; an `InputError` has its first mistake."""
    study, problems = check_study(path)
    if study is None:
        more = len(problems) - 1
        rest = f" (and {more} more: calmix study plan {path})" if more else ""
        raise InputError(problems[0] + rest)
    return study


def check_study(path: Path) -> tuple[Study | None, list[str]]:
    """Read a study file: return the study, or None and every mistake with its line."""
    value, node = parse_yaml(text := read_text(path), str(path))
    try:
        file = StudyFile.model_validate(value)
    except ValidationError as error:
        return None, sorted(yaml_problems(error, StudyFile, node, str(path)), key=_line)
    problems: list[str] = []

    def wrong(at: Sequence[Any], line: object) -> None:
        number, _ = locate(node, at)
        problems.append(f"{path} line {number}: {'.'.join(map(str, at))}: {line}")

    def check(at: Sequence[Any], act: Callable[..., Any], *args: Any, **more: Any) -> Any:
        try:
            return act(*args, **more)
        except CalmixError as error:
            wrong(at, error)

    own = check(["sources"], own_sources, file.sources, path) or {}
    suite = check(["suite"], choose, file.suite, quick=file.quick, limit=file.limit)
    for label, model in file.models.items():
        check(["models", label], known_model, model.name)  # hub models are checked on opening
    for label, entry in file.calibrations.items():
        draw = {"licence": file.licence, **entry.explicit()}
        check(["calibrations", label], parse_calibration, entry.written, sources=own, **draw)
    if WITHOUT in file.calibrations:
        wrong(
            ["calibrations", WITHOUT],
            f"'{WITHOUT}' is reserved for no calibration set: rename it",
        )
    if not file.methods and not (file.grids and all(grid.methods for grid in file.grids)):
        wrong(["methods"], "the grid has no trials: name at least one, e.g. wanda: [0.5]")
    parts: list[tuple[list[Any], StudyGrid]]
    parts = [(["grids", number], grid) for number, grid in enumerate(file.grids)]
    for at, part in [([], file), *parts]:
        for method, targets in (part.methods or {}).items():
            for target in targets:
                check([*at, "methods", method], _fits, method, target)
    for at, part in parts or [([], file)]:  # keys above grids apply to all of them
        for key, labels in (("models", file.models), ("calibrations", file.calibrations)):
            for place, name in enumerate(getattr(part, key) or ()):
                if name not in labels:
                    wrong([*at, key, place], f"unknown '{name}': {nearest(name, labels)}")
        methods = part.methods or file.methods or {}
        idle = methods and all(get_method(name).needs is None for name in methods)
        if idle and set(part.recovery or ()) - {WITHOUT}:
            wrong([*at, "recovery"], f"no effect with {', '.join(methods)}")
    if suite is not None:
        _check_declaration(file, suite, wrong)
    if problems:
        return None, sorted(problems, key=_line)
    return Study(file, text, path, own, suite), []


def _check_declaration(file: StudyFile, suite: Suite, wrong: Callable[..., None]) -> None:
    """Report what a study declares and cannot measure, or names and lacks."""
    if file.primary == "right" and not suite.asks:
        wrong(["primary"], f"suite {suite.name} has no generated answers: use another measure")
    for task in file.exclude:
        if task not in suite.tasks:
            wrong(["exclude", task], f"the suite has no such task: {nearest(task, suite.tasks)}")
    if not set(suite.tasks) - set(file.exclude):
        wrong(["exclude"], "it names every task of the suite: keep at least one")
    if file.amends is not None and file.amends.study == file.name:
        wrong(["amends", "study"], "a study cannot amend itself: give this file another name")
    grids = file.grids or [file]
    methods = [grid.methods or file.methods or {} for grid in grids]
    known: dict[str, set[str]] = {
        "model": set(file.models),
        "calibration": set(file.calibrations),
        "method": {name for each in methods for name in each},
        "target": {printed(one) for each in methods for some in each.values() for one in some},
        "recovery": {
            name for grid in grids for name in grid.recovery or file.recovery or [WITHOUT]
        },
    }

    def check(at: list[Any], aspect: str, names: Sequence[str]) -> None:
        for name in names:
            if name not in known[aspect]:
                wrong(at, f"the study has no '{name}': {nearest(name, known[aspect])}")

    seen = set[str]()
    for number, one in enumerate(file.comparisons):
        at: list[Any] = ["comparisons", number]
        if one.name in seen:
            wrong([*at, "name"], "two comparisons have this name: rename one")
        seen.add(one.name)
        for side in ("of", "over"):
            for key, names in getattr(one, side).aspects.items():
                check([*at, side, "best_of" if len(names) > 1 else key], key, names)
        for key, names in one.where.limits.items():
            check([*at, "where", ASPECTS[key]], key, names)


def _fits(name: str, target: Any) -> None:
    method, pattern = get_method(name).aim(target)
    method.check(pattern, 0)


def _line(problem: str) -> int:
    """Return the line number in a message, by which messages are sorted."""
    number = problem.partition(" line ")[2].partition(":")[0]
    return int(number) if number.isdigit() else 0
