"""How IGSP's defaults were chosen: variants against each other on the quick slice.

Prints a line a variant: SparseGPT 60 % on the builtin model, retention on the quick slice of
suite `offline`, total and by dimension. The seeds are none of those the comparison reports
(100 and up), and the slice is not the whole suite it reports on.

    python studies/igsp_tuning.py --seeds 101,102 --log out/igsp-tuning.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from calmix import evaluate, open_model, prune, resolve
from calmix.calibration.selfgen.making import METHODS, generate
from calmix.pruning.patterns import Unstructured

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mix-4": ("uniform:encyclopedia,stories,python-stdlib,math-solutions", {}),
    "self-cal": ("self-cal", {}),
    "sgs": ("sgs", {}),
    "igsp": ("igsp", {}),
}


def variant(text: str) -> tuple[str, str, dict[str, Any]]:
    """Parse `igsp,temperature=0.8,...` into a label, a method and its settings."""
    if text in VARIANTS:
        return text, *VARIANTS[text]
    name, *pairs = text.split(",")
    settings = {}
    for pair in pairs:
        key, value = pair.split("=")
        settings["lambda_" if key == "lambda" else key] = (
            value if key in ("openers", "seeds", "start") else json.loads(value)
        )
    return text, name, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--seeds", default="101")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--log", type=Path, default=Path("out/igsp-tuning.jsonl"))
    args = parser.parse_args()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    opened = open_model(args.model)
    dense_weights = {name: value.clone() for name, value in opened.model.state_dict().items()}
    dense = evaluate(opened, quick=True, cache=True)
    for seed in map(int, args.seeds.split(",")):
        for text in args.variants:
            label, name, settings = variant(text)
            began = time.perf_counter()
            size = {"rows": args.rows, "length": args.length, "seed": seed}
            if name in METHODS:
                made = generate(name, opened, **size, **settings)
            else:
                made = resolve(name, opened, **size)
            drawn = time.perf_counter()
            prune(opened.model, made.ids, method="sparsegpt", pattern=Unstructured(0.6))
            kept = evaluate(opened, quick=True).retention(dense)
            with torch.inference_mode():
                for key, value in opened.model.state_dict().items():
                    value.copy_(dense_weights[key])
            row = {
                "variant": label,
                "seed": seed,
                "total": kept.corrected.value,
                "worst": min(d.corrected.value for d in kept.dimensions),
                **{d.name: d.corrected.value for d in kept.dimensions},
                "bits": {t.name: t.raw.value for t in kept.tasks if "byte" in t.metric},
                "seconds": [round(drawn - began), round(time.perf_counter() - drawn)],
                "manifest": {
                    key: made.manifest.get(key)
                    for key in ("aggregation_4", "temperature", "first_in_band", "selected")
                },
            }
            with args.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            shown = "  ".join(f"{key} {100 * row[key]:5.1f}" for key in list(row)[2:8])
            print(f"{label} seed {seed}: {shown}  {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
