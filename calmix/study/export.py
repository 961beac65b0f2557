"""Read the results of a study from its store, and write them as one table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calmix.calibration import CalibrationSet, text_metrics
from calmix.evaluation.scores import load_scores
from calmix.files import write_text
from calmix.study.results import StudyResults, Trial
from calmix.study.store import Store, open_store

CSV = "results.csv"
LEFT_OUT = {"mix", "dimensions", "tasks", "seconds", "distance", "information"}


def read_results(path: Path | str) -> StudyResults:
    """Read the results of a study so far from its store."""
    store = open_store(Path(path))
    states = {entry.id: store.state(entry.id) for entry in store.entries}
    done = [entry for entry in store.entries if states[entry.id] == "finished"]
    kept = {entry.id: store.result(entry) for entry in done}
    scored = {entry.id: store.scores(entry) for entry in done}
    extra = _compared(store, {e.set: kept[e.id].trial for e in done if e.set is not None})
    trials = []
    for entry in done:
        trial, distance = kept[entry.id].trial, scored[entry.id].distance
        information = trial.information | extra.get(entry.set or "", {})
        trials.append(trial.model_copy(update={"information": information, "distance": distance}))
    # Each kind of processor scores the dense model itself: take the scores most trials refer to.
    named = Counter((record.trial.model, record.dense) for record in kept.values())
    dense = {model: key for (model, key), _ in reversed(named.most_common())}
    held = {key: load_scores(store.dense(key)).tasks for _, key in named}
    return StudyResults(
        name=store.index.name,
        text=store.index.text,
        planned=len(store.entries),
        trials=tuple(trials),
        failed=tuple(store.read_failure(e) for e in store.entries if states[e.id] == "failed"),
        suite=store.index.suite,
        scores={name: one.tasks for name, one in scored.items()},
        dense={label: held[key] for label, key in dense.items()},
        paired={name: held[record.dense] for name, record in kept.items()},
    )


def write_table(results: StudyResults, folder: Path) -> None:
    """Write `results.csv`: a row per trial and task, trials in the order of the plan.

    Retentions are fractions (1.0 is all), `kl` is in nats per token. Times are left out, so that
    rerunning a study gives the same table.
    """
    import pandas as pd

    def columns(record: dict[str, Any] | None) -> dict[str, Any]:
        return {"kl": (record or {}).get("kl_mean"), "top1": (record or {}).get("top1")}

    rows: list[dict[str, Any]] = []
    for trial in results.trials:
        distance = trial.distance or {"total": None, "dimensions": {}}
        head = {"study": results.name, **trial.model_dump(exclude=LEFT_OUT)}
        for task in trial.tasks:
            dimension = columns(distance["dimensions"].get(task["dimension"]))
            dimension["retention"] = asdict(trial.dimensions[task["dimension"]])
            rows.append(head | columns(distance["total"]) | task
                        | {f"dimension_{name}": one for name, one in dimension.items()}
                        | {"info": trial.information})  # fmt: skip
    table = pd.json_normalize(rows, sep="_")
    table.columns = [str(name).removesuffix("_value") for name in table.columns]
    write_text(folder / CSV, table.to_csv(index=False))


def _compared(store: Store, sets: dict[str, Trial]) -> dict[str, dict[str, float]]:
    """Return coverage and mismatch of calibration sets, by set.

    Each set is compared with the study's pooled single sources (the lowest seed of each, for the
    same model, rows and length); mismatch leaves out the set's own source. Absent with fewer than
    two single sources, or if the store was passed on without its sets.
    """
    found: dict[str, dict[str, float]] = {}
    groups: dict[tuple[Any, ...], dict[str, Trial]] = {}
    for name, trial in sets.items():
        groups.setdefault((trial.model, trial.rows, trial.length), {})[name] = trial
    for members in groups.values():
        singles = {trial.calibration: name  # the lowest seed comes last and wins
                   for name, trial in sorted(members.items(), key=lambda one: -one[1].seed)
                   if trial.strategy == "single"}  # fmt: skip
        if len(singles) < 2 or not all(store.calibration(name).is_dir() for name in members):
            continue
        ids = {name: CalibrationSet.open(store.calibration(name)).ids.numpy() for name in members}
        named = [(trial.calibration, ids[name]) for name, trial in members.items()]
        pool = {label: ids[name] for label, name in singles.items()}
        found |= dict(zip(members, text_metrics.compared(named, pool), strict=True))
    return found
