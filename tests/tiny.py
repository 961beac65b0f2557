"""Tiny random models of many architectures, built from configurations; no download."""

import copy
import functools
import hashlib
import inspect
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320
ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_neox",
    "opt",
    "gpt2",
    "phi",
    "falcon",
    "stablelm",
    "granite",
    "cohere",
    "starcoder2",
    "glm",
    "bloom",
    "gpt_bigcode",
    "smollm3",
    "gemma4_text",
)
MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "llama4_text",
)
SIZES = {
    0: "pad_token_id",
    1: "n_shared_experts first_k_dense_replace bos_token_id",
    2: "num_hidden_layers num_key_value_heads num_experts_per_tok n_group topk_group eos_token_id "
    "sliding_window_pattern",
    4: "num_attention_heads num_experts num_local_experts n_routed_experts",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim",
    16: "q_lora_rank kv_lora_rank sliding_window",
    32: "hidden_size moe_intermediate_size shared_expert_intermediate_size",
    64: "intermediate_size intermediate_size_mlp",
    256: "max_position_embeddings",
    VOCABULARY: "vocab_size",
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
GEMMA4 = {  # the last two blocks read keys and values of the first two
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
OWN = {
    "gpt_neox": {"tie_word_embeddings": False},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    # Every head has keys of its own.
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma4_text": GEMMA4,
    "gemma3n_text": GEMMA4  # four streams between its blocks
    | {"intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8},
    # Whose blocks return float32.
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "zamba": {  # two of its blocks share a transformer
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
}


def tiny_config(kind):
    """Return a configuration of width 32 with two blocks (four where kinds alternate)."""
    wanted = {name: size for size, names in SIZES.items() for name in names.split()}
    wanted |= {"num_hidden_layers": 4} if kind.startswith("gemma") else {}
    wanted |= {"tie_word_embeddings": True} | OWN.get(kind, {})
    if "n_positions" in wanted:
        wanted = {k: v for k, v in wanted.items() if not k.startswith(("num_", "hidden", "max_"))}
    known = inspect.signature(type(AutoConfig.for_model(kind)).__init__).parameters
    return AutoConfig.for_model(kind, **{k: v for k, v in wanted.items() if k in known})


def tiny_model(kind, seed=0, **settings):
    """Return a tiny random model in float32, its weights large enough to matter."""
    model, state = _made(kind, seed, json.dumps(settings))
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.cache
def _made(kind, seed, settings):
    """The model, and the state that making it has left the generator in."""
    torch.manual_seed(seed)
    config = tiny_config(kind)
    config.update(json.loads(settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 3):
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif kind == "gemma3n_text" and not parameter.any():  # nothing would come through
                parameter.fill_(0.5)
    return model.requires_grad_(False), torch.get_rng_state()


def quick(chosen, others):
    """Return parameters of a test: the chosen ones, and the others for `make test-long` alone."""
    rest = [one for one in others if one not in chosen]
    return [*chosen, *(pytest.param(one, marks=pytest.mark.long) for one in rest)]


def tiny_ids(rows=12, length=32, seed=1):
    """Return random token ids (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def tiny_tokenizer(chat_template=None):
    """Return a byte-level tokenizer whose ids fit the tiny models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def save_tiny_model(folder, kind="llama", seed=0, **settings):
    """Save a tiny model with its tokenizer and return the folder."""
    tiny_model(kind, seed, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def hashes(folder):
    """Return hashes of all files but the run record, which holds date and seconds."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "calmix-run.json"
    }


def load_weights(folder):
    """Return all tensors of a model folder, of however many files."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def longer(model, folder):
    """Copy a tiny model with room for real text, which takes more bytes than it has positions."""
    shutil.copytree(model, folder)
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"max_position_embeddings": 2048}
    config.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def tiny_text(path):
    """Write a text file of a few thousand tokens and return its path."""
    path.write_text("\n\n".join(f"Line {n} of some text." for n in range(400)), encoding="utf-8")
    return path


def tiny_gguf(path, context=None, **rope):
    """Write the tiny llama as GGUF in float32; `rope` are factors of its positions."""
    from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map

    config, model = tiny_config("llama"), tiny_model("llama")
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(config.head_dim)
    for key, value in rope.items():
        writer.add_float32(f"llama.rope.scaling.{key}", value)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), "ab", "bc"]
    tokens += [f"<unused{n}>" for n in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "b c"])  # older transformers take a list of one for text
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
