"""Sample answers of models to a panel of plain questions.

Ten answers side by side are not a score; they show what numbers hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from calmix.errors import InputError
from calmix.evaluation.greedy import answers, prompt
from calmix.evaluation.likelihood import Progress
from calmix.files import read_object, sha256_json, write_json
from calmix.manifest import check_seal, sealed
from calmix.models.opening import OpenModel, open_model
from calmix.progress import Progress as Bar
from calmix.yaml_files import first_problem, packaged

KIND = "answers"
TOKENS = 96  # per answer


@dataclass(frozen=True)
class Prompt:
    """A question, its topic (`about`), and its `plain` form for models without a chat template."""

    about: str
    shown: str
    plain: str


@dataclass(frozen=True)
class Answered:
    """Prompts, models by name and fingerprint, and the answers of each model in that order."""

    prompts: tuple[Prompt, ...]
    models: tuple[tuple[str, str], ...]
    answers: tuple[tuple[str, ...], ...]

    def save(self, path: Path) -> None:
        """Write everything as JSON, sealed by its hash; of two models, the first is dense."""
        named = [{"name": name, "sha256": sha256} for name, sha256 in self.models]
        roles = dict(zip(("against", "model"), named, strict=True)) if len(named) == 2 else {}
        head = {"kind": KIND, "tokens": TOKENS, "request": prompts_record(self.prompts)}
        write_json(path, sealed({**head, **roles, **asdict(self)}))


def prompts_record(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Return what a file of answers records of its prompts."""
    return {"prompts": sha256_json([asdict(one) for one in prompts])}


def load_answers(path: Path) -> Answered:
    """Read what `Answered.save` wrote."""
    value = read_object(path, f"there is no file {path}")
    if value.get("kind") != KIND:
        raise InputError(f"{path} is not a file of answers written by calmix")
    check_seal(path, value)
    try:
        loaded = TypeAdapter(Answered).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {first_problem(error)}") from error
    if [len(row) for row in loaded.answers] != [len(loaded.prompts)] * len(loaded.models):
        raise InputError(f"{path} is damaged: the answers do not match the prompts")
    return loaded


def panel() -> list[Prompt]:
    """Return the ten plain questions of every report card."""
    file = packaged("evaluation/panel.yaml")
    head = "".join(f"Question: {one}\nAnswer: {answer}\n\n" for one, answer in file["examples"])
    return [
        Prompt(about, shown, f"{head}Question: {shown}\nAnswer:")
        for about, shown in file["questions"]
    ]


def answer(
    opened: OpenModel, prompts: Sequence[Prompt], *, progress: Progress | None = None
) -> tuple[str, ...]:
    """Return a model's greedy answer to each prompt, in its chat template if it has one. Answers
    longer than `TOKENS` are cut and end in an ellipsis."""
    inputs = [
        prompt(
            opened.tokenizer,
            [{"role": "user", "content": one.shown}],
            one.plain,
            TOKENS,
            ("\nQuestion:",),
        )
        for one in prompts
    ]
    texts = answers(opened, inputs, progress=progress)
    return tuple(text.strip() + ("" if ended else " …") for text, ended in texts)


def answer_all(models: Sequence[str], prompts: Sequence[Prompt], bar: Bar, **how: Any) -> Answered:
    """Return the answers of models by name, opened one after another; `how` as for `open_model`."""
    named, written = list[tuple[str, str]](), list[tuple[str, ...]]()
    for name in models:
        opened = open_model(name, **how)
        written.append(answer(opened, prompts, progress=bar.of(f"{name} answers")))
        named.append((name, opened.fingerprint))
    return Answered(tuple(prompts), tuple(named), tuple(written))
