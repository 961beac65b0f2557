"""Metrics of all offline sources with the builtin model, as CSV (docs/lab/sources.csv).

    python studies/sources_table.py > docs/lab/sources.csv

One token budget for all sources; the mean over draws and half of its 95 % interval. Coverage and
mismatch are against the other sources pooled.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys

import numpy as np
from scipy.stats import t
from text_metrics import compared, of_ids, perplexity_of_rows

from calmix.calibration.request import calibration_set
from calmix.models.opening import open_model
from calmix.sources.registry import offline_sources

COLUMNS = {
    "documents": ("scope_documents", "{:.0f}"),
    "tokens a document": ("granularity", "{:.0f}"),
    "entropy (bits)": ("entropy", "{:.2f}"),
    "vocabulary share": ("scope_tokens", "{:.3f}"),
    "variety, n=2": ("variety_2", "{:.3f}"),
    "aggregation, n=1": ("aggregation_1", "{:.3f}"),
    "aggregation, n=4": ("aggregation_4", "{:.3f}"),
    "coverage, n=1": ("coverage_1", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "bits per byte": ("bits_per_byte", "{:.3f}"),
    "mismatch (bits)": ("mismatch", "{:.3f}"),
}


def cells(values: list[float], form: str) -> list[str]:
    """Return the mean of draws and half of its 95 % interval (Student's t)."""
    half = ""
    if len(values) > 1:
        spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
        half = form.format(float(t.ppf(0.975, len(values) - 1)) * spread)
    return [form.format(np.mean(values)), half]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    opened, sources = open_model(options.model), offline_sources()
    how = {"rows": options.rows, "length": options.length, "leakage": "off"}
    draws: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
    for number in range(options.draws):
        sets = {
            name: calibration_set(name, opened, seed=options.seed + number, **how)
            for name in sources
        }
        ids = {name: one.ids.numpy() for name, one in sets.items()}
        for (name, drawn), more in zip(sets.items(), compared([*ids.items()], ids), strict=True):
            values, part = of_ids(ids[name]) | more, drawn.manifest["sources"][name]
            documents = len(part["drawn"])
            draws[name].append(
                values
                | {
                    "scope_documents": documents,
                    "granularity": part["drawn_tokens"] / documents,
                    "scope_tokens": values["variety_1"] * values["tokens"] / len(opened.tokenizer),
                    **perplexity_of_rows(opened, drawn.ids),
                }
            )
            print(f"measured {name}", file=sys.stderr, flush=True)
    heads = [head for title in COLUMNS for head in (title, f"{title} ±")]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["source", "dimension", *heads])
    for name, source in sources.items():
        pairs = (cells([one[key] for one in draws[name]], form) for key, form in COLUMNS.values())
        table.writerow([name, source.dimension, *itertools.chain(*pairs)])


if __name__ == "__main__":
    main()
