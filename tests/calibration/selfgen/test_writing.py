"""Sampling rows: openers, restarts, a seed per row, the cache, and the limits of memory."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import TopKLogitsWarper, TopPLogitsWarper

from calmix import memory
from calmix.calibration.selfgen.writing import WriteRequest, sample, write
from calmix.errors import InputError
from calmix.files import cache_dir
from tests.tiny import ARCHITECTURES, quick, tiny_model

END = 2  # of the tiny tokenizer
LOGITS = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0, 1.5]])


def request(rows=6, length=24, seed=0, openers=None, temperature=1.0, **how):
    openers = openers or [[[10 + i, 20 + i, 30 + i], [40 + i]] for i in range(rows)]
    return WriteRequest(openers, length, [temperature] * len(openers), seed, **how)


def kept():
    """The parts that are in the cache."""
    return sorted(cache_dir().rglob("*.safetensors"))


def forget():
    for file in kept():
        file.unlink()


def test_sampling_matches_transformers_distribution():
    count = 20_000  # over an even grid of uniform numbers
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    for temperature, cut in (
        (0.6, {}),
        (1.7, {}),
        (1.0, {"top_k": 3}),
        (1.0, {"top_k": 1}),
        (1.0, {"top_p": 0.35}),
        (0.6, {"top_k": 4, "top_p": 0.8}),
    ):
        heat = torch.full((count,), temperature)
        tokens = sample(LOGITS.expand(count, -1), heat, uniform, **cut)
        actual = torch.bincount(tokens, minlength=LOGITS.shape[1]) / count
        scores = LOGITS / temperature
        for name, value in cut.items():  # in the order of transformers
            scores = warpers[name](value)(None, scores)
        torch.testing.assert_close(actual, scores.softmax(-1)[0], atol=3e-4, rtol=0)

    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, torch.ones(4), uniform).tolist() == [1, 1, 3, 3]
    uniform = torch.full((2,), 0.999, dtype=torch.float64)  # rows have different temperatures
    assert sample(LOGITS.expand(2, -1), torch.tensor([0.01, 100.0]), uniform).tolist() == [0, 5]


def ending(opened, bias):
    """Make the end token likely in a `with`."""

    def more(module, args, output):
        output[..., END] += bias
        return output

    return opened.model.get_output_embeddings().register_forward_hook(more)


def test_rows_start_with_openers_and_record_likelihood(opened, monkeypatch):
    asked = request(temperature=0.7, repetition_penalty=1.5)
    drawn_set = write(opened, asked)
    assert drawn_set.ids.shape == (6, 24)
    assert drawn_set.ids[:, :3].tolist() == [[10 + i, 20 + i, 30 + i] for i in range(6)]
    assert not drawn_set.sampled[:, :3].any()
    assert drawn_set.sampled[:, 3:4].all()
    logits = opened.model(drawn_set.ids).logits[:, :-1].flatten(0, 1)
    nll = F.cross_entropy(logits, drawn_set.ids[:, 1:].flatten(), reduction="none").view(6, -1)
    torch.testing.assert_close(drawn_set.nll[:, 1:], nll, atol=1e-4, rtol=1e-4)
    assert drawn_set.nll[:, 0].isnan().all()
    forget()
    config = type(opened.model.generation_config)  # which is ignored, and stays
    changed = config(repetition_penalty=9.0, temperature=0.1, top_k=1, eos_token_id=[2])
    monkeypatch.setattr(opened.model, "generation_config", changed)
    assert torch.equal(write(opened, asked).ids, drawn_set.ids)
    assert opened.model.generation_config is changed


def test_next_opener_follows_the_end_token(opened):
    with ending(opened, 4.0):
        drawn_set = write(opened, request(rows=8, length=48))
    restarts = 0
    for i in range(8):
        turns, texts = [[10 + i, 20 + i, 30 + i], [40 + i]], [[]]
        sampled = drawn_set.sampled[i].tolist()
        for at, token in enumerate(drawn_set.ids[i].tolist()):
            if at and sampled[at - 1] and not sampled[at]:  # a new text begins
                texts.append([])
            texts[-1].append(token)
        for number, content in enumerate(texts):
            opener = turns[number % 2]
            assert content[: len(opener)] == opener[: len(content)]
            if number < len(texts) - 1:
                assert content[-1] == END
                assert END not in content[len(opener) : -1]
                restarts += 1
    assert restarts > 8


@pytest.mark.parametrize("kind", quick(["gemma3_text"], (*ARCHITECTURES, "rwkv")))
def test_rows_are_independent_of_batch_size(opened, kind):
    other = dataclasses.replace(opened, model=tiny_model(kind))
    requests, parts = request(rows=7, length=12, temperature=0.9, repetition_penalty=1.1), []
    for batch in (1, 3, 7):
        forget()
        parts.append(write(other, requests, batch=batch))
    assert parts[0].nll[:, 1:].isfinite().all()
    assert all(torch.equal(parts[0].ids, part.ids) for part in parts)


def test_interrupted_writing_resumes(opened):
    whole = write(opened, request(seed=5), batch=2)
    forget()
    notes = []

    def interrupt(done, total):
        if done > 2 * 2 * 24:  # within the third part
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(opened, request(seed=5), batch=2, progress=interrupt)
    assert len(kept()) == 2
    again = write(opened, request(seed=5), batch=4, progress=lambda *of: notes.append(of))
    assert notes[:2] == [(2 * 24, 6 * 24), (4 * 24, 6 * 24)]  # from the cache
    assert notes[-1] == (6 * 24, 6 * 24)
    assert torch.equal(again.nll.nan_to_num(), whole.nll.nan_to_num())
    kept()[1].write_bytes(b"damaged")
    for drawn_set in (again, write(opened, request(seed=5))):
        assert torch.equal(drawn_set.ids, whole.ids)


def test_batches_shrink_when_memory_is_short(opened, monkeypatch):
    plain, notes = write(opened, request(seed=7)).ids, []
    forget()
    monkeypatch.setattr(memory, "device_memory", lambda device: (0, 60_000, None))
    assert torch.equal(write(opened, request(seed=7), note=notes.append).ids, plain)
    (note,) = notes
    assert note.startswith("memory holds ")
    assert note.endswith(" rows at a time, not 6: writing in smaller batches")
    monkeypatch.setattr(memory, "device_memory", lambda device: (0, 0, None))
    with pytest.raises(InputError, match="memory does not hold one row of 24 tokens"):
        write(opened, request(seed=70))
    monkeypatch.setattr(memory, "device_memory", lambda device: (0, 10**12, None))
    real = opened.model.generate

    def small_only(ids, **how):
        if len(ids) > 2:
            raise RuntimeError(said[-1])
        return real(ids, **how)

    monkeypatch.setattr(opened.model, "generate", small_only)
    said, warnings = [], []
    how = {"note": notes.append, "progress": lambda *of: warnings.append(of)}
    for line in (
        "DefaultCPUAllocator: can't allocate memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling it",
    ):
        said.append(line)
        forget()
        notes.clear()
        assert torch.equal(write(opened, request(seed=7), **how).ids, plain)
        assert [n.partition(": ")[2] for n in notes] == ["resuming with 3", "resuming with 1"]
        assert warnings[-1] == (6 * 24, 6 * 24)
    forget()
    said.append("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        write(opened, request(seed=7), note=notes.append)
    assert len(notes) == 2


def test_empty_requests_are_refused(opened):
    with (
        ending(opened, 50.0),
        pytest.raises(InputError, match=r"ends 57 of 57 texts \(100%\) before their first"),
    ):
        write(opened, request(rows=3, length=38, openers=[[[9]]] * 3))
    with pytest.raises(InputError, match="leave the model nothing to write"):
        write(opened, request(length=1))
