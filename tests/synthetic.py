"""Studies made up from known effects, for code that only reads results."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from calmix.evaluation.measures import TaskScores, rounded
from calmix.evaluation.scores import CapabilityScores
from calmix.files import write_json
from calmix.study.results import Estimate, StudyResults, Trial
from calmix.study.store import Entry, Index

DIMENSIONS = ("general", "commonsense", "code", "math")
SOURCES = (
    "encyclopedia",
    "news",
    "books",
    "abstracts",
    "textbook",
    "medicine",
    "trivia",
    "stories",
    "procedures",
    "social",
    "python-stdlib",
    "code-compiled",
    "code-scripting",
    "python-exercises",
    "math-solutions",
    "word-problems",
)
COUNT = 40  # items of a task


@dataclass(frozen=True)
class Plan:
    """What to make up: `slopes` say by dimension how much retention follows log perplexity of
    single sources, `draw` is the standard deviation of the seeds, `others` are sets that are no
    single source, name to strategy and retention above the mean."""

    sources: Sequence[str] = SOURCES
    seeds: Sequence[int] = (0, 1, 2)
    conditions: Sequence[tuple[str, str]] = (("sparsegpt", "60%"),)
    slopes: Mapping[str, float] | None = None
    noise: float = 0.03
    draw: float = 0.01
    others: Mapping[str, tuple[str, float]] | None = None
    dimensions: Sequence[str] = DIMENSIONS
    seed: int = 0


SLOPES = {"general": 0.08, "commonsense": 0.02, "code": -0.12, "math": -0.08}
OTHERS = {
    "mix-4": ("mix", 0.06),
    "mix-8": ("mix", 0.08),
    "mix-all": ("mix", 0.07),
    "self-cal": ("self-cal", 0.0),
    "sgs": ("sgs", 0.01),
    "igsp": ("igsp", 0.04),
}
LIFTS = {  # large ones
    "mix-8": ("mix", 0.2),
    "igsp": ("igsp", 0.1),
    "self-cal": ("self-cal", 0.1),
    "sgs": ("sgs", -0.1),
}
CONDITIONS = (("sparsegpt", "50%"), ("sparsegpt", "60%"), ("wanda", "50%"))


def full_plan(**changes):
    """A study of the size of the real one, with a planted trade-off."""
    fields = {"conditions": CONDITIONS, "slopes": SLOPES, "others": OTHERS}
    return Plan(**fields | changes)


def study(plan, **changes):
    """Return the results of a made-up study."""
    return informed(plan, **changes)[0]


def informed(plan, **changes):
    """Return the same, and metrics of the text of every trial by its id."""
    rng, slopes = np.random.default_rng(plan.seed), plan.slopes or {}
    heights = rng.permutation(np.linspace(-1.5, 1.5, len(plan.sources)))
    sets = {
        name: ("single", float(height)) for name, height in zip(plan.sources, heights, strict=True)
    }
    sets |= {name: (each, 0.0) for name, (each, _) in (plan.others or {}).items()}
    lifts = {name: lift for name, (_, lift) in (plan.others or {}).items()}
    trials, known = [], {}
    for method, pattern in plan.conditions:
        sparsity = float(pattern.rstrip("%")) / 100 if pattern.endswith("%") else 0.5
        base = 0.95 - 1.6 * max(0.0, sparsity - 0.25) ** 1.1 - 0.05 * (method == "wanda")
        for name, (each, height) in sets.items():
            own = {
                dimension: base
                + slopes.get(dimension, 0.0) * height * sparsity / 0.6
                + lifts.get(name, 0.0) * (sparsity / 0.6) ** 3
                + plan.noise * rng.standard_normal()
                for dimension in plan.dimensions
            }
            extra = {f"aggregation_{n}": float(rng.random()) for n in (1, 2, 3, 4)}
            for seed in plan.seeds:
                shares = {
                    dimension: max(0.01, value + plan.draw * float(rng.standard_normal()))
                    for dimension, value in own.items()
                }
                perplexity = 15 * math.exp(height + 0.02 * float(rng.standard_normal()))
                entropy = float(7 + rng.random())
                trials.append(trial(name, each, method, pattern, seed, shares))
                text = {"perplexity": perplexity, "entropy": entropy, **extra, "tokens": 32768.0}
                known[trials[-1].id] = text
    fields = {
        "name": "made-up",
        "text": "name: made-up\nmodel: builtin:smollm2-135m\n",
        "planned": len(trials),
        "trials": tuple(trials),
        "suite": {"name": "offline", "version": 1, "dimensions": list(plan.dimensions)},
    } | changes
    ordered = sorted(fields["trials"], key=lambda one: one.tasks[0]["signal"])
    asked = {(one.model, task["task"]): task for one in ordered for task in one.tasks}
    fields["dense"] = {
        model: tuple(scores(task, None) for (label, _), task in asked.items() if label == model)
        for model, _ in asked
    }
    fields["scores"] = {
        one.id: tuple(scores(task, one) for task in one.tasks) for one in fields["trials"]
    }
    return StudyResults(**fields), known


def scores(task, of):
    """Return a task's scores by the dense model, or by a trial's with exactly its retention.

    Tasks on `_a` are multiple choice, of which 0.9 times the retention of bits is kept in
    accuracy; others are texts. An item is off its task's retention by a part that all calibration
    sets share and one of the set's own. Without signal the dense model is at its floor.
    """
    rng = np.random.default_rng(zlib.crc32(task["task"].encode()))
    whole = 0.3 + 0.3 * rng.random(COUNT)
    off = rng.standard_normal(COUNT)
    if not task["signal"]:
        whole = 0.1 * (-1.0) ** np.arange(COUNT)
    per_item, accuracy = whole, np.ones(COUNT)
    if of is not None:
        name = f"{task['task']} {of.calibration} {of.method} {of.pattern}"
        own = np.random.default_rng(zlib.crc32(name.encode()))
        off = 0.1 * (off + own.standard_normal(COUNT))
        off -= (off @ whole) / whole.sum() if task["signal"] else 0.0
        share = task["retention"]["value"] or 0.0
        per_item = (share + off) * whole
        accuracy = 0.25 + 0.75 * 0.9 * (share + off - (0.0 if of is None else off.mean()))
    head = {"name": task["task"], "dimension": task["dimension"]}
    head["items"] = tuple(map(str, range(COUNT)))
    gold = {"gold": (0,) * COUNT}
    rows = (-60 + 60 * per_item)[:, None]
    head |= gold | {"primary": "bits", "unigram": (-60.0,) * COUNT if of is None else ()}
    if task["task"].endswith("_a"):
        return TaskScores(
            **head,
            metric="acc",
            chance=0.25,
            values=tuple(accuracy.tolist()),
            bytes=((20, 20, 20, 20),) * COUNT,
            loglikelihoods=rounded((rows - [0, 99, 99, 99]).tolist()),
        )
    return TaskScores(
        **head,
        metric="bits_per_byte",
        chance=0.0,
        bytes=((20,),) * COUNT,
        loglikelihoods=rounded(rows.tolist()),
    )


def trial(calibration, strategy, method, pattern, seed, kept, **changes):
    """Return one finished trial with the retention given by dimension."""
    known = {name: value for name, value in kept.items() if value is not None}
    total = sum(known.values()) / len(known) if known else None
    dimensions = {name: interval(value) for name, value in kept.items()}
    tasks = tuple(
        {
            "task": f"{name}_{kind}",
            "dimension": name,
            "signal": value is not None,
            "retention": asdict(interval(value)),
        }
        for name, value in kept.items()
        for kind in ("a", "b")
    )
    far = {
        name: {"kl_mean": 3 * (1 - value), "top1": 0.2 + 0.8 * value}
        for name, value in known.items()
    }
    means = (
        {key: sum(one[key] for one in far.values()) / len(far) for key in ("kl_mean", "top1")}
        if far
        else {}
    )
    fields = {
        "id": f"{calibration}-{method}-{pattern}-{seed}".replace("%", ""),
        "model": "builtin:smollm2-135m",
        "calibration": calibration,
        "strategy": strategy,
        "method": method,
        "pattern": pattern,
        # As achieved: a whole number of weights, never exactly the request.
        "sparsity": (float(pattern.rstrip("%")) / 100 if pattern.endswith("%") else 0.5) + 2e-6,
        "propagation": "layer",
        "rows": 64,
        "length": 512,
        "seed": seed,
        "suite": "offline",
        "total": interval(total),
        "worst": min(known, key=lambda name: known[name]) if known else None,
        "dimensions": dimensions,
        "tasks": tasks,
        "seconds": {"prune": 24.0, "evaluate": 45.0},
        "distance": {"dense": "d", "texts": "t", "dimensions": far, "total": means},
    }
    return Trial(**fields | changes)


def trials_of(kept, method="sparsegpt", pattern="60%", steps=(0.0,)):
    """Return trials of sets by name, with their retention of general and code; each seed adds a
    step to both. `mix` alone is a mix."""
    return tuple(
        trial(
            name,
            "mix" if name == "mix" else "single",
            method,
            pattern,
            seed,
            {"general": general + step, "code": code + step},
        )
        for name, (general, code) in kept.items()
        for seed, step in enumerate(steps)
    )


def interval(value, half=0.04):
    """Return a value with an interval of a half-width."""
    if value is None:
        return Estimate(None)
    return Estimate(value, value - half, value + half)


def save(results, folder):
    """Write results as the store of a finished study, without calibration sets."""
    suite = {"hash": "h", **results.suite}

    def keep(model, tasks, path, distance=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        CapabilityScores(model, "f", "float32", suite, tasks, distance=distance).save(path)

    dense = {model: f"d{number}" for number, model in enumerate(results.dense)}
    for model, key in dense.items():
        keep(model, results.dense[model], folder / f"dense/{key}.json")
    for one in results.trials:
        place = folder / "trials" / one.id
        keep(one.model, results.scores[one.id], place / "scores.json", one.distance)
        trial = one.model_dump(mode="json")
        write_json(place / "result.json", {"trial": trial, "run": {}, "dense": dense[one.model]})
    entries = [
        Entry(id=one.id, label=one.id, key=[one.model, one.calibration], set=None)
        for one in results.trials
    ]
    index = Index(name=results.name, text=results.text, suite=suite, trials=entries)
    folder.mkdir(exist_ok=True)
    write_json(folder / "store.json", index.model_dump())
    return folder
