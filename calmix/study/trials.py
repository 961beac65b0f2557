"""The trials of a study: the expanded grid, and the inputs that determine each outcome.

A trial's id is the hash of its resolved request: the model's files, the definition of the
calibration set with the content of the user's own files, method, pattern, recovery, suite and
scorer. Package versions are not part of it; they are recorded with every result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from calmix.calibration.dataset import saved_set
from calmix.calibration.leakage import WORDS, guarded_suites
from calmix.calibration.request import CalibrationRequest, parse_calibration
from calmix.calibration.selfgen.generators import Generator
from calmix.calibration.selfgen.writing import WRITER_VERSION
from calmix.evaluation.evaluate import SCORER
from calmix.files import content_sha256, sha256_json
from calmix.models.folder import fingerprint
from calmix.models.opening import resolve_model
from calmix.models.shards import weight_bytes
from calmix.options import RECOVERY_OPTIONS, Strategy
from calmix.pruning.methods import Method, get_method
from calmix.pruning.patterns import Pattern
from calmix.pruning.requests import (
    SEED,
    PruneRequest,
    RecoverRequest,
    printed,
    prune_request,
    recovery_of,
)
from calmix.sources.local import LocalFile
from calmix.sources.registry import get_source
from calmix.study.spec import WITHOUT, Study, StudyGrid

REQUEST_FORMAT = 1  # of the request; raised when the same request would give another outcome
# Added later: left out of the request if empty, so that older ids stay valid.
LATER = ("options", "embeddings", "recovery", "statistics")
RECORDED = {"method", *RECOVERY_OPTIONS}

Condition = tuple[Any, ...]  # everything but calibration set and seed
Key = tuple[Any, ...]  # identifies a trial within its study


@dataclass(frozen=True)
class Planned:
    """One trial of a study's grid, with names from the study file.

    Attributes:
        request: as from the command line; `request.drawn()` goes to `calmix.calibration_set`.
        rows, length, seed: of the calibration set, with defaults filled in; 0 without a set.
        parsed: how the calibration set is made.
        label: short description, unique within the study.
        definition: the resolved request, JSON-serialisable, and `id` its hash; empty until
            resolved. `calibration_id` is the hash of model and calibration, by which sets are
            shared.
    """

    model: str
    calibration: str
    strategy: Strategy
    request: PruneRequest
    rows: int = 0
    length: int = 0
    seed: int = 0
    recovery: RecoverRequest | None = None
    parsed: CalibrationRequest | None = field(default=None, compare=False)
    label: str = field(default="", compare=False)
    id: str = ""
    definition: dict[str, Any] = field(default_factory=dict, compare=False)
    calibration_id: str | None = None

    @property
    def pattern(self) -> str:
        """Sparsity or pattern as printed: `60%` or `2:4`."""
        return printed(self.request.target)

    @property
    def recipe(self) -> str:
        """Method, embeddings and recovery: `sparsegpt + distill,epochs=1`."""
        request, recovery = self.request, None if self.recovery is None else self.recovery.text
        outside = f"embeddings {request.embeddings:g}" if request.embeddings else None
        parts = request.chosen.text, outside, recovery
        return " + ".join(filter(None, parts))

    @property
    def condition(self) -> Condition:
        """All settings except the calibration set and the seed."""
        sizes = self.rows, self.length, self.request.propagation
        return self.model, self.recipe, self.pattern, *sizes

    @property
    def pruned(self) -> Key:
        """The key without recovery: equal for trials that start from the same pruned model."""
        return replace(self, recovery=None).key

    @property
    def key(self) -> Key:
        """Identifies the trial within its study."""
        model, *how, propagation = self.condition
        return model, self.calibration, *how, self.seed, propagation


def planned_trials(study: Study) -> list[Planned]:
    """Return a study's trials in the order in which they run: by grid, then by calibration set.

    Duplicates between grids are dropped; trials that differ only in recovery are adjacent.
    """
    planned: dict[Key, dict[Key, Planned]] = {}
    default = {"seeds": [SEED], "recovery": [WITHOUT]}
    top = [(name, getattr(study.file, name)) for name in StudyGrid.model_fields]
    for grid in study.file.grids or [StudyGrid()]:
        filled = [*default.items(), *top, *grid]  # the last given value wins
        for trial in _of_grid(study, {key: one for key, one in filled if one is not None}):
            planned.setdefault(trial.pruned, {}).setdefault(trial.key, trial)
    trials = [trial for alike in planned.values() for trial in alike.values()]
    conditions = {trial.condition for trial in trials}
    return [replace(trial, label=_label(trial, conditions)) for trial in trials]


def _label(trial: Planned, conditions: Collection[Condition]) -> str:
    """Label a trial by set, seed, method, pattern, and any other setting that varies."""
    model, recipe, pattern, rows, length, propagation = trial.condition
    alike = [one for one in conditions if one[1:3] == (recipe, pattern)]
    sizes, spread = f"{rows} x {length}", f"{propagation} propagation"
    parts = (model, slice(1)), (sizes, slice(3, 5)), (spread, slice(5, 6))
    more = [text for text, place in parts if len({one[place] for one in alike}) > 1]
    name = ", ".join([f"{recipe} {pattern}", *more])
    return f"{trial.calibration} {name} seed {trial.seed}" if trial.rows else name


def _of_grid(study: Study, grid: dict[str, Any]) -> Iterator[Planned]:
    listed: list[tuple[Method, Pattern]] = [
        (get_method(name), target) for name, each in grid["methods"].items() for target in each
    ]
    calibrated = [one for one in listed if one[0].needs is not None]
    same = {"embeddings": grid.get("embeddings")}
    for model in grid["models"]:
        for method, target in listed:
            if method.needs is None:
                request = prune_request(method=method.text, pattern=target, **same)
                yield Planned(model, WITHOUT, "none", request)
        for seed, label in product(grid["seeds"], grid["calibrations"]):
            # Precedence: the set's entry, the grid, the top of the study file, and for the leakage
            # guard the suite that is scored.
            entry, top = study.file.calibrations[label], study.file.explicit()
            if saved_set(entry.written):  # takes only its entry and the licence
                draw = {k: v for k, v in top.items() if k == "licence"} | entry.explicit()
            else:
                if parse_calibration(entry.written, sources=study.own).generator is not None:
                    top.pop("packing", None)  # has no effect
                sizes = {k: v for k, v in grid.items() if k in ("rows", "length")}
                draw = {"leakage": study.file.suite, **top, **sizes, **entry.explicit()}
                draw["seed"] = seed
            parsed = parse_calibration(entry.written, sources=study.own, **draw)
            drawn = parsed.draw.seed if parsed.saved is None else parsed.saved.manifest.get("seed")
            draw |= same | {"calibration": entry.written, "propagation": grid.get("propagation")}
            draw["statistics"] = study.file.statistics
            for recovery, (method, target) in product(grid["recovery"], calibrated):
                request = prune_request(method=method.text, pattern=target, **draw)
                yield Planned(
                    model,
                    label,
                    parsed.strategy,
                    request,
                    parsed.draw.rows,
                    parsed.draw.length,
                    drawn or 0,
                    None if recovery == WITHOUT else recovery_of(recovery),
                    parsed,
                )


def resolve_all(study: Study, trials: Iterable[Planned]) -> list[Planned]:
    """Fill in the definitions and hashes of trials."""
    content, suite, resolved = cache(content_sha256), study.suite, []
    models = {
        label: {"sha256": fingerprint(resolve_model(entry.name)), "dtype": entry.dtype}
        for label, entry in study.file.models.items()
    }
    for trial in trials:
        model, pruning, method = models[trial.model], trial.request, trial.request.chosen
        calibration = None
        if trial.parsed is not None:
            calibration = _calibration(trial.parsed, pruning.drawn(), content)
        request = {
            "format": REQUEST_FORMAT,
            "model": model,
            "calibration": calibration,
            "method": method.name,
            "pattern": trial.pattern,
            "sparsity": pruning.target.sparsity,
            "propagation": pruning.propagation,
            "damping": method.options.get("damping"),
            "options": {k: v for k, v in method.changed.items() if k != "damping"},
            "suite": {"name": suite.name, "hash": suite.hash, "scorer": SCORER},
            "embeddings": pruning.embeddings,
            "recovery": trial.recovery and trial.recovery.model_dump(include=RECORDED),
            "statistics": _statistics(pruning),
        }
        request = {k: v for k, v in request.items() if v or k not in LATER}
        shared = None if calibration is None else sha256_json([REQUEST_FORMAT, model, calibration])
        resolved.append(
            replace(trial, id=sha256_json(request), definition=request, calibration_id=shared)
        )
    return resolved


def _statistics(pruning: PruneRequest) -> str | None:
    """Return the statistics of a trial; None if they are plain, as in all older trials."""
    if not pruning.chosen.is_robust(pruning.statistics):
        return None
    targets = pruning.chosen.has_dense_targets(pruning.statistics)
    return "robust, targets of the dense model" if targets else "robust"


def checkpoint_bytes(study: Study, trials: Iterable[Planned]) -> int:
    """Return the most disk space that checkpoints of the trials need, kept or temporary."""
    size = cache(lambda label: weight_bytes(resolve_model(study.file.models[label].name)))
    permanent = sum(size(t.model) for t in trials) if study.file.keep_checkpoints else 0
    return permanent + max(
        (size(t.model) * (1 + (t.recovery is not None)) for t in trials), default=0
    )


def _calibration(
    parsed: CalibrationRequest, draw: dict[str, Any], content: Callable[[Path], str]
) -> dict[str, Any]:
    """Return the definition of a calibration set's rows; `draw` holds the options given."""
    if parsed.saved is not None:
        return {"saved": parsed.saved.manifest["sha256"], **draw}

    def described(names: Iterable[str]) -> dict[str, Any]:
        sources = {}
        for name in names:
            reader = get_source(name, parsed.own).reader
            known = reader.model_dump(mode="json", exclude_defaults=True)
            if isinstance(reader, LocalFile):  # identified by its content
                known["path"] = content(reader.path.expanduser())
            sources[name] = {"reader": known, "version": reader.version}
        return sources

    def settings(generator: Generator) -> dict[str, Any]:
        chosen = generator.record()
        chosen.pop("prompts", None)  # identified by its content, not its path
        if chosen.get("chat") == 0:  # older requests lack it
            chosen.pop("chat")
        return chosen | ({"seeds": described(generator.sources)} if generator.sources else {})

    options = parsed.draw.model_dump(include={"rows", "length", "seed"})
    options |= {"leakage": "off"} | {k: v for k, v in draw.items() if k == "licence"}
    if parsed.draw.leakage != "off":
        options["leakage"] = ",".join(one.hash for one in guarded_suites(parsed.draw.leakage))
        options["leakage_tokens"] = WORDS  # the name since older versions
    if parsed.generator is not None:
        chosen = settings(parsed.generator)
        return {
            "generated": parsed.generator.name,
            "version": WRITER_VERSION,
            "settings": chosen,
        } | options
    options |= {"packing": parsed.draw.packing, "select": "random"}  # older versions had a choice
    if parsed.written:
        options["written"] = {name: settings(one) for name, one in parsed.written.items()}
        options["writing"] = WRITER_VERSION
    return {"mix": parsed.mix, "sources": described(parsed.sources), **options}
