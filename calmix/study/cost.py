"""What a trial costs: seconds, memory and disk, from sizes and a machine's rates. Pure.

The formulas (N calibration tokens, P weights in the blocks, an input of width d that r outputs
share, L the row length, q the width of the attention's queries):

    forward         2 P N FLOP in matrix products, 2 N L q a block in attention, and
                    (40 h + 20 f) values a token and block through element-wise steps
    statistic       what its class says of N and d (`Statistic.work`)
    solve           what the method says of r and d (`Method.work`)
    experts         each sees its share of the tokens, and as many of a sample of all (`routed`):
                    statistics of both; the first linear maps run twice more for the second input
    generation      one read of all weights a step of 64 rows, at a quarter of the bandwidth
    files           a checkpoint is read, hashed, converted, written and hashed again
    recovery        of every training token three forward passes (the way back takes two), as many
                    of the output head and one of the dense model's; a step moves 48 bytes a weight

How many values pass through element-wise steps, the quarter and the rate of files are ours, fitted
to the engine.
Attention has a rate of its own: on a CPU it reaches a fifth of what plain products do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from calmix.models.blocks import CHOSEN
from calmix.pruning.allocation import looker
from calmix.pruning.budget import AT_ONCE
from calmix.pruning.dropping import COUNTS
from calmix.pruning.experts import EXPERT_BYTES
from calmix.pruning.gram import Gram, Work, error_work
from calmix.pruning.methods import get_method
from calmix.pruning.solvers.scaled import WIDE
from calmix.recovery import memory as recovery
from calmix.recovery.training import held_out, rows_at_once

BATCH_ROWS = 64  # rows generated at a time
DECODING = 0.25  # share of the bandwidth that generation reaches
# Tokens written for each that is kept.
PASSES = {"self-written": 1.2, "igsp": 3.0, "self-cal": 1.0, "sgs": 1.25}
GENERATE = 256  # tokens an answer may have
FILES = 0.3e9  # bytes of a checkpoint a second, from file to pruned file, its solves apart
START = 8.0  # seconds until Python, torch and transformers are there
ADAM = 48  # bytes a step reads and writes of a trained weight: master, gradient and moments

# Items of public test sets, tokens an item beyond a shared beginning, and whether answers are
# written; for suites whose data is not at hand. Rough, and ours.
KNOWN_TASKS = {
    "mmlu": (14042, 150, False),
    "boolq": (3270, 180, False),
    "piqa": (1838, 90, False),
    "hellaswag": (10042, 160, False),
    "winogrande": (1267, 50, False),
    "arc_easy": (2376, 60, False),
    "arc_challenge": (1172, 60, False),
    "openbookqa": (500, 40, False),
    "humaneval": (164, 160, True),
    "mbpp": (500, 500, True),
    "gsm8k": (1319, 900, True),
    "minerva_math": (5000, 700, True),
}
UNKNOWN_TASK = (1000, 300)


@dataclass(frozen=True)
class Maps:
    """Linear maps that share an input, as often as the model has them.

    Attributes:
        width, outputs: of the input, and all that read it.
        readers: how many they are.
        copies: in the whole model.
        share: of all tokens that each copy sees; of an expert's, the share routed to it.
    """

    width: int
    outputs: int
    readers: int
    copies: int
    share: float = 1.0

    @property
    def weights(self) -> int:
        """Weights of all copies."""
        return self.width * self.outputs * self.copies


@dataclass(frozen=True)
class Sizes:
    """A decoder-only model's sizes, as far as they decide what it costs.

    Attributes:
        hidden, inner: width of the residual stream and of the (plain) feed-forward part.
        query, key: width of the queries, and of the keys (and values).
        head: width of one attention head.
        gated: whether the feed-forward part has a gate beside its up-projection.
        value_bytes: bytes of one weight.
        experts, chosen: of a mixture, and how many of them a token is sent to; 0 without.
        expert_inner, shared_inner: `inner` of one expert, and of what all tokens go through
            beside them.
        plain: blocks without experts in a model that has some.
    """

    blocks: int
    hidden: int
    inner: int
    query: int
    key: int
    vocabulary: int
    gated: bool = True
    tied: bool = False
    value_bytes: int = 2
    head: int = 64
    experts: int = 0
    chosen: int = 1
    expert_inner: int = 0
    shared_inner: int = 0
    plain: int = 0

    @property
    def inputs(self) -> list[tuple[int, int]]:
        """The distinct inputs of a plain block's linear maps: width, and outputs that share it."""
        return [
            (one.width, one.outputs) for one in (*self._attention, *self._forward(self.inner, 1))
        ]

    @property
    def maps(self) -> list[Maps]:
        """The linear maps of all blocks by their inputs, those of experts too."""
        if not self.experts:
            return [*self._attention, *self._forward(self.inner, self.blocks)]
        mixed, share = self.blocks - self.plain, self.chosen / self.experts
        found = [
            *self._forward(self.inner, self.plain),
            *self._forward(self.expert_inner, mixed * self.experts, share),
            *self._forward(self.shared_inner, mixed),
        ]
        return [*self._attention, *(one for one in found if one.weights)]

    @property
    def _attention(self) -> list[Maps]:
        return [
            Maps(self.hidden, self.query + 2 * self.key, 3, self.blocks),
            Maps(self.query, self.hidden, 1, self.blocks),
        ]

    def _forward(self, inner: int, copies: int, share: float = 1.0) -> list[Maps]:
        up = 2 if self.gated else 1
        return [
            Maps(self.hidden, up * inner, up, copies, share),
            Maps(inner, self.hidden, 1, copies, share),
        ]

    @property
    def block_weights(self) -> int:
        """Weights in the linear maps of all blocks: those that are pruned."""
        return sum(one.weights for one in self.maps)

    @property
    def active_weights(self) -> float:
        """Those of them that a token goes through."""
        return sum(one.weights * one.share for one in self.maps)

    @property
    def neurons(self) -> float:
        """Values between the linear maps of the feed-forward parts of all blocks, of a token."""
        if not self.experts:
            return self.blocks * self.inner
        mixed = self.chosen * self.expert_inner + self.shared_inner
        return self.plain * self.inner + (self.blocks - self.plain) * mixed

    @property
    def weights(self) -> int:
        """All weights, embeddings and head included."""
        return self.block_weights + (1 if self.tied else 2) * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Machine:
    """What a machine does a second.

    Attributes:
        name: what is printed.
        forward_flops: matrix products in the model's dtype.
        attention_flops: causal attention, counted as half of the square.
        gram_flops: Gram matrices with float32 sums.
        rounded_flops: float32 products whose factors may be rounded to bfloat16.
        factor_flops: factorisations in float32.
        solve_flops: float32 products that correct later columns.
        step_seconds: fixed time of one column step of SparseGPT.
        cached_bytes: bytes through element-wise steps on a micro-batch.
        memory_bytes: bytes read from main (or the device's) memory.
        memory: bytes there are.
        device: `cpu` or `cuda`.
    """

    name: str
    forward_flops: float
    attention_flops: float
    gram_flops: float
    rounded_flops: float
    factor_flops: float
    solve_flops: float
    step_seconds: float
    cached_bytes: float
    memory_bytes: float
    memory: float
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class SuiteWork:
    """What scoring a suite takes: tokens run through the model, tokens scored, answers written.

    `exact` is False where the suite's data is not at hand and the figures are assumed.
    """

    items: int
    tokens: int
    answers: int
    exact: bool


@dataclass(frozen=True)
class Cost:
    """Seconds by stage, and bytes: peak memory while it runs, and on disk for good."""

    seconds: dict[str, float]
    memory: float
    disk: float

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


def on_paper(tflops: float, memory_gb: float, bandwidth_gbs: float) -> Machine:
    """Return an accelerator known from its data sheet only.

    Half of the stated products are reached, a quarter of them rounded from float32 (TF32), a
    twentieth in float32, two thirds of the bandwidth.
    Starting a kernel takes 5 microseconds, and a column of SparseGPT two thirds of one
    (`benchmarks/on_paper.py --traced` counts them). All shares and times are assumptions of ours;
    no accelerator was measured.
    """
    products, bandwidth = 0.5e12 * tflops, 0.67e9 * bandwidth_gbs
    return Machine(
        name=f"{tflops:g} TFLOP/s, {memory_gb:g} GB, {bandwidth_gbs:g} GB/s, on paper",
        forward_flops=products,
        attention_flops=products,
        gram_flops=products,
        rounded_flops=products / 2,
        factor_flops=0.05e12 * tflops,
        solve_flops=0.05e12 * tflops,
        step_seconds=5e-6 * 2 / 3,
        cached_bytes=bandwidth,
        memory_bytes=bandwidth,
        memory=1e9 * memory_gb,
        device="cuda",
    )


def sizes_of(config: Mapping[str, Any], *, value_bytes: int = 2) -> Sizes:
    """Return sizes by the names config.json uses, GPT-2's and OPT's among them.

    Raises:
        KeyError: a size is not there.
    """

    def first(*keys: str) -> Any:
        return next(config[key] for key in keys if config.get(key) is not None)

    try:
        hidden = first("hidden_size", "n_embd", "d_model")
        heads = first("num_attention_heads", "n_head")
        blocks = first("num_hidden_layers", "n_layer")
        vocabulary = first("vocab_size")
    except StopIteration:
        raise KeyError("hidden_size, num_attention_heads, num_hidden_layers, vocab_size") from None
    inner = config.get("intermediate_size") or config.get("ffn_dim") or config.get("n_inner")
    experts = next((config[key] for key in COUNTS if config.get(key)), 0)
    each = config.get("moe_intermediate_size") or inner or 4 * hidden
    both = config.get("shared_expert_intermediate_size")
    plain = config.get("first_k_dense_replace") or len(config.get("mlp_only_layers") or ())
    head = config.get("head_dim") or hidden // heads
    shared = config.get("num_key_value_heads") or heads
    return Sizes(
        blocks=blocks,
        hidden=hidden,
        inner=inner or 4 * hidden,
        query=heads * head,
        key=shared * head,
        vocabulary=vocabulary,
        gated=config.get("model_type") not in UNGATED,
        tied=bool(config.get("tie_word_embeddings")),
        value_bytes=value_bytes,
        head=head,
        experts=experts,
        chosen=next((config[key] for key in CHOSEN if config.get(key)), 1),
        expert_inner=each if experts else 0,
        shared_inner=both or each * (config.get("n_shared_experts") or 0) if experts else 0,
        plain=plain if experts else 0,
    )


UNGATED = ("gpt2", "opt", "gpt_neox", "gpt_bigcode", "phi", "falcon", "bloom", "starcoder2")


def forward_seconds(sizes: Sizes, tokens: float, length: int, machine: Machine) -> float:
    """Seconds of one pass of `tokens` tokens in rows of `length` through the blocks."""
    products = 2 * sizes.active_weights * tokens
    attention = 2 * tokens * length * sizes.query * sizes.blocks
    values = (40 * sizes.hidden * sizes.blocks + 20 * sizes.neurons) * tokens
    moved = values * sizes.value_bytes / machine.cached_bytes
    return products / machine.forward_flops + attention / machine.attention_flops + moved


def head_seconds(sizes: Sizes, positions: float, machine: Machine) -> float:
    """Seconds of the output head and its softmax at `positions` positions."""
    logits = positions * sizes.vocabulary
    return 2 * logits * sizes.hidden / machine.forward_flops + 12 * logits / machine.memory_bytes


def prune_seconds(
    sizes: Sizes, rows: int, length: int, method: str, propagation: str | None, machine: Machine
) -> dict[str, float]:
    """Seconds of pruning by activity: `forward`, `statistic`, `factor`, `solve`."""
    tokens = rows * length
    chosen = get_method(method)
    seconds = dict.fromkeys(("forward", "statistic", "factor", "solve"), 0.0)
    if (kind := chosen.needs) is not None:
        passes = 2 if propagation == "block" else 1
        seconds["forward"] = passes * forward_seconds(sizes, tokens, length, machine)
        first = sum(m.weights for m in sizes.maps if m.share < 1 and m.width == sizes.hidden)
        again = 2 * 2 * first * sizes.chosen / max(1, sizes.experts) * tokens
        seconds["forward"] += again / machine.forward_flops
    for maps in sizes.maps:
        if kind is not None:
            seen = round(tokens * (maps.share if maps.share == 1 else 2 * maps.share))
            work = kind.work(maps.width, seen, cpu=machine.device == "cpu")
            seconds["statistic"] += maps.copies * work_seconds(work, machine)
        work = chosen.work(maps.width, maps.outputs)
        if kind is not None and issubclass(kind, Gram):
            work += error_work(maps.width, maps.outputs)
        factor = work.factor / machine.factor_flops
        seconds["factor"] += maps.copies * factor
        seconds["solve"] += maps.copies * (work_seconds(work, machine) - factor)
    return seconds


def files_seconds(sizes: Sizes) -> float:
    """Seconds of reading a checkpoint and writing another of it."""
    return sizes.weights * sizes.value_bytes / FILES


def allocation_seconds(sizes: Sizes, rows: int, length: int, by: str, machine: Machine) -> float:
    """Seconds of the look at the dense model that an allocation (`owl`, `error`) takes."""
    look = looker(by)
    seconds = prune_seconds(sizes, rows, length, look.name, None, machine)
    products = 0.0
    if by == "error":  # what Wanda's mask loses, on the Gram matrix
        products = sum(4.0 * one.width * one.weights for one in sizes.maps)
    return seconds["forward"] + seconds["statistic"] + products / machine.solve_flops


def work_seconds(work: Work, machine: Machine) -> float:
    """Seconds of work on a machine."""
    return (
        work.gram / machine.gram_flops
        + work.rounded / machine.rounded_flops
        + work.factor / machine.factor_flops
        + work.products / machine.solve_flops
        + work.steps * machine.step_seconds
        + work.cached / machine.cached_bytes
        + work.memory / machine.memory_bytes
    )


def suite_seconds(sizes: Sizes, work: SuiteWork, machine: Machine) -> float:
    """Seconds of scoring a suite."""
    scored = forward_seconds(sizes, work.tokens, 512, machine)
    scored += head_seconds(sizes, work.tokens / 2, machine)
    return scored + generation_seconds(sizes, work.answers * GENERATE, machine)


def distance_seconds(sizes: Sizes, tokens: int, machine: Machine) -> float:
    """Seconds of the distance to the dense model: one pass, and the output head of both."""
    return forward_seconds(sizes, tokens, 512, machine) + 2 * head_seconds(sizes, tokens, machine)


def generation_seconds(sizes: Sizes, tokens: float, machine: Machine) -> float:
    """Seconds of writing `tokens` tokens, 64 rows at a time."""
    read = sizes.weights * sizes.value_bytes / machine.memory_bytes / DECODING
    products = 2 * BATCH_ROWS * sizes.weights / machine.forward_flops
    return tokens / BATCH_ROWS * (read + products)


def set_seconds(
    sizes: Sizes, rows: int, length: int, strategy: str, machine: Machine, *, measured: bool = True
) -> dict[str, float]:
    """Seconds of making a calibration set and measuring its perplexity, by activity."""
    tokens = rows * length
    seconds = {}
    if measured:
        seconds["measure"] = forward_seconds(sizes, tokens, length, machine)
        seconds["measure"] += head_seconds(sizes, tokens, machine)
    if strategy in PASSES:
        seconds["generate"] = generation_seconds(sizes, PASSES[strategy] * tokens, machine)
    return seconds


def recover_seconds(
    sizes: Sizes, rows: int, length: int, method: str, epochs: int, batch: int, machine: Machine
) -> float:
    """Seconds of recovering a pruned model by `distill` or `blocks`, with all its epochs."""
    held = held_out(rows)
    once, trained = rows * length, (rows - held) * length * epochs
    read = held * length * epochs
    steps = (rows - held) // batch * epochs
    seconds = forward_seconds(sizes, once + 3 * trained, length, machine)
    seconds += steps * ADAM * sizes.block_weights / machine.memory_bytes
    if method == "blocks":  # both streams, and a reading an epoch
        return seconds + forward_seconds(sizes, once + read, length, machine)
    seconds += forward_seconds(sizes, 2 * read, length, machine)
    return seconds + head_seconds(sizes, 4 * trained + 4 * read, machine)


def recover_memory(
    sizes: Sizes, length: int, method: str, batch: int, room: float | None = None
) -> int:
    """Bytes a recovery takes beside the program, of which it spares some to stay within `room`."""
    once = sizes.block_weights if method == "distill" else sizes.block_weights // sizes.blocks
    found = recovery.Sizes(
        sizes.weights, once, sizes.weights - sizes.block_weights, sizes.blocks, sizes.hidden,
        _widths(sizes), sizes.vocabulary, 0, sizes.value_bytes,
    )  # fmt: skip
    rows = rows_at_once(batch, length)
    if room is None:
        rows, room = rows[:1], math.inf
    return recovery.make_plan(method, found, length, rows, room).needed


def _widths(sizes: Sizes) -> int:
    """Inputs and outputs of the linear maps of a block a token goes through, together."""
    each = (m.copies * m.share * (m.readers * m.width + m.outputs) for m in sizes.maps)
    return round(sum(each) / sizes.blocks)


def peak_memory(sizes: Sizes, rows: int, length: int, method: str, device: str) -> float:
    """Bytes held at the peak of a trial, on the device that prunes: `cpu`, or another kind.

    The model (on a CPU also the copy of its block weights that is put back, elsewhere that of the
    block at hand), the hidden states of all rows with what one block keeps of them while it waits,
    what the method takes for the widest input (`Method.memory`; elsewhere it works on more rows at
    a time), and a slice of logits.
    """
    cpu = device == "cpu"
    held = held_memory(sizes, device)
    logits = 3 * 512 * sizes.vocabulary * 4
    chosen = get_method(method)
    inner = sizes.neurons / sizes.blocks
    states = rows * length * (3 * sizes.hidden + 2 * inner) * sizes.value_bytes
    solving = max(
        chosen.memory(one.width, one.outputs, one.outputs)
        + (not cpu) * AT_ONCE * min(WIDE, one.width * one.outputs)
        for one in sizes.maps
    )
    if sizes.experts and chosen.needs is not None:  # its own tokens' and all tokens' statistic
        widest = max(sizes.hidden, sizes.expert_inner)
        solving += min(EXPERT_BYTES, 2 * sizes.experts * chosen.needs.memory(widest))
    return held + max((states if chosen.needs else 0) + solving, logits)


def held_memory(sizes: Sizes, device: str) -> float:
    """Bytes of the model and of the copy that is put back: of all its blocks on a CPU, elsewhere of
    the block at hand."""
    kept = sizes.block_weights // (1 if device == "cpu" else sizes.blocks)
    return (sizes.weights + kept) * sizes.value_bytes


def disk_bytes(sizes: Sizes, work: SuiteWork, keep_checkpoint: bool) -> float:
    """Bytes a trial leaves on disk: its scores item by item, its report, its weights if kept."""
    report = 4 * 7 * sizes.blocks * 100
    kept = sizes.weights * sizes.value_bytes if keep_checkpoint else 0
    return 80 * work.items + report + kept + 20_000
