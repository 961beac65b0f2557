"""What better solvers and recovery keep at the same sparsity: a table over models, sets and ways.

    python benchmarks/keep_more.py -o OUT [--readout FILE] [--data DIR] [--models ...]
        [--calibrations mix c4 igsp] [--targets 0.5 0.6 0.7 2:4] [--ways ...] [--draws 3]
        [--records FILE]

Every cell is a checkpoint made by the command line's own functions, read out, and noted in
keep_more.jsonl beside this file, with commit and machine; what is noted is not done again, so the
table grows over runs and machines, and `--draws 0` prints what there is. Ways:

    sparsegpt, refit        SparseGPT, and with 10 steps of refit behind it
    mask, admm              ADMM's mask without and with its refit
    blocks, distill         the latter recovered, on the same rows
    both                    by blocks, then by distillation
    many                    ADMM on the same rows, distilled on --many of the same set, once, two a
                            step: a quarter of an hour on two cores

`--readout FILE` is a Python file with `readout(folder) -> {dimension: {text: bits per byte}}`; kept
is the mean over dimensions of the mean of dense over pruned. Without it the quick slice of the
offline suite stands in, by `ratio`. `c4` is general/c4-train.jsonl of the data folder. Printed are
means over draws with their half range; `error` is the mean output error of all layers, `cpu s`
the processor's seconds of prune and recovery in the latest of these runs, which other work on the
machine changes little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, Readout, commit, data_file, machine, means

from calmix.models.opening import resolve_model
from calmix.pruning.checkpoint import prune_checkpoint
from calmix.pruning.requests import prune_request, recover_request
from calmix.recovery.checkpoint import recover

MIX = (
    "uniform:encyclopedia,books,stories,procedures,"
    "python-stdlib,code-compiled,math-solutions,word-problems"
)
METHODS = {"sparsegpt": "sparsegpt", "refit": "sparsegpt,refit=10", "mask": "admm,refit=0"}
WAYS = ("sparsegpt", "refit", "mask", "admm", "blocks", "distill", "both", "many")
AFTER = {
    "blocks": ("admm", "blocks"),
    "distill": ("admm", "distill"),
    "both": ("blocks", "distill"),
    "many": ("admm", "distill"),
}


def request(way: str, target: str, calibration: str, rows: int, seed: int) -> Any:
    goal = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    return prune_request(
        method=METHODS.get(way, way), calibration=calibration, rows=rows, seed=seed, **goal
    )


def spent() -> float:
    """Return the processor's seconds of this process and of those that it waited for."""
    return sum(os.times()[:4])


def make(options: argparse.Namespace, cell: dict[str, Any], text: str) -> dict[str, Any]:
    """Make the checkpoint of a cell in its way's folder; return what is noted of it."""
    way, folder = cell["way"], options.output / cell["way"]
    file = folder / "keep_more.json"
    of = [cell[key] for key in ("model", "calibration", "target", "draw", "rows")]
    if file.is_file() and (note := json.loads(file.read_text(encoding="utf-8")))["of"] == of:
        return dict(note)
    if way not in AFTER:
        began = spent()
        how = request(way, cell["target"], text, cell["rows"], cell["draw"])
        report = prune_checkpoint(cell["model"], folder, how, overwrite=True)
        error = float(np.mean([layer.error or 0 for layer in report.layers]))
        note = {"of": of, "error": error, "seconds": spent() - began}
    else:
        before, method = AFTER[way]
        note = make(options, cell | {"way": before}, text)
        began = spent()
        some = {"rows": cell["rows"]}
        if way == "many":
            some = {"rows": options.many, "epochs": 1, "batch": 2}
        how = recover_request(method=method, calibration=text, seed=cell["draw"], **some)
        recover(str(options.output / before), cell["model"], how, folder, overwrite=True)
        note["seconds"] += spent() - began
    file.write_text(json.dumps(note), encoding="utf-8")
    return note


def read(records: Path) -> list[dict[str, Any]]:
    """Return what is noted; read anew for every cell, since two runs may share the file."""
    lines = records.read_text(encoding="utf-8").splitlines() if records.is_file() else []
    return [json.loads(line) for line in lines]


def table(records: list[dict[str, Any]]) -> None:
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in records:
        key = (one["model"], one["calibration"], one["target"], one["way"])
        cells.setdefault(key, []).append(one)
    dimensions = [name for name in records[0]["kept"] if name != "total"]
    heads = [*dimensions, "total"]
    top = f"{'':<10}" + "".join(f"{head[:11]:>12}" for head in heads) + "   error  cpu s  draws"
    last: tuple[str, ...] = ()
    for key, found in sorted(
        cells.items(), key=lambda cell: (*cell[0][:3], WAYS.index(cell[0][3]))
    ):
        if key[:3] != last:
            last = key[:3]
            print(f"\n{key[0]}, {key[1]}, {key[2]}\n{top}")
        row = f"{key[3]:<10}"
        for head in heads:
            values = [one["kept"][head] for one in found]
            half = (max(values) - min(values)) / 2
            row += (
                f"{np.mean(values):7.1f} ±{half:3.1f}" if len(found) > 1 else f"{values[0]:12.1f}"
            )
        error = np.mean([one["error"] for one in found])
        seconds = [one["cpu_seconds"] for one in found if "cpu_seconds" in one]
        latest = f"{seconds[-1]:6.0f}" if seconds else f"{'':>6}"
        print(f"{row}  {error:6.4f} {latest} {len(found):6d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--readout", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--models", nargs="+", default=["builtin:smollm2-135m"])
    parser.add_argument("--calibrations", nargs="+", default=["mix"])
    parser.add_argument("--targets", nargs="+", default=["0.6"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS[:-1]), choices=WAYS)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--many", type=int, default=656, help="rows of the way of that name")
    parser.add_argument("--records", type=Path, default=HERE / "keep_more.jsonl")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    readout = Readout(options.readout)
    made_by = {"commit": commit(), "machine": machine()}
    print(made_by["machine"], f"commit {made_by['commit']}")
    for draw in range(options.draws):
        for model in options.models:
            for name in options.calibrations:
                text = {"mix": MIX}.get(name, name)
                if name == "c4":
                    text = str(data_file(options.data, "general/c4-train.jsonl"))
                for target in options.targets:
                    for way in options.ways:
                        cell = {
                            "model": model,
                            "calibration": name,
                            "target": target,
                            "way": way,
                            "draw": draw,
                            "rows": options.rows,
                        }
                        if any(cell.items() <= one.items() for one in read(options.records)):
                            continue
                        note = make(options, cell, text)
                        texts = readout.texts(resolve_model(model), options.output / way)
                        kept = means(texts)
                        many = {"many": options.many} if way == "many" else {}
                        one = (
                            cell
                            | many
                            | {
                                "kept": {key: round(value, 3) for key, value in kept.items()},
                                "texts": {
                                    name: {text: round(value, 3) for text, value in own.items()}
                                    for name, own in texts.items()
                                },
                                "error": round(note["error"], 6),
                                "cpu_seconds": round(note["seconds"], 1),
                            }
                        )
                        with options.records.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(one | made_by) + "\n")
                        print(f"{cell}: {kept['total']:.1f}", flush=True)
    for way in WAYS:
        shutil.rmtree(options.output / way, ignore_errors=True)
    if records := read(options.records):
        table(records)


if __name__ == "__main__":
    main()
