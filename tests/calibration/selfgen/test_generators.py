"""The generators: settings reach the sampler, and every step works as documented."""

import itertools
import re

import numpy as np
import pytest
import torch

from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.leakage import Guard, ItemIndex
from calmix.calibration.request import parse_calibration
from calmix.calibration.selfgen import generators, prompts
from calmix.calibration.selfgen.generators import GENERATORS, generate, objective, select_rows
from calmix.calibration.selfgen.ngrams import aggregation
from calmix.calibration.selfgen.prompts import beginnings, start_token
from calmix.calibration.selfgen.writing import Written
from calmix.errors import InputError
from calmix.sources.registry import get_source
from tests.tiny import tiny_tokenizer

LOOP = (1, 2) * 8


@pytest.fixture
def made(opened, monkeypatch, tmp_path):
    """Make a set of 8 rows of 32 tokens with a fake writer: random tokens, changed by `fill`.
    Requests are collected in `made.requests`."""
    path = tmp_path / "prompts.yaml"
    path.write_text("x: [{text: a}, {text: bc}]\ny: [{text: d}]\n", encoding="utf-8")

    def run(name="self-written", fill=lambda ids, nll: None, settings=None, **how):
        run.requests = []

        def write(opened, request, **how):
            run.requests.append(request)
            shape = (len(request.openers), request.length)
            generator = torch.Generator().manual_seed(len(run.requests))
            ids = torch.randint(10, 200, shape, generator=generator)
            nll = torch.rand(shape, generator=generator) + 1
            fill(ids, nll)
            run.ids = ids
            return Written(ids, nll, torch.arange(shape[1]).expand(shape) > 0)

        monkeypatch.setattr(generators, "write", write)
        own = {"prompts": path, "piece": 16} if name in ("self-written", "igsp") else {}
        generator = GENERATORS[name](**own | (settings or {}))
        plain = {"rows": 8, "length": 32, "seed": 0, "guard": None, "own": {}}
        return generate(generator, opened, **plain | how)

    return run


def pieces(found, size=16):
    return [tuple(piece) for piece in found.ids.reshape(-1, size).tolist()]


def test_row_holds_pieces_of_one_dimension(made, opened):
    settings = {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}
    generated = made(settings=settings | {"temperature": 0.7})
    (request,) = made.requests
    assert (request.length, len(request.openers)) == (16, 20)  # two to spare of each
    assert settings.items() <= vars(request).items()
    assert set(request.temperatures) == {0.7}
    firsts = {tuple(row[0]) for row in request.openers[0::2]}
    assert firsts == {tuple(opened.tokenizer(text)["input_ids"]) for text in ("a", "bc")}
    assert generated.ids.shape == (8, 32)
    assert generated.counts == {"x": 4, "y": 4}
    kinds = {tuple(piece): "xy"[at % 2] for at, piece in enumerate(made.ids.tolist())}
    stored = [kinds[piece] for piece in pieces(generated)]
    assert stored[0::2] == stored[1::2] == list(generated.sources)
    assert len(set(pieces(generated))) == 16
    assert set(generated.manifest["perplexity"]) == {"x", "y"}
    assert sorted(made(rows=7).counts.values()) == [3, 4]
    assert made(rows=1).counts == {"x": 1}


def test_looping_pieces_are_rewritten(made):
    def fill(ids, nll):
        if len(ids) in (16, 20):
            ids[[0, 2, 4, 6, 8, 10, 11]] = torch.tensor(LOOP)

    generated = made(fill=fill)
    assert [len(request.openers) for request in made.requests] == [20, 6]
    assert made.requests[1].seed != made.requests[0].seed
    assert LOOP not in pieces(generated)
    counts = generated.manifest["pieces"]
    assert (counts["refused"], counts["passed_over"], counts["looping"]) == (0, 7, 0)
    assert pieces(made(fill=fill, settings={"repeats": 1.0})).count(LOOP) == 7
    assert len(made.requests) == 1


def test_leaked_pieces_are_replaced(made, opened):
    contents, all_of = [], []

    def fill(ids, nll):
        if len(ids) == 20:
            contents.extend(ids[:3].tolist())

    class Reads(Guard):
        def passes(self, source, document, text):
            return text not in opened.tokenizer.batch_decode(contents) and not all_of

    guard = Reads("mine", ItemIndex([]))
    generated = made(fill=fill, guard=guard)
    assert not {tuple(row) for row in contents} & set(pieces(generated))
    assert generated.manifest["pieces"]["refused"] == 3
    all_of.append(True)
    with pytest.raises(InputError, match="8 pieces of x are needed, but only 0 of 80 can"):
        made(guard=guard)


def test_igsp_selects_by_j(made):
    def plant(ids, nll):  # some loop, end in punctuation or copy another
        ids[0:4], ids[4:8], ids[8:12] = torch.tensor(LOOP), 7, ids[12:16].clone()

    generated = made("igsp", plant, {"candidates": 2.5})
    assert len(made.requests[0].openers) == 40
    assert not {LOOP, (7,) * 16} & set(pieces(generated))
    assert len(set(pieces(generated))) == 16
    assert generated.manifest["J"] < made(fill=plant, settings={"repeats": 1.0}).manifest["J"]
    made("igsp")
    assert len(made.requests[0].openers) == 48  # three times as many by default


def test_self_cal_starts_from_prompts_or_token(made, opened):
    for start, token in (("auto", 1), ("separator", 2)):
        generated = made("self-cal", settings={"start": start})
        (request,) = made.requests
        assert request.openers == [[[token]]] * 8
        assert (request.length, set(request.temperatures), request.top_k) == (32, {1.0}, None)
        assert generated.counts == {"self-cal": 8}
    generated = made("self-cal", length=200)
    (request,) = made.requests
    ours = beginnings(None, opened.tokenizer)
    assert generated.counts == dict.fromkeys(ours, 2)
    for row, name in zip(request.openers, [*ours] * 2, strict=True):
        assert row[0] in ours[name]
    assert (request.length, set(request.temperatures)) == (200, {1.0})


def test_sgs_continues_documents_and_drops_a_fifth(made, text_file, opened, monkeypatch, tmp_path):
    own = {"a": "code", "b": "code", "c": "math"}
    sources = {
        n: get_source(str(text_file)).model_copy(update={"name": n, "dimension": d})
        for n, d in own.items()
    }
    monkeypatch.setitem(generators.MIXES, "three", dict.fromkeys(own, 1.0))

    def fill(ids, nll):
        nll[[0, 1]] += 5  # one of each dimension
        ids[[0, 1]] = 9

    generated = made("sgs", fill, {"seeds": "three"}, own=sources)
    (request,) = made.requests
    assert len(request.openers) == 10  # 8 rows, and the fifth that is dropped
    assert request.openers[0][0] == opened.tokenizer(text_file.read_text())["input_ids"][:2]
    settings = (request.top_k, request.top_p, request.repetition_penalty, request.temperatures[0])
    assert settings == (50, 0.95, 1.2, 0.6)
    assert generated.counts == {"code": 4, "math": 4}
    assert 9 not in generated.ids
    assert set(generated.manifest["own"]) == set(own)
    assert parse_calibration(str(generated.save(tmp_path / "set"))).saved.rows == 8


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADED = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer(template, bos, eos, *others):
    """The tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer(template)
    inputs = [token for token in (bos, eos) if token is not None]
    tokenizer.add_special_tokens({"additional_special_tokens": [*others, *inputs]})
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    return tokenizer


def test_start_token_is_not_from_the_chat_template(monkeypatch, tmp_path):
    for tokens, auto, separator in (
        ((CHATML, "<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|endoftext|>", "<|endoftext|>"),
        ((CHATML, "<|im_start|>", "</s>"), "</s>", "</s>"),
        ((CHATML, "<s>", "<|im_end|>", "<|endoftext|>"), "<s>", "<|endoftext|>"),
        ((HEADED, "<s>", "<|im_end|>", "<|end_of_text|>"), "<s>", "<|end_of_text|>"),
        ((None, None, None), "</s>", "</s>"),
    ):
        tokenizer = chat_tokenizer(*tokens)
        assert start_token(tokenizer) == tokenizer.convert_tokens_to_ids(auto)
        assert start_token(tokenizer, "bos") == tokenizer.bos_token_id
        assert start_token(tokenizer, "separator") == tokenizer.convert_tokens_to_ids(separator)
    monkeypatch.setattr(prompts, "END_OF_TEXT", ())
    chat = chat_tokenizer(CHATML, "<|im_start|>", "<|im_end|>")
    assert start_token(chat) == chat.bos_token_id
    assert start_token(chat, "separator") is None
    bare = chat_tokenizer(None, None, None)
    with pytest.raises(InputError, match="nothing to start from: this model's tokenizer has no"):
        GENERATORS["self-cal"](start="auto").beginnings(bare, 0, None)
    path = tmp_path / "prompts.yaml"
    path.write_text("general: [{begin: true}]", encoding="utf-8")
    with pytest.raises(InputError, match="without begin token and document separator"):
        beginnings(path, bare)


def test_prompts_use_the_chat_template_or_are_refused(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text("only: [{ask: Tell me.}, {text: 'Once'}]", encoding="utf-8")
    tokenizer = tiny_tokenizer()
    plain = beginnings(path, tokenizer)["only"]
    assert tokenizer.decode(plain[0]) == "Tell me.\n\n"
    tokenizer.chat_template = (
        "system: be good\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = beginnings(path, tokenizer)["only"]
    assert [tokenizer.decode(ids) for ids in chat] == ["Tell me.\nassistant: ", "Once"]
    for text, message in (
        ("general: []", "line 1: general: List should have at least 1 item"),
        ("{}", "names no dimension"),
        ("general: [{text: a, ask: b}]", "should have at most 1 item"),
        ("general: [{tekst: a}]", "must be 'text', 'ask' or 'begin'"),
        ("general: [{text: ''}]", "prompt 1 of dimension general in .* has no tokens"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            beginnings(path, tiny_tokenizer())


def test_generate_command_and_own_prompts(calmix, tiny_folder, text_file, tmp_path):
    stored = tmp_path / "prompts.yaml"
    stored.write_text("law: [{text: The court}]\ncooking: [{text: Stir}]\n", encoding="utf-8")
    own = f"self-written,prompts={stored},top_k=1,repeats=0.01"
    how = ("-m", tiny_folder, "--rows", 4, "--length", 40, "--leakage", "off", "-o")
    for text, message in (
        ("igsp,candidates=2,temperature=1", "4-gram aggregation .*, perplexity general "),
        (own, "[1-4] texts repeat more"),
    ):
        ended = calmix("calibrate", text, *how, tmp_path / "set", "--overwrite").ok()
        assert "4 rows of 40 tokens" in ended.out
        assert re.match(message, ended.out.splitlines()[-2])
    made = CalibrationSet.open(tmp_path / "set")
    assert (made.rows, made.length, made.manifest["generated"]) == (4, 40, "self-written")
    assert sorted(made.counts.items()) == [("cooking", 2), ("law", 2)]
    assert made.manifest["settings"]["repeats"] == 0.01
    line = calmix("calibrate", text_file, *how, tmp_path / "drawn", "--device", "cpu").line
    assert "--dtype and --device have no effect" in line


def defined(ids, rows, groups, nll, tokens):
    """J by its definition."""
    logs = []
    for name in dict.fromkeys(groups[row] for row in rows):
        own = [row for row in rows if groups[row] == name]
        logs.append(sum(nll[r] for r in own) / sum(tokens[r] for r in own))
    return aggregation(ids[list(rows)], 4) + float(np.var(logs))


def test_selection_matches_exhaustive_search():
    quota, gaps = {"a": 3, "b": 2}, []
    groups = np.array(["a"] * 6 + ["b"] * 6)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ids, tokens = rng.integers(0, 4, (12, 30)), rng.integers(8, 13, 12)
        pool = ids, groups, rng.uniform(1.8, 2.6, 12) * tokens, tokens
        generated = select_rows(*pool, quota)
        assert generated == select_rows(*pool, quota)
        assert sorted(groups[row] for row in generated) == ["a"] * 3 + ["b"] * 2
        assert len(set(generated)) == 5
        exact = defined(ids, generated, *pool[1:])
        assert objective(*(part[generated] for part in pool)) == pytest.approx(exact)
        pairs = itertools.product(
            itertools.combinations(range(6), 3), itertools.combinations(range(6, 12), 2)
        )
        gaps.append(exact - min(defined(ids, [*a, *b], *pool[1:]) for a, b in pairs))
    assert sum(gap < 1e-9 for gap in gaps) >= 8
    assert max(gaps) < 0.04
    assert np.mean(gaps) < 0.01
