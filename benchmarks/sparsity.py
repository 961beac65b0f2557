"""By how much a mix is ahead of single sources in likelihood, against sparsity, as one figure.

    python benchmarks/sparsity.py STORE [--mix mix-8] [-o FIGURE.svg]

STORE is `studies/two-models.yaml` as run. For each model, method and sparsity: what the mix keeps
more than the best single source that was run there, and more than the mean of them, in points of
total likelihood (mean over seeds; above the better of two baselines).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from calmix.evaluation.retention import retention
from calmix.report.charts import COLOURS, INK, MARKERS, SETTINGS
from calmix.study import read_results

NAMES = {
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "admm": "ADMM",
    "admm + distill": "ADMM, distilled",
}


def main() -> None:
    """Print a row a point, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--mix", default="mix-8")
    parser.add_argument("-o", type=Path)
    options = parser.parse_args()
    results, found = read_results(options.store), defaultdict[tuple[str, ...], list[float]](list)
    for trial in results.trials:
        if trial.calibration == options.mix or trial.strategy == "single":
            kept = retention(results.paired[trial.id], results.scores[trial.id], resamples=1).total
            key = trial.model, trial.method, trial.pattern, trial.calibration
            found[key].append(100 * (kept.value or 0.0))
    leads = defaultdict[tuple[str, str], list[tuple[float, float, float]]](list)
    for model, method, pattern, text in found:
        if text == options.mix:
            ours = np.mean(found[model, method, pattern, text])
            singles = [
                np.mean(values)
                for (*where, name), values in found.items()
                if where == [model, method, pattern] and name != text
            ]
            ahead = float(ours - max(singles)), float(ours - np.mean(singles))
            leads[model, method].append((float(pattern.rstrip("%")), *ahead))
            print(
                f"{model} {method} {pattern}: {ahead[0]:+.1f} over the best of {len(singles)}, "
                f"{ahead[1]:+.1f} over their mean"
            )
    if options.o is None:
        return
    models, methods = (list(dict.fromkeys(key[at] for key in leads)) for at in (0, 1))
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": "sparsity"}):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained")
        for axes, model in zip(figure.subplots(1, len(models), sharey=True), models, strict=True):
            for method, colour, marker in zip(methods, COLOURS, MARKERS, strict=False):
                points = sorted(leads[model, method])
                axes.plot(
                    [one[0] for one in points],
                    [one[1] for one in points],
                    color=colour,
                    marker=marker,
                    label=NAMES.get(method, method),
                )
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.set(xlabel="sparsity, %", xticks=[one[0] for one in points])
            axes.set_title(model, color=INK, loc="left")
            axes.grid()
        figure.axes[0].set_ylabel("likelihood kept more, points")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=4)
        figure.savefig(options.o, metadata={"Date": None})


if __name__ == "__main__":
    main()
