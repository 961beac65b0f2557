"""What a set keeps, predicted before any benchmark is run: by Gram algebra, by KL, by metrics.

    python benchmarks/predict.py STORE --work DIR [--rows 24] [--every 7] [--sparsity 0.6]

STORE is a study's store with its calibration sets. Of every single source (and every set the
model writes) the first `--rows` rows of its first draw run once through the dense model, and so do
held-out texts of every dimension; the Gram matrices of every k-th block's inputs are kept in DIR.
From there on no token is seen: a mix's Gram matrix is the sum of its sources', each times its
share; the layers of these blocks are pruned on it; and the share of a dimension's output energy
that is lost there is read off that dimension's Gram matrix. The predictor is the mean of its
logarithm over layers, for the total over dimensions too (ours). It was fixed before it was
compared with anything.

Beside it: KL to the dense model on held-out texts after one prune, and the information metrics,
both from the store. Each is compared with measured retention by rank, and by the straight line
through all other sets. What was done stays in DIR and is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from common import commit, machine
from safetensors.torch import load_file, save
from torch import Tensor

from calmix.analysis.cells import Cells, nan_mean, select, tables
from calmix.analysis.correlations import distinct, kinds_of, strata_of
from calmix.analysis.prediction import Predicted, predicted
from calmix.analysis.statistics import Array
from calmix.calibration import CalibrationSet
from calmix.capability.texts import texts
from calmix.files import sha256_json, write_bytes, write_json
from calmix.models import OpenModel, find_blocks, open_model
from calmix.pruning import prune
from calmix.pruning.gram import relative_error
from calmix.pruning.methods import Solution, get_method
from calmix.pruning.methods.sparsegpt import SparseGPT
from calmix.pruning.patterns import Pattern, Unstructured
from calmix.study import read_results
from calmix.study.store import Store, open_store

Errors = dict[str, dict[str, list[list[float]]]]  # by input and set: dimensions, then layers


class Seen(SparseGPT):
    """Looks at the Gram matrices of a pass and changes nothing."""

    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        assert statistic is not None
        LOOKED.append((len(weights), statistic.clone()))
        same = [weight.float() for weight in weights]
        return Solution(same, [0] * len(same), [None] * len(same))


LOOKED: list[tuple[int, Tensor]] = []  # layers that share an input, and its Gram matrix


def grams_of(opened: OpenModel, ids: Tensor, only: Sequence[str], kept: Path) -> Path:
    """Run ids through the dense model once, and keep mean x x^T by the layers that read x."""
    about = {"model": opened.fingerprint, "ids": sha256_json(ids.tolist()), "layers": list(only)}
    path = kept.with_name(f"{kept.name}-{sha256_json(about)[:12]}.safetensors")
    if path.is_file():
        return path
    began = time.process_time()
    LOOKED.clear()
    report = prune(opened.model, ids, method=Seen(), pattern=Unstructured(0.5), only=only)
    names = iter(layer.name for layer in report.layers)
    found = {",".join(islice(names, count)): gram / ids.numel() for count, gram in LOOKED}
    write_bytes(path, save(found, {"about": json.dumps(about)}))
    told = f"{path.stat().st_size / 1e6:.0f} MB, {time.process_time() - began:.0f} s"
    print(f"{kept.name}: {tuple(ids.shape)}, {told}", file=sys.stderr, flush=True)
    return path


def errors_of(
    opened: OpenModel, cells: Cells, only: Sequence[str], sets: dict[str, Path],
    held_out: dict[str, Path], method: str, pattern: Pattern, path: Path,
) -> Errors:  # fmt: skip
    """Prune the chosen layers on every set's Gram matrices; return what each dimension loses."""
    found: Errors = json.loads(path.read_text()) if path.is_file() else {}
    blocks = find_blocks(opened.model).select(only)
    layers = {layer.name: layer for at in range(len(blocks)) for layer in blocks.prunables(at)}
    solver = get_method(method)
    singles = {next(iter(mix)): name for name, mix in zip(cells.sets, cells.mixes, strict=True)
               if len(mix) == 1}  # fmt: skip
    for name in load_file(next(iter(sets.values()))):
        if name in found:
            continue
        began = time.process_time()
        read = {label: one_of(file, name) for label, file in (sets | held_out).items()}
        weights = [layers[each].view().float() for each in name.split(",")]
        found[name] = {}
        for label, mix in zip(cells.sets, cells.mixes, strict=True):
            if len(mix) < 2:
                gram = read[label]
            else:
                gram = sum(share * read[singles[source]] for source, share in mix.items())
            assert isinstance(gram, Tensor)
            kept = solver.solve(weights, gram.clone(), [pattern] * len(weights)).weights
            found[name][label] = [
                [float(relative_error(w, k.contiguous(), read[dimension]))
                 for w, k in zip(weights, kept, strict=True)]
                for dimension in cells.dimensions
            ]  # fmt: skip
        write_json(path, found)
        print(f"{name}: {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def one_of(file: Path, name: str) -> Tensor:
    """Return one tensor of a file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def set_ids(store: Store, name: str, rows: int) -> Tensor:
    """Return the first rows of a calibration set's first draw."""
    entry = min((e for e in store.entries if e["key"][1] == name), key=lambda e: e["key"][6])
    return CalibrationSet.open(store.calibration(entry["set"])).ids[:rows]


def with_total(values: Array) -> Array:
    """Put the mean over dimensions before them, shape (sets, 1 + dimensions)."""
    return np.hstack([values.mean(1, keepdims=True), values])


def cell(found: Predicted) -> str:
    if found.rho is None:
        return "-"
    left = "-" if found.rho_left_out is None else f"{found.rho_left_out:+.2f}"
    error = "-" if found.error is None else f"{100 * found.error:.1f}"
    return f"{found.rho:+.2f} / {left} / {error}"


def table(
    cells: Cells, candidates: dict[str, Array], judge: Callable[[Array, Array], Predicted],
    show: Callable[[Predicted], str],
) -> None:  # fmt: skip
    """Print a row a candidate, a column a quantity."""
    print("| predictor | " + " | ".join(cells.quantities) + " |")
    print("|---|" + "---|" * len(cells.quantities))
    for name, values in candidates.items():
        told = [show(judge(values[:, at], cells.means[:, at]))
                for at in range(len(cells.quantities))]  # fmt: skip
        print(f"| {name} | " + " | ".join(told) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=16, help="rows of 512 a dimension")
    parser.add_argument("--every", type=int, default=7)
    options = parser.parse_args()
    results, store = read_results(options.store), open_store(options.store)
    trials = select(results, method=options.method, sparsity=str(options.sparsity))
    (cells,) = tables(results, trials, "primary")
    opened = open_model(cells.condition.model)
    found = find_blocks(opened.model)
    chosen = range(0, len(found), options.every)
    only = [f"{found.name}.{at}.*" for at in chosen]
    own = [name for name, mix in zip(cells.sets, cells.mixes, strict=True) if len(mix) < 2]
    columns = {layer.module: layer.shape[1] for at in chosen for layer in found.prunables(at)}
    most = 4 * sum(width**2 for width in columns.values()) * (len(own) + len(cells.dimensions))
    print(f"Gram matrices take at most {most / 1e9:.1f} GB in {options.work}", file=sys.stderr)
    options.work.mkdir(parents=True, exist_ok=True)
    held_out = {
        name: grams_of(opened, ids, only, options.work / name)
        for name, ids in texts(
            opened, dimensions=cells.dimensions, rows=options.held_out, length=512
        ).items()
    }
    sets = {name: grams_of(opened, set_ids(store, name, options.rows), only, options.work / name)
            for name in own}  # fmt: skip
    key = sha256_json([*(path.name for path in (sets | held_out).values()), options.method,
                       options.sparsity])[:12]  # fmt: skip
    errors = errors_of(
        opened, cells, only, sets, held_out, options.method, Unstructured(options.sparsity),
        options.work / f"errors-{key}.json",
    )  # fmt: skip
    logs = np.array([
        np.concatenate([np.log(by_set[name]) for by_set in errors.values()], axis=1).mean(1)
        for name in cells.sets
    ])  # fmt: skip
    candidates = {
        "- log output error, Gram algebra": with_total(-logs),
        "- KL on held-out text, pruned once": -nan_mean(cells.distance["kl"], 1),
    }
    for column, aliases in distinct(cells, range(len(cells.sets))):
        name = " = ".join([cells.metrics[column], *aliases])
        values = np.repeat(cells.information[:, column : column + 1], len(cells.quantities), 1)
        candidates[name] = values
    print(f"{machine()}, commit {commit()}")
    print(
        f"\n{cells.condition.model}, {cells.condition.label}: {len(cells.sets)} sets; blocks "
        f"{', '.join(map(str, chosen))}, {options.rows} x 512 tokens a source, "
        f"{options.held_out} x 512 a dimension"
    )
    print(
        "\nrank correlation with retention / of each set predicted by the line through the others "
        "/ root mean square error of that, points"
    )
    spread = [predicted(np.arange(len(cells.sets)) + 0.0, cells.means[:, at]).spread
              for at in range(len(cells.quantities))]  # fmt: skip
    table(cells, candidates, predicted, cell)
    print("| mean of the others | " + " | ".join(f"{100 * (one or 0):.1f}" for one in spread)
          + " |")  # fmt: skip
    kinds = [at for group in kinds_of(cells) for at in group]
    strata = strata_of(cells, "single", "kinds")
    print(f"\nrank correlation within kinds of text (prose, code, math), {len(kinds)} single "
          "sources")  # fmt: skip
    table(
        cells, candidates, lambda x, y: predicted(x[kinds], y[kinds], strata),
        lambda one: "-" if one.rho is None else f"{one.rho:+.2f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
