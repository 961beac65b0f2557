"""Which stored tensors make up which parameters, where a checkpoint has other names than the model.

The rules are transformers' own, those it loads and saves with: renamings, and converters that
merge what is stored apart (experts one by one) or split what is stored together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Stored tensors, in the order in which they are merged, that make up parameters.

    `shapes` are those of the parameters, by their names in the model. `patterns` says which stored
    tensor takes which role of a converter whose outcome is `target`; without them the one stored
    tensor is the parameter.
    """

    stored: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    patterns: tuple[str, ...] = ()
    target: str = ""


class Conversions:
    """The parts of a model's checkpoint, whose tensors are given by name with type and shape."""

    def __init__(self, model: Any, stored: Mapping[str, tuple[torch.dtype, Any]]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self._model = model
        own = dict(model.state_dict())
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        prefix = model.base_model_prefix
        merged: dict[str, list[tuple[str, str]]] = {}
        self.parts: list[Part] = []
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, self._converters, prefix, own)
            if target not in own and name in own:  # as it stands, but for the prefix
                target, pattern = rename_source_key(name, [], [], prefix, own)
            if target in own and pattern is None:
                self.parts.append(Part((name,), {target: tuple(stored[name][1])}))
            elif target in own:
                merged.setdefault(target, []).append((name, pattern))
        # What has not matched would be reverted to no purpose when the model is saved.
        model._weight_conversions = [rule for rule in rules if rule.was_used()]
        for target, held in merged.items():
            names, patterns = zip(*held, strict=True)
            part = Part(names, {}, patterns, target)
            empty = {n: torch.empty(stored[n][1], dtype=stored[n][0], device="meta") for n in names}
            try:
                made = {name: tuple(value.shape) for name, value in self.merge(part, empty).items()}
            except (RuntimeError, ValueError):  # one is missing: so is what they would make up
                continue
            self.parts.append(Part(names, made, patterns, target))

    def merge(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters, by name, that stored tensors make up."""
        if not part.patterns:
            return {next(iter(part.shapes)): tensors[part.stored[0]]}
        first = part.patterns[0]
        rule = deepcopy(next(one for one in self._converters if first in one.source_patterns))
        for name, pattern in zip(part.stored, part.patterns, strict=True):
            rule.add_tensor(part.target, name, pattern, tensors[name])
        made = rule.convert(part.target, model=self._model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def split(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the stored tensors, by name, that parameters were made up of."""
        from transformers.core_model_loading import revert_weight_conversion

        made: dict[str, Tensor] = revert_weight_conversion(self._model, dict(parameters))
        return made

    def faulty(self, parts: Iterable[Part], stored: Mapping[str, Any]) -> str | None:
        """Return a stored name that parameters do not convert back to, None if there is none."""
        own = self._model.state_dict(keep_vars=True)
        for part in (one for one in parts if one.patterns):
            empty = {n: torch.empty_like(own[n], device="meta") for n in part.shapes}
            made = {name: tuple(value.shape) for name, value in self.split(empty).items()}
            if made != {name: tuple(stored[name]) for name in part.stored}:
                return part.stored[0]
        return None
