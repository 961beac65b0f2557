"""Packs: a model folder in fewer bytes, without loss (ours; the ideas are old).

Pruned weights are mostly zeros, and those that are kept have exponents of little entropy. Of every
tensor a pack holds a bit mask of what is not zero (where enough is) and, of what is kept, the
bytes by significance: each value is turned left by one bit, so that a float's exponent comes first
and its sign last, and cut into planes of bytes, the first plane first. Mask and planes are
entropy-coded with zstandard where that helps: exponents shrink to a third, mantissas stay.

A pack is a folder: `calmix-pack.json`, for each of the model's weight files a safetensors file of
plain bytes, and all other files as they were, those of subfolders too. Nothing in it can run.
Files are made a tensor and read a chunk at a time, and what is unpacked has the bytes that were
packed, by SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from calmix.errors import InputError, ModelError, disk_errors
from calmix.files import atomic_folder, check_free, check_output_folder, sha256_file, write_json
from calmix.machine import cores
from calmix.manifest import versions
from calmix.models.opening import check_folder, load_config, quiet_transformers
from calmix.models.shards import DTYPES, PACK, Place, read_header, weight_files

FORMAT = 1
CHUNK = 1 << 22  # values that are coded together: a few megabytes
SPARSE = 0.08  # share of zeros from which a mask, a bit a value, pays in 16 bits
HELPS = 0.98  # what entropy coding must come down to
LEVEL = 3  # zstandard's; beyond it exponents get no smaller
MAGIC = b"\x28\xb5\x2f\xfd"  # how a zstandard frame begins

Words = NDArray[Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packed:
    """What a pack came to.

    Attributes:
        dense: bytes of the weight files before.
        packed: bytes of the weight files in the pack.
        sparse: the same two of the tensors that have a mask.
    """

    dense: int
    packed: int
    sparse: tuple[int, int]


def pack(
    folder: Path, output: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Packed:
    """Write a model folder as a pack.

    Args:
        folder: of safetensors, as `calmix prune` writes it.
        output: the pack's folder; replaced only with `overwrite`, and only when all is done.
        progress: called with bytes done and in all.

    Raises:
        InputError: `folder` is no model folder, is a pack itself, or holds what cannot come back
            byte for byte; `output` cannot be written.
        ModelError: a weight file is damaged.
    """
    files = _model_files(folder)
    beside_them = _other_files(folder, files)
    orders = {name: _in_order(folder / name) for name in files}
    check_output_folder(output, inputs=[folder], overwrite=overwrite)
    total = sum((folder / name).stat().st_size for name in files)
    done = dense = packed = 0
    sparse = [0, 0]
    with atomic_folder(output) as beside, ThreadPoolExecutor(cores()) as pool, disk_errors(output):
        entries: dict[str, Any] = {}
        for name in files:
            made = _Writer(beside / name)
            tensors: dict[str, Any] = {}
            with (folder / name).open("rb") as source:
                header, places = orders[name]
                made.add("header", [source.read(header)])
                for tensor, place in places:
                    before = made.size
                    tensors[tensor] = _pack_tensor(made, source, tensor, place, pool)
                    done += place.size
                    if tensors[tensor]["mask"]:
                        sparse[0] += place.size
                        sparse[1] += made.size - before
                    if progress is not None:
                        progress(done, total)
            made.close()
            dense += (folder / name).stat().st_size
            packed += (beside / name).stat().st_size
            entries[name] = {
                "sha256": sha256_file(folder / name),
                "packed": sha256_file(beside / name),
                "tensors": tensors,
            }
        others = {}
        for name in beside_them:
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, beside / name)
            others[name] = sha256_file(beside / name)
        write_json(
            beside / PACK,
            {"format": FORMAT, "versions": versions(), "weights": entries, "files": others},
        )
    return Packed(dense, packed, (sparse[0], sparse[1]))


def unpack(
    folder: Path, output: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> int:
    """Write the model folder a pack was made of, byte for byte; return its weights' bytes.

    Raises:
        InputError: `folder` is no pack, of another format, cut or altered, or `output` cannot be
            written; nothing is left there then.
    """
    manifest = _manifest(folder)
    check_output_folder(output, inputs=[folder], overwrite=overwrite)
    total = sum(_dense_size(folder, name, entry) for name, entry in manifest["weights"].items())
    check_free(output, total, "the weights take")
    done = 0
    with atomic_folder(output) as beside, disk_errors(output):
        for name, expected in manifest["files"].items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, beside / name)
            _check(sha256_file(beside / name) == expected, folder / name)
        for name, entry in manifest["weights"].items():
            found = hashlib.sha256()
            with (beside / name).open("wb") as file:
                for part in _unpacked(folder / name, entry):
                    file.write(part)
                    found.update(part)
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
            _check(found.hexdigest() == entry["sha256"], folder / name)
    return done


def load(
    folder: Path | str, *, device: str = "cpu", progress: Progress | None = None, **options: Any
) -> Any:
    """Return the causal language model of transformers in a pack, without its dense files.

    Args:
        folder: the pack.
        device: torch device.
        **options: for transformers' `from_pretrained`, such as `dtype`.

    Raises:
        InputError: `folder` is no pack, of another format, cut or altered.
        ModelError: transformers cannot open what it holds.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    for name, expected in manifest["files"].items():
        _check(sha256_file(folder / name) == expected, folder / name)
    state: dict[str, torch.Tensor] = {}
    for name, entry in manifest["weights"].items():
        _check(sha256_file(folder / name) == entry["packed"], folder / name)
        parts = _unpacked(folder / name, entry)
        header = next(parts)
        for tensor, place in _places(header, name, folder / name):
            value = torch.empty(place.shape, dtype=place.dtype)
            flat: Any = value.view(-1).view(torch.uint8).numpy()
            at = 0
            while at < place.size:
                part = next(parts)
                flat[at : at + len(part)] = np.frombuffer(part, np.uint8)
                at += len(part)
            state[tensor] = value
            if progress is not None:
                progress(len(state), len(entry["tensors"]))
    options = {"dtype": "auto"} | options
    config = load_config(folder, str(folder), False)
    if options["dtype"] == "auto":
        options["dtype"] = getattr(config, "dtype", None) or torch.float32
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config)
            model = type(empty).from_pretrained(
                None, config=empty.config, state_dict=state, **options
            )
        except Exception as error:  # transformers raises anything on what it does not know
            told = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelError(f"cannot open {folder}: {told[:300]}") from error
    return model.requires_grad_(False).to(device).eval()


def _model_files(folder: Path) -> list[str]:
    if (folder / PACK).is_file():
        raise InputError(f"{folder} is a pack already")
    check_folder(folder)
    return weight_files(folder)


def _other_files(folder: Path, weights: Collection[str]) -> list[str]:
    """Return the files of a model folder beside its weights, by their paths in it.

    Raises:
        InputError: something in it would not come back.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.is_file() or not name.isprintable():
            raise InputError(
                f"cannot pack {folder}: {name!r} is no regular file with a printable name, and "
                "would not come back: move it out of the folder"
            )
        if name not in weights:
            found.append(name)
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / PACK
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise InputError(
                f"{folder} is a pack of format {manifest['format']}, this calmix reads {FORMAT}: "
                "unpack it with the version that made it"
            )
        for name in (*manifest["weights"], *manifest["files"]):
            parts = name.split("/")
            if {"", ".", ".."} & {*parts} or (parts[1:] and name in manifest["weights"]):
                raise InputError(f"{path} names a file outside the pack: {name!r}")
            if not (folder / name).is_file():
                raise InputError(f"{folder} lacks {name}, which it was made with")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is no pack: it has no {PACK}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is damaged: fetch the pack again") from error
    return manifest


def _check(good: bool, path: Path) -> None:
    if not good:
        raise InputError(f"{path} is not what it was packed as (SHA-256): fetch the pack again")


class _Writer:
    """A safetensors file of byte tensors whose sizes are known only when they are written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._entries: dict[str, Any] = {"__metadata__": {"format": "calmix-pack"}}
        self._data = path.with_name(f".{path.name}.data").open("w+b")

    def add(self, name: str, parts: list[bytes]) -> list[int]:
        """Write parts one behind the other; return their sizes."""
        start = self.size
        for part in parts:
            self._data.write(part)
            self.size += len(part)
        length = self.size - start
        self._entries[name] = {
            "dtype": "U8", "shape": [length], "data_offsets": [start, self.size],
        }  # fmt: skip
        return [len(part) for part in parts]

    def close(self) -> None:
        """Put the header before the bytes."""
        text = json.dumps(self._entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            self._data.seek(0)
            shutil.copyfileobj(self._data, file, length=1 << 22)
        self._data.close()
        Path(self._data.name).unlink()


def _in_order(path: Path) -> tuple[int, list[tuple[str, Place]]]:
    """Return the bytes of a file's header, and its tensors as their bytes lie.

    Raises:
        ModelError: it holds other bytes too, which would not come back.
    """
    places = sorted(read_header(path).items(), key=lambda item: (item[1].start, item[1].size))
    with path.open("rb") as file:
        at = header = 8 + struct.unpack("<Q", file.read(8))[0]
    for _, place in places:
        at = at + place.size if place.start == at else -1
    if at != path.stat().st_size:
        raise ModelError(f"{path} holds bytes that are of no tensor, or of two: fetch it again")
    return header, places


def _pack_tensor(
    made: _Writer, source: BinaryIO, name: str, place: Place, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    width = place.dtype.itemsize
    source.seek(place.start)
    count = place.size // width
    raw = np.frombuffer(source.read(place.size), f"u{width}")
    masked = place.dtype.is_floating_point and bool(_zeros(raw) >= SPARSE)
    chunks = [raw[at : at + CHUNK] for at in range(0, count, CHUNK)]
    coded = list(pool.map(lambda chunk: _encode(chunk, masked, place.dtype), chunks))
    entry: dict[str, Any] = {"count": count, "mask": masked, "sizes": {}}
    for part in range(len(coded[0]) if coded else 0):
        kind = "mask" if masked and not part else str(part - masked)
        entry["sizes"][kind] = made.add(f"{name}|{kind}", [chunk[part] for chunk in coded])
    return entry


def _zeros(raw: Words) -> float:
    return 1 - np.count_nonzero(raw) / len(raw) if len(raw) else 0.0


def _encode(chunk: Words, masked: bool, dtype: torch.dtype) -> list[bytes]:
    """Return mask (if any) and planes of a chunk, each coded where that helps."""
    parts = []
    if masked:
        bits = chunk != 0
        parts.append(np.packbits(bits).tobytes())
        chunk = chunk[np.flatnonzero(bits)]
    if dtype.is_floating_point:
        chunk = (chunk << 1) | (chunk >> (8 * chunk.itemsize - 1))
    planes = chunk.astype(chunk.dtype.newbyteorder(">"), copy=False).view(np.uint8)
    planes = planes.reshape(-1, chunk.itemsize)
    parts += [np.ascontiguousarray(planes[:, at]).tobytes() for at in range(chunk.itemsize)]
    return [_squeezed(part) for part in parts]


def _squeezed(part: bytes) -> bytes:
    """Return a zstandard frame if that is smaller, or cannot be told from one, else the bytes."""
    made = zstandard.ZstdCompressor(level=LEVEL).compress(part)
    return made if len(made) < HELPS * len(part) or part.startswith(MAGIC) else part


def _expanded(part: bytes, size: int) -> Words:
    """Return `size` bytes, uncompressed.

    Raises:
        ValueError: the frame is damaged, or of another size.
    """
    if part.startswith(MAGIC):
        if zstandard.frame_content_size(part) != size:
            raise ValueError("another size")
        part = zstandard.ZstdDecompressor().decompress(part, max_output_size=size)
    if len(part) != size:
        raise ValueError("another size")
    return np.frombuffer(part, np.uint8)


def _decode(parts: list[bytes], masked: bool, count: int, width: int, floating: bool) -> bytes:
    """Return the bytes of a chunk of `count` values."""
    kept, where = count, None
    if masked:
        bits = np.unpackbits(_expanded(parts[0], -(-count // 8)), count=count).view(bool)
        where = np.flatnonzero(bits)  # places are ten times as fast to fill as a mask
        kept = len(where)
    planes = np.empty((kept, width), np.uint8)
    for at, part in enumerate(parts[masked:]):
        planes[:, width - 1 - at] = _expanded(part, kept)
    values = planes.view(f"<u{width}")[:, 0]
    if floating:
        values = (values >> 1) | (values << (8 * width - 1))
    if where is None:
        return values.tobytes()
    whole = np.zeros(count, f"<u{width}")
    whole[where] = values
    return whole.tobytes()


def _dense_size(folder: Path, name: str, entry: dict[str, Any]) -> int:
    """Return the bytes a file will have once unpacked."""
    try:
        with (folder / name).open("rb") as file:
            place = read_header(folder / name)["header"]
            file.seek(place.start)
            header = file.read(place.size)
        places = _places(header, name, folder / name)
        return len(header) + sum(place.size for _, place in places)
    except (KeyError, ModelError):
        _check(False, folder / name)
        raise


def _places(header: bytes, name: str, path: Path) -> list[tuple[str, Place]]:
    """Return the tensors that a kept header tells of, as their bytes lie."""
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        found = [
            (key, Place(name, DTYPES[value["dtype"]], tuple(value["shape"]),
                        len(header) + value["data_offsets"][0]))
            for key, value in entries.items()
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        _check(False, path)
        raise
    return sorted(found, key=lambda item: item[1].start)


def _unpacked(path: Path, entry: dict[str, Any]) -> Iterator[bytes]:
    """Yield a packed file's original bytes: its header, then chunk by chunk in order.

    Raises:
        InputError: the file is cut or altered, as far as that shows before its hash.
    """
    try:
        held = read_header(path)
        with path.open("rb") as file, ThreadPoolExecutor(cores()) as pool:
            file.seek(held["header"].start)
            header = file.read(held["header"].size)
            yield header
            waiting: list[Any] = []
            for name, place in _places(header, path.name, path):
                for job in _jobs(file, held, name, place, entry["tensors"][name]):
                    waiting.append(pool.submit(_decode, *job))
                    if len(waiting) > 2 * cores():
                        yield waiting.pop(0).result()
            for one in waiting:
                yield one.result()
    except (KeyError, ValueError, TypeError, OSError, ModelError, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(
            f"{path} is not what it was packed as ({type(error).__name__}): fetch the pack again"
        ) from error


def _jobs(
    file: BinaryIO, held: dict[str, Place], name: str, place: Place, entry: dict[str, Any]
) -> Iterator[tuple[list[bytes], bool, int, int, bool]]:
    """Yield what `_decode` takes for each chunk of a tensor."""
    width, count, masked = place.dtype.itemsize, math.prod(place.shape), entry["mask"] is True
    kinds = [*(["mask"] if masked else []), *map(str, range(width))]
    starts = {kind: held[f"{name}|{kind}"].start for kind in kinds} if count else {}
    for number, at in enumerate(range(0, count, CHUNK)):
        parts = []
        for kind in kinds:
            size = entry["sizes"][kind][number]
            file.seek(starts[kind])
            parts.append(file.read(size))
            starts[kind] += size
        floating = place.dtype.is_floating_point
        yield parts, masked, min(CHUNK, count - at), width, floating
