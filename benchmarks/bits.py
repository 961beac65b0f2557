"""Entropy-coded quantisation beside 3-bit GPTQ, our own and llm-compressor's, on the same ids.

    python benchmarks/bits.py --data DIR --rival PYTHON [--bits 2.8 3.25]

Of each model the bits a weight, the mean KL to the dense model on WikiText-2 (raw test, windows of
512 tokens), and how many matrices' outputs are wrong by less than the rival's: the relative squared
error on the calibration rows, with the dense model's inputs. DIR as for quality.py.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, data_file, machine, run_rival

from calmix import open_model, prune
from calmix.calibration import build, parse_mix
from calmix.sources.readers import LocalFile

MODEL = "builtin:smollm2-135m"


def matrices(model: Any) -> dict[str, torch.nn.Linear]:
    """Return the linear maps of the blocks by name."""
    return {
        name: one
        for name, one in model.named_modules()
        if ".layers." in name and isinstance(one, torch.nn.Linear)
    }


@torch.inference_mode()
def grams(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs' Gram matrix of every linear map."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.flatten(0, 1).float()
        found[name] = found.get(name, 0) + rows.T @ rows

    hooks = [
        one.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
        for name, one in matrices(model).items()
    ]
    for row in ids:
        model(row[None])
    for one in hooks:
        one.remove()
    return found


@torch.inference_mode()
def divergence(dense: Any, model: Any, ids: torch.Tensor) -> float:
    """Return the mean KL(dense || model) of the next token, in nats."""
    total = 0.0
    for row in ids:
        p, q = (one(row[None]).logits.float().log_softmax(-1) for one in (dense, model))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(ids)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--rival", required=True, help="interpreter with llmcompressor")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.8, 3.25])
    parser.add_argument("--group", type=int, default=64)
    options = parser.parse_args()
    dense = open_model(MODEL)
    c4 = str(data_file(options.data, "general/c4-train.jsonl"))
    drawn = build(parse_mix(c4), dense, rows=64, length=512, packing="window")
    wikitext = data_file(options.data, "general/wikitext2_raw-test.jsonl")
    text = "".join(one.text for one in LocalFile(type="file", path=wikitext).read())
    held = dense.tokenizer(text, return_tensors="pt")["input_ids"][0]
    held = held[: 64 * 512].view(64, 512)
    seen = grams(dense.model, drawn.ids)

    def errors(model: Any) -> dict[str, float]:
        whole, made = matrices(dense.model), {}
        for name, one in matrices(model).items():
            weight = whole[name].weight.float()
            lost, gram = one.weight.float() - weight, seen[name]
            made[name] = float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum())
        return made

    print(f"{datetime.date.today()}, commit {commit()}, {machine()}")
    print(f"{MODEL}, 64 x 512 windows of C4\n")
    print("| engine | bits a weight | KL, WikiText-2 | matrices with less error | seconds |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        told = run_rival(
            options.rival,
            drawn.ids,
            model=dense.folder,
            method="gptq",
            bits=3,
            group=options.group,
            dtype="float32",
            output=folder,
        )
        rival = open_model(folder).model
    beside, bits = errors(rival), 3 + 16 / options.group
    print(
        f"| llm-compressor {told['version']}, GPTQ | {bits:.2f} | "
        f"{divergence(dense.model, rival, held):.3f} | | {told['seconds']:.1f} |",
        flush=True,
    )
    for method, pattern, more in [
        ("gptq", "3 bits", {"group": options.group}),
        *(("ecq", f"{bits:g} bits", {}) for bits in options.bits),
    ]:
        opened = open_model(MODEL)
        report = prune(opened.model, drawn.ids, method=method, pattern=pattern, **more)
        own = errors(opened.model)
        less = sum(own[name] < beside[name] for name in own)
        print(
            f"| calmix {method} | {report.bits:.2f} | "
            f"{divergence(dense.model, opened.model, held):.3f} | {less} of {len(own)} | "
            f"{report.seconds['total']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
