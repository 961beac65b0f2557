"""What rounding embeddings and output head loses, a byte, beside what the blocks lose.

    python benchmarks/embeddings.py --data DIR [--model builtin:smollm2-135m]

Mean KL to the dense model on WikiText-2 (raw test, 16 windows of 512 tokens): the output head alone
at so many bits, solved on what it sees and just rounded; the embeddings where they are apart; and
ECQ of the blocks alone. DIR as for quality.py.
"""

from __future__ import annotations

import argparse
import datetime
from typing import Any

import torch
from common import commit, data_file, machine

from calmix import open_model, prune
from calmix.calibration.build import build
from calmix.models.blocks import outer_layers
from calmix.pruning.engine import round_rows
from calmix.pruning.gram import Gram
from calmix.sources.local import LocalFile
from calmix.sources.mixes import parse_mix

RATES = 6, 5, 4.5, 4, 3.5, 3


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    options = parser.parse_args()
    dense, opened = open_model(options.model), open_model(options.model)
    model, torch_dense = opened.model, dense.model
    wikitext = data_file(options.data, "general/wikitext2_raw-test.jsonl")
    text = "".join(one.text for one in LocalFile(type="file", path=wikitext).read())
    held = dense.tokenizer(text[:400_000], return_tensors="pt")["input_ids"][0]
    held = held[: 16 * 512].view(16, 512)
    drawn = build(parse_mix("uniform:encyclopedia,python-stdlib,books"), dense, rows=32, length=512)

    head, *embedded = outer_layers(model).values()
    seen = Gram(head.shape[1], head.device)
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, x: seen.add(x[0]))
    for row in drawn.ids:
        model(row[None])
    hook.remove()
    plain = torch.eye(head.shape[1])
    told = [("head, solved", head, seen.matrix()), ("head, rounded", head, plain)]
    told += [("embeddings", weight, plain) for weight in embedded]
    print(f"{options.model}, {machine()}, {commit()}, {datetime.date.today()}")
    print("| what | " + " | ".join(f"{bits} bits" for bits in RATES) + " |")
    print("|---" * (len(RATES) + 1) + "|")
    for name, weight, gram in told:
        own, lost = weight.clone(), []
        for bits in RATES:
            weight.data.copy_(round_rows(own, gram, bits)[0])
            lost.append(divergence(torch_dense, model, held))
        weight.data.copy_(own)
        print(f"| {name}, {own.numel() / 1e6:.0f} M | {row_of(lost)}", flush=True)
    blocks = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and ".layers." in n)
    lost = []
    for bits in RATES:
        opened = open_model(options.model)
        prune(opened, drawn, bits=bits)
        lost.append(divergence(torch_dense, opened.model, held))
    print(f"| blocks, {blocks / 1e6:.0f} M | {row_of(lost)}", flush=True)


@torch.inference_mode()
def divergence(dense: Any, model: Any, ids: torch.Tensor) -> float:
    """Return the mean KL(dense || model) of the next token, in nats."""
    total = 0.0
    for row in ids:
        p, q = (one(row[None]).logits.float().log_softmax(-1) for one in (dense, model))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(ids)


def row_of(lost: list[float]) -> str:
    """Return values as the end of a table's row."""
    return " | ".join(f"{value:.4f}" for value in lost) + " |"


if __name__ == "__main__":
    main()
