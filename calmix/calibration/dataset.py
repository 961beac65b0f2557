"""The calibration set: full rows of token ids, the source of each row, and a manifest.

On disk it is a folder of two files: `calibration.safetensors` (`ids`, shape (rows, length), and
`source`, the index of each row's source) and `manifest.json` (names, origin and hashes).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.calibration.tokenizer import HasTokenizer, begin_token
from calmix.errors import InputError
from calmix.files import (
    atomic_folder,
    check_links,
    check_output_folder,
    check_readable,
    read_object,
    sha256_json,
    user_path,
    write_json,
    write_text,
)
from calmix.manifest import SEAL, sealed
from calmix.shown import Shown

TENSORS, SET_MANIFEST = "calibration.safetensors", "manifest.json"
SET_KIND, SET_FORMAT = "calibration set", 1


@dataclass(frozen=True, repr=False)
class CalibrationSet(Shown):
    """Rows of token ids without padding.

    `ids` is int64, (rows, length); `sources` names the source of each row; `manifest` records how
    the set was made.
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

    def _line(self) -> str:
        return f"{self.rows} rows of {self.length} tokens"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"source": name, "rows": count, "tokens": count * self.length}
            for name, count in self.counts.items()
        ]

    def save(  # type: ignore[override]  # a folder
        self, folder: Path | str, *, overwrite: bool = False
    ) -> Path:
        """Write the set to a folder, atomically; the same set gives the same bytes.

        Raises:
            InputError: the folder exists and is not empty, or cannot be written.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        check_output_folder(folder, overwrite=overwrite)
        names = list(self.counts)
        source = torch.tensor([names.index(name) for name in self.sources], dtype=torch.int32)
        named = {"kind": SET_KIND, "format": SET_FORMAT, "calmix": metadata.version("calmix")}
        manifest = {**self.manifest, **named, "names": names, **self._kept()}
        with atomic_folder(folder) as beside:
            tensors = {"ids": self.ids.to(torch.int64).contiguous(), "source": source}
            save_file(tensors, beside / TENSORS)
            (beside / TENSORS).chmod(0o644)  # safetensors allows only the owner to read
            write_json(beside / SET_MANIFEST, sealed(manifest))
        return folder

    def _kept(self) -> dict[str, Any]:
        """Return the manifest's entries that describe ids and sources."""
        return {
            "rows": self.rows,
            "length": self.length,
            "sources_sha256": sha256_json(list(self.sources)),
            "sha256": self.sha256,
        }

    @classmethod
    def open(cls, folder: Path | str, opened: HasTokenizer | None = None) -> CalibrationSet:
        """Read a saved set, check it against its hashes and, if given, the model's tokenizer.

        Raises:
            InputError: the folder has no set, is damaged, or is for another tokenizer.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        check_links(folder := Path(folder))
        manifest = read_object(folder / SET_MANIFEST, f"there is no calibration set at {folder}")
        if (manifest.get("kind"), manifest.get("format")) != (SET_KIND, SET_FORMAT):
            raise InputError(
                f"{folder} is not a calibration set of format {SET_FORMAT}, which this calmix "
                f"reads: its {SET_MANIFEST} has kind {manifest.get('kind')} and format "
                f"{manifest.get('format')}"
            )
        if sealed(manifest) != manifest:
            raise InputError(f"calibration set {folder} is damaged ({SET_MANIFEST}): make it again")
        manifest.pop(SEAL)
        try:
            tensors = load_file(folder / TENSORS)
            sources = tuple(manifest["names"][i] for i in tensors["source"].tolist())
            dataset = cls(tensors["ids"], sources, manifest)
            if dataset.ids.dtype != torch.int64 or not dataset._kept().items() <= manifest.items():
                raise ValueError
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            check_readable(folder / TENSORS)
            raise InputError(f"calibration set {folder} is damaged: make it again") from error
        if opened is not None and manifest.get("tokenizer") != opened.tokenizer_fingerprint:
            raise InputError(
                f"calibration set {folder} was made with another tokenizer than the model's: "
                "make one for this model with calmix calibrate"
            )
        return dataset


def saved_set(named: str | Path | None) -> Path | None:
    """Return the folder that a user names, if it looks like a saved set, complete or not; programs
    and web pages have a `manifest.json` of their own."""
    path = user_path(named or "")
    with suppress(OSError, InputError):  # a mix of many sources can be too long for a path
        if named and (path / TENSORS).exists():
            return path
        if named and read_object(path / SET_MANIFEST, "").get("kind") == SET_KIND:
            return path
    return None


def identified(text: str | None) -> str | None:
    """Return a request for text as it identifies a result: a saved set by its hash, wherever it
    lies."""
    return text if (folder := saved_set(text)) is None else CalibrationSet.open(folder).sha256


def export_jsonl(drawn: CalibrationSet, tokenizer: Any, path: Path | str) -> None:
    """Write one JSON object per row, with `text` and `source`. The text has the special tokens of
    chats and between documents, but not a begin token that the tokenizer adds to any text.

    Tokenising the text again can give other ids at the edges of a row.
    """
    begin = begin_token(tokenizer)
    ids = (row[len(begin) * (row[: len(begin)] == begin) :] for row in drawn.ids.tolist())
    texts = tokenizer.batch_decode([*ids], skip_special_tokens=False)
    rows = [{"text": t, "source": s} for t, s in zip(texts, drawn.sources, strict=True)]
    write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
