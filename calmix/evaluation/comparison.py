"""Several smaller models beside one dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import ne
from pathlib import Path
from typing import Any

from calmix.errors import InputError
from calmix.evaluation.answers import compare_answers
from calmix.evaluation.behaviour import Behaviour, Pair, behaviour, likelihood
from calmix.evaluation.retention import Retention, task_pairs
from calmix.evaluation.scores import (
    KIND,
    CapabilityScores,
    check_same_suite,
    load_pair,
)
from calmix.options import Measure


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
