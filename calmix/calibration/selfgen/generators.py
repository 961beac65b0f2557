"""Generators of calibration text that the model writes itself.

A generator determines how texts begin, how they are sampled, and which of them are used. To add
one, add a class to `GENERATORS`. A text of several turns is a row whose openers are used in turn.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from calmix.calibration.build import checks, hashed, rows_per_source
from calmix.calibration.dataset import SET_KIND, CalibrationSet
from calmix.calibration.leakage import Guard
from calmix.calibration.selfgen.ngrams import Ids, aggregation, ngram_keys, row_aggregation
from calmix.calibration.selfgen.prompts import (
    Openers,
    beginnings,
    chat_turns,
    load_prompts,
    start_token,
)
from calmix.calibration.selfgen.writing import WriteRequest, Written, write
from calmix.calibration.tokenizer import begin_token, token_ids
from calmix.errors import InputError
from calmix.evaluation.greedy import prompt
from calmix.evaluation.prompts import Ask, calibration_hash, halves, read_prompts
from calmix.files import sha256_json
from calmix.models.opening import OpenModel
from calmix.options import Options
from calmix.precision import dtype_name
from calmix.sources.mixes import MIXES
from calmix.sources.registry import Source, get_source

ROUNDS = 8  # of writing; the later ones replace unusable text
ANOTHER = 1_000_003  # between the seeds of two rounds
SPARE_PIECES = 2  # pieces written beyond those needed, at least: another round costs as many steps
MOST_OPENERS = 64  # most openers of a piece
PREFIX, PREFIXES = 2, 1000  # tokens of a seed text, and number of seed texts
NGRAM_ORDER = 4  # of the n-grams whose repetition counts
SWAP_SWEEPS = 20  # of swaps in a selection; a few are enough in practice
EPSILON = 1e-12  # smallest decrease of J for a swap, so that rounding cannot cause a cycle
CHAT = 0.25  # share of chats in text by a model with a chat template, and in default mixes

Own = Mapping[str, Source]
Values = NDArray[np.float64]
# Token ids (pieces, length), and for each piece its dimension, and the negative log-likelihood (in
# nats) and number of its sampled tokens.
Pieces = Sequence[NDArray[Any]]


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Piece = Annotated[int | None, Field(ge=8)]
Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class Generator(Options):
    """How a model writes its own calibration text.

    Text is sampled at `temperature` from the `top_k` likeliest tokens and those of a total
    probability of `top_p`, with a `repetition_penalty`, in texts of about `piece` tokens, of which
    at most the share `repeats` is repeated 4-grams. At most `batch` rows are written at once.
    """

    name: ClassVar[str]
    usual: ClassVar[float | None] = None  # temperature; without one that of the prompts

    temperature: Positive | None = None
    top_k: Count | None = None
    top_p: Fraction | None = None
    repetition_penalty: Positive = 1.0
    piece: Piece = None
    repeats: Fraction = 1.0
    batch: Count | None = None

    @property
    def sources(self) -> list[str]:
        """The names of the sources of text that the generator reads."""
        return []

    def beginnings(self, tokenizer: Any, seed: int, own: Own) -> dict[str, Openers]:
        """Return the beginnings of texts, by dimension: those of prompts."""
        return beginnings(getattr(self, "prompts", None), tokenizer)

    def in_turn(self, openers: Openers, number: int, size: int, seed: int) -> Openers:
        """Return the openers that piece `number` of `size` tokens uses in turn.

        They leave the model half of the piece, or are the shortest. Pieces go through seeded
        permutations, so that every opener begins equally many.
        """
        usable = [one for one in openers if len(one) <= size // 2] or [min(openers, key=len)]
        order = np.random.default_rng([seed, number // len(usable)]).permutation(len(usable))
        turns = range(number, number + min(len(usable), MOST_OPENERS))
        return [usable[order[turn % len(usable)]] for turn in turns]

    def choose(self, pieces: Pieces, quota: Mapping[str, int]) -> list[int]:
        """Return the indices of `quota[d]` pieces of each dimension d."""
        return [i for d, count in quota.items() for i in np.flatnonzero(pieces[1] == d)[:count]]

    def record(self) -> dict[str, Any]:
        """Return the settings for a manifest, with prompts as a hash."""
        settings = self.model_dump(mode="json")
        if "prompts" in settings or settings.get("start") == "prompts":
            prompts = load_prompts(getattr(self, "prompts", None)).items()
            settings["prompts_sha256"] = sha256_json(
                {name: one.model_dump(exclude_none=True) for name, one in prompts}
            )
        return settings


class SelfWritten(Generator):
    """Pieces of about 170 tokens after prompts of several dimensions, without those that loop.

    Pieces are shorter than rows because a long text drifts away from its prompt's dimension. If the
    model has a chat template, the share `chat` of the rows are conversations. `prompts` is a YAML
    file of prompts by dimension.
    """

    name = "self-written"

    piece: Piece = 170
    repeats: Fraction = 0.2
    prompts: Path | None = None
    chat: Annotated[float, Field(ge=0, lt=1)] = CHAT


class Igsp(SelfWritten):
    """IGSP, our reconstruction (arXiv 2606.03328): write more pieces than needed, and select those
    with few repeated 4-grams and with balanced perplexity across dimensions. `candidates` texts are
    written per text used."""

    name = "igsp"

    chat: Annotated[float, Field(ge=0, lt=1)] = 0.0
    candidates: Factor = 3.0

    def choose(self, pieces: Pieces, quota: Mapping[str, int]) -> list[int]:
        ids, groups, nll, tokens = pieces
        return select_rows(ids, groups, nll, tokens, quota)


class Chat(Generator):
    """Conversations in the model's chat template. The model also writes the user's turns, after the
    template alone (as in Magpie, arXiv 2406.08464)."""

    name = "chat"
    usual = 0.8

    temperature: Positive | None = 0.8
    piece: Piece = 256
    repeats: Fraction = 0.3

    def beginnings(self, tokenizer: Any, seed: int, own: Own) -> dict[str, Openers]:
        turns = chat_turns(tokenizer)
        if turns is None:
            raise InputError(
                "chat has nothing to start from: this model has no chat template with a token "
                "before the first turn and one that ends every turn"
            )
        return {self.name: turns}

    def in_turn(self, openers: Openers, number: int, size: int, seed: int) -> Openers:
        return [openers[0], *openers[1:] * (MOST_OPENERS // len(openers))]


class Prompted(Generator):
    """The model's answers to a user's own prompts: those of the `file` that `prompts.halves` leaves
    to calibrate with, in its chat template if it has one. A piece begins with all of the template,
    later prompts are turns of the same chat. Prompts may resemble each other, so repeated 4-grams
    do not count."""

    name = "prompts"
    usual = 0.8

    temperature: Positive | None = 0.8
    piece: Piece = 256
    file: Path | None = None

    def half(self) -> list[Ask]:
        """Return the prompts to calibrate with."""
        if self.file is None:
            raise InputError("the source 'prompts' needs a file of prompts: --prompts mine.jsonl")
        return halves(read_prompts(self.file))[0]

    def beginnings(self, tokenizer: Any, seed: int, own: Own) -> dict[str, Openers]:
        first, _, later = chat_turns(tokenizer) or ([], [], [])
        whole, turns = Openers(), Openers()
        for one in self.half():
            tools = {"tools": [*one.tools]} if one.tools else {}
            ids = prompt(tokenizer, one.messages, f"{one.plain}\n\n", 0, (), **tools).ids
            whole.append(ids)
            turns.append(later + ids[len(first) :] if ids[: len(first)] == first else ids)
        return {self.name: whole + turns}

    def in_turn(self, openers: Openers, number: int, size: int, seed: int) -> Openers:
        half = len(openers) // 2
        head, *rest = super().in_turn(openers[half:], number, size, seed)
        return [openers[openers.index(head, half) - half], *rest]

    def record(self) -> dict[str, Any]:
        half = self.half()
        return super().record() | {"count": len(half), "prompts_sha256": calibration_hash(half)}


class SelfCal(Generator):
    """Self-Cal (arXiv 2410.17170): rows sampled at temperature 1 after the prompts of several
    dimensions or, with another `start`, after one token as in the paper. The paper's temperatures
    were not available to us."""

    name = "self-cal"
    usual = 1.0

    start: Literal["prompts", "auto", "bos", "separator"] = "prompts"

    def beginnings(self, tokenizer: Any, seed: int, own: Own) -> dict[str, Openers]:
        if self.start == "prompts":
            return super().beginnings(tokenizer, seed, own)
        begin = start_token(tokenizer, self.start)
        if begin is None:
            what = "begin token or document separator" if self.start == "auto" else self.start
            raise InputError(
                f"self-cal has nothing to start from: this model's tokenizer has no {what}"
            )
        return {self.name: [[begin]]}


class Sgs(Generator):
    """SGS (arXiv 2410.17711, after its public code): continuations of the first two tokens of
    documents (`seeds`, a source or named mix), without the fifth of the rows with the highest
    perplexity. Our changes: rows are dropped, not texts that are joined and cut again, and each
    dimension of a mix gets rows."""

    name = "sgs"
    usual = 1.0

    temperature: Positive | None = 0.6
    top_k: Count | None = 50
    top_p: Fraction | None = 0.95
    repetition_penalty: Positive = 1.2
    seeds: str = "mix-clean"
    candidates: Factor = 1.25

    @property
    def sources(self) -> list[str]:
        return list(MIXES.get(self.seeds, [self.seeds]))

    def beginnings(self, tokenizer: Any, seed: int, own: Own) -> dict[str, Openers]:
        head = begin_token(tokenizer)
        starts: dict[str, Openers] = {}
        for source in [get_source(name, own) for name in self.sources]:
            documents = list(source.documents())
            order = np.random.default_rng(seed).permutation(len(documents))
            order = order[: PREFIXES // len(self.sources)]
            texts = token_ids(tokenizer, [documents[i].text for i in order])
            kind = source.dimension if len(self.sources) > 1 else self.name
            starts.setdefault(kind, []).extend((head + ids)[:PREFIX] for ids in texts if ids)
        if not all(starts.values()):
            raise InputError("sgs has no seed text: no document of its source has a token")
        return starts

    def choose(self, pieces: Pieces, quota: Mapping[str, int]) -> list[int]:
        _, groups, nll, tokens = pieces
        order = np.argsort(nll / tokens, kind="stable")
        return [i for kind, count in quota.items() for i in order[groups[order] == kind][:count]]


GENERATORS: dict[str, type[Generator]] = {
    one.name: one for one in (SelfWritten, Igsp, Chat, Prompted, SelfCal, Sgs)
}


def generate(
    generator: Generator,
    opened: OpenModel,
    *,
    rows: int,
    length: int,
    seed: int,
    guard: Guard | None,
    own: Own,
    writing: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> CalibrationSet:
    """Make a calibration set of text that the dense model writes itself, in full rows. The seed
    determines every token; in half precision the batch size does too (see `write`).

    `guard`, `own`, `writing` and `note` are as for `calmix.calibration_set`.
    """
    per_row = max(1, round(length / generator.piece)) if generator.piece else 1
    size = math.ceil(length / per_row)
    starts = generator.beginnings(opened.tokenizer, seed, own)
    shares = rows_per_source(dict.fromkeys(starts, 1 / len(starts)), rows)
    quota = {name: per_row * count for name, count in shares.items() if count}
    temperature = generator.temperature or generator.usual
    known = {} if temperature else load_prompts(getattr(generator, "prompts", None))
    temps = {name: temperature or known[name].temperature for name in quota}

    def write_pieces(pairs: list[tuple[str, int]], number: int) -> Written:
        """Write a piece for each pair of a dimension and a number."""
        at = seed + 1 + number * ANOTHER
        request = WriteRequest(
            [generator.in_turn(starts[d], j, size, at) for d, j in pairs],
            size,
            [temps[d] for d, _ in pairs],
            at,
            generator.top_k,
            generator.top_p,
            generator.repetition_penalty,
        )
        label = "writing replacements for unusable text" if number else "writing"
        progress = writing and partial(writing, label)
        return write(opened, request, batch=generator.batch, progress=progress, note=note)

    pieces, counted = _usable_pieces(generator, write_pieces, quota, guard, opened.tokenizer)
    places = generator.choose(pieces, quota)
    written, groups, nll, tokens = selection = [part[places] for part in pieces]
    rng = np.random.default_rng(seed)  # pieces of one dimension are joined to rows
    joined = np.concatenate([rng.permutation(np.flatnonzero(groups == name)) for name in quota])
    order = rng.permutation(rows)
    ids = written[joined].reshape(rows, -1)[order, :length]
    manifest = {
        "kind": SET_KIND,
        "generated": generator.name,
        "settings": generator.record(),
        "model": {
            "name": opened.name,
            "sha256": opened.fingerprint,
            "dtype": dtype_name(opened.model.dtype),
            "device": opened.model.device.type,
        },
        "own": {n: own[n].model_dump(mode="json") for n in generator.sources if n in own},
        "rows": rows,
        "length": length,
        "seed": seed,
        **checks(opened, guard),
        "aggregation_4": aggregation(ids, NGRAM_ORDER),
        "temperature": temps,
        "perplexity": {
            name: math.exp(nll[groups == name].sum() / tokens[groups == name].sum())
            for name in quota
        },
        "J": objective(*selection),
        "pieces": {"tokens": size, "a_row": per_row} | counted,
    }
    names = groups[joined[::per_row]][order].tolist()
    return hashed(torch.from_numpy(ids), names, manifest)


def _usable_pieces(
    generator: Generator,
    write_pieces: Callable[[list[tuple[str, int]], int], Written],
    quota: Mapping[str, int],
    guard: Guard | None,
    tokenizer: Any,
) -> tuple[Pieces, dict[str, int]]:
    """Write pieces, and replacements for those that the guard refuses or that loop.

    If there are not enough after `ROUNDS`, those that repeat least are used.
    """
    parts: list[Written] = []
    groups = np.zeros(0, str)
    shares = np.zeros(0)  # of repeated 4-grams; infinite for refused or empty pieces
    factor = getattr(generator, "candidates", 1.0)
    missing = Counter({name: math.ceil(factor * count) for name, count in quota.items()})
    for number in range(ROUNDS):
        due = missing
        if generator.repeats < 1 and factor == 1:
            due = Counter({name: n + max(SPARE_PIECES, n // 8) for name, n in missing.items()})
        # Dimensions alternate, so that a stop leaves some of each.
        pairs = [(d, j) for j in range(max(due.values())) for d in due if j < due[d]]
        part = write_pieces(pairs, number)
        accepted = part.sampled.any(1).numpy()
        if guard is not None:
            texts = tokenizer.batch_decode(part.ids, skip_special_tokens=True)
            accepted &= [guard.passes(generator.name, str(i), text) for i, text in enumerate(texts)]
        parts.append(part)
        groups = np.append(groups, [d for d, _ in pairs])
        repeated = np.where(accepted, row_aggregation(part.ids.numpy(), NGRAM_ORDER), np.inf)
        shares = np.append(shares, repeated)
        usable = shares <= generator.repeats
        missing = Counter(quota) - Counter(groups[usable].tolist())
        if not missing:
            break
    for name in missing:
        group = np.flatnonzero(groups == name)
        least = group[np.argsort(shares[group], kind="stable")[: quota[name]]]
        if not np.isfinite(shares[least]).all():
            raise InputError(
                f"{quota[name]} pieces of {name} are needed, but only "
                f"{np.isfinite(shares[group]).sum()} of {len(group)} can be used: the model "
                "recites the suite (--leakage off allows that) or writes nothing (use other "
                "prompts)"
            )
        usable[least] = True
    written = Written(*map(torch.cat, zip(*parts, strict=True)))
    nll = torch.where(written.sampled, written.nll.double(), 0.0).sum(1).numpy()
    counted = {
        "written": len(groups),
        "refused": int(np.isinf(shares).sum()),
        "passed_over": int((np.isfinite(shares) & ~usable).sum()),
        "looping": sum(missing.values()),
    }
    pieces = written.ids.numpy(), groups, nll, written.sampled.sum(1).numpy()
    return [part[usable] for part in pieces], counted


def objective(ids: Ids, groups: NDArray[Any], nll: Values, tokens: NDArray[np.int64]) -> float:
    """Return J of a set S of rows; `nll` is each row's in nats, over its number of `tokens`.

    Our definition, from one sentence of the abstract of arXiv 2606.03328 (method section 6):

        J(S) = A4(S) + mean_d (log PPL_d(S) - mu(S))^2

    where A4 is 4-gram aggregation (1 - distinct / total), PPL_d the perplexity of S's texts of
    group d, token-weighted, and mu the mean of log PPL_d over the groups.
    """
    parts = [groups == name for name in np.unique(groups)]
    logs = [nll[part].sum() / tokens[part].sum() for part in parts]
    return aggregation(ids, NGRAM_ORDER) + float(np.var(logs))


def select_rows(
    ids: Ids,
    groups: NDArray[Any],
    nll: Values,
    tokens: NDArray[np.int64],
    quota: Mapping[str, int],
) -> list[int]:
    """Choose `quota[g]` rows of every group g, which has at least as many, so that J is small.

    First, the row that adds most distinct 4-grams is picked greedily: a monotone submodular cover,
    which has at least 1 - 1/e of the distinct 4-grams of the best set with one group, 1/2 with
    several. Then rows are swapped within a group while J falls. Pure and deterministic.
    """
    (keys,) = ngram_keys([ids], NGRAM_ORDER)
    gram, per_row = np.unique(keys, return_inverse=True)[1].ravel(), len(keys) // len(ids)
    starts = np.arange(len(ids) + 1) * per_row
    holds = sparse.csr_matrix((np.ones(len(gram), np.int32), gram, starts))
    holds.sum_duplicates()
    holds.data[:] = 1
    grams = np.split(holds.indices, holds.indptr[1:-1])
    counts = np.zeros(holds.shape[1], np.int32)  # how many chosen rows hold each 4-gram
    rows_of = {name: np.flatnonzero(groups == name) for name in quota}
    number = {name: at for at, name in enumerate(quota)}
    sums = np.zeros((2, len(quota)))  # nll and tokens of the chosen rows of each group
    inside = np.zeros(len(ids), bool)

    def move(row: int, sign: int) -> None:
        counts[grams[row]] += sign
        sums[:, number[groups[row]]] += sign * np.array([nll[row], tokens[row]])
        inside[row] = sign > 0

    chosen, left = list[int](), dict(quota)
    heap = [(-per_row, int(row)) for rows in rows_of.values() for row in rows]
    heapq.heapify(heap)
    while any(left.values()):
        bound, row = heapq.heappop(heap)
        if not left[groups[row]]:
            continue
        gain = int((counts[grams[row]] == 0).sum())
        if gain != -bound:  # gains never rise, so the greedy choice can be lazy
            heapq.heappush(heap, (-gain, row))
            continue
        move(row, 1)
        chosen.append(row)
        left[groups[row]] -= 1
    grams_of = {name: holds[rows] for name, rows in rows_of.items()}
    for _ in range(SWAP_SWEEPS):
        swapped = False
        for at, out in enumerate(chosen):
            rows, place = rows_of[groups[out]], number[groups[out]]
            move(out, -1)
            new = grams_of[groups[out]] @ (counts == 0).astype(np.int32)
            logs = np.tile(sums[0] / np.maximum(sums[1], 1), (len(rows), 1))
            logs[:, place] = (sums[0, place] + nll[rows]) / (sums[1, place] + tokens[rows])
            value = logs.var(1) - new / (len(chosen) * per_row)
            value[inside[rows]] = np.inf
            best = int(np.argmin(value))
            if value[best] < value[np.searchsorted(rows, out)] - EPSILON:
                chosen[at], swapped = int(rows[best]), True
            move(chosen[at], 1)
        if not swapped:
            break
    return chosen
