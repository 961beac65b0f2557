"""The study file: what a user writes to describe an experiment, checked with every mistake's line.

Paths in it are meant from where calmix is run, as on the command line; only those in `sources`
and of files of sparsities by layer are meant from the file's own folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from calmix.calibration import CalibrationSet, ask, is_saved_set, parse_spec
from calmix.capability.suites import Suite, load_suite
from calmix.errors import CalmixError, InputError, nearest
from calmix.files import user_path
from calmix.models.opening import DTYPES, known_model
from calmix.pruning.allocation import SPREAD, read_allocation
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Pattern, Unstructured, parse_pattern
from calmix.sources import Source
from calmix.sources.licences import Licence
from calmix.sources.registry import parse_sources
from calmix.specs import SEED, Propagation, recovery_of, recovery_text
from calmix.study.results import Strategy
from calmix.yaml_files import YamlText, parse_yaml, read_text

NONE = "none"  # the calibration of a method that needs none, and no recovery
UNIFORM = "uniform"  # the allocation that needs no look at the model

Count = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, strict=True)]
Target = Annotated[float, Field(gt=0, lt=1, strict=True)] | str
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shape(_Strict):
    """The sizes of a model that is not at hand, by the names config.json uses; for `plan`."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Count
    tie_word_embeddings: bool = False
    num_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Count | None = None
    shared_expert_intermediate_size: Count | None = None
    first_k_dense_replace: Count | None = None


class Model(_Strict):
    """One model: its name as `open_model` takes it, or a shape to plan with as well."""

    name: str
    dtype: str = "auto"
    shape: Shape | None = None

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str) -> str:
        known = [*DTYPES, "auto"]
        if value not in known:
            raise ValueError(f"unknown dtype '{value}': {nearest(value, known)}")
        return value


class _Draw(_Strict):
    """How rows are drawn; what is not given is left to `calmix.calibration.resolve`."""

    rows: Count | None = None
    length: Count | None = None
    packing: Literal["concat", "window"] | None = None
    leakage: str | None = None
    leakage_tokens: Annotated[int, Field(ge=2, strict=True)] | None = None
    licence: Licence | None = None

    @field_validator("leakage", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    def given(self, *keys: str) -> dict[str, Any]:
        """Return the options that were given, of `keys` or of all of a draw's."""
        wanted = keys or tuple(_Draw.model_fields)
        return {key: getattr(self, key) for key in wanted if getattr(self, key) is not None}


class Calibration(_Draw):
    """One calibration set: exactly one of `from` (text as on the command line), `mix` (a mapping
    of weights) and `uniform` (a list of names)."""

    text: str | None = Field(default=None, alias="from")
    mix: dict[str, float] | None = None
    uniform: list[str] | None = None
    strategy: Strategy | None = None

    @model_validator(mode="after")
    def _one(self) -> Calibration:
        if sum(part is not None for part in (self.text, self.mix, self.uniform)) != 1:
            raise ValueError("give exactly one of 'from', 'mix' and 'uniform'")
        return self

    @property
    def written(self) -> str:
        """The set as text for `calmix.calibration.resolve`."""
        if self.text is not None:
            return self.text
        if self.uniform is not None:
            return "uniform:" + ",".join(self.uniform)
        return ",".join(f"{name}:{weight!r}" for name, weight in (self.mix or {}).items())


def _method(text: str) -> str:
    try:
        return get_method(text).text
    except InputError as error:
        raise ValueError(str(error)) from None


def _recovery(text: str) -> str:
    if text == NONE:
        return NONE
    try:
        # What it trains on is the trial's set.
        return recovery_text(recovery_of(text))
    except InputError as error:
        raise ValueError(str(error)) from None


# A method may have options of its own: `sparsegpt,damping=0.1`.
Methods = dict[Annotated[str, AfterValidator(_method)], list[Target]]


class _Targets(_Strict):
    """What is done with each calibration set, and with which draws of it.

    `damping` is an option of every method that has it and does not name it itself. Of `allocation`
    (`uniform`, `owl`, `error`, or a file of sparsities by layer) and `recovery` (`none`, or as
    behind `prune --recover`) there may be several; methods without a calibration set know neither.
    """

    methods: Methods | None = None
    seeds: list[Seed] | None = None
    propagation: str | None = None
    damping: Annotated[float, Field(gt=0)] | None = None
    allocation: list[str] | None = None
    recovery: list[Annotated[str, AfterValidator(_recovery)]] | None = None

    @field_validator("allocation", "recovery", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("allocation")
    @classmethod
    def _allocation(cls, value: list[str] | None) -> list[str] | None:
        for one in value or ():
            if not Path(one).suffix:
                _one_of("allocation", one, (UNIFORM, *SPREAD))
        return value

    @field_validator("methods", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: [t] if isinstance(t, int | float | str) else t for name, t in value.items()}

    @field_validator("methods")
    @classmethod
    def _targets(cls, value: Methods | None) -> Methods | None:
        for method, targets in (value or {}).items():
            for target in targets:
                try:
                    as_pattern(target)
                except InputError as error:
                    raise ValueError(f"{method}: {error}") from None
        return value

    @field_validator("propagation")
    @classmethod
    def _propagation(cls, value: str | None) -> str | None:
        return _one_of("propagation", value, get_args(Propagation))


class Grid(_Targets):
    """Part of a study: what it names replaces what the top of the file says. Models and
    calibrations are named by their labels."""

    models: list[str] | None = None
    calibrations: list[str] | None = None
    rows: Count | None = None
    length: Count | None = None


class StudyFile(_Draw, _Targets):
    """A study. Without `grids` its own lists are the one grid. Without `perplexity` sets are
    measured by what needs no model."""

    name: Name
    description: str = ""
    models: Annotated[dict[str, Model], Field(min_length=1)]
    suite: str = "offline"
    quick: bool = False
    limit: Count | None = None
    calibrations: dict[str, Calibration]
    sources: dict[str, Any] = {}
    grids: list[Grid] = []
    perplexity: bool = True
    keep_checkpoints: bool = False

    @field_validator("models", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, list):
            doubles = [name for name in value if value.count(name) > 1]
            if doubles:
                raise ValueError(f"'{doubles[0]}' is named twice")
            value = {name if isinstance(name, str) else str(name): name for name in value}
        if not isinstance(value, dict):
            return value
        return {k: {"name": v} if isinstance(v, str) else v for k, v in value.items()}

    @field_validator("calibrations", mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: {"from": v} if isinstance(v, str) else v for k, v in value.items()}


@dataclass(frozen=True)
class Study:
    """A study file that was read and checked.

    Attributes:
        file: its content; `text` as written, `path` where it lies.
        own: the user's own sources by name.
        suite: as it is to be run.
        allocations: sparsities by layer, by the file as the study names it.
    """

    file: StudyFile
    text: str
    path: Path
    own: dict[str, Source]
    suite: Suite
    allocations: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Model]:
        """The models by label."""
        return self.file.models

    @property
    def calibrations(self) -> dict[str, Calibration]:
        """The calibration sets by label."""
        return self.file.calibrations

    @property
    def files(self) -> list[object]:
        """What is read: the study, its models and allocations, and what its sets are made of."""
        found: list[object] = [self.path, *(model.name for model in self.models.values())]
        found += [self.path.parent / user_path(name) for name in self.allocations]
        for entry in self.calibrations.values():
            found += ask(entry.written, sources=self.own, **entry.given()).files
        return found

    @property
    def name(self) -> str:
        """The study's name."""
        return self.file.name

    @property
    def grids(self) -> list[Grid]:
        """The grids, with what each leaves open filled in from the top of the file."""
        top = {
            "models": list(self.models),
            "calibrations": list(self.calibrations),
            "methods": self.file.methods or {},
            "rows": self.file.rows,
            "length": self.file.length,
            "seeds": [SEED] if self.file.seeds is None else self.file.seeds,
            "propagation": self.file.propagation,
            "damping": self.file.damping,
            "allocation": self.file.allocation or [UNIFORM],
            "recovery": self.file.recovery or [NONE],
        }
        return [
            Grid.model_validate(top | grid.model_dump(exclude_none=True))
            for grid in self.file.grids or [Grid()]
        ]


@dataclass(frozen=True)
class Checked:
    """What reading a study file found: the study, or every mistake with its line."""

    study: Study | None
    problems: list[str] = field(default_factory=list)


def load_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        InputError: the first mistake, with its line, and how many more there are.
    """
    checked = check_study(path)
    if checked.study is None:
        more = len(checked.problems) - 1
        rest = f" (and {more} more: calmix study validate {path})" if more else ""
        raise InputError(checked.problems[0] + rest)
    return checked.study


def check_study(path: Path) -> Checked:
    """Read a study file and collect its mistakes.

    Raises:
        InputError: the file cannot be read or is no YAML at all.
    """
    return parse_study(read_text(path), path)


def parse_study(text: str, path: Path) -> Checked:
    """Parse a study's text; `path` names it in complaints and is where its sources are rooted.

    Raises:
        InputError: it is no YAML, or no mapping.
    """
    yaml = parse_yaml(text, str(path))
    try:
        file = StudyFile.model_validate(yaml.value)
    except ValidationError as error:
        return Checked(None, sorted(yaml.problems(error, _keys), key=_line))
    problems = list(_names(file, yaml))
    own: dict[str, Source] = {}
    try:
        own = parse_sources(file.sources, path)
    except InputError as error:
        problems.append(f"{yaml.at(['sources'])}: {error}")
    suite: Suite | None = None
    try:
        suite = load_suite(file.suite)
        suite = suite.quick() if file.quick else suite
        suite = suite if file.limit is None else suite.limited(file.limit)
    except CalmixError as error:
        problems.append(f"{yaml.at(['suite'])}: suite: {error}")
    allocations: dict[str, dict[str, float]] = {}
    for at, name in _allocation_files(file):
        try:
            shares = read_allocation(path.parent / user_path(name), sparsity=0.5)
            assert isinstance(shares, dict)
            allocations[name] = shares
        except InputError as error:
            problems.append(f"{yaml.at(at)}: {'.'.join(map(str, at))}: {error}")
    for label, model in file.models.items():
        if problem := _model_problem(model):
            problems.append(f"{yaml.at(['models', label])}: models.{label}: {problem}")
    for label, entry in file.calibrations.items():
        if problem := _calibration_problem(entry, own, file.licence):
            where = yaml.at(["calibrations", label])
            problems.append(f"{where}: calibrations.{label}: {problem}")
    if problems or suite is None:
        return Checked(None, sorted(problems, key=_line))
    return Checked(Study(file, text, path, own, suite, allocations))


def as_pattern(target: float | str) -> Pattern:
    """Return what a target of a method means: a share such as 0.6, or `2:4`.

    Raises:
        InputError: text that is no N:M, or a share outside (0, 1).
    """
    return parse_pattern(target) if isinstance(target, str) else Unstructured(target)


def strategy_of(calibration: Calibration, own: Mapping[str, Source]) -> Strategy:
    """Return how a calibration set is made, read off its text unless the file says."""
    if calibration.strategy is not None:
        return calibration.strategy
    path = user_path(calibration.written)
    if is_saved_set(path):
        manifest = CalibrationSet.open(path).manifest
        method, names = manifest.get("generated"), manifest["names"]
    else:
        spec = parse_spec(calibration.written, own)
        method, names = spec.generate, list(spec.mix.weights)
    if method is not None:
        return cast(Strategy, method)
    return "mix" if len(names) > 1 else "single"


def _one_of(what: str, value: str | None, known: Sequence[str]) -> str | None:
    if value is not None and value not in known:
        raise ValueError(f"unknown {what} '{value}': {nearest(value, known)}")
    return value


def _keys(path: Sequence[Any]) -> list[str]:
    """Return the keys a study file knows at a path."""
    kinds: dict[str, type[BaseModel]] = {"grids": Grid, "calibrations": Calibration}
    if "shape" in path:
        found: type[BaseModel] = Shape
    elif path and path[0] == "models":
        found = Model
    else:
        found = kinds.get(str(path[0]), StudyFile) if path else StudyFile
    return [field.alias or name for name, field in found.model_fields.items()]


def _names(file: StudyFile, yaml: YamlText) -> Iterator[str]:
    """Yield what a grid names that the top of the file does not know, and what is empty."""
    known = {"models": list(file.models), "calibrations": list(file.calibrations)}
    for key, names in known.items():
        if not names:
            yield f"{yaml.at([key])}: {key} is empty: the grid has no trials"
        if len(set(names)) < len(names):
            yield f"{yaml.at([key])}: {key} names one twice"
    if NONE in file.calibrations:
        at = yaml.at(["calibrations", NONE])
        yield f"{at}: calibrations.{NONE}: '{NONE}' stands for a method without calibration"
    for number, grid in enumerate(file.grids):
        for key, names in known.items():
            for place, name in enumerate(getattr(grid, key) or ()):
                if name not in names:
                    at = yaml.at(["grids", number, key, place])
                    yield f"{at}: grids.{number}.{key}: unknown '{name}': {nearest(name, names)}"
        for key in ("models", "calibrations", "methods", "seeds", "allocation", "recovery"):
            value = getattr(grid, key)
            if value is not None and not value:
                yield f"{yaml.at(['grids', number, key])}: grids.{number}.{key} is empty"
        for method, targets in (grid.methods or {}).items():
            if not targets:
                at = yaml.at(["grids", number, "methods", method])
                yield f"{at}: grids.{number}.methods.{method} names no sparsity"
    for method, targets in (file.methods or {}).items():
        if not targets:
            yield f"{yaml.at(['methods', method])}: methods.{method} names no sparsity"
    if file.seeds is not None and not file.seeds:
        yield f"{yaml.at(['seeds'])}: seeds is empty: the grid has no trials"
    for path, part in _parts(file):
        named = [*(part.methods or file.methods or ())]
        if part is file:
            named += [method for grid in file.grids for method in grid.methods or ()]
        useful = not named or any("damping" in get_method(name).options for name in named)
        if part.damping is not None and not useful:
            where = ".".join(map(str, [*path, "damping"]))
            yield f"{yaml.at([*path, 'damping'])}: {where} has no effect with {', '.join(named)}"
    yield from _without_effect(file, yaml)
    if not file.methods and not (file.grids and all(grid.methods for grid in file.grids)):
        yield f"{yaml.at(['methods'])}: methods is empty or missing: the grid has no trials"


def _parts(file: StudyFile) -> list[tuple[list[Any], _Targets]]:
    """Return the file itself and its grids, each behind where it stands."""
    return [([], file), *((["grids", n], grid) for n, grid in enumerate(file.grids))]


def _allocation_files(file: StudyFile) -> Iterator[tuple[list[Any], str]]:
    """Yield where an allocation is the path of a file, and the path."""
    for at, part in _parts(file):
        for name in part.allocation or ():
            if name not in (UNIFORM, *SPREAD):
                yield [*at, "allocation"], name


def _without_effect(file: StudyFile, yaml: YamlText) -> Iterator[str]:
    """Yield allocations and recoveries that nothing in their grid has a use for."""
    whole, *grids = _parts(file)
    for path, part in grids or [whole]:
        methods = part.methods or file.methods or {}
        useful = {name: t for name, t in methods.items() if get_method(name).needs is not None}
        patterns = [t for listed in useful.values() for t in listed if isinstance(t, str)]
        for key, idle in (("allocation", UNIFORM), ("recovery", NONE)):
            given = getattr(part, key)
            at = [*path, key] if given is not None else [key]
            if not methods or not set(given or getattr(file, key) or ()) - {idle}:
                continue
            where = f"{yaml.at(at)}: {'.'.join(map(str, at))} has no effect with"
            if not useful:
                yield f"{where} {', '.join(methods)}"
            elif key == "allocation" and patterns:
                yield f"{where} {patterns[0]}, the same in every layer: give it a grid of its own"


def _model_problem(model: Model) -> str | None:
    try:
        known_model(model.name)  # of the hub's, opening it tells
    except CalmixError as error:
        return str(error)
    return None


def _calibration_problem(
    calibration: Calibration, own: Mapping[str, Source], licence: str | None
) -> str | None:
    options = {"licence": licence, **calibration.given()}
    try:
        ask(calibration.written, sources=own, **options)
    except CalmixError as error:
        return str(error)
    return None


def _line(problem: str) -> int:
    """Return the line a complaint names; complaints are told in the order of the file."""
    number = problem.partition(" line ")[2].partition(":")[0]
    return int(number) if number.isdigit() else 0
