"""Read a model's weights block by block, and write them back.

A `StreamedModel` keeps only the current block's weights in memory. The modules are built without
weights; those outside the blocks are read once, and a block's on request, with the next block read
ahead. This module knows nothing about pruning. Where names in a checkpoint differ from the model's,
`find_parts` applies transformers' own rules for loading and saving: renamings, and converters that
merge tensors stored separately (such as experts) or split fused ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.errors import ModelError
from calmix.models.blocks import DecoderBlocks, find_blocks
from calmix.models.folder import ModelFiles
from calmix.models.folder import save_config as save_configuration
from calmix.models.loading import load_config, loading
from calmix.models.opening import device_of, dtype_of, resolve_model
from calmix.models.shards import Place, read_tensor, stored_tensors, weight_dtype, write_index
from calmix.precision import dtype_name, narrower, suited

Merge = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # stored tensors into parameters


def _not_streamable(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} cannot be processed block by block, because {why}: only calmix.prune in Python "
        "supports it"
    )


class StreamedModel:
    """A causal language model whose blocks are read from disk one at a time.

    The arguments are those of `open_model`. `model` has all modules. Weights outside the blocks
    (except the output head's) are in memory between `fetch_outside` and `drop_outside`, a block's
    between `fetch` and `drop`.

    Attributes:
        files: what it is read from.
        dtype, stored_dtype: the type of the blocks' weights in memory, and in a checkpoint.
        types: of parameters in a checkpoint, by name.
        names: of parameters and buffers in the files, except merged and split ones.
        merges: whether parameters are merged from several stored tensors, which takes memory.
        unknown: names in the files without a parameter or buffer in the model.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.name, self.trust_remote_code = name, trust_remote_code
        self.device, weight_type = device_of(device), dtype_of(dtype)
        self.folder = resolve_model(name)
        self.files = ModelFiles(self.folder, name)
        self.places = stored_tensors(self.folder)
        # The folder's configuration; the model's can be its text part.
        self.config = load_config(self.folder, name, trust_remote_code)
        self.model = self._skeleton(weight_type)
        self.blocks: DecoderBlocks = find_blocks(self.model)
        self.dtype: torch.dtype = next(self.blocks.blocks[0].parameters()).dtype
        self.stored_dtype = narrower(weight_dtype(self.places), self.dtype)
        tied_names = getattr(self.model, "all_tied_weights_keys", {})
        for pair in tied_names.items():
            if any(name.startswith(f"{self.blocks.name}.") for name in pair):
                raise _not_streamable(self.name, f"its blocks share weights (first {pair[0]})")
        parts, self._merging = find_parts(self.model, self.places, self.name)
        parameters = self._parameters()
        self._parts = {name: part for name, part in parts.items() if name in parameters}
        self.types = {
            name: narrower(self.places[part[0]].dtype, parameters[name].dtype)
            for name, part in self._parts.items()
        }
        self.names = {n: stored[0] for n, stored in parts.items() if n not in self._merging}
        self.merges = bool(self._merging)
        self.unknown = self.places.keys() - set(chain(*parts.values()))
        for name, other in [pair for pair in tied_names.items() if {*pair} <= self.names.keys()]:
            if not torch.equal(self.stored(name), self.stored(other)):  # loading unties them too
                del tied_names[name]
                self._drop([name])
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        lacking = [name for name in parameters if name not in parts and name not in tied]
        unstored = self.model.state_dict().keys() - self.names
        lacking += [name for name, _ in self.model.named_buffers() if name in unstored]
        if lacking:
            why = f"its files lack {lacking[0]}, or hold it in a form that transformers converts"
            raise _not_streamable(self.name, why)
        self._pool = ThreadPoolExecutor(1, "reading")
        self._ahead: dict[int, Future[tuple[dict[str, Tensor], Any]]] = {}
        # The next block's weights are copied to the device in a separate queue.
        cuda = self.device.type == "cuda" and torch.cuda.is_available()
        self._queue: Any = torch.cuda.Stream(self.device) if cuda else None

    def _skeleton(self, dtype: Any) -> Any:
        """Return a causal language model with its buffers, but without weights."""
        from accelerate import init_empty_weights

        if dtype == "auto":
            dtype = getattr(self.config, "dtype", None)
            if not isinstance(dtype, torch.dtype):
                floats = (p.dtype for p in self.places.values() if p.dtype.is_floating_point)
                dtype = next(floats, torch.float32)
            dtype = suited(dtype, self.device)
        with loading(f"cannot open {self.folder}"):
            from transformers import AutoModelForCausalLM, GenerationConfig

            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    self.config, dtype=dtype, trust_remote_code=self.trust_remote_code
                )
            if (self.folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(self.folder)
        # Position tables were made in the model's type: make them again, as loading a model does.
        for module in model.modules():
            module._is_hf_initialized = not any(True for _ in module.buffers(recurse=False))
        with torch.no_grad():
            model.initialize_weights()
        return model.requires_grad_(False).eval()

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def stored(self, name: str) -> Tensor:
        """Return a parameter as it is stored, on the CPU."""
        return self._merged([name], lambda stored, _: self.read(stored))[name]

    def read(self, stored: str) -> Tensor:
        """Return a tensor of the files by its name there."""
        return read_tensor(self.places[stored])

    def block_names(self, index: int) -> list[str]:
        """Return the names of a block's parameters in the model."""
        prefix = f"{self.blocks.name}.{index}."
        return [name for name in self._parts if name.startswith(prefix)]

    def outside_names(self, *, head: bool = False) -> list[str]:
        """Return the names of the parameters outside the blocks; the output head's only with `head`
        or if it is tied to the embeddings."""
        output = None if head else self.model.get_output_embeddings()
        skipped = set() if output is None else {id(p) for p in output.parameters()}
        skipped -= {id(p) for p in self.model.get_input_embeddings().parameters()}
        prefix = f"{self.blocks.name}."
        return [
            name
            for name, p in self._parameters().items()
            if name in self._parts and id(p) not in skipped and not name.startswith(prefix)
        ]

    def outside_bytes(self, *, head: bool = False) -> int:
        """Return the bytes of memory that `fetch_outside` takes."""
        parameters = self._parameters()
        return sum(parameters[name].nbytes for name in self.outside_names(head=head))

    def fetch_outside(self, *, head: bool = False) -> None:
        """Read the weights outside the blocks (embeddings, norms), and the stored buffers."""
        self._put(*self._read(self.outside_names(head=head)))
        if head:
            self._tie()
        for name, buffer in list(self.model.named_buffers()):
            value = self.read(self.names[name]).to(buffer.dtype) if name in self.names else buffer
            owner, _, last = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[last] = value.to(self.device)

    def _tie(self) -> None:
        """Make the head's weight, if the files lack one, that of the embeddings."""
        output = self.model.get_output_embeddings()
        names = {name for name, one in self.model.named_modules() if one is output}
        if output is not None and self._parts.keys().isdisjoint(f"{n}.weight" for n in names):
            self.model.tie_weights()

    def drop_outside(self) -> None:
        """Drop the weights outside the blocks; buffers stay."""
        self._drop(self.outside_names(head=True))
        self._tie()

    def fetch(self, index: int, *, ahead: bool = False) -> None:
        """Read a block's weights unless they are in memory; with `ahead`, start on the next's."""
        if next(self.blocks.blocks[index].parameters()).is_meta:
            reading = self._ahead.pop(index, None)
            names = self.block_names(index)
            self._put(*(self._read(names) if reading is None else reading.result()))
        if ahead and index + 1 < len(self.blocks) and index + 1 not in self._ahead:
            self._ahead[index + 1] = self._pool.submit(self._read, self.block_names(index + 1))

    def drop(self, index: int) -> None:
        """Drop a block's weights."""
        self._drop(self.block_names(index))

    def reset(self) -> None:
        """Drop all weights, including changed ones; they are read again on request."""
        self._ahead.clear()
        self._drop(self._parts)

    def weights(self, index: int) -> dict[str, Tensor]:
        """Return a block's weights by their names in the files."""
        parameters = self._parameters()
        return self.as_stored({name: parameters[name].detach() for name in self.block_names(index)})

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return a block's parameters by name, and its stored buffers, read from the files."""
        parameters, prefix = self._parameters(), f"{self.blocks.name}.{index}."
        tensors = {name: parameters[name].detach() for name in self.block_names(index)}
        for name, _ in self.model.named_buffers():
            if name in self.names and name.startswith(prefix):
                tensors[name] = self.read(self.names[name])
        return tensors

    def as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a block's tensors, by name in the model, to those stored in a checkpoint."""
        stored = {self.names[name]: value for name, value in tensors.items() if name in self.names}
        merged = {name: value for name, value in tensors.items() if name not in self.names}
        stored |= split(self.model, merged) if merged else {}
        return {n: v.to(narrower(self.places[n].dtype, v.dtype)) for n, v in stored.items()}

    @property
    def layout(self) -> dict[str, list[str]]:
        """The files of a checkpoint, each with the stored names of its tensors.

        One file per block, then the other tensors in files no larger than the largest block.
        """
        parts = [
            list(dict.fromkeys(s for name in self.block_names(i) for s in self._parts[name]))
            for i in range(len(self.blocks))
        ]
        sizes = [sum(self.places[name].size for name in part) for part in parts]
        most, size = max(sizes), 0
        inside = {name for part in parts for name in part}
        for name, place in self.places.items():
            if name not in inside:
                if size == 0 or size + place.size > most:
                    parts.append([])
                    size = 0
                parts[-1].append(name)
                size += place.size or 1
        count = len(parts)
        return {f"model-{n:05}-of-{count:05}.safetensors": p for n, p in enumerate(parts, 1)}

    def rest(self, names: Collection[str], changed: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint by their stored names; the `changed` ones are taken
        from memory."""
        memory, tied_names = self._parameters(), getattr(self.model, "all_tied_weights_keys", {})
        types = {s: self.types[name] for name, part in self._parts.items() for s in part}
        new = self.as_stored(
            {
                name: memory[tied_names.get(name, name)].detach()
                for name in self.names
                if tied_names.get(name, name) in changed
            }
        )
        tensors = {name: new[name] if name in new else self.read(name) for name in names}
        return {name: value.to(types.get(name, value.dtype)) for name, value in tensors.items()}

    def refill(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Set a block's weights from tensors by their stored names, in the block's type."""
        names = self.block_names(index)
        self._put(self._merged(names, lambda stored, dtype: tensors[stored].to(dtype)))

    def save_config(self, folder: Path) -> None:
        """Write index and configuration, so that a folder with the layout's files loads."""
        write_index(folder)
        model, config = self.model, self.config
        if type(config) is type(model.config):
            config.architectures = [type(model).__name__]
        save_configuration(config, dtype_name(self.stored_dtype), folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _merged(
        self, names: Iterable[str], value: Callable[[str, torch.dtype], Tensor]
    ) -> dict[str, Tensor]:
        """Return parameters, merged from the `value` of each stored tensor."""
        memory, merged = self._parameters(), dict[str, Tensor]()
        for name in names:
            dtype = memory[name].dtype
            if name in self.names:
                merged[name] = value(self.names[name], dtype)
            elif name not in merged:
                merged |= self._merging[name]({n: value(n, dtype) for n in self._parts[name]})
        return merged

    def _read(self, names: Iterable[str]) -> tuple[dict[str, Tensor], Any]:
        """Read parameters and start copying them to the device; return the event that ends it."""
        read = self._merged(names, lambda n, dtype: self.read(n).to(dtype))
        if self._queue is None:
            return read, None
        with torch.cuda.stream(self._queue):
            # Copies from pinned memory overlap with what the device computes.
            for name, value in read.items():
                read[name] = value.pin_memory().to(self.device, non_blocking=True)
        return read, self._queue.record_event()

    def _put(self, values: Mapping[str, Tensor], copied: Any = None) -> None:
        """Set parameters of the model, once the device has `copied` them."""
        if copied is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(copied)
            for value in values.values():
                value.record_stream(now)
        on_device = {
            name: value.to(self.device, non_blocking=True) for name, value in values.items()
        }
        self.model.load_state_dict(on_device, strict=False, assign=True)

    def _drop(self, names: Iterable[str]) -> None:
        parameters = self._parameters()
        empty = {name: torch.empty_like(parameters[name], device="meta") for name in names}
        self.model.load_state_dict(empty, strict=False, assign=True)


def _merge(
    model: Any, rule: Any, target: str, roles: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the parameters, by name, that a rule merges from stored tensors, in the order of their
    `roles`."""
    rule = deepcopy(rule)
    for name, role in roles.items():
        rule.add_tensor(target, name, role, tensors[name])
    merged = rule.convert(target, model=model, config=model.config)
    return {n: value[0] if isinstance(value, list) else value for n, value in merged.items()}


def split(model: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the stored tensors, by name, that parameters were merged from."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(parameters))


def find_parts(
    model: Any, places: Mapping[str, Place], called: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, Merge]]:
    """Return the names of the stored tensors that form each of a model's parameters and buffers,
    and the functions that merge them, of those that are not just one stored tensor.

    Raises ModelError, with the model's name as it is `called`, if parameters do not convert back to
    the stored tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    tensors = dict(model.state_dict(keep_vars=True))
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    merged: dict[str, dict[str, str]] = {}  # roles in a rule, by stored name, by parameter
    parts: dict[str, tuple[str, ...]] = {}
    merging: dict[str, Merge] = {}
    for name in sorted(places, key=dot_natural_key):
        target, role = rename_source_key(name, renamings, converters, prefix, tensors)
        if target not in tensors and name in tensors:  # unchanged except for the prefix
            target, role = rename_source_key(name, [], [], prefix, tensors)
        if target in tensors and role is not None:
            merged.setdefault(target, {})[name] = role
        elif target in tensors and places[name].shape == tensors[target].shape:
            parts[target] = (name,)
    # Unused rules would be reverted for nothing when the model is saved.
    model._weight_conversions = [rule for rule in rules if rule.was_used()]
    for target, roles in merged.items():
        first = next(iter(roles))
        rule = next(one for one in converters if roles[first] in one.source_patterns)
        merge = partial(_merge, model, rule, target, roles)
        stored = {
            n: torch.empty(places[n].shape, dtype=places[n].dtype, device="meta") for n in roles
        }
        try:
            whole = merge(stored)
        except (RuntimeError, ValueError):  # a tensor is missing, so the parameter is too
            continue
        fitting = [n for n, t in whole.items() if n in tensors and t.shape == tensors[n].shape]
        if fitting:
            back = split(model, {n: torch.empty_like(tensors[n], device="meta") for n in whole})
            if {n: v.shape for n, v in back.items()} != {n: v.shape for n, v in stored.items()}:
                why = f"transformers converts its weights but not back (first {first})"
                raise _not_streamable(called, why)
        parts |= dict.fromkeys(fitting, tuple(roles))
        merging |= dict.fromkeys(fitting, merge)
    return parts, merging
