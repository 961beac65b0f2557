"""Read what a study found from its store, and write it as one table."""

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
    """Return what a study has found so far, from its store."""
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
    # Another processor scores a dense model once more: of several the one that most trials name.
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

    Retentions are shares (1.0 is all of it), `kl` is in nats a token. Times are left out: the
    same study gives the same table wherever and however often it is run.
    """
    import pandas as pd

    def distance(far: dict[str, Any] | None) -> dict[str, Any]:
        return {"kl": (far or {}).get("kl_mean"), "top1": (far or {}).get("top1")}

    rows: list[dict[str, Any]] = []
    for trial in results.trials:
        far = trial.distance or {"total": None, "dimensions": {}}
        head = {"study": results.name, **trial.model_dump(exclude=LEFT_OUT)}
        for task in trial.tasks:
            own = distance(far["dimensions"].get(task["dimension"]))
            own["retention"] = asdict(trial.dimensions[task["dimension"]])
            rows.append(head | distance(far["total"]) | task
                        | {f"dimension_{name}": one for name, one in own.items()}
                        | {"info": trial.information})  # fmt: skip
    table = pd.json_normalize(rows, sep="_")
    table.columns = [str(name).removesuffix("_value") for name in table.columns]
    write_text(folder / CSV, table.to_csv(index=False))


def _compared(store: Store, sets: dict[str, Trial]) -> dict[str, dict[str, float]]:
    """Return coverage and mismatch of calibration sets, by set.

    They compare with the study's single sources, pooled (of each its draw of lowest seed, at the
    same model, rows and length); mismatch leaves out the set's own source. Absent where there are
    fewer than two single sources, or the store was passed on without its sets.
    """
    found: dict[str, dict[str, float]] = {}
    groups: dict[tuple[Any, ...], dict[str, Trial]] = {}
    for name, trial in sets.items():
        groups.setdefault((trial.model, trial.rows, trial.length), {})[name] = trial
    for members in groups.values():
        singles = {trial.calibration: name  # the lowest seed comes last
                   for name, trial in sorted(members.items(), key=lambda one: -one[1].seed)
                   if trial.strategy == "single"}  # fmt: skip
        held = all(store.calibration(name).is_dir() for name in members)
        if len(singles) < 2 or not held:
            continue
        ids = {name: CalibrationSet.open(store.calibration(name)).ids.numpy() for name in members}
        named = [(trial.calibration, ids[name]) for name, trial in members.items()]
        pool = {label: ids[name] for label, name in singles.items()}
        found |= dict(zip(members, text_metrics.compared(named, pool), strict=True))
    return found
