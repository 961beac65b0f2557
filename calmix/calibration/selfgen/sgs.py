"""SGS (arXiv 2410.17711, after its public code): text sampled from the first tokens of documents.

The first two token ids of each seed text (the begin token counts, where the tokenizer puts one)
are continued with top-k 50, top-p 0.95, temperature 0.6 and repetition penalty 1.2. The fifth of
the texts with the highest perplexity under the same model is dropped. The others are joined,
tokenised again, and random windows of the row's length are drawn.

Ours: a row that the model ends goes on with the next seed text, and texts are joined by a blank
line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from calmix.calibration.build import begin_token
from calmix.calibration.selfgen.made import Made, Write
from calmix.calibration.selfgen.sampling import Sampling
from calmix.calibration.selfgen.writing import Request, Written
from calmix.errors import InputError

NAME = "sgs"
PREFIX = 2
DEFAULTS: dict[str, Any] = {
    "temperature": 0.6,
    "top_k": 50,
    "top_p": 0.95,
    "repetition_penalty": 1.2,
    "drop": 0.2,
    "seeds": "encyclopedia",
}


def check(*, drop: float, **_: Any) -> None:
    """Raise InputError for a share to drop that leaves nothing."""
    if not 0 <= drop < 1:
        raise InputError(f"--drop {drop} is not in [0, 1)")


def sgs(
    write: Write,
    tokenizer: Any,
    *,
    rows: int,
    length: int,
    seed: int,
    documents: Sequence[str],
    drop: float,
    accept: Callable[[list[int]], bool] | None = None,
    **sampling: Any,
) -> Made:
    """Write rows of `length` tokens from the first tokens of documents, in the order given.

    Args:
        documents: seed texts.
        drop: share of the texts to drop, those of the highest perplexity.
        accept: called with the ids of each text; false drops it, too.
        **sampling: the fields of `Sampling`.

    Raises:
        InputError: a setting is out of range, or no document has a token.
    """
    check(drop=drop)
    begin = begin_token(tokenizer)
    head = [] if begin is None else [begin]
    prefixes = [
        (head + ids)[:PREFIX]
        for ids in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        if ids
    ]
    if not prefixes:
        raise InputError("sgs has no seed text: every document of its source becomes no token")
    count = math.ceil(rows / (1 - drop))
    openers = [
        [prefixes[(row + turn * count) % len(prefixes)] for turn in range(len(prefixes))][:length]
        for row in range(count)
    ]
    written = write(Request(openers, length, Sampling(**sampling), seed), "writing")
    texts, log_perplexity = split_texts(written)
    if accept is not None:
        usable = [i for i, text in enumerate(texts) if accept(text)]
        texts, log_perplexity = [texts[i] for i in usable], [log_perplexity[i] for i in usable]
    keep = keep_likely(log_perplexity, drop)
    kept = tokenizer.batch_decode([texts[i] for i in keep], skip_special_tokens=True)
    stream = tokenizer("\n\n".join(kept), add_special_tokens=False, verbose=False)["input_ids"]
    body = length - len(head)
    if len(stream) < body:
        raise InputError(
            f"the texts sgs kept hold {len(stream)} tokens, too few for one row of {length}: ask "
            "for more rows"
        )
    starts = np.random.default_rng(seed).integers(0, len(stream) - body + 1, rows)
    ids = torch.tensor([head + stream[start : start + body] for start in starts.tolist()])
    record = {
        "texts": len(texts),
        "kept": len(keep),
        "tokens": len(stream),
        "perplexity": {
            "written": math.exp(float(np.mean(log_perplexity))),
            "kept": math.exp(float(np.mean([log_perplexity[i] for i in keep]))),
        },
    }
    return Made(ids, (NAME,) * rows, record)


def split_texts(written: Written) -> tuple[list[list[int]], list[float]]:
    """Return the texts of all rows, and of each its mean -log p over sampled tokens.

    A text of which no token was sampled (a row ended in its opener) is left out.
    """
    texts: list[list[int]] = []
    means: list[float] = []
    for row in range(len(written.ids)):
        for number in range(int(written.text[row, -1]) + 1):
            held = written.text[row] == number
            own = held & written.sampled[row]
            if own.any():
                texts.append(written.ids[row][held].tolist())
                means.append(float(written.nll[row][own].double().mean()))
    return texts, means


def keep_likely(log_perplexity: Sequence[float], drop: float) -> list[int]:
    """Return the indices, ascending, of the texts left when the least likely are dropped."""
    order = np.argsort(np.asarray(log_perplexity), kind="stable")
    return sorted(order[: len(order) - int(drop * len(order))].tolist())
