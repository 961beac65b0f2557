"""Estimates of time and memory before a run: one real block is timed, the rest is extrapolated.

A model is built from its configuration only. Its largest block gets random weights, is pruned by
the real method and run on a micro-batch. The estimate is time per token times tokens, plus time per
block times the number of such blocks that make up all block weights. Memory comes from
`pruning.budget.plan_for` and `recovery.memory`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calmix import assets
from calmix.calibration.resolving import Asked
from calmix.calibration.texts import LENGTH as TEXT_LENGTH
from calmix.calibration.texts import ROWS as TEXT_ROWS
from calmix.calibration.texts import builtin_readers
from calmix.errors import InputError
from calmix.evaluation.suites import ARCHIVE, Suite
from calmix.evaluation.tasks import item_texts, load_items
from calmix.machine import device_memory, host_memory, tokens_at_once
from calmix.models import find_blocks, resolve_model
from calmix.models.attention import use_own_attention
from calmix.models.blocks import outer_weights
from calmix.models.opening import DTYPES, device_of, known_model, loading
from calmix.options import Propagation, Recovering
from calmix.precision import suited
from calmix.pruning import prune
from calmix.pruning.allocation import KL
from calmix.pruning.budget import plan_for
from calmix.pruning.methods import Look, Method
from calmix.pruning.methods.base import Quantiser
from calmix.pruning.methods.ggml import Ggml
from calmix.pruning.patterns import Blocks, Rate, Unstructured
from calmix.pruning.rates import ROWS, STRIDE
from calmix.recovery import memory as recovery
from calmix.recovery.training import held_out, rows_at_once
from calmix.specs import PruneRequest
from calmix.study.spec import Study
from calmix.study.trials import Condition, Planned, plan

PROGRAM = 0.6e9  # bytes of Python, torch and transformers without any weights
START = 8.0  # seconds to import them
FILES = 0.3e9  # checkpoint bytes per second: read, hashed, written and hashed again
MOMENT = 0.3  # shortest time of a measurement, in seconds
LONG = 10.0  # seconds after which a first call counts without warm-up
BATCH = 64  # rows generated at a time
TRAINED = 3.2  # cost of training on a token, relative to a forward pass
VOCABULARY = 16_384  # rows of the output head that are timed
CHARACTERS = 3.6  # per token, in English text and code
# Tokens generated per token kept.
PASSES = {"self-written": 1.2, "chat": 1.3, "igsp": 3.0, "self-cal": 1.0, "sgs": 1.25}
ITEMS, EACH = 1000, 1000  # assumed items of a task without its data, and characters per item
RIGHT = 0.4  # largest share of answers that the builtin dense models get right


class Timed:
    """A model built from its configuration only, and estimates for work on it on this machine.

    Arguments are those of `open_model`; for a hub model only config.json is fetched.
    """

    merges = False  # `plan_for` and `recovery.make_plan` read this and the public attributes

    def __init__(
        self, name: str, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device = device_of(device)
        path = name if known_model(name) is None else resolve_model(name)
        trust = {"trust_remote_code": trust_remote_code}
        with loading(f"cannot read the configuration of {name}"):
            config = AutoConfig.from_pretrained(path, **trust)
            chosen = DTYPES.get(dtype) or getattr(config, "dtype", None) or torch.float32
            self.dtype = suited(chosen, self.device) if dtype == "auto" else chosen
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, **trust)
            model.tie_weights()
        self.model: Any = model.requires_grad_(False).eval()
        use_own_attention(self.model)
        self.blocks = find_blocks(self.model)
        self.weights = sum(p.numel() for p in self.model.parameters())
        self.block_weights = sum(p.numel() for p in self.blocks.blocks.parameters())
        self.vocabulary, self.hidden = self.model.get_output_embeddings().weight.shape
        self.bytes = self.weights * self.dtype.itemsize
        self.files = self.bytes / FILES  # seconds to read a checkpoint and write another
        self.prune = cache(self._prune)
        self._token, self._position = cache(self._measure), cache(self._head)

    @property
    def outer_weights(self) -> int:
        """Number of weights in embeddings and output head."""
        return sum(weight.numel() for weight in outer_weights(self.model))

    def outside_bytes(self, *, head: bool = False) -> int:
        """Return the bytes outside the blocks; an untied output head counts only if `head`."""
        tied = len(outer_weights(self.model)) == 1
        untied = 0 if head or tied else self.vocabulary * self.hidden
        return (self.weights - self.block_weights - untied) * self.dtype.itemsize

    @cached_property
    def _sample(self) -> tuple[Any, float]:
        """The model with only its largest block and random weights, and how many such blocks equal
        all blocks; with the first block if the largest needs the output of another."""
        sizes, (owner, _, last) = self.blocks.sizes, self.blocks.name.rpartition(".")
        for index in (sizes.index(max(sizes)), 0):
            model = deepcopy(self.model)
            config = model.config.get_text_config(decoder=True)
            if types := getattr(config, "layer_types", None):  # the block becomes the first
                config.layer_types = types[index:] + types[:index]
            block = nn.ModuleList([find_blocks(model).blocks[index]])
            setattr(model.get_submodule(owner), last, block)
            model._apply(lambda held: torch.empty_like(held, device=self.device) if held.is_meta
                         else held.to(self.device))  # fmt: skip
            for name, p in model.named_parameters():
                if p.ndim == 1:
                    p.fill_(not name.endswith("bias"))
                else:  # only the first rows of an embedding are used
                    p[:VOCABULARY].normal_(0, 0.02)
            with suppress(Exception):
                model.base_model(self._ids(1, 8), use_cache=False)
                break
        return model, self.block_weights * self.dtype.itemsize / sizes[index]

    def _ids(self, rows: int, length: int) -> Tensor:
        return torch.randint(0, min(self.vocabulary, 256), (rows, length), device=self.device)

    def _prune(
        self, method: Method, propagation: Propagation | None, length: int
    ) -> tuple[float, float]:
        """Return the seconds to solve all blocks, and the seconds per calibration token."""
        model, count = self._sample
        ids = self._ids(max(1, tokens_at_once(self.device) // max(1, length)), length)
        pattern: Any = Rate(3) if isinstance(method, Quantiser) else Unstructured(0.5)
        if isinstance(method, Ggml):
            pattern = Blocks(method.type)
        act = partial(
            prune, model, None if method.needs is None else ids, method=method, pattern=pattern,
            propagation=propagation or "sequential",
        )  # fmt: skip
        times = list[dict[str, float]]()
        seconds(lambda: times.append(act().seconds), self.device)
        last = times[-1]
        each = 0.0 if method.needs is None else last["statistics"] + last["forward"]
        return count * last["solve"], count * each / max(1, ids.numel())

    def _measure(self, rows: int, length: int) -> float:
        """Return the seconds per token of a pass through the blocks, for rows of this shape."""
        model, count = self._sample
        ids = self._ids(rows, length)
        with torch.no_grad():
            once = seconds(lambda: model.base_model(ids, use_cache=False), self.device)
        return count * once / ids.numel()

    def _head(self) -> float:
        """Return the seconds of the output head and softmax per position."""
        rows = min(self.vocabulary, VOCABULARY)
        weight = torch.randn(rows, self.hidden, device=self.device).to(self.dtype)
        states = torch.randn(512, self.hidden, device=self.device).to(self.dtype)
        once = seconds(lambda: (states @ weight.T).float().log_softmax(-1), self.device)
        return once / 512 * self.vocabulary / rows

    def forward(self, tokens: float, length: int, positions: float = 0.0) -> float:
        """Return the seconds of one pass through the blocks, for tokens in rows of `length`, and
        of the output head at some positions."""
        found = positions * self._position() if positions else 0.0
        if tokens:
            rows = max(1, tokens_at_once(self.device) // length)
            found += tokens * self._token(rows, length)
        return found

    def write(self, tokens: float) -> float:
        """Return the seconds to generate tokens, `BATCH` rows at a time."""
        return tokens * (self._token(BATCH, 1) + self._position()) if tokens else 0.0

    def pruning(self, request: PruneRequest, rows: int, length: int) -> float:
        """Return the seconds of pruning and allocation, without reading and writing files."""
        fixed, each = self.prune(request.chosen, request.propagation, length)
        if request.allocation == KL:
            tokens = ROWS * length
            fixed += 2 * len(self.blocks) * self.forward(tokens, length, 2 * tokens / STRIDE)
        elif isinstance(request.allocation, str):  # else sparsities from a file
            fixed += self.prune(Look(), None, length)[0]
            each += self.prune(Look(gram=request.allocation == "error"), None, length)[1]
        return fixed + rows * length * each

    def calibration(self, asked: Asked, measured: bool = True) -> float:
        """Return the seconds to generate a calibration set's text and measure its perplexity."""
        tokens = asked.draw.rows * asked.draw.length
        found = self.forward(tokens, asked.draw.length, tokens) if measured else 0.0
        parts = {name: asked.mix.get(name, 1.0) for name in asked.written}
        return found + self.write(sum(PASSES[name] * part for name, part in parts.items()) * tokens)

    def evaluation(self, work: SuiteWork, texts: float = 0.0) -> float:
        """Return the seconds to score a suite, and to measure distance on this many text tokens."""
        read = self.forward(work.tokens + texts, 512, work.tokens / 2 + 2 * texts)
        return read + self.write(work.written)

    def recovery(self, request: Recovering, rows: int, length: int) -> float:
        """Return the seconds of recovery, without reading and writing files."""
        held = held_out(rows)
        trained = max(0, rows - held) * length * request.epochs
        read, once = held * length * request.epochs, rows * length
        if request.method == "blocks":
            return self.forward(TRAINED * trained + read + 2 * once, length)
        passes = (1 + TRAINED) * trained + 2 * read + once
        return self.forward(passes, length, 4 * (trained + read))

    def recovery_memory(self, request: Recovering, length: int, room: float = math.inf) -> int:
        """Return the bytes that recovery needs besides the program; less if `room` is limited."""
        source: Any = self
        rows = rows_at_once(request.batch, length)
        return recovery.make_plan(source, request.method, length, rows, room)[-1]

    def trial_memory(self, trial: Planned, *, compared: bool) -> float:
        """Return a trial's peak memory in bytes on the device that prunes."""
        source: Any = self
        shape = trial.rows, trial.length
        needed = plan_for(source, shape, trial.request.chosen, budget=2**62).needed
        blocks = 2 * max(self.blocks.sizes)  # already counted in `self.bytes`
        scored = 3 * 512 * self.vocabulary * 4  # logits
        if compared and trial.request.embeddings:  # distance needs the dense head
            scored += self.bytes
        peak = max(needed - blocks, PROGRAM + scored)
        if trial.recovery is not None:
            recovered = self.recovery_memory(trial.recovery, trial.length)
            peak = max(peak, PROGRAM + max(recovered, self.bytes + scored))  # two models are open
        return self.bytes + peak


def seconds(act: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of calls repeated for `MOMENT` seconds. The first call is a
    warm-up unless it takes `LONG`."""
    times: list[float] = []
    while not times or sum(times) < (LONG if len(times) == 1 and MOMENT else MOMENT):
        began = time.perf_counter()
        act()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)


class SuiteWork(NamedTuple):
    """The work to score a suite: tokens read and generated; `exact` if its data is available."""

    items: int = 0
    tokens: int = 0
    written: int = 0
    exact: bool = True

    @property
    def right(self) -> SuiteWork:
        """The work if answers are generated only where the dense model is right."""
        return self._replace(written=int(RIGHT * self.written))


def suite_work(suite: Suite) -> SuiteWork:
    """Return the work to score a suite, from its data if available, else from assumed sizes."""
    items = characters = written = 0
    exact, present = True, assets.get_asset(ARCHIVE).state == "ok"
    for spec in suite.tasks.values():
        sizes = [EACH] * min(ITEMS, spec.limit or ITEMS)
        if known := present or spec.file is not None:
            sizes = [len(text) for _, text in item_texts(spec)]
            written += sum(one.tokens for one in load_items(spec)) // 2 if spec.writes else 0
        exact, items, characters = exact and known, items + len(sizes), characters + sum(sizes)
    return SuiteWork(items, round(characters / CHARACTERS), written, exact)


def text_tokens(suite: Suite) -> int:
    """Return the number of tokens in the texts used to measure distance."""
    return TEXT_ROWS * TEXT_LENGTH * sum(name in builtin_readers() for name in suite.dimensions)


def estimate(
    study: Study, device: str = "auto", *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Estimate what a study takes on this machine, running one trial at a time.

    The result has the total `seconds`, and bytes of `memory` and `disk`. `sets_seconds` is for
    making and measuring calibration sets, `dense_seconds` for scoring dense models. `groups` holds
    the cost per trial of similar trials; `notes` lists assumptions and trials that do not fit.
    """
    models = {label: Timed(m.name, m.dtype, device, trust_remote_code)
              for label, m in study.file.models.items()}  # fmt: skip
    work, texts = suite_work(study.suite), text_tokens(study.suite)
    asked = work.right if study.file.right_only else work
    trials, groups = plan(study), dict[Condition, list[Planned]]()
    for trial in trials:
        groups.setdefault(trial.condition, []).append(trial)
    # Trials that differ only in recovery are pruned once.
    prunes = {trial.pruned: trial for trial in reversed(trials)}
    sets = {(trial.model, trial.calibration, trial.rows, trial.length, trial.seed): trial
            for trial in trials if trial.rows}  # fmt: skip
    found: list[dict[str, Any]] = []
    notes = [] if work.exact else [
        f"the data of suite {study.suite.name} has not been fetched: scoring is estimated from "
        "assumed sizes of its tasks"
    ]  # fmt: skip
    for members in groups.values():
        first, model = members[0], models[members[0].model]
        pruned = sum(prunes[trial.pruned] is trial for trial in members) / len(members)
        shape = first.rows, first.length
        once = model.pruning(first.request, *shape)
        times = {"prune": pruned * once, "evaluate": model.evaluation(asked, texts)}
        if first.recovery is not None:
            times["recover"] = model.recovery(first.recovery, *shape)
        memory = model.trial_memory(first, compared=texts > 0)
        found.append({
            "model": first.model, "method": first.recipe, "pattern": first.pattern,
            "rows": first.rows, "length": first.length, "trials": len(members), "seconds": times,
            "memory": memory,
            "disk": 80.0 * work.items + study.file.keep_checkpoints * model.bytes + 50_000,
        })  # fmt: skip
        available = device_memory(model.device)[2] or host_memory()[1]
        if memory > available:
            label = f"{first.model} {first.recipe} {first.pattern}"
            notes.append(too_large(label, memory, available))
    made = sum(models[one.model].calibration(one.asked, study.file.perplexity)
               for one in sets.values() if one.asked)  # fmt: skip
    dense = sum(model.evaluation(work) for model in models.values())
    run = sum(group["trials"] * sum(group["seconds"].values()) for group in found)
    kept = sum(group["trials"] * group["disk"] for group in found)
    return {
        "trials": len(trials), "seconds": made + dense + run,
        "memory": max(group["memory"] for group in found),
        "disk": kept + sum(8.0 * one.rows * one.length for one in sets.values()),
        "sets": len(sets), "sets_seconds": made, "dense_seconds": dense, "groups": found,
        "notes": list(dict.fromkeys(notes)),
    }  # fmt: skip


def too_large(label: str, needed: float, available: float) -> str:
    """Return the message that a trial needs more memory than there is."""
    return (f"{label} needs {needed / 1e9:.1f} GB of memory, but there are only "
            f"{available / 1e9:.1f} GB: use fewer or shorter rows")  # fmt: skip


def largest(study: Study, trials: Sequence[Planned], **how: Any) -> tuple[str, float]:
    """Return label and bytes of the trial that needs most memory; `how` as for `Timed`."""
    files = study.file.models
    timed = cache(lambda label: Timed(files[label].name, files[label].dtype, **how))
    kinds = {trial.condition: trial for trial in trials}.values()
    compared = text_tokens(study.suite) > 0
    needed = {
        trial.label: timed(trial.model).trial_memory(trial, compared=compared) for trial in kinds
    }
    return max(needed.items(), key=lambda one: one[1])


def check_memory(study: Study, trials: Sequence[Planned], *, device: str, **how: Any) -> None:
    """Raise an `InputError` for trials that do not fit an accelerator; a CPU would swap."""
    available = device_memory(device_of(device))[2]
    if available is not None and trials:
        label, needed = largest(study, trials, device=device, **how)
        if needed > available:
            raise InputError(too_large(label, needed, available))
