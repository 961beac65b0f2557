"""Scores of a model, alone or beside those of a dense one: `calmix.evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from calmix.calibration.distance_texts import texts_for
from calmix.errors import InputError
from calmix.evaluation.comparison import Comparison
from calmix.evaluation.distance import distance as measure_distance
from calmix.evaluation.distance import pool_distances, reference
from calmix.evaluation.evaluate import can_think, how_asked, own_answers
from calmix.evaluation.evaluate import evaluate as score_alone
from calmix.evaluation.journal import Journal
from calmix.evaluation.scores import (
    CapabilityScores,
    check_same_form,
    check_same_suite,
    describe,
    load_dense,
)
from calmix.evaluation.served import Served
from calmix.evaluation.suites import Suite, choose, runnable
from calmix.files import user_path
from calmix.models.folder import tokenizer_fingerprint
from calmix.models.loading import load_tokenizer
from calmix.models.opening import OpenModel, check_models, open_model, resolve_model
from calmix.options import ModelOptions
from calmix.progress import Progress

# Options of a comparison, explained in `evaluate_against`, and of how models are opened.
OPTIONS = "allow_code_execution", "repeat", "cache", "distance"
OPENING = tuple(ModelOptions.model_fields)


@overload
def evaluate(
    model: OpenModel | str | Path,
    suite: Suite | str | Path = ...,
    *,
    against: None = None,
    **options: Any,
) -> CapabilityScores: ...


@overload
def evaluate(
    model: str | Path,
    suite: Suite | str | Path = ...,
    *,
    against: CapabilityScores | str | Path,
    **options: Any,
) -> Comparison: ...


def evaluate(
    model: OpenModel | str | Path,
    suite: Suite | str | Path = "offline",
    *,
    against: CapabilityScores | str | Path | None = None,
    dimensions: Sequence[str] = (),
    tasks: Sequence[str] = (),
    quick: bool = False,
    limit: int | None = None,
    **options: Any,
) -> CapabilityScores | Comparison:
    """Score a model on a suite; with `against`, the name of the dense model, its scores or a .json
    file of them, also compare the two, as `calmix evaluate --against` does.

    Args:
        **options: those of `calmix.evaluation.evaluate.evaluate`; with `against`, `OPTIONS`, and
            those of `calmix.open_model`.

    Raises:
        CalmixError: an error the user can fix.
    """
    part: dict[str, Any] = {"dimensions": dimensions, "tasks": tasks, "quick": quick}
    part["limit"] = limit
    if against is None:
        return score_alone(model, suite, **part, **options)
    if isinstance(model, OpenModel):
        raise InputError("with `against`, evaluate takes a model's name: save the model first")
    if unknown := options.keys() - {*OPTIONS, *OPENING}:
        raise InputError(f"with `against`, evaluate has no option {min(unknown)}")
    dense = against if isinstance(against, CapabilityScores) else named_or_scored(str(against))
    named = [str(one) for one in (model, dense) if not isinstance(one, CapabilityScores)]
    check_models(*named, **{name: options[name] for name in OPENING if name in options})
    with Progress(shown=False) as bar:
        small, large = evaluate_against(
            str(model), choose(suite, **part), dense, bar=bar, **options
        )
    assert large is not None
    return Comparison.of(small.model, [(large, small)])


def named_or_scored(dense: str) -> str | CapabilityScores:
    """Return the name of a dense model, or the scores in a .json file."""
    return load_dense(user_path(dense)) if dense.lower().endswith(".json") else dense


def evaluate_against(
    model: str | Served,
    suite: Suite,
    against: CapabilityScores | Served | str | None = None,
    *,
    texts: Mapping[str, Path] | None = None,
    distance: bool = True,
    allow_code_execution: bool = False,
    repeat: bool = False,
    cache: bool = True,
    journal: Journal | None = None,
    bar: Progress,
    **opening: Any,
) -> tuple[CapabilityScores, CapabilityScores | None]:
    """Score a model on a suite, and return its scores and those of the dense model.

    Args:
        suite: tasks that run generated code are left out unless that is allowed.
        against: the dense model, which is scored first, or its scores.
        texts: the user's own, by dimension, for the distance to a dense model given by name.
        distance: whether it is measured: on texts, or for a suite of a user's prompts on the dense
            model's own answers.
        repeat: generate the dense model's answers twice; without one, the model's own.
        cache: whether results of the dense model may come from the cache.
        allow_code_execution, journal: as for `calmix.evaluate`.
        **opening: as for `open_model`.

    Raises:
        InputError: the models would be asked in different forms, or scored on different suites, or
            are to think and their template has no switch for it.
    """
    suite, left_out = runnable(suite, allow_code_execution)
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
    on_answers = suite.own and distance
    if original is not None and on_answers:
        on_answers = not served and len({tokenizer_fingerprint(t) for t in tokenizers}) == 1
        if not on_answers:
            why = "a server gives no probabilities" if served else "their tokenizers differ"
            bar.note(f"KL is left out: {why}")
    on_texts = texts_for(suite, texts) if distance and not on_answers else None
    for one in served:  # asked in the form of the model beside it
        one.chat = "worked examples" not in forms

    def score(opened: OpenModel | Served, first: bool) -> CapabilityScores:
        return score_alone(
            opened,
            suite,
            allow_code_execution=allow_code_execution,
            baselines=first,
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
            if on_texts is not None:
                states = reference(first, on_texts(first), cache=cache)
            dense = score(first, True)
            if on_answers:
                rows, last = own_answers(first, suite, dense)
                states = reference(first, rows, last=last) if rows else None
        del first
    small = opened(model)
    if states is not None and isinstance(small, OpenModel):
        apart = measure_distance(
            small,
            states,
            dense=lambda: open_model(str(original), **opening),
            progress=bar.of("distance to the dense model"),
        )
        apart = pool_distances(apart, next(iter(suite.dimensions))) if on_answers else apart
    scores = replace(score(small, against is None), distance=apart, not_run=tuple(left_out))
    return scores, dense
