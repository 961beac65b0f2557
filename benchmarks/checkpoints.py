"""calmix beside other quantisers on the same rows: KL to the dense model, and right answers.

    python benchmarks/checkpoints.py [--rivals llmcompressor=PYTHON gptqmodel=PYTHON ...]
        [--model builtin:smollm2-135m] [--bits 4 3] [--group 64] [--rows 64]
        [--ways calmix rtn llmcompressor ...] [--files q4_k_m q2_k_s] [--answers --quick]

The model is a twin (twins.py): the file it came from leaves no grid. All ways quantise the matrices
of the blocks on the same calibration rows, to symmetric levels with a scale for each group:

    calmix          our `gptq` with its default statistics
    asymmetric      the same with zero points
    plain           the same with the papers' statistics
    rtn             rounding to the scales of llm-compressor's default observer
    llmcompressor, gptqmodel, autoround
                    these tools, each under an interpreter that has it (--rivals), their checkpoints
                    opened by calmix

`--files` are schemes of AutoRound for whole GGUF files. Beside each of its files are ours in as
many bytes, by calmix and by llama.cpp's rounding: the types of llama.cpp's recipe of that name,
and for calmix those that lose least (`ggml,bits=...`). Bits are those of all tensors. `--folders`
adds checkpoints and files made from the twin before. Printed is KL(dense || quantised) in nats per
token as in gguf_types.py, with --answers right answers of the suite `abilities`, which runs
programs, and wall-clock seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, machine, run_rival
from gguf import GGUFReader
from gguf_types import cells, held_out
from keep_more import MIX
from tokens import asked, right_cells
from twins import make_twin

from calmix.calibration.resolving import resolve
from calmix.evaluation.distance import distance, reference
from calmix.models.blocks import find_blocks
from calmix.models.opening import forget, open_model
from calmix.pruning.allocation import allocate, file_bytes, file_weights
from calmix.pruning.engine import prune
from calmix.pruning.patterns import Recipe

SOLVED: dict[str, dict[str, Any]] = {
    "calmix": {},
    "asymmetric": {"symmetric": False},
    "plain": {"statistics": "plain"},
}
OURS = (*SOLVED, "rtn")


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Return a matrix with scales of the largest magnitudes, as compressed-tensors' observer."""
    parts = weight.unflatten(1, (-1, group))
    scale = (parts.abs().amax(-1, keepdim=True).float() / (2**bits - 1) * 2).to(weight.dtype)
    levels = (parts / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return torch.where(scale == 0, 0, levels * scale).flatten(1)


class Table:
    """The rows printed, each of a model beside the dense one."""

    def __init__(self, options: argparse.Namespace, opened: Any) -> None:
        texts = held_out(opened, options.data, options.held_out, options.length)
        self.opened, self.options = opened, options
        self.dense = reference(opened, texts)
        self.answers = asked(opened, options.quick) if options.answers else None
        columns = ["bits", "way", "KL", "interval", "top-1", *texts]
        if self.answers:
            columns += ["right", "by ability, %", "lost", "gained", "same, %"]
        print(f"\n| {' | '.join([*columns, 'seconds'])} |")
        print("|---|" + "---|" * len(columns), flush=True)

    def row(self, bits: object, way: str, model: Any, seconds: float) -> None:
        # A file has a head of its own.
        result = cells(distance(model, self.dense, dense=lambda: self.opened))
        line = f"| {bits} | {way} | {result} | "
        if self.answers:
            line += right_cells(self.answers, asked(model, self.options.quick))
        print(f"{line}{seconds:.0f} |", flush=True)


def bits_of(file: Path) -> float:
    """Return the bits per weight of all tensors of a GGUF file."""
    tensors = GGUFReader(file).tensors
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rivals", nargs="*", default=[], metavar="TOOL=PYTHON")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=8, help="rows of each held-out text")
    parser.add_argument("--data", help="the data folder")
    parser.add_argument("--ways", nargs="*", help="all by default")
    parser.add_argument("--files", nargs="*", default=[], help="schemes of AutoRound: q4_k_m")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--folders", type=Path, nargs="*", default=[])
    parser.add_argument("--answers", action="store_true", help="count right answers")
    parser.add_argument("--quick", action="store_true", help="of the quick slice alone")
    options = parser.parse_args()
    rivals = dict(one.split("=", 1) for one in options.rivals)
    ways = [*OURS, *rivals] if options.ways is None else options.ways
    if missing := [way for way in ways if way not in OURS and way not in rivals]:
        parser.error(f"--rivals {missing[0]}=PYTHON names an interpreter that has it")
    print(
        f"{machine()}, commit {commit()}; {' '.join(f'{k}={v}' for k, v in vars(options).items())}"
    )
    dense, opened = open_model(options.model, device="cpu"), open_model(options.model, device="cpu")
    make_twin(dense.model)
    make_twin(opened.model)
    ids = resolve(MIX, dense, rows=options.rows, length=options.length).ids
    table = Table(options, dense)
    model, blocks = opened.model, find_blocks(opened.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def ours(bits: object, way: str, **how: Any) -> None:
        model.load_state_dict(before)
        began = time.perf_counter()
        prune(model, ids, **how)
        table.row(bits, way, opened, time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as place:
        twin = Path(place) / "twin"
        dense.model.save_pretrained(twin)
        dense.tokenizer.save_pretrained(twin)
        for bits in options.bits:
            for way in ways:
                if way in SOLVED:
                    ours(bits, way, method=f"gptq,group={options.group}", bits=bits, **SOLVED[way])
                    continue
                if way == "rtn":
                    model.load_state_dict(before)
                    for layer in blocks.layers:
                        weight = layer.view()
                        weight.copy_(round_to_nearest(weight.clone(), bits, options.group))
                    table.row(bits, way, opened, 0)
                    continue
                out = Path(place) / f"{way}-{bits}"
                how = {"model": twin, "bits": bits, "group": options.group, "output": out}
                if way == "llmcompressor":
                    how |= {"method": "gptq", "dtype": "bfloat16", "packed": 1}
                if way == "autoround":
                    how["iterations"] = options.iterations
                made = run_rival(rivals[way], ids, tool=way, **how)
                table.row(bits, f"{way} {made['version']}", open_model(out), made["seconds"])
                forget(out)
        for scheme in options.files:
            out = Path(place) / scheme
            how = {"model": twin, "scheme": f"gguf:{scheme}", "output": out}
            how["iterations"] = options.iterations
            made = run_rival(rivals["autoround"], ids, tool="autoround", **how)
            [file] = out.rglob("*.gguf")
            size = bits_of(file)
            name = f"autoround {made['version']}, {scheme}"
            table.row(f"{size:.3f}", name, open_model(file), made["seconds"])
            forget(file)
            recipe = Recipe(scheme.upper()).types(model, blocks)
            own = f"{8 * file_bytes(model, recipe) / file_weights(model):.3f}"
            ours(own, f"llama.cpp, {scheme}", method="llama", pattern=recipe)
            ours(own, f"calmix, {scheme}", method="ggml", pattern=recipe)
            model.load_state_dict(before)
            types = allocate(model, ids, f"{size:.3f} bits", method="ggml")
            ours(f"{size:.3f}", "calmix, as many bytes", method="ggml", pattern=types)
        for folder in options.folders:
            table.row("-", folder.name, open_model(folder), 0)


if __name__ == "__main__":
    main()
