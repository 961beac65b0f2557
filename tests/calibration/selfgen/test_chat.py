"""Conversations written by the model, alone and as part of a mix."""

import pytest

from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.request import calibration_set
from calmix.calibration.selfgen.prompts import chat_turns
from calmix.errors import InputError
from calmix.models.opening import open_model
from tests.tiny import save_tiny_model, tiny_tokenizer

TEMPLATE = (
    "S:be kind</s>"
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A tiny model with a chat template."""
    folder = save_tiny_model(tmp_path_factory.mktemp("talker") / "model")
    tiny_tokenizer(TEMPLATE).save_pretrained(folder)
    return open_model(str(folder), dtype="float32")


def drawn(text, opened, rows=8, **how):
    return calibration_set(text, opened, rows=rows, length=64, leakage="off", **how)


def test_row_is_a_conversation_in_the_chat_template(talker, opened, tiny, sources):
    turns = [talker.tokenizer.decode(ids) for ids in chat_turns(talker.tokenizer)]
    assert turns == ["S:be kind</s>u:", "a:", "u:"]
    drawn_set = drawn("chat,temperature=1", talker)
    assert drawn_set.manifest["generated"] == "chat"
    for row in drawn_set.ids:
        first, *turns = talker.tokenizer.decode(row).split("</s>")
        assert first == "S:be kind"
        heads = [turn[:2] for turn in turns if len(turn) > 1]
        assert heads == ["u:", "a:"] * (len(heads) // 2) + ["u:"] * (len(heads) % 2)
    with pytest.raises(InputError, match="no chat template with a token"):
        drawn("chat", opened)
    with pytest.raises(InputError, match="chat needs the model"):
        drawn(f"chat:0.5,{sources['lower']}:0.5", tiny)


def test_chats_as_part_of_a_mix(talker, opened, sources, tmp_path):
    lower = sources["lower"]
    mixed = {lower: 6, "chat": 2}
    for text, rest, counts in (
        (f"chat:0.25,{lower}:0.75", lower, mixed),
        ("self-written", "self-written,chat=0", None),
    ):
        drawn_set = drawn(text, talker)
        assert counts in (None, drawn_set.counts)
        assert drawn_set.counts["chat"] == drawn_set.manifest["written"]["chat"]["rows"] == 2
        assert drawn_set.manifest["written"]["chat"]["generated"] == "chat"
        others = drawn_set.ids[[name != "chat" for name in drawn_set.sources]]
        order = list if counts else sorted  # rows of a mix keep their order
        assert order(others.tolist()) == order(drawn(rest, talker, rows=6).ids.tolist())
        texts = talker.tokenizer.batch_decode(drawn_set.ids.tolist())
        assert drawn_set.manifest["chat_turns"] == sum(text.count("u:") for text in texts) >= 2
        folder = drawn_set.save(tmp_path / f"set of {len(drawn_set.counts)}")
        assert CalibrationSet.open(folder, talker).counts == drawn_set.counts
    assert drawn_set.manifest["generated"] == "self-written"
    assert len(drawn_set.counts) == 5
    plain = drawn("self-written", opened)
    assert "chat" not in plain.counts  # no chat template
    assert "chat_turns" not in plain.manifest


def test_set_without_chats_warns(talker, opened, sources, tmp_path, monkeypatch):
    lower, lines = sources["lower"], []
    drawn_set = drawn(lower, talker, note=lines.append)
    assert drawn_set.manifest["chat_turns"] == 0
    calibration_set(str(drawn_set.save(tmp_path / "set")), talker, note=lines.append)
    written = tmp_path / "mine.jsonl"
    written.write_text('{"text": "u:hello a:hello u:bye a:bye"}\n' * 40, encoding="utf-8")
    for text in (f"chat:0.5,{lower}:0.5", "self-written", str(written)):
        drawn(text, talker, note=lines.append)
    drawn(lower, opened, note=lines.append)
    bare = "{% for m in messages %}{{ m.content }}</s>\n{% endfor %}"
    for template in (bare, TEMPLATE.replace("</s>{% endfor", "{% endfor")):
        monkeypatch.setattr(talker.tokenizer, "chat_template", template)
        assert chat_turns(talker.tokenizer) is None  # nothing begins a chat, or ends a turn
    drawn(lower, talker, note=lines.append)
    none = "has no row in this model's chat format"
    unended = "this model's chat template has no token that ends a turn"
    said = [f"{lower} {none}", f"{tmp_path / 'set'} {none}", unended]
    told = zip(lines, said, strict=True)
    assert all(line.startswith(f"warning: {part}") for line, part in told)
