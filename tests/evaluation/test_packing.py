"""Packing: every token scored once, no shared token twice, rows within their size."""

import random

from hypothesis import given
from hypothesis import strategies as st

from calmix.evaluation.packing import Row, Scored, Target, fill_rows, plan


def restored(sequences, row_tokens):
    """For each sequence the (tokens before, token) of its targets, read back from the plan."""
    found = {i: [] for i in range(len(sequences))}
    for run in plan(sequences, row_tokens=row_tokens):
        for row in run.rows:
            visible = row.visible()
            for target in row.targets:
                seen = [node for node in range(len(row)) if visible[target.node, node]]
                assert [row.depth[node] for node in seen] == list(range(len(seen)))
                before = run.prefix + [row.ids[node] for node in seen]
                found[target.owner].append((before, target.token))
    return found


def made(seed, count, alphabet, prefix):
    rng = random.Random(seed)
    head = [rng.randrange(alphabet) for _ in range(prefix)]
    sequences = []
    for _ in range(count):
        ids = head[: rng.choice([prefix, prefix, prefix, 3])]
        ids = ids + [rng.randrange(alphabet) for _ in range(rng.randint(2, 20))]
        start = rng.randint(max(1, len(ids) - 4), len(ids) - 1)
        sequences.append(Scored(ids, start, len(sequences)))
    return sequences


@given(
    st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 5), st.integers(0, 80),
    st.sampled_from([8, 32, 100]),
)  # fmt: skip
def test_every_token_is_predicted_from_what_stands_before_it(
    seed, count, alphabet, prefix, row_tokens
):
    sequences = made(seed, count, alphabet, prefix)
    for index, targets in restored(sequences, row_tokens).items():
        ids, start = sequences[index].ids, sequences[index].start
        assert targets == [(ids[:at], ids[at]) for at in range(start, len(ids))]


def test_rows_keep_their_size_and_shared_tokens_run_once():
    rng = random.Random(0)
    preamble = [rng.randrange(100) for _ in range(200)]
    sequences = []
    for _ in range(30):
        question = preamble + [rng.randrange(100) for _ in range(20)]
        sequences += [Scored([*question, 200 + choice, 7], len(question)) for choice in range(4)]
    runs = plan(sequences, row_tokens=128)
    assert len(runs) == 1
    assert runs[0].prefix == preamble
    assert all(len(row) <= 128 for row in runs[0].rows)
    # The last token of a sequence is only predicted: one node a choice beside the question.
    assert sum(map(len, runs[0].rows)) == 30 * (20 + 4)


def test_two_tasks_keep_their_own_prefix():
    tasks = [[1] * 60, [2] * 90]
    sequences = [
        Scored([*head, *range(10 * i, 10 * i + 10)], len(head) + 5)
        for head in tasks
        for i in range(20)
    ]
    assert [run.prefix for run in plan(sequences, row_tokens=64)] == tasks


def test_the_plan_does_not_depend_on_the_order_of_arrival():
    sequences = made(3, 50, 4, 60)
    other = list(reversed(sequences))
    one, two = plan(sequences, row_tokens=64), plan(other, row_tokens=64)
    assert [[row.ids for row in run.rows] for run in one] == [
        [row.ids for row in run.rows] for run in two
    ]


def test_rows_are_filled_closely():
    trees = [Row([1] * n, [-1] * n, [0] * n, [Target(n, n - 1, 5)]) for n in (60, 40, 30, 70, 100)]
    rows = fill_rows(trees, 100)
    assert sorted(map(len, rows)) == [100, 100, 100]
    assert all(row.ids[target.node] == 1 for row in rows for target in row.targets)
