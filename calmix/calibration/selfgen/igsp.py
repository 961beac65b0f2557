"""IGSP: a multi-source calibration set the model writes itself, chosen by information.

Ours, from one sentence of the abstract of arXiv 2606.03328 (method section 6): build a
multi-source set without corpora, with little 4-gram aggregation and perplexity in balance across
dimensions. The steps, each a function here or in `calmix.calibration.diversity`:

1. openers, a list a dimension, no corpus;
2. a pilot, which finds for each dimension the temperature that brings its perplexity towards the
   dimensions' common one;
3. candidates: short pieces, as many as the set holds or so many times as many, and more in place
   of what is refused or repeats itself;
4. of more candidates a band: those of unusually low or high perplexity for their dimension are
   left out;
5. selection of pieces by J = A4 + lambda * variance of log perplexity across dimensions;
6. packing: the pieces of a row are of one dimension.

Pieces, not rows, are written and chosen: a long text drifts away from its opener's dimension,
and a choice among whole rows prefers oddities. By default no more are written than the set holds:
band and selection have earned nothing (docs/generation.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.calibration.diversity import LAMBDA, ORDER, Objective, check_weight, select_rows
from calmix.calibration.selfgen.made import ANOTHER, ROUNDS, Made, Write
from calmix.calibration.selfgen.sampling import Sampling
from calmix.calibration.selfgen.writing import Request, Written
from calmix.errors import InputError
from calmix.information.metrics import row_aggregation

NAME = "igsp"
PIECE = 170  # tokens of a piece, about: rows are cut into as many as come nearest
PILOT_PIECES, PILOT_TOKENS = 16, 64  # tokens, and more where openers take most of them
PILOT_SPREAD = 0.1  # temperatures tried below and above the given one
DEFAULTS: dict[str, Any] = {
    "openers": None,
    "temperature": 0.9,
    "top_k": None,
    "top_p": None,
    "repetition_penalty": 1.0,
    "candidates": 1.0,
    "lambda_": LAMBDA,
    "piece": PIECE,
    "band": 0.0,
    "repeats": 0.2,
}


def igsp(
    write: Write,
    openers: Mapping[str, Sequence[Sequence[int]]],
    *,
    rows: int,
    length: int,
    seed: int,
    temperature: float,
    candidates: float,
    lambda_: float,
    piece: int,
    band: float,
    repeats: float,
    accept: Any = None,
    **sampling: Any,
) -> Made:
    """Write, choose and pack a set of `rows` rows of `length` tokens.

    Args:
        openers: token ids of the openers, by dimension.
        temperature: the middle of the temperatures the pilot chooses among.
        candidates: how many times the pieces of the set are written.
        lambda_: weight of the balance in J.
        piece: tokens of a piece, about.
        band: share of the pieces left out at each end of a dimension's perplexities.
        repeats: share of a piece's 4-grams that may repeat within it: one that repeats more loops.
        accept: called with the ids of all pieces, returns which may be used; None for all.
        **sampling: the other fields of `Sampling`.

    Raises:
        InputError: rows do not divide over the dimensions, or a setting is out of range.
    """
    names = list(openers)
    check(candidates=candidates, lambda_=lambda_, piece=piece, band=band, repeats=repeats)
    if rows % len(names):
        down = rows // len(names) * len(names)
        near = f"{down} or {down + len(names)}" if down else str(len(names))
        raise InputError(f"{rows} rows do not divide over {len(names)} dimensions: ask for {near}")
    per_row = max(1, round(length / piece))
    size = math.ceil(length / per_row)
    quota = rows // len(names) * per_row
    pool = math.ceil(candidates * quota)
    base = Sampling(temperature=temperature, **sampling)
    openers = {name: fitting(held, size) for name, held in openers.items()}

    def request(
        counts: Mapping[str, int], length: int, seed: int, of: Mapping[str, float]
    ) -> Request:
        place = _in_turn(counts)
        turns = [_turned(openers[d], j, seed) for d, j in place]
        return Request(turns, length, base, seed, [of[d] for d, _ in place])

    temperatures, pilot = dict.fromkeys(names, temperature), {}
    if len(names) > 1 and lambda_ > 0:
        tried = [temperature - PILOT_SPREAD, temperature, temperature + PILOT_SPREAD]
        tried = [value for value in tried if value > 0]
        longest = max(len(opener) for held in openers.values() for opener in held)
        short = min(size, max(PILOT_TOKENS, longest + PILOT_TOKENS // 2))
        for value in tried:
            written = write(
                request(
                    dict.fromkeys(names, PILOT_PIECES), short, seed, dict.fromkeys(names, value)
                ),
                f"pilot at temperature {value:g}",
            )
            pilot[value] = dict(zip(names, _logs(written, len(names)), strict=True))
        temperatures = balanced(pilot, temperature)

    def candidates_of(counts: Mapping[str, int], number: int) -> Written:
        label = "writing more in place of what cannot be used" if number else "writing candidates"
        return write(request(counts, size, seed + 1 + number * ANOTHER, temperatures), label)

    written, groups, shares, usable = _enough(candidates_of, names, pool, quota, repeats, accept)
    nll = torch.where(written.sampled, written.nll.double(), 0.0).sum(1).numpy()
    tokens = written.sampled.sum(1).numpy()
    logs = np.divide(nll, tokens, out=np.full(len(nll), np.inf), where=tokens > 0)
    inside = np.flatnonzero(in_band(logs, groups, usable, quota, band))
    chosen = select_rows(
        written.ids.numpy()[inside],
        [groups[i] for i in inside],
        dict.fromkeys(names, quota),
        nll[inside].tolist(),
        tokens[inside].tolist(),
        weight=lambda_,
    )
    picked = [int(inside[i]) for i in chosen.rows]
    ids, tags = pack(written.ids, [groups[i] for i in picked], picked, per_row, length, seed)
    record = {
        "dimensions": names,
        "temperature": {name: round(value, 4) for name, value in temperatures.items()},
        "pilot": {f"{value:g}": _perplexities(held) for value, held in pilot.items()},
        "pieces": {"tokens": size, "a_row": per_row, "written": len(groups),
                   "refused": int(np.isinf(shares).sum()),
                   "passed_over": int((np.isfinite(shares) & ~usable).sum()),
                   "in_band": len(inside), "chosen": len(picked),
                   "looping": int((shares[picked] > repeats).sum())},
        "first_in_band": _shown(chosen.before),
        "greedy": _shown(chosen.greedy),
        "selected": _shown(chosen.after),
        "swaps": len(chosen.trace) - 1,
    }  # fmt: skip
    return Made(ids, tags, record)


def check(
    *, candidates: float, lambda_: float, piece: int, band: float, repeats: float, **_: Any
) -> None:
    """Refuse settings that no set can be made with, or that have no effect.

    Raises:
        InputError: which setting, and what would do.
    """
    if not (math.isfinite(candidates) and candidates >= 1):
        raise InputError(
            f"--candidates {candidates:g} writes fewer pieces than the set holds: use 1 or more"
        )
    check_weight(lambda_)
    if not 0 <= band < 0.5:
        raise InputError(f"--band {band:g} is not in [0, 0.5)")
    if piece < 8:
        raise InputError(f"--piece {piece} is too short to hold text: use 8 tokens or more")
    if not 0 < repeats <= 1:
        raise InputError(f"--repeats {repeats:g} is not in (0, 1]: 1 takes whatever loops")
    if candidates == 1 and (band or lambda_ not in (0, LAMBDA)):
        raise InputError(
            f"--{'band' if band else 'lambda'} has no effect with --candidates 1, which leaves no "
            "piece out: write more"
        )


def fitting(openers: Sequence[Sequence[int]], size: int) -> list[Sequence[int]]:
    """Return the openers that leave the model half of a piece of `size` tokens, in their order;
    the shortest where none does."""
    short = [opener for opener in openers if len(opener) <= size // 2]
    return short or [min(openers, key=len)]


def balanced(pilot: Mapping[float, Mapping[str, float]], middle: float) -> dict[str, float]:
    """Return for each dimension the tried-out temperature range's best for a common perplexity.

    The target is the mean over the dimensions of log perplexity at the middle temperature, so
    that the set stays near the model's natural perplexity. Between the temperatures tried, log
    perplexity is taken as linear; it is kept from falling, as it does not but for noise.

    Args:
        pilot: log perplexity by temperature and dimension.
        middle: one of the temperatures.
    """
    tried = sorted(pilot)
    target = float(np.mean(list(pilot[middle].values())))
    chosen = {}
    for name in pilot[middle]:
        logs = np.maximum.accumulate([pilot[value][name] for value in tried])
        chosen[name] = float(np.interp(target, logs, tried))
    return chosen


def in_band(
    logs: np.ndarray, groups: Sequence[str], usable: np.ndarray, need: int, band: float
) -> np.ndarray:
    """Tell which pieces lie between two quantiles of their group's log perplexities.

    Args:
        logs: mean -log p of each piece; infinite for one that holds no sampled token.
        groups: the group of each.
        usable: which may be taken at all.
        need: pieces each group needs: the band is widened as far as that takes.
        band: share left out at each end.

    Returns:
        bool, shape of `logs`.
    """
    inside = np.zeros(len(logs), bool)
    names = np.array(groups)
    for name in dict.fromkeys(groups):
        members = np.flatnonzero((names == name) & usable & np.isfinite(logs))
        order = members[np.argsort(logs[members], kind="stable")]
        spare = max(0, len(order) - need)
        cut = min(int(band * len(order)), spare // 2)
        inside[order[cut : len(order) - cut]] = True
    return inside


def pack(
    ids: Tensor, tags: Sequence[str], picked: Sequence[int], per_row: int, length: int, seed: int
) -> tuple[Tensor, tuple[str, ...]]:
    """Join pieces of one dimension into rows, and shuffle the rows.

    Args:
        ids: token ids of all pieces, (pieces, size).
        tags: the dimension of each picked piece.
        picked: their places in `ids`; a multiple of `per_row` of each dimension.
        per_row: pieces a row.
        length: tokens a row; what the last piece has beyond is cut.
        seed: decides which pieces share a row and the order of the rows.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple[Tensor, str]] = []
    for name in dict.fromkeys(tags):
        held = [place for place, tag in zip(picked, tags, strict=True) if tag == name]
        held = [held[i] for i in rng.permutation(len(held))]
        for at in range(0, len(held), per_row):
            rows.append((ids[held[at : at + per_row]].flatten()[:length], name))
    order = rng.permutation(len(rows)).tolist()
    return torch.stack([rows[i][0] for i in order]), tuple(rows[i][1] for i in order)


def _turned(openers: Sequence[Sequence[int]], number: int, seed: int) -> list[Sequence[int]]:
    """Return a dimension's openers in the order piece `number` takes them.

    Pieces go through seeded permutations, so that every opener begins as many as any other.
    """
    count = len(openers)
    order = np.random.default_rng([seed, number // count]).permutation(count)
    at = number % count
    return [openers[i] for i in [*order[at:], *order[:at]]]


def _in_turn(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the numbers of so many pieces a dimension, in turn: a stop leaves some of each."""
    return [(d, j) for j in range(max(counts.values())) for d in counts if j < counts[d]]


def _enough(
    more: Callable[[Mapping[str, int], int], Written],
    names: Sequence[str],
    pool: int,
    quota: int,
    repeats: float,
    accept: Any,
) -> tuple[Written, list[str], np.ndarray, np.ndarray]:
    """Write pieces, and others in place of what cannot be used.

    A piece that loops is passed over for another; where none better is written in `ROUNDS`, what
    repeats least is taken.

    Args:
        more: writes so many pieces of some dimensions, in turn, in a numbered round.
        pool: pieces of each dimension to begin with.
        quota: usable pieces that each needs.
        repeats, accept: as for `igsp`.

    Returns:
        The pieces, the dimension of each, the share of its 4-grams that repeat (infinite for what
        is refused or empty), and whether it is to be used.

    Raises:
        InputError: a dimension has too few after `ROUNDS`, looping or not.
    """
    parts: list[Written] = []
    groups: list[str] = []
    shares = np.zeros(0)
    missing = dict.fromkeys(names, pool)
    for number in range(ROUNDS):
        parts.append(part := more(missing, number))
        groups += [name for name, _ in _in_turn(missing)]
        taken = np.ones(len(part.ids), bool) if accept is None else np.asarray(accept(part.ids))
        taken = taken & part.sampled.any(1).numpy()
        found = np.where(taken, row_aggregation(part.ids.numpy(), ORDER), np.inf)
        shares = np.concatenate([shares, found])
        places = {name: np.flatnonzero(np.array(groups) == name) for name in names}
        lack = {name: quota - int((shares[own] <= repeats).sum()) for name, own in places.items()}
        missing = {name: count for name, count in lack.items() if count > 0}
        if not missing:
            break
    usable = shares <= repeats
    for name in missing:
        own = shares[places[name]]
        least = np.argsort(own, kind="stable")[:quota]
        if not np.isfinite(own[least]).all():
            raise InputError(
                f"{quota} pieces of {name} are needed, and of {len(own)} written only "
                f"{np.isfinite(own).sum()} can be used: the model recites the suite (--leakage off "
                "to use such text) or writes nothing (other --openers)"
            )
        usable[places[name][least]] = True
    return Written.joined(parts), groups, shares, usable


def _logs(written: Written, dimensions: int) -> list[float]:
    """Return the token-weighted mean -log p of each dimension's pieces, which come in turn."""
    values = []
    for d in range(dimensions):
        own = written.sampled[d::dimensions]
        values.append(float(written.nll[d::dimensions][own].double().mean()))
    return values


def _perplexities(logs: Mapping[str, float]) -> dict[str, float]:
    return {name: round(math.exp(value), 4) for name, value in logs.items()}


def _shown(objective: Objective) -> dict[str, Any]:
    return {
        "J": objective.J,
        "aggregation_4": objective.aggregation_4,
        "perplexity": objective.perplexity,
    }
