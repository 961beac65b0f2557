"""Calibration sets: built, saved, opened and exported."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from calmix.calibration.build import build
from calmix.calibration.dataset import SET_MANIFEST, TENSORS, CalibrationSet
from calmix.calibration.tokenizer import begin_token
from calmix.errors import InputError, SourceError
from calmix.manifest import sealed
from calmix.sources.mixes import parse_mix
from tests.tiny import save_tiny_model, tiny_tokenizer


def mix_of(sources, lower=1, upper=1):
    return parse_mix(f"{sources['lower']}:{lower},{sources['upper']}:{upper}")


@given(
    rows=st.integers(1, 12),
    length=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    packing=st.sampled_from(["concat", "window"]),
)
def test_rows_are_full_and_reproducible(sources, tiny, rows, length, seed, packing):
    request = {"rows": rows, "length": length, "seed": seed, "packing": packing}
    mix = mix_of(sources, 1, 2)
    drawn_set = build(mix, tiny, **request)
    again = build(mix, tiny, **request)
    assert drawn_set.ids.shape == (rows, length)
    assert drawn_set.manifest == again.manifest  # the hash of the ids is in it
    assert sum(drawn_set.counts.values()) == rows
    described = drawn_set.manifest["sources"].items()
    assert drawn_set.counts == {name: source["rows"] for name, source in described}
    for row, source in zip(drawn_set.ids.tolist(), drawn_set.sources, strict=True):
        text = tiny.tokenizer.decode(row, skip_special_tokens=True)
        assert text == (text.lower() if source == sources["lower"] else text.upper())


def test_rows_depend_only_on_source_name_and_seed(tmp_path, tiny, sources, monkeypatch):
    alone = build(parse_mix(sources["lower"]), tiny, rows=4, length=32)
    both = build(mix_of(sources), tiny, rows=8, length=32)
    rows = both.ids[[name == sources["lower"] for name in both.sources]]
    assert sorted(rows.tolist()) == sorted(alone.ids.tolist())
    moved = tmp_path / "elsewhere" / Path(sources["lower"]).name
    moved.parent.mkdir()
    shutil.copyfile(sources["lower"], moved)
    monkeypatch.chdir(moved.parent)  # the same for a file in any folder
    for name in (str(moved), f"./{moved.name}"):
        assert build(parse_mix(name), tiny, rows=4, length=32).sha256 == alone.sha256
    seeds = [build(mix_of(sources), tiny, rows=8, length=32, seed=n).sha256 for n in range(5)]
    assert len(set(seeds)) == 5


def test_every_row_starts_with_the_begin_token(sources, tiny):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert begin_token(tokenizer) == [1]
    assert begin_token(tiny.tokenizer) == []
    opened = replace(tiny, tokenizer=tokenizer)
    drawn_set = build(mix_of(sources), opened, rows=6, length=20)
    assert (drawn_set.ids[:, 0] == 1).all()
    assert (drawn_set.ids[:, 1:] != 1).all()
    with pytest.raises(InputError, match="no room for text after the begin token"):
        build(mix_of(sources), opened, rows=1, length=1)


def test_too_little_text_and_a_single_document(sources, tmp_path, tiny):
    mix = parse_mix(sources["lower"])
    few = r"has text for 66 rows of 64 tokens, not 100: add text, mix it with .*:1,encyclopedia:1\)"
    with pytest.raises(SourceError, match=few):
        build(mix, tiny, rows=100, length=64)
    with pytest.raises(SourceError, match=r"for 10 rows .* use --packing concat, or ask for"):
        build(mix, tiny, rows=11, length=90, packing="window")
    path = tmp_path / "book.txt"  # of which every part is used
    path.write_text("".join(f"{number:04d} " for number in range(4000)), encoding="utf-8")
    seeds = [build(parse_mix(str(path)), tiny, rows=8, length=50, seed=seed) for seed in (0, 1, 0)]
    rows = [set(tiny.tokenizer.batch_decode(result.ids)) for result in seeds]
    assert rows[0] == rows[2] != rows[1]
    assert max(rows[0]) > "2000"
    assert seeds[0].manifest["sources"][str(path)]["drawn"] == ["0"]


def test_chats_use_the_chat_template(tmp_path, tiny):
    path = tmp_path / "chats.jsonl"
    said = {"user": "hello there", "assistant": "yes " * 9}
    chat = [{"role": role, "content": text} for role, text in said.items()]
    path.write_text((json.dumps({"messages": chat}) + "\n") * 2, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    rendered = replace(tiny, tokenizer=tokenizer)
    drawn_set = build(parse_mix(str(path)), rendered, rows=1, length=30)
    text = tokenizer.decode(drawn_set.ids[0])
    assert "[user]hello there[assistant]ye" in text
    plain = build(parse_mix(str(path)), tiny, rows=1, length=30)
    assert "user: hello there" in tiny.tokenizer.decode(plain.ids[0])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}</s>"
    ids = build(parse_mix(str(path)), rendered, rows=1, length=94).ids[0].tolist()
    assert ids.count(tokenizer.eos_token_id) == 1  # the template's own, between two chats
    tokenizer.chat_template = "{{ messages[1].content }}"
    with pytest.raises(SourceError, match="leaves out what 'user' says in chat"):
        build(parse_mix(str(path)), rendered, rows=1, length=30)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SourceError, match=r"chats.jsonl: chat [12] .* \(roles must.*: change"):
        build(parse_mix(str(path)), rendered, rows=1, length=30)


def test_calibrate_save_open_export(calmix, sources, tiny, tiny_folder, tmp_path):
    mix = f"{sources['lower']}:0.5,{sources['upper']}:0.5"
    folder, text = tmp_path / "set", tmp_path / "set.jsonl"
    how = ("-m", tiny_folder, "--rows", 4, "--length", 32, "--leakage", "off")
    data = json.loads(calmix("calibrate", mix, *how, "-o", folder, "--json").ok().out)
    drawn_set = build(parse_mix(mix), tiny, rows=4, length=32)
    again = CalibrationSet.open(folder, tiny)
    assert torch.equal(again.ids, drawn_set.ids)
    assert again.sources == drawn_set.sources
    assert drawn_set.sha256 == again.sha256 == again.manifest["sha256"] == data["sha256"]
    assert again.counts == data["counts"]
    assert again.manifest["sources"] == drawn_set.manifest["sources"]
    again.save(tmp_path / "again")
    for name in (TENSORS, SET_MANIFEST):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    foreign, tokenizer = save_tiny_model(tmp_path / "foreign"), tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(foreign)
    other, export = tmp_path / "other.jsonl", ("export", folder, "-m", tiny_folder, "-o", text)
    calmix(*export).ok()
    rows = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in rows] == list(drawn_set.sources)
    again = tiny.tokenizer(rows[0]["text"]).input_ids  # begin and end tokens included
    assert again[:-1] == drawn_set.ids[0, : len(again) - 1].tolist()
    assert tiny.tokenizer.decode(drawn_set.ids[0]).endswith(rows[0]["text"])
    for words, line in (
        (export, "exists: choose another file"),
        (("export", folder, "-m", foreign, "-o", other), "another tokenizer"),
        (("export", tiny_folder, "-m", tiny_folder, "-o", other), "no effect with --to pack"),
        (("export", folder, "-o", other), "name its model with --model"),
        (("export", folder, "--to", "gguf", "-o", other), "it has no export to gguf"),
        (("calibrate", mix, *how, "-o", folder), "exists and is not empty"),
        (("calibrate", folder, *how, "-o", other), "is already a calibration set"),
    ):
        assert line in calmix(*words).line
    assert not other.exists()
    ended = calmix("calibrate", mix, *how, "-o", folder, "--overwrite").ok()
    assert "4 rows of 32 tokens" in ended.out
    assert "not checked for leakage" in ended.out


def test_damaged_set_is_refused(sources, tiny, tmp_path):
    folder = build(mix_of(sources), tiny, rows=6, length=32).save(tmp_path / "set")
    weights, data = load_file(folder / TENSORS), json.loads((folder / SET_MANIFEST).read_bytes())
    other = torch.cat([weights["ids"][:1] + 1, weights["ids"][1:]])
    newer = json.dumps(sealed(data | {"format": 99})).encode()
    for name, content, message in (
        (TENSORS, save(weights | {"ids": other}), "is damaged: make it again"),
        (TENSORS, save(weights | {"source": 1 - weights["source"]}), "is damaged: make it again"),
        (TENSORS, None, "is damaged: make it again"),
        (SET_MANIFEST, json.dumps(data | {"seed": 1}).encode(), r"is damaged \(manifest.json\): "),
        (SET_MANIFEST, newer, "format 1, which .*: .* calibration set and format 99"),
        (SET_MANIFEST, b"{", "is damaged: not JSON"),
        (SET_MANIFEST, b"{}", "is not a calibration set"),
        (SET_MANIFEST, None, "there is no calibration set at"),
    ):
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            CalibrationSet.open(folder)
        (folder / name).write_bytes(whole)
