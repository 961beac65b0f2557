"""Read models in GGUF files with transformers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from calmix.models.gguf_header import Header, read_header
from calmix.models.loading import loading, too_large


def gguf_reader(file: Path | str) -> Any:
    """Return gguf's reader of a file, over a plain array: it takes thousands of slices, which are
    slow of numpy's memory maps."""
    import numpy as np
    from gguf.gguf_reader import GGUFReader

    mapped = np.memmap
    with patch.object(np, "memmap", lambda *how, **more: mapped(*how, **more).view(np.ndarray)):
        try:
            return GGUFReader(file)
        except ValueError as error:
            if "cannot reshape" not in str(error):
                raise
            raise ValueError("it is cut off: fetch it again") from error


def tensor_bytes(reader: Any) -> int:
    """Return the bytes of a GGUF file's tensors, without its metadata."""
    return sum(int(tensor.n_bytes) for tensor in reader.tensors)


@contextlib.contextmanager
def reading_gguf() -> Iterator[None]:
    """Make transformers read a GGUF file once, not three times, map names once, not per module,
    and show no progress bar beside ours."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    read, names = functools.cache(gguf_reader), functools.cache(gguf.get_tensor_name_map)
    with (
        patch.object(gguf, "GGUFReader", lambda path: read(str(path))),
        patch.object(gguf, "get_tensor_name_map", names),
        patch.object(reading, "tqdm", lambda tensors, **_: tensors, create=True),
    ):
        yield


def gguf_names(model: Any, name: str, architecture: str) -> tuple[Any, dict[str, str]]:
    """Return transformers' processor of GGUF tensors, and the tensors' names in a model, by those
    in GGUF; ModelError, which names the model by `name`, if there are none."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=model.config.to_dict())
    with loading(f"transformers cannot read {name} from GGUF"), reading_gguf():
        return processor, dict(get_gguf_hf_weights_map(model, processor))


def read_gguf(file: Path, dtype: torch.dtype) -> Any:
    """Return the model in a GGUF file; ValueError if it lacks weights, as a part of a split file.

    transformers would prefer a file of the same name in the current folder, and leave weights of
    some architectures packed where it finds a kernel for them.
    """
    import transformers

    how: dict[str, Any] = {"gguf_file": str(file.resolve()), "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # not in older versions
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, output_loading_info=True, **how
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"it lacks {len(missing)} weights, first '{missing[0]}': merge the parts of a split "
            "file with llama-gguf-split --merge"
        )
    return model


def check_gguf(file: Path) -> Header:
    """Return the header of a GGUF file; ValueError if it is damaged, or sizes in it are beyond its
    weights."""
    header = read_header(file)
    widest = [max(shape, default=0) for shape in header.shapes.values()]
    for name, value in header.values.items():
        if excess := too_large({name.rpartition(".")[2]: value}, widest):
            raise ValueError(f"its header has {excess}, more than its weights allow")
    return header


def gguf_dtype(file: Path) -> torch.dtype:
    """Return the type of a float32 or float16 file, and bfloat16 for a quantised one; ValueError if
    the file cannot be read as it is meant."""
    header = check_gguf(file)
    if _scales_positions(header):
        raise ValueError(
            "it scales rotary positions, which transformers ignores in GGUF: name the "
            "original checkpoint (and export with --like this file)"
        )
    kinds = {0: torch.float32, 1: torch.float16}
    return kinds.get(header.values.get("general.file_type", -1), torch.bfloat16)


def _scales_positions(header: Header) -> bool:
    """Whether a GGUF file scales rotary positions in a way that transformers ignores."""
    rope = {
        name.partition(".rope.")[2]: value
        for name, value in header.values.items()
        if ".rope." in name
    }
    factor = rope.get("scaling.factor", rope.get("scale_linear", 1))
    return "gpt-oss.rope.scaling.type" not in header.values and (
        (factor != 1 and rope.get("scaling.type") != "none")
        or any(name.startswith(("rope_freqs", "rope_factors")) for name in header.shapes)
    )
