"""Pruning from disk to disk: the same numbers, interruption at any moment, bounded memory."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calmix.errors import DiskError, InputError, ModelError
from calmix.models import open_model
from calmix.models.shards import ShardWriter
from calmix.models.streaming import NotStreamableError, StreamedModel
from calmix.pruning import SemiStructured, Unstructured, checkpoint, get_method, prune, streamed
from calmix.pruning import old_work as work_module
from calmix.pruning.budget import Plan
from calmix.pruning.engine import Run
from calmix.pruning.gram import Gram
from calmix.pruning.old_states import KeptStates
from calmix.pruning.old_work import WorkFolder
from calmix.pruning.report import PruneReport
from calmix.pruning.streamed import Target, prepare_files, prune_streamed
from calmix.pruning.trace import token_bytes
from calmix.recovery.checkpoint import streamed as streamed_for_recovery
from tests.forks import stopped
from tests.pruning.stopper import arm
from tests.tiny import ARCHITECTURES, save_tiny_model, tiny_config, tiny_ids, tiny_tokenizer

SMALL = ("--rows", 6, "--length", 32)
HALF = Unstructured(0.5)
PLENTY = Plan(5 * 32, None, True, 0, states=2**30)
BATCH = 5 * 32 * 32 * 4  # bytes of the hidden states of a micro-batch


@pytest.fixture(autouse=True)
def _every_block_counts(monkeypatch):
    """What is done is kept at once, not every so many seconds."""
    monkeypatch.setattr(work_module, "SAVING", 0)


def hashes(folder):
    """Hashes of all files but the run record, which holds date and seconds."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name != "calmix-run.json"
    }


def target(output, method="sparsegpt", pattern=HALF, propagation="sequential"):
    """A target with its work folder claimed."""
    work = WorkFolder(output)
    work.claim({}, resume=False, overwrite=True)
    return Target(work=work, method=get_method(method), pattern=pattern, propagation=propagation)


def streamed_prune(folder, targets, ids, plan=PLENTY):
    """Prune from disk to disk and return the tensors written for each target."""
    streamed = StreamedModel(str(folder))
    try:
        for one in targets:
            prepare_files(streamed, one.work)
        reports = prune_streamed(streamed, ids, targets, plan)
        for one, report in zip(targets, reports, strict=True):
            assert report.sparsity == pytest.approx(one.pattern.sparsity, abs=0.01)
        return [load_file(one.work.checkpoint / "model.safetensors") for one in targets]
    finally:
        streamed.close()
        for one in targets:
            one.work.abandon()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_weights_are_those_of_a_prune_in_memory(kind, tmp_path):
    folder = save_tiny_model(tmp_path / "model", kind)
    opened = open_model(str(folder))
    prune(opened.model, tiny_ids(), pattern=Unstructured(0.5), micro_tokens=5 * 32)
    opened.model.save_pretrained(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    (found,) = streamed_prune(folder, [target(tmp_path / "out")], tiny_ids())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["mamba2", "gemma3n_text"])
def test_states_of_another_type_or_shape_give_the_same_bytes(kind, tmp_path):
    """In a bfloat16 model blocks may return float32, or several streams; memory tells of it."""
    folder = save_tiny_model(tmp_path / "model", kind)
    model = open_model(str(folder), dtype="bfloat16").model
    prune(model, tiny_ids(), pattern=HALF, micro_tokens=5 * 32)
    for states in (0, 3 * BATCH // 2):
        streamed = StreamedModel(str(folder), dtype="bfloat16")
        wide = 4 if kind == "gemma3n_text" else 2
        assert token_bytes(streamed.model, streamed.blocks) == wide * 2 * 32
        assert all(p.is_meta for p in streamed.model.parameters())
        one = target(tmp_path / "out")
        prepare_files(streamed, one.work)
        prune_streamed(streamed, tiny_ids(), [one], Plan(5 * 32, None, True, 0, states=states))
        found = load_file(one.work.checkpoint / "model.safetensors")
        streamed.close()
        one.work.abandon()
        for name, value in model.state_dict().items():
            if name in found:
                assert torch.equal(found[name].bfloat16(), value), name


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_buffers_come_from_the_files(tmp_path, prefix):
    """Gemma 4 scales what a layer returns by a buffer of its checkpoint."""
    folder = save_tiny_model(tmp_path / "model", "gemma4_text")
    stored = load_file(folder / "model.safetensors")
    for name in stored:
        if name.endswith("layer_scalar"):
            stored[name].fill_(0.25)
    save_file(
        {name.replace("model.", prefix, 1): value for name, value in stored.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    opened = open_model(str(folder))
    prune(opened.model, tiny_ids(), pattern=HALF, micro_tokens=5 * 32)
    (found,) = streamed_prune(folder, [target(tmp_path / "out")], tiny_ids())
    for name, tensor in opened.model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(found[name.replace("model.", prefix, 1)], tensor), name


def test_buffers_the_files_lack_are_those_of_a_model_opened_whole(tmp_path):
    """GPT-J's positions, which the type the model is made in would round."""
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    folder = save_tiny_model(tmp_path / "model", "gptj", **small)
    whole = dict(open_model(str(folder), dtype="bfloat16").model.named_buffers())
    made = dict(StreamedModel(str(folder), dtype="bfloat16").model.named_buffers())
    assert made.keys() == whole.keys()
    assert all(torch.equal(made[name], value) for name, value in whole.items())


def test_a_buffer_the_files_lack_makes_the_model_be_opened_whole(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "gemma4_text")
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.0.layer_scalar"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotStreamableError, match=r"layers\.0\.layer_scalar"):
        StreamedModel(str(folder))


def test_blocks_that_share_weights_make_the_model_be_opened_whole(tmp_path):
    """Zamba's second transformer is its first, though files may hold a copy for each."""
    folder = save_tiny_model(tmp_path / "model", "zamba")
    whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    stored = {name: value.clone() for name, value in whole.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotStreamableError, match=r"share weights \(first model\.layers\.3\."):
        StreamedModel(str(folder))
    with pytest.raises(ModelError, match="cannot be recovered, because its blocks share weights"):
        streamed_for_recovery(str(folder), "float32", "cpu", trust_remote_code=False)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(5 * 32, 0, False, 0),
        Plan(5 * 32, 1, True, 0, states=BATCH),
        Plan(5 * 32, 2, False, 0, states=2 * BATCH),
    ],
    ids=str,
)
def test_plans_with_less_memory_give_the_same_bytes(tmp_path, tiny_folder, plan):
    (expected,) = streamed_prune(tiny_folder, [target(tmp_path / "a")], tiny_ids())
    (found,) = streamed_prune(tiny_folder, [target(tmp_path / "b")], tiny_ids(), plan)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["llama", "gemma4_text"])
@pytest.mark.parametrize("propagation", ["sequential", "block"])
def test_several_targets_give_the_bytes_of_each_alone(tmp_path, kind, propagation):
    model = save_tiny_model(tmp_path / "model", kind)

    def wanted(folder):
        return [
            target(folder / "a", "sparsegpt", Unstructured(0.5), propagation),
            target(folder / "b", "sparsegpt", SemiStructured(2, 4), propagation),
            target(folder / "c", "wanda", Unstructured(0.7), propagation),
            target(folder / "d", "magnitude", Unstructured(0.3), propagation),
        ]

    together = streamed_prune(model, wanted(tmp_path / "all"), tiny_ids())
    for number, found in enumerate(together):
        one = wanted(tmp_path / str(number))[number]
        (alone,) = streamed_prune(model, [one], tiny_ids())
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_the_first_statistic_is_summed_once(tmp_path, tiny_folder, monkeypatch):
    counted = []
    add = Gram.add
    monkeypatch.setattr(Gram, "add", lambda self, x: (counted.append(1), add(self, x)))
    streamed_prune(tiny_folder, [target(tmp_path / "one")], tiny_ids())
    alone = len(counted)
    counted.clear()
    two = [target(tmp_path / "a"), target(tmp_path / "b", pattern=Unstructured(0.6))]
    streamed_prune(tiny_folder, two, tiny_ids())
    batches = 3
    assert len(counted) == 2 * alone - batches


def test_half_precision_and_several_files(tmp_path):
    """A checkpoint of several files keeps its files, and its type."""
    folder = tmp_path / "model"
    opened = open_model(str(save_tiny_model(tmp_path / "first")))
    opened.model.bfloat16().save_pretrained(folder, max_shard_size="20KB")
    opened.tokenizer.save_pretrained(folder)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 2
    streamed = StreamedModel(str(folder), dtype="bfloat16")
    one = target(tmp_path / "out", "wanda", propagation="block")
    work = one.work
    prepare_files(streamed, work)
    prune_streamed(streamed, tiny_ids(), [one], Plan(2048, None, True, 0, states=2**30))
    work.writer.write_index()
    streamed.model.config.save_pretrained(work.checkpoint)
    assert sorted(p.name for p in work.checkpoint.glob("*.safetensors")) == files
    found = AutoModelForCausalLM.from_pretrained(work.checkpoint, dtype="auto")
    assert found.dtype == torch.bfloat16
    whole = open_model(str(folder), dtype="bfloat16").model
    prune(whole, tiny_ids(), method="wanda", pattern=Unstructured(0.5), propagation="block")
    for (name, a), b in zip(found.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name
    streamed.close()
    work.abandon()


def test_only_the_block_at_hand_is_in_memory(tiny_folder):
    streamed = StreamedModel(str(tiny_folder))
    streamed.fetch(1)
    real = {n for n, p in streamed.model.named_parameters() if not p.is_meta}
    assert real == set(streamed.block_names(1))
    assert {streamed.names[name] for name in real} == set(streamed.weights(1))
    streamed.drop(1)
    assert all(p.is_meta for p in streamed.model.parameters())
    streamed.close()


def test_the_largest_block_decides_the_plan(tmp_path, monkeypatch):
    """Gemma 4's full attention is wider than its sliding one."""
    seen = []
    monkeypatch.setattr(streamed, "make_plan", lambda sizes, *rest, **how: seen.append(sizes))
    opened = StreamedModel(str(save_tiny_model(tmp_path / "model", "gemma4_text")))
    streamed.plan_for(opened, tiny_ids(), [target(tmp_path / "out")], budget=2**40)
    shapes = [[layer.shape for layer in opened.blocks.prunables(index)] for index in (0, 1)]
    assert shapes[0] != shapes[1]
    assert [sizes.layers for sizes in seen] == [shapes[1]]
    opened.close()


def deep_model(folder):
    """A tiny llama of five blocks, so that there is a middle to end in."""
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.num_hidden_layers = 5
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return deep_model(tmp_path_factory.mktemp("deep") / "model")


@pytest.mark.parametrize(
    ("moment", "block", "method"),
    [
        ("solved", 2, "sparsegpt"),
        ("renamed", 0, "sparsegpt"),
        ("written", 3, "magnitude"),
        pytest.param("written", 2, "sparsegpt", marks=pytest.mark.long),
        pytest.param("counted", 0, "sparsegpt", marks=pytest.mark.long),
        pytest.param("counted", 4, "wanda", marks=pytest.mark.long),
        pytest.param("solved", 0, "wanda", marks=pytest.mark.long),
    ],
)
def test_a_killed_prune_goes_on_to_the_same_bytes(
    calmix, deep, text_file, tmp_path, moment, block, method
):
    data = () if method == "magnitude" else ("--calibration", text_file, *SMALL)
    command = ("prune", deep, "--method", method, *data, "--sparsity", 0.5, "-o")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stopped(partial(arm, moment, block), *command, cut)
    ended = calmix(*command, cut, "--resume")
    assert ended.code == 0, ended.err
    if moment == "renamed":
        assert "finished by an earlier run" in ended.err
    elif (moment, block) != ("solved", 0):
        assert "going on after" in ended.err
    assert calmix(*command, whole).code == 0
    assert hashes(cut) == hashes(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "text.txt", "whole"]


def test_what_stands_in_the_way_of_going_on(calmix, deep, text_file, tmp_path):
    output = tmp_path / "out"
    command = ("prune", deep, "--calibration", text_file, *SMALL, "-o", output)
    stopped(partial(arm, "counted", 1), *command, "--sparsity", 0.5)
    ended = calmix(*command, "--sparsity", 0.5)
    assert ended.code == 2
    assert "2 blocks done: go on with --resume" in ended.line
    ended = calmix(*command, "--sparsity", 0.6, "--resume")
    assert ended.code == 2
    assert "another request (sparsity: 0.5, now 0.6)" in ended.line
    ended = calmix(*command, "--sparsity", 0.6, "--overwrite")
    assert ended.code == 0, ended.err
    assert json.loads((output / "calmix.json").read_text())["pruning"]["pattern"] == "0.6"
    assert not output.with_name("out.unfinished").exists()


def test_only_versions_that_may_change_the_bytes_are_another_request(
    calmix, deep, text_file, tmp_path, monkeypatch
):
    command = ("prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")
    stopped(partial(arm, "counted", 1), *command, tmp_path / "out")
    real, others = importlib.metadata.version, {}
    monkeypatch.setattr(importlib.metadata, "version", lambda n: others.get(n) or real(n))
    others["torch"] = "1.0"
    ended = calmix(*command, tmp_path / "out", "--resume")
    assert ended.code == 2
    assert f"is the work of another request (torch: {real('torch')}, now 1.0)" in ended.line
    others.clear()
    others |= {"rich": "1.0", "psutil": "2.0"}
    ended = calmix(*command, tmp_path / "out", "--resume")
    assert ended.code == 0, ended.err
    changed = f"psutil: {real('psutil')}, now 2.0; rich: {real('rich')}, now 1.0"
    assert f"other versions than at the start ({changed}): the result is the same" in ended.err
    others.clear()
    assert "finished by an earlier run" in calmix(*command, tmp_path / "out", "--resume").err
    assert calmix(*command, tmp_path / "whole").code == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def interrupt_before(patched, number):
    """Make a prune end by an interrupt before a block."""
    block = Run.block

    def interrupted(self, index):
        if index == number:
            raise KeyboardInterrupt
        block(self, index)

    patched.setattr(Run, "block", interrupted)


def test_an_interrupt_says_how_to_go_on(calmix, deep, text_file, tmp_path, monkeypatch):
    command = ("prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")
    with monkeypatch.context() as patched:
        interrupt_before(patched, 3)
        ended = calmix(*command, tmp_path / "out")
    assert ended.code == 130
    assert f"3 blocks are kept in {tmp_path / 'out.unfinished'}: --resume goes on" in ended.err
    assert calmix(*command, tmp_path / "out", "--resume").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]


def test_between_checkpoints_nothing_waits_for_the_disk(
    calmix, deep, text_file, tmp_path, monkeypatch
):
    """Of five blocks the second, the fourth and the last count; a clock ticks once a block."""
    ticks = iter(range(100))
    monkeypatch.setattr(work_module, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    waited = []
    for kind in (ShardWriter, KeptStates):
        sync = kind.sync
        monkeypatch.setattr(
            kind, "sync", lambda self, *side, sync=sync: (waited.append(1), sync(self, *side))[1]
        )
    command = ("prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")
    every = ("--checkpoint-every", 2)
    assert calmix(*command, tmp_path / "whole", *every).code == 0
    assert len(waited) == 5  # three times the weights, twice the states that lead on
    with monkeypatch.context() as patched:
        interrupt_before(patched, 3)
        ended = calmix(*command, tmp_path / "cut", *every)
    assert ended.code == 130
    assert "2 blocks are kept" in ended.err
    ended = calmix(*command, tmp_path / "cut", "--resume")
    assert "going on after 2 of 5 blocks" in ended.err
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_an_interrupt_keeps_the_block_that_is_being_written(
    calmix, deep, text_file, tmp_path, monkeypatch
):
    asked = threading.Event()

    class Late(ThreadPoolExecutor):
        """Begins to write when it is asked to end."""

        def submit(self, *job):
            if job != (int,):  # which starts the thread and is waited for
                super().submit(asked.wait, 60)
            return super().submit(*job)

        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            asked.set()
            super().shutdown(wait=wait)

    command = ("prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")
    with monkeypatch.context() as patched:
        patched.setattr("calmix.pruning.old_work.ThreadPoolExecutor", Late)
        interrupt_before(patched, 1)
        ended = calmix(*command, tmp_path / "out")
    assert ended.code == 130
    assert f"1 blocks are kept in {tmp_path / 'out.unfinished'}" in ended.err


def test_going_on_keeps_the_size_of_a_micro_batch(calmix, deep, text_file, tmp_path, monkeypatch):
    """Another budget must not change how sums round; one that is too small takes nothing away."""
    command = ("prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")
    with monkeypatch.context() as patched:
        # A row at a time, as a small budget would.
        patched.setattr(streamed, "tokens_at_once", lambda device: 32)
        assert calmix(*command, tmp_path / "whole").code == 0
        interrupt_before(patched, 3)
        assert calmix(*command, tmp_path / "cut").code == 130
    ended = calmix(*command, tmp_path / "cut", "--resume", "--max-memory", "100MiB")
    assert ended.code == 2
    assert "cannot hold one block" in ended.line
    seen = []
    record = Run.record
    monkeypatch.setattr(
        Run, "record", lambda self, ids, tokens: (seen.append(tokens), record(self, ids, tokens))[1]
    )
    ended = calmix(*command, tmp_path / "cut", "--resume")
    assert ended.code == 0, ended.err
    assert "going on after 3" in ended.err
    assert seen == [32]
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("before", [1, 2, 3])
def test_what_a_block_writes_into_its_arguments_is_kept(
    calmix, text_file, tmp_path, monkeypatch, before
):
    """The last two blocks read the keys and values of the first two."""
    model = save_tiny_model(tmp_path / "model", "gemma4_text")
    command = ("prune", model, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")
    assert calmix(*command, tmp_path / "whole").code == 0
    with monkeypatch.context() as patched:
        interrupt_before(patched, before)
        assert calmix(*command, tmp_path / "cut").code == 130
    kept = sorted(path.name for path in (tmp_path / "cut.unfinished").glob("written-*"))
    assert kept == [f"written-{min(before - 1, 1)}"]
    ended = calmix(*command, tmp_path / "cut", "--resume")
    assert ended.code == 0, ended.err
    assert f"going on after {before}" in ended.err
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_weights_that_are_not_finite_leave_nothing(calmix, text_file, tmp_path):
    opened = open_model(str(save_tiny_model(tmp_path / "model")))
    opened.model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    opened.model.save_pretrained(tmp_path / "model")
    command = ("prune", tmp_path / "model", "--calibration", text_file, *SMALL, "--sparsity", 0.5)
    ended = calmix(*command, "-o", tmp_path / "out")
    assert ended.code == 2
    last = ended.err.splitlines()[-1]
    assert last == "error: model.layers.1.mlp.up_proj: its weights are not finite"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]


def test_two_at_work_on_one_output(calmix, deep, text_file, tmp_path):
    output = tmp_path / "out"
    work = WorkFolder(output)
    work.claim({"a": 1}, resume=False, overwrite=False)
    ended = calmix("prune", deep, "--method", "magnitude", "--sparsity", 0.5, "-o", output)
    assert ended.code == 2
    assert "is at work on" in ended.line
    work.abandon()


def test_a_claim_while_another_is_made_is_refused(tmp_path, monkeypatch):
    """Whoever comes between the steps of a claim neither gets the folder nor empties it."""
    first, second = WorkFolder(tmp_path / "out"), WorkFolder(tmp_path / "out")
    request = WorkFolder._request

    def between(self):
        monkeypatch.setattr(WorkFolder, "_request", request)
        with pytest.raises(InputError, match="is at work on"):
            second.claim({"by": 2}, resume=False, overwrite=True)
        return request(self)

    monkeypatch.setattr(WorkFolder, "_request", between)
    first.claim({"by": 1}, resume=False, overwrite=True)
    assert first._request()["by"] == 1
    assert first.checkpoint.is_dir()
    first.abandon()
    assert list(tmp_path.iterdir()) == []
    second.claim({"by": 2}, resume=False, overwrite=False)
    second.abandon()


def test_an_output_filled_meanwhile_is_not_replaced(calmix, deep, tmp_path):
    """Not even by a run that began when there was none; its work is kept."""
    output = tmp_path / "out"
    work = WorkFolder(output)
    work.claim({}, resume=False, overwrite=False)
    output.mkdir()
    (output / "mine").touch()
    with pytest.raises(DiskError, match="filled meanwhile"):
        work.complete()
    assert work.checkpoint.is_dir()
    work.abandon()
    with pytest.raises(InputError, match="not empty"):
        WorkFolder(output).claim({}, resume=False, overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("option", [None, "--resume", "--overwrite"])
def test_killed_before_the_request_was_written(calmix, deep, tmp_path, option):
    command = ("prune", deep, "--method", "magnitude", "--sparsity", 0.5, "-o", tmp_path / "out")
    stopped(partial(arm, "claimed", 0), *command)
    (tmp_path / "out.unfinished" / ".request.json.abc").touch()  # killed while it was written
    ended = calmix(*command, *([option] if option else []))
    assert ended.code == 0, ended.err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_no_thread_is_started_that_an_interrupt_could_lose(tmp_path, monkeypatch):
    """One that is lost writes into a folder that is being removed."""
    work = WorkFolder(tmp_path / "out")
    work.claim({"a": 1}, resume=False, overwrite=False)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread starts"))
    report = PruneReport("magnitude", "0.5", None, 0)
    work.finish_block(0, {}, report, [], overlap=True, last=True)
    work.abandon()
    assert not list(tmp_path.glob("out*"))


def test_work_that_is_being_removed_is_not_gone_on_with(tmp_path, monkeypatch):
    """Whatever is gone already, no result may be made of what is left."""
    work = WorkFolder(tmp_path / "out")
    work.claim({"a": 1}, resume=False, overwrite=False)
    work.count({"done": 2})
    (work.path / "states-0").touch()
    left = []
    for kind in (shutil, Path):
        name = "rmtree" if kind is shutil else "unlink"
        step = getattr(kind, name)

        def watched(path, *given, step=step, **options):
            step(path, *given, **options)
            if work.path.is_dir() and work._lock.is_locked:
                left.append((work.done, work._request() is not None or work._only_begun()))

        monkeypatch.setattr(kind, name, watched)
    work.abandon()
    assert len(left) > 3
    assert set(left) == {(0, True)}


def test_work_whose_files_have_become_the_output_is_not_gone_on_with(tmp_path):
    """Killed after the renaming, and then the output was moved away."""
    work = WorkFolder(tmp_path / "out")
    work.claim({"a": 1}, resume=False, overwrite=False)
    work.count({"done": 2})
    work.checkpoint.rmdir()
    work.close()
    again = WorkFolder(tmp_path / "out")
    again.claim({"a": 1}, resume=True, overwrite=False)
    assert not again.goes_on
    again.abandon()


@pytest.mark.parametrize("written", [["../../x", 0], ["1", 0], [1], "x", {"1": 0}])
def test_progress_names_nothing_outside_the_work_folder(tmp_path, written):
    work = WorkFolder(tmp_path / "out")
    work.claim({"a": 1}, resume=False, overwrite=False)
    work.count({"done": 1, "parts": [{"written": written}]})
    with pytest.raises(InputError, match=r"progress\.json is damaged: start over with --overwrite"):
        work.restore_written([])
    work.abandon()


@pytest.mark.parametrize("name", ["progress.json", "allocation.json", "calibration.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"done": 1}', b"\xff", b"[" * 5000])
def test_damaged_records_of_the_work_are_one_line(tmp_path, name, content):
    work = WorkFolder(tmp_path / "out")
    work.claim({"a": 1}, resume=False, overwrite=False)
    work.count({"done": 1})
    (work.path / name).write_bytes(content)
    reading = {
        "progress.json": lambda: work.done,
        "allocation.json": work.allocation,
        "calibration.json": lambda: work._sealed(name),
    }[name]
    with pytest.raises(InputError, match=f"{name} is damaged"):
        reading()
    work.close()
    again = WorkFolder(tmp_path / "out")
    if name == "progress.json":
        with pytest.raises(InputError, match="is damaged"):
            again.claim({"a": 1}, resume=True, overwrite=False)
    again.claim({"a": 1}, resume=False, overwrite=True)
    assert not again.goes_on
    again.abandon()


def test_a_folder_in_the_way_is_not_deleted(calmix, deep, tmp_path):
    mine = tmp_path / "out.unfinished"
    mine.mkdir()
    (mine / "mine").write_text("x", encoding="utf-8")
    ended = calmix(
        "prune", deep, "--method", "magnitude", "--sparsity", 0.5, "-o", tmp_path / "out"
    )
    assert ended.code == 2
    assert "is in the way" in ended.line
    assert (mine / "mine").exists()


def test_a_budget_that_cannot_hold_one_block(calmix, deep, text_file, tmp_path):
    ended = calmix(
        "prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5,
        "-o", tmp_path / "out", "--max-memory", "100MiB",
    )  # fmt: skip
    assert ended.code == 2
    assert "0.10 GiB of memory cannot hold one block at work" in ended.line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


def test_a_truncated_file_is_told_before_the_work(calmix, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    ended = calmix(
        "prune", folder, "--method", "magnitude", "--sparsity", 0.5, "-o", tmp_path / "out"
    )
    assert ended.code == 2
    assert "is cut short" in ended.line
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up_half_way(calmix, deep, text_file, tmp_path, monkeypatch):
    """What is done stays, and the prune goes on when there is room."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not let tests mount a small disk")
    command = (
        "prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o", small / "out",
    )  # fmt: skip
    filler = small / "filler"

    def fill(done, total):
        if done == 2:
            handle = os.open(filler, os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):
                while os.write(handle, bytes(4096)):
                    pass
            os.close(handle)

    run = checkpoint.prune_streamed

    def filling(*args, **kwargs):
        progress = kwargs.pop("progress")

        def both(done, total):
            progress(done, total)
            fill(done, total)

        return run(*args, progress=both, **kwargs)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "prune_streamed", filling)
            ended = calmix(*command)
        assert ended.code == 2
        assert "error: no space left" in ended.err.splitlines()[-1]
        assert not (small / "out").exists()
        filler.unlink()
        ended = calmix(*command, "--resume")
        assert ended.code == 0, ended.err
        assert "going on after" in ended.err
        assert calmix(*command[:-1], tmp_path / "whole").code == 0
        assert hashes(small / "out") == hashes(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_what_is_free_on_a_device_decides_its_micro_batch(tmp_path, tiny_folder, monkeypatch):
    """Beside what libraries take there; what others hold of it does not count as room."""
    streamed_model = StreamedModel(str(tiny_folder))
    streamed_model.device = torch.device("cuda")
    one = target(tmp_path / "out")
    ids = tiny_ids(400, 32)
    gib = 2**30

    def plan(free, **how):
        monkeypatch.setattr(streamed, "device_memory", lambda device: (0, free, 80 * gib))
        return streamed.plan_for(streamed_model, ids, [one], **{"budget": None} | how)

    try:
        whole = plan(2 * gib)
        states = ids.numel() * 32 * 4
        assert whole == Plan(8192, None, True, whole.needed, whole.expert_bytes, states)
        assert streamed.WORKSPACE < whole.needed < streamed.WORKSPACE + gib // 8
        least = (streamed.WORKSPACE + 8 * 2**20) / streamed.FREE_SHARE / 0.95
        assert 32 <= plan(int(least)).micro_tokens < 8192
        with pytest.raises(InputError, match="cannot hold one block at work"):
            plan(streamed.WORKSPACE)
        assert plan(0, budget=2 * gib).micro_tokens == 8192
    finally:
        one.work.abandon()
        streamed_model.close()


@pytest.fixture
def short_of_memory(monkeypatch):
    """Let a device run out of memory in the middle of a block, of more than so many tokens."""
    add = Gram.add

    def short(most, block=0, error=None):
        seen = []

        def adding(self, inputs):
            if inputs.shape[-1] == 64:  # the last of a block's inputs, when layers are pruned
                seen.append(len(inputs))
                if inputs.shape[:-1].numel() > most and len(seen) > block:
                    raise error or torch.OutOfMemoryError
            add(self, inputs)

        monkeypatch.setattr(Gram, "add", adding)

    return short


@pytest.mark.parametrize(
    "error",
    [None, RuntimeError("MPS backend out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")],
    ids=str,
)
@pytest.mark.parametrize("whole", [False, True])
def test_out_of_memory_a_prune_starts_over_with_fewer_rows(
    calmix, deep, text_file, tmp_path, monkeypatch, short_of_memory, whole, error
):
    if whole:

        def unstreamable(*_, **__):
            raise NotStreamableError("a.b")

        monkeypatch.setattr(checkpoint, "StreamedModel", unstreamable)
    command = ("prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")
    with monkeypatch.context() as patched:
        patched.setattr(streamed, "tokens_at_once", lambda device: 96)
        assert calmix(*command, tmp_path / "three").code == 0
    short_of_memory(100, error=error)
    ended = calmix(*command, tmp_path / "halved")
    assert ended.code == 0, ended.err
    assert "cpu has run out of memory: starting over with 3 rows at a time" in ended.err
    assert hashes(tmp_path / "halved") == hashes(tmp_path / "three")
    manifest = json.loads((tmp_path / "halved" / "calmix.json").read_text())
    assert manifest["pruning"]["rows_at_once"] == 3


def test_out_of_memory_what_counts_as_done_is_kept(
    calmix, deep, text_file, tmp_path, short_of_memory
):
    command = ("prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")
    short_of_memory(0, block=1)
    ended = calmix(*command, tmp_path / "out")
    short_of_memory(2**62)
    assert ended.code == 2
    assert "1 blocks done: go on with --resume" in calmix(*command, tmp_path / "out").line
    assert ended.err.splitlines()[-1].startswith(
        "error: cpu has run out of memory, with 6 calibration rows at a time: "
    )
    assert calmix(*command, tmp_path / "out", "--resume").code == 0
    assert calmix(*command, tmp_path / "whole").code == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_one_row_that_is_too_large_is_told(calmix, deep, text_file, tmp_path, short_of_memory):
    short_of_memory(0)
    command = ("prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5)
    ended = calmix(*command, "-o", tmp_path / "out")
    assert ended.code == 2
    assert ended.err.splitlines()[-1] == (
        "error: cpu has run out of memory, with 1 calibration rows at a time: free some of it, "
        "or draw shorter rows"
    )
    assert not (tmp_path / "out.unfinished").exists()
