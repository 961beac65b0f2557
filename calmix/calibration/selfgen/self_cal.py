"""Self-Cal (arXiv 2410.17170): text sampled from the begin token alone.

The temperature goes from t_0 to t_1 over the first n tokens, t_i = t_0 + i/n (t_1 - t_0), then
stays; nothing is cut from the distribution. The paper's t_0, t_1 and n were not available to us:
the default is plain ancestral sampling (t_1 = 1, no schedule). Where the model ends its text, a
new one begins in the same row; that, too, is ours.
"""

from __future__ import annotations

import math
from typing import Any

from calmix.calibration.selfgen.made import Made, Write
from calmix.calibration.selfgen.sampling import Sampling
from calmix.calibration.selfgen.writing import Request
from calmix.errors import InputError

NAME = "self-cal"
DEFAULTS: dict[str, Any] = {"temperature": 1.0, "start_temperature": None, "ramp": 0}


def self_cal(
    write: Write,
    tokenizer: Any,
    *,
    rows: int,
    length: int,
    seed: int,
    temperature: float,
    start_temperature: float | None,
    ramp: int,
) -> Made:
    """Write `rows` rows of `length` tokens from the begin token.

    Raises:
        InputError: the tokenizer has no begin token, or a temperature is not positive.
    """
    begin = tokenizer.bos_token_id
    if begin is None:
        raise InputError(
            "self-cal starts from the begin-of-text token, which this model's tokenizer does not "
            "have: use igsp or sgs"
        )
    sampling = Sampling(temperature, start_temperature, ramp)
    written = write(Request([[[begin]]] * rows, length, sampling, seed), "writing")
    texts = int((written.text[:, -1] + 1).sum())
    perplexity = math.exp(float(written.nll[written.sampled].double().mean()))
    return Made(written.ids, (NAME,) * rows, {"texts": texts, "perplexity": perplexity})
