"""Self-Cal (arXiv 2410.17170): text sampled from the begin token alone.

Where the begin token is one of chats, as in SmolLM2-Instruct, text starts at the document
separator instead (`calmix.calibration.selfgen.openers.start_token`; which token that is, is ours).

The temperature goes from t_0 to t_1 over the first n tokens, t_i = t_0 + i/n (t_1 - t_0), then
stays; nothing is cut from the distribution. The paper's t_0, t_1 and n were not available to us:
the default is plain ancestral sampling (t_1 = 1, no schedule). Where the model ends its text, a
new one begins in the same row; that, too, is ours.
"""

from __future__ import annotations

import math
from typing import Any

from calmix.calibration.selfgen.made import Made, Write
from calmix.calibration.selfgen.openers import Start, start_token
from calmix.calibration.selfgen.sampling import Sampling
from calmix.calibration.selfgen.writing import Request
from calmix.errors import InputError

NAME = "self-cal"
DEFAULTS: dict[str, Any] = {
    "start": "auto",
    "temperature": 1.0,
    "start_temperature": None,
    "ramp": 0,
}
MISSING = {
    "auto": "neither a begin token nor a document separator",
    "bos": "no begin token",
    "separator": "no document separator",
}


def self_cal(
    write: Write,
    tokenizer: Any,
    *,
    rows: int,
    length: int,
    seed: int,
    start: Start,
    temperature: float,
    start_temperature: float | None,
    ramp: int,
) -> Made:
    """Write `rows` rows of `length` tokens from a start token alone.

    Args:
        start: which one, as for `start_token`.
        temperature, start_temperature, ramp: as in `Sampling`.

    Raises:
        InputError: the tokenizer has no such token, or a temperature is not positive.
    """
    begin = start_token(tokenizer, start)
    if begin is None:
        raise InputError(
            f"self-cal has nothing to start from: this model's tokenizer has {MISSING[start]}"
        )
    sampling = Sampling(temperature, start_temperature, ramp)
    written = write(Request([[[begin]]] * rows, length, sampling, seed), "writing")
    texts = int((written.text[:, -1] + 1).sum())
    perplexity = math.exp(float(written.nll[written.sampled].double().mean()))
    record = {"start_token": begin, "texts": texts, "perplexity": perplexity}
    return Made(written.ids, (NAME,) * rows, record)
