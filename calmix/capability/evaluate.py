"""Evaluate a model on a suite: build the tasks, score them through the harness, keep each item.

Scores of a dense model are kept in the cache, because every comparison needs them again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calmix.capability.retention import RESAMPLES, Retention, TaskScores, from_mapping, retention
from calmix.capability.suites import Suite, load_suite
from calmix.errors import InputError, MissingExtraError
from calmix.files import cache_dir, sha256_json, write_json
from calmix.models import OpenModel, open_model

KIND = "capability scores"
FORMAT = 1  # of the JSON file; raised when older files no longer read the same
BATCH_TOKENS = 2048
SCORER = 1  # raised when the scorer gives other numbers, so that cached scores are not reused


@dataclass(frozen=True)
class CapabilityScores:
    """The scores of one model on one suite, with every item.

    Attributes:
        model: the model's name as given, and `fingerprint` of its files.
        dtype: what it was computed in.
        suite: name, version and hash of the suite as run (limits and selection included).
        tasks: the scores, in the order of the suite.
        truncated: for each task how many requests were cut to fit the model's context.
        seconds: wall time of scoring, without opening the model.
        versions: of the packages that decide the numbers.
    """

    model: str
    fingerprint: str
    dtype: str
    suite: dict[str, Any]
    tasks: tuple[TaskScores, ...]
    truncated: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def retention(
        self, dense: CapabilityScores, *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Retention:
        """Return what this model has kept of a dense one.

        Raises:
            InputError: the two were scored with different suites, versions or selections.
        """
        _same_suite(self.suite, dense.suite)
        return retention(dense.tasks, self.tasks, resamples=resamples, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data, per-item scores included."""
        return {"kind": KIND, "format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the scores as JSON."""
        write_json(path, self.to_dict())


def describe(suite: Suite) -> dict[str, Any]:
    """Return what scores remember of the suite they were made with."""
    return {"name": suite.name, "version": suite.version, "hash": suite.hash}


def check_suite(scores: CapabilityScores, suite: Suite) -> None:
    """Refuse scores that cannot be compared with a run of `suite`.

    Raises:
        InputError: they are of another suite, version or selection.
    """
    _same_suite(describe(suite), scores.suite)


def _same_suite(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if (ours["name"], ours["hash"]) == (theirs["name"], theirs["hash"]):
        return
    if (ours["name"], ours["version"]) != (theirs["name"], theirs["version"]):
        what = "different suites or versions"
    else:
        what = "different selections (--quick, --limit, --dimension, --task) or texts of a suite"
    raise InputError(
        f"scores of {what} cannot be compared: {_suite_line(ours)} and {_suite_line(theirs)}"
    )


def _suite_line(suite: dict[str, Any]) -> str:
    return f"{suite['name']} version {suite['version']} ({suite['hash'][:8]})"


def load_scores(path: Path) -> CapabilityScores:
    """Read scores written by `CapabilityScores.save` or `calmix evaluate -o`.

    Raises:
        InputError: no such file, or it holds no capability scores of this format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON file of scores: {error}") from error
    if isinstance(value, dict) and isinstance(value.get("scores"), dict):
        value = value["scores"]  # a file of `calmix evaluate -o`, scores beside the retention
    if not isinstance(value, dict) or value.pop("kind", None) != KIND:
        raise InputError(f"{path} holds no scores of 'calmix evaluate'")
    if (found := value.pop("format", None)) != FORMAT:
        raise InputError(f"{path} holds scores in format {found}, not {FORMAT}: evaluate again")
    try:
        tasks = tuple(from_mapping(task) for task in value.pop("tasks"))
        return CapabilityScores(tasks=tasks, **value)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def choose(
    suite: Suite | str | Path,
    *,
    dimensions: Sequence[str] = (),
    tasks: Sequence[str] = (),
    quick: bool = False,
    limit: int | None = None,
) -> Suite:
    """Return the suite as it is to be run.

    Raises:
        InputError: unknown suite, dimension or task, or a limit that is not positive.
    """
    chosen = suite if isinstance(suite, Suite) else load_suite(suite)
    chosen = chosen.only(dimensions=dimensions, tasks=tasks)
    if quick:
        chosen = chosen.quick()
    return chosen if limit is None else chosen.limited(limit)


def check_code(suite: Suite, allowed: bool) -> None:
    """Refuse a suite that runs code the model wrote, unless that is allowed.

    Raises:
        InputError: naming the tasks and the option.
    """
    running = [name for name, task in suite.tasks.items() if task.runs_code]
    if running and not allowed:
        raise InputError(
            f"task {', '.join(running)} runs code the model writes: pass --allow-code-execution "
            "(allow_code_execution=True) to run it in a limited subprocess, or leave it out "
            "with --task"
        )


def evaluate(
    model: OpenModel | str,
    suite: Suite | str | Path = "offline",
    *,
    dimensions: Sequence[str] = (),
    tasks: Sequence[str] = (),
    quick: bool = False,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    batch_tokens: int | None = None,
    allow_code_execution: bool = False,
    cache: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CapabilityScores:
    """Score a model on a suite.

    Args:
        model: a model's name, or one already open.
        suite: a suite, the name of a builtin one, or the path of a YAML file.
        dimensions, tasks: score only these; none named scores all.
        quick: score the suite's quick slice.
        limit: score at most so many items a task.
        dtype, device, trust_remote_code: how to open the model, if it is given by name.
        batch_tokens: tokens in one forward pass; decides speed and memory, not scores.
        allow_code_execution: run code the model writes, in a limited subprocess.
        cache: take the scores from the cache if this model's files were scored before, and
            keep them there otherwise. Leave it off for a model changed in memory: its files
            do not say so.
        progress: called with the number of requests done and in all.

    Raises:
        InputError: unknown suite, dimension or task, an empty limit, code execution not allowed.
        ModelError: the model cannot be opened, or its tokenizer lacks what a task needs.
        MissingExtraError: lm-evaluation-harness is not installed.
    """
    chosen = choose(suite, dimensions=dimensions, tasks=tasks, quick=quick, limit=limit)
    check_code(chosen, allow_code_execution)
    _require_harness()
    if isinstance(model, str):
        model = open_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    size = BATCH_TOKENS if batch_tokens is None else batch_tokens
    kept = _cache_file(model, chosen, size) if cache else None
    if kept is not None and kept.is_file():
        try:
            return load_scores(kept)
        except InputError:  # of an older format, or damaged: scored again and replaced
            pass
    scores = _run(model, chosen, size, allow_code_execution, progress)
    if kept is not None:
        scores.save(kept)
    return scores


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise MissingExtraError("evaluating a model", "eval") from None


def _dtype(model: OpenModel) -> str:
    return str(model.model.dtype).removeprefix("torch.")


def _cache_file(model: OpenModel, suite: Suite, batch_tokens: int) -> Path:
    # Rounding differs with the device, its threads and the batch size: with all of them in the
    # key a model compared with its own cached scores has kept exactly all.
    import torch

    device = next(model.model.parameters()).device
    key = sha256_json(
        [
            model.fingerprint,
            model.tokenizer_fingerprint,
            suite.name,
            suite.hash,
            _dtype(model),
            [device.type, torch.get_num_threads(), batch_tokens],
            SCORER,
            _versions(),
        ]
    )
    return cache_dir() / "scores" / f"{key}.json"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("calmix", "lm_eval", "torch", "transformers")}


def _run(
    model: OpenModel,
    suite: Suite,
    batch_tokens: int,
    allow_code: bool,
    progress: Callable[[int, int], None] | None,
) -> CapabilityScores:
    from lm_eval.evaluator import evaluate as harness_evaluate

    from calmix.capability.scorer import Scorer
    from calmix.capability.tasks import build_tasks, quiet_harness

    start = time.perf_counter()
    built = build_tasks(suite)
    scorer = Scorer(model, batch_tokens=batch_tokens, progress=progress)
    # The harness keys tasks by their own names, which two tasks of a suite may share.
    tasks = {_key(b.name, part): task for b in built for part, task in b.parts.items()}
    samples = {
        _key(b.name, part): numbers
        for b in built
        for part, numbers in b.samples.items()
        if numbers is not None
    }
    for name, task in tasks.items():
        task.set_config("task", name)
    with quiet_harness():
        results = harness_evaluate(
            scorer,
            tasks,
            samples=samples or None,
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=allow_code,
        )
    assert results is not None
    found = [
        _task_scores(b, {part: results["samples"][_key(b.name, part)] for part in b.parts})
        for b in built
    ]
    truncated: dict[str, int] = {}
    for name, count in scorer.truncated.items():
        truncated[name.split("/")[0]] = truncated.get(name.split("/")[0], 0) + count
    return CapabilityScores(
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=_dtype(model),
        suite=describe(suite),
        tasks=tuple(found),
        truncated=truncated,
        seconds=round(time.perf_counter() - start, 2),
        versions=_versions(),
    )


def _key(name: str, part: str) -> str:
    return name if part == name else f"{name}/{part}"


def _task_scores(built: Any, samples: dict[str, list[dict[str, Any]]]) -> TaskScores:
    """Collect a task's items out of the harness's samples, its parts one after another."""
    spec = built.spec
    items: list[str] = []
    values: list[float] = []
    sizes: list[int] = []
    chances: list[float] = []
    for part, rows in samples.items():
        filters = list(dict.fromkeys(row["filter"] for row in rows))
        wanted = spec.filter or filters[0]
        if wanted not in filters:
            raise InputError(
                f"task {built.name}: there is no filter '{wanted}' (has: {', '.join(filters)})"
            )
        ids = built.ids[part]
        kept = sorted((r for r in rows if r["filter"] == wanted), key=lambda row: row["doc_id"])
        for row in kept:
            items.append(ids[row["doc_id"]] if ids else f"{part}/{row['doc_id']}")
            value = _metric(built.name, spec.metric, row)
            if spec.metric == "bits_per_byte":
                values.append(-float(value[0]))
                sizes.append(int(value[1]))
            else:
                values.append(float(value))
            chances.append(1 / len(row["arguments"]))
    chance = sum(chances) / len(chances) if spec.chance == "choices" else spec.chance or 0.0
    return TaskScores(
        name=built.name,
        dimension=built.dimension,
        metric=spec.metric,
        kind="bits_per_byte" if sizes else "accuracy",
        chance=chance,
        items=tuple(items),
        values=tuple(values),
        bytes=tuple(sizes),
    )


def _metric(task: str, metric: str, row: dict[str, Any]) -> Any:
    # The harness's tasks spell it in two ways.
    names = ["pass@1", "pass_at_1"] if metric == "pass@1" else [metric]
    for name in names:
        if name in row:
            return row[name]
    raise InputError(f"task {task} has no metric '{metric}' (has: {', '.join(row['metrics'])})")
