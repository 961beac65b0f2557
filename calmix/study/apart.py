"""Draws until sets are apart: run a study, look at the totals, add draws where sets are not yet
told apart, and look again (the looks themselves: `calmix.analysis.sequential`).

What is added and what was looked at is kept in the store before it is run, so that a run which
was stopped goes on to the same decisions, and any later run asks for the same trials.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from calmix.analysis.sequential import Look, look, unsettled
from calmix.analysis.statistics import Array
from calmix.errors import InputError
from calmix.files import sha256_json
from calmix.study.bench import Bench
from calmix.study.running import (
    Execute,
    Observer,
    Options,
    Outcome,
    asked_trials,
    chosen_trials,
    run_on,
    run_study,
)
from calmix.study.spec import Study
from calmix.study.store import Store, is_store, open_store
from calmix.study.trials import Added, Condition, Planned, Resolved, condition_names, plan

MOST = 8  # draws of a set


@dataclass(frozen=True)
class Pair:
    """Two sets at a look: `ahead` has the higher mean total.

    `value`, `low` and `high` are the difference and its corrected interval, as shares (ends None
    where no set has two draws).
    """

    ahead: str
    behind: str
    value: float
    low: float | None
    high: float | None
    state: Literal["apart", "equal", "open"]

    @property
    def line(self) -> str:
        """The pair in words."""
        text = f"{self.ahead} is ahead of {self.behind} by {100 * self.value:.1f} points"
        if self.low is None or self.high is None:
            return f"{text}, and no set has two draws"
        return f"{text} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Standing:
    """Where the sets of a condition stand at a look.

    Attributes:
        look, looks: its number, and the most there can be.
        best: the set with the highest mean total.
        within: differences that count as none, a share.
        draws: finished, of every set.
        pairs: that were compared.
    """

    condition: str
    look: int
    looks: int
    best: str
    within: float
    draws: dict[str, int]
    pairs: tuple[Pair, ...]

    @property
    def line(self) -> str:
        """What is known of the sets against the best one."""
        words = {
            "apart": "behind it",
            "equal": f"equal within {100 * self.within:g} points",
            "open": "not told",
        }
        parts = [f"{self.condition}, look {self.look} of {self.looks}: best {self.best}"]
        for state, said in words.items():
            names = [p.behind for p in self.pairs if (p.ahead, p.state) == (self.best, state)]
            if names:
                parts.append(f"{said}: {', '.join(names)}")
        return "; ".join(parts)


def run_until_apart(
    study: Study,
    path: Path,
    observer: Observer,
    *,
    points: float,
    most: int | None = None,
    options: Options | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    retry_failed: bool = False,
    reuse: Sequence[Path] = (),
    execute: Execute | None = None,
) -> tuple[Store, Outcome, list[Standing]]:
    """Run a study as `run_study` does, and then further draws until its sets are told apart.

    Args:
        points: sets that differ by less than so many points of the total count as equal.
        most: draws of a set, planned ones included; None is the store's, or 8.
        only, skip: as for `run_study`; sets without a chosen trial are not compared.

    Raises:
        InputError: as `run_study`; no two sets can be compared, `most` adds nothing, or the store
            was looked at with another `most`.
    """
    if not 0 < points < 100:
        raise InputError(f"sets are told apart to so many points between 0 and 100, not {points:g}")
    limit = _most(study, path, most)
    run = execute or _on_one_bench()
    store, outcome = run_study(
        study, path, observer, options=options, only=only, skip=skip, retry_failed=retry_failed,
        reuse=reuse, execute=run,
    )  # fmt: skip
    while True:
        chosen = chosen_trials(asked_trials(study, path), only, skip)
        standings, added = look_round(study, store, chosen, points / 100, limit, observer)
        if not added:
            return store, outcome, standings
        store, more = run_study(
            study, path, observer, options=options, only=only, skip=skip, reuse=reuse, execute=run
        )
        outcome.finished += more.finished
        outcome.failed |= more.failed
        outcome.elsewhere |= more.elsewhere


def look_round(
    study: Study,
    store: Store,
    chosen: Iterable[Planned],
    within: float,
    most: int,
    observer: Observer,
) -> tuple[list[Standing], list[Added]]:
    """Look at every condition that has no trial left to run, and keep the draws this asks for.

    Failed trials are left out. A look at what an earlier one saw is that look.
    """
    first = Counter((trial.condition, trial.calibration) for trial in plan(study))
    kept = {(trial.condition, trial.calibration) for trial in chosen}
    groups: dict[Condition, dict[str, list[Planned]]] = {}
    for trial in asked_trials(study, store.path):
        if trial.draw is not None and (trial.condition, trial.calibration) in kept:
            groups.setdefault(trial.condition, {}).setdefault(trial.calibration, []).append(trial)
    names = condition_names(groups)
    standings: list[Standing] = []
    added: list[Added] = []
    looks: list[dict[str, Any]] = []
    for condition, asked in groups.items():
        if len(asked) < 2:
            continue
        left = store.unfinished(trial.key for trials in asked.values() for trial in trials)
        if left:
            observer.note(f"{names[condition]}: not looked at, {left} trials are left to run")
            continue
        sets, values, state = totals(store, asked)
        if len(sets) < 2:
            observer.note(f"{names[condition]}: not looked at, no two sets have a total")
            continue
        of = max(1, most - min(first[condition, name] for name in asked) + 1)
        record = store.looks.get(condition, {"condition": list(condition), "of": of, "seen": []})
        record = record | {"seen": list(dict.fromkeys([*record["seen"], state]))}
        number, of = record["seen"].index(state) + 1, record["of"]
        if number > of:
            observer.note(f"{names[condition]}: changed since its {of} looks, which are used up")
            continue
        looks.append(record)
        mixed = np.array([asked[name][0].strategy != "single" for name in sets])
        seen = look(values, mixed, within=within, looks=of)
        standings.append(_standing(names[condition], seen, sets, values, (number, of)))
        if number < of:
            for trial, reason in _draws(seen, sets, asked, most):
                observer.note(f"one more draw, {trial.label}: {reason}")
                added.append((condition, trial.calibration, trial.seed))
    if looks:
        store.add(added, looks, most)
    return standings, added


def totals(store: Store, asked: Mapping[str, Sequence[Planned]]) -> tuple[list[str], Array, str]:
    """Return the total retention of every finished trial of a condition.

    Args:
        asked: trials by calibration set.

    Returns:
        The sets that have one, their totals (shape (sets, draws), nan where there is none), and
        what tells this state of the condition from others.
    """
    ids = store.ids
    found: dict[str, list[float]] = {}
    finished = []
    for name, trials in asked.items():
        for trial_id in (ids[trial.key] for trial in trials):
            if store.state(trial_id) == "finished":
                finished.append(trial_id)
                total = store.read_trial(trial_id).total.value
                if total is not None:
                    found.setdefault(name, []).append(total)
    values = np.full((len(found), max(map(len, found.values()), default=0)), np.nan)
    for row, own in zip(values, found.values(), strict=True):
        row[: len(own)] = own
    return list(found), values, sha256_json(sorted(finished))[:16]


def _draws(
    seen: Look, sets: Sequence[str], asked: Mapping[str, Sequence[Planned]], most: int
) -> Iterator[tuple[Planned, str]]:
    """Yield the draws that a look asks for, each set's next seed, and why."""
    more = np.array([len(asked[name]) < most and asked[name][0].redrawable for name in sets])
    best = int(seen.means.argmax())
    for at in np.flatnonzero(unsettled(seen, more)).tolist():
        others = np.flatnonzero(seen.open[at] & more).tolist()
        trials = asked[sets[at]]
        another = trials[0].redrawn(1 + max(trial.seed for trial in trials))
        yield another, _pair(seen, sets, at, best if best in others else others[0]).line


def _standing(
    name: str, seen: Look, sets: Sequence[str], values: Array, number: tuple[int, int]
) -> Standing:
    draws = dict(zip(sets, (~np.isnan(values)).sum(1).tolist(), strict=True))
    pairs = [_pair(seen, sets, a, b) for a, b in np.argwhere(np.triu(seen.compared)).tolist()]
    best = sets[int(seen.means.argmax())]
    return Standing(name, *number, best, seen.within, draws, tuple(pairs))


def _pair(seen: Look, sets: Sequence[str], a: int, b: int) -> Pair:
    if seen.means[a] < seen.means[b]:
        a, b = b, a
    value, half = float(seen.gap[a, b]), float(seen.half[a, b])
    low, high = (value - half, value + half) if math.isfinite(half) else (None, None)
    state: Literal["apart", "equal", "open"] = "open"
    if not seen.open[a, b]:
        state = "apart" if seen.apart[a, b] else "equal"
    return Pair(sets[a], sets[b], value, low, high, state)


def _most(study: Study, path: Path, most: int | None) -> int:
    """Return the most draws of a set, checked against the study and its store."""
    sets: dict[Condition, Counter[str]] = {}
    for trial in plan(study):
        if trial.redrawable:
            sets.setdefault(trial.condition, Counter())[trial.calibration] += 1
    counts = [count for own in sets.values() if len(own) > 1 for count in own.values()]
    if not counts:
        raise InputError(
            "--until-apart has no effect: no two calibration sets of the study can be drawn again "
            "under one condition"
        )
    kept = open_store(path).index.get("most") if is_store(path) else None
    if kept is not None and most not in (None, kept):
        raise InputError(
            f"{path} was looked at with --most-draws {kept}, over which the level of its looks is "
            "split: keep it, or name another store"
        )
    limit = most or kept or MOST
    if limit <= min(counts):
        raise InputError(
            f"--most-draws {limit} adds nothing: the study asks for {min(counts)} draws a set"
        )
    return limit


def _on_one_bench() -> Execute:
    """Return what runs trials in this process, with one open model over all rounds."""
    bench: list[Bench] = []

    def execute(
        study: Study, store: Store, todo: Sequence[Resolved], options: Options, observer: Observer
    ) -> Outcome:
        if not bench:
            bench.append(options.bench(study, store))
        return run_on(bench[0], store, todo, observer)

    return execute
