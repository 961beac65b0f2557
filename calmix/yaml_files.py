"""Strict reading of users' YAML files: every error names file and line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import ConstructorError

from calmix.errors import InputError, nearest, plain_problem

YAML_CHARACTERS = 500_000  # characters in a file; PyYAML takes seconds for this many
Parsed = TypeVar("Parsed", bound=BaseModel)


@cache
def packaged(file: str) -> Any:
    """Return the content of a YAML file of the package; do not modify it."""
    return yaml.safe_load(resources.files("calmix").joinpath(file).read_text(encoding="utf-8"))


class _Strict(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys instead of keeping the last."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key, problem = loader.construct_object(key_node), None
        if not isinstance(key, str | int | float | bool | None):
            problem = "a key is not text"
        elif key in seen:
            problem = f"'{key}' is given twice"
        if problem:
            raise ConstructorError(None, None, problem, key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _integer(loader: _Strict, node: yaml.ScalarNode) -> int | str:
    # YAML 1.1 reads a bare 2:4 as a base-60 number; here it is a pattern.
    return node.value if ":" in node.value else loader.construct_yaml_int(node)


def _string(loader: _Strict, node: yaml.ScalarNode) -> str:
    try:
        node.value.encode("utf-8")
    except UnicodeEncodeError:
        problem = "invalid Unicode: unpaired surrogate"
        raise ConstructorError(None, None, problem, node.start_mark) from None
    return str(node.value)


_Strict.add_constructor("tag:yaml.org,2002:str", _string)
_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Strict.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_yaml(text: str, where: str) -> tuple[dict[str, Any], yaml.Node]:
    """Parse YAML text that holds a mapping, and return its nodes too; errors call it `where`."""
    if len(text) > YAML_CHARACTERS:
        raise InputError(
            f"{where} has more than {YAML_CHARACTERS:,} characters, the limit for YAML"
        )
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = None if node is None else _Strict("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        ours = isinstance(error, ConstructorError)
        raise InputError(
            f"{where}{line}: {error.problem if ours else f'not YAML ({error.problem})'}"
        ) from error
    except RecursionError:
        raise InputError(f"{where} is nested too deeply, or contains itself") from None
    # Such as an impossible date; a value that its tag does not fit raises almost anything.
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError) as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict) or node is None:
        raise InputError(f"{where} is not a mapping of names to values")
    return value, node


def parse_model(model: type[Parsed], text: str, where: str) -> Parsed:
    """Parse YAML text and validate it with a pydantic model."""
    value, node = parse_yaml(text, where)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # A misspelt key is also reported as missing; the misspelling is more useful.
        lines = yaml_problems(error, model, node, where)
        raise InputError(next((x for x in lines if ": unknown key" in x), lines[0])) from None


def yaml_problems(
    error: ValidationError, model: type[BaseModel], node: yaml.Node, where: str
) -> list[str]:
    """Return every problem of a failed validation as `FILE line N: key: what is wrong`."""
    lines: dict[str, str] = {}
    schema = model.model_json_schema()
    parts = (schema, *schema.get("$defs", {}).values())
    known = {name for part in parts for name in part.get("properties", {})}
    for problem in error.errors():
        path = [part for part in problem["loc"] if part != "[key]"]
        line, depth = locate(node, path)
        message = plain_problem(problem["msg"])
        if problem["type"] == "extra_forbidden":
            message = f"unknown key: {nearest(str(path[-1]), known)}"
        elif problem["type"] == "missing":
            path, depth, message = path[:-1], len(path), f"lacks '{path[-1]}'"
        # Deeper parts are pydantic's own: the members of a union it tried.
        name = ".".join(map(str, path[:depth]))
        lines.setdefault(name, f"{where} line {line}: {name}: {message}")
    return [line.replace(": : ", ": ") for line in lines.values()]


def locate(node: yaml.Node, path: Sequence[Any]) -> tuple[int, int]:
    """Return the line of the deepest existing part of a path, and its depth."""
    line = node.start_mark.line + 1
    for depth, part in enumerate(path):
        entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        if isinstance(node, yaml.MappingNode):
            entries = {key.value: (key, value) for key, value in node.value}
        elif isinstance(node, yaml.SequenceNode):
            entries = {str(at): (one, one) for at, one in enumerate(node.value)}
        if str(part) not in entries:
            return line, depth
        key, node = entries[str(part)]
        line = key.start_mark.line + 1
    return line, len(path)


def read_text(path: Path) -> str:
    """Return a text file's content; InputError if it is missing, unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; InputError as in `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path), str(path))[0]


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a failed validation: where it is and what is wrong."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{where}'"
    if problem["type"] == "missing":
        return f"'{where}' is missing"
    return f"'{where}': {plain_problem(problem['msg'])}"
