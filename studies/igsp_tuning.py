"""What in self-written text does the work: variants by their distance to the dense model.

    python studies/igsp_tuning.py self-written self-written,repeats=1 --seeds 101,102 --log LOG

Every variant writes its text and prunes the builtin model with it by SparseGPT to 60 %; what is
noted is KL(dense || pruned) of the held-out texts, by dimension, in nats a token: it needs no
labels, orders calibration sets as the benchmarks do (docs/results.md), and takes a fifth of their
time. A variant is anything `calmix.calibration_set` takes, or `mix-4` or `mix-8`. What the log
holds is not run again. Seeds are none of those the comparison reports (100 and up). Printed are
means over the seeds, and the mean difference to the first variant with its half range.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calmix import calibration_set, open_model, prune
from calmix.calibration.distance_texts import texts
from calmix.evaluation.distance import distance, reference
from calmix.pruning.patterns import Unstructured

MIXES = {
    "mix-4": "uniform:encyclopedia,stories,python-stdlib,math-solutions",
    "mix-8": "uniform:encyclopedia,books,stories,procedures,"
    "python-stdlib,code-compiled,math-solutions,word-problems",
}
TEXT_ROWS = 16  # of held-out text, a dimension


def table(rows: list[dict[str, Any]], variants: list[str], seeds: list[int]) -> None:
    found = {(row["variant"], row["seed"]): row["kl"] for row in rows}
    heads = list(rows[0]["kl"])
    print(f"\n{'KL':<44}" + "".join(f"{head[:11]:>12}" for head in heads) + "   total - first")
    for name in variants:
        own = [seed for seed in seeds if (name, seed) in found]
        means = [np.mean([found[name, seed][head] for seed in own]) for head in heads]
        apart = [found[name, s]["total"] - found[variants[0], s]["total"] for s in own]
        half = (max(apart) - min(apart)) / 2
        values = "".join(f"{mean:12.3f}" for mean in means)
        print(f"{name[-44:]:<44}{values}   {np.mean(apart):+.3f} ±{half:.3f} ({len(own)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=["self-written", "mix-8", "igsp", "sgs"])
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", default="101")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--log", type=Path, default=Path("out/igsp-tuning.jsonl"))
    args = parser.parse_args()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    opened = open_model(args.model, device=args.device)
    weights = {name: value.clone() for name, value in opened.model.state_dict().items()}
    held_out = texts(opened, rows=TEXT_ROWS)
    dense = reference(opened, held_out, cache=True)
    rows = []
    if args.log.is_file():
        rows = [json.loads(line) for line in args.log.read_text(encoding="utf-8").splitlines()]
    done = {(row["variant"], row["seed"]) for row in rows}
    for seed in seeds:
        for text in args.variants:
            if (text, seed) in done:
                continue
            began = time.perf_counter()
            size = {"rows": args.rows, "length": args.length, "seed": seed}
            made = calibration_set(MIXES.get(text, text), opened, **size)
            drawn = time.perf_counter()
            prune(opened.model, made.ids, method="sparsegpt", pattern=Unstructured(0.6))
            found = distance(opened, dense)
            with torch.inference_mode():
                for key, value in opened.model.state_dict().items():
                    value.copy_(weights[key])
            row = {
                "variant": text,
                "seed": seed,
                "kl": {key: one["kl_mean"] for key, one in found["dimensions"].items()}
                | {"total": found["total"]["kl_mean"]},
                "top1": found["total"]["top1"],
                "seconds": [round(drawn - began), round(time.perf_counter() - drawn)],
                "manifest": {
                    key: made.manifest.get(key)
                    for key in ("aggregation_4", "temperature", "perplexity", "pieces", "J")
                },
            }
            rows.append(row)
            with args.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            shown = "  ".join(f"{key} {value:.3f}" for key, value in row["kl"].items())
            print(f"{text} seed {seed}: {shown}  {row['seconds']} s", flush=True)
    table(rows, args.variants, seeds)


if __name__ == "__main__":
    main()
