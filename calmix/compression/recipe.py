"""Recipes: the options of `compress` in a YAML file, under the names of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from calmix.errors import InputError, nearest
from calmix.options import Compression, DeviceOptions, Target, checked, flags
from calmix.yaml_files import parse_yaml, read_text

RECIPE = "recipe.yaml"
RECIPE_KEYS = {  # as on the command line: the flag without dashes
    flags(Compression, name)[0].removeprefix("--").replace("-", "_"): name
    for name in Compression.model_fields
    if name != "model"
}
MACHINE = {*DeviceOptions.model_fields, "model", "max_memory"}  # decide no result


def recipe_text(request: Mapping[str, Any]) -> str:
    """Return the recipe of a finished run's request: all that decided the result but the model."""
    values, without = {}, set(MACHINE)
    if (request["size"], request["keep_at_least"]) != (None, None):  # which have chosen them
        without.add("bits")
    for key, name in RECIPE_KEYS.items():
        if name not in Target.model_fields or name in without:
            continue
        value = request.get(name)
        if value not in (None, "", Compression.model_fields[name].default):
            values[key] = value if isinstance(value, int | float) else str(value)
    head = f"# calmix compress {request['model']} --recipe {RECIPE} -o OUT\n"
    if {"prompts", "like", "imatrix"} & {*values}:
        head += "# Paths start at the folder in which this ran.\n"
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def with_recipe(options: Compression, file: Path) -> Compression:
    """Return the options of a recipe's file, those given beside it first.

    Raises:
        InputError: the file is not a mapping of options.
    """
    values, _ = parse_yaml(read_text(file), str(file))
    for key in values:
        if key not in RECIPE_KEYS:
            raise InputError(f"{file}: unknown key '{key}': {nearest(str(key), RECIPE_KEYS)}")
    own = {name: getattr(options, name) for name in options.model_fields_set}
    merged = {RECIPE_KEYS[key]: value for key, value in values.items()} | own
    try:
        return checked(
            Compression, {n: v for n, v in merged.items() if n in Compression.model_fields}
        )
    except InputError as error:
        raise InputError(f"{file} and the options beside it: {error}") from error
