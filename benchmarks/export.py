"""What an export to OpenVINO gains, dense and pruned: bytes, tokens per second, distance.

    python benchmarks/export.py [--model builtin:smollm2-135m] [--sparsity 0 0.6 0.8]

One thread. Speeds are tokens per second of processor time, best of the repeats: `prompt` is 256
tokens at once, `writing` 32 more, one at a time, both of one row. `rate` is OpenVINO's
CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=0.5, from which share of zeros on it may keep weights
compressed. Zeros are the smallest weights (magnitude): time does not depend on which they are.
KL, in nats a token of text, is to the same model in transformers in float32; `zstd` is the export's
weights after zstandard -3.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import openvino
import torch
import zstandard
from common import commit, machine
from torch import Tensor

import calmix
from calmix.deploy.openvino import Session, export

PROMPT, WRITTEN = 256, 32


def speeds(repeats: int, step: Callable[[Tensor], object], reset: Callable[[], None], ids: Tensor):
    """Return the best tokens per second of processor time: of the prompt, and of writing."""
    found = []
    for _ in range(repeats + 1):  # the first warms up
        reset()
        began = time.process_time()
        step(ids[:, :PROMPT])
        between = time.process_time()
        for at in range(WRITTEN):
            step(ids[:, PROMPT + at : PROMPT + at + 1])
        ended = time.process_time()
        found.append((PROMPT / (between - began), WRITTEN / (ended - between)))
    return tuple(max(column) for column in zip(*found[1:], strict=True))


class InTransformers:
    """The model as transformers runs it, with its cache."""

    def __init__(self, model) -> None:
        self.model, self.cache = model, None

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        made = self.model(ids, past_key_values=self.cache, use_cache=True)
        self.cache = made.past_key_values
        return made.logits

    def reset(self) -> None:
        self.cache = None


def divergence(before: Tensor, after: Tensor) -> float:
    before, after = before.log_softmax(-1), after.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.6, 0.8])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, openvino {openvino.__version__}, commit {commit()}")
    print(f"{'zeros':>5} {'engine':<22} {'MB':>5} {'zstd':>5} {'prompt':>7} {'writing':>7}     KL")
    one = {"INFERENCE_NUM_THREADS": 1}
    rate = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5}
    for sparsity in options.sparsity:
        opened = calmix.open_model(options.model)
        drawn = calmix.resolve("encyclopedia", opened, rows=2, length=PROMPT + WRITTEN)
        if sparsity:
            calmix.prune(
                opened.model, drawn.ids, method="magnitude", pattern=calmix.Unstructured(sparsity)
            )
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            opened.model.save_pretrained(folder)
            opened.tokenizer.save_pretrained(folder)
            engines: list[tuple[str, Path, object]] = [
                (f"transformers {opened.model.dtype}".replace("torch.", ""), folder,
                 InTransformers(opened.model))
            ]  # fmt: skip
            for weights in ("int8",) if sparsity else ("own", "int8"):
                export(str(folder), Path(place) / weights, weights=weights)
                session = Session(Path(place) / weights, **one)
                engines.append((f"OpenVINO {weights}", Path(place) / weights, session))
            session = Session(Path(place) / "int8", **one, **rate)
            engines.append(("OpenVINO int8, rate", Path(place) / "int8", session))
            exact = calmix.open_model(str(folder), dtype="float32").model
            with torch.no_grad():
                wanted = exact(drawn.ids).logits
            for name, where, engine in engines:
                files = [*where.glob("*.bin"), *where.glob("*.safetensors")]
                held = sum(file.stat().st_size for file in files)
                coder = zstandard.ZstdCompressor(level=3)
                small = sum(len(coder.compress(file.read_bytes())) for file in files)
                engine.reset()
                kl = divergence(wanted, engine(drawn.ids).float())
                prompt, writing = speeds(options.repeats, engine, engine.reset, drawn.ids[:1])
                print(
                    f"{sparsity:>5.0%} {name:<22} {held / 1e6:>5.0f} {small / 1e6:>5.0f} "
                    f"{prompt:>7.0f} {writing:>7.1f} {kl:>6.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
