"""Pruning from disk to disk: the same numbers, interruption at any moment, bounded memory."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from calmix.calibration.dataset import CalibrationSet
from calmix.errors import InputError, ModelError
from calmix.machine import out_of_memory
from calmix.models.blocks import find_blocks
from calmix.models.opening import open_model
from calmix.models.streaming import StreamedModel
from calmix.pruning import budget
from calmix.pruning.allocation import LossPass
from calmix.pruning.budget import Plan
from calmix.pruning.checkpoint import prune_streamed, write_checkpoint
from calmix.pruning.engine import Run, prune, run_through
from calmix.pruning.expert_pruning import ScorePass
from calmix.pruning.gram import Gram
from calmix.pruning.held_out import HeldOut
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Unstructured
from calmix.pruning.solvers.grids import read_blocks, read_grids
from calmix.pruning.trace import token_bytes
from calmix.pruning.work import WorkFolder, read_record
from calmix.specs import prune_request
from tests.forks import stopped
from tests.pruning.stopper import arm
from tests.pruning.toy import SMALL, pruning_of
from tests.tiny import (
    ARCHITECTURES,
    MIXTURES,
    hashes,
    load_weights,
    quick,
    save_tiny_model,
    tiny_ids,
)

HALF = Unstructured(0.5)
PLAIN = {"method": "magnitude", "sparsity": 0.5}
BATCH = 5 * 32 * 32 * 4  # bytes of the hidden states of a micro-batch
PLENTY = Plan(5 * 32, None, True, 0, states=2**30)
FEW = [
    Plan(5 * 32, 0, False, 0),
    Plan(5 * 32, 1, True, 0, states=BATCH),
    Plan(5 * 32, 2, False, 0, states=2 * BATCH),
]
ONE = [Plan(5 * 32, 1, True, 0, 1)]  # expert at a time
ROUNDED = "llama", "qwen2", "gemma4_text", "phi", "opt"  # embeddings too


def streamed_prune(folder, output, plan=PLENTY, embeddings=None, **opening):
    """Prune from disk to disk and return the tensors written."""
    streamed, work = StreamedModel(str(folder), **opening), WorkFolder(output)
    work.claim({}, resume=False, overwrite=True)
    run = Run(streamed.model, streamed.blocks, get_method("sparsegpt"), HALF)
    run.embeddings = embeddings
    try:
        report = prune_streamed(streamed, tiny_ids(), run, work, plan)
        assert report.sparsity == pytest.approx(0.5, abs=0.01)
        return load_weights(work.checkpoint)
    finally:
        streamed.close()
        work.abandon()


def in_memory(folder, embeddings=None, **opening):
    """Return the model of a folder, pruned in memory."""
    model = open_model(str(folder), **opening).model
    how = {"pattern": HALF, "statistics": "plain", "micro_tokens": 5 * 32}
    prune(model, tiny_ids(), embeddings=embeddings, **how)
    return model


def check_same(found, expected):
    """The tensors that are expected have the same bytes."""
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "case",
    quick(
        [
            ("llama", None),
            *((kind, 5) for kind in ROUNDED),
            *((kind, None) for kind in ("gpt2", "bloom", "mixtral", "gpt_oss", "llama4_text")),
        ],
        [(kind, None) for kind in (*ARCHITECTURES, *MIXTURES) if kind not in ROUNDED],
    ),
    ids=str,
)
def test_streamed_matches_in_memory(case, tmp_path):
    """With embeddings rounded too, and in less memory: with replays, experts one at a time."""
    kind, embeddings = case
    folder = save_tiny_model(tmp_path / "model", kind)
    model = in_memory(folder, embeddings)
    model.save_pretrained(tmp_path / "whole")
    expected = load_weights(tmp_path / "whole")
    less = {("llama", None): FEW}.get(case, ONE if kind in MIXTURES else [])
    for plan in (PLENTY, *less):
        found = streamed_prune(folder, tmp_path / "out", plan, embeddings)
        assert found.keys() == expected.keys() == load_weights(folder).keys()
        check_same(found, expected)
    if kind in MIXTURES:
        save_file(found, folder / "model.safetensors", {"format": "pt"})
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(loaded(tiny_ids(2)).logits, model(tiny_ids(2)).logits)


@pytest.mark.parametrize("kind", quick(["mamba2"], ["gemma3n_text"]))
def test_states_of_other_types_and_shapes(kind, tmp_path):
    """In a bfloat16 model blocks may return float32, or several streams; memory counts that."""
    folder = save_tiny_model(tmp_path / "model", kind)
    model = in_memory(folder, dtype="bfloat16")
    dry = StreamedModel(str(folder), dtype="bfloat16")
    wide = 4 if kind == "gemma3n_text" else 2
    assert token_bytes(dry.model, dry.blocks) == wide * 2 * 32
    assert all(p.is_meta for p in dry.model.parameters())
    dry.close()
    for states in (0, 3 * BATCH // 2):
        plan = Plan(5 * 32, None, True, 0, states=states)
        found = streamed_prune(folder, tmp_path / "out", plan, dtype="bfloat16")
        found = {name: value.bfloat16() for name, value in found.items()}
        check_same(found, {n: v for n, v in model.state_dict().items() if n in found})


def test_merged_experts_keep_their_names(tmp_path):
    """Not every tool that saves a model takes experts apart again."""
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    apart = load_weights(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    merged = {name: value.clone() for name, value in model.state_dict().items()}
    merged.pop("lm_head.weight")
    save_file(merged, folder / "model.safetensors", {"format": "pt"})
    found = streamed_prune(folder, tmp_path / "out")
    assert found.keys() == merged.keys() != apart.keys()
    in_memory(folder).save_pretrained(tmp_path / "whole")
    expected = load_weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    check_same(found, expected)


@pytest.mark.parametrize("prefix", quick([""], ["model."]))
def test_buffers_are_read_from_files(tmp_path, prefix):
    """Gemma 4 scales what a layer returns by a buffer of its checkpoint."""
    folder = save_tiny_model(tmp_path / "model", "gemma4_text")
    stored = load_weights(folder)
    for name in stored:
        if name.endswith("layer_scalar"):
            stored[name].fill_(0.25)
    renamed = {name.replace("model.", prefix, 1): value for name, value in stored.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    found = streamed_prune(folder, tmp_path / "out")
    for name, tensor in in_memory(folder).state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(found[name.replace("model.", prefix, 1)], tensor), name


def test_missing_buffers_are_computed(tmp_path):
    """GPT-J's positions, which the type the model is made in would round."""
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    folder = save_tiny_model(tmp_path / "model", "gptj", **small)
    whole = dict(open_model(str(folder), dtype="bfloat16").model.named_buffers())
    made = dict(StreamedModel(str(folder), dtype="bfloat16").model.named_buffers())
    assert made.keys() == whole.keys()
    assert all(torch.equal(made[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("kind", "lacks", "says"),
    [
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight", "lack model.layers.0.mlp"),
        ("gemma4_text", "model.layers.0.layer_scalar", r"layers\.0\.layer_scalar"),
        ("zamba", None, r"share weights \(first model\.layers\.3\."),
    ],
)
def test_reasons_to_open_a_model_whole(tmp_path, kind, lacks, says):
    """An expert or a buffer that the files lack; or blocks that share weights: Zamba's second
    transformer is its first, though files may hold a copy for each."""
    folder = save_tiny_model(tmp_path / "model", kind)
    stored = load_weights(folder)
    if lacks is None:
        whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        stored = {name: value.clone() for name, value in whole.items()}
    stored.pop(lacks, None)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"block by block, because .*{says}"):
        StreamedModel(str(folder))


def test_user_folder_is_not_replaced(tiny_folder, tmp_path):
    (tmp_path / "mine").touch()
    opened = open_model(str(tiny_folder))
    report, request = prune(opened, method="magnitude", pattern=HALF), prune_request(**PLAIN)
    with pytest.raises(InputError, match="exists and is not empty"):
        write_checkpoint(opened, tmp_path, report, None, request)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_checkpoint_identity(tiny_folder, tmp_path):
    """A study's trials differ in method, options and calibration set."""
    opened = open_model(str(tiny_folder))
    report = prune(opened, method="magnitude", pattern=HALF)
    text = {"calibration": "stories", "sparsity": 0.5}
    sets = [CalibrationSet(torch.full((2, 4), token), ("a", "a"), {}) for token in (1, 2)]
    trials = [
        (None, PLAIN),
        (sets[0], text),
        (sets[1], text),
        (sets[0], text | {"damping": 0.1}),
        (sets[0], text | {"method": "wanda"}),
    ]
    found = set()
    for number, (drawn, options) in enumerate(trials):
        out = tmp_path / str(number)
        write_checkpoint(opened, out, report, drawn, prune_request(**options))
        found.add(json.loads((out / "calmix.json").read_text())["request_sha256"])
    assert len(found) == len(trials)


def test_one_block_in_memory(tiny_folder):
    streamed = StreamedModel(str(tiny_folder))
    streamed.fetch(1)
    real = {n for n, p in streamed.model.named_parameters() if not p.is_meta}
    assert real == set(streamed.block_names(1))
    assert {streamed.names[name] for name in real} == set(streamed.weights(1))
    streamed.drop(1)
    assert all(p.is_meta for p in streamed.model.parameters())
    streamed.close()


# Interruptions: `command` is a prune of a tiny llama of five blocks, so that there is a middle.


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=5)


@pytest.fixture
def command(deep, text_file):
    return ("prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")


SPARSEGPT, DROP = ("--sparsity", 0.5), ("--drop-experts", 0.25)
MAGNITUDE, WANDA = ((*SPARSEGPT, "--method", name) for name in ("magnitude", "wanda"))
EMBEDDED = ("--bits", 4, "--embeddings", 5)
MIXED = ("--method", "ggml,bits=5.5")
DEEP = {kind: {"num_hidden_layers": 5} for kind in ("llama", "qwen3_moe")}


@pytest.mark.parametrize(
    ("kind", "asked", "moment", "block"),
    [
        ("llama", SPARSEGPT, "solved", 2),
        ("llama", SPARSEGPT, "renamed", 0),
        ("llama", MAGNITUDE, "claimed", 0),
        ("mixtral", DROP, "scored", 0),
        ("llama", MIXED, "outside", 0),
        ("llama", EMBEDDED, "outside", 0),
        *(
            pytest.param(*how, marks=pytest.mark.long)
            for how in (
                ("llama", MAGNITUDE, "written", 3),
                ("qwen3_moe", SPARSEGPT, "solved", 2),
                ("llama", EMBEDDED, "solved", 1),
                ("gemma4_text", EMBEDDED, "solved", 1),
                ("gemma4_text", EMBEDDED, "outside", 0),
                ("llama", SPARSEGPT, "written", 2),
                ("llama", SPARSEGPT, "counted", 0),
                ("llama", WANDA, "counted", 4),
                ("llama", WANDA, "solved", 0),
                ("mixtral", DROP, "renamed", 0),
                ("mixtral", (*SPARSEGPT, *DROP), "scored", 0),
                ("mixtral", (*SPARSEGPT, *DROP), "counted", 0),
            )
        ),
    ],
)
def test_killed_prune_resumes_to_the_same_bytes(
    calmix, text_file, tmp_path, monkeypatch, kind, asked, moment, block
):
    if asked == MIXED:
        pytest.importorskip("libggml")
    model = save_tiny_model(tmp_path / "model", kind, **DEEP.get(kind, {}))
    data = () if asked == MAGNITUDE else ("--calibration", text_file, *SMALL)
    command = ("prune", model, *data, *asked, "-o")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stopped(partial(arm, moment, block), *command, cut)
    begun = moment not in ("claimed", "renamed") and (moment, block) != ("solved", 0)
    if begun:
        assert "resume it with --resume" in calmix(*command, cut).line
        versions = read_record(WorkFolder(cut).path)["request"]["versions"]
        # Those of others, which cannot change the bytes, make no other request.
        assert versions.keys() == {"calmix", "torch", "transformers", "tokenizers"}
    with monkeypatch.context() as patched:
        for look in (LossPass, ScorePass):  # what was seen is kept
            patched.setattr(look, "block", None)
        ended = calmix(*command, cut, "--resume").ok()
    assert ("finished by an earlier run" in ended.err) == (moment == "renamed")
    assert ("resuming after" in ended.err) == (begun and asked != DROP)
    assert calmix(*command, whole).code == 0
    assert hashes(cut) == hashes(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "model", "text.txt", "whole"]
    found, grids = load_weights(whole), read_grids(whole) | read_blocks(whole)
    outer = [f"{one['name']}.weight" for one in pruning_of(whole)["outer"]]
    assert bool(outer) == (asked in (EMBEDDED, MIXED))
    for name in outer:
        grid = grids[name]
        own = grid.values(*([grid.levels(found[name])] if asked == EMBEDDED else []))
        assert torch.equal(own.to(found[name].dtype), found[name])


def test_other_files_are_copied_and_checked_on_resume(calmix, tmp_path):
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    tokenizer = model / "tokenizer.json"  # not as transformers would write it
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_bytes()), indent=7))
    (model / "additional_chat_templates").mkdir()
    others = (
        "tokenizer.model",
        "LICENSE",
        "modeling_own.py",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    )
    for name in others:
        (model / name).write_text("{{ messages }}")
    command = "prune", model, *MAGNITUDE, "-o", out
    calmix(*command).ok()
    for name in ("tokenizer.json", *others):
        assert (out / name).read_bytes() == (model / name).read_bytes(), name
    assert "finished by an earlier run" in calmix(*command, "--resume").ok().err
    (model / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert "is not empty" in calmix(*command, "--resume").line
    (model / "chat_template.jinja").write_text("{{ messages }}")
    next(out.glob("*.safetensors")).unlink()
    assert "is not empty" in calmix(*command, "--resume").line


def test_resume_replays_finished_blocks(calmix, text_file, tmp_path, monkeypatch):
    """The last two blocks read the keys and values of the first two; nothing is solved again."""
    model = save_tiny_model(tmp_path / "model", "gemma4_text")
    command = ("prune", model, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")
    assert calmix(*command, tmp_path / "whole").code == 0
    solved, block = [], Run.block

    def counted(self, index):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(index)
        block(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "block", counted)
        ended = calmix(*command, tmp_path / "cut")
    assert ended.code == 130
    work = tmp_path / "cut.unfinished"
    assert f"2 blocks are kept in {work}: resume with --resume" in ended.err
    solved = [-1] * 3
    monkeypatch.setattr(Run, "block", counted)
    ended = calmix(*command, tmp_path / "cut", "--resume").ok()
    assert ended.err.count("resuming after 2 of 4 blocks") == 1
    assert solved[3:] == [2, 3]
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    ended = calmix(*command, tmp_path / "cut", "--resume").ok()
    assert "cut was finished by an earlier run" in ended.err


def test_model_changed_during_pruning_is_refused(calmix, deep, text_file, tmp_path, monkeypatch):
    """No block of the changed model counts as done, so the original one can be resumed."""
    model = Path(shutil.copytree(deep, tmp_path / "model"))
    command = ("prune", model, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o")
    calmix(*command, tmp_path / "whole").ok()
    file, block = model / "model.safetensors", Run.block
    original = file.read_bytes()

    def changing(self, index):
        block(self, index)
        if index == 2:
            save_file({n: w + 1 for n, w in load_weights(deep).items()}, file, {"format": "pt"})

    with monkeypatch.context() as patched:
        patched.setattr(Run, "block", changing)
        ended = calmix(*command, tmp_path / "cut")
    assert ended.code == 2
    assert ended.err.splitlines()[-1].endswith(
        f"the files of {model} changed while they were read: run it again"
    )
    assert not (tmp_path / "cut").exists()
    assert read_record(WorkFolder(tmp_path / "cut").path)["kept"]["done"] == 2
    assert "another request (model: " in calmix(*command, tmp_path / "cut", "--resume").line
    file.write_bytes(original)
    calmix(*command, tmp_path / "cut", "--resume").ok()
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_resume_keeps_micro_batch_size(calmix, command, tmp_path, monkeypatch):
    """Another budget must not change how sums round; one that is too small takes nothing away."""
    with monkeypatch.context() as patched:
        # A row at a time, as a small budget would.
        patched.setattr(budget, "tokens_at_once", lambda device: 32)
        assert calmix(*command, tmp_path / "whole").code == 0
        stopped(partial(arm, "counted", 2), *command, tmp_path / "cut")
    ended = calmix(*command, tmp_path / "cut", "--resume", "--max-memory", "100MiB")
    assert "cannot hold one block" in ended.line
    calmix(*command, tmp_path / "cut", "--resume").ok()
    assert pruning_of(tmp_path / "cut")["rows_at_once"] == 1
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


# Memory


def test_out_of_memory_keeps_finished_work(calmix, command, tmp_path, monkeypatch):
    """Told by a CUDA device, and by others as torch says it there."""
    assert all(
        out_of_memory(RuntimeError(f"{said}."))
        for said in ("MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
    add, seen = Gram.add, []

    def short(self, inputs):
        # The last of a block's inputs, when layers are pruned; weights have two dimensions.
        if inputs.ndim == 3 and inputs.shape[-1] == 64:
            seen.append(len(inputs))
            if len(seen) > 1:
                raise torch.OutOfMemoryError
        add(self, inputs)

    with monkeypatch.context() as patched:
        patched.setattr(Gram, "add", short)
        ended = calmix(*command, tmp_path / "out")
    assert ended.code == 2
    assert ended.err.splitlines()[-1] == (
        "error: cpu ran out of memory with 6 calibration rows at a time: free some, run "
        "fewer rows at a time (--max-memory, in Python micro_tokens), or use shorter rows"
    )
    assert "1 blocks done: resume it with --resume" in calmix(*command, tmp_path / "out").line


@pytest.mark.parametrize("states", [0, 2 * BATCH, 10**9])
def test_targets_of_the_dense_model_survive_a_kill(tmp_path, states):
    """Streamed, with states in files or in memory, and resumed: the weights are those in memory."""
    save_tiny_model(tmp_path / "model", "qwen2")
    ids, folder = tiny_ids(32), str(tmp_path / "model")
    expected = open_model(folder).model
    shares = list[float]()
    share = HeldOut.share

    def seen(self, *pairs):
        shares.append(share(self, *pairs))
        return shares[-1]

    def run_of(model, blocks):
        run = Run(model, blocks, get_method("sparsegpt"), HALF)
        run.robust = True
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOut, "share", seen)
        run_through(run_of(expected, find_blocks(expected)), ids, 5 * 32)
    assert len(shares) == 8
    assert sum(one > 0 for one in shares) > 3
    plan = Plan(5 * 32, None, True, 0, states=states)

    def streamed(resume, progress=lambda done: None):
        source, work = StreamedModel(folder), WorkFolder(tmp_path / "out")
        work.claim({}, resume=resume, overwrite=not resume)
        try:
            prune_streamed(source, ids, run_of(source.model, source.blocks), work, plan, progress)
            return load_weights(work.checkpoint)
        finally:
            source.close()

    def stop(done):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed(False, stop)
    found = streamed(True)
    check_same(found, {n: v for n, v in expected.state_dict().items() if n in found})
    assert len(found) > 20
