"""Tokens a second the builtin model writes, and what of that is the model's forward alone.

    python benchmarks/generation.py --rows 64 --length 171

The forward alone is the same number of steps of the same batch, fed fixed tokens, without logits
processors: what sampling, penalties, seeds a row and bookkeeping cost is the difference.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import torch

from calmix import open_model
from calmix.calibration.selfgen.writing import WriteRequest, write
from calmix.models.caches import cache_argument


def forward_alone(model: torch.nn.Module, rows: int, length: int) -> float:
    """Return the seconds that `length - 1` decoding steps of `rows` rows take."""
    from transformers import DynamicCache

    token = torch.ones((rows, 1), dtype=torch.long, device=next(model.parameters()).device)
    cache, name = DynamicCache(config=model.config), cache_argument(model)
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(length - 1):
            model(token, use_cache=True, **{name: cache})
    return time.perf_counter() - start


def main() -> None:
    """Print a line a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 128])
    parser.add_argument("--length", type=int, default=171)
    args = parser.parse_args()
    opened = open_model(args.model)
    for rows in args.rows:
        length = args.length if rows > 1 else min(args.length, 64)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["CALMIX_CACHE"] = cache  # nothing is read from earlier runs
            for name, warmth, how in (
                ("ancestral", 1.0, {}),
                ("with a repetition penalty", 0.9, {"repetition_penalty": 1.1}),
                ("SGS's settings", 0.6, {"top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2}),
            ):
                request = WriteRequest([[[9906]]] * rows, length, [warmth] * rows, seed=0, **how)
                start = time.perf_counter()
                write(opened, request, batch=rows)
                seconds = time.perf_counter() - start
                print(
                    f"{rows} rows of {length}, {name}: {rows * length / seconds:.0f} tokens/s",
                    flush=True,
                )
        seconds = forward_alone(opened.model, rows, length)
        print(f"{rows} rows of {length}, forward alone: {rows * length / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
