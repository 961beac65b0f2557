"""Shared by the tests of evaluation: requests, a reference scorer, made-up task scores."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calmix.errors import InputError
from calmix.evaluation.measures import TaskScores
from calmix.evaluation.scores import CapabilityScores, write_scores
from calmix.evaluation.suites import ASKED, template
from calmix.models.opening import OpenModel
from calmix.yaml_files import packaged
from tests.tiny import tiny_model, tiny_tokenizer


def refuses(says, act, *arguments, error=InputError, **how):
    """See that an action ends with an error whose message matches."""
    with pytest.raises(error, match=says):
        act(*arguments, **how)


def table(text):
    """Return the cases "one -> other" of a text, each on a line of its own or behind a |."""
    return [case.split(" -> ") for case in re.split(r" \| |\n", text.strip())]


def lacks(text, *parts):
    """Return the parts that a text lacks."""
    return [one for one in parts if one not in text]


def opened(kind="llama", seed=0):
    """A tiny model in memory, as returned by `open_model`."""
    return OpenModel(f"tiny-{kind}", Path("nowhere"), tiny_model(kind, seed), tiny_tokenizer())


def new_suite(folder):
    """Write a user's new suite `mine.yaml` with its rows, and return the folder."""
    for name, text in template("mine").items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def benchmark_of(folder):
    """Return the benchmark that a folder of the archive belongs to: `minerva_math_algebra` and
    `minerva_math_500` belong together, and so does MBPP in every language."""
    return next((name for name in ("mbpp", "minerva_math") if name in folder), folder)


def benchmarks_read(sources):
    """Return the benchmarks in the archive that sources read."""
    members = [one for source in sources for one in getattr(source.reader, "members", ())]
    return {benchmark_of(member.split("/")[2]) for member in members}


def benchmark(spec):
    """Return the benchmark of a task's items; None if calmix made them."""
    if spec.asked is None:
        return spec.archive and benchmark_of(spec.archive.split("/")[0])
    parts = packaged(ASKED)[spec.asked]["from"].split("/")
    return benchmark_of(parts[2]) if len(parts) > 2 else None


def quiz():
    """Questions with choices after a shared preamble, some of them similar, and odd ones."""
    rng = random.Random(0)
    words = ["red", "blue", "green", "seven", "plus", "cat", "dog", "of"]
    preamble = "".join(f"Q: {' '.join(rng.choices(words, k=4))}\nA: x\n\n" for _ in range(3))
    pairs = [("Q: short", " a"), ("x ", "y"), ("Q: short", " a")]  # with a duplicate
    pairs += [("Pick:", letter) for letter in "abcd"]  # all at one position
    for _ in range(6):
        question = f"{preamble}Q: {' '.join(rng.choices(words, k=rng.randint(2, 6)))}\nA:"
        pairs += [(question, f" {word}") for word in rng.sample(words, 3)]
    rng.shuffle(pairs)
    return [("task", *one) for one in pairs]


def reference(model, requests):
    """Score one request at a time with the plain model."""
    answers, tokenizer = [], model.tokenizer
    for *_, context, answer in requests:
        stripped = context.rstrip()
        head = tokenizer(stripped)["input_ids"]
        rest = tokenizer(context[len(stripped) :] + answer)["input_ids"]
        with torch.inference_mode():
            logits = model.model(input_ids=torch.tensor([head + rest])).logits[0]
        known = logits.float().log_softmax(-1)[len(head) - 1 :]
        answers.append(sum(float(known[at, token]) for at, token in enumerate(rest)))
    return answers


def accuracy(values, name="quiz", dimension="general", chance=0.25):
    """Made-up accuracies of generated answers."""
    items = tuple(map(str, range(len(values))))
    return TaskScores(name, dimension, "acc", "accuracy", chance, items, tuple(values))


def written(name, dimension, right):
    """Made-up answers of a model, right or wrong."""
    one = accuracy([float(value) for value in right], name, dimension, chance=0.0)
    return replace(one, metric="as_asked", primary="kept", answers=("x",) * len(right))


def scored(*tasks, suite="s", not_run=()):
    """Scores of a model on tasks."""
    about = {"name": suite, "version": 1, "hash": suite}
    return CapabilityScores("m", "f", "float32", about, tasks, not_run=not_run)


def save_pair(path, dense, pruned):
    """Write scores of two models as `calmix evaluate --against -o` does; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_scores(path, {"scores": pruned.to_dict(), "dense": dense.to_dict()})
    return path


def bits(nats, sizes, name="text", dimension="code", baseline=3.0):
    """Made-up likelihoods of single answers; `baseline` is in nats per byte."""
    items = tuple(map(str, range(len(nats))))
    return TaskScores(
        name,
        dimension,
        "bits_per_byte",
        "bits",
        0.0,
        items,
        gold=(0,) * len(items),
        loglikelihoods=tuple((-float(value),) for value in nats),
        bytes=tuple((int(size),) for size in sizes),
        unigram=tuple(-baseline * size for size in sizes),
    )


def choices(values, gold, baselines=(), name="choice"):
    """Made-up log-likelihoods of choices, four bytes each."""
    right = [float(max(row) == row[at]) for row, at in zip(values, gold, strict=True)]
    return replace(
        accuracy(right, name, chance=1 / len(values[0])),
        primary="smoothed",
        gold=tuple(gold),
        loglikelihoods=tuple(map(tuple, values)),
        bytes=tuple((4,) * len(row) for row in values),
        baselines=tuple(map(tuple, baselines)),
        unigram=(-8.0,) * len(gold),
    )
