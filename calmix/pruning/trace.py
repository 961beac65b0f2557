"""Trace how a model's blocks are wired, by running them on a few tokens.

Tracing finds which linear maps share an input, the order of inputs, what a block returns, and its
arguments. Nothing is assumed about the architecture. Blocks are traced one by one, so that only the
current one needs its weights in memory.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, MutableMapping, MutableSequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from calmix.errors import ModelError, first_line
from calmix.models.blocks import DecoderBlocks, Dense, Prunable, decoder_of, first_tensor
from calmix.pruning.experts import Routed

TRACED_TOKENS = 8  # tokens a block is traced on
UNSEEN = "the inputs of its experts cannot be traced"
KNOWN = 8  # values kept per argument: of two kinds, for the few tokens, full and last micro-batches

# Linear maps of one block that read the same input, in call order.
SharedInput = list[Prunable]


class Slot(NamedTuple):
    """Stands in a block's arguments for a dict or list that blocks may write into, or one entry."""

    number: int
    entry: int | None = None


@dataclass
class Batch:
    """A micro-batch of rows on its way through the blocks.

    `calls` are the decoder's arguments to each block, without hidden states. They stay unchanged:
    each dict or list in them is replaced by a `Slot` of `written`. If blocks pass each other more
    than hidden states (`hands`), the first slot holds it.
    """

    blocks: Any
    rows: int
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    written: list[Any]
    hands: bool

    def run(self, index: int, hidden: Tensor, *, keep: bool = True) -> Tensor:
        """Run a block on hidden states and return its own.

        With `keep`, what it writes into its arguments is kept once it has finished, so that a
        restarted block sees the same arguments.
        """
        written = [_copied(value) for value in self.written]
        args, kwargs = self.calls[index]
        named = {name: _filled(value, written) for name, value in kwargs.items()}
        result = self.blocks[index](hidden, *_filled(args, written), **named)
        if self.hands:
            written[0] = list(result[1:])
        if keep:
            self.written = written
        return first_tensor(result)


def _copied(value: Any) -> Any:
    """Copy a dict or list and all dicts and lists in it; other values are shared."""
    if not isinstance(value, MutableMapping | MutableSequence):
        return value
    copied: Any = copy.copy(value)
    for key in value if isinstance(value, MutableMapping) else range(len(value)):
        copied[key] = _copied(value[key])
    return copied


def _filled(value: Any, written: list[Any]) -> Any:
    if isinstance(value, Slot):
        stored = written[value.number]
        return stored if value.entry is None else stored[value.entry]
    return tuple(_filled(v, written) for v in value) if type(value) is tuple else value


class Calls:
    """Records what the decoder passes to its blocks for each micro-batch, without running them.

    It learns from a few token ids, (1, tokens). Weights outside the blocks and those of the first
    block must be in memory.
    """

    def __init__(self, model: Any, blocks: DecoderBlocks, ids: Tensor) -> None:
        self._model, self._decoder, self.device = model, decoder_of(model), ids.device
        self._blocks = blocks
        self._known: dict[str, list[Tensor]] = defaultdict(list)
        try:
            self._learn(ids, mark=True)
        except ModelError:  # some decoders read what a block returns
            self._learn(ids, mark=False)

    @torch.no_grad()
    def _learn(self, ids: Tensor, *, mark: bool) -> None:
        """Run the first block to see what blocks return, and mark what they pass on."""
        self._rest: tuple[Any, ...] | None = None  # what a block returns after its hidden states
        self._hands = False
        handed: list[Tensor] = []
        returned: list[Tensor] = []
        run_first = self._blocks.blocks[0].forward

        def see(index: int, hidden: Tensor, others: list[Any], named: dict[str, Any]) -> Tensor:
            handed.append(hidden.clone())
            if index == 0:
                result = run_first(hidden, *others, **named)
                rest = tuple(result[1:]) if isinstance(result, tuple | list) else None
                # A tensor in place of None, to see where it goes.
                if mark and rest:
                    rest = tuple(hidden.new_zeros(()) if v is None else v for v in rest)
                self._rest = rest
            values = [*others, *named.values()]
            self._hands |= index > 0 and any(map(self._handed, values))
            returned.append(hidden + 1)
            return returned[-1]

        reason = ""
        try:
            self._decode(see, ids)
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
            reason = first_line(error)
        if reason and not returned:  # failed before it reached a block
            first = next(self._blocks.blocks[0].parameters())
            raise ModelError(
                f"{type(self._decoder).__name__} does not run on token ids in "
                f"{str(first.dtype)[6:]}: {reason}"
            )
        straight = not reason and len(handed) == len(self._blocks)
        if not straight or not all(map(torch.equal, returned, handed[1:])):
            raise ModelError(
                f"the blocks in {self._blocks.name} do not pass hidden states straight from one "
                f"to the next{reason and f' ({reason})'}: the engine cannot prune this "
                "architecture yet"
            )

    def _decode(self, see: Callable[..., Tensor], ids: Tensor, model: Any = None) -> Any:
        """Run the decoder, or all of the model, with `see` in place of its blocks: it takes the
        block's index, hidden states and other arguments, and returns hidden states."""

        def stub(index: int, /, *args: Any, **kwargs: Any) -> Any:
            entering, *others = args or (kwargs.pop("hidden_states"),)
            hidden = see(index, entering, others, kwargs)
            return hidden if self._rest is None else (hidden, *self._rest)

        with ExitStack() as stack:
            for index, block in enumerate(self._blocks.blocks):
                stack.enter_context(patch.object(block, "forward", partial(stub, index)))
            return (self._decoder if model is None else model)(input_ids=ids, use_cache=False)

    def _handed(self, value: Any) -> Slot | None:
        """Return the slot of an argument that is one of a block's other outputs, else None."""
        matches = (n for n, one in enumerate(self._rest or ()) if value is one)
        return next((Slot(0, n) for n in matches if isinstance(value, Tensor)), None)

    def record(self, ids: Tensor) -> tuple[Tensor, Batch]:
        """Return the hidden states entering the first block, and the blocks' other arguments.

        Equal tensors of different micro-batches (masks, position embeddings) are stored once.
        """
        first: list[Tensor] = []
        written: list[Any] = [[None] * len(self._rest or ())] if self._hands else []
        batch = Batch(self._blocks.blocks, len(ids), [], written, self._hands)
        # Arguments common to all blocks are compared once: comparing synchronises the device.
        compared: dict[tuple[int, str], tuple[Any, Any]] = {}

        def kept(name: str, value: Any) -> Any:
            if (handed := self._handed(value)) is not None:
                return handed
            if isinstance(value, tuple):
                return tuple(kept(f"{name}.{i}", v) for i, v in enumerate(value))
            if isinstance(value, MutableMapping | MutableSequence):
                if not any(known is value for known in written):
                    written.append(value)
                return Slot(next(n for n, known in enumerate(written) if known is value))
            if not isinstance(value, Tensor):
                return value
            place = id(value), name
            if place not in compared:
                compared[place] = value, self._shared(name, value)
            return compared[place][1]

        def see(index: int, hidden: Tensor, others: list[Any], named: dict[str, Any]) -> Tensor:
            first.append(hidden)
            stored = tuple(kept(str(i), value) for i, value in enumerate(others))
            batch.calls.append((stored, {name: kept(name, value) for name, value in named.items()}))
            return hidden

        self._decode(see, ids)
        if len(batch.calls) != len(self._blocks):
            raise ModelError(
                f"the decoder splits rows of {ids.shape[1]} tokens when it runs the blocks in "
                f"{self._blocks.name}: use a shorter --length"
            )
        return first[0], batch

    def behind(self, hidden: Tensor, rows: int, length: int) -> Tensor | None:
        """Return the output head's inputs for the last block's outputs; None if not called."""
        inputs: list[Tensor] = []

        def stop(seen: Tensor, *_: Any, **__: Any) -> None:
            inputs.append(seen)
            raise StopIteration  # the rest need not run

        ids = torch.zeros(rows, length, dtype=torch.int64, device=hidden.device)
        head = self._model.get_output_embeddings()
        with suppress(StopIteration), patch.object(head, "forward", stop):
            self._decode(lambda *_: hidden, ids, self._model)
        return inputs[0] if inputs else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the last block's outputs, (rows, positions, width)."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        logits: Tensor = self._decode(lambda *_: hidden, ids, self._model).logits
        return logits

    def _shared(self, name: str, value: Tensor) -> Tensor:
        """Return an equal tensor that was an argument of this name before, if one is kept."""
        values = self._known[name]
        for known in values:
            alike = known.shape == value.shape and known.dtype == value.dtype
            if alike and torch.equal(known, value):
                return known
        if len(values) < KNOWN:
            values.append(value)
        return value


@torch.no_grad()
def observe_block(
    blocks: DecoderBlocks, index: int, batch: Batch, hidden: Tensor
) -> tuple[list[SharedInput | Routed], list[Dense]]:
    """Run one block, whose weights are in memory, on a few tokens; return its distinct inputs in
    order of appearance, and the linear maps that stay dense.

    The latter are never called, called more than once per pass, or not plain linear maps. Must run
    outside inference mode, because version counters are needed.
    """
    seen: list[tuple[Prunable | Routed, tuple[Any, ...]]] = []
    inputs_alive: list[Tensor] = []  # keeps inputs alive, so that no address is reused
    wanted: dict[str | None, list[Prunable]] = defaultdict(list)  # by mixture
    for layer in blocks.prunables(index):
        wanted[layer.mixture].append(layer)
    layers, mixtures = wanted[None], blocks.mixtures(index)
    routed = [Routed(one, wanted[one.name]) for one in mixtures if one.name in wanted]
    why: dict[str, str] = {}  # the reason of each that stays dense

    def on_linear(layer: Prunable, module: Any, args: tuple[Any, ...], output: Any) -> None:
        inputs_alive.append(args[0])
        # Equal only for the same tensor, unmodified in between.
        place = args[0].untyped_storage()._cdata, args[0].storage_offset(), args[0]._version
        seen.append((layer, (*place, args[0].shape.numel(), args[0].dtype)))
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            fits = args[0].shape[-1] == layer.shape[1]
            plain = nn.Linear.forward(module, args[0]).float() if fits else args[0]
            same = plain.shape == output.shape
            if not same or not torch.allclose(plain, output.float(), rtol=1e-2, atol=1e-4):
                why[layer.name] = "not a plain linear map"

    def on_mixture(mixture: Routed, run: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((mixture, (mixture.name,)))
        with patch.object(mixture.module, "forward", run):
            try:
                return mixture.learn((args, kwargs))
            except ModelError:
                why[mixture.name] = UNSEEN
                return run(*args, **kwargs)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.module.register_forward_hook(partial(on_linear, layer)))
        for mixture in routed:
            run = partial(on_mixture, mixture, mixture.module.forward)
            stack.enter_context(patch.object(mixture.module, "forward", run))
        batch.run(index, hidden)
    times = Counter(one.name for one, _ in seen)
    for layer in layers:
        if not times[layer.name]:
            why[layer.name] = "never called"
        elif times[layer.name] > 1:
            why.setdefault(layer.name, "called more than once in a pass")
    for mixture in routed:
        if times[mixture.name] != 1 or mixture.name in why:
            why |= dict.fromkeys([mixture.name, *(one.name for one in mixture.layers)], UNSEEN)
    dense = [
        Dense(one.name, one.view().numel(), why[one.name])
        for one in (*layers, *(one for mixture in routed for one in mixture.layers))
        if one.name in why
    ]
    inputs: dict[tuple[Any, ...], Any] = {}
    for one, key in seen:
        if one.name not in why:
            place = inputs.setdefault(key, one if isinstance(one, Routed) else [])
            if isinstance(one, Prunable):
                place.append(one)
    return list(inputs.values()), dense
