"""Tokens per second and memory of a GGUF file in llama.cpp, beside the dense model in transformers.

Each runs in a process of its own, one row, on all cores: the prompt at once, then one token at a
time. Memory is what stays resident, mapped files included.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calmix.errors import ModelError
from calmix.machine import cores

BINDING = "llama_cpp_py_sync"
INSTALL = "pip install llama-cpp-py-sync"
PROMPT_TOKENS, WRITTEN_TOKENS = 256, 64  # tokens
CHILD = """
import json, sys, time
import psutil
kind, place, threads, prompt, written, *how = json.loads(sys.argv[1])
if kind == "transformers":
    import torch
    import calmix
    torch.set_num_threads(threads)
    model = calmix.open_model(place, trust_remote_code=how[0]).model
    ids = torch.arange(prompt + written)[None] % 1000 + 100
    ids %= model.get_input_embeddings().weight.shape[0]
    @torch.inference_mode()
    def run(count):
        last = model(ids[:, :prompt], use_cache=True, logits_to_keep=1)
        for at in range(prompt + 1, prompt + count):
            last = model(ids[:, at : at + 1], use_cache=True, past_key_values=last.past_key_values)
else:
    model = __import__(kind).Llama(place, n_ctx=2 * prompt, n_threads=threads, verbose=False)
    ids = [(at % 1000 + 100) % model.n_vocab for at in range(prompt + written)]
    def run(count):
        model._clear_context_state()
        model._eval_tokens(ids[:prompt], 0)
        for at in range(prompt + 1, prompt + count):
            model._eval_tokens(ids[at : at + 1], at - 1)
def timed(count):
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start
run(1)
first = min(timed(1) for _ in range(2))
rest = max(timed(written) - first, 1e-9)
print(json.dumps({"prompt": prompt / first, "writing": (written - 1) / rest,
                  "memory": psutil.Process().memory_info().rss}))
"""


def engine() -> bool:
    """Whether a module that runs GGUF files is installed."""
    return find_spec(BINDING) is not None


def measure(file: Path, dense: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return tokens per second for a `prompt` and for `writing`, and bytes of `memory`, of a GGUF
    file (`llama.cpp`) and of the dense model (`transformers`)."""
    runs = (BINDING, str(file)), ("transformers", dense, trust_remote_code)
    return {
        "threads": cores(),
        "llama.cpp": _measured(*runs[0]),
        "transformers": _measured(*runs[1]),
    }


def _measured(kind: str, place: str, *how: bool) -> dict[str, float]:
    words = json.dumps([kind, place, cores(), PROMPT_TOKENS, WRITTEN_TOKENS, *how])
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, words], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        *_, last = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        raise ModelError(f"{place} does not run in {kind}: {last}")
    measured: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return measured
