"""Writing rows: exact openers, restarts, seeds a row, the cache, and what memory allows."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from calmix.calibration.selfgen import writing
from calmix.calibration.selfgen.sampling import Sampling
from calmix.calibration.selfgen.writing import Request, end_tokens, write
from calmix.errors import InputError
from tests.tiny import ARCHITECTURES, tiny_model

END = 2  # of the tiny tokenizer


def request(rows=6, length=24, seed=0, sampling=None, openers=None):
    openers = openers or [[[10 + i, 20 + i, 30 + i], [40 + i]] for i in range(rows)]
    return Request(openers, length, sampling or Sampling(), seed)


def ending(opened, bias):
    """The tiny model with the end token made likely."""

    def more(module, args, output):
        output[..., END] += bias
        return output

    return opened.model.get_output_embeddings().register_forward_hook(more)


def test_rows_begin_with_their_openers_and_are_full(opened):
    asked = request()
    made = write(opened, asked)
    assert made.ids.shape == (6, 24)
    for i in range(6):
        assert made.ids[i, :3].tolist() == [10 + i, 20 + i, 30 + i]
    assert not made.sampled[:, :3].any()
    assert made.sampled[:, 3:4].all()


def test_nll_is_the_models_own(opened):
    made = write(opened, request(sampling=Sampling(temperature=0.7, repetition_penalty=1.5)))
    logits = opened.model(made.ids).logits[:, :-1].flatten(0, 1)
    nll = F.cross_entropy(logits, made.ids[:, 1:].flatten(), reduction="none").view(6, -1)
    torch.testing.assert_close(made.nll[:, 1:], nll, atol=1e-4, rtol=1e-4)
    assert made.nll[:, 0].isnan().all()
    own = torch.stack([nll[i][made.sampled[i, 1:]].mean() for i in range(6)])
    torch.testing.assert_close(made.log_perplexity, own.double(), atol=1e-4, rtol=1e-4)


def test_after_the_end_token_the_next_opener_follows(opened):
    handle = ending(opened, 4.0)
    try:
        made = write(opened, request(rows=8, length=48))
    finally:
        handle.remove()
    restarts = 0
    for i in range(8):
        turns = [[10 + i, 20 + i, 30 + i], [40 + i]]
        text = made.text[i].tolist()
        assert text == sorted(text)
        for number in range(text[-1] + 1):
            held = made.ids[i][made.text[i] == number].tolist()
            opener = turns[number % 2]
            assert held[: len(opener)] == opener[: len(held)]
            if number < text[-1]:
                assert held[-1] == END
                assert END not in held[len(opener) : -1]
                restarts += 1
    assert restarts > 8


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "opt"])
def test_batches_do_not_change_the_rows(opened, kind):
    other = dataclasses.replace(opened, model=tiny_model(kind))
    asked = request(rows=7, sampling=Sampling(temperature=0.9, repetition_penalty=1.1))
    parts = []
    for batch in (1, 3, 7):
        for file in writing._folder(other, asked, end_tokens(other)).glob("*"):
            file.unlink()
        parts.append(write(other, asked, batch=batch).ids)
    assert torch.equal(parts[0], parts[1])
    assert torch.equal(parts[0], parts[2])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_writes(opened, kind):
    other = dataclasses.replace(opened, model=tiny_model(kind))
    made = write(other, request(rows=2, length=8))
    assert made.ids.shape == (2, 8)
    assert made.nll[:, 1:].isfinite().all()


def test_seeds(opened):
    first = write(opened, request(seed=3)).ids
    assert torch.equal(first, write(opened, request(seed=3)).ids)
    assert not torch.equal(first, write(opened, request(seed=4)).ids)
    same = [[[10], [11]]] * 6  # the rows of one request differ even with one opener
    assert len({tuple(row) for row in write(opened, request(openers=same)).ids.tolist()}) == 6


def test_repetition_penalty_forgets_earlier_texts(opened):
    """With a crushing penalty no token comes twice in a text, but one may in a row."""
    handle = ending(opened, 3.0)
    try:
        made = write(opened, request(length=60, sampling=Sampling(repetition_penalty=1e6)))
    finally:
        handle.remove()
    again = 0
    for i in range(len(made.ids)):
        seen = set()
        for number in range(int(made.text[i, -1]) + 1):
            own = (made.text[i] == number) & made.sampled[i]
            # Negative logits are pushed down, positive ones to zero, which may still be drawn;
            # so only tokens of clearly negative logits are sure not to return.
            tokens = set(made.ids[i][own].tolist())
            again += len(tokens & seen)
            seen |= tokens
    assert again > 0


def test_the_models_own_generation_settings_have_no_say(opened):
    plain = write(opened, request(seed=8)).ids
    config = opened.model.generation_config
    changed = type(config)(repetition_penalty=9.0, temperature=0.1, top_k=1, eos_token_id=[2])
    opened.model.generation_config = changed
    try:
        for file in writing._folder(opened, request(seed=8), [2]).glob("*"):
            file.unlink()
        assert torch.equal(write(opened, request(seed=8)).ids, plain)
        assert opened.model.generation_config is changed
    finally:
        opened.model.generation_config = config


def test_interrupted_work_goes_on(opened, monkeypatch):
    whole = write(opened, request(seed=5), batch=2)
    for file in writing._folder(opened, request(seed=5), [2]).glob("*"):
        file.unlink()
    real, calls = writing._batch, []

    def fails_at_third(*arguments):
        calls.append(arguments[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(writing, "_batch", fails_at_third)
    with pytest.raises(KeyboardInterrupt):
        write(opened, request(seed=5), batch=2)
    ticks = []
    again = write(opened, request(seed=5), batch=4, tick=ticks.append)
    assert calls == [0, 2, 4, 4]
    assert ticks[0] == 4 * 24  # from the cache
    assert sum(ticks) == 6 * 24
    assert torch.equal(again.ids, whole.ids)
    assert torch.equal(again.nll.nan_to_num(), whole.nll.nan_to_num())
    calls.clear()
    write(opened, request(seed=5))
    assert calls == []


def test_a_damaged_part_is_written_again(opened):
    whole = write(opened, request(seed=6), batch=3)
    folder = writing._folder(opened, request(seed=6), [2])
    (folder / "00000003.safetensors").write_bytes(b"damaged")
    assert torch.equal(write(opened, request(seed=6)).ids, whole.ids)


def test_little_memory_means_smaller_batches(opened, monkeypatch):
    plain = write(opened, request(seed=7)).ids
    for file in writing._folder(opened, request(seed=7), [2]).glob("*"):
        file.unlink()
    monkeypatch.setattr(writing, "_room", lambda opened, length: 2)
    notes = []
    assert torch.equal(write(opened, request(seed=7), note=notes.append).ids, plain)
    assert notes == ["memory holds 2 rows at a time, not 6: writing in smaller batches"]
    monkeypatch.setattr(writing, "_room", lambda opened, length: 0)
    with pytest.raises(InputError, match="memory does not hold one row of 24 tokens"):
        write(opened, request(seed=70))


def test_running_out_of_memory_halves_the_batch(opened, monkeypatch):
    real = writing._batch

    def small_only(opened, part, *rest):
        if len(part.openers) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(opened, part, *rest)

    monkeypatch.setattr(writing, "_batch", small_only)
    notes = []
    assert write(opened, request(), note=notes.append).ids.shape == (6, 24)
    assert notes == [
        "out of memory with 6 rows at a time: going on with 3",
        "out of memory with 3 rows at a time: going on with 1",
    ]


def test_a_model_that_only_ends_its_texts_is_refused(opened):
    handle = ending(opened, 50.0)
    try:
        with pytest.raises(InputError, match=r"ends 54 of 54 texts \(100%\) before their first"):
            write(opened, request(rows=3, length=38, openers=[[[9]]] * 3))
    finally:
        handle.remove()


@pytest.mark.parametrize(("batch", "length"), [(0, 8), (4, 1)])
def test_bad_sizes(opened, batch, length):
    with pytest.raises(InputError, match=r"not positive|nothing the model could write"):
        write(opened, request(length=length), batch=batch)
