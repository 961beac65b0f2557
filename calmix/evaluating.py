"""`calmix.evaluate`: the scores of a model, or what it keeps of a dense one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from calmix.calibration.distance_texts import texts_for
from calmix.errors import InputError
from calmix.evaluation.comparison import Comparison, evaluate_against
from calmix.evaluation.evaluate import evaluate as score
from calmix.evaluation.scores import CapabilityScores, load_dense
from calmix.evaluation.suites import Suite, choose, runnable
from calmix.models.opening import OpenModel, check_models
from calmix.options import ModelOptions
from calmix.progress import Progress

# Options of a comparison, explained in `evaluate_against`, and of how models are opened.
OPTIONS = "allow_code_execution", "repeat", "cache", "batch_tokens"
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
        return score(model, suite, **part, **options)
    if isinstance(model, OpenModel):
        raise InputError("with `against`, evaluate takes a model's name: save the model first")
    if unknown := options.keys() - {*OPTIONS, *OPENING}:
        raise InputError(f"with `against`, evaluate has no option {min(unknown)}")
    allowed = bool(options.get("allow_code_execution"))
    chosen, left_out = runnable(choose(suite, **part), allowed)
    if isinstance(against, str | Path) and str(against).endswith(".json"):
        against = load_dense(Path(against))
    dense = against if isinstance(against, CapabilityScores) else str(against)
    named, texts = [str(model)], None
    if isinstance(dense, str):
        named, texts = [str(model), dense], texts_for(chosen)
    check_models(*named, **{name: options[name] for name in OPENING if name in options})
    with Progress(shown=False) as bar:
        small, large = evaluate_against(str(model), chosen, dense, texts=texts, bar=bar, **options)
    assert large is not None
    return Comparison.of(small.model, [(large, replace(small, not_run=tuple(left_out)))])
