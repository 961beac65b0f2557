"""Pruning from disk to disk: the same numbers, interruption at any moment, bounded memory."""

import json
from contextlib import suppress
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from calmix import Unstructured, memory, open_model, prune
from calmix.errors import ModelError, SolverError
from calmix.memory import Plan, out_of_memory, token_bytes
from calmix.models.blocks import find_blocks, outer_layers
from calmix.models.shards import weight_bytes
from calmix.models.streaming import StreamedModel
from calmix.pruning.allocation import LossPass
from calmix.pruning.checkpoint import prune_streamed
from calmix.pruning.engine import Run, run_through
from calmix.pruning.expert_pruning import ScorePass
from calmix.pruning.gram import Gram
from calmix.pruning.held_out import HeldOut
from calmix.pruning.methods import get_method
from calmix.pruning.solvers.grids import read_blocks, read_grids
from calmix.pruning.work import WorkFolder, read_record
from tests.forks import stopped
from tests.pruning.stopper import arm
from tests.pruning.toy import EVERY, SMALL, cases, pruning_of, refused
from tests.tiny import MIXTURES, hashes, load_weights, quick, save_tiny_model, tiny_ids, tiny_model

HALF = Unstructured(0.5)
IDS = tiny_ids(16, 64)  # of a row held out, just enough tokens judge a layer
AT_ONCE = 5 * 64
BATCH = AT_ONCE * 32 * 4  # bytes of the hidden states of a micro-batch
PLENTY = Plan(AT_ONCE, None, True, 0, states=2**30)
FEW = [Plan(AT_ONCE, 0, False, 0), Plan(AT_ONCE, 1, True, 0, states=2 * BATCH)]
ONE = Plan(AT_ONCE, 1, True, 0, 1)  # expert at a time
ROUNDED = "qwen2", "gemma4_text", "phi", "opt"  # embeddings too
MADE = ["llama", "gemma4_text", "phi", "gpt2", "mixtral", "mixtral merged", "gpt_oss"]
TOKENS = "model.embed_tokens.weight"
SPARSEGPT, DROP = ("--sparsity", 0.5), ("--drop-experts", 0.25)
MAGNITUDE = (*SPARSEGPT, "--method", "magnitude")
EMBEDDED, MIXED = ("--bits", 4, "--embeddings", 5), ("--method", "ggml,bits=5.5")
DENSE = ("--method", "llama", "--pattern", "Q4_0 blocks")
SHORT = {"n_routed_experts": 8, "dtype": "bfloat16"}


def robust_run(model, blocks, embeddings):
    """Return a run that makes up for the errors of earlier layers."""
    run = Run(model, blocks, get_method("sparsegpt"), HALF)
    run.robust, run.embeddings = True, embeddings
    return run


def in_memory(folder, embeddings=None, **opening):
    """Return the model of a folder, pruned in memory."""
    model = open_model(str(folder), **opening).model
    run_through(robust_run(model, find_blocks(model), embeddings), IDS, AT_ONCE)
    return model


def stored_as(folder, tensors):
    """Replace the weights of a model folder, and return the folder."""
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def streamed_prune(folder, output, plan=PLENTY, embeddings=None, **opening):
    """Prune from disk to disk, in little memory after an interruption; return what is written."""
    last = plan is not PLENTY
    for number in range(last + 1):
        source, work = StreamedModel(str(folder), **opening), WorkFolder(output)
        work.claim({}, resume=number > 0, overwrite=number == 0)
        run = robust_run(source.model, source.blocks, embeddings)

        def stop(done, interrupts=number < last):
            if done and interrupts:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            report = prune_streamed(source, IDS, run, work, plan, stop)
            tensors = load_weights(work.checkpoint)
        source.close()
        work.abandon(stays=number < last)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    return tensors


def check_same(tensors, expected):
    """The tensors that are expected have the same bytes."""
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def with_merged_experts(folder):
    """As tools write them that do not take experts apart again."""
    merged = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return {name: value.clone() for name, value in merged.items() if name != "lm_head.weight"}


def with_bare_names(folder):
    """As of a decoder alone, whose layers scale what they return by a buffer of the checkpoint."""
    stored = {name.removeprefix("model."): value for name, value in load_weights(folder).items()}
    return stored | {name: value * 0 + 0.25 for name, value in stored.items() if "scalar" in name}


CHANGED = {"gemma4_text": with_bare_names, "mixtral merged": with_merged_experts}


@pytest.mark.parametrize("case", quick(MADE, EVERY))
def test_streamed_matches_in_memory(case, tmp_path, monkeypatch):
    """Embeddings too, and in less memory: states in files, replays, and experts one at a time."""
    kind, embeddings = case.split()[0], 5 if case in ROUNDED else None
    folder = save_tiny_model(tmp_path / "model", kind)
    if case in CHANGED:
        stored_as(folder, CHANGED[case](folder))
    shares, share = [], HeldOut.share
    with monkeypatch.context() as patched:
        patched.setattr(HeldOut, "share", lambda *of: shares.append(share(*of)) or shares[-1])
        model = in_memory(folder, embeddings)
    if case == "llama":  # most targets follow the dense model: resuming must bring its states back
        assert len(shares) == 8
        assert sum(one > 0 for one in shares) > 3
    model.save_pretrained(tmp_path / "whole")
    names, whole = load_weights(folder).keys(), load_weights(tmp_path / "whole")
    expected = {n if n in names else n.removeprefix("model."): whole[n] for n in whole}
    for plan in {"llama": [PLENTY, *FEW]}.get(case, [ONE if case in MIXTURES else PLENTY]):
        tensors = streamed_prune(folder, tmp_path / "out", plan, embeddings)
        assert tensors.keys() == expected.keys() == names
        check_same(tensors, expected)
    if case in MIXTURES:
        loaded = AutoModelForCausalLM.from_pretrained(stored_as(folder, tensors))
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", quick(["mamba2"], ["gemma3n_text"]))
def test_states_of_other_types_and_shapes(kind, tmp_path):
    """Of a bfloat16 model blocks may return float32, or several streams; one block is in memory."""
    folder = save_tiny_model(tmp_path / "model", kind)
    model = in_memory(folder, dtype="bfloat16")
    dry = StreamedModel(str(folder), dtype="bfloat16")
    wide = 4 if kind == "gemma3n_text" else 2
    assert token_bytes(dry.model, dry.blocks) == wide * 2 * 32
    assert all(p.is_meta for p in dry.model.parameters())
    dry.fetch(1)
    real = {name for name, p in dry.model.named_parameters() if not p.is_meta}
    assert real == set(dry.block_names(1))
    assert {dry.names[name] for name in real} == set(dry.weights(1))
    dry.drop(1)
    assert all(p.is_meta for p in dry.model.parameters())
    dry.close()
    plan = Plan(AT_ONCE, None, True, 0, states=3 * BATCH // 2)
    tensors = streamed_prune(folder, tmp_path / "out", plan, dtype="bfloat16")
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    check_same(tensors, {n: v for n, v in model.state_dict().items() if n in tensors})


def test_missing_buffers_are_computed(tmp_path):
    """GPT-J's positions, which the type the model is made in would round."""
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    folder = save_tiny_model(tmp_path / "model", "gptj", **small)
    whole = dict(open_model(str(folder), dtype="bfloat16").model.named_buffers())
    made = dict(StreamedModel(str(folder), dtype="bfloat16").model.named_buffers())
    assert made.keys() == whole.keys()
    check_same(made, whole)


@cases(
    "kind lacks says",
    ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight", "lack model.layers.0.mlp"),
    ("gemma4_text", "model.layers.0.layer_scalar", r"layers\.0\.layer_scalar"),
    # Its second transformer is its first, though files may hold a copy for each.
    ("zamba", None, r"share weights \(first model\.layers\.3\."),
)
def test_reasons_to_open_a_model_whole(tmp_path, kind, lacks, says):
    folder = save_tiny_model(tmp_path / "model", kind)
    stored = with_merged_experts(folder) if lacks is None else load_weights(folder)
    stored.pop(lacks, None)
    where = str(stored_as(folder, stored))
    refused(f"block by block, because .*{says}", StreamedModel, where, error=ModelError)


def command_of(model, text, *asked):
    """Return the command that prunes a model, up to its output."""
    data = () if asked == MAGNITUDE else ("--calibration", text, *SMALL)
    return ("prune", model, *data, *asked, "-o")


@cases(
    "kind settings asked moments",
    ("gemma4_text", {}, SPARSEGPT, "counted:1 renamed:0"),
    ("llama", {}, MAGNITUDE, "claimed:0 written:1"),
    ("llama", {}, DENSE, "counted:0"),
    ("llama", {}, MIXED, "counted:0"),
    ("llama", {}, EMBEDDED, "solved:1 outside:0"),
    ("mixtral", {}, DROP, "scored:0"),
    ("deepseek_v3", SHORT, (*SPARSEGPT, *DROP), "scored:0 counted:0"),
)
def test_killed_prune_resumes_to_the_same_bytes(
    calmix, text_file, tmp_path, monkeypatch, slow_half, kind, settings, asked, moments
):
    """Killed again in each resumed run. Gemma 4's last blocks read what the first have written."""
    if {*asked} & {*MIXED, *DENSE}:
        pytest.importorskip("libggml")
    model = save_tiny_model(tmp_path / "model", kind, **settings)
    stored = load_weights(model)
    biases = {n: torch.linspace(0, 1, 8) for n in stored if n.endswith("correction_bias")}
    stored_as(model, stored | biases)
    command, whole, cut = command_of(model, text_file, *asked), tmp_path / "whole", tmp_path / "cut"
    with monkeypatch.context() as patched:  # as with a small budget, which must not change sums
        patched.setattr(memory, "tokens_at_once", lambda device: 64)
        calmix(*command, whole).ok()
        for moment, block in (one.split(":") for one in moments.split()):
            stopped(partial(arm, moment, int(block)), *command, cut, "--resume")
    finished, record = moment == "renamed", read_record(WorkFolder(cut).path)
    done, alone = record["kept"].get("done", 0), asked == DROP
    if not finished:
        assert "resume it with --resume" in calmix(*command, cut).line
        # Those of others, which cannot change the bytes, make no other request.
        versions = record["request"]["versions"]
        assert versions.keys() == {"calmix", "torch", "transformers", "tokenizers"}
    if asked == EMBEDDED:
        less = (*command, cut, "--resume", "--max-memory", "100MiB")
        assert "cannot hold one block" in calmix(*less).line
    solved, block = [], Run.block
    monkeypatch.setattr(Run, "block", lambda run, at: solved.append(at) or block(run, at))
    for look in (LossPass, ScorePass):  # what was seen is kept
        monkeypatch.setattr(look, "block", None)
    ended = calmix(*command, cut, "--resume").ok()
    count = 0 if alone else json.loads((whole / "config.json").read_text())["num_hidden_layers"]
    assert solved == [*range(done, count)]
    assert ("finished by an earlier run" in ended.err) == finished
    assert ended.err.count("resuming after") == (not finished and not alone)
    assert hashes(cut) == hashes(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "model", "text.txt", "whole"]
    tensors, grids = load_weights(whole), read_grids(whole) | read_blocks(whole)
    assert all(tensors[name].any() for name in biases)
    outer = [f"{one['name']}.weight" for one in pruning_of(whole)["outer"]]
    assert bool(outer) == (asked in (EMBEDDED, MIXED))
    for name in outer:
        grid = grids[name]
        own = grid.values(*([grid.levels(tensors[name])] if asked == EMBEDDED else []))
        assert torch.equal(own.to(tensors[name].dtype), tensors[name])


def test_other_files_are_copied_and_checked_on_resume(calmix, tmp_path):
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    tokenizer = model / "tokenizer.json"  # not as transformers would write it
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_bytes()), indent=7))
    others = [model / name for name in ("tokenizer.model", "LICENSE", "modeling_own.py")]
    others += [model / "additional_chat_templates/tools.jinja", model / "chat_template.jinja"]
    others[3].parent.mkdir()
    for file in others:
        file.write_text("{{ messages }}")
    command = "prune", model, *MAGNITUDE, "-o", out
    calmix(*command).ok()
    for file in (tokenizer, *others):
        assert (out / file.relative_to(model)).read_bytes() == file.read_bytes(), file
    others[-1].write_text("{{ messages[0] }}")
    assert "is not empty" in calmix(*command, "--resume").line
    others[-1].write_text("{{ messages }}")
    next(out.glob("*.safetensors")).unlink()
    assert "is not empty" in calmix(*command, "--resume").line


def test_model_changed_during_pruning_is_refused(calmix, text_file, tmp_path, monkeypatch):
    """No block of the changed model counts as done, so the original one can be resumed."""
    model = save_tiny_model(tmp_path / "model")
    command, cut = command_of(model, text_file, *SPARSEGPT), tmp_path / "cut"
    calmix(*command, tmp_path / "whole").ok()
    file, block = model / "model.safetensors", Run.block
    original, changed = file.read_bytes(), {n: w + 1 for n, w in load_weights(model).items()}

    def changing(self, index):
        block(self, index)
        if index:
            stored_as(model, changed)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "block", changing)
        ended = calmix(*command, cut)
    assert ended.code == 2
    says = f"the files of {model} changed while they were read: run it again"
    assert ended.err.splitlines()[-1].endswith(says)
    assert not cut.exists()
    assert read_record(WorkFolder(cut).path)["kept"]["done"] == 1
    assert "another request (model: " in calmix(*command, cut, "--resume").line
    file.write_bytes(original)
    calmix(*command, cut, "--resume").ok()
    assert hashes(cut) == hashes(tmp_path / "whole")


def test_out_of_memory_keeps_finished_work(calmix, tiny_folder, text_file, tmp_path, monkeypatch):
    """Told by a CUDA device, and by others as torch says it there."""
    for said in ("MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED"):
        assert out_of_memory(RuntimeError(f"{said}."))
    add, seen = Gram.add, []

    def short(self, inputs):
        # The last of a block's inputs, when layers are pruned; weights have two dimensions.
        if inputs.ndim == 3 and inputs.shape[-1] == 64:
            seen.append(len(inputs))
            if len(seen) > 1:
                raise torch.OutOfMemoryError
        add(self, inputs)

    monkeypatch.setattr(Gram, "add", short)
    command = (*command_of(tiny_folder, text_file, *SPARSEGPT), tmp_path / "out")
    ended = calmix(*command)
    assert ended.code == 2
    assert ended.err.splitlines()[-1] == (
        "error: cpu ran out of memory with 6 calibration rows at a time: free some, run "
        "fewer rows at a time (--max-memory, in Python micro_tokens), or use shorter rows"
    )
    assert "1 blocks done: resume it with --resume" in calmix(*command).line


@pytest.fixture
def slow_half(monkeypatch):
    """Half precision is computed in float32 where the CPU is slow with it, and stored as it was."""
    monkeypatch.setattr("calmix.precision.capabilities", dict)


def logits(model):
    with torch.no_grad():
        return model(tiny_ids(2)).logits


@cases("half way", ("float16", SPARSEGPT), ("bfloat16", EMBEDDED))
def test_half_model_is_stored_in_its_own_type(calmix, text_file, tmp_path, slow_half, half, way):
    """Pruned and recovered, or rounded with levels that its weights still have."""
    model, out = save_tiny_model(tmp_path / "model", dtype=half), tmp_path / "out"

    def stored(folder):
        manifest = json.loads((folder / "calmix.json").read_text())
        assert manifest["stored_dtype"] == half
        weights = load_weights(folder)
        types = {name: value.dtype for name, value in weights.items()}
        assert types == dict.fromkeys(load_weights(model), getattr(torch, half))
        return manifest, weights

    calmix("prune", model, "--calibration", text_file, *SMALL, *way, "-o", out).ok()
    manifest, after = stored(out)
    assert weight_bytes(out) < 1.1 * weight_bytes(model)
    assert manifest["dtype"] == "float32"
    assert json.loads((out / "config.json").read_text())["dtype"] == half
    grids = read_grids(out)
    assert bool(grids) == ("--bits" in way)
    for name, grid in grids.items():
        assert torch.equal(grid.values(grid.levels(after[name])).to(after[name]), after[name])
    if grids:
        return
    data = ("--calibration", text_file, "--rows", 16, "--length", 32, "--leakage", "off")
    more = ("--batch", 4, "--epochs", 1, "--dtype", "float32", "-o", tmp_path / "again")
    calmix("recover", out, "--against", model, *data, *more).ok()
    _, recovered = stored(tmp_path / "again")
    assert any(not torch.equal(recovered[name], after[name]) for name in after)


@pytest.mark.parametrize("kind", quick(("llama", "opt"), EVERY))
def test_embeddings_and_head_are_rounded(kind):
    dense, model = tiny_model(kind), tiny_model(kind)
    prune(dense, tiny_ids(), bits=4)
    report = prune(model, tiny_ids(), bits=4, embeddings=4)
    pairs = zip(model.named_parameters(), dense.parameters(), strict=True)
    changed = {name for (name, one), other in pairs if not torch.equal(one, other)}
    assert changed == {f"{one.name}.weight" for one in report.outer}
    wide = {id(weight) for weight in outer_layers(model).values()}
    assert wide == {id(model.get_parameter(name)) for name in changed}
    for one in report.outer:
        assert one.bits == pytest.approx(4, abs=0.7)  # 2 bytes a row or column weigh
        name = f"{one.name}.weight"
        grid, value = report.grids[name], model.get_parameter(name)
        assert torch.equal(grid.values(grid.levels(value)).to(value.dtype), value)


@pytest.mark.parametrize("alike", [True, False])
def test_stored_head_is_rounded(tmp_path, alike):
    """With the embeddings, as which it is configured, or where it is another one, apart."""
    folder = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    weights, head = load_weights(folder), "lm_head.weight"
    weights[head] = (weights[TOKENS] if alike else weights[TOKENS].flip(0)).clone()
    source = StreamedModel(str(stored_as(folder, weights)))
    assert len(outer_layers(source.model)) == 1 or not alike
    source.close()
    model, tensors = in_memory(folder, 5), streamed_prune(folder, tmp_path / "out", embeddings=5)
    for name in (head, TOKENS):
        assert torch.equal(tensors[name], model.get_parameter(name))
        assert 0 < (tensors[name] - weights[name]).norm() < 0.2 * weights[name].norm()


@cases("kind how", ("llama", {"tie_word_embeddings": False}), ("bert", {"is_decoder": True}))
def test_head_is_solved_on_its_inputs(kind, how):
    """Than if its weights were just rounded; in BERT that is not what the decoder returns."""
    ids, apart = tiny_ids(), []
    for calibrated in (True, False):
        model, seen = tiny_model(kind, **how), []
        head = model.get_output_embeddings()
        dense = head.weight.clone()
        with pytest.MonkeyPatch.context() as patched:
            if not calibrated:
                patched.setattr(Run, "_head_gram", lambda *_: None)
            prune(model, ids, pattern=0.01, embeddings=3)
        head.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        model(ids)
        apart.append(float((seen[0].flatten(0, 1) @ (head.weight - dense).T).norm()))
    assert apart[0] < 0.9 * apart[1]


def test_unroundable_embeddings_are_refused_first():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused("9 bits", prune, model, tiny_ids(), bits=4, embeddings=9)
    how = {"bits": 4, "embeddings": 4, "error": ModelError}
    refused("LlamaModel has no output head", prune, model.model, tiny_ids(), **how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.lm_head.weight.data[0, 0] = torch.inf
    how = {"method": "magnitude", "embeddings": 4, "error": SolverError}
    refused("its weights or inputs are not finite", prune, model, pattern=0.5, **how)


def test_recover_and_pack_two_bits(calmix, text_file, tmp_path):
    """However far from the dense ones they are where the head hardly looks."""
    folder = save_tiny_model(tmp_path / "model", "llama")
    weights, rng = load_weights(folder), torch.Generator().manual_seed(0)
    low = torch.randn(32, 12, generator=rng) @ torch.randn(12, 64, generator=rng)
    weights["model.layers.1.mlp.down_proj.weight"] = low
    stored_as(folder, weights)
    data = ("--calibration", text_file, "--length", 32, "--leakage", "off", "--rows", 16)
    two, packed = tmp_path / "two", tmp_path / "pack"
    calmix("prune", folder, *data, "--bits", 4, "--embeddings", 2, "-o", two).ok()
    for way in ("blocks", "distill"):
        made, back = tmp_path / way, tmp_path / f"{way}-back"
        how = (*data, "--method", way, "--epochs", 1)
        calmix("recover", two, "--against", folder, *how, "-o", made).ok()
        assert torch.equal(load_weights(made)[TOKENS], load_weights(two)[TOKENS])
        calmix("export", made, "--to", "pack", "--overwrite", "-o", packed).ok()
        calmix("export", packed, "--to", "model", "-o", back).ok()
        assert hashes(back) == hashes(made)
