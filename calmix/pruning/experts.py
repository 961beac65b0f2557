"""Experts: which inputs each one sees, without knowing how a model sends tokens to them.

The module within which tokens are routed runs as the model's authors wrote it, one expert after
another, while every product with an expert's weights is watched. A view of a parameter that holds
all experts, through whatever indexing and transposing, is known by where it lies. Products that are
of no use to what is asked for are left out: they give zeros.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calmix.errors import InputError, ModelError, nearest
from calmix.models.blocks import Mixture, Prunable
from calmix.pruning import distributed
from calmix.pruning.gram import Statistic

Tokens = Literal["routed", "all-tokens", "routed-only"]
EXPERT_BYTES = 2**30  # that statistics of experts take at a time
SMOOTHING = 32.0  # tokens that the mean over all tokens counts as
Product = Callable[[str, int | None, Tensor], bool]

MATMULS = frozenset({
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm,
    torch.bmm, torch.Tensor.bmm,
})  # fmt: skip


@dataclass(frozen=True)
class ExpertTokens:
    """Which tokens an expert is pruned on.

    Attributes:
        mode: `routed`, its own and with a small weight all, H_e + smoothing H_all / n_all;
            `all-tokens`; or `routed-only`, which refuses experts that see none.
        smoothing: tokens that the mean over all tokens counts as, with `routed`.
    """

    mode: Tokens = "routed"
    smoothing: float = SMOOTHING

    def __post_init__(self) -> None:
        known = get_args(Tokens)
        if self.mode not in known:
            raise InputError(f"unknown --experts '{self.mode}': {nearest(self.mode, known)}")
        if not 0 < self.smoothing < float("inf"):
            raise InputError(
                f"--expert-smoothing {self.smoothing} is no positive number of tokens: for none "
                "use --experts routed-only"
            )


class _Products(TorchFunctionMode):
    """Sees products with the parameters of all experts: their views lie in the same memory."""

    def __init__(self, layers: Iterable[Prunable], seen: Product) -> None:
        super().__init__()
        made = [_Source(layer, seen) for layer in layers]
        self._sources = {source.place: source for source in made}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        linear = func is nn.functional.linear
        if (linear or func in MATMULS) and len(args) > 1 and isinstance(args[1], Tensor):
            source = self._sources.get(_memory(args[1]))
            if source is not None and _memory(args[0]) != source.place:
                weight = args[1] if linear else args[1].transpose(-1, -2)
                return source.product(func, weight, args, kwargs)
        return func(*args, **kwargs)


def _memory(tensor: Tensor) -> int:
    """Return what tells the memory a tensor lies in from any other that is in use."""
    return int(tensor.untyped_storage()._cdata)


class _Source:
    """One parameter of all experts that is watched."""

    def __init__(self, layer: Prunable, seen: Product) -> None:
        whole = layer.module._parameters[layer.parameter].data
        self._stored = whole.transpose(1, 2) if layer.transposed else whole
        self.place = _memory(whole)
        self._parameter, self._seen = layer.parameter, seen

    def product(self, func: Any, weight: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Tell of a product x W^T with a weight (outputs, inputs) of one expert, or of all."""
        offset = weight.storage_offset() - self._stored.storage_offset()
        expert, rest = divmod(offset, self._stored.stride(0))
        whole = weight.ndim == 3
        like = self._stored if whole else self._stored[expert]
        if rest or weight.shape != like.shape or weight.stride() != like.stride():
            raise ModelError(
                f"a part of the experts' {self._parameter} of shape {tuple(weight.shape)} is "
                "used on its own: the engine cannot prune these experts"
            )
        if self._seen(self._parameter, None if whole else expert, args[0]):
            return func(*args, **kwargs)
        return args[0].new_zeros(*args[0].shape[:-1], weight.shape[-2])


@contextmanager
def watching(mixture: Mixture, layers: Sequence[Prunable], seen: Product) -> Iterator[None]:
    """Tell of every product with experts' weights, and choose which are computed.

    Args:
        mixture: whose module may run meanwhile, by its `forward`.
        layers: all linear maps in it.
        seen: called with parameter or key, expert (None: all at once, or none) and input; a
            product is computed if it returns True.
    """
    with ExitStack() as stack:
        fused = {(id(layer.module), layer.parameter): layer for layer in layers if layer.fused}
        config: Any = getattr(mixture.module, "config", None)
        if fused and hasattr(config, "_experts_implementation"):
            before = config._experts_implementation
            stack.callback(setattr, config, "_experts_implementation", before)
            config._experts_implementation = "eager"
        for layer in layers:
            if not layer.fused:
                stack.enter_context(_replaced(layer, seen))
        if fused:
            stack.enter_context(_Products(fused.values(), seen))
        yield


@contextmanager
def _replaced(layer: Prunable, seen: Product) -> Iterator[None]:
    """Let a linear map that is a module ask whether it is to run."""
    held = layer.module.__dict__
    before, run = held.get("forward"), layer.module.forward

    def forward(inputs: Tensor) -> Tensor:
        if seen(layer.key, layer.expert, inputs):
            result: Tensor = run(inputs)
            return result
        return inputs.new_zeros(*inputs.shape[:-1], layer.shape[0])

    held["forward"] = forward
    try:
        yield
    finally:
        held.pop("forward")
        if before is not None:
            held["forward"] = before


@dataclass(frozen=True)
class Step:
    """Linear maps that read one input, of every expert; by None those that see all tokens.

    Attributes:
        layers: those to be pruned.
        keys: of all, the one first that is called first.
    """

    layers: Mapping[int | None, list[Prunable]]
    keys: tuple[str, ...]

    @property
    def key(self) -> str:
        """What the input is first seen at."""
        return self.keys[0]

    @property
    def columns(self) -> int:
        """Width of the input."""
        return next(iter(self.layers.values()))[0].shape[1]


@dataclass(eq=False)
class Routed:
    """A mixture of experts as it was seen at work.

    Attributes:
        mixture: the experts.
        layers: all linear maps in it.
        wanted: names of those to be pruned.
        steps: their inputs, in the order in which they can be pruned.
        chosen: experts a token is sent to.
        kind: how the module is called: `indexed` (hidden states, and the experts of each token),
            `stacked` (an expert's hidden states after another's, zero where it is not chosen),
            `shared` (all experts see all tokens) or `modules` (each expert is one).
    """

    mixture: Mixture
    layers: list[Prunable]
    wanted: frozenset[str]
    steps: list[Step] = field(default_factory=list)
    kind: str = ""
    chosen: int = 1

    @property
    def name(self) -> str:
        """Qualified name of the module within which tokens are routed."""
        return self.mixture.name

    @property
    def module(self) -> Any:
        """That module."""
        return self.mixture.module

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return self.layers[0].view().device

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module on a few tokens and find the steps; return what it returned.

        Raises:
            ModelError: it cannot be seen what an expert's weights are applied to.
        """
        groups: list[tuple[int | None, tuple[Any, ...], list[str]]] = []
        kept: list[Tensor] = []  # keeps inputs alive, so that no address is used twice

        def seen(key: str, expert: int | None, inputs: Tensor) -> bool:
            kept.append(inputs)
            where = _memory(inputs), inputs.storage_offset()
            place = *where, inputs._version, inputs.shape, inputs.stride()
            same = [keys for who, where, keys in groups if (who, where) == (expert, place)]
            if same:
                same[0].append(key)
            else:
                groups.append((expert, place, [key]))
            return True

        with watching(self.mixture, self.layers, seen):
            result = self.mixture.module.forward(*args, **kwargs)
        done: set[str] = set()
        self.steps = []
        for _, _, keys in groups:
            if done.isdisjoint(keys) and len(set(keys)) == len(keys):
                self.steps.append(self._step(keys))
            elif not done.issuperset(keys):
                raise ModelError(f"the experts in {self.name} are not all wired alike")
            done |= set(keys)
        if missing := {layer.key for layer in self.layers} - done:
            raise ModelError(
                f"it cannot be seen what {min(missing).strip('/')} of the experts in {self.name} "
                "is applied to: the engine cannot prune them"
            )
        self.kind = self._called(args, kwargs)
        hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        tokens = hidden.numel() // hidden.shape[-1]
        tokens //= self.mixture.count if self.kind == "stacked" else 1
        self.chosen = round(int(self.counts(1, args, kwargs).sum()) / tokens)
        return result

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if self.mixture.experts is not None:
            return "modules"
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if any(is_index(value) for value in tensors):
            return "indexed"
        return "stacked" if len(tensors) == 1 else "shared"

    def _step(self, keys: list[str]) -> Step:
        layers: dict[int | None, list[Prunable]] = {}
        for layer in self.layers:
            if layer.key in keys and layer.name in self.wanted:
                layers.setdefault(layer.expert, []).append(layer)
        return Step(layers, tuple(keys))

    def collect(
        self,
        step: Step,
        experts: Collection[int | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        add: Callable[[int | None, Tensor], None],
    ) -> None:
        """Run the module as far as a step's inputs and hand over those of some experts."""
        with self._as_far_as(step, experts, add):
            self.mixture.module.forward(*args, **kwargs)

    def everything(
        self,
        step: Step,
        experts: Sequence[int],
        tokens: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        add: Callable[[int | None, Tensor], None],
    ) -> None:
        """Do the same as if the tokens at some positions went to all of the experts.

        Raises:
            ModelError: the experts cannot be given tokens that are not theirs.
        """
        hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        count, width = self.mixture.count, hidden.shape[-1]
        with self._as_far_as(step, experts, add):
            if self.kind == "modules":
                assert self.mixture.experts is not None
                for expert in experts:
                    try:
                        self.mixture.experts[expert].forward(hidden.reshape(-1, width)[tokens])
                    except TypeError as error:
                        raise ModelError(
                            f"the experts in {self.name} cannot be run on their own: use "
                            "--experts routed-only"
                        ) from error
                return
            if self.kind == "shared":
                self.mixture.module.forward(*args, **kwargs)
                return
            if self.kind == "stacked":
                apart = hidden.reshape(count, -1, width)
                chosen = (apart != 0).any(-1).sum(0).clamp(min=1)
                flat = (apart.sum(0) / chosen[:, None]).to(hidden.dtype)[tokens]
                one = flat.repeat(count, 1)
                self.mixture.module.forward(*_with(args, hidden, one), **_with(kwargs, hidden, one))
                return
            flat = hidden.reshape(-1, width)[tokens]
            flat = flat[None] if hidden.ndim == 3 else flat
            index = next(v for v in (*args, *kwargs.values()) if is_index(v))
            numbers = torch.tensor(list(experts), dtype=index.dtype, device=index.device)
            numbers = numbers.expand(len(tokens), -1)
            gates = hidden.new_ones(numbers.shape)
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value is not hidden and value is not index:
                    args, kwargs = _with(args, value, gates), _with(kwargs, value, gates)
            args, kwargs = _with(args, hidden, flat), _with(kwargs, hidden, flat)
            args, kwargs = _with(args, index, numbers), _with(kwargs, index, numbers)
            self.mixture.module.forward(*args, **kwargs)

    @contextmanager
    def _as_far_as(
        self,
        step: Step,
        experts: Collection[int | None],
        add: Callable[[int | None, Tensor], None],
    ) -> Iterator[None]:
        at = next(number for number, one in enumerate(self.steps) if one is step)
        earlier = {key for one in self.steps[:at] for key in one.keys}
        fused = {layer.key for layer in self.layers if layer.fused}

        def seen(key: str, expert: int | None, inputs: Tensor) -> bool:
            if expert is None and key in fused:
                if key == step.key:
                    for one in experts:
                        assert one is not None
                        add(one, inputs[one][(inputs[one] != 0).any(-1)])
                return key in earlier
            if key == step.key and expert in experts:
                add(expert, inputs)
            return key in earlier and (expert is None or expert in experts or None in experts)

        with watching(self.mixture, self.layers, seen):
            yield

    def counts(self, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return how many tokens of each calibration row reach each expert, (rows, experts)."""
        count = self.mixture.count
        hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        if self.kind == "indexed":
            index = next(v for v in (*args, *kwargs.values()) if is_index(v))
            each = index.reshape(rows, -1).long().clamp(max=count)  # some number one that is none
            each += torch.arange(rows, device=each.device)[:, None] * (count + 1)
            found = each.new_zeros(rows * (count + 1))  # in one dimension, which has a sum in order
            found.scatter_add_(0, each.flatten(), torch.ones_like(each).flatten())
            return found.view(rows, -1)[:, :count]
        if self.kind == "stacked":
            used = (hidden.reshape(count, rows, -1, hidden.shape[-1]) != 0).any(-1)
            return used.sum(-1).T
        found = torch.zeros(rows, count, dtype=torch.int64)
        if self.kind == "shared":
            return found + hidden.numel() // hidden.shape[-1] // rows
        plain = {layer.key for layer in self.layers if layer.expert is None}
        step = next(step for step in self.steps if plain.isdisjoint(step.keys))
        for row, part in enumerate(hidden.chunk(rows)):

            def add(expert: int | None, inputs: Tensor, row: int = row) -> None:
                assert expert is not None
                found[row, expert] += inputs.numel() // inputs.shape[-1]

            with_row = _with(args, hidden, part), _with(kwargs, hidden, part)
            self.collect(step, range(count), *with_row, add)
        return found


def is_index(value: Any) -> bool:
    """Tell whether an argument names the experts of each token."""
    return (
        isinstance(value, Tensor)
        and value.ndim >= 2
        and value.dtype in (torch.int64, torch.int32, torch.int16)
    )


def _with(values: Any, old: Tensor, new: Tensor) -> Any:
    """Return arguments with one tensor in the place of another."""
    if isinstance(values, dict):
        return {key: new if value is old else value for key, value in values.items()}
    return tuple(new if value is old else value for value in values)


class Gathering:
    """The statistics of some experts' inputs at one step, and how they are mixed.

    Of several processes each collects what its rows give; what is yielded is all processes'.

    Args:
        routed: the mixture.
        step: the inputs.
        experts: whose; `[None]` at a step that all tokens take.
        kind: the statistic.
        tokens: which tokens count.
        lap: counts the seconds of what is done within.
    """

    def __init__(
        self,
        routed: Routed,
        step: Step,
        experts: Sequence[int | None],
        kind: type[Statistic],
        tokens: ExpertTokens,
        lap: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._lap = lap
        self._routed, self._step, self._experts = routed, step, experts
        self._kind, self._tokens = kind, tokens
        self._own: dict[int | None, Statistic] = {}
        self._every: dict[int | None, Statistic] = {}
        self._same: dict[int | None, int | None] = {}  # whose input over all tokens is another's
        self._all = 0
        self._done: dict[int | None, Tensor] = {}
        self.routes = list(experts) != [None]
        self.all_tokens = tokens.mode == "all-tokens" or routed.kind == "shared"
        self._samples = self.routes and (self.all_tokens or tokens.mode == "routed")

    def collect(self, sample: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a micro-batch, the arguments of the mixture's module.

        Args:
            sample: positions of the tokens that stand for all.
            args, kwargs: as the module was called.
        """
        if not (self.routes and self.all_tokens):
            self._routed.collect(self._step, self._experts, args, kwargs, self._add_own)
        if self._samples and len(sample):
            first: list[tuple[int | None, Tensor]] = []

            def add(expert: int | None, inputs: Tensor) -> None:
                if not first:
                    first.append((expert, inputs))
                    self._all += inputs.numel() // inputs.shape[-1]
                elif self._same.get(expert) is not None or (
                    expert not in self._every and torch.equal(inputs, first[0][1])
                ):
                    self._same[expert] = first[0][0]
                    return
                self._add(self._every, expert, inputs)

            numbers = [expert for expert in self._experts if expert is not None]
            self._routed.everything(self._step, numbers, sample, args, kwargs, add)

    def _add_own(self, expert: int | None, inputs: Tensor) -> None:
        self._add(self._own, expert, inputs)

    def _add(self, sums: dict[int | None, Statistic], expert: int | None, inputs: Tensor) -> None:
        with self._lap():
            if expert not in sums:
                sums[expert] = self._kind(self._step.columns, inputs.device)
            sums[expert].add(inputs)

    def statistics(
        self, counts: Sequence[int]
    ) -> Iterator[tuple[list[Prunable], Tensor, int | None]]:
        """Yield linear maps that share an input, its statistic, and the tokens of that expert.

        Args:
            counts: tokens routed to each expert of the mixture.

        Raises:
            InputError: an expert sees no token and is to be pruned on its own alone.
        """
        if self._samples and distributed.processes()[1] > 1:
            self._agree()
        for expert in self._experts:
            layers = self._step.layers.get(expert, [])
            if not layers:
                continue
            if expert is None:
                yield layers, self._summed(self._own, None), None
            else:
                yield layers, self._mixed(expert, counts[expert]), counts[expert]

    def _mixed(self, expert: int, count: int) -> Tensor:
        every = self._same.get(expert, expert)
        if self.all_tokens:
            return self._matrix(every)
        if self._tokens.mode == "routed-only":
            if not count:
                raise InputError(
                    f"expert {expert} of {self._routed.name} sees none of the calibration tokens: "
                    "draw more --rows or from other sources, or leave out --experts routed-only"
                )
            return self._summed(self._own, expert)
        weight = self._tokens.smoothing
        whole = self._matrix(every)
        own = self._summed(self._own, expert) if count else torch.zeros_like(whole)
        if self._kind.sums:
            return own.add_(whole, alpha=weight / self._all)
        return (count * own + weight * whole) / (count + weight)

    def _matrix(self, expert: int | None) -> Tensor:
        if expert not in self._done:
            self._done[expert] = self._summed(self._every, expert)
        return self._done[expert]

    def _summed(self, sums: dict[int | None, Statistic], expert: int | None) -> Tensor:
        """Return the statistic of all processes' tokens, of which this one may have seen none."""
        found = sums.pop(expert, None)
        if found is None:
            assert distributed.processes()[1] > 1
            found = self._kind(self._step.columns, self._routed.device)
        distributed.gather(found)
        return found.matrix()

    def _agree(self) -> None:
        """Let all processes hold the same inputs to be another expert's, and count all tokens."""
        same = set(self._same.values())
        flags = [flag for e in self._experts for flag in (e in self._every, e in same)]
        counted = torch.tensor([*flags, self._all])
        *told, self._all = distributed.total(counted, self._routed.device).tolist()
        held, others = told[::2], told[1::2]
        first = next((e for e, by in zip(self._experts, others, strict=True) if by), None)
        for expert, by in zip(self._experts, held, strict=True):
            if not by:
                self._same[expert] = first
            elif expert in self._same:  # as it happens here, and not everywhere
                self._every[expert] = copy.deepcopy(self._every[self._same.pop(expert)])


def sampled(routed: Routed, length: int) -> int:
    """Return of how many tokens one stands for all, where all would cost more than the experts'.

    As many tokens go through every expert as are routed to it on average. The number has no
    factor in common with the length of a row, so that no position is preferred.
    """
    step = max(1, round(routed.mixture.count / max(1, routed.chosen)))
    while step > 1 and math.gcd(step, length) != 1:
        step += 1
    return step


class Seen(Protocol):
    """What a report tells of a layer."""

    @property
    def name(self) -> str:
        """Qualified name."""

    @property
    def columns(self) -> int:
        """Width of its input."""

    @property
    def tokens(self) -> int | None:
        """Tokens that were routed to it, None outside of experts."""


def starved(layers: Iterable[Seen], rows: int) -> str | None:
    """Say which experts see fewer tokens than they have inputs, and how many rows would do.

    Args:
        layers: what a report tells of all.
        rows: calibration rows.
    """
    seen: dict[str, tuple[int, int]] = {}
    for layer in layers:
        if layer.tokens is not None:
            name = layer.name.rpartition(".")[0]
            seen[name] = layer.tokens, max(layer.columns, seen.get(name, (0, 0))[1])
    few = {name: pair for name, pair in seen.items() if pair[0] < pair[1]}
    if not few:
        return None
    name = min(few, key=lambda one: few[one][0] / few[one][1])
    none = sum(not tokens for tokens, _ in few.values())
    need = max(math.ceil(rows * width / tokens) for tokens, width in few.values() if tokens) if (
        none < len(few)
    ) else 0  # fmt: skip
    what = f"{none} of them none; " if none else ""
    would = f"some {need} rows would do for those that see any" if none else f"{need} rows would do"
    return (
        f"{len(few)} of {len(seen)} experts see fewer tokens than they have inputs, {what}"
        f"least {name} with {few[name][0]} for {few[name][1]}"
        + (f": {would}, or sources that reach them" if need else ": other sources may reach them")
    )
