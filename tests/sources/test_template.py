"""Templates: dotted fields, lists, optional paragraphs."""

import pytest

from calmix.errors import SourceError
from calmix.sources.readers import fields, fill, lookup


def test_nested_fields_and_lists():
    row = {"a": {"b": "x"}, "turns": [{"say": "hi"}, {"say": "ho"}], "deep": [["p"], ["q", ""]]}
    assert fill("{a.b}: {turns.*.say}", row) == "x: hi\n\nho"
    assert fill("{deep}", row) == "p\n\nq"
    assert lookup(row, "turns.*.say") == ["hi", "ho"]
    assert fields("{a.b} {turns.*.say} {a.c}") == ["a", "turns"]


def test_a_paragraph_of_empty_fields_is_left_out():
    template = "{instruction}\n\n{input}\n\n{output}"
    row = {"instruction": "Add.", "input": "", "output": "3"}
    assert fill(template, row) == "Add.\n\n3"
    assert fill(template, {**row, "input": None}) == "Add.\n\n3"
    assert fill("Note\n\n{output}", row) == "Note\n\n3"


def test_filled_text_is_not_scanned_again():
    assert fill("{a}", {"a": "{b} \\frac{1}{2}"}) == "{b} \\frac{1}{2}"


@pytest.mark.parametrize("template", ["{missing}", "{a.missing}", "{a.b.c}", "{turns.*.no}"])
def test_a_missing_field_is_named_with_what_there_is(template):
    with pytest.raises(SourceError, match=r"there is no field .* \(has: "):
        fill(template, {"a": {"b": "x"}, "turns": [{"say": "hi"}]})
