"""A user's prompts in `calmix compress`: half of them calibrate, the others are the test."""

import json
import shlex
from dataclasses import replace

import pytest

from calmix.calibration.dataset import CalibrationSet
from calmix.compression.card import read_card
from calmix.compression.run_stages import stages
from calmix.compression.stages import Draw
from calmix.evaluation.prompts import halves, read_prompts
from calmix.evaluation.scores import load_scores
from calmix.sources.mixes import parse_mix
from tests.compress.conftest import pages, read
from tests.tiny import save_tiny_model, tiny_tokenizer


@pytest.fixture
def mine(tmp_path):
    rows = ({"prompt": f"Say <b>& {n}.", "max_tokens": 4} for n in range(12))
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chatting(tmp_path):
    """A tiny model with a chat template."""
    folder = save_tiny_model(tmp_path / "chatting")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    tiny_tokenizer(template).save_pretrained(folder)
    return folder


def test_half_of_the_prompts_is_held_out(calmix, command, asked, chatting, mine, place, tmp_path):
    """The others calibrate."""
    out = tmp_path / "out"
    text = f"prompts:0.5,{place / 'text.txt'}:0.5"
    verb, _, *words = command(out, "--bits", 4, "--calibration", text, "--prompts", mine)
    words = (verb, chatting, *words)
    printed = calmix(*words).ok().out
    calibrate, test = halves(read_prompts(mine))
    said = f"answers to {len(calibrate)} prompts were calibrated on, 8 of 16 rows;"
    card = read_card(out)
    assert f"the test is the other {len(test)} prompts" in " ".join(printed.split())
    for shown in (card.split, pages(out)[0]):
        assert said in shown
    assert {*card.prompted[0].tasks[0].prompts} == {one.question for one in test}
    drawn = CalibrationSet.open(out / "calibration")
    written = "".join(tiny_tokenizer("").batch_decode(drawn.ids[:, :].tolist()))
    assert all(f"<user>{one.question}" in written for one in calibrate)
    assert not any(f"<user>{one.question}\n" in written for one in test)
    page = (out / "prompts.html").read_text(encoding="utf-8")
    assert (page.count("<article"), page.count("<b>&")) == (len(test), 0)
    assert "Say &lt;b&gt;&amp; " in page
    assert "mine" in calmix("check", out, "--keep-at-least", "min=0.5").line
    # Later tests ask only the other half, too; of another file they may ask all.
    other = tmp_path / "other.jsonl"
    other.write_text(mine.read_text(encoding="utf-8") + '{"prompt": "And now then?"}\n', "utf-8")
    scores = tmp_path / "scores.json"
    for file, half, seen, count in (
        (mine, (), "half of these prompts: only the others are asked", len(test)),
        (mine, ("--test-half",), "", len(test)),
        (other, (), "half of another file of prompts: if", len(calibrate + test) + 1),
    ):
        again = ("evaluate", out / "model", "--prompts", file, "-o", scores, "--overwrite", *half)
        said = " ".join(calmix(*again).ok().err.split())
        assert (seen in said, "calibrated" in said) == (True, bool(seen))
        assert len(load_scores(scores).tasks[0].items) == count
    # Wherever the folder is moved, it is compared with its size.
    (tmp_path / "moved").mkdir()
    moved = out.rename(tmp_path / "moved" / "small")
    assert "Size unknown" not in calmix("compare", moved).ok().out
    moved.rename(out)
    # The printed command draws the same set.
    commands = read(out / "compress.json")["commands"]
    draw = shlex.split(commands["write the calibration set"])[1:]
    draw[draw.index("-o") + 1] = str(tmp_path / "drawn")
    calmix(*draw).ok()
    assert CalibrationSet.open(tmp_path / "drawn").sha256 == drawn.sha256
    # A saved set without the prompts leaves all of them for the test.
    small = ("--rows", 4, "--length", 32, "--leakage", "off")
    calmix("calibrate", place / "text.txt", "-m", chatting, *small, "-o", tmp_path / "plain").ok()
    for folder, half in ((out / "calibration", True), (tmp_path / "plain", False)):
        request = asked(model=str(chatting), calibration=str(folder), prompts=str(mine))
        listed = stages(request, tmp_path)
        assert not any(isinstance(one.request, Draw) for one in listed)
        (tested,) = (one.command for one in listed if "--prompts" in one.command)
        assert ("--test-half" in tested) == half
    every = "6 prompts were the test, all that the file has; none was calibrated on."
    assert replace(card, calibration={}).split == every
    mine.write_text('{"prompt": "another"}\n{"prompt": "x"}\n{"prompt": "y"}\n', "utf-8")
    assert "another request (prompts_sha256" in calmix(*words).line


def test_prompts_of_calibration_text(calmix, chatting, mine, tmp_path):
    single = tmp_path / "single.jsonl"
    single.write_text('{"prompt": "x"}\n', encoding="utf-8")
    for text, more, said in (
        ("prompts", (), "needs a file of prompts: --prompts"),
        ("stories", ("--prompts", mine), "needs a share of the source 'prompts'"),
        ("prompts", ("--prompts", single), "1 prompts cannot be split"),
    ):
        draw = ("calibrate", "--model", chatting, "-o", tmp_path / "set", text, *more)
        assert said in calmix(*draw).line


def test_prompts_in_a_weighed_mix(asked, mine):
    text, keep = "prompts:0.5,stories:0.5", {"prompts": 1, "commonsense": 3}
    request = asked(calibration=text, prompts=mine, keep=keep, sparsity=0.5)
    assert parse_mix(request.calibration) == {"prompts": 0.25, "stories": 0.75}
