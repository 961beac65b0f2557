"""Packing: every token scored once, no shared token twice, rows within their size."""

import random

from calmix.evaluation.packing import Row, Scored, Target, fill_rows, plan


def test_rows_keep_their_size_and_shared_tokens_run_once():
    rng = random.Random(0)
    preambles = [[token + rng.randrange(100) for _ in range(200)] for token in (0, 100)]
    sequences = []
    for number in range(60):
        question = preambles[number % 2] + [rng.randrange(100) for _ in range(20)]
        sequences += [Scored([*question, 200 + choice, 7], len(question)) for choice in range(4)]
    runs = plan(sequences, row_tokens=128)
    assert sorted(prefix for prefix, _ in runs) == sorted(preambles)  # each task keeps its own
    for _, rows in runs:
        assert all(len(row) <= 128 for row in rows)
        # The last token of a sequence is only predicted: one node a choice beside the question.
        assert sum(map(len, rows)) == 30 * (20 + 4)


def test_rows_are_filled_closely():
    trees = [Row([1] * n, [-1] * n, [Target(n, n - 1, 5)]) for n in (60, 40, 30, 70, 100)]
    rows = fill_rows(trees, 100)
    assert sorted(map(len, rows)) == [100, 100, 100]
    assert all(row.ids[target.node] == 1 for row in rows for target in row.targets)
