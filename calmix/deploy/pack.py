"""Packs: lossless compression of a model folder (our format, from well-known ideas).

A quantised tensor, whose scales are stored beside the weights, is stored as levels, two to a byte
if nearly all are small, Huffman-coded by zstandard. Weights that differ in any bit from the values
of level and scale are stored separately.

All other tensors are split into byte planes, coded in the same way: each value is rotated left by
one bit, so that a float's exponent comes first and its sign last, and its bytes go to one plane
each. Exponents shrink to a third, mantissas do not.

A pack is a folder: `calmix-pack.json`, a safetensors file of plain bytes for each weight file, and
all other files unchanged, also in subfolders, except that `config.json` has a model type of its
own. The weight files have other names than the model's, and so transformers and the model's class
find none, instead of filling the model with random numbers. Nothing in it is
executable. Memory is bounded: three tensors are packed, and a few chunks unpacked, at a time.
SHA-256 verifies that unpacking restores the original bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from calmix.errors import CalmixError, InputError, disk_errors
from calmix.files import (
    atomic_folder,
    check_free,
    check_links,
    check_output_folder,
    copy_files,
    read_object,
    sha256_file,
    user_path,
    write_json,
    write_text,
)
from calmix.machine import cores
from calmix.manifest import check_seal, sealed, versions
from calmix.models.folder import PACK, check_folder, combined, weight_files
from calmix.models.loading import load_config, loading
from calmix.models.shards import (
    Place,
    header_bytes,
    parse_header,
    read_header,
    tensor_bytes,
    with_length,
)
from calmix.models.streaming import StreamedModel
from calmix.pruning.solvers.grids import SCALES_FOLDER, Grid, as_grids, check_fit, read_grids

PACK_FORMAT = 7
CONFIG, PACK_TYPE = "config.json", "calmix-pack"
TENSORS_AHEAD = 3  # tensors packed at a time: a small one is a single chunk, and uses one core
PACKED_VALUES = 1 << 22  # values compressed together: a few megabytes
WORTHWHILE = 0.98  # compressed parts are kept if they are smaller by this factor
RARE = 5e-4  # largest share of levels beyond half a byte for two levels to share a byte
ASTRAY = 1e-2  # largest share of weights off the grid for a tensor to be stored as levels
GROWTH, FIRST = 1000, 1 << 26  # most bytes unpacked from each byte packed, and beside them
ALTERED = "does not have its original content: fetch the pack again"
ZSTANDARD_MAGIC = b"\x28\xb5\x2f\xfd"  # the first bytes of a zstandard frame

# Neither planes nor levels repeat in long runs: Huffman codes alone are smaller and faster than
# levels 1 to 3 of zstandard with their matches.
CODES = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, chain_log=6)

Words = NDArray[Any]
StreamParts = Mapping[str, Sequence[bytes]]  # of a tensor, by kind, one part per chunk
Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Packed:
    """Bytes of the weight files, `dense` and `packed`; `levels` is both for quantised tensors."""

    dense: int
    packed: int
    levels: tuple[int, int]


def pack(
    folder: Path | str,
    output: Path | str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Write a model folder as a pack.

    Args:
        folder: of safetensors, such as `calmix prune` writes.
        output: the pack's folder; replaced only with `overwrite`, and only at the end.
        progress: called with bytes done and in total.

    Raises:
        InputError: `folder` is not a model folder, is a pack itself, or has files that cannot be
            restored exactly; `output` cannot be written.
        ModelError: a weight file is damaged.
    """
    folder, output = user_path(folder), user_path(output)
    check_folder(folder)
    scales = [
        f"{SCALES_FOLDER}/{path.name}" for path in sorted((folder / SCALES_FOLDER).glob("[!.]*"))
    ]
    files = [*scales, *weight_files(folder)]
    places = {name: _in_order(read_header(folder / name)) for name in files}
    others, config = _other_files(folder, places), read_object(folder / CONFIG, "")
    grids = read_grids(folder)
    shapes = {name: place.shape for each in places.values() for name, place in each}
    renamed = dict[str, str]()
    if not grids.keys() <= shapes.keys():  # the files have other names than the model
        with suppress(CalmixError), closing(StreamedModel(str(folder))) as model:
            renamed = {name: model.names[name] for name in grids if name in model.names}
    grids = {renamed.get(name, name): grid for name, grid in grids.items()}
    check_fit(grids, shapes, folder)
    check_output_folder(output, inputs=[folder], overwrite=overwrite)
    total, done = sum((folder / name).stat().st_size for name in places), 0
    stored = {name: str(Path(name).with_name(f"packed-{Path(name).name}")) for name in places}
    if taken := {*stored.values()}.intersection(others):
        raise InputError(f"cannot pack {folder}: it has a file {min(taken)}: rename it")

    def tick(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    with atomic_folder(output) as beside, ThreadPoolExecutor(cores()) as pool, disk_errors(output):
        jobs = {
            name: (
                pool.submit(sha256_file, folder / name),
                _write(folder / name, beside / stored[name], tensors, grids, pool, tick),
                pool.submit(sha256_file, beside / stored[name]),
            )
            for name, tensors in places.items()
        }
        weights: dict[str, dict[str, Any]] = {
            name: {
                "file": stored[name],
                "sha256": dense.result(),
                "packed": packed.result(),
                "tensors": tensors,
            }
            for name, (dense, tensors, packed) in jobs.items()
        }
        after = sum((beside / name).stat().st_size for name in stored.values())
        entries = [
            (place.size, weights[name]["tensors"][tensor])
            for name, tensors in places.items()
            for tensor, place in tensors
        ]
        levels = [
            (size, sum(map(sum, entry["sizes"].values())))
            for size, entry in entries
            if "levels" in entry
        ]
        copy_files(folder, beside, others)
        write_json(beside / CONFIG, config | {"model_type": PACK_TYPE})
        text = (folder / CONFIG).read_bytes()
        hashes = {name: weights[name]["sha256"] for name in weight_files(folder)}
        whole = combined(hashes | {CONFIG: hashlib.sha256(text).hexdigest()})
        manifest = {
            "format": PACK_FORMAT,
            "model": {"sha256": whole},
            "versions": versions(),
            "weights": weights,
            **({"names": renamed} if renamed else {}),
            "config": text.decode(),
            "files": {name: sha256_file(beside / name) for name in others},
        }
        content = json.dumps(sealed(manifest), ensure_ascii=False)  # compact
        write_text(beside / PACK, content + "\n")
    before, left = map(sum, zip((0, 0), *levels, strict=True))
    return Packed(total, after, (before, left))


def unpack(
    folder: Path | str,
    output: Path | str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Restore the model folder that a pack was made from; return the bytes of its weight files.

    Raises InputError if `folder` is not a pack, of another format, cut or altered, or if `output`
    cannot be written; nothing is left there then.
    """
    folder, output = user_path(folder), user_path(output)
    manifest, grids = _opened(folder)
    check_output_folder(output, inputs=[folder], overwrite=overwrite)
    total = 0
    for name, entry in manifest["weights"].items():
        header = next(_unpacked(folder / entry["file"], entry, grids))
        places = parse_header(header, folder / name).values()
        total += len(header) + sum(place.size for place in places)
    check_free(output, total, "the weights take")
    done = 0
    with atomic_folder(output) as beside, disk_errors(output):
        copy_files(folder, beside, manifest["files"])
        (beside / CONFIG).write_bytes(manifest["config"].encode())
        for name, entry in manifest["weights"].items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            with (beside / name).open("wb") as file:
                for part in _unpacked(folder / entry["file"], entry, grids):
                    file.write(part)
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
    return done


def load(
    folder: Path | str, *, device: str = "cpu", progress: Progress | None = None, **options: Any
) -> Any:
    """Load the causal language model in a pack with transformers, without unpacking it to disk.

    Args:
        folder: the pack.
        device: torch device.
        progress: called with files done and in total.
        **options: for transformers' `from_pretrained`, such as `dtype`.

    Raises:
        InputError: `folder` is not a pack, of another format, cut or altered.
        ModelError: transformers cannot open the model.
    """
    folder = user_path(folder)
    (manifest, grids), state = _opened(folder), dict[str, torch.Tensor]()
    weights = {n: one for n, one in manifest["weights"].items() if not n.startswith(SCALES_FOLDER)}
    for number, entry in enumerate(weights.values(), start=1):
        state |= _tensors(folder / entry["file"], entry, grids)
        if progress is not None:
            progress(number, len(weights))
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / CONFIG).write_bytes(manifest["config"].encode())
        config = load_config(Path(place), str(folder), False, state)
    with loading(f"cannot open {folder}"):
        from transformers import AutoModelForCausalLM, GenerationConfig

        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        model = type(empty).from_pretrained(None, config=empty.config, state_dict=state, **options)
        if "generation_config.json" in manifest["files"] and "generation_config" not in options:
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(False).to(device).eval()


def _other_files(folder: Path, weights: Collection[str]) -> list[str]:
    """Return the paths of files beside the weights; InputError for one that cannot be restored."""
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.is_file() or not name.isprintable():
            raise InputError(
                f"cannot pack {folder}: {name!r} is not a regular file with a printable name, and "
                "could not be restored: move it out of the folder"
            )
        if name not in weights:
            names.append(name)
    return names


def _tensors(
    path: Path, entry: dict[str, Any], grids: Mapping[str, Grid]
) -> dict[str, torch.Tensor]:
    """Return all tensors of a packed file."""
    parts = _unpacked(path, entry, grids)
    places, whole = parse_header(header := next(parts), path), bytearray(header)
    for part in parts:
        whole += part
    data = memoryview(whole)
    return {
        name: _tensor(data[place.start : place.start + place.size], place)
        for name, place in places.items()
    }


def _tensor(data: Any, place: Place) -> torch.Tensor:
    """Return bytes as a tensor."""
    return torch.from_numpy(np.frombuffer(data, np.uint8)).view(place.dtype).view(place.shape)


def _opened(folder: Path) -> tuple[dict[str, Any], dict[str, Grid]]:
    """Return the checked manifest of a pack, and the grids of its quantised tensors."""
    path, scales = folder / PACK, dict[str, torch.Tensor]()
    check_links(folder)
    try:
        manifest = read_object(path, f"{folder} is not a pack: it has no {PACK}")
        if manifest["format"] != PACK_FORMAT:
            raise InputError(
                f"{folder} is a pack of format {manifest['format']}, but this calmix reads "
                f"{PACK_FORMAT}: unpack it with the version that made it"
            )
        check_seal(path, manifest)
        manifest["config"].encode()
        manifest["weights"] = dict(manifest["weights"])
        names = {str(name): str(stored) for name, stored in manifest.get("names", {}).items()}
        files = [*(one["file"] for one in manifest["weights"].values()), *manifest["files"]]
        for name in (*manifest["weights"], *files):
            if {"", ".", ".."} & {*name.split("/")} or "\0" in name:
                raise InputError(f"{path} names a file outside the pack: {name!r}")
            if name in files and not (folder / name).is_file():
                raise InputError(f"{folder} lacks {name}, which is part of the pack: fetch it")
        for name, expected in manifest["files"].items():
            if sha256_file(folder / name) != expected:
                raise InputError(f"{folder / name} {ALTERED}")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is damaged: fetch the pack again") from error
    for name, entry in manifest["weights"].items():
        if name.startswith(SCALES_FOLDER):
            scales |= _tensors(folder / entry["file"], entry, {})
    grids = as_grids(scales, folder)
    return manifest, {names.get(name, name): grid for name, grid in grids.items()}


def _write(
    source: Path,
    target: Path,
    tensors: Sequence[tuple[str, Place]],
    grids: Mapping[str, Grid],
    pool: ThreadPoolExecutor,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """Pack a weight file; return the manifest's entries for its tensors.

    The sizes in the header are known only at the end, so the data goes to a temporary file first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"format": "calmix-pack"}}
    entries: dict[str, Any] = {}

    with (
        tempfile.TemporaryFile(dir=target.parent) as data,
        target.open("wb") as file,
        ThreadPoolExecutor(TENSORS_AHEAD) as readers,
    ):

        def add(name: str, parts: Sequence[bytes]) -> list[int]:
            start, sizes = data.tell(), [len(part) for part in parts]
            data.writelines(parts)
            header[name] = {
                "dtype": "U8",
                "shape": [sum(sizes)],
                "data_offsets": [start, data.tell()],
            }
            return sizes

        add("header", [header_bytes(source)])
        jobs = (partial(_encoded, place, grids.get(name), pool) for name, place in tensors)
        coded = _in_turn(readers, jobs, TENSORS_AHEAD)
        for (tensor, place), (entry, parts) in zip(tensors, coded, strict=True):
            sizes = {kind: add(f"{tensor}|{kind}", one) for kind, one in parts.items()}
            entries[tensor] = entry | {"sizes": sizes}
            tick(place.size)
        file.write(with_length(header))
        data.seek(0)
        shutil.copyfileobj(data, file, length=1 << 22)
    return entries


def _in_turn(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], T]], ahead: int) -> Iterator[T]:
    """Yield the results of jobs, in order; `ahead` of them are running or done."""
    waiting = [pool.submit(job) for job in islice(jobs, ahead)]
    while waiting:
        done = waiting.pop(0).result()
        waiting += [pool.submit(job) for job in islice(jobs, 1)]
        yield done


def _in_order(places: Mapping[str, Place]) -> list[tuple[str, Place]]:
    """Return the tensors of a file in the order of their bytes."""
    return sorted(places.items(), key=lambda item: (item[1].start, item[1].size))


def _encoded(
    place: Place, grid: Grid | None, pool: ThreadPoolExecutor
) -> tuple[dict[str, Any], StreamParts]:
    """Return a tensor's entry in the manifest, and its parts."""
    raw = np.fromfile(place.path, f"u{place.dtype.itemsize}", place.count, offset=place.start)
    if grid is not None and (levels := _encoded_levels(raw, place, grid, pool)) is not None:
        return levels
    coded = pool.map(lambda span: _encode(raw[span], place.dtype), _spans(len(raw)))
    kinds = [str(plane) for plane in range(place.dtype.itemsize)]
    parts = dict(zip(kinds, zip(*coded, strict=True), strict=False))  # an empty tensor has no parts
    return {"count": len(raw)}, parts


def _encoded_levels(
    raw: Words, place: Place, grid: Grid, pool: ThreadPoolExecutor
) -> tuple[dict[str, Any], StreamParts] | None:
    """Return a tensor as the levels of its grid, and the bits in which it differs from their
    values; None if too many weights do."""

    def code(rows: slice) -> tuple[bool, int, bytes, bytes]:
        part, weights = grid.part(rows), whole[rows]
        levels = part.levels(weights)
        half = int((levels.clamp(-8, 7) != levels).sum()) <= RARE * levels.numel()
        most = 8 if half else 128
        levels = levels.clamp_(-most, most - 1).to(torch.int8)
        rest = _words(weights) ^ _words(part.values(levels).to(place.dtype))
        low = _words(levels)
        if half:  # two to a byte
            low = np.pad(low + np.uint8(8), (0, len(low) % 2))
            low = low[::2] | (low[1::2] << 4)
        return half, int(np.count_nonzero(rest)), _squeezed(low), _squeezed(rest.view(np.uint8))

    whole = _tensor(raw, place)
    halves, off, levels, rest = zip(*pool.map(code, _spans(*place.shape)), strict=True)
    if sum(off) > ASTRAY * raw.size:
        return None
    return {"count": len(raw), "levels": halves}, {"levels": levels, "rest": rest}


def _spans(rows: int, columns: int = 1) -> list[slice]:
    """Return the rows of each chunk of a matrix, or the values of each chunk of a vector."""
    step = max(1, PACKED_VALUES // columns)
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def _words(values: torch.Tensor) -> Words:
    """Return weights as unsigned integers with their bits."""
    return np.frombuffer(tensor_bytes(values), f"u{values.dtype.itemsize}")


def _encode(chunk: Words, dtype: torch.dtype) -> list[bytes]:
    """Return the planes of a chunk, each compressed if that helps."""
    width = 8 * chunk.itemsize
    if dtype.is_floating_point:
        turned = chunk << 1
        chunk = np.bitwise_or(turned, chunk >> (width - 1), out=turned)
    return [_squeezed((chunk >> right).astype(np.uint8)) for right in range(width - 8, -1, -8)]


def _squeezed(part: Words) -> bytes:
    """Return a zstandard frame if that is smaller or the bytes look like one, else the bytes."""
    frame = zstandard.ZstdCompressor(compression_params=CODES).compress(part.data)
    plain = len(frame) >= WORTHWHILE * part.nbytes and part[:4].tobytes() != ZSTANDARD_MAGIC
    return part.tobytes() if plain else frame


def _expanded(part: bytes, size: int) -> Words:
    """Return `size` bytes, uncompressed; ValueError for another size."""
    frame = part.startswith(ZSTANDARD_MAGIC)
    if (zstandard.frame_content_size(part) if frame else len(part)) != size:
        raise ValueError("another size")
    return np.frombuffer(zstandard.decompress(part) if frame else part, np.uint8)


def _unpacked(path: Path, entry: dict[str, Any], grids: Mapping[str, Grid]) -> Iterator[bytes]:
    """Yield a packed file's original bytes: its header, then chunk by chunk in order.

    Raises InputError if the file is cut or altered; what only the hash shows is raised at the end.
    """
    try:
        stored = read_header(path)
        with path.open("rb") as file, ThreadPoolExecutor(cores()) as pool:
            file.seek(stored["header"].start)
            header = file.read(stored["header"].size)
            digest, places = hashlib.sha256(header), _in_order(parse_header(header, path))
            if sum(place.size for _, place in places) > FIRST + GROWTH * path.stat().st_size:
                raise ValueError("more than any weights grow")
            yield header
            jobs = (
                job
                for name, place in places
                for job in _chunks(
                    file, stored, name, place, entry["tensors"][name], grids.get(name)
                )
            )
            for part in _in_turn(pool, jobs, 2 * cores()):
                digest.update(part)
                yield part
        if digest.hexdigest() != entry["sha256"]:
            raise ValueError("another SHA-256")
    except Exception as error:  # damaged bytes can be anything
        if isinstance(error, OSError) and error.errno:
            raise
        raise InputError(f"{path} {ALTERED}") from error


def _chunks(
    file: BinaryIO,
    stored: Mapping[str, Place],
    name: str,
    place: Place,
    entry: dict[str, Any],
    grid: Grid | None,
) -> Iterator[Callable[[], bytes]]:
    """Yield a function for each chunk of a tensor that decodes its bytes."""

    def read(kind: str, number: int) -> bytes:
        sizes = entry["sizes"][kind]
        file.seek(stored[f"{name}|{kind}"].start + sum(sizes[:number]))
        return file.read(sizes[number])

    of_levels = grid is not None and "levels" in entry
    rows, columns = place.shape if of_levels else (place.count, 1)
    for number, span in enumerate(_spans(rows, columns)):
        parts = [read(kind, number) for kind in entry["sizes"]]
        count = (span.stop - span.start) * columns
        if grid is not None and of_levels:
            half = entry["levels"][number]
            yield partial(_decoded_levels, parts, count, half, place, grid.part(span))
        else:
            yield partial(_decoded_planes, parts, count, place.dtype)


def _decoded_levels(
    parts: Sequence[bytes], count: int, half: bool, place: Place, grid: Grid
) -> bytes:
    """Return the bytes of some rows of a matrix from their levels, two to a byte if `half`, and
    the bits in which they differ from the values of these."""
    low, rest = parts
    numbers = _expanded(low, -(-count // 2) if half else count)
    if half:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=1).reshape(-1)[:count] - 8
    levels = torch.from_numpy(numbers.astype(np.int8)).view(-1, place.shape[1])
    words = _words(grid.values(levels).to(place.dtype))
    return (words ^ _expanded(rest, words.nbytes).view(words.dtype)).tobytes()


def _decoded_planes(parts: Sequence[bytes], count: int, dtype: torch.dtype) -> bytes:
    """Return the bytes of values from their planes."""
    width = dtype.itemsize
    planes = np.empty((count, width), np.uint8)
    for at, part in enumerate(parts):
        planes[:, width - 1 - at] = _expanded(part, count)
    values = planes.view(f"<u{width}")[:, 0]
    if dtype.is_floating_point:
        values = (values >> 1) | (values << (8 * width - 1))
    return values.tobytes()
