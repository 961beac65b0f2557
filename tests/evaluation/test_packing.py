"""Packing: every token scored once, no shared token twice, rows within their size."""

import random

from hypothesis import given
from hypothesis import strategies as st

from calmix.evaluation.packing import Row, Scored, Target, fill_rows, plan


def restored(sequences, row_tokens):
    """For each sequence the (tokens before, token) of its targets, read back from the plan."""
    found = {i: [] for i in range(len(sequences))}
    for prefix, rows in plan(sequences, row_tokens=row_tokens):
        for row in rows:
            visible = row.visible()
            for target in row.targets:
                seen = [node for node in range(len(row)) if visible[target.node, node]]
                assert [row.depth[node] for node in seen] == list(range(len(seen)))
                before = prefix + [row.ids[node] for node in seen]
                found[target.owner].append((before, target.token))
    return found


@given(
    st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 5), st.integers(0, 80),
    st.sampled_from([8, 32, 100]),
)  # fmt: skip
def test_every_token_is_predicted_from_what_stands_before_it(
    seed, count, alphabet, prefix, row_tokens
):
    rng, sequences = random.Random(seed), []
    head = [rng.randrange(alphabet) for _ in range(prefix)]
    for _ in range(count):
        ids = head[: rng.choice([prefix, prefix, prefix, 3])]
        ids = ids + [rng.randrange(alphabet) for _ in range(rng.randint(2, 20))]
        start = rng.randint(max(1, len(ids) - 4), len(ids) - 1)
        sequences.append(Scored(ids, start, len(sequences)))
    for index, targets in restored(sequences, row_tokens).items():
        ids, start = sequences[index].ids, sequences[index].start
        assert targets == [(ids[:at], ids[at]) for at in range(start, len(ids))]
    # Whatever the order of arrival.
    one, two = (plan(some, row_tokens=row_tokens) for some in (sequences, sequences[::-1]))
    assert [[row.ids for row in rows] for _, rows in one] == [
        [row.ids for row in rows] for _, rows in two
    ]


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
    trees = [Row([1] * n, [-1] * n, [0] * n, [Target(n, n - 1, 5)]) for n in (60, 40, 30, 70, 100)]
    rows = fill_rows(trees, 100)
    assert sorted(map(len, rows)) == [100, 100, 100]
    assert all(row.ids[target.node] == 1 for row in rows for target in row.targets)
