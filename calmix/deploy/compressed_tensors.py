"""Checkpoints in compressed-tensors, which vLLM, SGLang and transformers load without calmix.

A model quantised by GPTQ keeps its levels and scales: they are packed as solved
(`calmix.models.packed`), and the new checkpoint is decoded and compared with the model bit by bit
before it is moved into place. Everything else is stored as in the model. Layers of one input have
one scheme: engines fuse them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calmix.errors import InputError, ModelError, disk_errors
from calmix.files import (
    atomic_folder,
    check_output_folder,
    copy_files,
    matching,
    read_object,
    user_path,
    write_json,
)
from calmix.manifest import MANIFEST, Input, file_hashes, lineage, read_if_there, record
from calmix.models.blocks import DecoderBlocks
from calmix.models.folder import BESIDE_WEIGHTS, check_folder, fingerprint
from calmix.models.opening import forget, resolve_model
from calmix.models.packed import (
    PACKED,
    PACKED_FORMAT,
    PACKED_METHOD,
    QUANTIZATION_CONFIG,
    SCALE,
    SHAPE,
    ZERO,
    pack,
)
from calmix.models.shards import Place, read_tensor, stored_tensors, weight_bytes, write_model
from calmix.models.streaming import StreamedModel
from calmix.pruning.solvers.grids import Grid, read_grids

GROUPS = 128, 64, 32  # inputs that share a scale, as engines have kernels for


def group_for(blocks: DecoderBlocks, group: int | None = None) -> int:
    """Return how many inputs can share a scale in all layers: `group` if it is given, else the most
    that divide their widths; InputError if there is none."""
    if not all(layer.whole_matrix for layer in blocks.layers):
        raise InputError(
            "a compressed-tensors checkpoint takes no experts in one tensor and no transposed "
            "matrices, which this model has"
        )
    if group not in (None, *GROUPS):
        raise InputError(f"groups of {group} have no kernels: choose --group 128, 64 or 32")
    widths = {layer.shape[1]: layer.name for layer in reversed(blocks.layers)}
    fits = [one for one in GROUPS if not any(width % one for width in widths)]
    wanted = group or (fits[0] if fits else GROUPS[-1])
    if wanted in fits:
        return wanted
    width, name = next(pair for pair in widths.items() if pair[0] % wanted)
    hint = f": choose --group {fits[0]}" if fits else ""
    raise InputError(f"groups of {wanted} do not divide the {width} inputs of {name}{hint}")


def export(
    name: str,
    output: Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Write a model quantised by `gptq` as a checkpoint in compressed-tensors.

    Returns the `bits` of its levels on average, the number of matrices by their whole `levels`,
    their `group` and whether they are `symmetric`, the number of `matrices`, the `bytes` of its
    weight files and those of the model `before`, and `rate`, bits per weight of all tensors.
    `say` is called with each step as it begins. The decoded copy stays in the cache.

    Raises InputError for a model without levels that engines run.
    """
    folder = user_path(name)
    check_folder(folder)
    manifest = read_if_there(folder / MANIFEST)
    quantised = next((one for one in lineage(manifest) if "pruning" in one), None)
    if quantised is None or quantised["request"].get("method") != "gptq":
        raise InputError(
            f"{name} was not quantised by GPTQ, whose levels a compressed-tensors checkpoint "
            "holds: calmix compress MODEL --for vllm, or calmix prune MODEL --method "
            "gptq,group=128 --bits 4"
        )
    check_output_folder(output, inputs=[folder], overwrite=overwrite)
    symmetric = bool(quantised["request"]["options"].get("symmetric", True))
    places = stored_tensors(folder)
    say("convert")
    with closing(StreamedModel(name)) as model:
        grids, layers, ignored = _layers(folder, model)
    rates = {one["name"]: one["bits"] for one in quantised["pruning"]["layers"]}
    bits = {key: int(rates[layer]) for key, layer in layers.items()}  # a scale takes less than one
    sizes = {places[key].shape[1] // grid.scale.shape[1] for key, grid in grids.items()}
    if len(sizes) > 1 or not sizes <= {*GROUPS}:
        raise InputError(
            f"{name} has groups of {', '.join(map(str, sorted(sizes)))} weights, and engines take "
            "one size of 32, 64 or 128: quantise it again with --method gptq,group=64"
        )
    [group] = sizes
    with disk_errors(output), atomic_folder(output) as beside:
        write_model(beside, _tensors(places, grids, bits, symmetric))
        copy_files(folder, beside, matching(folder, BESIDE_WEIGHTS))
        config = read_object(folder / "config.json", "")
        by_bits = {n: [layers[key] for key in bits if bits[key] == n] for n in {*bits.values()}}
        settings = quantization_config(by_bits, group, symmetric, ignored)
        write_json(beside / "config.json", config | {QUANTIZATION_CONFIG: settings})
        say("check")
        copy = resolve_model(str(beside))
        if wrong := _difference(places, stored_tensors(copy)):
            forget(beside)
            raise ModelError(
                f"{wrong} of {name} does not decode to its weights: nothing is written"
            )
        hashes = file_hashes(beside)
        tensors = sum(place.size for place in stored_tensors(beside).values())
        counts = {key: places[key].count for key in bits}
        average = sum(bits[key] * count for key, count in counts.items()) / sum(counts.values())
        facts: dict[str, Any] = {
            "bits": round(average, 2),
            "levels": dict(Counter(map(str, bits.values()))),
            "group": group,
            "symmetric": symmetric,
            "matrices": len(grids),
            "before": weight_bytes(folder),
            "bytes": sum(file.stat().st_size for file in beside.glob("*.safetensors")),
            "rate": 8 * tensors / sum(place.count for place in places.values()),
        }
        manifest_of_file = record(
            "compressed-tensors checkpoint",
            inputs={"model": Input(str(folder), fingerprint(folder))},
            files=hashes,
            opened=fingerprint(copy),
            pruned=manifest,
            **facts,
        )
        write_json(beside / MANIFEST, manifest_of_file)
    return facts


def quantization_config(
    layers: Mapping[int, list[str]], group: int, symmetric: bool, ignored: list[str]
) -> dict[str, Any]:
    """Return what a checkpoint's config.json says of its levels: `layers` by their bits."""
    schemes = [
        {
            # By class only if all are alike: vLLM asks for the class before the parts of a layer.
            "targets": names if len(layers) > 1 else ["Linear"],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group",
                "group_size": group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": PACKED_FORMAT,
        }
        for bits, names in sorted(layers.items())
    ]
    return {
        "quant_method": PACKED_METHOD,
        "format": PACKED_FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": one for number, one in enumerate(schemes)},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _layers(
    folder: Path, model: StreamedModel
) -> tuple[dict[str, Grid], dict[str, str], list[str]]:
    """Return the grids of the blocks' matrices by their names in the files, the layers that these
    are in the model, and the linear layers without a grid."""
    shapes = {name: value.shape for name, value in model.model.state_dict().items()}
    grids, names = read_grids(folder, shapes), model.names
    lacking = [one.name for one in model.blocks.layers if one.parameter_name not in grids]
    if lacking or not grids.keys() <= names.keys():
        raise InputError(
            f"{folder} does not hold the levels of all its matrices (experts in one tensor, "
            "transposed or skipped matrices do not have any)"
        )
    linear = (name for name, one in model.model.named_modules() if isinstance(one, nn.Linear))
    ignored = [name for name in linear if f"{name}.weight" not in grids]
    layers = {names[name]: name.removesuffix(".weight") for name in grids}
    return {names[name]: grid for name, grid in grids.items()}, layers, ignored


def _tensors(
    places: Mapping[str, Place],
    grids: Mapping[str, Grid],
    bits: Mapping[str, int],
    symmetric: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the checkpoint, those of a matrix in place of its weights."""
    for name, place in places.items():
        weight = read_tensor(place)
        if name not in grids:
            yield name, weight
            continue
        layer, grid = name.removesuffix("weight"), grids[name]
        levels = grid.levels(weight).view(len(weight), grid.scale.shape[1], -1)
        most = 2 ** bits[name]
        zero = torch.full(grid.scale.shape, most / 2)
        if not symmetric:  # the lowest level, or zero, is the least integer
            zero = -levels.amin(-1).clamp_(max=0)
        numbers = levels + zero[..., None]
        if not bool(((numbers >= 0) & (numbers < most)).all()):
            raise ModelError(f"{name} has levels beyond {bits[name]} bits: quantise it again")
        yield layer + PACKED, pack(numbers.to(torch.uint8).view(weight.shape), bits[name])
        yield layer + SCALE, grid.scale.to(weight.dtype)
        yield layer + SHAPE, torch.tensor(weight.shape)
        if not symmetric:
            yield layer + ZERO, pack(zero.to(torch.uint8).T.contiguous(), bits[name]).T


def _difference(before: Mapping[str, Place], after: Mapping[str, Place]) -> str | None:
    """Return the name of a tensor that differs in any bit, if there is one."""
    for name in before.keys() | after.keys():
        if name not in before or name not in after:
            return name
        values = [read_tensor(one[name]).reshape(-1) for one in (before, after)]
        if values[0].dtype != values[1].dtype or not torch.equal(
            *(value.view(torch.uint8) for value in values)
        ):
            return name
    return None
