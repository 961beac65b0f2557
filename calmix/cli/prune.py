"""`prune` and `recover`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmix.cli.common import line, not_here, note, print_costs, print_json, print_layers
from calmix.cli.verbs import verb
from calmix.files import check_apart, size_text
from calmix.options import (
    BITS_METHOD,
    MAX_MEMORY,
    METHOD,
    MODEL,
    DrawOptions,
    ModelOptions,
    Pruning,
    Recovering,
    option,
    path_option,
)
from calmix.progress import Progress
from calmix.pruning.requests import prune_request, recover_request

if TYPE_CHECKING:
    from calmix.calibration.dataset import CalibrationSet
    from calmix.pruning.report import PruneReport

LOSSES = {"distill": "KL of the logits, nats per token", "blocks": "relative error of a block"}


class WorkOptions(DrawOptions, ModelOptions):
    """Options of a long run on a calibration set that writes a folder."""

    max_memory: str | None = MAX_MEMORY
    resume: bool = option(False, "Resume an interrupted run of the same request.")
    overwrite: bool = option(False, "Replace what calmix wrote there.")

    def most(self) -> int | None:
        """Return the bytes of memory to use at most."""
        from calmix.memory import parse_memory

        return None if self.max_memory is None else parse_memory(self.max_memory)

    @contextmanager
    def running(self, what: str) -> Iterator[tuple[Progress, dict[str, Any]]]:
        """Yield progress, and how to run."""

        def started(drawn: CalibrationSet | None) -> None:
            if drawn is not None:
                shares = ", ".join(f"{name} {count}" for name, count in drawn.counts.items())
                note(f"{what} on {drawn.rows} rows of {drawn.length} tokens: {shares}")

        with Progress() as bar:
            yield (
                bar,
                self.opening()
                | {
                    "max_memory": self.most(),
                    "resume": self.resume,
                    "overwrite": self.overwrite,
                    "note": note,
                    "started": started,
                    "writing": bar.writing,
                },
            )


@verb("prune")
def prune(
    pruning: Pruning,
    work: WorkOptions,
    model: str = option(..., MODEL, argument=True, names="model"),
    output: Path = path_option(..., "Folder to write."),
    method: str | None = option(
        None, "Method, e.g. admm or wanda,refit=10.", shown=METHOD, names="method"
    ),
    sparsity: str | None = option(None, "Fraction to prune, e.g. 0.6 or 60%."),
    pattern: str | None = option(None, "N:M, keep N of every M inputs, e.g. 2:4."),
    bits: str | None = option(None, "Bits per weight, e.g. 2.8."),
    dry_run: bool = option(False, "Print memory and disk; write nothing."),
) -> None:
    """Prune or quantise a model in one shot and write a checkpoint that loads anywhere."""
    request = prune_request(
        method=method, sparsity=sparsity, pattern=pattern, bits=bits, **work.options_of(Pruning)
    )
    from calmix.pruning.checkpoint import prune_checkpoint

    check_apart(output, [work.sources])
    if dry_run:
        from calmix.compression.estimate import estimate_prune

        if not_here(model):
            return
        costs = estimate_prune(model, request, max_memory=work.most(), **work.opening())
        print_json([asdict(one) for one in costs])
        print_costs(costs, f"{model}, on this machine")
        return
    with work.running("calibrating") as (bar, how):
        report = prune_checkpoint(model, output, request, progress=bar.of("blocks"), **how)
    print_json({"output": str(output)} | report.to_dict())
    _print_pruned(output, report)


def _print_pruned(path: Path, report: PruneReport) -> None:
    """Print the result: a line, and a table of the layers."""
    from calmix.compression.plan import FEWEST_BITS, MOST_BITS
    from calmix.pruning.experts import starved
    from calmix.pruning.held_out import rows_needed

    print_layers([layer for layer in report.layers if layer.error is not None])
    damping = report.options.get("damping", 0)
    if raised := [layer.name for layer in report.layers if (layer.damping or 0) > damping]:
        line(f"damping was raised for {len(raised)} layers, first {raised[0]} (calmix.json)")
    if warning := starved(report.layers, report.rows):
        line(warning)
    widest = max((one.columns for one in report.layers if one.shrinkage), default=0)
    if report.rows and (rows := rows_needed(widest, report.tokens // report.rows)) > report.rows:
        line(f"few rows for {widest:,} inputs, the most of a layer: --rows {rows} would lose less")
    dense, total = Counter[str](), report.weights + report.dense_weights
    for one in report.dense:
        dense[one.reason] += one.weights
    if dense:
        why = ", ".join(f"{reason} {weights / total:.1%}" for reason, weights in dense.items())
        line(f"left dense, as a share of block weights: {why}")
    done = f"in {report.seconds['total']:.1f} s: {path}"
    if report.dropped:
        before = sum(len(one.scores) for one in report.dropped)
        after = sum(len(one.kept) for one in report.dropped)
        alone = "" if report.layers else f" {done}"
        line(f"{before - after} of {before} experts dropped (calmix.json){alone}")
    for layer in report.outer:
        line(f"{layer.name}: {layer.bits:.2f} bits per weight")
    typed = [layer for layer in (*report.layers, *report.outer) if layer.type]
    types = Counter(layer.type for layer in typed)
    if types:
        kinds = ", ".join(f"{count} {name}" for name, count in types.most_common())
        odd = sum(layer.columns % 256 > 0 for layer in typed)
        why = f" (blocks of 256 do not fit the rows of {odd})" if odd else ""
        line(f"matrices by type: {kinds}{why}")
    if report.bits is not None:
        zeros = "" if types else f", {report.sparsity:.1%} zeros"
        exported, weights, bits = "", report.weights, report.bits
        if types:
            weights = sum(layer.rows * layer.columns for layer in typed)
            taken = sum(layer.rows * layer.columns * (layer.bits or 0) for layer in typed)
            bits = taken / weights
        if FEWEST_BITS <= bits <= MOST_BITS or report.method != BITS_METHOD:
            exported = (
                f": {size_text(weights * bits / 8)} of {size_text(2 * weights)} in 16 bits, once "
                f"exported (calmix export --to {'gguf' if types else 'pack'})"
            )
        line(f"{bits:.2f} bits per weight{zeros}{exported}, {done}")
    elif report.layers:
        line(
            f"{report.pruned:,} of {report.weights:,} weights pruned ({report.sparsity:.4%}) {done}"
        )


@verb("recover")
def recover(
    recovering: Recovering,
    work: WorkOptions,
    pruned: str = option(
        ..., "Pruned model, as calmix prune wrote it.", argument=True, names="path"
    ),
    against: str = option(..., "Dense model it was pruned from.", metavar="DENSE"),
    output: Path = path_option(..., "Folder to write."),
) -> None:
    """Distil the dense model into the remaining weights; pruned weights stay zero.

    Held-out rows decide when to stop.
    """
    request = recover_request(**work.options_of(Recovering))
    from calmix.recovery.checkpoint import recover as run

    check_apart(output, [work.sources])
    with work.running("recovering") as (bar, how):
        report = run(pruned, against, request, output, progress=bar.of(recovering.method), **how)
    print_json({"output": str(output)} | report.to_dict())
    line(
        f"held-out rows ({len(report.held_out)} of {report.rows}), {LOSSES[report.method]}: "
        f"{report.before:.4f} before, {report.after:.4f} after"
    )
    fixed, what = report.zeros, "zero"
    if report.quantised:
        fixed, what = report.quantised, "on their grid"
    line(
        f"{fixed:,} of {report.weights:,} weights stay {what} "
        f"({fixed / report.weights:.4%}), {report.seconds['total']:.1f} s: {output}"
    )
    if report.after >= report.before:
        note("the held-out rows did not improve: the weights are unchanged")
