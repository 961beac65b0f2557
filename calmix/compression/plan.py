"""What a compression is to make: its request, checked before any work, and what efforts mean."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

from calmix.calibration.dataset import CalibrationSet, saved_set
from calmix.calibration.request import CalibrationRequest, parse_calibration
from calmix.calibration.selfgen.generators import CHAT
from calmix.calibration.selfgen.prompts import chat_turns
from calmix.calibration.tokenizer import OpenTokenizer, open_tokenizer
from calmix.compression.folder import BEHAVIOUR, PROMPTS, SCORES
from calmix.deploy.compressed_tensors import group_for
from calmix.deploy.gguf import check_export, layout_of, layout_sha256, overhead
from calmix.errors import InputError, nearest
from calmix.evaluation.floors import CONFIDENCE, items_needed, parse_floors
from calmix.evaluation.suites import Suite, choose, prompt_suite, runnable, suite_file
from calmix.evaluation.tasks import suite_items
from calmix.files import cached_sha256, sha256_file, size_text, user_path
from calmix.memory import parse_memory
from calmix.models.empty import EmptyModel
from calmix.models.folder import fingerprint
from calmix.models.opening import OpenModel, check_models, resolve_model
from calmix.models.shards import stored_tensors, weight_bytes, weight_dtype
from calmix.options import (
    BITS_METHOD,
    COMPRESS_METHOD,
    MOST_EMBEDDING,
    Compression,
    DeviceOptions,
    Target,
    flags,
    parse_share,
)
from calmix.pruning.allocation import check_bits, file_weights, planned_bytes
from calmix.pruning.engine import check_pattern
from calmix.pruning.held_out import PER_INPUT, rows_needed
from calmix.pruning.imatrix import importance
from calmix.pruning.methods import get_method
from calmix.pruning.methods.gptq import Gptq
from calmix.pruning.patterns import Mixed, Recipe
from calmix.pruning.requests import LENGTH, SEED, prune_request
from calmix.pruning.solvers.ggml_types import block_type
from calmix.pruning.type_recipes import RECIPES, check_whole
from calmix.sources.licences import NON_COMMERCIAL, use_of
from calmix.sources.mixes import MIXES, mix_text, parse_mix
from calmix.sources.registry import builtin_sources, get_source, local_file

DEFAULT_BITS = 4.5
DEFAULT_TYPE = "Q4_K_M"  # default of GGUF files
# Options without effect where an importance matrix takes the place of calibration text.
IMPORTED = ("bits", "size", "keep_at_least", "calibration", "keep", "no_corpus", "licence", "seed")
WHOLE = 4.0  # default bits of levels in a checkpoint for vLLM
# Bits per weight that --size may result in. Above, levels do not fit a byte; below, a Huffman code
# takes more than their entropy.
FEWEST_BITS, MOST_BITS = 1.5, 7.0
SURVIVED = 2.0  # fewest bits at which a measured model keeps much of its answers
SPARSEST = 0.7  # largest share of zeros at which answers of a model were measured
BUILDS = 3  # candidates that a search for --keep-at-least builds at most
FORMAT_OVERHEAD = 0.015  # share of a file for scales and the overhead of the entropy coder
HEADER = 300  # bytes of a packed tensor's names and offsets


@dataclass(frozen=True)
class Effort:
    """How much time a compression spends."""

    rows: int  # of the calibration set
    recoveries: tuple[str, ...]  # one after the other
    epochs: int  # of the last recovery
    likelihood: Mapping[str, Any] | None  # the slice of the likelihood suite that is scored, if any
    behaviour: Mapping[str, Any]  # the slice of the behaviour suite
    levels: float = 3.9  # most bits at which quantised weights are trained
    steps: float = 0.0  # most bits at which the steps of a GGUF file are trained
    repeat: bool = True  # whether the dense model's answers are generated twice
    per_input: int = PER_INPUT  # tokens for each input of the widest layer, at least
    length: int = LENGTH  # of a row of the calibration set


QUICK = {"quick": True}
SHORT = {**QUICK, "without": ("gsm8k",)}  # its answers take longest


def guarded(suite: str) -> str:
    """Return the suites that calibration text may share no items with: all that are scored."""
    return suite if suite == "abilities" else f"{suite},abilities"


EFFORTS = {
    "quick": Effort(
        16, ("distill",), 1, None, SHORT, levels=3.0, repeat=False, per_input=2, length=128
    ),
    "standard": Effort(64, ("distill",), 2, QUICK, QUICK),
    "best": Effort(192, ("blocks", "distill"), 2, {}, {}, 4.5, 3.5, per_input=2 * PER_INPUT),
}


def splits(request: Target) -> bool:
    """Whether half of the user's prompts are calibrated on, so that only the others can test."""
    if request.imatrix is not None:
        return False
    if request.prompts is None or (text := request.calibration) is None:
        return request.prompts is not None
    if (saved := saved_set(text)) is not None:
        manifest = CalibrationSet.open(saved).manifest
        return "prompts" in {manifest.get("generated"), *(manifest.get("written") or {})}
    return bool(re.search(r"(?:^|,)\s*prompts\s*(?:[:,]|$)", text))


def score_files(request: Target) -> list[str]:
    """Return the files of scores that a compression leaves, but for those of the user's prompts."""
    if request.suite != "offline":
        return [SCORES]
    return [BEHAVIOUR] if EFFORTS[request.effort].likelihood is None else [SCORES, BEHAVIOUR]


def slices(request: Target) -> dict[str, tuple[Suite | str, Mapping[str, Any]]]:
    """Return the suite of each score file and the slice that is scored.

    At standard effort the slice has all items of abilities with a floor. A suite other than
    `offline` is scored alone and without a limit; so are the user's prompts.
    """
    effort, alone = EFFORTS[request.effort], request.suite != "offline"
    suite, part = "abilities", effort.behaviour
    if alone:
        suite = request.suite
        part = {key: one for key, one in effort.behaviour.items() if key == "quick"}
    if request.keep_at_least is not None and request.effort == "standard":
        floors = parse_floors(request.keep_at_least)
        named = tuple(name for name in choose(suite).dimensions if name in floors)
        part = {} if "" in floors else {**part, "whole": named}
    parts: dict[str, tuple[Suite | str, Mapping[str, Any]]]
    parts = dict.fromkeys(score_files(request), (suite, part))
    if len(parts) > 1:
        parts[SCORES] = request.suite, effort.likelihood or {}
    if request.prompts is not None:
        parts[PROMPTS] = prompt_suite(request.prompts, test_half=splits(request)), {}
    return parts


def decisive(request: Target) -> list[str]:
    """Return the score files that floors are tested on: behaviour, which has every ability, or a
    suite that is scored alone, and the user's prompts; of these only the ones that are named."""
    floors = parse_floors(request.keep_at_least or "0.5")
    files = [*score_files(request)[-1:], PROMPTS]
    known = scored(request)
    files = [file for file in files if file in known]
    named = [file for file in files if floors.keys() & known[file].dimensions.keys()]
    return files if "" in floors or not named else named


def scored(request: Target) -> dict[str, Suite]:
    """Return the sliced suite of each score file, without tasks that may not run."""
    return {
        file: runnable(choose(name, **part), request.allow_code_execution)[0]
        for file, (name, part) in slices(request).items()
    }


class CompressRequest(Target):
    """A checked request: everything that decides what OUT will hold.

    `calibration` is a specification for `calmix calibrate` or a saved set's folder; the hashes are
    of the model's files and the user's own prompts and suite; the set has `rows` of `length`
    tokens.
    """

    calibration: str
    seed: int
    sha256: str
    prompts_sha256: str | None
    suite_sha256: str | None = None
    like_sha256: str | None = None
    imatrix_sha256: str | None = None
    rows: int
    length: int

    @property
    def draw(self) -> dict[str, Any]:
        """How the calibration text is drawn (`calmix.calibration_set`)."""
        return {
            "rows": self.rows,
            "length": self.length,
            "seed": self.seed,
            "leakage": guarded(self.suite),
            "licence": self.licence,
            "prompts": self.prompts if splits(self) else None,
        }

    @property
    def drawing(self) -> CalibrationRequest:
        """The checked request for the set."""
        return parse_calibration(self.calibration, **({} if self.saved else self.draw))

    @property
    def how(self) -> dict[str, Any]:
        """How the model is opened (`calmix.open_model`)."""
        return {name: getattr(self, name) for name in DeviceOptions.model_fields}

    @property
    def saved(self) -> bool:
        """Whether the calibration set already exists."""
        return saved_set(self.calibration) is not None

    @property
    def file(self) -> str:
        """Name of what OUT ends with: the model's folder or file."""
        return "model.gguf" if self.product == "gguf" else "model"

    @property
    def most(self) -> int | None:
        """Bytes of memory to use at most."""
        return None if self.max_memory is None else parse_memory(self.max_memory)

    @property
    def epochs(self) -> int:
        """Epochs of the last recovery: one in a search at standard effort, with several of them."""
        searches = self.keep_at_least is not None and self.effort == "standard"
        return 1 if searches else EFFORTS[self.effort].epochs

    @property
    def target(self) -> str:
        """The target as text: `60 %`, `2:4`, `2.8 bits`, `50 %, 4 bits`."""
        return target(self.model_dump())


def target(request: Mapping[str, Any]) -> str:
    """Return the target of a request as text."""
    share = None if request["sparsity"] is None else f"{100 * request['sparsity']:g} %"
    bits = None if request.get("bits") is None else f"{request['bits']:g} bits"
    group = f"groups of {request['group']}" if request.get("group") else None
    return ", ".join(filter(None, (request["pattern"] or share, bits, group, request.get("type"))))


def is_sparse(request: Target) -> bool:
    """Whether weights are pruned."""
    return (request.sparsity, request.pattern) != (None, None)


def product_of(request: Target) -> str:
    """Return what a request makes (`--for`)."""
    return request.product or ("none" if is_sparse(request) else "gguf")


def aim(request: Target) -> dict[str, Any]:
    """Return method and target as options of a pruning run."""
    if product_of(request) == "gguf" and request.imatrix is not None:
        file = f"imatrix={request.imatrix}"
        return {"method": f"llama,type={request.type},{file}", "bits": None}
    if product_of(request) == "gguf":
        kind = "" if request.type is None else f",type={request.type}"
        return {"method": f"ggml{kind}", "bits": request.bits and f"{request.bits:g}"}
    if product_of(request) == "vllm":
        kind = ",symmetric=false" * request.asymmetric
        return {"method": f"gptq,group={request.group or 128}{kind}", "bits": f"{request.bits:g}"}
    return {
        "method": COMPRESS_METHOD if is_sparse(request) else BITS_METHOD,
        "sparsity": request.sparsity,
        "pattern": request.pattern,
        "bits": None if request.bits is None else f"{request.bits:g}",
        "embeddings": None if request.bits is None else embedding_bits(request.bits),
    }


def recoveries(request: Target) -> tuple[str, ...]:
    """Return the methods of recovery, one after the other."""
    effort = EFFORTS[request.effort]
    if request.imatrix is not None:  # there is no text to train on
        return ()
    if product_of(request) == "gguf":  # by block, levels would move
        bits = request.bits or block_type(RECIPES[request.type or DEFAULT_TYPE][0]).bits
        return effort.recoveries[-1:] if bits <= effort.steps else ()
    few = request.bits is not None and request.bits <= effort.levels
    return effort.recoveries if is_sparse(request) or few else ()


def embedding_bits(bits: float) -> float:
    """Return the bits of embeddings and output head, given those of the blocks.

    With equal bits a byte saves as much error there as in the blocks (benchmarks/embeddings.py).
    """
    return min(max(bits, 2.0), MOST_EMBEDDING)


empty_model = lru_cache(maxsize=1)(EmptyModel)  # size and estimate share one


def _empty(request: Target) -> EmptyModel:
    return empty_model(request.model, "auto", request.device, request.trust_remote_code)


def parse_size(text: str, dense: int) -> float:
    """Return bytes from `120MB`, or from a share of the dense size: `0.25`, `25%`."""
    if re.search(r"[a-zA-Z]", text):
        return parse_memory(text, "--size")
    try:
        share = parse_share(text)
    except ValueError as error:
        raise InputError(f"--size: {error}") from None
    if not 0 < share < 1:
        raise InputError(f"--size {text}: a share of the dense size is between 0 and 1")
    return float(share * dense)


def packed_bytes(bits: float, matrices: int, outer: int, rest: float = 0) -> float:
    """Return the size of a pack with so many weights in block matrices, at `bits`, and in
    embeddings and head; everything else takes `rest` bytes."""
    return (1 + FORMAT_OVERHEAD) * (rest + (bits * matrices + embedding_bits(bits) * outer) / 8)


def pack_sizes(request: Target) -> Callable[[float], float] | None:
    """Return a function from bits per block weight to bytes of a pack; None if a pack does not hold
    the levels of all matrices."""
    folder = resolve_model(request.model)
    empty = _empty(request)
    if not all(one.whole_matrix for one in empty.blocks.layers):
        return None
    matrices = sum(p.numel() for p in empty.blocks.blocks.parameters() if p.ndim > 1)
    stored = stored_tensors(folder)
    levels = weight_dtype(stored).itemsize * (matrices + empty.outer_weights)
    rest = weight_bytes(folder) - levels + HEADER * len(stored)
    return partial(packed_bytes, matrices=matrices, outer=empty.outer_weights, rest=rest)


def bits_for(request: Target) -> float:
    """Return the bits per weight at which a file or pack has the requested size."""
    dense = weight_bytes(resolve_model(request.model))
    wanted = parse_size(request.size or "", dense)
    if product_of(request) == "gguf":
        tensors = wanted - overhead(request.model, request.like)
        return math.floor(800 * tensors / file_weights(_empty(request).model)) / 100
    if product_of(request) == "vllm":
        most = _most_bits(request)
        low, high = (checkpoint_bytes(request, bits) for bits in (2, most))
        if wanted < low:
            raise InputError(
                f"--size {request.size} is out of reach: a checkpoint of {request.model} in 2 bits "
                f"has {size_text(low)}"
            )
        bits = 2 + (most - 2) * (wanted - low) / (high - low)
        return min(math.floor(100 * bits) / 100, most)
    if (size := pack_sizes(request)) is None:
        raise InputError(
            f"--size: {request.model} has fused or transposed matrices, or experts, whose levels a "
            "pack does not hold: use --bits"
        )
    rates = [number / 100 for number in range(round(100 * FEWEST_BITS), round(100 * MOST_BITS) + 1)]
    if not size(FEWEST_BITS) <= wanted <= size(MOST_BITS):
        raise InputError(
            f"--size {request.size} is out of reach: a pack of {request.model} has from "
            f"{size_text(size(FEWEST_BITS))} to {size_text(size(MOST_BITS))} "
            f"(dense: {size_text(dense)})"
        )
    return max(bits for bits in rates if size(bits) <= wanted)


def checkpoint_bytes(request: Target, bits: float) -> float:
    """Return about the bytes of a checkpoint in compressed-tensors."""
    folder, blocks = resolve_model(request.model), _empty(request).blocks
    width = weight_dtype(stored_tensors(folder)).itemsize
    beside = 8 * width + bits * request.asymmetric
    rate = bits + beside / group_for(blocks, request.group)
    matrices = sum(math.prod(layer.shape) for layer in blocks.layers)
    return weight_bytes(folder) + matrices * (rate / 8 - width) + HEADER * len(blocks.layers)


def file_bytes(request: Target) -> float:
    """Return the bytes of a GGUF file."""
    text = "" if request.imatrix is None else None
    empty, target = _empty(request), prune_request(**aim(request), calibration=text).target
    tensors = planned_bytes(target, empty.model, empty.blocks) or 0
    return overhead(request.model, request.like) + tensors


def restricted_sources(request: CompressRequest) -> str:
    """Return a warning that names text which its licence keeps from commercial use."""
    if request.imatrix is not None or request.saved:
        return ""
    sources, mix = builtin_sources(), request.drawing.mix
    closed = [
        name for name in mix if name in sources and use_of(sources[name].licence) == NON_COMMERCIAL
    ]
    text = "not for commercial use, by licence: the calibration text "
    return f"{text}{', '.join(closed)} (--licence permissive leaves it out)" if closed else ""


def wide_embeddings(request: Target) -> str:
    """Return a warning if the embeddings of a checkpoint for vLLM, in 16 bits, decide its size."""
    if product_of(request) != "vllm" or request.bits is None:
        return ""
    weights, size = file_weights(_empty(request).model), checkpoint_bytes(request, request.bits)
    if (rate := 8 * size / weights) < request.bits + 1:
        return ""
    text = (
        f"embeddings stay in 16 bits: with them the checkpoint takes {rate:.2f} bits per weight, "
        f"{size_text(size)}"
    )
    with suppress(InputError):  # its layout may not be known
        other = {"product": "gguf", "bits": None, "type": DEFAULT_TYPE}
        file = file_bytes(request.model_copy(update=other))
        if file <= 1.1 * size:
            text += f"; a GGUF file in {DEFAULT_TYPE} (--for gguf) has {size_text(file)}"
    return text


def reachable(request: Target, bits: float) -> bool:
    """Whether a model can have so many bits per weight."""
    if product_of(request) == "gguf":
        with suppress(InputError):
            check_bits(bits, _empty(request).model, _empty(request).blocks)
            return True
        return False
    return bits <= _most_bits(request)


def _most_bits(request: Target) -> int:
    """Return the most bits of levels in a checkpoint for vLLM."""
    return Gptq(symmetric=not request.asymmetric).choices[-1]


class Checked(NamedTuple):
    """What a user's options ask for, as far as it is known without the model; `target` has the
    fields of `CompressRequest` that are filled in."""

    text: str
    target: dict[str, Any]
    prompts_sha256: str | None


def check_options(options: Compression) -> Checked:
    """Check a user's options without the model."""
    named, saved = options.calibration, saved_set(options.calibration) is not None
    _check_idle(options, saved)
    mix = MIXES["mix-default" if options.licence is None else "mix-permissive"]
    text = "self-written" if options.no_corpus else mix_text(mix) if named is None else named
    if options.keep is not None:
        own = {} if named is None or not splits(options) else {"prompts": options.prompts}
        text = mix_text(weighed(text, options.keep, **own))
    if splits(options) and named is None:
        text = _beside("prompts", text)
    draw: dict[str, Any] = {
        "rows": EFFORTS[options.effort].rows,
        "leakage": guarded(options.suite),
        "seed": options.seed,
        "prompts": options.prompts if splits(options) else None,
    }
    draw = {name: value for name, value in draw.items() if value is not None}
    text = "" if options.imatrix else text
    how = {} if saved else draw
    parsed = parse_calibration(text, licence=options.licence, **how) if text else None
    # The checks of all stages, made before the first begins.
    product, prompts = product_of(options), None
    target = {"product": product, "bits": options.bits, "type": options.type}
    if options.like is not None:
        layout_of(str(options.like))
    if options.size is not None:
        parse_size(options.size, 2**62)
    elif options.keep_at_least is not None:
        _check_floors(options)
    else:
        if (options.bits, options.type) == (None, None) and not is_sparse(options):
            usual = WHOLE if product == "vllm" else DEFAULT_BITS
            target |= {"type": DEFAULT_TYPE} if product == "gguf" else {"bits": usual}
        aimed = aim(options.model_copy(update=target))
        request = prune_request(**aimed, calibration=text or None, prompts=draw.get("prompts"))
        if target["type"]:
            target["type"] = request.pattern  # as llama.cpp spells it
        _check_bits(options, options.bits)
        if product == "vllm":
            request.chosen.check(request.target, 0)
        if (share := request.target.sparsity) > SPARSEST and not options.anyway:
            raise InputError(
                f"{share:.3g} of the weights as zeros: above {SPARSEST:g} no measured model keeps "
                "its answers (SmolLM2-135M kept 2 of 86 at 0.7). Choose less, or pass --anyway"
            )
    runnable(choose(options.suite), options.allow_code_execution)
    if options.prompts is not None:
        slices(options)
        file = local_file(str(options.prompts)).path
        if not splits(options) and parsed and any(map(file.samefile, parsed.files)):
            raise InputError(
                f"--calibration and --prompts both name {file}: leave out --calibration, and half "
                "of the prompts calibrate while the others test"
            )
        prompts = sha256_file(file)
    if options.max_memory is not None:
        parse_memory(options.max_memory)
    return Checked(text, target, prompts)


def check_request(options: Compression) -> CompressRequest:
    """Check a user's options before any work; fetches the model."""
    for cache in (empty_model, overhead):  # the model may be another than in an earlier call
        cache.cache_clear()
    text, target, prompts = check_options(options)
    named, trust = options.calibration, options.trust_remote_code
    check_models(options.model, device=options.device, trust_remote_code=trust)
    tokenizer = open_tokenizer(options.model, trust_remote_code=trust)
    chats = named is None and options.prompts is None and not options.no_corpus and bool(text)
    if chats and chat_turns(tokenizer.tokenizer) is not None:
        text = _beside("chat", text)
    if target["product"] == "gguf":
        _check_gguf(options, target["type"], tokenizer)
    if target["product"] == "vllm":
        try:
            target["group"] = group_for(_empty(options).blocks, options.group)
            if target["bits"] is not None:
                whole = prune_request(**aim(options.model_copy(update=target)), calibration="")
                check_pattern(_empty(options).blocks, whole.target, whole.chosen)
        except InputError as error:
            raise InputError(f"{error}; or write another form: --for gguf or none") from error
    if options.size is not None:
        target["bits"] = bits_for(options)
    if target["bits"] is not None:
        if target["product"] == "gguf":
            empty, sized = _empty(options), f"--size {options.size}: " * bool(options.size)
            try:
                check_bits(max(target["bits"], 0.0), empty.model, empty.blocks)
            except InputError as error:
                raise InputError(f"{sized}{error}") from error
        _check_bits(options, target["bits"])
    if target["product"] == "gguf" and target["type"] is None:
        get_method("ggml").check(Mixed(DEFAULT_BITS), 0)  # whether its library is installed
    length = EFFORTS[options.effort].length
    length = min(length, tokenizer.context or length)
    return CompressRequest(
        **{name: getattr(options, name) for name in Target.model_fields}
        | target
        | {
            "calibration": text,
            "seed": options.seed or SEED,
            "sha256": fingerprint(resolve_model(options.model)),
            "prompts_sha256": prompts,
            "rows": _rows(options, length),
            "length": length,
            "suite_sha256": suite_file(options.suite) and choose(options.suite).hash,
            "like_sha256": options.like and layout_sha256(options.like),
            "imatrix_sha256": options.imatrix and cached_sha256(options.imatrix),
        }
    )


def _rows(options: Compression, length: int) -> int:
    """Return the rows of the calibration set: more at standard effort if the model is wide."""
    effort = EFFORTS[options.effort]
    widest = max(layer.shape[1] for layer in _empty(options).blocks.layers)
    return max(effort.rows, rows_needed(widest, length, effort.per_input))


def _beside(chats: str, text: str) -> str:
    """Return a mix with the usual share of chats beside another text."""
    rest = {name: (1 - CHAT) * weight for name, weight in parse_mix(text).items()}
    return mix_text({chats: CHAT} | rest)


def _check_gguf(options: Target, kind: str | None, tokenizer: OpenTokenizer) -> None:
    """Refuse a model that cannot be written as a GGUF file of a type, or of mixed types."""
    empty = _empty(options)
    opened = OpenModel(
        options.model, resolve_model(options.model), empty.model, tokenizer.tokenizer
    )
    try:
        check_export(opened, options.like)
        if options.imatrix is not None:
            importance(options.imatrix, empty.model, empty.blocks)
        if kind is None:
            check_whole(empty.blocks, "bits per weight")
        else:
            types = Recipe(kind).types(empty.model, empty.blocks)
            check_pattern(empty.blocks, types, get_method("ggml"))
    except InputError as error:
        raise InputError(f"{error}; or write safetensors: --for none") from error


def _check_idle(options: Compression, saved: bool) -> None:
    """Refuse options that have no effect."""
    if "," in str(options.imatrix):  # it becomes an option of the method
        raise InputError(f"--imatrix {options.imatrix}: rename it without a comma")
    sizes, searches = ("sparsity", "pattern", "bits", "type"), options.keep_at_least is not None
    product = product_of(options)
    if product in ("gguf", "vllm") and is_sparse(options):
        what = "a GGUF file" if product == "gguf" else "vLLM"
        raise InputError(
            f"{what} has no use for zeros: leave out --for {product}, or --sparsity and --pattern"
        )
    for where, holds, idle in (
        ("with --imatrix", options.imatrix is not None, IMPORTED),
        ("with --no-corpus", options.no_corpus, ("calibration", "keep", "licence")),
        (f"with {options.calibration}, a saved set", saved, ("seed", "seeds", "keep")),
        ("with --size", options.size is not None, sizes),
        ("with --type", options.type is not None, ("bits",)),
        (f"with --for {product}", product != "gguf", ("type", "like", "imatrix")),
        (f"with --for {product}", product != "vllm", ("group", "asymmetric")),
        ("with --for none", product == "none", ("size",)),
        ("with --keep-at-least", searches, (*sizes, "size")),
        ("without --keep-at-least", not searches, ("confidence", "within", "seeds")),
    ):
        for name in idle if holds else ():
            if getattr(options, name) not in (None, False):
                flag = flags(Compression, name)[0]
                raise InputError(f"{flag} has no effect {where}: leave it out")


def _check_bits(options: Compression, bits: float | None) -> None:
    """Refuse bits at which no measured model keeps its answers, unless they are wanted anyway."""
    if bits is not None and bits < SURVIVED and not options.anyway:
        size = f"--size {options.size} leaves {max(bits, 0):g} bits per weight"
        raise InputError(
            f"{f'--bits {bits:g}' if options.size is None else size}: below {SURVIVED:g} bits per "
            "weight no measured model keeps its answers (SmolLM2-135M kept 3 of 87 at 1.7). Choose "
            "more, or pass --anyway"
        )


def _check_floors(options: Target) -> None:
    """Refuse floors of abilities that are not scored or have too few rows in a user's suite."""
    suites = scored(options)
    whole = dict.fromkeys(
        name for suite, _ in slices(options).values() for name in choose(suite).dimensions
    )
    own = [PROMPTS] * (PROMPTS in suites) + [SCORES] * (suite_file(options.suite) is not None)
    rows = Counter(
        suites[file].dimension_of(task) for file in own for task, *_ in suite_items(suites[file])
    )
    for name, floor in parse_floors(options.keep_at_least or "").items():
        start = f"--keep-at-least names '{name}', "
        if name and name not in whole:
            raise InputError(f"{start}which is not scored: {nearest(name, whole)}")
        if name and not any(name in suite.dimensions for suite in suites.values()):
            raise InputError(
                f"{start}whose tasks are not run: pass --allow-code-execution or a larger --effort"
            )
        least = items_needed(floor, test_level(options))
        if name in rows and rows[name] < least:
            raise InputError(
                f"--keep-at-least {name}={floor:g} needs {least} items that the dense model gets "
                f"right, and --effort {options.effort} scores {rows[name]} rows of {name}: add "
                "rows, choose a larger effort, or lower the floor"
            )


def test_level(request: Target) -> float:
    """Return the confidence of the test of one candidate, by which what is promised of the chosen
    one has the requested confidence."""
    return 1 - (1 - (request.confidence or CONFIDENCE)) / BUILDS


def check_weights(weights: Mapping[str, float], dimensions: tuple[str, ...]) -> dict[str, float]:
    """Return weights for all dimensions, normalised to sum to 1."""
    for name, weight in weights.items():
        if name not in dimensions:
            raise InputError(
                f"the calibration set has no dimension '{name}': {nearest(name, dimensions)}"
            )
        if not math.isfinite(weight) or weight < 0:
            raise InputError(f"the weight of {name} must be 0 or a positive number, not {weight:g}")
    total = math.fsum(weights.values())
    if total == 0:
        raise InputError("all weights are 0: give at least one dimension a positive weight")
    return {name: weights.get(name, 0.0) / total for name in dimensions}


def weighed(text: str, keep: Mapping[str, float], **draw: Any) -> dict[str, float]:
    """Return a mix's weights scaled so that each dimension has its share of `keep`; `draw` is how
    the mix is drawn.

    Within a dimension the sources keep their proportions; an unnamed dimension gets nothing.
    """
    parsed = parse_calibration(text, **draw)
    if parsed.generator is not None or user_path(text).suffix.lower() in (".yaml", ".yml"):
        raise InputError(f"--keep needs a mix of sources, and {text} is not one: leave it out")
    dimensions = {name: get_source(name, parsed.own).dimension for name in parsed.sources}
    dimensions |= {name: name for name in parsed.written}
    known = tuple(dict.fromkeys(dimensions.values()))
    shares = check_weights(keep, known)
    whole = {d: sum(w for n, w in parsed.mix.items() if dimensions[n] == d) for d in known}
    return {
        name: weight / whole[dimensions[name]] * shares[dimensions[name]]
        for name, weight in parsed.mix.items()
        if shares[dimensions[name]]
    }
