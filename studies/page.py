"""Print or write docs/results.md and docs/lab/results.md, with every number from stored answers.

    python studies/page.py            print the pages
    python studies/page.py --write    write them
    python studies/page.py --trials STORES    rewrite results/trials.csv from unpacked stores

Answers are those of the committed stores, judged again by `rejudge.py` (results/rejudged.csv.gz);
results/trials.csv holds what else is known of a trial: KL to the dense model, bits a weight.

Definitions. An ability's *right answers* are those of the small model over those of the dense
model; the primary measure is the mean over the four abilities. *Kept* counts only answers that both
have right, where the dense model is right; it is all that is known of trials that were not asked
the other items. A *lead* is a difference of means over seeds. Its variance is that of a bootstrap
over items, stratified by ability and paired between models, plus the variance of one seed (pooled
over all conditions of a model and store with two seeds or more) times the sum of 1/seeds; the
interaction of items and seeds is in both, so intervals are a little too wide. Intervals are
Student's t with the degrees of freedom of the seeds' variance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from scipy import stats
from scipy.special import expit, logit

sys.path.insert(0, str(Path(__file__).parent))
import rejudge

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"results_page.txt": DOCS / "results.md", "results_lab.txt": DOCS / "lab" / "results.md"}
ABILITIES = ("general", "code", "math", "chat")
RESAMPLES = 1000
TRIAL = ["store", "trial"]
SEEDS = {"smollm2": "noise", "qwen": "behaviour"}  # the store with most seeds of a model
NAMES = {
    "c4": "C4",
    "mix-8-chat-4": "mix of eight with chats",
    "mix-8": "mix of eight",
    "mix-clean-chat-4": "`mix-clean` with chats",
    "compress-mix": "`mix-default` with chats",
    "mix-clean": "`mix-clean`",
    "self-written": "self-written",
    "igsp": "`igsp`",
}
TEXTS = (
    "c4",
    "python-algorithms",
    "math-solutions",
    "mix-clean",
    "mix-8-chat-4",
    "self-written",
)
SUMS = "sums"
LEADS = (  # name, text, over text, model, solver, pattern
    ("mix_c4", "mix-8-chat-4", "c4", "qwen", "sparsegpt", "50%"),
    ("mix_c4_40", "mix-8-chat-4", "c4", "qwen", "sparsegpt", "40%"),
    ("mix_c4_60", "mix-8-chat-4", "c4", "qwen", "sparsegpt", "60%"),
    ("mix_c4_smollm2", "mix-8-chat-4", "c4", "smollm2", "sparsegpt", "50%"),
    ("math_c4", "math-solutions", "c4", "qwen", "sparsegpt", "50%"),
    ("self_math", "self-written", "math-solutions", "qwen", "sparsegpt", "50%"),
    ("self_math_admm", "self-written", "math-solutions", "qwen", "admm", "50%"),
    ("self_math_smollm2", "self-written", "math-solutions", "smollm2", "sparsegpt", "50%"),
    ("self_math_admm_smollm2", "self-written", "math-solutions", "smollm2", "admm", "50%"),
    ("clean_50", "mix-clean", "math-solutions", "qwen", "sparsegpt", "50%"),
    ("clean_60", "mix-clean", "math-solutions", "qwen", "sparsegpt", "60%"),
    ("clean_24", "mix-clean", "math-solutions", "qwen", "sparsegpt", "2:4"),
)
WEIGHTS = {"smollm2": 134_515_008, "qwen": 494_032_768}  # as published: the shared head once
FILES = {"smollm2": 98.4, "qwen": 491.4}  # MB of the GGUF files that the builtin models come from
LABELS = {"smollm2": "SmolLM2", "qwen": "Qwen"}
METHODS = {"sparsegpt": "SparseGPT", "admm": "ADMM", "ecq": "ECQ"}
THIRD = RESULTS / "third-model"
THIRD_LABELS = {"smollm2": "SmolLM2", "qwen": "Qwen", "coder-1.5b": "Qwen2.5-Coder-1.5B"}
SETTINGS = (
    ("qwen", "sparsegpt", "40%"),
    ("qwen", "sparsegpt", "50%"),
    ("qwen", "sparsegpt", "60%"),
    ("qwen", "sparsegpt", "2:4"),
    ("qwen", "admm", "50%"),
    ("smollm2", "sparsegpt", "50%"),
    ("smollm2", "admm", "50%"),
)
SOLVED = (
    ("qwen", "c4", "50%"),
    ("qwen", "mix-8-chat-4", "50%"),
    ("smollm2", "c4", "50%"),
    ("smollm2", "mix-8-chat-4", "50%"),
)
QUANTISED = (
    ("smollm2", "ecq + embeddings 5", "4.5 bits", "mix-8-chat-4"),
    ("smollm2", "ecq", "3 bits", "mix-8-chat-4"),
    ("smollm2", "ecq", "3 bits", "c4"),
    ("qwen", "ecq + embeddings 4", "4 bits", "mix-8-chat-4"),
)


@cache
def trials() -> pd.DataFrame:
    """Return what is known of each trial, indexed by store and trial."""
    return pd.read_csv(RESULTS / "trials.csv").set_index(TRIAL)


class Items(NamedTuple):
    """Items that both models of a trial were asked: keys that sort by ability, the ability's
    number, whether a sum, and whether the answers of dense and small model are right."""

    key: np.ndarray
    task: np.ndarray
    ability: np.ndarray
    dense: np.ndarray
    small: np.ndarray


@cache
def items() -> dict[tuple[str, str], Items]:
    """Return the items of each trial; those that left the suite are left out."""
    every = rejudge.load()
    every = every[every.dense.notna() & every.right.notna()]
    ability = every.dimension.map({name: at for at, name in enumerate(ABILITIES)})
    columns = {
        "key": ability.astype(str) + every.item,
        "task": every.task,
        "ability": ability,
        "dense": every.dense.astype(bool),
        "small": every.right.astype(bool),
    }
    arrays = [
        np.array(column, "U32" if name in ("key", "task") else None)
        for name, column in columns.items()
    ]
    places = every.groupby(TRIAL).indices
    return {trial: Items(*(one[at] for one in arrays)) for trial, at in places.items()}


@cache
def select(**where: object) -> list[tuple[str, str]]:
    """Return the trials whose columns (or store) have these values."""
    table = trials().reset_index()
    for name, wanted in where.items():
        table = table[table[name] == wanted]
    return [*zip(table.store, table.trial, strict=True)]


def value(trial: tuple[str, str], measure: str, weights: np.ndarray | None = None) -> np.ndarray:
    """Return a measure of a trial under weights of its items, shape (items, ...); by default 1.

    Measures: `all` and `without sums` pool what is kept; `kept` is the mean over abilities of what
    is kept, `right` that of right answers.
    """
    _, task, ability, dense, small = items()[trial]
    weights = np.ones((len(dense), 1)) if weights is None else weights
    if measure in ("all", "without sums"):
        part = (task != SUMS) | (measure == "all")
        shares = [weights[part & dense & small].sum(0) / weights[part & dense].sum(0)]
    else:
        upper = small if measure == "right" else dense & small
        parts = [ability == at for at in range(len(ABILITIES))]
        shares = [weights[upper & one].sum(0) / weights[dense & one].sum(0) for one in parts]
    return np.mean(shares, 0)


def resampled(chosen: Sequence[tuple[str, str]], measure: str) -> list[np.ndarray]:
    """Return the measure of each trial: its value, then that of each resample of items, the same
    items for all."""
    keys = np.unique(np.concatenate([items()[one].key for one in chosen]))
    weights, rng = np.ones((len(keys), 1 + RESAMPLES), np.float32), np.random.default_rng(0)
    first = np.array([key[0] for key in keys])
    for place in (np.flatnonzero(first == str(at)) for at in range(len(ABILITIES))):
        even = np.full(len(place), 1 / len(place))
        weights[place, 1:] = rng.multinomial(len(place), even, RESAMPLES).T
    return [value(one, measure, weights[keys.searchsorted(items()[one].key)]) for one in chosen]


@cache
def seed_variance(model: str, measure: str) -> tuple[float, int]:
    """Return the variance of one seed, pooled over a model's conditions, and its degrees of
    freedom."""
    table = trials().reset_index()
    table = table[(table.model == model) & (table.store == SEEDS[model])]
    squares = freedom = 0.0
    for _, group in table.groupby(["method", "pattern", "calibration"]):
        if len(group) > 1:
            pairs = zip(group.store, group.trial, strict=True)
            each = [value(one, measure).item() for one in pairs]
            squares += np.var(each, ddof=1) * (len(each) - 1)
            freedom += len(each) - 1
    return squares / freedom, int(freedom)


class Lead(NamedTuple):
    """How far one group of trials is ahead of another, in points, with its 95 % interval."""

    points: float
    low: float
    high: float
    p: float
    seeds: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.points:+.1f} [{self.low:.1f}, {self.high:.1f}]"


def lead(ours: Sequence[tuple[str, str]], theirs: Sequence[tuple[str, str]], measure: str) -> Lead:
    """Return the lead of the mean over one group of trials of a model over that of another."""
    each = resampled([*ours, *theirs], measure)
    apart = np.mean(each[: len(ours)], 0) - np.mean(each[len(ours) :], 0)
    variance, freedom = seed_variance(trials().model[ours[0]], measure)
    error = (apart[1:].var() + variance * (1 / len(ours) + 1 / len(theirs))) ** 0.5
    half = stats.t.ppf(0.975, freedom) * error
    p = 2 * stats.t.sf(abs(apart[0]) / error, freedom)
    return Lead(
        *(100 * np.array([apart[0], apart[0] - half, apart[0] + half])), p, (len(ours), len(theirs))
    )


def conditions(text: str, model: str, method: str, pattern: str = "50%") -> list[tuple[str, str]]:
    """Return the trials of a text, of the store with most seeds of the model."""
    where = {"model": model, "method": method, "pattern": pattern, "calibration": text}
    return select(store=SEEDS[model], **where)


def kept_of(method: str, pattern: str) -> str:
    """Return what SmolLM2 keeps on the mix with chats, in per cent."""
    chosen = select(
        store="frontier",
        model="smollm2",
        method=method,
        pattern=pattern,
        calibration="mix-8-chat-4",
    )
    return f"{100 * np.mean([value(one, 'kept') for one in chosen]):.1f}"


def right_of(trial: tuple[str, str], task: str) -> tuple[int, int]:
    """Return how many of the dense model's right answers of a task are still right."""
    answers = items()[trial]
    dense = answers.dense & (answers.task == task)
    return int((dense & answers.small).sum()), int(dense.sum())


def facts() -> dict[str, object]:
    """Return the numbers of the page's sentences by name."""
    every = trials()
    whole = [one for one in every.index[~every.right_only] if one[0] != "right-answers"]
    gaps = [value(one, "right").item() - value(one, "kept").item() for one in whole]
    older = every[every.index.get_level_values("store") != "right-answers"]
    best = select(
        store="frontier", model="smollm2", method="ecq + embeddings 5", pattern="4.5 bits"
    )[0]
    right, moved, _ = right_cells(best)
    lost, gained = moved.split(", ")
    numbers: dict[str, object] = {
        "best_bits": f"{every.bits[best]:.1f}",
        "best_right": right.split(" ")[0],
        "best_lost": lost,
        "best_gained": gained,
        "n_all": len(whole),
        "n": len(older),
        "n_part": int(older.right_only.sum()),
        "gap": f"{100 * np.mean(gaps):.1f}",
        "curve": f"{curve_error():.0f}",
    }
    ps = []
    for model, method, pattern in SETTINGS:
        pair = [
            conditions(text, model, method, pattern) for text in ("mix-8-chat-4", "math-solutions")
        ]
        ps.append(lead(*pair, "kept").p)
    numbers["holm"] = f"{min(ps) * len(ps):.2f}"
    for model in LABELS:
        sample = items()[conditions("c4", model, "sparsegpt")[0]]
        right, pairs = distance_pairs(model)
        numbers |= {
            f"seed_{model}": f"{100 * seed_variance(model, 'kept')[0] ** 0.5:.1f}",
            f"dense_{model}": int(sample.dense.sum()),
            f"sums_{model}": int((sample.dense & (sample.task == SUMS)).sum()),
            f"pairs_{model}": f"{right} of {pairs}",
            f"predicted_{model}": "{} of {} pairs".format(*predicted(model)),
            f"rank_{model}": f"{predicted(model)[2]:.2f}",
        }
    for name, ours, theirs, model, method, pattern in LEADS:
        pair = [conditions(text, model, method, pattern) for text in (ours, theirs)]
        numbers[name] = lead(*pair, "kept")
    for name, text in (
        ("c4", "c4"),
        ("math", "math-solutions"),
        ("mix", "mix-8-chat-4"),
        ("self", "self-written"),
    ):
        trial = select(store="abilities", calibration=text, method="sparsegpt")[0]
        numbers[f"humaneval_{name}"], numbers["humaneval_dense"] = right_of(trial, "humaneval")
    for model in LABELS:
        pair = [
            select(store="right-answers", model=model, calibration=text)
            for text in ("mix-clean-chat-4", "compress-mix")
        ]
        numbers[f"choice_{model}"] = lead(*pair, "right")
    numbers["declared_run"] = len(select(store="right-answers"))
    for end, pattern in (("", "2.6 bits"), ("_3", "3 bits")):
        numbers[f"kl_own{end}"] = kept_of("ecq + kl", pattern)
        numbers[f"kl_even{end}"] = kept_of("ecq", pattern)
    return numbers | rejudged() | third()


def rejudged() -> dict[str, object]:
    """Return how many verdicts changed, and how many of those read by hand are mistaken."""
    every = rejudge.load()
    before, after = every.before, every.right
    known = before.notna() & after.notna()
    read = pd.read_csv(RESULTS.parent / "hand_read.csv", comment=None, skiprows=1)
    mistaken = read[read.verdict != read.judgement].groupby("verdict").size()
    return {
        "judged": f"{int(before.notna().sum()):,}",
        "to_right": f"{int((~before[known] & after[known]).sum()):,}",
        "to_wrong": f"{int((before[known] & ~after[known]).sum()):,}",
        "hand": ", ".join(
            f"{mistaken.get(name, 0)} of {n} {name} ones"
            for name, n in read.groupby("verdict").size().items()
        ),
    }


def pages() -> dict[Path, str]:
    """Return the text of each page."""
    tables = {one.__name__: one() for one in (verdicts, texts, solvers, bits)}
    values = facts() | tables
    return {
        path: (Path(__file__).parent / name).read_text("utf-8").format(**values).rstrip() + "\n"
        for name, path in PAGES.items()
    }


def whole_bits(model: str, report: dict[str, Any]) -> float:
    """Return the bits a weight of a whole model, embeddings and head included; 16 where they are
    not quantised. Zeros alone save nothing in the file that transformers loads."""
    blocks = sum(one["rows"] * one["columns"] for one in report["layers"])
    outer = WEIGHTS[model] - blocks
    rates = list((report.get("embeddings") or {"": 16.0}).values())
    return (blocks * (report.get("bits") or 16.0) + outer * sum(rates)) / WEIGHTS[model]


def export(stores: Path) -> None:
    """Write results/trials.csv from unpacked stores, which it changes (`rejudge.asked_in_part`)."""
    from calmix.study.store import read_results

    rows = []
    for store in rejudge.STORES:
        path = stores / store
        part = rejudge.asked_in_part(path)
        results = read_results(path)
        for trial in results.trials:
            report = json.loads((path / "trials" / trial.id / "pruning.json").read_text())
            rows.append(
                {
                    "store": store,
                    "trial": trial.id,
                    "model": trial.model,
                    "method": trial.method,
                    "pattern": trial.pattern,
                    "calibration": trial.calibration,
                    "seed": trial.seed,
                    "right_only": trial.id in part,
                    "kl": trial.distance and round(trial.distance["total"]["kl_mean"], 4),
                    "bits": round(whole_bits(trial.model, report), 3),
                }
            )
    pd.DataFrame(rows).to_csv(RESULTS / "trials.csv", index=False)


def distance_pairs(model: str) -> tuple[int, int]:
    """Return in how many pairs of texts (one model, solver and pattern, means over seeds) the text
    of lower KL keeps more, by the mean over abilities, and the number of pairs."""
    table = trials().reset_index()
    table = table[(table.model == model) & table.store.isin(["noise", "behaviour"])]
    table = table[table.pattern.str.contains("%|:") & table.kl.notna()]
    right = pairs = 0
    for _, group in table.groupby(["store", "method", "pattern"]):
        group = group.assign(
            kept=[value(one, "kept").item() for one in zip(group.store, group.trial, strict=True)]
        )
        means = group.groupby("calibration")[["kl", "kept"]].mean()
        for a, b in itertools.combinations(means.itertuples(), 2):
            pairs += 1
            right += (a.kl - b.kl) * (a.kept - b.kept) < 0
    return right, pairs


def predicted(model: str) -> tuple[int, int, float]:
    """Return how often `calibrate predict` (removed) put the better of two texts first at 50 %
    zeros by SparseGPT, the number of pairs, and its rank correlation with what texts keep.

    results/predicted.json has the share of output energy that it predicted to be lost:
    `calmix calibrate predict TEXT... --model MODEL --sparsity 0.5` of version 0.3.
    """
    losses = json.loads((RESULTS / "predicted.json").read_text())[model]
    points = []
    for text, loss in losses.items():
        where = {"model": model, "method": "sparsegpt", "pattern": "50%", "calibration": text}
        stores = (SEEDS[model], "behaviour", "frontier")
        chosen = next(filter(None, (select(store=store, **where) for store in stores)))
        points.append((loss, np.mean([value(one, "kept") for one in chosen])))
    pairs = [*itertools.combinations(points, 2)]
    right = sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs)
    return right, len(pairs), float(stats.spearmanr(*zip(*points, strict=True)).statistic)


def curve_error() -> float:
    """Return by how many points, in the mean, a curve logit(kept) = a + b ln KL, fitted to
    SmolLM2's trials, misses Qwen's."""
    table = trials().reset_index().query("kl > 0")
    pairs = zip(table.store, table.trial, strict=True)
    kept = np.array([value(one, "kept").item() for one in pairs])
    ours, x = (table.model == "smollm2").to_numpy(), np.log(table.kl.to_numpy())
    slope, level = np.polyfit(x[ours], logit(np.clip(kept[ours], 0.005, 0.995)), 1)
    return float(100 * np.abs(expit(level + slope * x[~ours]) - kept[~ours]).mean())


def mean(chosen: Sequence[tuple[str, str]], measure: str = "kept") -> str:
    """Return the mean of a measure in per cent with the number of seeds, or a dash."""
    if not chosen:
        return "–"
    return f"{100 * np.mean([value(one, measure) for one in chosen]):.1f} ({len(chosen)})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def third() -> dict[str, object]:
    """What is known of studies/third-model.yaml, from the files that `calmix study report` writes:
    the declared comparisons, and right answers by text; models without trials are left out."""
    comparisons = pd.read_csv(THIRD / "comparisons.csv").set_index(["name", "model"])
    study = yaml.safe_load((THIRD.parents[1] / "third-model.yaml").read_text("utf-8"))
    known = [one for one in study["models"] if comparisons.gap_value.xs(one, level=1).notna().any()]
    rows, same, gaps = [], "", dict[str, object]()
    for one in study["comparisons"]:
        name, cells = one["name"], []
        for model in known:
            row = comparisons.loc[name, model] if (name, model) in comparisons.index else None
            if row is None or np.isnan(row.gap_value):
                cells.append("–")
                continue
            low, value, high = (100 * row[f"gap_{end}"] for end in ("low", "value", "high"))
            said = {"True": "; prediction refuted"}.get(str(row.refuted), "")
            gap = f"{value:+.1f} [{low:.1f}, {high:.1f}]"
            cells.append(f"{gap}, {row.verdict}{said}")
            gaps[f"{name.split()[0]}_{model}".replace("-", "_")] = (
                f"{gap} points (p {row.p_corrected:.2g}, corrected)"
            )
        number, _, what = name.partition(" ")
        what = what.replace("the same", same)
        same = what.rpartition(",")[0]
        if {*cells} != {"–"}:
            low, high = one["predict"]
            rows.append([number, what, f"{low:+} to {high:+}", *cells])
    labels = [THIRD_LABELS[model] for model in known]
    ranking = pd.read_csv(THIRD / "ranking.csv")
    methods = [*dict.fromkeys(ranking.condition)]
    by_text = []
    for text in dict.fromkeys(ranking.calibration):
        at = ranking[ranking.calibration == text].set_index("condition")
        cells = [
            f"{100 * at.total_value[name]:.0f} [{100 * at.total_low[name]:.0f}, "
            f"{100 * at.total_high[name]:.0f}]"
            if name in at.index
            else "–"
            for name in methods
        ]
        name = next(
            (name for name in (f"compress-{text}", f"{text}-chat-4") if name in NAMES), text
        )
        by_text.append([NAMES.get(name, name), *cells])
    run, planned = re.search(
        r"(\d+) of (\d+) planned", (THIRD / "summary.txt").read_text()
    ).groups()
    curve, pairs = re.findall(r"\d+ of \d+", (THIRD / "predictor.txt").read_text())
    return gaps | {
        "third_curve": curve,
        "third_pairs": pairs,
        "third_run": f"{run} of its {planned}",
        "third_models": " and ".join(labels),
        "third": table(["", "points between", "predicted", *labels], rows),
        "third_texts": table([f"right %, {', '.join(labels)}", *methods], by_text),
    }


def right_cells(trial: tuple[str, str]) -> list[str]:
    """Return the primary measure of a trial with its interval over items, lost and gained answers,
    and McNemar's exact p."""
    [each] = resampled([trial], "right")
    low, high = np.quantile(each[1:], [0.025, 0.975])
    lost, gained = moved(trial)
    p = stats.binomtest(gained, lost + gained).pvalue
    return [
        f"{100 * each[0]:.0f} [{100 * low:.0f}, {100 * high:.0f}]",
        f"{lost}, {gained}",
        "< 0.001" if p < 0.001 else f"{p:.2g}",
    ]


def moved(trial: tuple[str, str]) -> tuple[int, int]:
    """Return the number of lost and of gained answers."""
    answers = items()[trial]
    return int((answers.dense & ~answers.small).sum()), int((answers.small & ~answers.dense).sum())


def texts() -> str:
    """What each text keeps at 50 %, by model and solver."""
    columns = [(model, method) for model in ("smollm2", "qwen") for method in ("sparsegpt", "admm")]
    rows = []
    for text in TEXTS:
        cells = []
        for model, method in columns:
            where = {"model": model, "method": method, "pattern": "50%", "calibration": text}
            chosen = select(store=SEEDS[model], **where) or select(store="behaviour", **where)
            cells.append(mean(chosen))
        rows.append([NAMES.get(text, text), *cells])
    head = [f"{LABELS[model]}, {METHODS[method]}" for model, method in columns]
    return table(["kept %, 50 % zeros (seeds)", *head], rows)


def verdicts() -> str:
    """The mix with chats against math-solutions, counted in three ways."""
    rows = []
    for model, method, pattern in SETTINGS:
        where = {"store": SEEDS[model], "model": model, "method": method, "pattern": pattern}
        ours, theirs = (
            select(calibration=text, **where) for text in ("mix-8-chat-4", "math-solutions")
        )
        cells = [str(lead(ours, theirs, one)) for one in ("all", "without sums", "kept")]
        name = f"{LABELS[model]}, {METHODS[method]}, {pattern.replace('%', ' %')}"
        rows.append([f"{name} ({len(ours)}, {len(theirs)})", *cells])
    return table(
        ["mix minus math-solutions (seeds)", "all answers", "without sums", "mean of abilities"],
        rows,
    )


def solvers() -> str:
    """ADMM against SparseGPT on the same text."""
    rows = []
    for model, text, pattern in SOLVED:
        where = {"store": SEEDS[model], "model": model, "calibration": text, "pattern": pattern}
        ours, theirs = (select(method=method, **where) for method in ("admm", "sparsegpt"))
        cells = [str(lead(ours, theirs, one)) for one in ("all", "without sums", "kept")]
        name = f"{LABELS[model]}, {NAMES.get(text, text)}, {pattern.replace('%', ' %')}"
        rows.append([f"{name} ({len(ours)}, {len(theirs)})", *cells])
    return table(
        ["ADMM minus SparseGPT (seeds)", "all answers", "without sums", "mean of abilities"], rows
    )


def bits() -> str:
    """Right answers of quantised models, beside the files that the models come from."""
    rows = []
    for model, label in LABELS.items():
        rate = 8e6 * FILES[model] / WEIGHTS[model]
        name = f"{label}, its own file, {FILES[model]} MB"
        rows.append([name, f"{rate:.1f}", "100", "0, 0", "–"])
    for model, method, pattern, text in QUANTISED:
        [trial] = select(
            store="frontier",
            model=model,
            method=method,
            pattern=pattern,
            calibration=text,
            seed=0,
            right_only=False,
        )
        way = f"{METHODS[method.split(' ')[0]]} {pattern}".replace("%", " %")
        name = f"{LABELS[model]}, {way}, {NAMES.get(text, text)}"
        rows.append([name, f"{trials().bits[trial]:.1f}", *right_cells(trial)])
    return table(
        ["model, blocks, text", "bits a weight", "right, % of dense", "lost, gained", "p"], rows
    )


def main() -> None:
    """Print the page's numbers, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the pages")
    parser.add_argument("--trials", type=Path, help="folder of unpacked stores")
    options = parser.parse_args()
    if options.trials:
        export(options.trials)
    if options.write:
        for path, text in pages().items():
            path.write_text(text, encoding="utf-8")
    else:
        print(*pages().values(), sep="\n")


if __name__ == "__main__":
    main()
