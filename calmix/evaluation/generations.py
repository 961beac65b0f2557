"""Text that models write: in answer to tasks, and to a few prompts to be read side by side.

`generate` is the one place where text is written for scoring; what is written is checked by the
task (`harness`). A dozen answers read side by side are no score: they show what figures do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from calmix.errors import InputError, ModelError
from calmix.evaluation.suites import Suite
from calmix.evaluation.tasks import load_items, preamble
from calmix.files import read_object, write_json
from calmix.yaml_files import first_problem

if TYPE_CHECKING:
    from calmix.evaluation.scorer import Scorer
    from calmix.models import OpenModel

KIND = "answers"
EACH = 3  # prompts a dimension
LONGEST = 600  # characters of a question worth reading
MOST = 50  # prompts of a file
TOKENS = 64


def generate(
    scorer: Scorer, contexts: Sequence[str], *, task: str = "", stops: Sequence[str] = (),
    room: int = TOKENS,
) -> list[str]:  # fmt: skip
    """Return what a model writes after each context, up to a stop, the end token or `room` tokens.

    Contexts too long are cut on the left.
    """
    from calmix.evaluation.greedy import Prompt as Asked
    from calmix.evaluation.greedy import answers

    name = scorer.opened.name
    if scorer.tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no end-of-text token")
    limit = scorer.max_length - room
    if limit <= 0:
        raise ModelError(
            f"task {task} generates up to {room} tokens, but the context of {name} is "
            f"{scorer.max_length}: leave that task out"
        )
    scorer.tick.total += len(contexts)
    encoded = [ids or [scorer.prefix] for ids in scorer.encode(list(contexts))]
    if cut := sum(len(ids) > limit for ids in encoded):
        scorer.truncated[task] += cut
    asked = [Asked(ids[-limit:], room, tuple(filter(None, stops))) for ids in encoded]
    return [one.text for one in answers(scorer.opened, asked, tick=scorer.tick)]


@dataclass(frozen=True)
class Prompt:
    """One prompt: what is `shown` of it, without worked examples, and what the model is `asked`.

    An empty line ends an answer that is `short`, beside the end token and `TOKENS`.
    """

    dimension: str
    task: str
    shown: str
    asked: str
    expected: str | None = None
    short: bool = False


@dataclass(frozen=True)
class Answered:
    """Prompts, the models by name and fingerprint, and what each model wrote after each prompt."""

    prompts: tuple[Prompt, ...]
    models: tuple[tuple[str, str], ...]
    answers: tuple[tuple[str, ...], ...]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        write_json(path, {"kind": KIND, "tokens": TOKENS, **asdict(self)})


def load_answers(path: Path) -> Answered:
    """Read what `Answered.save` wrote."""
    value = read_object(path, f"there is no file {path}")
    if value.pop("kind", None) != KIND:
        raise InputError(f"{path} holds no answers of calmix")
    value.pop("tokens", None)
    try:
        found = TypeAdapter(Answered).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {first_problem(error)}") from error
    if [len(row) for row in found.answers] != [len(found.prompts)] * len(found.models):
        raise InputError(f"{path} is damaged: answers and prompts do not fit together")
    return found


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a `.txt` file, one a line, or of a `.jsonl` or `.parquet` file."""
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
    found = []
    for dimension, tasks in suite.dimensions.items():
        able = [(name, spec) for name, spec in tasks.items()
                if spec.archive and spec.form in ("question", "answer")]  # fmt: skip
        for name, spec in able[:EACH]:
            items = load_items(spec)
            head = preamble([item.contexts[0] for item in items])
            short = [item for item in items if len(item.contexts[0]) - head <= LONGEST]
            count = -(-EACH // min(EACH, len(able)))
            for at in range(count if short else 0):
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
    """Return what a model writes after each prompt: its likeliest tokens, at most `TOKENS`."""
    from calmix.evaluation.scorer import Scorer

    scorer = Scorer(opened, progress=progress)
    room = min(TOKENS, scorer.max_length // 2)
    texts = generate(scorer, [prompt.asked for prompt in prompts], room=room)
    return tuple(
        text.strip().partition("\n\n")[0].rstrip() if prompt.short else text.strip()
        for prompt, text in zip(prompts, texts, strict=True)
    )
