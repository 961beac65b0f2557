"""In which precision this machine multiplies matrices fast, and the switch that allows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def capabilities() -> Mapping[str, Any]:
    """Return by name which instructions this CPU has, as far as torch tells."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    older: Any = torch.cpu  # 2.9 tells of these alone
    return {
        "amx_bf16": older._is_amx_tile_supported(),
        "avx512_bf16": older._is_avx512_bf16_supported(),
    }


def fast_half_precision(dtype: torch.dtype) -> bool:
    """Tell whether this CPU multiplies matrices of `dtype` natively (float32 always does)."""
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        able = capabilities()
        return any(able.get(key, False) for key in ("amx_bf16", "avx512_bf16", "bf16"))
    return False


@contextmanager
def bfloat16_products(allowed: bool = True) -> Iterator[None]:
    """Let float32 products round their inputs to bfloat16 where the machine has units for it."""
    # One setting a backend: torch refuses to read what is for all of them once one differs.
    mkldnn: Any = torch.backends.mkldnn
    backends: dict[Any, str] = {mkldnn.matmul: "bf16", torch.backends.cuda.matmul: "tf32"}
    before = {backend: backend.fp32_precision for backend in backends}
    for backend, fast in backends.items():
        backend.fp32_precision = fast if allowed else "ieee"
    try:
        yield
    finally:
        for backend, precision in before.items():
            backend.fp32_precision = precision
