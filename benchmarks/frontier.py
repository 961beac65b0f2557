"""Answers kept against size on disk: the trials of studies, and quants of llama.cpp beside them.

    python benchmarks/frontier.py STORE... --model LABEL=MODEL [--anchors FOLDER] [-o FIGURE.svg]

A row a trial, the smallest first: bits a weight of the blocks' matrices, megabytes once packed (a
quantised trial's bits as its report has them; of a sparse one the mask, and what compression leaves
of kept weights), KL to the dense model where it was measured, and kept of the answers that the
dense model gets right. FOLDER is one that `benchmarks/anchors.py` has filled. With -o they are
drawn too; with `--distance` answers kept against KL, and how well one orders the other; with
`--likelihood STORE`, of the same trials by a suite that is scored by likelihood, against that too.
A trial that several stores hold is counted once, from the first.
`--keep-at-least FLOORS`, once or more, prints the smallest of each line that keeps them
by the test of `calmix check`; `--lead "LINE - LINE"` by how much one keeps more than the other of
the same pattern, in all, in general, code, mathematics and chat, and in all but sums, with a 95 %
interval of the bootstrap over items and seeds (of one seed: over items); `--texts LABEL` what each
text keeps of a model at each target.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from calmix.compression.plan import embedding_bits
from calmix.deploy.pack import _encode as encode
from calmix.evaluation.behaviour import Pair, behaviour, counted, likely
from calmix.evaluation.floors import judge, parse_floors
from calmix.evaluation.retention import Estimate, retention
from calmix.evaluation.scores import CapabilityScores, load_pair
from calmix.evaluation.suites import WRITTEN
from calmix.models import resolve_model
from calmix.models.shards import stored_tensors, weight_bytes
from calmix.pruning.solvers.grids import mask_bits
from calmix.report.charts import COLOURS, INK, MARKERS, SETTINGS
from calmix.report.words import with_span
from calmix.study import read_results

BITS = ("ecq", "gptq")  # methods whose zeros are levels
EDGES = (0.05, 0.1, 0.2, 0.4, 0.8)  # of KL, in the table
SHARES = (40, 50, 60, 70, 80, 90)  # of likelihood kept, %
CODE = "all, above single tokens"  # the baseline before version 0.3
ABILITIES = ("general", "code", "math", "chat")  # whose answers are generated
PROGRAMS, BUT_SUMS = "pass@1", "-sums"  # a metric; all tasks but one
RECOVERED = ", recovered"
TEXTS = 4  # of one target, that make a row
SAMPLE = 2**22  # words of a tensor that are compressed


class Point(NamedTuple):
    """A model: what it is drawn with, bits a weight, megabytes, and answers kept."""

    line: str
    name: str
    bits: float | None
    size: float
    kl: float | None
    kept: int
    of: int
    share: Estimate
    pair: Pair
    pattern: str
    seed: int
    likely: Mapping[str, float] = {}  # likelihood kept in %, by dimension and in all

    def written(self, part: str = "") -> np.ndarray:
        """Return whether each generated answer is right, of the dense model and this one; `part` is
        an ability, a metric, or `-` and a task that is left out."""
        tasks = zip(*(one.tasks for one in self.pair), strict=True)
        found = [
            both
            for one, other in tasks
            if one.metric in WRITTEN
            and (
                part in ("", one.dimension, one.metric) or (part[0] == "-" and part[1:] != one.name)
            )
            for both in zip(one.values, other.values, strict=True)
        ]
        return np.array(found, float).T

    def right(self, part: str = "") -> np.ndarray:
        """Return 1.0 for each answer of the dense model that is still right, else 0.0."""
        before, after = self.written(part)
        return after[before > 0]


class Sizes:
    """What a model's weights take once packed, by the bits of its blocks' matrices."""

    def __init__(self, model: str) -> None:
        folder = resolve_model(model)
        places = stored_tensors(folder)
        blocks = [one for name, one in places.items() if ".layers." in name and len(one.shape) > 1]
        width = max(one.dtype.itemsize for one in places.values())
        self.matrices = sum(one.size for one in blocks) // width
        outside = weight_bytes(folder) - width * self.matrices

        def share(place: Any) -> float:
            words = np.fromfile(place.path, f"u{width}", SAMPLE, offset=place.start)
            return sum(map(len, encode(words, False, place.dtype))) / words.nbytes

        self._left = share(max(places.values(), key=lambda one: one.size))
        self._rest = outside * self._left
        self._sizes = {name: one.size for name, one in places.items()}
        self._width = width
        self.word = 8 * width * share(max(blocks, key=lambda one: one.size))

    def bits(self, sparsity: float) -> float:
        """Return the bits a weight of matrices that are sparse, and not quantised."""
        return mask_bits(sparsity) + (1 - sparsity) * self.word

    def megabytes(self, bits: float, outer: Mapping[str, float]) -> float:
        """Return the size of the whole model; `outer`: bits of embeddings and head, by name."""
        fewer = sum(
            self._sizes[name] * (own / 8 / self._width - self._left) for name, own in outer.items()
        )
        return (self._rest + fewer + bits / 8 * self.matrices) / 1e6


def of_store(store: Path, sizes: dict[str, Sizes]) -> Iterator[Point]:
    """Yield the finished trials of a study's store."""
    results = read_results(store)
    for trial in results.trials:
        if trial.model not in sizes:
            continue
        told = json.loads((store / "trials" / trial.id / "pruning.json").read_text())
        bits = told.get("bits") or sizes[trial.model].bits(told["sparsity"])
        both = results.paired[trial.id], results.scores[trial.id]
        tasks = zip(*both, strict=True)
        found = counted("all", [(a, b) for a, b in tasks if a.metric in WRITTEN])
        assert found is not None
        suite = {"name": "abilities", "version": 1, "hash": ""}
        dense, pruned = (
            CapabilityScores(trial.model, name, "", suite, tuple(one))
            for name, one in zip(("dense", trial.id), both, strict=True)
        )
        yield Point(
            f"{trial.model}: {trial.method}, {trial.calibration}",
            f"{trial.method} {trial.pattern}, {trial.calibration}, seed {trial.seed}",
            bits,
            sizes[trial.model].megabytes(bits, told.get("embeddings", {})),
            divergence(trial.distance),
            found.kept,
            found.dense,
            found.share,
            (dense, pruned),
            trial.pattern,
            trial.seed,
        )


def reference(points: list[Point]) -> Iterator[str]:
    """Yield what the card shows beside a model: answers that models keep if they are quantised
    to so many bits on the mix with chats, as by `compress` but without recovery."""
    yield "# Share of the dense model's right answers that are kept at so many bits per weight:"
    yield "# benchmarks/frontier.py --reference on studies/results/frontier"
    for bits in (8, 4.5, 4, 3):
        method = f"ecq + embeddings {embedding_bits(bits):g}, mix-8-chat-4"
        shares = {(one.line, one.pattern): round(one.share.value, 3) for one in points}
        kept = {
            name: shares[f"{label}: {method}", f"{bits:g} bits"]
            for label, name in (("smollm2", "SmolLM2-135M"), ("qwen", "Qwen2.5-Coder-0.5B"))
        }
        yield f"{bits:g}: {json.dumps(kept)}".replace('"', "")


def of_smaller(store: Path, sizes: Mapping[str, Sizes]) -> Iterator[str]:
    """Yield how many of a dense model's right answers a smaller dense model gives too."""
    results = read_results(store)
    dense = {trial.model: results.paired[trial.id] for trial in results.trials}
    order = sorted(dense.keys() & sizes.keys(), key=lambda name: sizes[name].matrices)
    for small, large in itertools.combinations(order, 2):
        own = {one.name: dict(zip(one.items, one.values, strict=True)) for one in dense[small]}
        both = [
            (one, replace(one, values=tuple(own[one.name][item] for item in one.items)))
            for one in dense[large]
            if one.metric in WRITTEN
        ]
        found = counted("all", both)
        assert found is not None
        kept = f"{found.kept} of {found.dense}: {with_span(found.share)}"
        yield f"| {small}, dense, beside {large} | {kept} |"


def of_likelihood(store: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    """Return the likelihood that trials keep, by line, pattern and seed."""
    results, found = read_results(store), {}
    for trial in results.trials:
        tasks = zip(results.paired[trial.id], results.scores[trial.id], strict=True)
        dense, pruned = zip(*(both for both in tasks if likely(both[0])), strict=True)
        kept = retention(dense, pruned)
        alone = [replace(task, floors=()) if task.unigram else task for task in dense]
        line = f"{trial.model}: {trial.method}, {trial.calibration}"
        values = {
            "": kept.total,
            CODE: retention(alone, pruned).total,
            **{one.name: one.kept for one in kept.dimensions},
        }
        found[line, trial.pattern, trial.seed] = {
            name: 100 * one.value for name, one in values.items() if one.value is not None
        }
    return found


def both_ways(points: list[Point]) -> Iterator[str]:
    """Yield what models keep of likelihood and of answers, by ability."""
    dimensions = list(dict.fromkeys(name for one in points for name in one.likely if name))
    names = [
        *(f"likelihood, {name or 'all'}" for name in ("", *dimensions)),
        *(f"answers, {name or 'all'}" for name in ("", *ABILITIES)),
    ]
    yield f"| model | MB | {' | '.join(names)} |\n|---|---{'|---' * len(names)}|"
    for one in points:
        values = [
            *(one.likely.get(name) for name in ("", *dimensions)),
            *(100 * one.right(name).mean() for name in ("", *ABILITIES)),
        ]
        cells = ("" if value is None else f"{value:.1f}" for value in values)
        yield f"| {one.line.partition(':')[0]}: {one.name} | {one.size:.1f} | {' | '.join(cells)} |"


def divergence(distance: dict[str, Any] | None) -> float | None:
    """Return the mean KL to the dense model, nats a token, where it was measured."""
    return distance and distance["total"]["kl_mean"]


def of_anchors(folder: Path) -> Iterator[Point]:
    """Yield llama.cpp's quants that were scored."""
    for path in sorted(folder.glob("*Q*.gguf")):
        pair = load_pair(path.with_suffix(".json"))
        found, size = behaviour(pair).answers, path.stat().st_size / 1e6
        text = path.stem.partition("-")[2]
        line = f"llama.cpp, imatrix of {text}" if text else "llama.cpp"
        far = path.with_suffix(".distance.json")
        kl = divergence(json.loads(far.read_text("utf-8")) if far.exists() else None)
        yield Point(
            line,
            f"llama.cpp {path.stem}",
            None,
            size,
            kl,
            found.kept,
            found.dense,
            found.share,
            pair,
            path.stem.partition("-")[0],
            0,
        )


def smallest(points: list[Point], floors: str) -> Iterator[str]:
    """Yield the smallest of each line that keeps the floors, or that none does."""
    for line in dict.fromkeys(one.line for one in points):
        own = [one for one in points if one.line == line]
        kept = [one for one in own if judge(parse_floors(floors), [one.pair]).passed]
        best = f"{kept[0].name} | {kept[0].size:.1f}" if kept else f"none of {len(own)} |"
        yield f"| {floors} | {line} | {best} |"


def leads(points: list[Point], lines: str) -> Iterator[str]:
    """Yield by how much a line keeps more than another, pattern by pattern, in all and by ability:
    of what the dense model has right in every run, as its answers depend on those beside them."""
    ours, theirs = (
        {(one.pattern, one.seed): one for one in points if one.line == line}
        for line in lines.split(" - ")
    )
    both = sorted(ours.keys() & theirs.keys())
    for pattern, group in itertools.groupby(both, key=lambda one: one[0]):
        keys, spans = list(group), []
        for part in ("", *ABILITIES, BUT_SUMS):
            pairs = [(ours[key].written(part), theirs[key].written(part)) for key in keys]
            both = np.all([one[0] for pair in pairs for one in pair], axis=0)
            spans.append(lead(100 * np.array([(one[1] - other[1])[both] for one, other in pairs])))
        yield f"| {lines} | {pattern} | {len(keys)} | {' | '.join(spans)} |"


def lead(apart: np.ndarray) -> str:
    """Return the mean of differences of shape (seeds, items), with its interval."""
    seeds, items = apart.shape
    random = np.random.default_rng(0)
    drawn = [
        apart[random.integers(seeds, size=seeds)][:, random.integers(items, size=items)]
        for _ in range(5000)
    ]
    low, high = np.quantile([one.mean() for one in drawn], [0.025, 0.975])
    return f"{apart.mean():+.1f} [{low:.1f}, {high:.1f}]"


def texts(points: list[Point], model: str) -> Iterator[str]:
    """Yield what each text keeps at each target that several were run at: answers in %, every draw,
    and the mean KL; last the standard deviation between draws of one text."""
    found: dict[str, dict[str, list[Point]]] = {}
    for one in points:
        label, _, rest = one.line.partition(": ")
        method, _, text = rest.partition(", ")
        if label == model and not ({"+", "distill"} & set(method.split())):
            found.setdefault(f"{method} {one.pattern}", {}).setdefault(text, []).append(one)
    targets = {name: own for name, own in found.items() if len(own) >= TEXTS}
    names = list(dict.fromkeys(text for own in targets.values() for text in own))
    yield f"| target | {' | '.join(names)} | between draws |\n|---{'|---' * len(names)}|---|"
    for target, own in targets.items():
        cells = []
        spread = [
            np.var([100 * one.share.value for one in drawn], ddof=1)
            for drawn in own.values()
            if len(drawn) > 1
        ]
        for drawn in (sorted(own.get(name, ()), key=lambda one: one.seed) for name in names):
            kept = ", ".join(f"{100 * one.share.value:.1f}" for one in drawn)
            cells.append(f"{kept} ({np.mean([one.kl for one in drawn]):.3f})" if drawn else "")
        apart = f"{math.sqrt(np.mean(spread)):.1f}" if spread else ""
        yield f"| {target} | {' | '.join(cells)} | {apart} |"


def draw(points: list[Point], path: Path) -> None:
    """Draw a line a method and text through the means of draws, with the intervals of items."""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": "frontier"}):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.subplots()
        lines = list(dict.fromkeys(one.line for one in points))
        for number, line in enumerate(lines):
            own = sorted((one for one in points if one.line == line), key=lambda one: one.size)
            values = [100 * one.share.value for one in own]
            ends = [
                [100 * (one.share.value - one.share.low) for one in own],
                [100 * (one.share.high - one.share.value) for one in own],
            ]
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.errorbar(
                [one.size for one in own],
                values,
                yerr=ends,
                label=line,
                elinewidth=0.8,
                marker=marker,
                color=colour,
                linestyle="none",
            )
            drawn = [
                [one for one in own if one.pattern == pattern]
                for pattern in dict.fromkeys(one.pattern for one in own)
            ]
            axes.plot(
                [np.mean([one.size for one in some]) for some in drawn],
                [100 * np.mean([one.share.value for one in some]) for some in drawn],
                color=colour,
                linestyle="--" if line.startswith("llama.cpp") else "-",
            )
        axes.set(
            xlabel="size of the model's files, MB", ylabel="right answers kept, %", ylim=(0, 100)
        )
        axes.set_title("How many answers are left at which size", color=INK, loc="left")
        axes.grid()
        figure.legend(loc="outside lower left", ncols=2)
        figure.savefig(path, metadata={"Date": None})


def draw_distance(points: list[Point], path: Path) -> Iterator[str]:
    """Draw answers kept against KL, and against likelihood where that is known; yield how they go
    together."""
    far = [one for one in points if one.kl]
    known = [one for one in points if one.likely]
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": "distance"}):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        all_axes = figure.subplots(1, 1 + bool(known), sharey=True, squeeze=False)[0]
        names = sorted({family(one) for one in (*far, *known)})
        models = list(dict.fromkeys(name.partition(", ")[0] for name in names))
        kinds = list(
            dict.fromkeys(name.partition(", ")[2].removesuffix(RECOVERED) for name in names)
        )
        panels = ((far, lambda one: one.kl), (known, lambda one: one.likely[""]))
        for axes, (own, of) in zip(all_axes, panels, strict=False):
            for name in names:
                some = [one for one in own if family(one) == name]
                model, _, kind = name.partition(", ")
                kind = kind.removesuffix(RECOVERED)
                axes.plot(
                    [of(one) for one in some],
                    [100 * one.share.value for one in some],
                    label=name if own is far else None,
                    linestyle="none",
                    marker=MARKERS[models.index(model)],
                    fillstyle="none" if name.endswith(RECOVERED) else "full",
                    color=COLOURS[kinds.index(kind)],
                )
            axes.grid()
        all_axes[0].set(
            xlabel="KL to the dense model, nats a token",
            ylim=(0, 100),
            xscale="log",
            ylabel="right answers kept, %",
        )
        all_axes[-1].set_xlabel("likelihood kept, %") if known else None
        title = "What a distance to the dense model means in answers"
        all_axes[0].set_title(title, color=INK, loc="left")
        all_axes[0].set_xticks([0.025, *EDGES], [f"{edge:g}" for edge in (0.025, *EDGES)])
        all_axes[0].tick_params(axis="x", which="minor", bottom=False)
        figure.legend(loc="outside lower left", ncols=3)
        figure.savefig(path, metadata={"Date": None})
    yield from together("KL, nats a token", (0, *EDGES, math.inf), far, lambda one: one.kl)
    for name in ("", CODE) if known else ():
        yield ""
        yield from together(
            f"likelihood kept, {name or 'all'}, %",
            (0, *SHARES, math.inf),
            known,
            lambda one, name=name: max(0, one.likely[name]),
        )


def together(
    name: str, edges: Sequence[float], points: list[Point], of: Callable[[Point], float]
) -> Iterator[str]:
    """Yield the ranges of answers, and of programs among them, kept between the edges of another
    measure, and how well that orders the answers, over all and by model."""
    yield f"| {name} | models | answers kept, % | programs kept, % |\n|---|---|---|---|"
    for least, most in itertools.pairwise(edges):
        if own := [one for one in points if least <= of(one) < most]:
            end = f"to {most:g}" if most < math.inf else "and more"
            kept = ([100 * one.right(part).mean() for one in own] for part in ("", PROGRAMS))
            spans = " | ".join(f"{min(one):.0f} to {max(one):.0f}" for one in kept)
            yield f"| {least:g} {end} | {len(own)} | {spans} |"
    yield f"\n{len(points)} models, rank correlation {ordered(points, of):.2f}"
    for model in dict.fromkeys(one.line.partition(":")[0] for one in points):
        own = [one for one in points if one.line.startswith(f"{model}:")]
        if len(own) > 4:
            yield f"{model}: {len(own)} models, {ordered(own, of):.2f}"


def ordered(points: list[Point], of: Callable[[Point], float]) -> float:
    """Return the rank correlation of a measure with the answers kept."""
    return spearmanr([of(one) for one in points], [one.share.value for one in points]).statistic


def family(point: Point) -> str:
    """Return what was done to a model: zeros, bits, both, or llama.cpp's quants."""
    if point.line.startswith("llama.cpp"):
        return "llama.cpp"
    model, _, rest = point.line.partition(": ")
    method = rest.partition(", ")[0]
    kind = "both" if "bits=" in method else "bits" if method.startswith(BITS) else "zeros"
    return f"{model}, {kind}{RECOVERED * ('distill' in method)}"


def main() -> None:
    """Print all points, and draw them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--model", action="append", required=True, metavar="LABEL=MODEL")
    parser.add_argument("--anchors", type=Path)
    parser.add_argument("--keep-at-least", action="append", default=[], metavar="FLOORS")
    parser.add_argument("--lead", action="append", default=[], metavar="'LINE - LINE'")
    parser.add_argument("--texts", action="append", default=[], metavar="LABEL")
    parser.add_argument(
        "--only", default="", help="LINE or LINE=LABEL to draw, separated by semicolons"
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--distance", type=Path, metavar="FIGURE.svg")
    parser.add_argument("--likelihood", type=Path, metavar="STORE")
    parser.add_argument("--reference", type=Path, metavar="FILE.yaml")
    asked = parser.parse_args()
    sizes = {
        label: Sizes(model) for label, _, model in (text.partition("=") for text in asked.model)
    }
    trials = (one for store in reversed(asked.stores) for one in of_store(store, sizes))
    points = list({(one.line, one.pattern, one.seed): one for one in trials}.values())
    points += of_anchors(asked.anchors) if asked.anchors else []
    if asked.likelihood:
        kept = of_likelihood(asked.likelihood)
        points = [
            one._replace(likely=kept.get((one.line, one.pattern, one.seed), {})) for one in points
        ]
    points.sort(key=lambda one: one.size)
    print("| model | bits a weight | MB | KL | answers kept, % |\n|---|---|---|---|---|")
    for one in points:
        bits, kl = ("" if x is None else f"{x:.{n}f}" for x, n in ((one.bits, 2), (one.kl, 3)))
        kept = f"{one.kept} of {one.of}: {with_span(one.share)}"
        print(f"| {one.name} | {bits} | {one.size:.1f} | {kl} | {kept} |")
    for store in asked.stores:
        print(*of_smaller(store, sizes), sep="\n")
    if asked.likelihood:
        print("", *both_ways([one for one in points if one.likely]), sep="\n")
    for floors in asked.keep_at_least:
        print("", *smallest(points, floors), sep="\n")
    for lines in asked.lead:
        print("", *leads(points, lines), sep="\n")
    for label in asked.texts:
        print("", *texts(points, label), sep="\n")
    if asked.output:
        only = dict(one.partition("=")[::2] for one in asked.only.split(";") if one)
        drawn = (
            [one._replace(line=only[one.line] or one.line) for one in points if one.line in only]
            if only
            else points
        )
        draw(drawn, asked.output)
    if asked.reference:
        asked.reference.write_text("\n".join(reference(points)) + "\n", "utf-8")
    if asked.distance:
        print("", *draw_distance(points, asked.distance), sep="\n")


if __name__ == "__main__":
    main()
