"""Metrics of calibration text, and their rank correlation with what the texts of a study keep.

    python studies/text_metrics.py STORE [--perplexity]

For every condition with at least four single sources, Spearman's rho between each metric of the
text and the retention of every dimension, with a p by permutation that is corrected over all rows
(Benjamini-Hochberg). A calibration set is one point, averaged over its seeds. Only single sources
count, since a mix would count its sources twice; all sets count for the KL to the dense model,
which needs no labels. `--perplexity` also runs the dense models on the sets. Metrics that older
stores recorded are used as they are.

The metrics follow Objective Information Theory (Xu et al.), which describes information by eleven
properties; the three of time have no meaning for text without time stamps and are left out. The
definitions are ours, not those of arXiv 2606.03328, which are not available to us.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from calmix import words
from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.selfgen.ngrams import Ids, ngram_keys
from calmix.evaluation.likelihood import row_nll
from calmix.evaluation.measures import ALPHA, Array
from calmix.files import read_object
from calmix.models.opening import OpenModel, open_model
from calmix.study.bootstrap import ROUNDING, corrected
from calmix.study.cells import Cells, shared, tables
from calmix.study.results import Trial
from calmix.study.store import RESULT, Entry, Store, open_store, read_results

ORDERS = (1, 2, 3, 4)  # of n-grams
METRIC = "perplexity"
EXACT = 40_320  # 8!: enumerate up to this many permutations, sample if there are more
FEWEST_SETS = 4  # fewest sets to correlate: with fewer, even rho = 1 has p >= 0.33
PERMUTATIONS = 19_999


def count_ngrams(ids: Ids, n: int) -> tuple[int, int]:
    """Return the numbers of distinct and of all n-grams in rows of token ids."""
    (keys,) = ngram_keys([ids], n)
    return len(np.unique(keys)), len(keys)


def coverage(sets: Sequence[Ids], n: int, reference: Sequence[Ids]) -> list[float]:
    """Return each set's share of the distinct n-grams of the reference."""
    keys = ngram_keys([*sets, *reference], n)
    pooled = np.unique(np.concatenate(keys[len(sets) :]))
    return [int(np.isin(pooled, part).sum()) / max(1, len(pooled)) for part in keys[: len(sets)]]


def entropy(weights: NDArray[Any]) -> float:
    """Return the Shannon entropy of a distribution in bits; weights need not sum to 1."""
    share = weights[weights > 0] / weights.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def mismatch(ids: Ids, others: Sequence[Ids]) -> float:
    """Return the Jensen-Shannon divergence, in bits, of the unigrams of `ids` and of `others`
    pooled. Larger sets weigh more in the pool.
    """
    pooled = np.concatenate([other.ravel() for other in others])
    size = int(max(ids.max(), pooled.max())) + 1
    p, q = (np.bincount(part, minlength=size) / part.size for part in (ids.ravel(), pooled))
    return min(1.0, max(0.0, entropy(p + q) - (entropy(p) + entropy(q)) / 2))


def compared(sets: Sequence[tuple[str, Ids]], pool: Mapping[str, Ids]) -> list[dict[str, float]]:
    """Return for each named set its coverage of the pool, and its mismatch with the sets in the
    pool that have other names."""
    shares = {n: coverage([ids for _, ids in sets], n, list(pool.values())) for n in ORDERS}
    results = []
    for at, (name, ids) in enumerate(sets):
        others = [other for label, other in pool.items() if label != name]
        values = {f"coverage_{n}": share[at] for n, share in shares.items()}
        results.append(values | {"mismatch": mismatch(ids, others)})
    return results


def of_ids(ids: Ids) -> dict[str, float]:
    """Return every metric that needs only the ids of one set, by name."""
    counts = {n: count_ngrams(ids, n) for n in ORDERS}
    bits = entropy(np.unique(ids, return_counts=True)[1])
    return {
        "tokens": int(ids.size),
        "entropy": bits,
        "volume": ids.size * bits,
        **{f"variety_{n}": distinct / ids.size for n, (distinct, _) in counts.items()},
        **{
            f"aggregation_{n}": 1 - distinct / total if total else 0.0
            for n, (distinct, total) in counts.items()
        },
    }


def rho(value: float | None) -> str:
    """Return a correlation with its sign and two decimals."""
    return words.number(value, 2, sign=True)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho between a metric and the retention of a quantity under one condition."""

    condition: str
    metric: str
    aliases: tuple[str, ...]  # metrics that rank the sets alike, or in reverse (`-` before them)
    quantity: str
    n: int  # number of sets: single sources, or for KL all
    rho: float | None = None  # None if metric or retention does not vary
    p: float | None = None  # two-sided; exact up to 8 sets
    least_p: float | None = None  # smallest p possible with this many points and no ties
    p_corrected: float | None = None  # over all correlations of the study

    @property
    def significant(self) -> bool:
        """Whether the corrected p is at most 0.05."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA


def unit_ranks(values: Array) -> Array:
    """Return ranks along the last axis, centred and of norm 1; nan where all values are tied.

    The dot product of two such rows is Spearman's rho.
    """
    ranks = rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    length = np.sqrt((ranks**2).sum(-1, keepdims=True))
    return np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)


@lru_cache(maxsize=16)
def orders(size: int, count: int, seed: int) -> NDArray[np.intp]:
    """Return permutations of `size` items as rows: all of them up to `EXACT`, else `count` random
    ones."""
    items = np.arange(size, dtype=np.intp)
    if math.factorial(size) <= EXACT:
        return np.array([*itertools.permutations(items)])
    return np.random.default_rng([seed, size]).permuted(np.tile(items, (count, 1)), axis=1)


def permutation_p(x: Array, y: Array, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Array:
    """Return the two-sided p of Spearman's rho, nan without variation.

    p is the fraction of permutations whose |rho| is at least the observed one, among all
    permutations of up to 8 values, else among random ones plus the observed one. x has shape (n,),
    y (..., n); each row is tested separately.
    """
    a, b = unit_ranks(x), unit_ranks(y)
    observed = np.abs(b @ a)
    permuted = np.abs(a[orders(len(x), permutations, seed)] @ b.T)
    extreme = (permuted >= observed - ROUNDING).sum(0)
    exact = math.factorial(len(x)) <= EXACT
    p = extreme / len(permuted) if exact else (extreme + 1) / (len(permuted) + 1)
    return np.where(np.isnan(observed), np.nan, p)


def least_p(size: int, permutations: int = PERMUTATIONS) -> float:
    """Return the smallest two-sided p possible with `size` values without ties."""
    count = math.factorial(size)
    return 2 / count if count <= EXACT else 1 / (permutations + 1)


def distinct(values: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Return the metrics that rank sets differently, each with its aliases.

    With a fixed token budget some metrics are functions of others and would repeat the same test.
    Constant metrics are left out. Perplexity comes first, so that it is never an alias.
    """
    values = values.loc[:, values.nunique() > 1]
    known, signs, aliases = values.notna(), values.corr("spearman"), dict[str, tuple[str, ...]]()
    for name in sorted(values, key=lambda name: name != METRIC):
        for other in aliases:
            if known[name].equals(known[other]) and abs(signs.loc[name, other]) >= 1 - ROUNDING:
                aliases[other] += (name if signs.loc[name, other] > 0 else f"-{name}",)
                break
        else:
            aliases[name] = ()
    return aliases


def correlate(
    conditions: Sequence[Cells],
    trials: Sequence[Trial],
    information: Mapping[str, Mapping[str, float]],
    *,
    permutations: int = PERMUTATIONS,
) -> list[Correlation]:
    """Correlate every metric, and KL, with every quantity under each condition; `information` holds
    the metrics of each trial's text by the trial's id."""
    rows = list[Correlation]()

    def add(cells: Cells, metric: str, aliases: tuple[str, ...], x: Array, at: int) -> None:
        y, head = cells.means[:, at], (cells.condition.label, metric, aliases)
        known = np.flatnonzero(~np.isnan(x))
        values, name = y[known], cells.quantities[at]
        sign = p = least = None
        if len(known) >= FEWEST_SETS:
            least = least_p(len(known), permutations)
            found = float(unit_ranks(values) @ unit_ranks(x[known]))
            if not math.isnan(found):
                sign, p = found, float(permutation_p(x[known], values, permutations=permutations))
        rows.append(Correlation(*head, name, len(known), sign, p, least))

    for cells in conditions:
        same = [one for one in trials if shared(one) == shared(cells.condition)]
        names = [one.calibration for one in same]
        table = pd.DataFrame([information.get(one.id, {}) for one in same], dtype=float)
        means = table.groupby(names, sort=False).mean().reindex(cells.sets)
        singles = cells.of("single")
        if len(singles) >= FEWEST_SETS:
            for metric, aliases in distinct(means.iloc[singles]).items():
                x = np.full(len(cells.sets), np.nan)
                x[singles] = means[metric].to_numpy()[singles]
                for at in range(len(cells.quantities)):
                    add(cells, metric, aliases, x, at)
        for at, x in enumerate(cells.distance["kl"].T):
            x = np.where(np.isnan(cells.means[:, at]), np.nan, x)
            if (~np.isnan(x)).sum() >= FEWEST_SETS:
                add(cells, "kl", (), x, at)
    (tested,) = corrected(rows)
    return tested


def perplexity_of_rows(opened: OpenModel, ids: Tensor) -> dict[str, float]:
    """Return perplexity and bits per UTF-8 byte of rows of token ids, shape (rows, length), whose
    first tokens are context only."""
    nll, predicted = float(row_nll(opened.model, ids).double().sum()), ids[:, 1:]
    texts = opened.tokenizer.batch_decode(predicted.tolist(), skip_special_tokens=False)
    size = sum(len(text.encode()) for text in texts)
    return {METRIC: math.exp(nll / predicted.numel()), "bits_per_byte": nll / math.log(2) / size}


def information_of(store: Store, *, perplexity: bool = False) -> dict[str, dict[str, float]]:
    """Return the metrics of the text of every finished trial of a store, by the trial's id.

    Coverage and mismatch compare a set with the study's single sources (the lowest seed of each,
    for the same model, rows and length) pooled; mismatch leaves out the set's own source.
    """
    entries = [one for one in store.index.trials if store.state(one.id) == "finished"]
    records = {one.id: read_object(store.trial(one.id) / RESULT, "")["trial"] for one in entries}
    metrics = {name: dict(one.get("information", {})) for name, one in records.items()}
    models = yaml.safe_load(store.index.text).get("models", {})
    groups = defaultdict[tuple[Any, ...], dict[str, Entry]](dict)
    for one in entries:
        if one.set is not None and store.calibration(one.set).is_dir():
            alike = records[one.id]
            groups[alike["model"], alike["rows"], alike["length"]].setdefault(one.set, one)
    for (label, *_), members in groups.items():
        sets = {name: CalibrationSet.open(store.calibration(name)) for name in members}
        ids = {name: one.ids.numpy() for name, one in sets.items()}
        singles = {
            records[one.id]["calibration"]: name  # the lowest seed comes last and wins
            for name, one in sorted(members.items(), key=lambda m: -records[m[1].id]["seed"])
            if records[one.id]["strategy"] == "single"
        }
        own = {name: of_ids(each) for name, each in ids.items()}
        if len(singles) > 1:
            named = [(records[one.id]["calibration"], ids[name]) for name, one in members.items()]
            pool = {source: ids[name] for source, name in singles.items()}
            for name, more in zip(members, compared(named, pool), strict=True):
                own[name] |= more
        if perplexity:
            entry = models[label] if isinstance(models, dict) else label
            opened = open_model(entry if isinstance(entry, str) else entry["name"])
            for name, drawn in sets.items():
                own[name] |= perplexity_of_rows(opened, drawn.ids)
        for one in entries:
            if one.set in own:
                metrics[one.id] |= own[one.set]
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--perplexity", action="store_true", help="run the dense models too")
    options = parser.parse_args()
    results = read_results(options.store)
    information = information_of(open_store(options.store), perplexity=options.perplexity)
    for one in correlate(tables(results), results.trials, information):
        also = f" (as {', '.join(one.aliases)})" if one.aliases else ""
        print(
            f"{one.condition}: {one.metric}{also} and {one.quantity}, {one.n} sets: "
            f"ρ {rho(one.rho)}, p {words.p_value(one.p)}, corrected "
            f"{words.p_value(one.p_corrected)}" + " ●" * one.significant
        )


if __name__ == "__main__":
    main()
