"""What a set keeps, predicted before any benchmark is run: by Gram algebra, by KL, by metrics.

    python benchmarks/predict.py STORE --work DIR [--rows 16] [--every 7] [--sparsity 0.6]
        [--label gemma3 --model builtin:gemma3-270m]

STORE is a study's store with its calibration sets. Of every single source (and every set the model
writes) the first `--rows` rows of its first draw run once through the dense model, and so do
held-out texts of every dimension (of a source that is in a mix alone, a draw of its own);
`calmix.analysis.predict` does the rest as `calmix calibrate predict` does, with Gram matrices in
DIR.
The predictor, the mean over layers of the logarithm of the share of output energy lost, was fixed
before it was compared with anything.

Beside it: KL to the dense model on held-out texts after one prune, and the information metrics,
both from the store. Each is compared with measured retention by rank. Gram matrices that are in DIR
are not made again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from common import commit, machine
from scipy.stats import spearmanr
from torch import Tensor

from calmix.analysis.cells import Cells, select, tables
from calmix.analysis.correlations import distinct
from calmix.analysis.predict import EVERY, ROWS, every_block, keep_grams, lost_output, prediction
from calmix.calibration import CalibrationSet, resolve
from calmix.calibration.texts import texts
from calmix.evaluation.measures import Array
from calmix.models import open_model
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Unstructured
from calmix.study import read_results
from calmix.study.store import Store, open_store


def set_ids(store: Store, model: str, name: str, rows: int) -> Tensor:
    """Return the first rows of a calibration set's first draw."""
    drawn = (e for e in store.index.trials if e.key[:2] == [model, name])
    entry = min(drawn, key=lambda e: e.key[6])
    return CalibrationSet.open(store.path / "calibration" / entry.set).ids[:rows]


def table(cells: Cells, candidates: dict[str, Array]) -> None:
    """Print rank correlations with retention, a row a candidate."""
    print("| predictor | " + " | ".join(cells.quantities) + " |")
    print("|---|" + "---|" * len(cells.quantities))
    for name, values in candidates.items():
        found = [spearmanr(values[:, at], cells.means[:, at]).statistic
                 for at in range(len(cells.quantities))]  # fmt: skip
        print(f"| {name} | " + " | ".join(f"{rho:+.2f}" for rho in found) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--label", help="of a store of several models, the one to look at")
    parser.add_argument("--model", help="what that label stands for")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--held-out", type=int, default=16, help="rows of 512 a dimension")
    parser.add_argument("--every", type=int, default=EVERY)
    options = parser.parse_args()
    results, store = read_results(options.store), open_store(options.store)
    trials = select(results, method=options.method, sparsity=str(options.sparsity))
    trials = [one for one in trials if options.label in (None, one.model)]
    (cells,) = tables(results, trials, "primary")
    opened = open_model(options.model or cells.condition.model)
    only = every_block(opened, options.every)
    own = [one.calibration for one in cells.made if len(one.mix) < 2]

    def kept(name: str, ids: Tensor) -> Path:
        began = time.process_time()
        path = keep_grams(opened, ids, only, options.work)
        told = f"{path.stat().st_size / 1e6:.0f} MB, {time.process_time() - began:.0f} s"
        print(f"{name}: {tuple(ids.shape)}, {told}", file=sys.stderr, flush=True)
        return path

    held_out = texts(opened, dimensions=cells.dimensions, rows=options.held_out, length=512)
    dimensions = {name: kept(name, ids) for name, ids in held_out.items()}
    model = cells.condition.model
    files = {name: kept(name, set_ids(store, model, name, options.rows)) for name in own}
    singles = {source: files[one.calibration] for one in cells.made if len(one.mix) == 1
               for source in one.mix}  # fmt: skip
    for source in {source for one in cells.made for source in one.mix if source not in singles}:
        singles[source] = kept(source, resolve(source, opened, rows=options.rows, length=512).ids)
    mixes = {
        one.calibration: {singles[source]: share for source, share in one.mix.items()}
        or {files[one.calibration]: 1}
        for one in cells.made
    }
    began = time.process_time()
    lost = lost_output(
        opened, only, mixes, dimensions, get_method(options.method),
        Unstructured(options.sparsity),
    )  # fmt: skip
    solving = time.process_time() - began
    told = [prediction(name, lost[name], dict.fromkeys(cells.dimensions, 1 / len(dimensions)))
            for name in cells.sets]  # fmt: skip
    shares = np.array([[one.total, *(one.lost[d] for d in cells.dimensions)] for one in told])
    candidates = {
        "- log output error, Gram algebra": -np.log(shares),
        "- KL on held-out text, pruned once": -cells.distance["kl"],
    }
    for metric, aliases in distinct(cells, range(len(cells.sets))).items():
        values = cells.information[[metric]].to_numpy()
        candidates[" = ".join([metric, *aliases])] = np.repeat(values, len(cells.quantities), 1)
    print(f"{machine()}, commit {commit()}")
    print(
        f"\n{cells.condition.model}, {cells.condition.label}: {len(cells.sets)} sets; every "
        f"{options.every}th block, {options.rows} x 512 tokens a source, {options.held_out} x 512 "
        f"a dimension; {solving / len(cells.sets):.1f} s a set once the Gram matrices are there"
    )
    print("\nrank correlation with retention")
    table(cells, candidates)


if __name__ == "__main__":
    main()
