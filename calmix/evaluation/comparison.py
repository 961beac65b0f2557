"""Several smaller models beside one dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import ne
from pathlib import Path
from typing import Any

from torch import Tensor

from calmix.errors import InputError
from calmix.evaluation.answers import compare_answers
from calmix.evaluation.behaviour import Behaviour, Pair, behaviour, likelihood
from calmix.evaluation.distance import distance, pooled, reference
from calmix.evaluation.evaluate import can_think, evaluate, how_asked, own_answers
from calmix.evaluation.journal import Journal
from calmix.evaluation.retention import Retention, task_pairs
from calmix.evaluation.scores import (
    KIND,
    CapabilityScores,
    check_same_form,
    check_same_suite,
    describe,
    load_pair,
)
from calmix.evaluation.served import Served
from calmix.evaluation.suites import Suite
from calmix.models.folder import tokenizer_fingerprint
from calmix.models.loading import load_tokenizer
from calmix.models.opening import OpenModel, open_model, resolve_model
from calmix.options import Measure
from calmix.progress import Progress


@dataclass(frozen=True)
class Comparison:
    """A smaller model beside the dense one, on one or several suites.

    `retention` is by the chosen measure on the suite with generated answers, or the first.
    """

    name: str
    pairs: Sequence[Pair]
    behaviour: Behaviour
    retention: Retention
    likelihood: Retention | None

    @classmethod
    def of(cls, name: str, pairs: Sequence[Pair], measure: Measure | None = None) -> Comparison:
        """Compare two models' scores; by default by the primary measure of `retention`."""
        dense, small = max(pairs, key=lambda pair: any(task.written for task in pair[0].tasks))
        retained = small.retention(dense, measure)
        return cls(name, pairs, behaviour(*pairs), retained, likelihood(*pairs[0]))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-serialisable values."""
        return {"retention": self.retention.to_dict(), "behaviour": self.behaviour.to_dict()}


def evaluate_against(
    model: str | Served,
    suite: Suite,
    against: CapabilityScores | Served | str | None = None,
    *,
    texts: Callable[[OpenModel], Mapping[str, Tensor]] | None = None,
    on_answers: bool = True,
    allow_code_execution: bool = False,
    repeat: bool = False,
    cache: bool = True,
    batch_tokens: int | None = None,
    journal: Journal | None = None,
    bar: Progress,
    **opening: Any,
) -> tuple[CapabilityScores, CapabilityScores | None]:
    """Score a model on a suite, and return its scores and those of the dense model.

    Args:
        against: the dense model, which is scored first, or its scores.
        texts: returns rows of token ids by dimension, on which the distance to a dense model given
            by name is measured.
        on_answers: for a suite of a user's prompts, whether it is measured on the dense model's own
            answers.
        repeat: generate the dense model's answers twice; without one, the model's own.
        cache: whether results of the dense model may come from the cache.
        allow_code_execution, batch_tokens, journal: as for `calmix.evaluate`.
        **opening: as for `open_model`.

    Raises:
        InputError: the models would be asked in different forms, or scored on different suites, or
            are to think and their template has no switch for it.
    """
    original = None if isinstance(against, CapabilityScores) else against
    dense = against if isinstance(against, CapabilityScores) else None
    trust = bool(opening.get("trust_remote_code"))
    named = [one for one in (model, original) if isinstance(one, str)]
    served = [one for one in (model, original) if isinstance(one, Served)]
    tokenizers = [load_tokenizer(resolve_model(name), name, trust) for name in named]
    if dense is not None:
        check_same_suite(describe(suite), dense.suite)
    forms = ["" if dense is None else dense.form, *(how_asked(t, suite) for t in tokenizers)]
    check_same_form(*forms)
    thinks = {name: can_think(t) for name, t in zip(named, tokenizers, strict=True) if suite.asks}
    if suite.thinking and not all(thinks.values()):
        name = next(name for name, able in thinks.items() if not able)
        raise InputError(f"--thinking: the chat template of {name} has no switch for it")
    if any(thinks.values()) and not suite.thinking:
        bar.note("chats are answered without thinking; --thinking asks for it")
    if original is not None and suite.own and on_answers:
        on_answers = not served and len({tokenizer_fingerprint(t) for t in tokenizers}) == 1
        if not on_answers:
            why = "a server gives no probabilities" if served else "their tokenizers differ"
            bar.note(f"KL is left out: {why}")
    from_answers = suite.own and on_answers
    for one in served:  # asked in the form of the model beside it
        one.chat = "worked examples" not in forms

    def score(opened: OpenModel | Served, first: bool) -> CapabilityScores:
        return evaluate(
            opened,
            suite,
            batch_tokens=batch_tokens,
            allow_code_execution=allow_code_execution,
            floors=first,
            repeat=repeat and first,
            cache=cache and first and original is not None,
            dense=dense,
            journal=journal,
            progress=bar.of(f"scoring {Path(opened.name).name}"),
        )

    def opened(one: str | Served) -> OpenModel | Served:
        return one if isinstance(one, Served) else open_model(one, **opening)

    states = apart = None
    if original is not None:
        first = opened(original)
        if served or not isinstance(first, OpenModel):
            dense = score(first, True)
        else:
            if texts is not None and not from_answers:
                states = reference(first, texts(first), cache=cache)
            dense = score(first, True)
            if from_answers:
                rows, last = own_answers(first, suite, dense)
                states = reference(first, rows, last=last) if rows else None
        del first
    small = opened(model)
    if states is not None and isinstance(small, OpenModel):
        apart = distance(
            small,
            states,
            dense=lambda: open_model(str(original), **opening),
            progress=bar.of("distance to the dense model"),
        )
        apart = pooled(apart, next(iter(suite.dimensions))) if from_answers else apart
    return replace(score(small, against is None), distance=apart), dense


def scores_record(
    scores: CapabilityScores, dense: CapabilityScores | None, measure: Measure | None = None
) -> dict[str, Any]:
    """Return the content of a file of scores: name and hash of each model, what it scored, and what
    the model keeps of a dense one."""
    models = {"model": scores} if dense is None else {"model": scores, "against": dense}
    names = {role: {"name": one.model, "sha256": one.fingerprint} for role, one in models.items()}
    record = {"kind": KIND, "request": {"suite": scores.suite}, **names, "scores": scores.to_dict()}
    if dense is not None:
        record["dense"] = dense.to_dict()
        record |= Comparison.of(scores.model, [(dense, scores)], measure).to_dict()
        if (changed := compare_answers((dense, scores))) is not None:
            record["prompts"] = changed.to_dict()
    return record


def read_pairs(
    files: Mapping[str, Sequence[Path]],
    against: CapabilityScores | None,
    note: Callable[[str], None],
) -> dict[str, list[Pair]]:
    """Read the scores of the dense and the smaller models in the files of each name.

    A file's dense scores are those `against`, else its own, else those of the first file. Only
    suites that all names have remain; `note` receives what is left out, and where dense scores
    differ.

    Raises:
        InputError: a file lacks dense scores or is about another dense model, or no suite is
            common to all.
    """
    first, pairs = against, dict[str, list[Pair]]()
    for name, paths in files.items():
        pairs[name] = []
        for path in paths:
            own, small = load_pair(path)
            if (dense := against or own or first) is None:
                raise InputError(
                    f"{path} was scored without a dense model: name its file with --against"
                )
            first = first or dense
            if own is not None and own.fingerprint != first.fingerprint:
                raise InputError(
                    f"{path} was scored against {own.model}, not against the dense model of the "
                    f"others ({first.model}): compare it separately"
                )
            pairs[name].append((dense, small))
    return _in_common(pairs, note)


def _in_common(
    pairs_of: Mapping[str, Sequence[Pair]], note: Callable[[str], None]
) -> dict[str, list[Pair]]:
    """Return the pairs of the suites that all have."""
    hashes = [{small.suite["hash"] for _, small in pairs} for pairs in pairs_of.values()]
    shared = set[str].intersection(*hashes)
    head, *others = pairs_of
    if not shared:
        for pairs in pairs_of.values():
            check_same_suite(pairs[-1][1].suite, pairs_of[head][-1][1].suite)
        raise InputError("no suite is common to all that are compared: compare fewer at a time")
    for name, pairs in pairs_of.items():
        for _, small in pairs:
            if small.suite["hash"] not in shared:
                note(f"left out: suite {small.suite['name']} of {name}, which others lack")
    common = {
        name: [pair for pair in pairs if pair[1].suite["hash"] in shared]
        for name, pairs in pairs_of.items()
    }
    for name in others:
        for (one, _), (other, _) in zip(common[head], common[name], strict=True):
            tasks = task_pairs(one.tasks, other.tasks)
            if differ := sum(sum(map(ne, left.values, right.values)) for left, right in tasks):
                note(
                    f"the dense model's own results in {head} and {name} differ in {differ} items "
                    "(rounding): each model is compared with those in its file"
                )
    return common
