"""What several models write after the same prompts, greedily, to be read side by side.

No score: a dozen texts show what figures do not, and prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from calmix.errors import InputError
from calmix.files import read_object, write_json
from calmix.yaml_files import first_problem

if TYPE_CHECKING:
    from calmix.evaluation.suites import Suite
    from calmix.models import OpenModel

KIND = "answers"
EACH = 3  # prompts a dimension
LONGEST = 600  # characters of a question worth reading
MOST = 50  # prompts of a file
TOKENS = 64


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        shown: the question, without worked examples before it.
        asked: what the model is given.
        expected: the right answer, where there is one.
        short: whether an empty line ends the answer, beside the end token and `TOKENS`.
    """

    dimension: str
    task: str
    shown: str
    asked: str
    expected: str | None = None
    short: bool = False


@dataclass(frozen=True)
class Answered:
    """Prompts, and what each model wrote after each of them.

    Attributes:
        models: name and fingerprint of each.
        answers: by model, then by prompt.
    """

    prompts: tuple[Prompt, ...]
    models: tuple[tuple[str, str], ...]
    answers: tuple[tuple[str, ...], ...]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        write_json(path, {"kind": KIND, "tokens": TOKENS, **asdict(self)})


_ANSWERED = TypeAdapter(Answered)


def load_answers(path: Path) -> Answered:
    """Read what `Answered.save` wrote.

    Raises:
        InputError: no such file, or it holds something else.
    """
    value = read_object(path, f"there is no file {path}")
    if value.pop("kind", None) != KIND:
        raise InputError(f"{path} holds no answers of calmix")
    value.pop("tokens", None)
    try:
        found = _ANSWERED.validate_python(value)
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {first_problem(error)}") from error
    if any(len(row) != len(found.prompts) for row in found.answers) or len(found.answers) != len(
        found.models
    ):
        raise InputError(f"{path} is damaged: answers and prompts do not fit together")
    return found


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a `.txt` file, one a line, or of a `.jsonl` or `.parquet` file.

    Raises:
        InputError: there are more than are worth reading.
        SourceError: the file cannot be read, or holds no text.
    """
    from calmix.sources.readers import LocalFile

    texts = [document.text for document in LocalFile(type="file", path=path).read()]
    if path.suffix.lower() == ".txt":
        texts = [line for text in texts for line in text.splitlines()]
    texts = [text.strip() for text in texts if text.strip()]
    if len(texts) > MOST:
        raise InputError(f"{path} holds {len(texts)} prompts: {MOST} are the most")
    return [Prompt("own", path.name, text, text) for text in texts]


def suite_prompts(suite: Suite) -> list[Prompt]:
    """Return a few items of each dimension, of its first tasks that have any in the archive.

    The models are asked as for the scores, worked examples included; answers end at an empty line.
    """
    from calmix.evaluation.tasks import load_items, preamble

    found = []
    for dimension, tasks in suite.dimensions.items():
        able = [(name, spec) for name, spec in tasks.items()
                if spec.archive and spec.form in ("question", "answer")]  # fmt: skip
        for name, spec in able[:EACH]:
            items = load_items(spec)
            head = preamble([item.contexts[0] for item in items])
            short = [item for item in items if len(item.contexts[0]) - head <= LONGEST]
            count = -(-EACH // min(EACH, len(able)))
            for at in range(count):
                if not short:
                    break
                item = short[(2 * at + 1) * len(short) // (2 * count)]
                text = item.contexts[0]
                shown = text[head:].strip()
                if spec.shots and not head:  # examples of its own: the question stands last
                    shown = shown.rpartition("\n\n")[2]
                right = item.choices[item.gold].strip()
                found.append(Prompt(dimension, name, shown, text, right, short=True))
    return found


def answer(
    opened: OpenModel,
    prompts: Sequence[Prompt],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Return what a model writes after each prompt: its likeliest tokens, at most `TOKENS`.

    Raises:
        ModelError: the tokenizer has no end token, or the model's context is too short.
    """
    from calmix.evaluation.scorer import Scorer

    scorer = Scorer(opened, progress=progress)
    room = min(TOKENS, scorer.max_length // 2)
    asked: list[Any] = [
        SimpleNamespace(
            args=(prompt.asked, {"until": [], "max_gen_toks": room, "do_sample": False}),
            task_name=prompt.task,
        )
        for prompt in prompts
    ]
    texts = [text.strip() for text in scorer.generate_until(asked)]
    return tuple(
        text.partition("\n\n")[0].rstrip() if prompt.short else text
        for prompt, text in zip(prompts, texts, strict=True)
    )
