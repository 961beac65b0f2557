"""llama.cpp's recipes: a type of GGML for each matrix of a model, by its place.

A recipe has the name of the file it makes, such as Q3_K_M. Its types are those that llama.cpp's
quantiser (build 11739) chooses when it has an importance matrix. Its rules for Falcon and mixtures
of experts are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from calmix.errors import InputError, nearest

if TYPE_CHECKING:
    from calmix.models.blocks import DecoderBlocks

SMALLEST_BLOCK = 32  # weights in the smallest block
LARGE_BLOCKS = 80  # blocks of a model of 70 billion weights
TENSOR_ROLES = {  # of the tensors of the gguf package
    "ATTN_V": "v",
    "ATTN_QKV": "v",
    "ATTN_KV_B": "v",
    "ATTN_K": "k",
    "ATTN_Q": "q",
    "ATTN_OUT": "out",
    "FFN_DOWN": "down",
    "FFN_UP": "up",
    "FFN_GATE": "gate",
}
FULL, HALF = {"head": "Q6_K"}, {"head": "Q5_K"}
THREE = {**HALF, "out": "IQ3_S", "embedding": "IQ3_S"}
TWO = {**HALF, "v": "Q4_K:grouped Q2_K", "down": "Q2_K:eighth", "embedding": "Q2_K"}
BETWEEN = {**THREE, "v": "Q4_K:grouped IQ3_S", "down": "IQ3_S:eighth"}
# The type of most matrices, then for each role the first type whose condition holds.
RECIPES: dict[str, tuple[str, Mapping[str, str]]] = {
    "Q2_K": ("Q2_K", {**FULL, "v": "Q4_K:grouped Q3_K", "down": "Q3_K", "out": "Q3_K"}),
    "Q2_K_S": ("Q2_K", {**FULL, "v": "Q4_K:grouped", "down": "Q4_K:eighth"}),
    "Q3_K_S": ("Q3_K", FULL),
    "Q3_K_M": (
        "Q3_K",
        {**FULL, "v": "Q5_K:two Q4_K", "down": "Q5_K:sixteenth Q4_K", "out": "Q4_K"},
    ),
    "Q3_K_L": ("Q3_K", {**FULL, "v": "Q5_K", "down": "Q5_K", "out": "Q5_K"}),
    "Q4_K_S": ("Q4_K", {**FULL, "v": "Q5_K:four", "down": "Q5_K:eighth"}),
    "Q4_K_M": ("Q4_K", {**FULL, "v": "Q6_K:some", "down": "Q6_K:some"}),
    "Q5_K_S": ("Q5_K", FULL),
    "Q5_K_M": ("Q5_K", {**FULL, "v": "Q6_K:some", "down": "Q6_K:some"}),
    "Q6_K": ("Q6_K", FULL),
    "Q8_0": ("Q8_0", {"head": "Q8_0"}),
    "Q4_0": ("Q4_0", {**FULL, "down": "Q4_1:eighth"}),
    "Q4_1": ("Q4_1", FULL),
    "Q5_0": ("Q5_0", {**FULL, "down": "Q5_1:eighth"}),
    "Q5_1": ("Q5_1", FULL),
    "IQ4_NL": ("IQ4_NL", {**FULL, "v": "Q5_K:grouped"}),
    "IQ4_XS": ("IQ4_XS", {**FULL, "v": "Q5_K:grouped"}),
    "IQ3_M": ("IQ3_S", {**FULL, "v": "Q4_K", "down": "Q4_K:eighth", "out": "Q4_K"}),
    "IQ3_S": ("IQ3_S", {**FULL, "v": "Q4_K:grouped"}),
    "IQ3_XS": (
        "IQ3_S",
        {
            **FULL,
            "v": "Q4_K:grouped",
            **dict.fromkeys(("q", "k"), "IQ3_XXS"),
            **dict.fromkeys(("up", "gate"), "IQ3_XXS:middle"),
        },
    ),
    "IQ3_XXS": ("IQ3_XXS", {**THREE, "v": "Q4_K:grouped", "q": "IQ2_S", "k": "IQ2_S"}),
    "IQ2_M": ("IQ2_S", BETWEEN),
    "IQ2_S": ("IQ2_XS", BETWEEN),
    "IQ2_XS": ("IQ2_XS", TWO),
    "IQ2_XXS": ("IQ2_XXS", TWO),
}


def _holds(condition: str, at: int, count: int, grouped: bool) -> bool:
    """Whether a condition holds for the matrix `at` of `count` that have its role."""
    eighth, last = at < count // 8, at >= 7 * count // 8
    return {
        "": True,
        "grouped": grouped,
        "two": at < 2,
        "four": at < 4,
        "sixteenth": at < count // 16,
        "eighth": eighth,
        "middle": not (eighth or last),
        "some": eighth or last or (at - count // 8) % 3 == 2,
    }[condition]


@cache
def _roles() -> dict[str, str]:
    """Return the roles of a block's matrices by their names in it."""
    from gguf.tensor_mapping import TensorNameMap

    pairs = TensorNameMap.block_mappings_cfg.items()
    return {
        name.partition("{bid}.")[2]: TENSOR_ROLES[tensor.name]
        for tensor, names in pairs
        if tensor.name in TENSOR_ROLES
        for name in names
    }


def recipe_name(name: str) -> str:
    """Return the name of a recipe, in capitals or not; Q3_K is Q3_K_M, as for llama.cpp."""
    short = name.upper()
    if known := next((one for one in (short, f"{short}_M") if one in RECIPES), None):
        return known
    raise InputError(f"unknown type '{name}': {nearest(short, RECIPES)}")


def check_whole(blocks: DecoderBlocks, what: str) -> None:
    """Refuse types by matrix for a model with experts or transposed matrices, whose blocks are not
    stored."""
    if not all(layer.whole_matrix for layer in blocks.layers):
        raise InputError(
            f"{what} are types for models without experts and transposed matrices: for one type "
            "everywhere, write --pattern 'Q4_K blocks'"
        )


def recipe_types(
    name: str, config: Any, blocks: DecoderBlocks, outer: Mapping[str, Any]
) -> dict[str, str]:
    """Return the types of a recipe by layer name, before blocks of 256 are fitted to rows.

    `outer` are embeddings and output head, included unless no block fits their rows.
    """
    check_whole(blocks, name)
    base, rules = RECIPES[name]
    config = config.get_text_config(decoder=True)
    heads, keys = (
        getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")
    )
    share = heads // keys if isinstance(heads, int) and isinstance(keys, int) else 1
    layers = [one for at in range(len(blocks)) for one in blocks.prunables(at, every=True)]
    inside = (one.name.removeprefix(f"{blocks.name}.").partition(".")[2] for one in layers)
    roles = [_roles().get(name, "") for name in inside]
    numbers, seen, types = Counter(roles), Counter[str](), dict[str, str]()
    for layer, role in zip(layers, roles, strict=True):
        count = numbers[role] if role == "v" else len(blocks)
        for word in (*rules.get(role, "").split(), base):
            kind, _, condition = word.partition(":")
            if _holds(condition, seen[role], count, share >= 4):
                break
        if role == "v" and len(blocks) == LARGE_BLOCKS and share > 1 and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
        seen[role] += 1
        types[layer.name] = kind
    types = {layer.name: types[layer.name] for layer in blocks.layers}
    for at, (layer_name, weight) in enumerate(outer.items()):
        kind, columns = rules.get("embedding", base), weight.shape[1]
        if at == 0:  # the head, or the matrix shared with it
            kind = "Q8_0" if columns % 256 else rules["head"]
        if columns % SMALLEST_BLOCK == 0:
            types[layer_name] = kind
    return types
