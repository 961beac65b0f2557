"""The bits a weight may take for a model's files to have a size."""

from __future__ import annotations

import re
from functools import lru_cache

from calmix.errors import InputError
from calmix.models import resolve_model
from calmix.models.shards import read_header, weight_bytes, weight_files
from calmix.options import MOST_EMBEDDING, Target, parse_share
from calmix.pruning.budget import parse_memory
from calmix.study.estimate import Timed

LEAST, MOST = 1.0, 8.0  # bits a weight that a size may come to
SPARE = 0.015  # of a file: headers, and what an entropy coder is from its bound


def parse_size(text: str, dense: int) -> float:
    """Return bytes from `120MB`, or from a share of the dense ones: `0.25`, `25%`."""
    if re.search(r"[a-zA-Z]", text):
        return parse_memory(text, "--size")
    try:
        share = parse_share(text)
    except ValueError as error:
        raise InputError(f"--size: {error}") from None
    if not 0 < share < 1:
        raise InputError(f"--size {text}: a share of the dense size is between 0 and 1")
    return float(share * dense)


@lru_cache(maxsize=1)
def timed(name: str, device: str, trust_remote_code: bool) -> Timed:
    """Return a model from its configuration alone, made once for the size and the estimate."""
    return Timed(name, "auto", device, trust_remote_code)


def embedding_bits(bits: float) -> float:
    """Return the bits of embeddings and head beside blocks of so many.

    With as many a byte saves as much error there as in the blocks (benchmarks/embeddings.py).
    """
    return min(max(bits, 2.0), MOST_EMBEDDING)


def bits_for(asked: Target) -> float:
    """Return the bits a weight of the blocks' matrices with which a pack has the size asked for."""
    folder = resolve_model(asked.model)
    dense = weight_bytes(folder)
    wanted = parse_size(asked.size or "", dense)
    held = timed(asked.model, asked.device, asked.trust_remote_code)
    matrices = sum(p.numel() for p in held.blocks.blocks.parameters() if p.ndim > 1)
    places = (place for name in weight_files(folder)
              for place in read_header(folder / name).values())  # fmt: skip
    width = max(places, key=lambda place: place.size).dtype.itemsize
    rest = dense - width * (matrices + held.outer_weights)

    def size(bits: float) -> float:
        outer = embedding_bits(bits) * held.outer_weights
        return (1 + SPARE) * (rest + (bits * matrices + outer) / 8)

    rates = [number / 100 for number in range(round(100 * LEAST), round(100 * MOST) + 1)]
    if not size(LEAST) <= wanted <= size(MOST):
        raise InputError(
            f"--size {asked.size} is out of reach: packed, {asked.model} has from "
            f"{size(LEAST) / 1e3:,.0f} to {size(MOST) / 1e3:,.0f} kB (dense: {dense / 1e3:,.0f} kB)"
        )
    return max(bits for bits in rates if size(bits) <= wanted)
