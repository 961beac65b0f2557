"""Import this to open packs with transformers.

import calmix.packs
model = AutoModelForCausalLM.from_pretrained("out/pack")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from calmix.deploy.pack import PACK_TYPE, load


class PackConfig(PreTrainedConfig):
    """The `config.json` of a pack, which names no class of transformers."""

    model_type = PACK_TYPE


class PackedModel:
    """Opens a pack as the model in it, of its own class, with dense weights in memory."""

    config_class = PackConfig

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Return the model in a pack; `options` are those of transformers, such as `dtype`."""
        auto = {name for name in options if name.startswith("_")} | {"config", "revision"}
        return load(folder, **{name: options[name] for name in options.keys() - auto})


AutoConfig.register(PACK_TYPE, PackConfig)
AutoModelForCausalLM.register(PackConfig, PackedModel)
