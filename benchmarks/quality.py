"""WikiText-2 perplexity after one-shot pruning, calmix beside llm-compressor on the same ids.

    python benchmarks/quality.py --data DIR [--rival PYTHON]

DIR holds general/c4-train.jsonl (calibration) and general/wikitext2_raw-test.jsonl (the official
raw test text). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, data_file, machine, run_rival

from calmix.calibration.build import build
from calmix.evaluation.likelihood import row_nll
from calmix.models.loading import to_continue
from calmix.models.opening import OpenModel, open_model
from calmix.pruning.engine import prune
from calmix.pruning.patterns import Unstructured
from calmix.sources.local import LocalFile
from calmix.sources.mixes import parse_mix

WINDOW = 2048  # tokens
MODEL = "builtin:smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--rival", help="interpreter with llmcompressor")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--engines", nargs="+", default=["dense", "calmix", "rival"])
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--rival-methods", nargs="+", default=["sparsegpt"])
    options = parser.parse_args()
    c4 = data_file(options.data, "general/c4-train.jsonl")
    wikitext = data_file(options.data, "general/wikitext2_raw-test.jsonl")
    text = "".join(d.text for d in LocalFile(type="file", path=wikitext).read())

    dense = open_model(MODEL)
    drawn = build(
        parse_mix(str(c4)), dense, rows=options.rows, length=options.length, packing="window"
    )
    print(f"{datetime.date.today()}, commit {commit()}, {machine()}")
    print(
        f"{MODEL}, calibration {drawn.rows} x {drawn.length} windows of C4 (seed 0), "
        f"perplexity of WikiText-2 raw test at context {WINDOW}\n"
    )
    print("| engine | method | sparsity | perplexity | seconds to prune |")
    print("|---|---|---|---|---|", flush=True)
    if "dense" in options.engines:
        print(f"| dense | | | {perplexity(dense, text):.2f} | |", flush=True)
    for sparsity in options.sparsities:
        for method in options.methods if "calmix" in options.engines else ():
            opened = open_model(MODEL)
            report = prune(
                opened.model,
                drawn.ids if method != "magnitude" else None,
                method=method,
                pattern=Unstructured(sparsity),
            )
            value = perplexity(opened, text)
            row("calmix", method, sparsity, value, report.seconds["total"])
        for method in options.rival_methods if "rival" in options.engines else ():
            if not options.rival:
                raise SystemExit("name the interpreter that has llmcompressor: --rival PYTHON")
            with tempfile.TemporaryDirectory() as folder:
                told = run_rival(
                    options.rival,
                    drawn.ids,
                    model=dense.folder,
                    method=method,
                    sparsity=sparsity,
                    dtype="bfloat16",
                    output=folder,
                )
                value = perplexity(open_model(folder), text)
            row(f"llm-compressor {told['version']}", method, sparsity, value, told["seconds"])


def perplexity(opened: OpenModel, text: str) -> float:
    """Return the perplexity of a text in windows that do not overlap, as the SparseGPT and Wanda
    papers measure it; a last partial window is left out."""
    ids = torch.tensor(to_continue(opened.tokenizer, [text])[0], dtype=torch.int64)
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return math.exp(row_nll(opened.model, windows).double().mean())


def row(engine: str, method: str, sparsity: float, value: float, seconds: float) -> None:
    """Print one line of the table at once: a run takes many minutes."""
    print(f"| {engine} | {method} | {sparsity:g} | {value:.2f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
