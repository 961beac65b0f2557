"""Export a calibration set for other tools: text as JSON lines, or a `datasets` folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from calmix.calibration.set import CalibrationSet
from calmix.errors import InputError
from calmix.files import EXPORT, atomic_folder, check_output_folder, write_json, write_text
from calmix.manifest import file_hashes, sealed, versions


def export_jsonl(made: CalibrationSet, tokenizer: Any, path: Path | str) -> None:
    """Write one JSON object a row: `text` and `source`.

    The text is what the tokenizer decodes, without special tokens; tokenising it again need not
    give the very same ids at the edges of a row. Where the ids matter, export a folder.

    Raises:
        InputError: the path is a folder or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a .jsonl file")
    texts = tokenizer.batch_decode(made.ids.tolist(), skip_special_tokens=True)
    lines = [
        json.dumps({"text": text, "source": source}, ensure_ascii=False)
        for text, source in zip(texts, made.sources, strict=True)
    ]
    write_text(path, "".join(line + "\n" for line in lines))


def export_datasets(
    made: CalibrationSet, tokenizer: Any, folder: Path | str, *, overwrite: bool = False
) -> None:
    """Write a folder that `datasets.load_from_disk` opens, with a manifest beside its files.

    Its columns: `input_ids` (the very ids), `attention_mask` (all ones: there is no padding),
    `text` and `source`.

    Raises:
        InputError: the folder exists and is not empty, or cannot be written.
    """
    import datasets

    folder = Path(folder)
    check_output_folder(folder, overwrite=overwrite)
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "attention_mask": datasets.List(datasets.Value("int8")),
            "text": datasets.Value("string"),
            "source": datasets.Value("string"),
        }
    )
    ids = made.ids.numpy().astype(np.int32)
    columns = {
        "input_ids": ids.tolist(),
        "attention_mask": np.ones_like(ids, dtype=np.int8).tolist(),
        "text": tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True),
        "source": list(made.sources),
    }
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows._fingerprint = made.sha256[:16]  # else random, and the folder never the same twice
        with atomic_folder(folder) as beside:
            rows.save_to_disk(beside)
            manifest = {
                "kind": "export",
                "engine": "datasets",
                "weights": "no",
                "model": made.manifest["model"],
                "calibration": made.sha256,
                "versions": versions() | {"datasets": datasets.__version__},
                "files": file_hashes(beside),
            }
            write_json(beside / EXPORT, sealed(manifest))
    finally:
        if shown:
            datasets.enable_progress_bars()
