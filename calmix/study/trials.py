"""From a study to its trials: the grid, and what decides the outcome of each.

A trial is known by the hash of its resolved request: the model's files, the calibration set's
definition with the content of the user's own files, method, pattern and suite. Package versions
are no part of it; they are recorded with every result, and a mix of them is announced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from calmix.calibration import CalibrationSet, is_saved_set, parse_spec
from calmix.calibration.selfgen.writing import VERSION
from calmix.calibration.spec import Spec
from calmix.capability.evaluate import SCORER
from calmix.capability.suites import benchmark_of, load_suite
from calmix.errors import InputError
from calmix.files import sha256_file, sha256_json, user_path
from calmix.models import resolve_model
from calmix.models.opening import fingerprint
from calmix.models.shards import weight_bytes
from calmix.options import DrawOptions
from calmix.pruning.methods import Method, get_method
from calmix.pruning.patterns import Unstructured
from calmix.sources import Source, get_source
from calmix.sources.readers import AssetText, LocalFile
from calmix.specs import LENGTH, ROWS, recovery_of
from calmix.study.results import Strategy
from calmix.study.spec import (
    NONE,
    UNIFORM,
    Calibration,
    Grid,
    Study,
    as_pattern,
    strategy_of,
)

FORMAT = 1  # of the request; raised when the same request would give another outcome


Condition = tuple[Any, ...]  # what trials share that differ in calibration set and seed alone
Key = tuple[Any, ...]  # what tells the trials of one study apart


@dataclass(frozen=True)
class Draw:
    """How a calibration set is made.

    Attributes:
        text: the set as `calmix.calibration.resolve` takes it.
        options: what is passed to `resolve` beside it.
        rows, length, seed: what comes of it, defaults and the set's own file considered.
    """

    text: str
    options: dict[str, Any]
    rows: int
    length: int
    seed: int


@dataclass(frozen=True)
class Planned:
    """One trial of a study's grid, by the names of the study file.

    Attributes:
        method: its text, with the options that differ from their defaults.
        pattern: as printed: `60%` or `2:4`.
        target: the same as the study file has it.
        draw: None for a method that needs no calibration.
        allocation: `owl`, `error` or a file of the study's; None for the same everywhere.
        recovery: as `recovery_options` takes it; None without one.
        named: the name of its condition among those of its study, of `condition_names`.
    """

    model: str
    calibration: str
    strategy: Strategy
    method: str
    pattern: str
    target: float | str
    sparsity: float
    draw: Draw | None
    propagation: str | None
    allocation: str | None = None
    recovery: str | None = None
    named: str = field(default="", compare=False)

    @property
    def way(self) -> str:
        """How the model is pruned: its method, and where there are such allocation and recovery.

        `sparsegpt + owl + distill,epochs=1`; what was found knows trials by it.
        """
        return " + ".join(filter(None, (self.method, self.allocation, self.recovery)))

    @property
    def seed(self) -> int:
        """The seed of the draw; 0 without one."""
        return 0 if self.draw is None else self.draw.seed

    @property
    def damping(self) -> float | None:
        """The method's damping, if it has one: stores know trials by it beside the method."""
        return get_method(self.method).options.get("damping")

    @property
    def condition(self) -> Condition:
        """All that is asked for but the calibration set and the seed."""
        size = (0, 0) if self.draw is None else (self.draw.rows, self.draw.length)
        return (self.model, self.way, self.pattern, *size, self.propagation, self.damping)

    @property
    def pruned(self) -> Key:
        """What trials share that start from one pruned model and differ in recovery alone."""
        return replace(self, recovery=None).key

    @property
    def key(self) -> Key:
        """What tells the trials of one study apart."""
        model, way, pattern, rows, length, propagation, damping = self.condition
        return (
            model, self.calibration, way, pattern, rows, length, self.seed, propagation, damping,
        )  # fmt: skip

    @property
    def label(self) -> str:
        """The trial in a few words, which no other trial of its study has."""
        named = self.named or f"{self.way} {self.pattern}"
        return named if self.draw is None else f"{self.calibration} {named} seed {self.seed}"


@dataclass(frozen=True)
class Resolved:
    """A trial with the request that decides its outcome.

    Attributes:
        id: the request's hash.
        request: JSON-serialisable; `model`, `calibration` (None without one), `method`,
            `pattern`, `propagation`, `damping`, `options`, `suite`.
        calibration_id: hash of model and calibration, under which the set is shared.
    """

    planned: Planned
    id: str
    request: dict[str, Any]
    calibration_id: str | None


def plan(study: Study) -> list[Planned]:
    """Return a study's trials in the order they are run: the grids as written; within one, all
    that use one calibration set stand together. What two grids share comes once, and what differs
    from a trial in recovery alone right after it.

    Raises:
        InputError: a saved calibration set cannot be read.
    """
    found: dict[Key, dict[Key, Planned]] = {}
    for grid in study.grids:
        for trial in _of_grid(study, grid):
            found.setdefault(trial.pruned, {}).setdefault(trial.key, trial)
    trials = [trial for alike in found.values() for trial in alike.values()]
    names = condition_names(dict.fromkeys(trial.condition for trial in trials))
    return [replace(trial, named=names[trial.condition]) for trial in trials]


def condition_names(conditions: Collection[Condition]) -> dict[Condition, str]:
    """Return names of conditions: method and pattern, and what else tells them apart."""

    def parts(condition: Condition) -> tuple[str, ...]:
        model, _, _, rows, length, propagation, _ = condition
        return model, f"{rows} x {length}", f"{propagation} propagation"

    named = {}
    for own in conditions:
        alike = [parts(other) for other in conditions if other[1:3] == own[1:3]]
        more = [part for part, *all_of in zip(parts(own), *alike, strict=True)
                if len(set(all_of)) > 1]  # fmt: skip
        named[own] = ", ".join([f"{own[1]} {own[2]}", *more])
    return named


def _of_grid(study: Study, grid: Grid) -> Iterator[Planned]:
    methods = {name: _with(name, damping=grid.damping) for name in grid.methods or ()}
    targets = [(methods[m], t) for m, listed in (grid.methods or {}).items() for t in listed]
    for model in grid.models or ():
        for method, target in targets:
            if method.needs is None:
                yield _planned(model, NONE, "none", method, target, None, None)
        for seed in grid.seeds or ():
            for label in grid.calibrations or ():
                entry = study.calibrations[label]
                strategy = strategy_of(entry, study.own)
                draw = draw_of(study, entry, grid, seed)
                propagation = grid.propagation or "sequential"
                for allocation, recovery in product(grid.allocation or (), grid.recovery or ()):
                    for method, target in targets:
                        if method.needs is not None:
                            trial = _planned(
                                model, label, strategy, method, target, draw, propagation
                            )
                            yield replace(
                                trial,
                                allocation=None if allocation == UNIFORM else allocation,
                                recovery=None if recovery == NONE else recovery,
                            )


def _with(name: str, **options: Any) -> Method:
    """Return a method with those of the options that it has and its text does not name."""
    method = get_method(name)
    given = {k: v for k, v in options.items() if v is not None and k in method.options}
    return get_method(name, **{k: v for k, v in given.items() if f",{k}=" not in name})


def _planned(
    model: str,
    calibration: str,
    strategy: Strategy,
    method: Method,
    target: float | str,
    draw: Draw | None,
    propagation: str | None,
) -> Planned:
    pattern = as_pattern(target)
    share = pattern.sparsity
    shown = f"{100 * share:g}%" if isinstance(pattern, Unstructured) else str(pattern)
    return Planned(
        model, calibration, strategy, method.text, shown, target, share, draw, propagation
    )


def draw_of(study: Study, entry: Calibration, grid: Grid, seed: int) -> Draw:
    """Return how one calibration set of a grid is drawn.

    What the calibration's entry says comes first, then the grid, then the top of the study
    file, then the set's own file; a saved set is what it is.
    """
    text = entry.written
    sizes = {"rows": grid.rows, "length": grid.length}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    sizes |= entry.given("rows", "length")
    path = user_path(text)
    if is_saved_set(path):
        saved = CalibrationSet.open(path)
        own_seed = saved.manifest.get("seed")
        options = {**study.file.given("licence"), **entry.given()}
        return Draw(text, options, saved.rows, saved.length, own_seed or 0)
    spec = parse_spec(text, study.own, entry.licence or study.file.licence)
    options = {**study.file.given(), **sizes, **entry.given(), "seed": seed}
    if spec.generate is not None:
        options = {key: options[key] for key in options if key != "packing"}
    rows = options.get("rows", spec.fixed.get("rows", ROWS))
    length = options.get("length", spec.fixed.get("length", LENGTH))
    return Draw(text, options, rows, length, seed)


class Resolver:
    """Resolves the trials of one study; what they share is looked up once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._fingerprints: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._files: dict[Path, str] = {}

    def resolve(self, trial: Planned) -> Resolved:
        """Return a trial with its request and hash.

        Raises:
            ModelError: the model is not here.
            CalmixError: a file the calibration set is made from is gone or unreadable.
        """
        model = self._model(trial.model)
        calibration = None if trial.draw is None else self._calibration(trial.draw)
        suite = self.study.suite
        method = get_method(trial.method)
        # Options at their defaults are left out, but for damping, which has always been there.
        more = {k: v for k, v in method.changed.items() if k != "damping"}
        request = {
            "format": FORMAT,
            "model": model,
            "calibration": calibration,
            "method": method.name,
            "pattern": trial.pattern,
            "sparsity": trial.sparsity,
            "propagation": trial.propagation,
            "damping": method.options.get("damping"),
            **({"options": more} if more else {}),
            **self._around(trial),
            "suite": {"name": suite.name, "hash": suite.hash, "scorer": SCORER},
        }
        shared = None if calibration is None else sha256_json([FORMAT, model, calibration])
        return Resolved(trial, sha256_json(request), request, shared)

    def checkpoint_bytes(self, trials: Iterable[Planned]) -> int:
        """Return the bytes of weights that trials leave on disk, and hold there on the way."""
        sizes = [(self._sizes[trial.model], trial.recovery is not None) for trial in trials]
        kept = sum(size for size, _ in sizes) if self.study.file.keep_checkpoints else 0
        return kept + max((2 * size for size, recovered in sizes if recovered), default=0)

    def _around(self, trial: Planned) -> dict[str, Any]:
        """Return what is asked for beside the prune, if anything."""
        asked: dict[str, Any] = {}
        if trial.allocation is not None:
            shares = self.study.allocations.get(trial.allocation)
            asked["allocation"] = trial.allocation if shares is None else sha256_json(shares)
        if trial.recovery is not None:
            chosen = asdict(recovery_of(trial.recovery))
            asked["recovery"] = {k: chosen[k] for k in ("method", "epochs", "lr", "batch")}
        return asked

    def _model(self, label: str) -> dict[str, Any]:
        entry = self.study.models[label]
        if label not in self._fingerprints:
            folder = resolve_model(entry.name)
            self._fingerprints[label] = fingerprint(folder)
            self._sizes[label] = weight_bytes(folder)
        return {"sha256": self._fingerprints[label], "dtype": entry.dtype}

    def _calibration(self, draw: Draw) -> dict[str, Any]:
        path = user_path(draw.text)
        if is_saved_set(path):
            return {"saved": CalibrationSet.open(path).manifest["sha256"], **draw.options}
        size = {"rows": draw.rows, "length": draw.length, "seed": draw.seed}
        spec = parse_spec(draw.text, self.study.own, draw.options.get("licence"))
        asked = DrawOptions()
        options: dict[str, Any] = {
            "leakage": asked.leakage,
            "leakage_tokens": asked.leakage_tokens,
        }
        if spec.generate is None:  # trials of before are known by "select"
            options |= {"packing": asked.packing, "select": "random"}
        options |= {**spec.fixed, **draw.options, **size}
        if options["leakage"] == "off":
            del options["leakage_tokens"]
        else:
            options["leakage"] = load_suite(options["leakage"]).hash
        if spec.generate is not None:
            return self._generated(spec) | options
        sources = {name: self._source(name, spec.own) for name in spec.mix.weights}
        return {"mix": spec.mix.weights, "sources": sources, **options}

    def _generated(self, spec: Spec) -> dict[str, Any]:
        assert spec.generator is not None
        chosen = spec.generator.record()
        if "prompts" in chosen:
            del chosen["prompts"]  # known by its content, wherever it lies
        if "seeds" in chosen:
            chosen["seeds"] = {chosen["seeds"]: self._source(chosen["seeds"], spec.own)}
        return {"generated": spec.generate, "version": VERSION, "settings": chosen}

    def _source(self, name: str, own: Mapping[str, Source]) -> dict[str, Any]:
        source = get_source(name, own)
        described = source.reader.model_dump(mode="json", exclude_defaults=True)
        if isinstance(source.reader, LocalFile):  # known by its content, wherever it lies
            described["path"] = self._content(source.reader.path.expanduser())
        return {"reader": described, "version": source.reader.version}

    def _content(self, path: Path) -> str:
        if path not in self._files:
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            try:
                hashes = [[p.relative_to(path).as_posix(), sha256_file(p)] for p in files]
            except OSError as error:
                raise InputError(f"cannot read {path}: {error.strerror}") from error
            self._files[path] = sha256_json(hashes)
        return self._files[path]


def kind_of(trial: Planned, study: Study) -> str:
    """Return what a single source leans to: prose (general and commonsense), code, math, or what
    a user's own source says; nothing for other sets."""
    if trial.strategy != "single":
        return ""
    dimensions = {source.dimension for source in _sources_of(trial, study)}
    if dimensions <= {"general", "commonsense"}:
        return "prose" if dimensions else ""
    return dimensions.pop() if len(dimensions) == 1 else ""


def halves_of(trial: Planned, study: Study) -> tuple[str, ...]:
    """Return the tasks that are the other half of a benchmark which the set's sources read."""
    read = {
        benchmark_of(member.split("/")[2])
        for source in _sources_of(trial, study)
        if isinstance(source.reader, AssetText)
        for member in source.reader.members
        if member.count("/") > 2
    }
    return tuple(name for name, task in study.suite.tasks.items() if task.benchmark in read)


def _sources_of(trial: Planned, study: Study) -> list[Source]:
    """Return the sources of a set; none where it was saved, or the model writes it."""
    if trial.draw is None or is_saved_set(user_path(trial.draw.text)):
        return []
    spec = parse_spec(trial.draw.text, study.own, trial.draw.options.get("licence"))
    return [get_source(name, spec.own) for name in spec.mix.weights]


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield what differs between two requests, as `calibration.rows: 64, now 128`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            where = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key), after.get(key), where)
    elif before != after:
        yield f"{path}: {_short(before)}, now {_short(after)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
