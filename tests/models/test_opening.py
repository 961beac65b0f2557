import hashlib
import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from calmix import assets
from calmix.errors import InputError, ModelError
from calmix.models import builtin_models, find_blocks, open_model, opening, resolve_model
from calmix.models.opening import context_of, tokenizer_fingerprint
from calmix.models.shards import Shards
from calmix.precision import fast_half_precision
from tests.tiny import save_tiny_model, tiny_model


def test_a_local_folder_opens_for_inference(tiny_folder):
    opened = open_model(str(tiny_folder))
    assert opened.context == 256
    assert opened.model.dtype == torch.float32
    assert not opened.model.training
    assert not any(p.requires_grad for p in opened.model.parameters())
    assert opened.tokenizer("ab")["input_ids"]
    assert len(find_blocks(opened.model)) == 2


def test_dtype_is_the_callers_or_the_checkpoints_own(tiny_folder, tmp_path):
    assert open_model(str(tiny_folder), dtype="bfloat16").model.dtype == torch.bfloat16
    folder = save_tiny_model(tmp_path / "half")
    tiny_model("llama").half().save_pretrained(folder)
    # No CPU multiplies float16 natively, so `auto` computes in float32 there.
    assert open_model(str(folder), device="cpu").model.dtype == torch.float32


def test_fingerprints_follow_the_bytes(tiny_folder, tmp_path):
    same = save_tiny_model(tmp_path / "same")
    other = save_tiny_model(tmp_path / "other", "qwen2")
    first = open_model(str(tiny_folder))
    assert first.fingerprint == open_model(str(same)).fingerprint
    assert first.fingerprint != open_model(str(other)).fingerprint
    assert first.tokenizer_fingerprint == open_model(str(same)).tokenizer_fingerprint
    before = first.tokenizer_fingerprint
    first.tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(first.tokenizer) != before


def rejected(name, match):
    with pytest.raises(ModelError, match=match) as caught:
        open_model(str(name))
    assert "\n" not in str(caught.value)


def test_unknown_names(tmp_path):
    rejected("builtin:smollm2-135n", "did you mean smollm2-135m")
    rejected("smollm2-135m", "did you mean builtin:smollm2-135m")
    rejected(tmp_path / "nothing", "no model folder or .gguf file")
    rejected("some-org/some-model", "the hub cannot be reached")
    rejected("not a hub id!", "neither a folder")


def test_folders_that_hold_no_usable_weights(tmp_path, tiny_folder):
    rejected(tmp_path, "no config.json")
    bare = tmp_path / "bare"
    bare.mkdir()
    config = (tiny_folder / "config.json").read_text(encoding="utf-8")
    (bare / "config.json").write_text(config, encoding="utf-8")
    rejected(bare, "holds no weights")
    (bare / "pytorch_model.bin").write_bytes(b"\x80")
    rejected(bare, "pickled weights only")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (bare / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    rejected(bare, "lacks the weight file model-00001-of-00002")


def test_damaged_weights(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    rejected(folder, "is cut short")


def test_missing_weights(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rejected(folder, "lacks 1 weights")


def test_quantised_models_are_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rejected(folder, "is quantised")


def test_files_that_are_no_gguf(tmp_path):
    text = tmp_path / "model.txt"
    text.write_text("x", encoding="utf-8")
    rejected(text, "no .gguf")
    fake = tmp_path / "model.gguf"
    fake.write_bytes(b"GGUF but not really")
    rejected(fake, "cannot open")


def test_weights_that_are_there_twice_are_read_and_hashed_once(tiny_folder, tmp_path):
    """Mistral puts its own form beside the shards."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    before = open_model(str(folder)).fingerprint
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert open_model(str(folder)).fingerprint == before
    assert Shards(folder).files == ["model.safetensors"]


def test_weights_that_are_there_twice_are_fetched_once(tiny_folder, tmp_path, monkeypatch):
    def download(name, *, allow_patterns, ignore_patterns=None):
        held = [*(p.name for p in tiny_folder.iterdir()), "consolidated.safetensors",
                "consolidated-00001-of-00002.safetensors"]  # fmt: skip
        for file in filter_repo_objects(
            held, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            shutil.copy(tiny_folder / file.replace("consolidated", "model"), tmp_path / file)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert {p.name for p in resolve_model("some/one").iterdir()} == {
        p.name for p in tiny_folder.iterdir()
    }


def test_all_models_are_looked_for_before_one_is_fetched(tiny_folder, monkeypatch):
    asked = []

    class Api:
        def model_info(self, name):
            asked.append(name)
            if name == "some/none":
                answer = SimpleNamespace(status_code=404, headers={}, request=None)
                raise errors.RepositoryNotFoundError("no", response=answer)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *of, **more: pytest.fail("fetched")
    )
    monkeypatch.setattr(opening.assets, "install", lambda *of: pytest.fail("fetched"))
    opening.check_models("builtin:smollm2-135m", "some/one", str(tiny_folder), None)
    assert asked == ["some/one"]
    for name, words in (
        ("some/none", "the hub has no open model 'some/none'"),
        ("builtin:smol", "unknown builtin model 'smol'"),
        ("./nowhere", "there is no model folder or .gguf file at nowhere"),
    ):
        with pytest.raises(ModelError, match=words):
            opening.check_models("some/one", name)


def killed_halfway(folder):
    """What a killed process leaves beside a folder in the cache."""
    left = folder.parent / f".{folder.name}.partial-abc"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")


@pytest.mark.parametrize("name", ["builtin:smollm2-135m", "gguf"])
def test_several_that_want_a_gguf_file_dequantise_it_once(tmp_path, monkeypatch, name):
    """A second begins while the first is at it, and takes what the first has made."""
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(opening.assets, "install", lambda name: None)
    monkeypatch.setattr(opening.assets, "extract", lambda *of: None)
    if name == "gguf":
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF")
        name = str(file)
    made, found, others = [], [], []

    def dequantise(file, folder):
        made.append(folder)
        if len(made) == 1:
            others.append(threading.Thread(target=lambda: found.append(resolve_model(name))))
            others[0].start()
            others[0].join(0.5)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(opening, "_dequantise", dequantise)
    first = resolve_model(name)
    others[0].join()
    assert found == [first]
    assert made == [first]
    assert [p.name for p in first.parent.iterdir()] == [first.name]


def test_what_a_killed_process_left_in_the_cache_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    fake = tmp_path / "model.gguf"
    fake.write_bytes(b"GGUF but not really")
    key = hashlib.sha256(fake.read_bytes()).hexdigest()
    killed_halfway(tmp_path / "cache" / "models" / f"gguf-{key[:16]}")
    rejected(fake, "cannot open")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_context_without_end_is_none():
    assert context_of(AutoConfig.for_model("xlnet")) is None  # its configuration says -1


def test_a_folder_without_tokenizer(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    rejected(tmp_path / "model", "no usable tokenizer")


def test_ids_are_looked_at_only_where_a_tokenizer_could_give_wrong_ones(tmp_path, tiny_folder):
    """Looking makes the host wait for a device in every pass."""
    opened = open_model(str(tiny_folder))
    assert not opened.model.get_input_embeddings()._forward_pre_hooks
    small = open_model(str(save_tiny_model(tmp_path / "model", vocab_size=200))).model
    with pytest.raises(ModelError, match="has no embedding for token id 258, its last is 199"):
        small(torch.tensor([[3, 258]]))


def test_unknown_dtype_and_device(tiny_folder):
    with pytest.raises(InputError, match=r"unknown dtype 'bfloat17'.*bfloat16"):
        open_model(str(tiny_folder), dtype="bfloat17")
    with pytest.raises(InputError, match="device 'warp'"):
        open_model(str(tiny_folder), device="warp")


@pytest.mark.real
def test_the_builtin_model_is_real_text_and_saves_again(tmp_path):
    opened = open_model("builtin:smollm2-135m")
    assert resolve_model("builtin:smollm2-135m") == opened.folder
    assert opened.context == 8192
    assert sum(p.numel() for p in opened.model.parameters()) == 134_515_008
    ids = opened.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        next_id = int(opened.model(**ids).logits[0, -1].argmax())
    assert opened.tokenizer.decode([next_id]).strip() == "Paris"
    # As its description says: of 32 weights in a row, no more than sixteen values.
    weight = opened.model.model.layers[7].mlp.down_proj.weight
    assert max(len(group.unique()) for group in weight[:8].reshape(-1, 32)) <= 16
    assert "dequantised from 4-bit weights" in builtin_models()["smollm2-135m"].description
    opened.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == opened.model.dtype


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "kind", "weights", "text", "follows"),
    [
        ("gemma3-270m", "gemma3_text", 268_098_176, "One, two, three, four,", "five"),
        ("qwen2.5-coder-0.5b", "qwen2", 630_167_424, "def add(a, b):\n    return a +", "b"),
    ],
)
def test_a_builtin_model_is_put_together_from_its_parts(name, kind, weights, text, follows):
    known = builtin_models()[name]
    if any(assets.get_asset(part).state != "ok" for part in known.parts):
        pytest.skip(f"fetched only on request: calmix doctor assets {name}-part1 --install ...")
    opened = open_model(f"builtin:{name}")
    assert opened.model.config.model_type == kind
    assert sum(p.numel() for p in opened.model.parameters()) == weights
    ids = opened.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        next_id = int(opened.model(**ids).logits[0, -1].argmax())
    assert opened.tokenizer.decode([next_id]).strip() == follows


def test_an_older_torch_tells_of_fewer_instructions(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    for able in (True, False):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able, raising=False
        )
        assert fast_half_precision(torch.bfloat16) == able
