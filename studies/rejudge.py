"""Judge the stored answers of studies again, under the checks of today, without running a model.

    CALMIX_DATA=FOLDER python studies/rejudge.py --cache CACHE

Reads the answers of every trial and of its dense model from `studies/results/NAME/store.tar.xz`,
judges them as suite `abilities` does now, prints how many verdicts changed, and writes
`studies/results/rejudged.csv.gz`. Generated programs run in the sandbox; CACHE, a file, keeps their
outcomes, so that an interrupted run resumes. `load()` returns the table item by item:

    from studies.rejudge import load
    items = load()
    kept = items[items.dense & items.right.notna()].groupby(["store", "trial", "task"]).right.mean()

Layout of the file: a row for each trial and task with generated answers, and one (without `trial`)
for each dense model and task. Rows of a trial name their dense model's rows by `against`.

    store         name of the study
    trial, label  hash and label of the trial; empty in rows of a dense model
    against       dense model, and number of its scores in the store
    model, calibration, method, pattern, seed   settings of the trial
    right_only    1 if only the items that the dense model had right in version 1 were asked
    dimension, task
    items         numbers of the items, in order; only in rows of a dense model
    before        verdicts of version 1, a character for each item
    after         verdicts now

A verdict is 1 (right), 0 (wrong), - (not asked) or x (no longer in the suite).
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import tarfile
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import calmix.evaluation.evaluate as evaluation
from calmix.evaluation.checks import VERSION
from calmix.evaluation.measures import TaskScores
from calmix.evaluation.prompts import Ask
from calmix.evaluation.sandbox import check_sandbox, failure
from calmix.evaluation.suites import load_suite, provenance
from calmix.evaluation.tasks import load_asked
from calmix.manifest import SEAL
from calmix.study.store import read_results

RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "rejudged.csv.gz"
STORES = ("abilities", "behaviour", "frontier", "noise", "right-answers")
Answer = tuple[str, str, str, int]  # task, item, answer, whether it ended
SETTINGS = ["model", "calibration", "method", "pattern", "seed"]
OF_TRIAL = ["store", "trial", "label", *SETTINGS, "right_only"]
COLUMNS = [*OF_TRIAL, "against", "dimension", "task", "items", "before", "after"]
written = attrgetter("written")  # whether a task's answers were generated
RIGHT, WRONG, NOT_ASKED, DROPPED = "1", "0", "-", "x"


def load(path: Path = TABLE) -> pd.DataFrame:
    """Return the table with a row for each trial and item.

    Columns: those of a trial; dimension, task, item; `dense_before`, `dense`, `before` and `right`
    (nullable booleans: the verdicts of version 1 and of now, for the dense and the small model).
    They are missing where a small model was not asked, and now where an item left the suite.
    """
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows["right_only"], rows["seed"] = rows.right_only == "1", pd.to_numeric(rows.seed)
    key = ["store", "against", "task"]
    dense = rows[rows.trial == ""].set_index(key)[["items", "before", "after"]]
    rows = rows[rows.trial != ""].drop(columns="items").join(dense, on=key, rsuffix="_dense")
    packed = ["before_dense", "after_dense", "before", "after"]
    for column in packed:
        rows[column] = rows[column].map(list)
    rows["items"] = rows["items"].str.split()
    found = rows.explode(["items", *packed], ignore_index=True)
    verdicts = {RIGHT: True, WRONG: False}
    for column in packed:
        found[column] = found[column].map(verdicts).astype("boolean")
    found["items"] = found.task + "/" + found["items"]
    names = {"items": "item", "before_dense": "dense_before", "after_dense": "dense"}
    found = found.rename(columns=names | {"after": "right"})
    found["seed"] = found.seed.astype(int)
    judged = ["dense_before", "dense", "before", "right"]
    return found[[*OF_TRIAL, "dimension", "task", "item", *judged]]


def asked_in_part(store: Path) -> set[str]:
    """Return the trials that were asked only what the dense model had right (by `right_only`, an
    option since removed), and rewrite their scores so that calmix reads them."""
    part = set()
    for path in store.glob("trials/*/scores.json"):
        scores = json.loads(path.read_text(encoding="utf-8"))
        if scores.pop("right_only", False):
            part.add(path.parent.name)
            scores.pop(SEAL, None)
            path.write_text(json.dumps(scores), encoding="utf-8")
    return part


def unpacked(names: Sequence[str]) -> Iterator[tuple[str, Any, set[str]]]:
    """Yield name and results of each store, and its trials that were asked in part."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(RESULTS / name / "store.tar.xz") as archive:
                archive.extractall(folder, filter="data")
            store = next(Path(folder).iterdir())
            part = asked_in_part(store)
            yield name, read_results(store), part


def verdicts(answers: Sequence[Answer], cache: Path) -> dict[Answer, bool]:
    """Judge distinct answers; programs whose outcome is in the cache do not run again."""
    known = dict(line.split() for line in cache.read_text().splitlines()) if cache.exists() else {}
    lock = threading.Lock()

    def outcome(*texts: str, **how: Any) -> str:
        key = hashlib.sha256(repr((texts, how)).encode()).hexdigest()[:32]
        if key not in known:
            failed = failure(*texts, **how)
            if failed.startswith("still running"):  # perhaps because the machine is busy
                failed = failure(*texts, **how, seconds=30)
            with lock, cache.open("a") as file:
                known[key] = WRONG if failed else RIGHT
                file.write(f"{key} {known[key]}\n")
        return "" if known[key] == RIGHT else "failed"

    evaluation.failure = outcome
    check_sandbox()

    def judge(one: Answer) -> bool:
        task, item, answer, ended = one
        known = items_of(task).get(item)
        return known is not None and evaluation.verdict(known, answer, bool(ended))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(answers, pool.map(judge, answers), strict=True))


@functools.cache
def items_of(task: str) -> dict[str, Ask]:
    """Return the items of a task by their ids."""
    return {one.id: one for one in load_asked(task)}


def given(task: TaskScores) -> list[Answer]:
    """Return a task's answers."""
    rows = zip(task.items, task.answers, task.ended, strict=True)
    return [(task.name, item, answer, ended) for item, answer, ended in rows]


def packed_rows(
    results: Any, name: str, part: set[str], judged: dict[Answer, bool]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a store: of its dense models, and of its trials."""
    dense: list[tuple[TaskScores, ...]] = []

    def packed(task: TaskScores, asked: Sequence[bool]) -> dict[str, str]:
        before = [RIGHT if value else WRONG for value in task.values]
        after = [RIGHT if judged[one] else WRONG for one in given(task)]
        for at, (item, was_asked) in enumerate(zip(task.items, asked, strict=True)):
            if not was_asked:
                before[at] = after[at] = NOT_ASKED
            if item not in items_of(task.name):
                after[at] = DROPPED
        return {
            "dimension": task.dimension,
            "task": task.name,
            "before": "".join(before),
            "after": "".join(after),
        }

    for trial in results.trials:
        paired = results.paired[trial.id]
        if paired not in dense:
            dense.append(paired)
            label = f"{trial.model} {dense.index(paired)}"
            for task in filter(written, paired):
                numbers = " ".join(item.rpartition("/")[2] for item in task.items)
                yield {
                    "store": name,
                    "against": label,
                    "model": trial.model,
                    "items": numbers,
                    **packed(task, [True] * len(task.items)),
                }
        shared = {
            "store": name,
            "trial": trial.id,
            "label": f"{trial.calibration} {trial.method} {trial.pattern} seed {trial.seed}",
            "against": f"{trial.model} {dense.index(paired)}",
            **{key: getattr(trial, key) for key in SETTINGS},
        }
        for task, reference in zip(results.scores[trial.id], paired, strict=True):
            if task.written:
                partly = trial.id in part
                asked = [not partly or bool(value) for value in reference.values]
                yield shared | packed(task, asked) | {"right_only": int(partly)}


def sample(
    stores: dict[str, Any], judged: dict[Answer, bool], seed: int, each: int = 50
) -> pd.DataFrame:
    """Draw answers to read, `each` judged right and wrong: in turns from every task and model, and
    from the texts drawn least often. Questions without a stated licence are left out."""
    rng, drawn = random.Random(seed), list[dict[str, Any]]()
    pool: dict[Answer, set[tuple[str, str]]] = {}
    for results in stores.values():
        sides = [(results.scores, lambda trial: trial.calibration), (results.paired, lambda _: "")]
        for trial, (scores, text) in itertools.product(results.trials, sides):
            for one in itertools.chain(*map(given, filter(written, scores[trial.id]))):
                if one[2].strip() and one[1] in items_of(one[0]):
                    pool.setdefault(one, set()).add((trial.model, text(trial) or "dense model"))
    tasks, used = load_suite("abilities").tasks, Counter[str]()
    for verdict in (True, False):
        strata: dict[tuple[str, str], list[tuple[Answer, str]]] = {}
        for one in sorted(pool):
            for model, text in sorted(pool[one]) if judged[one] is verdict else ():
                strata.setdefault((one[0], model), []).append((one, text))
        for some in strata.values():
            rng.shuffle(some)
        seen = set[Answer]()
        turns = itertools.cycle(rng.sample(sorted(strata), len(strata)))
        while len(seen) < each:
            task, model = next(turns)
            left = [pair for pair in strata[task, model] if pair[0] not in seen]
            if not left:
                continue
            one, text = min(left, key=lambda pair: used[pair[1]])
            seen.add(one)
            used[text] += 1
            item, licence = items_of(task)[one[1]], provenance(tasks[task])["licence"]
            free = not licence.startswith("unstated")
            gold = item.doc.get("tests") or item.doc.get("test_list") or item.right
            drawn.append(
                {
                    "model": model,
                    "text": text,
                    "task": task,
                    "item": one[1],
                    "question": item.question.strip()[-300:] if free else "",
                    "gold": str(gold or "tests")[-300:] if free else "",
                    "answer": one[2]
                    if len(one[2]) <= 400
                    else f"{one[2][:200]} [...] {one[2][-190:]}",
                    "cut": "" if one[3] else "cut",
                    "verdict": "right" if verdict else "wrong",
                }
            )
    return pd.DataFrame(drawn)


def moved(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Count verdicts before and after, of trials and of dense models."""
    rows = table.assign(of=np.where(table.trial == "", "dense", "small"))
    counted = []
    for key, some in rows.groupby([*by, "of"], sort=False):
        pairs = Counter(
            pair for row in some.itertuples() for pair in zip(row.before, row.after, strict=True)
        )
        counted.append(
            [
                *key,
                sum(n for (before, _), n in pairs.items() if before in "01"),
                sum(n for (before, _), n in pairs.items() if before == RIGHT),
                sum(n for (_, after), n in pairs.items() if after == RIGHT),
                pairs[WRONG, RIGHT],
                pairs[RIGHT, WRONG],
                pairs[RIGHT, DROPPED] + pairs[WRONG, DROPPED],
            ]
        )
    heads = ["asked", "right before", "right now", "wrong->right", "right->wrong", "dropped"]
    return pd.DataFrame(counted, columns=[*by, "of", *heads])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stores", nargs="*", default=STORES, help="names below studies/results")
    parser.add_argument("--cache", type=Path, required=True, help="file of outcomes of programs")
    parser.add_argument("-o", "--output", type=Path, default=TABLE)
    parser.add_argument("--sample", type=int, metavar="SEED", help="draw answers to read instead")
    options = parser.parse_args()
    os.nice(10)
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    parts, stores = dict[str, set[str]](), dict[str, Any]()
    for name, results, part in unpacked(options.stores):
        stores[name], parts[name] = results, part
    distinct = dict.fromkeys(
        one
        for results in stores.values()
        for scores in (results.scores, results.paired)
        for tasks in scores.values()
        for task in filter(written, tasks)
        for one in given(task)
    )
    print(f"{len(distinct):,} distinct answers, checks of version {VERSION}", flush=True)
    judged = verdicts([*distinct], options.cache)
    if options.sample is not None:
        sample(stores, judged, options.sample).to_csv(options.output, index=False)
        return
    rows = [
        dict.fromkeys(COLUMNS, "") | row
        for name, results in stores.items()
        for row in packed_rows(results, name, parts[name], judged)
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    with io.StringIO() as text:
        table.to_csv(text, index=False, lineterminator="\n")
        content = text.getvalue().encode()
    with options.output.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(content)
    print(moved(table, ["task"]).to_string(index=False))
    print(moved(table, ["store"]).to_string(index=False))
    print(
        f"{options.output}: {options.output.stat().st_size / 1024:.0f} KiB, "
        f"{table[table.trial != ''].trial.nunique()} trials"
    )


if __name__ == "__main__":
    main()
