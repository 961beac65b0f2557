"""A user's own prompts, and what a program can see of their answers without a right one.

A row has a `prompt` or the `messages` of a chat, up to a turn of the user, and optionally

    answer      the right answer, or a list of right ones
    check       how it is compared (`CHECK_KINDS`), or rules as in abilities/chat.yaml: {"lines": 3}
    tools       functions the model may call, in the form of OpenAI's API
    max_tokens  the most tokens to generate
    thinking    whether the chat template is to let the model think first

The dense model's answer to a prompt sets what is expected of others: its language, JSON, code, a
call of a tool. If the prompt names JSON, an answer that only begins as JSON sets it too.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calmix.errors import InputError, SourceError, nearest
from calmix.evaluation import checks
from calmix.evaluation.quantities import readings
from calmix.files import parse_json, sha256_json
from calmix.sources.documents import TEXT, fill
from calmix.sources.local import CHATS, FORMATS, chat_messages
from calmix.sources.registry import local_file

ANSWER_TOKENS = 256  # most tokens of an answer by default
MOST_TOKENS = 32_768
FIELDS = ("prompt", "question", "instruction", "input", "text")  # the first one present is read
CHECK_KINDS = {  # how an answer is compared: the check of an `Ask`
    "text": "text",
    "exact": "exact",
    "number": "number",
    "result": "result",
    "contains": "request",
    "json": "request",
    "tool": "tool",
}
MORE = "answer", "check", "tools", "max_tokens", "thinking"  # other fields of a row
# Properties of an answer, and what an answer without one is called.
FAULTS = {
    "text": "empty",
    "end": "unfinished",
    "progress": "looping",
    "language": "other language",
    "json": "broken JSON",
    "code": "code that does not parse",
    "tool call": "invalid tool call",
    "thought": "thinking without end",
    "right": "wrong",
}
THOUGHT = "</think>"
LOOP_CHARACTERS, LONGEST_PERIOD = 120, 120  # characters of a loop, and of its period at most
PYTHON_BLOCK = re.compile(
    r"```[^\S\n]*(?:python|py)[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE
)
CODE_SPAN = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)|\[TOOL_CALLS\](.*)", re.DOTALL)
SCRIPTS = {  # ranges of letters that identify a language, or a group of them
    "ja": "\u3040-\u30ff",
    "zh": "\u4e00-\u9fff",
    "ko": "\uac00-\ud7af",
    "ru": "\u0400-\u04ff",
    "ar": "\u0600-\u06ff",
    "hi": "\u0900-\u097f",
    "el": "\u0370-\u03ff",
    "he": "\u0590-\u05ff",
    "th": "\u0e00-\u0e7f",
}
JSON_TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


@dataclass(frozen=True)
class Ask:
    """An item with a generated answer: the question as a `chat` (a turn, or all messages) and as
    `plain` text, the right answer and its `check` ("" if nothing is compared), the most tokens to
    generate, and the texts that stop an answer. `number` is as in `tasks.Item`. `tools` may be
    called; `own` is whether it is a user's prompt; `thinking` is whether the chat template lets the
    model think first."""

    id: str
    number: int
    chat: str | tuple[dict[str, Any], ...] | None
    plain: str
    right: Any
    doc: Mapping[str, Any]
    check: str
    tokens: int
    until: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    own: bool = False
    thinking: bool = False

    @property
    def messages(self) -> tuple[dict[str, Any], ...] | None:
        """The messages of the chat; None for an item that is asked as plain text."""
        if isinstance(self.chat, str):
            return ({"role": "user", "content": self.chat},)
        return self.chat

    @property
    def question(self) -> str:
        """The question itself, without worked examples."""
        text = self.doc.get("question") or self.doc.get("query") or self.chat or self.plain
        return str(text).rpartition("Question:")[2]

    @property
    def sha256(self) -> str:
        """Hash of what is asked in a chat, which identifies a user's prompt and its half."""
        content = [self.messages, self.tools, self.thinking]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_prompts(path: str | Path, note: Callable[[str], None] | None = None) -> list[Ask]:
    """Read prompts from rows (.jsonl, .json, .csv, .tsv, .parquet; FILE@FIELD names a field) or
    from the lines of a .txt file. Of equal prompts only the first is kept; `note` is told how many
    were not.

    Raises:
        InputError: a row that cannot be asked, with its line.
    """
    prompts, count = dict[str, Ask](), 0
    for where, row in _rows(str(path)):
        try:
            one = parse_prompt(row)
        except (ValueError, SourceError) as error:
            raise InputError(f"{where}: {error}") from None
        prompts.setdefault(one.sha256, one)
        count += 1
    if not prompts:
        raise InputError(f"{path} has no prompts")
    if note is not None and count > len(prompts):
        note(f"{path}: prompts repeated, and asked once: {count - len(prompts)}")
    return list(prompts.values())


def halves(prompts: Sequence[Ask]) -> tuple[list[Ask], list[Ask]]:
    """Split prompts by their hash into those to calibrate with and those to test with, so that no
    prompt serves both whatever else is in its file. An InputError if either half is empty."""
    test = [one for one in prompts if one.number % 2 == 0]
    calibrate = [one for one in prompts if one.number % 2]
    if not calibrate or not test:
        raise InputError(
            f"{len(prompts)} prompts cannot be split into some to calibrate and some to test: add "
            "prompts"
        )
    return calibrate, test


def calibration_hash(prompts: Sequence[Ask]) -> str:
    """Return a hash of the half to calibrate with, which records of calibration sets have."""
    return sha256_json([one.sha256 for one in prompts if one.number % 2])


def _rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = local_file(name)
    path, ending = reader.path, reader.path.suffix.lower()
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file of prompts")
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if ending not in FORMATS or ending == ".md":
        known = ", ".join(one for one in FORMATS if one != ".md")
        raise InputError(f"cannot read prompts from {path}: supported endings are {known}")
    try:
        if (rows := FORMATS[ending]) is None:
            for at, line in enumerate(next(reader.read()).text.splitlines(), 1):
                if line.strip():
                    yield f"{path} line {at}", {"prompt": line}
            return
        kind = "line" if ending == ".jsonl" else "row"
        for at, row in rows(path, "{*}"):  # all columns
            row = row if isinstance(row, dict) else {"prompt": row}
            if reader.template != TEXT:
                row |= {"prompt": fill(reader.template, row)}
                row = {key: value for key, value in row.items() if key not in CHATS}
            yield f"{path} {kind} {at}", row
    except SourceError as error:
        raise InputError(str(error)) from error


def parse_prompt(row: dict[str, Any]) -> Ask:
    """Return the prompt of a row; a ValueError or SourceError says what is wrong. Even numbers are
    in the half to test with."""
    row = {key: value for key, value in row.items() if value not in (None, "")}
    for key in row:
        if key not in MORE and (meant := _misspelt(str(key))) and meant not in row:
            raise ValueError(f"unknown field '{key}': did you mean {meant}?")
    name = next((one for one in CHATS if one in row), None)
    if name is not None:
        messages = chat_messages(row[name], name, True) or ()
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    else:
        name = next((one for one in FIELDS if one in row), "prompt")
        if not isinstance(text := row.get(name, ""), str):
            raise ValueError(f"'{name}' must be a text")
        messages = ({"role": "user", "content": text.strip()},)
    if not messages or not str(messages[-1]["content"]).strip():
        raise ValueError('the prompt is empty: write {"prompt": "..."} or {"messages": [...]}')
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("invalid Unicode: unpaired surrogate") from None
    most = str(row.get("max_tokens", ANSWER_TOKENS)).removesuffix(".0")  # tables have 64.0
    tokens = int(most) if re.fullmatch(r"\d{1,9}", most) else 0
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"'max_tokens' must be a whole number from 1 to {MOST_TOKENS}")
    tools = _parsed(row.get("tools", []))
    tools = tuple(_tool(one) for one in tools) if isinstance(tools, list) else (_tool(tools),)
    thinking = str(row.get("thinking", False)).lower() in ("true", "1", "yes")
    check, right = _expected(row, tools)
    plain = "\n\n".join(one["content"] for one in messages if one["content"])
    doc = {"question": str(messages[-1]["content"])}
    one = Ask("", 0, messages, plain, right, doc, check, tokens, (), tools, True, thinking)
    return replace(one, id=one.sha256[:12], number=int(one.sha256[:8], 16))


@functools.lru_cache  # rows of a file have the same fields
def _misspelt(key: str) -> str:
    """Return the field of `MORE` that a similar one probably means; empty if none is close."""
    return next(iter(difflib.get_close_matches(key, MORE, 1, 0.85)), "")


def _parsed(value: Any) -> Any:
    """Return a value that a CSV file holds as JSON."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError as error:
            raise ValueError(f"'{value[:40]}' is not valid JSON: {error}") from None
    return value


def _tool(value: Any) -> dict[str, Any]:
    mapping = value if isinstance(value, dict) else {}
    function = mapping.get("function", mapping)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool must be {'type': 'function', 'function': {'name': ...}}")
    if not _is_schema(function.get("parameters") or {}):
        raise ValueError(
            f"the 'parameters' of tool {function['name']} must be a JSON schema: "
            "{'type': 'object', 'properties': {...}, 'required': [...]}"
        )
    return {"type": "function", "function": function}


def _is_schema(value: Any) -> bool:
    """Whether `valid_call` can read a value as the schema of a call's arguments."""
    if not isinstance(value, dict) or not isinstance(fields := value.get("properties") or {}, dict):
        return False
    names = value.get("required") or []
    lists = [names, *(one.get("enum") or [] for one in fields.values() if isinstance(one, dict))]
    return all(isinstance(one, list) for one in lists) and all(isinstance(n, str) for n in names)


def _expected(row: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> tuple[str, Any]:
    """Return the check of a row's answer and what is right, as `Ask` has them."""
    answer, check = row.get("answer"), _parsed(row.get("check"))
    if isinstance(check, dict):  # Parquet has None for what a row lacks
        check = {key: value for key, value in check.items() if value is not None} or None
    if isinstance(check, dict):
        if unknown := [key for key in check if key not in checks.REQUESTED]:
            raise ValueError(
                f"unknown rule '{unknown[0]}': {nearest(unknown[0], checks.REQUESTED)}"
            )
        if answer is not None:
            raise ValueError(
                "'answer' has no effect beside rules: leave it out, or make it the rule "
                '{"contains": ...}'
            )
        return "request", {key: _rule(key, value) for key, value in check.items()}
    if check is not None and str(check) not in CHECK_KINDS:
        raise ValueError(f"unknown check '{check}': {nearest(str(check), CHECK_KINDS)}")
    if answer is None:
        if check is not None:
            raise ValueError(f"the check '{check}' needs an 'answer'")
        return "", None
    if isinstance(answer, int | float) and not isinstance(answer, bool) and check is None:
        check = "number"
    some = [str(one) for one in answer] if isinstance(answer, list) else [str(answer)]
    if not some and check != "json":
        raise ValueError("'answer' is an empty list: name a right answer, or leave it out")
    match check or "text":
        case "number":
            for text in some:
                if all(one.value is None for one in readings(text)):
                    raise ValueError(f"'answer' must be a number, not '{text}'")
            return "number", some
        case "result":
            return "result", [f"\\boxed{{{one}}}" for one in some]
        case "contains":
            return "request", {"contains": _rule("contains", some)}
        case "json":
            return "request", {"json": _rule("json", answer)}
        case "tool":
            value = _parsed(answer)
            if not isinstance(value, dict) or not valid_call(value, tools):
                raise ValueError(
                    "'answer' must be a valid call of one of its 'tools', such as "
                    '{"name": "weather", "arguments": {"city": "Rome"}}'
                )
            return "tool", value
        case other:
            return CHECK_KINDS[other], some


def _rule(key: str, value: Any) -> Any:
    """Return the value of a rule as `checks.as_requested` takes it."""
    if key == "json":
        if not isinstance(value := _parsed(value), dict | list):
            raise ValueError(f"'json' needs a JSON object or list, not '{value}'")
        return json.dumps(value)
    if key in checks.COUNTED_RULES and not re.fullmatch(r"\d+", str(value)):
        raise ValueError(f"the rule '{key}' needs a whole number, not '{value}'")
    if key == "language" and str(value) not in checks.LANGUAGES:
        raise ValueError(f"unknown language '{value}': {nearest(str(value), checks.LANGUAGES)}")
    if key == "case":
        if value is not True:
            raise ValueError(f"the rule 'case' (capitals only) is true or left out, not '{value}'")
        return value
    several = key not in ("same", "begins")
    parts = value.split("|") if several and isinstance(value, str) else value
    parts = parts if several and isinstance(parts, list) else [parts]
    if not parts or not all(type(one) in (str, int, float) and str(one).strip() for one in parts):
        more = " or a list of texts, none of them empty" if several else ""
        raise ValueError(f"the rule '{key}' needs a text{more}, not '{value}'")
    return "|".join(re.escape(str(one)) if key == "among" else str(one) for one in parts)


# What can be seen of an answer


def properties(prompt: Ask, answer: str, ended: bool, dense: str | None = None) -> dict[str, bool]:
    """Return what is expected of an answer (keys of `FAULTS`), and whether it is so. `dense` is the
    dense model's answer, by default the answer itself."""
    model, question = answer if dense is None else dense, prompt.doc["question"]
    text, known, looping = body(answer), body(model), loops(answer.rstrip())
    traits = {"text": bool(text.strip()), "end": ended or looping, "progress": not looping}
    if prompt.thinking or THOUGHT in model:
        traits["thought"] = THOUGHT in answer
    if not traits["text"]:  # counted once, as empty
        return traits
    spoken = language(known) or language(question)
    if spoken:
        traits["language"] = language(text) in ("", spoken)
    begun = known.lstrip().startswith(("{", "[", "```json")) and "json" in question.lower()
    if begun or is_json(known):
        traits["json"] = is_json(text)
    blocks = PYTHON_BLOCK.findall(text)
    if blocks or PYTHON_BLOCK.search(known):
        traits["code"] = bool(blocks) and all(syntax(one) is not None for one in blocks)
    calls = tool_calls(text) if prompt.tools else []
    if calls or (prompt.tools and tool_calls(known)):
        traits["tool call"] = bool(calls) and all(valid_call(one, prompt.tools) for one in calls)
    return traits


def body(answer: str) -> str:
    """Return an answer without the thinking before it."""
    return answer.rpartition(THOUGHT)[2]


def before_stops(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stops in it."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def loops(row: Sequence[Any], size: int = LOOP_CHARACTERS, most: int = LONGEST_PERIOD) -> bool:
    """Whether a text or row ends in a part of at most `most` characters that is repeated four times
    or more, over at least `size` characters."""
    for period in range(1, most + 1):
        start = len(row) - max(size, 4 * period)
        if start >= 0 and row[start + period :] == row[start:-period]:
            return True
    return False


def language(text: str) -> str:
    """Return the language of a text outside code, by script or common words; "" if unclear."""
    text = CODE_SPAN.sub(" ", text)
    letters = sum(map(str.isalpha, text))
    for name, letters_of in SCRIPTS.items():
        count = len(re.findall(f"[{letters_of}]", text))
        if count > (0.1 if name == "ja" else 0.5) * letters:
            return name
    counts = checks.common_words(text)
    first, second, *_ = sorted(counts, key=lambda name: -counts[name])
    return first if counts[first] >= 4 and counts[first] >= 2 * counts[second] else ""


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list, perhaps in a code block."""
    block = re.search(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    text = (block[1] if block else text).strip()
    return text[:1] in ("{", "[") and checks.json_value(text) is not None


def syntax(code: str, mode: str = "exec") -> Any:
    """Return the syntax tree of Python code; None if it does not parse."""
    try:
        return ast.parse(code, mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two if nested deeply
        return None


def tool_calls(text: str) -> list[Any]:
    """Return the calls of tools in an answer, None for one that is not JSON: between the marks of
    Hermes, Qwen or Mistral, or an answer that is nothing but calls."""
    parts = [one or other for one, other in CALL.findall(text)]
    if not parts:
        bare = text.strip().removeprefix("<|python_tag|>").strip()
        if not (bare[:1] in ("{", "[") and re.search(r'"name"\s*:', bare)):
            return []
        parts = [bare]
    calls: list[Any] = []
    for part in parts:
        value = checks.json_value(part.strip())
        calls += value if isinstance(value, list) else [value]
    return calls


def valid_call(call: Any, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a call names one of the tools, with the arguments its schema asks for."""
    mapping = call if isinstance(call, dict) else {}
    known = {one["function"]["name"]: one["function"] for one in tools}
    if not isinstance(mapping.get("name"), str) or mapping["name"] not in known:
        return False
    schema = known[mapping["name"]].get("parameters") or {}
    values, types = arguments(mapping), schema.get("properties") or {}
    if values is None or not set(schema.get("required") or ()) <= set(values):
        return False
    return all(name in types and _fits(value, types[name]) for name, value in values.items())


def arguments(call: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a call; None if they are not a JSON object."""
    value = call.get("arguments", call.get("parameters", {}))
    value = checks.json_value(value) if isinstance(value, str) else value
    return value if isinstance(value, dict) else None


def _fits(value: Any, schema: Any) -> bool:
    mapping = schema if isinstance(schema, dict) else {}
    kind = JSON_TYPES.get(str(mapping.get("type")), object)
    if isinstance(value, bool) and mapping.get("type") in ("integer", "number"):
        return False
    return isinstance(value, kind) and value in (mapping.get("enum") or [value])


def same_call(answer: str, right: Mapping[str, Any]) -> bool:
    """Whether an answer is one call of the right tool that has the right arguments, and perhaps
    others; texts are compared without regard to case."""
    calls = [one for one in tool_calls(body(answer)) if isinstance(one, dict)]
    if len(calls) != 1 or calls[0].get("name") != right["name"]:
        return False
    values, wanted = arguments(calls[0]) or {}, arguments(right) or {}
    stated = {name: values.get(name) for name in wanted}
    return checks.same_json(stated, wanted)
