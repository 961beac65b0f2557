"""What work will take before it runs: one real block is timed, everything else extrapolated.

A model is built from its configuration alone. Of each kind of block one gets random weights and is
pruned by the real method, run and trained on a micro-batch. Time per token times tokens, and time
per block times blocks, is the estimate. Memory is that of `pruning.budget.plan_for` and
`recovery.memory`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calmix import assets
from calmix.calibration import ask, open_tokenizer
from calmix.calibration.resolving import CHATLESS
from calmix.calibration.spec import Spec
from calmix.calibration.texts import LENGTH as TEXT_LENGTH
from calmix.calibration.texts import ROWS as TEXT_ROWS
from calmix.calibration.texts import builtin_readers
from calmix.errors import CalmixError, InputError
from calmix.evaluation.abilities import task_of
from calmix.evaluation.suites import ARCHIVE, Suite
from calmix.evaluation.tasks import load_items, preamble
from calmix.machine import device_memory, tokens_at_once, total_memory
from calmix.models import find_blocks, resolve_model
from calmix.models.attention import cache_argument, use_own_attention
from calmix.models.opening import DTYPES, device_of, known_model, loading
from calmix.options import Recovering
from calmix.precision import fast_half_precision
from calmix.pruning import prune
from calmix.pruning.allocation import looker
from calmix.pruning.budget import plan_for
from calmix.pruning.methods import Method
from calmix.pruning.methods.base import Quantiser
from calmix.pruning.patterns import Rate, Unstructured
from calmix.recovery import memory as recovery
from calmix.recovery.training import held_out, rows_at_once
from calmix.study.spec import Study
from calmix.study.trials import Planned, plan

PROGRAM = 0.6e9  # bytes of Python, torch and transformers before any weight is read
START = 8.0  # seconds until they are imported
FILES = 0.3e9  # bytes of a checkpoint a second, read, hashed, written and hashed again
MOMENT = 0.15  # seconds that each timing takes, at least
BATCH = 64  # rows written at a time
VOCABULARY = 16_384  # rows of the output head that are timed
CHARACTERS = 3.6  # a token, in English text and code
# Tokens written for each that is kept.
PASSES = {"self-written": 1.2, "chat": 1.3, "igsp": 3.0, "self-cal": 1.0, "sgs": 1.25}
ITEMS, EACH = 1000, 300  # of a task whose data is not at hand, and tokens of each


class Timed:
    """A model from its configuration alone, and how long work on it takes on this machine.

    Arguments are those of `open_model`; of a hub model only config.json is fetched.
    """

    merges = False  # `plan_for` and `recovery.make_plan` read this and what is public here

    def __init__(
        self, name: str, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device = device_of(device)
        place = name if known_model(name) is None else resolve_model(name)
        trust = {"trust_remote_code": trust_remote_code}
        with loading(f"cannot read the configuration of {name}"):
            config = AutoConfig.from_pretrained(place, **trust)
            chosen = DTYPES.get(dtype) or getattr(config, "dtype", None) or torch.float32
            slow = self.device.type == "cpu" and not fast_half_precision(chosen)
            self.dtype: torch.dtype = torch.float32 if dtype == "auto" and slow else chosen
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
        self._rates = cache(self._measure)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters, without data."""
        return dict(self.model.named_parameters())

    @property
    def outside_bytes(self) -> int:
        """Bytes of what is outside the blocks, the output head excepted where it is apart."""
        tied = self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight
        head = 0 if tied else self.vocabulary * self.hidden
        return (self.weights - self.block_weights - head) * self.dtype.itemsize

    def block_bytes(self, index: int) -> int:
        """Return the bytes of a block's weights."""
        return sum(p.nbytes for p in self.blocks.blocks[index].parameters())

    @cached_property
    def _kinds(self) -> list[tuple[Any, float]]:
        """The kinds of blocks, each as a model of one such block, and how many there are."""
        from copy import deepcopy

        kinds: dict[Any, list[int]] = {}
        for index, block in enumerate(self.blocks.blocks):
            shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
            kinds.setdefault(shapes, []).append(index)
        made: list[tuple[Any, float]] = []
        for first, *rest in kinds.values():
            model = deepcopy(self.model)
            config = model.config.get_text_config(decoder=True)
            if types := getattr(config, "layer_types", None):  # the block is the first now
                config.layer_types = types[first:] + types[:first]
            owner, _, last = self.blocks.name.rpartition(".")
            setattr(
                model.get_submodule(owner), last, nn.ModuleList([find_blocks(model).blocks[first]])
            )
            for name, p in list(model.named_parameters(remove_duplicate=False)):
                value = torch.empty(p.shape, dtype=p.dtype, device=self.device)
                if p.ndim == 1:
                    value.fill_("bias" not in name)
                else:  # outside the blocks only what few ids and positions read
                    (value if name.startswith(self.blocks.name) else value[:4096]).normal_(0, 0.02)
                owner, _, last = name.rpartition(".")
                parameter = nn.Parameter(value, requires_grad=False)
                model.get_submodule(owner)._parameters[last] = parameter
            count: float = 1 + len(rest)
            try:
                model.to(self.device).base_model(self._ids(1, 8), use_cache=False)
            except Exception:  # it reads what another block has written: as the first, by size
                if not made:
                    raise
                count *= self.block_bytes(first) / self.block_bytes(next(iter(kinds.values()))[0])
                model = made[0][0]
            made.append((model, count))
        return made

    def _ids(self, rows: int, length: int) -> Tensor:
        return torch.randint(0, min(self.vocabulary, 256), (rows, length), device=self.device)

    def _prune(self, method: Method, propagation: str | None, length: int) -> tuple[float, float]:
        """Return the seconds that pruning all blocks takes, and those of each token."""
        rows = max(1, tokens_at_once(self.device) // max(1, length))
        ids = None if method.needs is None else self._ids(rows, length)
        fixed = each = 0.0
        for model, count in self._kinds:
            before = {n: p.clone() for n, p in find_blocks(model).blocks.named_parameters()}
            reports: list[dict[str, float]] = []

            def act(model: Any = model, before: Any = before, reports: Any = reports) -> None:
                for name, value in before.items():
                    find_blocks(model).blocks.get_parameter(name).data.copy_(value)
                found = prune(
                    model, ids, method=method,
                    pattern=Rate(3) if isinstance(method, Quantiser) else Unstructured(0.5),
                    propagation="block" if propagation == "block" else "sequential",
                )  # fmt: skip
                reports.append(found.seconds)

            seconds(act, self.device)
            used = reports[1:] or reports  # the first one warms up
            mean = {k: statistics.median(one[k] for one in used) for k in used[0]}
            fixed += count * mean["solve"]
            if ids is not None:
                each += count * (mean["statistics"] + mean["forward"]) / ids.numel()
        return fixed, each

    def _measure(self, what: str, length: int) -> float:
        """Return seconds a token of a pass through the blocks (`forward`), of one with gradients
        and the way back (`train`), of the output head (`head`), of a token written (`write`), or
        those of a weight in an optimiser's step (`step`)."""
        device = self.device
        with torch.set_grad_enabled(what == "train"):
            if what == "head":
                rows = min(self.vocabulary, VOCABULARY)
                weight = torch.randn(rows, self.hidden, device=device).to(self.dtype)
                states = torch.randn(512, self.hidden, device=device).to(self.dtype)
                once = seconds(lambda: (states @ weight.T).float().log_softmax(-1), device)
                return once / 512 * self.vocabulary / rows
            if what == "step":
                values = nn.Parameter(torch.zeros(2**24, device=device))
                values.grad = torch.ones_like(values)
                return seconds(torch.optim.AdamW([values]).step, device) / 2**24
            return sum(count * self._pass(model, what, length) for model, count in self._kinds)

    def _pass(self, model: Any, what: str, length: int) -> float:
        rows = BATCH if what == "write" else max(1, tokens_at_once(self.device) // length)
        ids, decoder = self._ids(rows, length), model.base_model
        if what == "train":
            within = list(find_blocks(model).blocks.requires_grad_(True).parameters())

            def act() -> None:
                loss = decoder(ids, use_cache=False)[0].float().square().mean()
                torch.autograd.grad(loss, within, allow_unused=True)

            found = seconds(act, self.device) / ids.numel()
            find_blocks(model).blocks.requires_grad_(False)
            return found
        if what == "forward":
            return seconds(lambda: decoder(ids, use_cache=False), self.device) / ids.numel()
        found = decoder(ids[:, :32], use_cache=True)
        named = cache_argument(decoder)
        kept = {named: found.get(named)}
        return seconds(lambda: decoder(ids[:, :1], use_cache=True, **kept), self.device) / rows

    def forward(self, tokens: float, length: int) -> float:
        """Return the seconds of one pass of tokens in rows of `length` through the blocks."""
        return tokens * self._rates("forward", length) if tokens else 0.0

    def head(self, positions: float) -> float:
        """Return the seconds of the output head and its softmax."""
        return positions * self._rates("head", 0)

    def write(self, tokens: float) -> float:
        """Return the seconds of writing tokens, `BATCH` rows at a time."""
        return tokens * (self._rates("write", 64) + self._rates("head", 0)) if tokens else 0.0

    def pruning(
        self,
        method: Method,
        propagation: str | None,
        rows: int,
        length: int,
        allocation: str | None = None,
    ) -> float:
        """Return the seconds of a prune with its allocation, without reading and writing files."""
        fixed, each = self.prune(method, propagation, length)
        if allocation is not None:
            fixed += self.prune(looker("owl"), None, length)[0]
            each += self.prune(looker(allocation), None, length)[1]
        return fixed + rows * length * each

    def calibration(self, rows: int, length: int, spec: Spec, measured: bool = True) -> float:
        """Return the seconds of writing a calibration set's text and measuring its perplexity."""
        tokens = rows * length
        found = self.forward(tokens, length) + self.head(tokens) if measured else 0.0
        parts = {name: spec.mix.weights[name] for name in spec.written}
        parts |= {} if spec.generate is None else {spec.generate: 1.0}
        return found + self.write(sum(PASSES[name] * part for name, part in parts.items()) * tokens)

    def evaluation(self, work: SuiteWork, texts: float = 0.0) -> float:
        """Return the seconds of scoring a suite, and the distance to the dense model on texts."""
        found = self.forward(work.tokens, 512) + self.head(work.tokens / 2)
        found += self.forward(texts, 512) + self.head(2 * texts)
        return found + self.write(work.written)

    def recovery(self, request: Recovering, rows: int, length: int) -> float:
        """Return the seconds of a recovery, without reading and writing files."""
        held = held_out(rows)
        trained = max(0, rows - held) * length * request.epochs
        read = held * length * request.epochs
        steps = max(0, rows - held) // request.batch * request.epochs
        found = trained * self._rates("train", length)
        found += steps * self.block_weights * self._rates("step", 0)
        if request.method == "blocks":
            return found + self.forward(2 * rows * length + read, length)
        found += self.forward(rows * length + trained + 2 * read, length)
        return found + self.head(4 * trained + 4 * read)

    def prune_memory(self, methods: Sequence[Method], rows: int, length: int) -> float:
        """Return the bytes a prune of the whole model in memory takes, program and copy of the
        dense weights included."""
        kept = self.block_weights * self.dtype.itemsize if self.device.type == "cpu" else 0
        source: Any = self
        used = any(method.needs is not None for method in methods)
        needed = plan_for(source, (rows, length) if used else (0, 0), methods, budget=2**62).needed
        blocks = 2 * max(map(self.block_bytes, range(len(self.blocks))))
        logits = 3 * 512 * self.vocabulary * 4
        return self.bytes + kept + max(needed - blocks, PROGRAM + logits)

    def recovery_memory(self, request: Recovering, length: int, room: float | None = None) -> int:
        """Return the bytes a recovery takes beside the program; some is spared within `room`."""
        source: Any = self
        rows = rows_at_once(request.batch, length)
        rows, most = (rows[:1], float("inf")) if room is None else (rows, room)
        return recovery.make_plan(source, request.method, self.dtype, length, rows, most).needed


def seconds(act: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, the median of as many as fit into a moment."""
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < 50 and sum(taken) < 2 * MOMENT):
        began = time.perf_counter()
        act()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - began)
        if taken[0] > 60 * MOMENT:  # too long to be off by its start
            break
    return statistics.median(taken[1:] or taken)


class SuiteWork(NamedTuple):
    """What scoring a suite takes: tokens read and written; `exact` where its data is at hand."""

    items: int = 0
    tokens: int = 0
    written: int = 0
    exact: bool = True


def suite_work(suite: Suite) -> SuiteWork:
    """Return what scoring a suite takes, counted where its data is at hand, else assumed."""
    items = tokens = written = 0
    exact, here = True, assets.get_asset(ARCHIVE).state == "ok"
    for spec in suite.tasks.values():
        if spec.writes and (here or spec.file is not None):
            asked = task_of(spec)
            texts = [one.chat or one.plain for one in asked.picked(spec)]
            shared = preamble(texts)
            count, held = len(texts), shared + sum(len(text) - shared for text in texts)
            held = round(held / CHARACTERS)
            written += count * asked.tokens // 2
        elif here or spec.file is not None:
            found = load_items(spec)
            contexts = list(dict.fromkeys(text for item in found for text in item.contexts))
            shared = preamble(contexts)
            characters = shared + sum(len(text) - shared for text in contexts)
            characters += sum(len(choice) for item in found for choice in item.choices)
            count, held = len(found), round(characters / CHARACTERS)
        else:
            exact = False
            count = min(ITEMS, spec.limit or ITEMS)
            held = count * EACH
        items, tokens = items + count, tokens + held
    return SuiteWork(items, tokens, written, exact)


def text_tokens(suite: Suite) -> int:
    """Return the tokens of the texts that distance is measured on."""
    return TEXT_ROWS * TEXT_LENGTH * sum(name in builtin_readers() for name in suite.dimensions)


def estimate(study: Study, device: str = "auto") -> dict[str, Any]:
    """Return what a study will take on this machine, one trial at a time.

    In all seconds, and bytes of memory and on disk; `sets_seconds` make and measure the calibration
    sets, `dense_seconds` score the dense models. `groups` are of trials that take the same, with
    what each takes, `notes` say what was assumed and what does not fit.
    """
    models = {label: Timed(m.name, m.dtype, device) for label, m in study.file.models.items()}
    work, texts = suite_work(study.suite), text_tokens(study.suite)
    groups: dict[tuple[Any, ...], list[Planned]] = {}
    prunes: dict[Any, Planned] = {}  # what differs in recovery alone is pruned once
    sets: dict[Any, Planned] = {}
    for trial in plan(study):
        groups.setdefault(trial.condition, []).append(trial)
        prunes.setdefault(trial.pruned, trial)
        if trial.rows:
            size = trial.model, trial.calibration, trial.rows, trial.length, trial.seed
            sets.setdefault(size, trial)
    found: list[dict[str, Any]] = []
    notes = []
    if not work.exact:
        notes.append(
            f"the data of suite {study.suite.name} is not here: scoring is estimated from assumed "
            "sizes of its tasks"
        )
    for members in groups.values():
        like, model = members[0], models[members[0].model]
        pruned = sum(prunes[trial.pruned] is trial for trial in members) / len(members)
        shape = like.rows, like.length
        once = model.pruning(like.method, like.request.propagation, *shape, like.allocation)
        taken = {"prune": pruned * once, "evaluate": model.evaluation(work, texts)}
        if like.recovery is not None:
            taken["recover"] = model.recovery(like.recovery, *shape)
        memory = trial_memory(model, like)
        found.append({
            "model": like.model, "method": like.way, "pattern": like.pattern, "rows": like.rows,
            "length": like.length, "trials": len(members), "seconds": taken, "memory": memory,
            "disk": 80.0 * work.items + study.file.keep_checkpoints * model.bytes + 50_000,
        })  # fmt: skip
        there = device_memory(model.device)[2] or total_memory()
        if memory > there:
            notes.append(too_large(f"{like.model} {like.way} {like.pattern}", memory, there))
    made, chatless = 0.0, dict[str, list[str]]()
    for one in sets.values():
        asked = ask(one.request.calibration or "", sources=study.own, **one.request.drawn())
        measured = study.file.perplexity
        made += models[one.model].calibration(one.rows, one.length, asked.spec, measured)
        if asked.chatless(_tokenizer(study.file.models[one.model].name)):
            chatless.setdefault(one.model, []).append(one.calibration)
    notes += [f"{model}: {', '.join(dict.fromkeys(named))} {CHATLESS}"
              for model, named in chatless.items()]  # fmt: skip
    dense = sum(model.evaluation(work) for model in models.values())
    run = sum(group["trials"] * sum(group["seconds"].values()) for group in found)
    kept = sum(group["trials"] * group["disk"] for group in found)
    return {
        "trials": sum(group["trials"] for group in found), "seconds": made + dense + run,
        "memory": max(group["memory"] for group in found),
        "disk": kept + sum(8.0 * one.rows * one.length for one in sets.values()),
        "sets": len(sets), "sets_seconds": made, "dense_seconds": dense, "groups": found,
        "notes": list(dict.fromkeys(notes)),
    }  # fmt: skip


@cache
def _tokenizer(name: str) -> Any:
    try:
        return open_tokenizer(name).tokenizer
    except CalmixError:  # the configuration alone is at hand
        return None


def trial_memory(model: Timed, trial: Planned) -> float:
    """Return the bytes a trial takes at its peak on the device that prunes."""
    peak = model.prune_memory([trial.method], trial.rows, trial.length)
    if trial.recovery is None:
        return peak
    kept = model.block_weights * model.dtype.itemsize if model.device.type == "cpu" else 0
    needed = model.recovery_memory(trial.recovery, trial.length)
    return max(peak, PROGRAM + model.bytes + kept + needed)


def passing_memory(model: Timed, trial: Planned) -> float:
    """Return the bytes of a machine's own memory where an accelerator prunes."""
    return PROGRAM + model.bytes


def too_large(named: str, needed: float, there: float) -> str:
    """Say that a trial needs more memory than there is."""
    return f"{named} needs {needed / 1e9:.1f} GB of {there / 1e9:.1f} GB: use fewer or shorter rows"


def largest(
    study: Study,
    trials: Sequence[Planned],
    device: str,
    memory: Callable[[Timed, Planned], float] = trial_memory,
) -> tuple[str, float]:
    """Return the label of the trial that takes most memory, and its bytes; of models whose
    configuration cannot be read nothing is known."""
    found = "", 0.0
    for label in dict.fromkeys(trial.model for trial in trials):
        try:
            model = Timed(study.file.models[label].name, study.file.models[label].dtype, device)
        except CalmixError:
            continue
        kinds = {trial.condition: trial for trial in trials if trial.model == label}
        for trial in kinds.values():
            found = max(found, (trial.label, memory(model, trial)), key=lambda one: one[1])
    return found


def check_memory(study: Study, trials: Sequence[Planned], device: torch.device) -> None:
    """Refuse trials that an accelerator cannot hold. On a CPU they would be swapped."""
    there = device_memory(device)[2]
    if there is not None:
        label, needed = largest(study, trials, str(device))
        if needed > there:
            raise InputError(too_large(label, needed, there))
