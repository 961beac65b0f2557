"""Check this machine and installation: what works, what is missing, and how to fix it.

Nothing is downloaded, and no file is left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from calmix import assets, manifest
from calmix.errors import DiskError
from calmix.files import cache_dir, check_writable, existing, size_text
from calmix.machine import cores, host_memory
from calmix.precision import capabilities

FAST = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "bf16", "sve", "neon")


@dataclass(frozen=True)
class Check:
    """One finding: what was checked, its state, details, and what to do about it.

    Pruning works only if every `core` check is `ok`.
    """

    name: str
    state: str  # ok, missing or failed
    found: str
    advice: str | None = None
    core: bool = False


def examine(tick: Callable[[str], None]) -> list[Check]:
    """Run all checks, which takes some seconds; `tick` receives the name of each."""
    checks: list[Check] = []
    for check in (versions, machine, cache, archives, engine):
        tick(check.__name__)
        checks += check()
    return checks


def versions() -> Iterator[Check]:
    """Report the versions that decide results; `pip check` compares them with those required."""
    for name, version in manifest.versions().items():
        yield Check(name, "ok", version, core=True)


def machine() -> Iterator[Check]:
    """Report the cores, memory and device that this process may use."""
    able = capabilities()
    kinds = [name for name in FAST if able.get(name)]
    total, usable = os.cpu_count() or 1, cores()
    limited = f" of the machine's {total}" if usable < total else ""
    fast = f" ({', '.join(kinds)})" if kinds else ""
    yield Check("cores", "ok", f"{usable}{limited}{fast}, {torch.get_num_threads()} threads")
    free, whole = host_memory()
    small = "less than 2 GB free: stop other programs or pass --max-memory"
    free_text = f"{_size(free)} free of {_size(whole)}"
    yield Check("memory", "ok", free_text, small if free < 2 << 30 else None)
    device = torch.accelerator.current_accelerator(check_available=True)
    name = "cpu, no accelerator"
    if device is not None:
        name = f"{torch.accelerator.device_count()} x {device.type}"
        with contextlib.suppress(RuntimeError, AssertionError, AttributeError):
            name += f" ({torch.get_device_module(device).get_device_name()})"
    yield Check("device", "ok", name)


def cache() -> Iterator[Check]:
    """Check that the cache can be written and has room."""
    folder = cache_dir()
    try:
        check_writable(folder / "models")
    except DiskError as error:
        advice = "set CALMIX_CACHE to a writable folder; builtin models need it"
        yield Check("cache", "missing", str(error), advice)
        return
    free = shutil.disk_usage(existing(folder / "models")).free
    small = "free some space: models and sources are kept there"
    yield Check("cache", "ok", f"{folder}, {_size(free)} free", small if free < 1 << 30 else None)


def archives() -> Iterator[Check]:
    """Check the data archives by hash."""
    for asset in assets.assets().values():
        try:
            state = asset.state
        except OSError as error:
            state = f"unreadable ({error.strerror})"
        advice = f"calmix doctor assets {asset.name} --install ({size_text(asset.size)})"
        outcome = ("ok", "hash matches") if state == "ok" else ("missing", state, advice)
        yield Check(f"asset {asset.name}", *outcome)


def engine() -> Iterator[Check]:
    """Prune a tiny random model to half its weights, twice with the same result."""
    began = time.perf_counter()
    try:
        wrong = _self_test("0.5") or _self_test("2:4")
    except Exception as error:  # any exception of a broken installation is a finding
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if wrong:
        advice = "reinstall torch and calmix; if that does not help, file an issue with this line"
        yield Check("engine", "failed", wrong, advice, core=True)
    else:
        took = time.perf_counter() - began
        outcome = f"two patterns prune correctly and reproducibly ({took:.1f} s)"
        yield Check("engine", "ok", outcome, core=True)


def _self_test(pattern: str) -> str:
    """Prune a tiny model to half its weights, and return what went wrong; empty if nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from calmix.pruning.engine import prune

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    results = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).to(device).eval().requires_grad_(False)
            ids = torch.randint(256, (8, 64))
        report = prune(model, ids, pattern=pattern)
        weights = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
        zeros, total = sum(int((p == 0).sum()) for p in weights), sum(p.numel() for p in weights)
        if abs(zeros / total - 0.5) > 0.001 or zeros != report.pruned:
            return f"{pattern}: {zeros} of {total} weights are zero, not half"
        if not all(value.isfinite().all() for value in (*weights, model(ids.to(device)).logits)):
            return f"{pattern}: weights or logits are not finite"
        results.append(torch.cat([p.flatten() for p in weights]))
    return "" if torch.equal(*results) else f"{pattern}: two runs of one request differ"


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
