"""GGML's own quantiser, from the package libggml-python."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.errors import InputError
from calmix.machine import cores
from calmix.pruning.solvers.ggml_types import TYPES, Encoded

PACKAGE = "libggml-python"


@cache
def load_library() -> Any:
    """Return the library; InputError if it is not installed."""
    try:
        import libggml
    except ImportError as error:
        raise InputError(f"types IQ2 and IQ3 need GGML's library: pip install {PACKAGE}") from error
    folder = Path(libggml.__file__).parent
    files = [file for end in ("so", "dylib", "dll") for file in folder.rglob(f"*ggml-base.{end}")]
    library = ctypes.CDLL(str(files[0]))
    number, place = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, place, place, *[number] * 3, place]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantise(weight: Tensor, importance: Tensor | None = None, *, name: str) -> Encoded:
    """Return a matrix as llama.cpp quantises it.

    Args:
        weight: (rows, columns) of any float type.
        importance: (columns,), weight of a squared error in each column; without it, a plain
            search that takes much longer in `IQ` types.
        name: of a type in `TYPES`.
    """
    from gguf import GGMLQuantizationType

    kind, code, library = TYPES[name], GGMLQuantizationType[name].value, load_library()
    rows = weight.float().cpu().contiguous()
    weights = None if importance is None else importance.float().cpu().contiguous()
    data = torch.empty(len(rows), rows.shape[1] // kind.size * kind.bytes, dtype=torch.uint8)
    library.ggml_quantize_init(code)

    def part(some: Tensor, out: Tensor) -> None:
        place = None if weights is None else weights.data_ptr()
        library.ggml_quantize_chunk(code, some.data_ptr(), out.data_ptr(), 0, *some.shape, place)

    count = min(cores(), len(rows))
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(part, rows.tensor_split(count), data.tensor_split(count)))
    return Encoded(name, data.to(weight.device))
