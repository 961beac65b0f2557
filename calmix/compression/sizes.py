"""The bits a weight may take for a model's files to have a size."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from calmix.deploy.pack import compressed_share
from calmix.errors import InputError
from calmix.models import resolve_model
from calmix.models.shards import read_header, weight_bytes, weight_files
from calmix.options import Target, parse_share
from calmix.pruning.budget import parse_memory
from calmix.study.estimate import Timed

LEAST, MOST = 1.0, 8.0  # bits a weight that a size may come to
SPARE = 0.01  # of a file: headers, and what an entropy coder is from its bound
SAMPLE = 2**22  # words of what stays as it is that are compressed to see how small it gets


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


def bits_for(asked: Target) -> float:
    """Return the bits a weight of the blocks' matrices with which a pack has the size asked for.

    Raises:
        InputError: no number of bits that a method takes comes to that size.
    """
    folder = resolve_model(asked.model)
    dense = weight_bytes(folder)
    wanted = parse_size(asked.size or "", dense)
    held = timed(asked.model, asked.device, asked.trust_remote_code)
    matrices = sum(p.numel() for p in held.blocks.blocks.parameters() if p.ndim > 1)
    places = [(folder / name, place) for name in weight_files(folder)
              for place in read_header(folder / name).values()]  # fmt: skip
    width = max(place.dtype.itemsize for _, place in places)
    outside = dense - width * matrices
    path, largest = max(places, key=lambda one: one[1].size)  # the embedding, of most models
    words = np.fromfile(path, f"u{largest.dtype.itemsize}", SAMPLE, offset=largest.start)
    rest = outside * compressed_share(words, largest.dtype)

    def size(bits: float) -> float:
        return (1 + SPARE) * (rest + bits / 8 * matrices)

    bits = 8 * (wanted / (1 + SPARE) - rest) / matrices
    if not LEAST <= bits <= MOST:
        raise InputError(
            f"--size {asked.size} is out of reach: packed, {asked.model} has from "
            f"{size(LEAST) / 1e3:,.0f} to {size(MOST) / 1e3:,.0f} kB (dense: {dense / 1e3:,.0f} kB)"
        )
    return round(bits - 0.005, 2)
