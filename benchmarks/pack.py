"""How small a pack is, beside plain zstandard, and how fast it is made and read.

    python benchmarks/pack.py MODEL [--repeats 3]

MODEL is a model's folder, best a quantised one. Bytes are shares of its weight files; speeds count
those dense bytes, best of the repeats: a second on all cores, and a second of processor time, which
says more on a busy machine. Unpacking writes to the disk and checks the hashes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zstandard

from calmix.deploy.pack import load, pack, unpack
from calmix.machine import cores
from calmix.models.folder import weight_files


def best(repeats: int, work: Callable[[], object]) -> list[float]:
    """Return seconds, and seconds of processor time."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter(), time.process_time()
        work()
        seconds.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return [min(some) for some in zip(*seconds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--levels", type=int, nargs="*", default=[3, 19], help="of plain zstandard")
    options = parser.parse_args()
    files = [options.model / name for name in weight_files(options.model)]
    dense = sum(file.stat().st_size for file in files)
    print(f"{dense / 1e6:.0f} MB of weights, {cores()} cores, torch {torch.__version__}")
    for level in options.levels:
        coder = zstandard.ZstdCompressor(level=level, threads=cores())
        size = sum(len(coder.compress(file.read_bytes())) for file in files)
        print(f"zstd -{level:<3} whole {size / dense:.3f}")
    with tempfile.TemporaryDirectory(dir=options.model.parent) as folder:
        packed, back = Path(folder) / "pack", Path(folder) / "back"
        made = pack(options.model, packed)
        before, after = made.levels
        levels = f", quantised tensors {after / before:.3f}" if before else ""
        print(f"pack      whole {made.packed / dense:.3f}{levels}")
        for name, work in {
            "packed": lambda: pack(options.model, packed, overwrite=True),
            "unpacked": lambda: unpack(packed, back, overwrite=True),
            "loaded": lambda: load(packed),
        }.items():
            wall, own = (dense / 1e6 / seconds for seconds in best(options.repeats, work))
            print(f"{name:<9} {wall:.0f} MB/s, {own:.0f} MB a second of processor time")


if __name__ == "__main__":
    main()
