"""Self-Cal, SGS and IGSP: their settings reach the sampler, and each step does what it says."""

import numpy as np
import pytest
import torch
from tokenizers import processors

from calmix.calibration.selfgen import igsp, openers, self_cal, sgs
from calmix.calibration.selfgen.making import METHODS, generate, settings
from calmix.calibration.selfgen.openers import load_openers, start_token, tokenised
from calmix.calibration.selfgen.sampling import Sampling
from calmix.calibration.selfgen.writing import Request, Written
from calmix.errors import InputError
from tests.tiny import tiny_tokenizer

SIZE = {"rows": 8, "length": 32, "seed": 0}


def noted(requests, fill=None):
    """A stand-in for writing that notes each request and gives rows of `fill`'s tokens."""

    def write(request: Request, label: str) -> Written:
        requests.append(request)
        shape = (len(request.openers), request.length)
        generator = torch.Generator().manual_seed(len(requests))
        ids = torch.randint(10, 200, shape, generator=generator)
        if fill is not None:
            fill(ids)
        nll = torch.rand(shape, generator=generator) + 1
        sampled = torch.ones(shape, dtype=torch.bool)
        sampled[:, 0] = False
        return Written(ids, nll, torch.zeros(shape, dtype=torch.int32), sampled)

    return write


def defaults(method):
    return dict(METHODS[method])


def test_self_cal_samples_from_the_begin_token_alone():
    requests = []
    made = self_cal.self_cal(
        noted(requests), tiny_tokenizer(), **SIZE, start="auto",
        temperature=1.0, start_temperature=2.0, ramp=5,
    )  # fmt: skip
    (request,) = requests
    assert request.openers == [[[1]]] * 8
    assert request.sampling == Sampling(1.0, start_temperature=2.0, ramp=5)
    assert request.sampling.top_k is request.sampling.top_p is None
    assert made.ids.shape == (8, 32)
    assert set(made.tags) == {"self-cal"}


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADED = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer(template, bos, eos, *others):
    """The tiny tokenizer made one of chats."""
    tokenizer = tiny_tokenizer()
    given = [token for token in (bos, eos) if token is not None]
    tokenizer.add_special_tokens({"additional_special_tokens": [*others, *given]})
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("tokens", "auto", "separator"),
    [
        ((CHATML, "<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|endoftext|>", "<|endoftext|>"),
        ((CHATML, "<|im_start|>", "</s>"), "</s>", "</s>"),
        ((CHATML, "<s>", "<|im_end|>", "<|endoftext|>"), "<s>", "<|endoftext|>"),
        ((CHATML, None, "<|im_end|>", "<|endoftext|>"), "<|endoftext|>", "<|endoftext|>"),
        ((HEADED, "<s>", "<|im_end|>", "<|end_of_text|>"), "<s>", "<|end_of_text|>"),
        ((None, "<s>", "</s>"), "<s>", "</s>"),
        ((None, None, "</s>"), "</s>", "</s>"),
        ((None, None, None), "</s>", "</s>"),
    ],
)
def test_text_starts_at_no_token_of_chats(tokens, auto, separator):
    tokenizer = chat_tokenizer(*tokens)
    assert start_token(tokenizer) == tokenizer.convert_tokens_to_ids(auto)
    assert start_token(tokenizer, "bos") == tokenizer.bos_token_id
    assert start_token(tokenizer, "separator") == tokenizer.convert_tokens_to_ids(separator)


def test_a_begin_token_before_every_text_is_never_one_of_chats():
    tokenizer = chat_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert start_token(tokenizer) == tokenizer.bos_token_id


def test_without_a_separator_a_begin_token_of_chats_must_do(monkeypatch):
    monkeypatch.setattr(openers, "END_OF_TEXT", ())
    tokenizer = chat_tokenizer(CHATML, "<|im_start|>", "<|im_end|>")
    assert start_token(tokenizer) == tokenizer.bos_token_id
    assert start_token(tokenizer, "separator") is None


def test_every_row_and_text_that_begins_alone_begins_there():
    tokenizer = chat_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for start, token in (("auto", separator), ("bos", tokenizer.bos_token_id)):
        requests = []
        made = self_cal.self_cal(
            noted(requests), tokenizer, **SIZE, **defaults("self-cal") | {"start": start}
        )
        assert requests[0].openers == [[[token]]] * 8
        assert made.record["start_token"] == token
    assert [separator] in tokenised(load_openers(), tokenizer)["general"]


@pytest.mark.parametrize(
    ("start", "has"),
    [
        ("auto", "neither a begin token nor a document separator"),
        ("bos", "no begin token"),
        ("separator", "no document separator"),
    ],
)
def test_self_cal_needs_a_start(start, has, monkeypatch):
    monkeypatch.setattr(openers, "END_OF_TEXT", ())
    tokenizer = chat_tokenizer(None, None, None)
    with pytest.raises(
        InputError, match=f"nothing to start from: this model's tokenizer has {has}"
    ):
        self_cal.self_cal(noted([]), tokenizer, **SIZE, **defaults("self-cal") | {"start": start})


def test_sgs_settings_and_prefixes():
    requests = []
    options = defaults("sgs")
    del options["seeds"]
    documents = [f"{chr(97 + i)}xyz text" for i in range(20)]
    made = sgs.sgs(noted(requests), tiny_tokenizer(), documents=documents, **SIZE, **options)
    (request,) = requests
    assert request.sampling == Sampling(0.6, top_k=50, top_p=0.95, repetition_penalty=1.2)
    assert len(request.openers) == 10  # 8 rows, and the fifth that is dropped
    first = [row[0] for row in request.openers]
    tokenizer = tiny_tokenizer()
    assert first == [tokenizer(text)["input_ids"][:2] for text in documents[:10]]
    assert request.openers[0][1] == tokenizer(documents[10])["input_ids"][:2]
    assert made.ids.shape == (8, 32)
    assert (made.record["texts"], made.record["kept"]) == (10, 8)


def test_sgs_drops_the_least_likely_fifth():
    assert sgs.keep_likely([5.0, 1.0, 9.0, 3.0, 2.0], 0.2) == [0, 1, 3, 4]
    assert sgs.keep_likely([5.0, 1.0, 9.0, 3.0, 2.0], 0.0) == [0, 1, 2, 3, 4]


def test_sgs_windows_come_from_the_texts_it_kept():
    options = defaults("sgs") | {"drop": 0.5}
    del options["seeds"]
    tokenizer = tiny_tokenizer()
    good, bad = (tokenizer(letter)["input_ids"][0] for letter in "gb")

    def write(request: Request, label: str) -> Written:
        shape = (len(request.openers), request.length)
        ids = torch.full(shape, good)
        ids[::2] = bad
        nll = torch.ones(shape)
        nll[::2] = 9.0
        sampled = torch.ones(shape, dtype=torch.bool)
        return Written(ids, nll, torch.zeros(shape, dtype=torch.int32), sampled)

    made = sgs.sgs(write, tokenizer, documents=["some text"], **SIZE, **options)
    text = tokenizer.batch_decode(made.ids)
    assert "b" not in "".join(text)
    assert all(set(row) <= set("g\n") for row in text)


def test_sgs_splits_rows_into_texts():
    ids = torch.arange(12).view(2, 6)
    text = torch.tensor([[0, 0, 0, 1, 1, 2], [0] * 6], dtype=torch.int32)
    sampled = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    nll = torch.tensor([[9.0, 1, 3, 9, 5, 9], [9.0, 2, 2, 2, 2, 2]])
    texts, means = sgs.split_texts(Written(ids, nll, text, sampled))
    assert texts == [[0, 1, 2], [3, 4], [6, 7, 8, 9, 10, 11]]
    assert means == [2.0, 5.0, 2.0]


def test_sgs_without_seed_texts():
    options = defaults("sgs")
    del options["seeds"]
    with pytest.raises(InputError, match="no seed text"):
        sgs.sgs(noted([]), tiny_tokenizer(), documents=[""], **SIZE, **options)


def keeping(held):
    """A stand-in for writing that keeps every request and what it gave."""

    def write(request: Request, label: str) -> Written:
        held.append(noted(held)(request, label))
        return held[-1]

    return write


CHOOSING = {"piece": 16, "candidates": 2.0, "band": 0.1}


def run_igsp(requests=None, fill=None, openers=None, accept=None, write=None, **changed):
    options = defaults("igsp") | CHOOSING | changed
    del options["openers"]
    openers = openers or {"x": [[3], [4, 5]], "y": [[6]]}
    return igsp.igsp(
        write or noted([] if requests is None else requests, fill), openers, accept=accept,
        **SIZE | {key: options.pop(key) for key in list(options) if key in SIZE}, **options,
    )  # fmt: skip


def test_igsp_writes_pilots_then_candidates_of_every_dimension():
    requests = []
    made = run_igsp(requests)
    *pilots, candidates = requests
    assert [r.temperatures[0] for r in pilots] == [0.8, 0.9, 1.0]
    assert all(len(r.openers) == 2 * igsp.PILOT_PIECES for r in pilots)
    assert candidates.sampling == Sampling(0.9)
    assert len(candidates.openers) == 2 * 2 * 8  # twice two pieces for each of eight rows
    assert candidates.length == 16
    assert {tuple(row[0]) for row in candidates.openers[0::2]} == {(3,), (4, 5)}
    assert {tuple(row[0]) for row in candidates.openers[1::2]} == {(6,)}
    assert made.ids.shape == (8, 32)
    assert sorted(made.tags) == ["x"] * 4 + ["y"] * 4
    assert set(made.record["temperature"]) == {"x", "y"}
    assert made.record["selected"]["J"] <= made.record["first_in_band"]["J"]
    assert made.record["pieces"]["chosen"] == 16


def test_igsp_takes_the_openers_that_leave_half_of_a_piece():
    requests = []
    long = list(range(10, 19))
    run_igsp(requests, openers={"x": [[3], long, [4] * 8], "y": [long, [5] * 10]})
    pilot, candidates = requests[0], requests[-1]
    assert {tuple(row[0]) for row in candidates.openers[0::2]} == {(3,), (4,) * 8}
    assert {tuple(row[0]) for row in candidates.openers[1::2]} == {tuple(long)}  # the shortest
    assert pilot.length == candidates.length == 16  # a piece is no longer
    requests.clear()
    run_igsp(requests, openers={"x": [[3]], "y": [[4] * 50]}, length=170, piece=170)
    assert requests[0].length == 50 + igsp.PILOT_TOKENS // 2


def test_igsp_tells_of_the_first_pieces_within_the_band():
    held, alone = [], {"x": [[3]], "y": [[6]]}
    made = run_igsp(write=keeping(held), openers=alone, band=0.2, lambda_=0.0)
    (pieces,) = [written for written in held if isinstance(written, Written)]
    groups, usable = ["x", "y"] * 16, np.ones(32, bool)
    inside = igsp.in_band(pieces.log_perplexity.numpy(), groups, usable, need=8, band=0.2)
    for place, name in enumerate("xy"):
        first = [i for i in range(place, 32, 2) if inside[i]][:8]
        assert first != list(range(place, 16, 2))  # the band takes some of the first
        perplexity = pieces.log_perplexity[first].mean().exp().item()
        assert made.record["first_in_band"]["perplexity"][name] == pytest.approx(perplexity)


def test_igsp_needs_no_pilot_without_balance():
    requests = []
    run_igsp(requests, lambda_=0.0)
    assert len(requests) == 1
    assert set(requests[0].temperatures) == {0.9}


def test_igsp_never_keeps_degenerate_pieces():
    """Some of the candidates loop, end in punctuation or copy another; none gets in."""

    def plant(ids):
        ids[0:4] = torch.tensor([1, 2] * 8)[: ids.shape[1]]
        ids[4:8] = 7
        ids[8:12] = ids[12:16]

    if_kept = {(1, 2) * 8, (7,) * 16}
    made = run_igsp(fill=lambda ids: plant(ids) if ids.shape[1] == 16 else None)
    pieces = [tuple(piece) for row in made.ids.tolist() for piece in (row[:16], row[16:])]
    assert not if_kept & set(pieces)
    assert len(set(pieces)) == len(pieces)


def test_igsp_leaves_out_what_is_refused():
    refused = []

    def accept(ids):
        refused.extend(tuple(row) for row in ids[:6].tolist())
        return [False] * 6 + [True] * (len(ids) - 6)

    made = run_igsp(accept=accept)
    pieces = {tuple(piece) for row in made.ids.tolist() for piece in (row[:16], row[16:])}
    assert not pieces & set(refused)
    assert made.record["pieces"]["refused"] == 6


def test_balanced_temperatures():
    pilot = {
        0.8: {"low": 1.0, "high": 3.0},
        0.9: {"low": 2.0, "high": 4.0},
        1.0: {"low": 3.0, "high": 5.0},
    }
    found = igsp.balanced(pilot, 0.9)  # the target is 3
    assert found == {"low": pytest.approx(1.0), "high": pytest.approx(0.8)}
    noisy = {0.8: {"a": 2.0, "b": 2.0}, 0.9: {"a": 1.0, "b": 3.0}, 1.0: {"a": 4.0, "b": 4.0}}
    assert igsp.balanced(noisy, 0.9)["a"] <= 0.9


def test_the_band_leaves_out_both_ends_and_widens_when_it_must():
    logs = np.array([0.1, 1, 2, 3, 9, 1.5, 2.5, 1.2, 1.8, np.inf])
    groups = ["a"] * 10
    usable = np.ones(10, bool)
    inside = igsp.in_band(logs, groups, usable, need=5, band=0.2)
    assert inside.sum() == 7
    assert not inside[[0, 4, 9]].any()
    assert igsp.in_band(logs, groups, usable, need=9, band=0.2).sum() == 9
    usable[1] = False
    assert not igsp.in_band(logs, groups, usable, need=5, band=0.0)[1]


def test_rows_hold_pieces_of_one_dimension():
    ids = torch.arange(8)[:, None].expand(8, 3).contiguous()
    tags = ["x", "y"] * 4
    rows, names = igsp.pack(ids, tags, list(range(8)), per_row=2, length=5, seed=0)
    assert rows.shape == (4, 5)
    for row, name in zip(rows.tolist(), names, strict=True):
        assert {value % 2 for value in row} == {0 if name == "x" else 1}
        assert len(set(row)) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": 7}, "7 rows do not divide over 2 dimensions: ask for 6 or 8"),
        ({"rows": 1}, "1 rows do not divide over 2 dimensions: ask for 2"),
        ({"candidates": 0.5}, "--candidates 0.5 writes fewer pieces than the set holds"),
        ({"band": 0.5}, r"--band 0.5 is not in \[0, 0.5\)"),
        ({"piece": 4}, "--piece 4 is too short"),
        ({"repeats": 0.0}, r"--repeats 0 is not in \(0, 1\]"),
        ({"repeats": float("nan")}, "--repeats nan is not in"),
        ({"lambda_": -1.0}, "--lambda -1.0 is not a number of 0 or more"),
    ],
)
def test_bad_igsp_requests(changed, message):
    with pytest.raises(InputError, match=message):
        run_igsp(**changed)


def test_igsp_leaves_no_piece_out_by_itself():
    held, own = [], defaults("igsp")
    made = run_igsp(write=keeping(held), candidates=own["candidates"], band=own["band"])
    (pieces,) = [one for one in held if isinstance(one, Written) and len(one.ids) == 16]
    assert sorted(made.ids.reshape(16, 16).tolist()) == sorted(pieces.ids.tolist())
    assert len(set(made.record["temperature"].values())) == 2  # yet perplexity is balanced


def test_igsp_writes_more_in_place_of_what_is_refused():
    requests, asked = [], []

    def accept(ids):
        asked.append(len(ids))
        return [len(asked) > 2] * 3 + [True] * (len(ids) - 3)  # two of x, one of y

    made = run_igsp(requests, accept=accept, candidates=1.0, band=0.0)
    assert asked == [16, 3, 3]  # what lacks, and no more: nothing is left to choose
    assert len({request.seed for request in requests[-3:]}) == 3
    assert made.record["pieces"] == {
        "tokens": 16, "a_row": 2, "written": 22, "refused": 6, "passed_over": 0, "in_band": 16,
        "chosen": 16, "looping": 0,
    }  # fmt: skip
    assert len({tuple(row) for row in made.ids.reshape(16, 16).tolist()}) == 16


def test_igsp_writes_what_loops_anew():
    """Of the first pieces seven loop, of one dimension six; a limit of 1 takes them as they are."""
    loop, seen = (1, 2) * 8, []

    def fill(ids):
        seen.append(len(ids))
        if len(ids) == 16:
            ids[[0, 2, 4, 6, 8, 10, 11]] = torch.tensor(loop)

    def pieces(made):
        return [tuple(piece) for piece in made.ids.reshape(16, 16).tolist()]

    alone = {"candidates": 1.0, "band": 0.0, "lambda_": 0.0}
    made = run_igsp(fill=fill, **alone)
    assert seen == [16, 7]
    assert loop not in pieces(made)
    assert len(set(pieces(made))) == 16
    counts = made.record["pieces"]
    assert (counts["refused"], counts["passed_over"], counts["looping"]) == (0, 7, 0)
    made = run_igsp(fill=fill, repeats=1.0, **alone)
    assert seen == [16, 7, 16]
    assert pieces(made).count(loop) == 7
    assert made.record["pieces"]["looping"] == 0


def test_igsp_takes_what_loops_least_where_all_does():
    rounds = []

    def fill(ids):
        rounds.append(len(ids))
        ids[:: 2 if len(ids) == 16 else 1, : 15 - len(rounds)] = 7  # x; less of it, round by round

    made = run_igsp(fill=fill, candidates=1.0, band=0.0, lambda_=0.0)
    assert rounds == [16] + [8] * 7  # of x alone
    assert made.record["pieces"]["looping"] == 8
    runs = [(piece == 7).sum().item() for piece in made.ids.reshape(16, 16)]
    assert sorted(runs) == [0] * 8 + [7] * 8


def test_all_candidates_refused():
    with pytest.raises(InputError, match="8 pieces of x are needed, and of 72 written only 0 can"):
        run_igsp(accept=lambda ids: [False] * len(ids))


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("igsp", {"repeats": 5.0}, r"--repeats 5 is not in \(0, 1\]"),
        ("igsp", {"candidates": 2.0, "band": 0.7}, "--band 0.7 is not in"),
        ("igsp", {"temperature": -1.0}, "--temperature -1.0 is not a positive number"),
        ("sgs", {"drop": 1.0}, "--drop 1.0 is not in"),
        ("sgs", {"top_p": 0.0}, "--top-p 0.0 is not in"),
        ("self-cal", {"ramp": 3}, "--start-temperature and --ramp only have an effect together"),
    ],
)
def test_values_out_of_range_are_refused_before_a_model_is_opened(method, given, message):
    with pytest.raises(InputError, match=message):
        settings(method, given)


def test_options_of_another_method_are_refused():
    with pytest.raises(InputError, match="--candidates has no effect with sgs: leave it out"):
        settings("sgs", {"candidates": 2.0})
    with pytest.raises(InputError, match="--lambda has no effect with self-cal"):
        settings("self-cal", {"lambda_": 1.0})
    for given in ({"band": 0.1}, {"lambda_": 2.0, "candidates": 1.0}):
        name = next(iter(given)).rstrip("_")
        with pytest.raises(InputError, match=f"--{name} has no effect with --candidates 1, which"):
            settings("igsp", given)
        settings("igsp", given | {"candidates": 1.5})
    settings("igsp", {"band": 0.0, "lambda_": 0.0})  # no pilot
    with pytest.raises(InputError, match="unknown method 'igps': did you mean igsp"):
        settings("igps", {})
    with pytest.raises(InputError, match="--start has no effect with igsp"):
        settings("igsp", {"start": "bos"})
    with pytest.raises(InputError, match="unknown start 'seperator': did you mean separator"):
        settings("self-cal", {"start": "seperator"})
    assert settings("sgs", {"top_k": None})["top_k"] == 50


@pytest.mark.parametrize("method", ["igsp", "self-cal", "sgs"])
def test_sets_of_a_tiny_model(method, opened, text_file):
    options = {"seeds": str(text_file)} if method == "sgs" else {}
    made = generate(method, opened, rows=4, length=40, seed=1, **options)
    assert made.ids.shape == (4, 40)
    again = generate(method, opened, rows=4, length=40, seed=1, **options)
    assert again.sha256 == made.sha256
    assert generate(method, opened, rows=4, length=40, seed=2, **options).sha256 != made.sha256
    assert made.manifest["generated"] == method
    assert made.manifest["model"]["fingerprint"] == opened.fingerprint
    assert 0 <= made.manifest["aggregation_4"] < 1
    assert made.counts == (dict.fromkeys(made.counts, 1) if method == "igsp" else {method: 4})


def test_a_model_that_recites_the_suite_is_found_out(opened, monkeypatch):
    from calmix.calibration.leakage import Guard, ItemIndex

    plain = generate("self-cal", opened, rows=4, length=40, seed=1)
    item = plain.ids[2, 10:30].tolist()
    guard = Guard("mine", ItemIndex([("task", "1", "x")], lambda texts: [item], 13))
    made = generate("self-cal", opened, rows=4, length=40, seed=1, guard=guard)
    assert guard.dropped["self-cal"] == [{"document": "2", "task": "task", "item": "1"}]
    assert made.rows == 4
    kept = [tuple(row) for row in made.ids.tolist()]
    assert tuple(plain.ids[2].tolist()) not in kept
    assert kept[:3] == [tuple(plain.ids[i].tolist()) for i in (0, 1, 3)]
    always = Guard("mine", ItemIndex([("task", "1", "x")], lambda texts: [item], 13))
    monkeypatch.setattr(always, "passes", lambda *arguments: False)
    with pytest.raises(InputError, match="the model recites them; --leakage off"):
        generate("self-cal", opened, rows=2, length=40, seed=1, guard=always)


def test_builtin_openers(opened):
    builtin = load_openers()
    assert set(builtin.dimensions) == {"general", "commonsense", "code", "math"}
    ids = tokenised(builtin, opened.tokenizer)
    assert [1] in ids["general"]  # the begin token alone
    counts = [len(rows) for rows in ids.values()]
    assert min(counts) >= 10
    assert all(len(set(map(tuple, rows))) == len(rows) for rows in ids.values())


def test_openers_use_the_chat_template_from_the_users_words_on(tmp_path):
    path = tmp_path / "openers.yaml"
    path.write_text("only: [{ask: Tell me.}, {text: 'Once'}]", encoding="utf-8")
    tokenizer = tiny_tokenizer()
    plain = tokenised(load_openers(path), tokenizer)["only"]
    assert tokenizer.decode(plain[0]) == "Tell me.\n\n"
    tokenizer.chat_template = (
        "system: be good\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = tokenised(load_openers(path), tokenizer)["only"]
    assert tokenizer.decode(chat[0]) == "Tell me.\nassistant: "
    assert tokenizer.decode(chat[1]) == "Once"


def test_a_begin_token_the_tokenizer_adds_comes_first(tmp_path):
    path = tmp_path / "openers.yaml"
    path.write_text("only: [{begin: true}, {text: a}]", encoding="utf-8")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert tokenised(load_openers(path), tokenizer)["only"] == [
        [1],
        [1, tokenizer("a")["input_ids"][1]],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("general: []", "dimension general has no openers"),
        ("{}", "names no dimension"),
        ("general: [{text: a, ask: b}]", "give exactly one of 'text', 'ask' and 'begin: true'"),
        ("general: [{tekst: a}]", "unknown key"),
        ("general: word", "'general': "),
        ("general: [{text: ''}]", "opener 1 of dimension general in .* becomes no token"),
        ("general: [{ask: ' '}]", "opener 1 of dimension general in .* becomes no token"),
    ],
)
def test_bad_openers(text, message, tmp_path):
    path = tmp_path / "openers.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        tokenised(load_openers(path), tiny_tokenizer())


def test_a_dimension_that_only_begins_needs_a_start(tmp_path, monkeypatch):
    path = tmp_path / "openers.yaml"
    path.write_text("general: [{begin: true}]", encoding="utf-8")
    monkeypatch.setattr(openers, "END_OF_TEXT", ())
    with pytest.raises(InputError, match="without begin token and document separator"):
        tokenised(load_openers(path), chat_tokenizer(None, None, None))
