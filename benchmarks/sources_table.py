"""Metrics of all offline sources with the builtin model, as CSV (docs/lab/sources.csv).

    python benchmarks/sources_table.py > docs/lab/sources.csv

One token budget for all sources; the mean over draws and half of its 95 % interval. Coverage and
mismatch are against the other sources pooled.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from pathlib import Path

from calmix.calibration import open_tokenizer
from calmix.calibration.measuring import Interval, measure
from calmix.models import open_model
from calmix.sources import offline_sources

COLUMNS = {
    "documents": ("scope_documents", "{:.0f}"),
    "tokens a document": ("granularity", "{:.0f}"),
    "entropy (bits)": ("entropy", "{:.2f}"),
    "vocabulary share": ("scope_tokens", "{:.3f}"),
    "variety, n=2": ("variety_2", "{:.3f}"),
    "aggregation, n=1": ("aggregation_1", "{:.3f}"),
    "aggregation, n=4": ("aggregation_4", "{:.3f}"),
    "coverage, n=1": ("coverage_1", "{:.3f}"),
    "perplexity": ("distortion", "{:.2f}"),
    "bits per byte": ("bits_per_byte", "{:.3f}"),
    "mismatch (bits)": ("mismatch", "{:.3f}"),
}


def cells(value: Interval, form: str) -> list[str]:
    """Return a mean and half of its interval."""
    if value.low is None or value.high is None:
        return [form.format(value.mean), ""]
    return [form.format(value.mean), form.format((value.high - value.low) / 2)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-perplexity", action="store_true", help="skip what runs the model")
    options = parser.parse_args()
    sources = offline_sources()
    perplexity = not options.no_perplexity
    found = measure(
        list(sources),
        open_model(options.model) if perplexity else open_tokenizer(options.model),
        rows=options.rows,
        length=options.length,
        draws=options.draws,
        seed=options.seed,
        perplexity=perplexity,
        tick=lambda name: print(f"measured {name}", file=sys.stderr, flush=True),
    )
    if options.json:
        found.save(options.json)
    columns = {
        title: pair for title, pair in COLUMNS.items() if pair[0] in found[next(iter(sources))]
    }
    heads = [head for title in columns for head in (title, f"{title} ±")]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["source", "dimension", *heads])
    for name, source in sources.items():
        pairs = (cells(found[name][key], form) for key, form in columns.values())
        table.writerow([name, source.dimension, *itertools.chain(*pairs)])


if __name__ == "__main__":
    main()
