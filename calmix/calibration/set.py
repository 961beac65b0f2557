"""The calibration set: full rows of token ids, the source of each row, and a manifest.

On disk it is a folder of two files: `calibration.safetensors` (`ids`, shape (rows, length), and
`source`, the index of each row's source) and `manifest.json` (names, origin and hashes).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calmix.errors import InputError
from calmix.files import (
    atomic_folder,
    check_output_folder,
    parse_json,
    sha256_json,
    write_json,
)
from calmix.manifest import SEAL, seal_holds, sealed

if TYPE_CHECKING:
    from calmix.calibration.build import HasTokenizer

TENSORS, MANIFEST, KIND, FORMAT = "calibration.safetensors", "manifest.json", "calibration set", 1


@dataclass(frozen=True)
class CalibrationSet:
    """Rows of token ids without padding.

    Attributes:
        ids: int64 token ids, shape (rows, length).
        sources: name of the source each row was drawn from, one a row.
        manifest: how the set was made: specification, seed, packing, tokenizer and documents
            by hash. JSON-serialisable.
    """

    ids: Tensor
    sources: tuple[str, ...]
    manifest: dict[str, Any]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens in each row."""
        return self.ids.shape[1]

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows of each source, in order of first appearance."""
        return dict(Counter(self.sources))

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids as little-endian int64, row by row."""
        raw = np.ascontiguousarray(self.ids.numpy().astype("<i8")).tobytes()
        return hashlib.sha256(raw).hexdigest()

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write the set to a folder, all of it or nothing.

        The same set gives the same bytes.

        Raises:
            InputError: the folder exists and is not empty, or cannot be written.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        check_output_folder(folder, overwrite=overwrite)
        names = list(dict.fromkeys(self.sources))
        source = torch.tensor([names.index(name) for name in self.sources], dtype=torch.int32)
        manifest = {
            **self.manifest,
            "kind": KIND,
            "format": FORMAT,
            "calmix": metadata.version("calmix"),
            "rows": self.rows,
            "length": self.length,
            "names": names,
            "sources_sha256": sha256_json(list(self.sources)),
            "sha256": self.sha256,
        }
        with atomic_folder(folder) as beside:
            tensors = {"ids": self.ids.to(torch.int64).contiguous(), "source": source}
            save_file(tensors, beside / TENSORS)
            (beside / TENSORS).chmod(0o644)  # safetensors lets only the owner read
            write_json(beside / MANIFEST, sealed(manifest))
        return folder

    @classmethod
    def open(cls, folder: Path | str, opened: HasTokenizer | None = None) -> CalibrationSet:
        """Read a saved set and check it against its hashes.

        Args:
            folder: what `save` wrote.
            opened: the model (or tokenizer) the set is meant for, if it is to be checked.

        Raises:
            InputError: the folder holds no set, is damaged, or is for another tokenizer.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        manifest = _manifest(folder)
        damaged = InputError(f"calibration set {folder} is damaged: make it again")
        try:
            tensors = load_file(folder / TENSORS)
            ids, source = tensors["ids"], tensors["source"]
            sources = tuple(manifest["names"][i] for i in source.tolist())
            found = cls(ids, sources, manifest)
            whole = (
                ids.dtype == torch.int64
                and tuple(ids.shape) == (manifest["rows"], manifest["length"])
                and found.sha256 == manifest["sha256"]
                and sha256_json(list(sources)) == manifest["sources_sha256"]
            )
        except (SafetensorError, OSError, KeyError, IndexError, ValueError) as error:
            raise damaged from error
        if not whole:
            raise damaged
        if opened is not None and manifest.get("tokenizer") != opened.tokenizer_fingerprint:
            raise InputError(
                f"calibration set {folder} was made with another tokenizer than the model's: "
                "make one for this model with calmix calibrate"
            )
        return found


def is_saved_set(path: Path) -> bool:
    """Tell whether a folder looks like a saved calibration set, whole or not."""
    try:
        return path.is_dir() and ((path / TENSORS).exists() or (path / MANIFEST).exists())
    except OSError:  # a mix of many sources is longer than a file's name may be
        return False


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"there is no calibration set at {folder}")
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {MANIFEST}: it is no calibration set") from None
    except (OSError, ValueError) as error:
        raise InputError(f"calibration set {folder} is damaged: make it again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise InputError(f"{folder} is no calibration set (its {MANIFEST} is of another kind)")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"calibration set {folder} has format {manifest.get('format')}, but this calmix "
            f"reads format {FORMAT}: make it again"
        )
    whole = seal_holds(manifest)
    manifest.pop(SEAL, None)
    if not whole:
        raise InputError(f"calibration set {folder} is damaged ({MANIFEST}): make it again")
    return manifest
