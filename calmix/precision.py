"""The precisions in which this machine multiplies matrices fast, and its kernel settings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def capabilities() -> Mapping[str, Any]:
    """Return the CPU's instruction sets by name, as far as torch reports them."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    older: Any = torch.cpu  # torch 2.9 reports only these
    return {
        "amx_bf16": older._is_amx_tile_supported(),
        "avx512_bf16": older._is_avx512_bf16_supported(),
    }


def suited(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type to compute in for weights of `dtype`: float32 on a CPU without fast half
    precision."""
    able = capabilities()
    fast = any(able.get(key, False) for key in ("amx_bf16", "avx512_bf16", "bf16"))
    slow = device.type == "cpu" and not (fast and dtype == torch.bfloat16)
    return torch.float32 if slow else dtype


def narrower(stored: torch.dtype, memory: torch.dtype) -> torch.dtype:
    """Return the type to write a tensor in: that of the files it came from, if memory holds it in
    a wider one."""
    return stored if memory.itemsize > stored.itemsize else memory


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return a type's name as used in options and manifests: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def widest(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device; Apple's and some Intel GPUs lack float64."""
    lacks = device.type == "mps" or (
        device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64
    )
    return torch.float32 if lacks else torch.float64


@functools.cache
def _bfloat16_alone() -> bool:
    """Return whether this CPU has AVX-512 bfloat16 instructions but no matrix units (AMX)."""
    # oneDNN then rounds nothing even when allowed to: its float32 products are exact, and twice as
    # fast as MKL's, the default on AMD; bfloat16 products are twice as fast again.
    able = capabilities()
    return bool(able.get("avx512_bf16")) and not able.get("amx_bf16")


@contextmanager
def _set(precisions: Mapping[Any, str]) -> Iterator[None]:
    with ExitStack() as stack:
        for backend, precision in precisions.items():
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = precision
        yield


def bfloat16_products(allowed: bool = True) -> AbstractContextManager[None]:
    """Let float32 products round their inputs to bfloat16 where the hardware supports it."""
    # Set per backend: torch refuses to read the global setting once one backend differs.
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return _set({cpu: "bf16", cuda: "tf32"} if allowed else {cpu: "ieee", cuda: "ieee"})


def large_products() -> AbstractContextManager[None]:
    """Use the CPU's faster kernel for large float32 products; nothing is rounded."""
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return _set({cpu: "bf16"}) if _bfloat16_alone() else nullcontext()


def large_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `left @ right` of large float32 matrices, without rounding either."""
    with large_products():
        return torch.mm(left, right, out=out)


def rounded(matrix: Tensor) -> Tensor:
    """Return a float32 factor prepared for many calls of `rounded_product`."""
    alone = matrix.device.type == "cpu" and _bfloat16_alone()
    return matrix.bfloat16() if alone else matrix


def rounded_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` of a float32 matrix and one prepared by `rounded`. Factors may be
    rounded; the product is bfloat16 where only such products are fast."""
    if right.dtype == torch.bfloat16:
        return torch.mm(left.bfloat16(), right)
    with bfloat16_products():
        return torch.mm(left, right)


def add_rounded_product(
    add: Tensor, left: Tensor, right: Tensor, out: Tensor, scale: float = 1
) -> Tensor:
    """Write `scale * add` plus a `rounded_product` to `out`; all but `right` are float32."""
    if right.dtype == torch.bfloat16:
        return torch.add(rounded_product(left, right), add, alpha=scale, out=out)
    with bfloat16_products():
        return torch.addmm(add, left, right, beta=scale, out=out)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Use deterministic kernels on devices that also have others."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if device.type != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
