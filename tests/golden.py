"""Results that refactoring must not change: masks, retention, scores, calibration sets, files.

    python -m tests.golden --write     store the results of this checkout
    python -m tests.golden             compare with the stored ones; exit code 1 if they differ

Name parts (`masks`, `studies`, `drawn`, `scores`, `exported`) to run only those. All but studies
and drawn depend on how the machine multiplies: they are skipped, with a line, on machines with
other capabilities.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import math
import os
import sys
import tarfile
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file

import calmix
from calmix.precision import capabilities
from tests.tiny import tiny_gguf, tiny_ids, tiny_model, tiny_text

FILE = Path(__file__).with_name("golden.json.gz")
RESULTS = Path(__file__).parents[1] / "studies/results"
MODEL = "builtin:smollm2-135m"
FAMILIES = ("llama", "gemma3_text", "gpt2", "opt", "gpt_neox", "mixtral", "deepseek_v3", "gpt_oss")
METHODS = (
    "sparsegpt",
    "sparsegpt,damping=0.1",
    "admm",
    "wanda",
    "ria",
    "magnitude",
    "wanda,refit=2",
)
PATTERNS = {
    "50%": calmix.Unstructured(0.5),
    "70%": calmix.Unstructured(0.7),
    "2:4": calmix.SemiStructured(2, 4),
}
SETS = (
    "uniform:python-stdlib,encyclopedia",
    "encyclopedia",
    "stories:0.7,math-solutions:0.3",
    "uniform:encyclopedia,books,stories,activities,python-stdlib,code-compiled,math-solutions,"
    "word-problems",
)


def masks():
    """Hashes of the masks of every method and pattern on a tiny model of each family."""
    results = {}
    ways = {
        "sequential": {"statistics": "plain"},
        "block": {"statistics": "plain", "propagation": "block"},
        "robust": {},
    }
    for family, method, (name, pattern), (way, how) in itertools.product(
        FAMILIES, METHODS, PATTERNS.items(), ways.items()
    ):
        if way != "sequential" and method not in ("sparsegpt", "admm"):
            continue
        if way == "block" and method == "admm":
            continue
        model = tiny_model(family)
        calmix.prune(model, tiny_ids(), method=method, pattern=pattern, **how)
        digest = hashlib.sha256()
        for key, weight in sorted(model.state_dict().items()):
            digest.update(key.encode())
            digest.update((weight == 0).numpy().tobytes())
        results[f"{family} {method} {name} {way}"] = digest.hexdigest()
    return results


def studies():
    """Retention with its intervals, and leads, of both committed studies."""
    from calmix.study.analyse import analyse
    from calmix.study.store import read_results

    collected = {}
    for study in ("smollm2-offline", "right-answers"):
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(RESULTS / study / "store.tar.xz") as packed:
                packed.extractall(folder, filter="data")
            results = read_results(Path(folder) / study)
            analysis = analyse(results).to_dict()
        for trial in results.trials:
            parts = {"total": trial.total, **trial.dimensions}
            collected[f"{study} trial {trial.id}"] = {
                name: [one.value, one.low, one.high] for name, one in parts.items()
            }
        for condition in analysis["conditions"]:
            for row in condition["ranking"]:
                where = f"{study} {row['condition']} {row['calibration']}"
                collected[where] = _numbers({key: row[key] for key in ("total", "dimensions")})
            for row in condition["differences"]:
                if row["quantity"] == "total":
                    where = f"{study} {row['condition']} {row['left']} - {row['right']}"
                    collected[where] = _numbers(row["gap"])
    return collected


def _numbers(value):
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    return value if isinstance(value, (float, int)) else None


def drawn():
    """Hashes of the token ids of drawn calibration sets."""
    opened = calmix.open_model(MODEL)
    results = {}
    for text in SETS:
        drawn = calmix.calibration_set(text, opened, rows=32, length=256)
        ids = drawn.ids.to(torch.int64).contiguous()
        results[text] = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    return results


def scores():
    """Scores of fifty items a task of the real model."""
    result = calmix.evaluate(MODEL, "offline", limit=50)
    return {
        task.name: [[round(v, 4) for v in row] for row in task.loglikelihoods]
        for task in result.tasks
    }


def exported():
    """Hashes of the tensors of one exported file of each kind, made from a tiny GGUF file."""
    from gguf import GGUFReader

    from calmix.deploy import compressed_tensors, gguf, pack
    from calmix.pruning.checkpoint import prune_checkpoint
    from calmix.pruning.requests import prune_request

    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, text = str(tiny_gguf(folder / "tiny.gguf")), str(tiny_text(folder / "text.txt"))
        size = {"rows": 6, "length": 32, "leakage": "off"}

        def quantised(kind, **asked):
            made = folder / f"quantised-{kind}"
            prune_checkpoint(model, made, prune_request(calibration=text, **size, **asked))
            return str(made)

        gguf.export(quantised("gguf", method="ggml,type=Q4_K"), folder / "gguf.gguf")
        ints = quantised("compressed-tensors", method="gptq,group=32", bits=4)
        compressed_tensors.export(ints, folder / "compressed-tensors")
        pack.pack(quantised("pack", bits=2.8), folder / "pack")
        drawn = calmix.calibration_set(text, calmix.open_model(model), **size)
        drawn.save(folder / "set")
        gguf.export_imatrix(folder / "set", model, folder / "imatrix.gguf")
        for kind in ("gguf", "imatrix"):
            parts = GGUFReader(folder / f"{kind}.gguf").tensors
            results[kind] = _hashed({one.name: one.data.tobytes() for one in parts})
        for kind in ("compressed-tensors", "pack"):
            tensors = {}
            for file in (folder / kind).rglob("*.safetensors"):
                for key, value in load_file(file).items():
                    name = f"{file.relative_to(folder / kind)} {key}"
                    tensors[name] = value.view(torch.uint8).numpy().tobytes()
            results[kind] = _hashed(tensors)
    return results


def _hashed(tensors):
    digest = hashlib.sha256()
    for name, data in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(data)
    return digest.hexdigest()


PARTS = {part.__name__: part for part in (masks, studies, drawn, scores, exported)}
OF_THE_MACHINE = ("masks", "scores", "exported")


def same(one, other):
    """Compare numbers to 1e-9 and everything else exactly."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=0, abs_tol=1e-9)
    return bool(one == other)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(gzip.decompress(FILE.read_bytes())) if FILE.is_file() else {}
    machine = dict(sorted(capabilities().items())) | {"torch": torch.__version__}
    different = 0
    for name in options.parts or PARTS:
        made_on = stored.get("machines", {}).get(name)
        if not options.write and name in OF_THE_MACHINE and made_on != machine:
            print(f"{name}: left out: made on {made_on}, this is {machine}")
            continue
        data = json.loads(json.dumps(PARTS[name]()))
        if options.write:
            stored |= {"machines": stored.get("machines", {}) | {name: machine}, name: data}
            print(f"{name}: {len(data)} written")
            continue
        old = stored[name]
        keys = [key for key in {**old, **data} if not same(old.get(key), data.get(key))]
        different += len(keys)
        for key in keys[:20]:
            print(f"{name}: {key}: {str(old.get(key))[:200]} -> {str(data.get(key))[:200]}")
        print(f"{name}: {len(data) - len(keys)} of {len(old)} the same")
    if options.write:
        text = json.dumps(stored, separators=(",", ":"), sort_keys=True)
        FILE.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
