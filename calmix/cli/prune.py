"""`prune` and `perplexity`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from calmix.cli.common import (
    LEFT,
    MAKE,
    AsJson,
    Device,
    Dtype,
    Leakage,
    LeakageTokens,
    Length,
    Licence,
    ModelName,
    OverwriteWork,
    Packing,
    Resume,
    Rows,
    Sources,
    TrustRemoteCode,
    err,
    note,
    out,
    print_json,
    progress_bar,
    writing_on,
)
from calmix.cli.recover import recovering_on, tell_recovery
from calmix.cli.tables import print_rows
from calmix.errors import InputError
from calmix.files import check_apart
from calmix.sources import load_sources
from calmix.specs import prune_and_recover_requests, prune_requests, target_name

if TYPE_CHECKING:
    from calmix.calibration import CalibrationSet
    from calmix.pruning import PruneReport
    from calmix.recovery import RecoveryReport
    from calmix.specs import RecoverRequest


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("prune", cls=PruneCommand, rich_help_panel=MAKE)(prune_command)
    app.command("perplexity", rich_help_panel=LEFT)(perplexity_command)


class PruneCommand(TyperCommand):
    """A verb that also has the options of every method there is, found when it is asked for.

    What is given of them stands in the context's `meta`, under `METHOD_OPTIONS`.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the verb's own parameters, the methods' options, and `--help`."""
        *own, last = super().get_params(ctx)
        return [*own, *_method_options(), last]


METHOD_OPTIONS = "calmix.method options"


def _method_options() -> list[Any]:
    """Return a parameter for every option that a method has, from its schema."""
    from calmix.pruning.methods import methods

    found: dict[str, list[tuple[str, Any]]] = {}
    for method in methods().values():
        for key, field in method.model_fields.items():
            found.setdefault(key, []).append((method.name, field))
    app = typer.Typer(add_completion=False)

    def keep(name: str) -> Callable[[typer.Context, str | None], None]:
        def callback(ctx: typer.Context, value: str | None) -> None:
            if value is not None:
                ctx.meta.setdefault(METHOD_OPTIONS, {})[name] = value

        return callback

    def command(**options: str) -> None: ...

    command.__annotations__ = {
        name: Annotated[
            str | None,
            typer.Option(
                f"--{name.replace('_', '-')}",
                metavar=f"<{getattr(fields[0][1].annotation, '__name__', 'str')}>",
                show_default=", ".join(dict.fromkeys(str(field.default) for _, field in fields)),
                help=f"{fields[0][1].description} ({', '.join(method for method, _ in fields)})",
                callback=keep(name),
                expose_value=False,
                rich_help_panel="Options of methods",
            ),
        ]
        for name, fields in sorted(found.items())
    }
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in command.__annotations__.items()
        ]
    )
    app.command()(command)
    return list(typer.main.get_command(app).params)


def prune_command(
    ctx: typer.Context,
    model: ModelName,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            show_default=False,
            help="Folder to write; with several targets, a folder of folders.",
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            show_default="sparsegpt",
            help="One of calmix methods ls, or several: sparsegpt,wanda; each may have options of "
            "its own: sparsegpt,damping=0.1.",
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            show_default=False, help="Share of weights to prune: 0.6; or several: 0.5,0.6,0.7."
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(show_default=False, help="N:M, keep N of every M inputs of a row: 2:4."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="NAME, a:0.5,b:0.5, uniform:a,b,c, a .yaml file or a saved calibration set; a "
            "NAME is a source (calmix sources ls), a file, a folder or a hub id; self-written "
            "(or self-written,temperature=0.8) is text the model writes.",
        ),
    ] = None,
    rows: Rows = None,
    length: Length = None,
    seed: Annotated[
        int | None, typer.Option(show_default="0", help="Seed of the calibration draw.")
    ] = None,
    packing: Packing = None,
    leakage: Leakage = None,
    leakage_tokens: LeakageTokens = None,
    licence: Licence = None,
    sources: Sources = None,
    propagation: Annotated[
        str | None,
        typer.Option(
            show_default="sequential",
            help="sequential: inputs from pruned layers, one pass; block: the papers' two passes.",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            show_default="uniform",
            help="Sparsity by layer, the same in all: uniform; owl (blocks with outliers keep "
            "more), error (layers that lose more keep more), or a JSON or YAML file.",
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            show_default="routed",
            help="Tokens experts are pruned on: routed (their own, and with a small weight all), "
            "all-tokens, or routed-only.",
        ),
    ] = None,
    expert_smoothing: Annotated[
        float | None,
        typer.Option(
            show_default="32", help="Tokens that the mean over all counts as, with routed."
        ),
    ] = None,
    drop_experts: Annotated[
        float | None,
        typer.Option(
            show_default=False,
            help="Share of every mixture's experts that go whole, those that count least: 0.25; "
            "without --sparsity or --pattern nothing else.",
        ),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            show_default=False,
            help="Recover in the same run, on the same rows (calmix recover): distill or blocks, "
            "with options if need be: distill,epochs=3,lr=1e-4,batch=8.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            help="Prune layers of such names alone: '*.mlp.*', or re: and an expression.",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(show_default=False, help="Leave layers of such names dense."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    max_memory: Annotated[
        str | None,
        typer.Option(show_default="what is free", help="Memory the prune may take, such as 6GiB."),
    ] = None,
    checkpoint_every: Annotated[
        float | None,
        typer.Option(
            show_default="30",
            min=0,
            help="Seconds of work that an interruption may cost; 0: no more than a block.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print time, memory and disk; write nothing.")
    ] = False,
    resume: Resume = False,
    overwrite: OverwriteWork = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model in one shot and write a checkpoint that loads anywhere.

    With several methods, sparsities or patterns the model is read once, and every target gets a
    folder of its own in the output folder. Under torchrun several processes, with a GPU each, prune
    one model together.
    """
    asked: dict[str, Any] = {
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "calibration": calibration,
        "rows": rows,
        "length": length,
        "seed": seed,
        "packing": packing,
        "leakage": leakage,
        "leakage_tokens": leakage_tokens,
        "licence": licence,
        "sources": None if sources is None else load_sources(sources),
        "propagation": propagation,
        "allocation": allocation,
        "experts": experts,
        "expert_smoothing": expert_smoothing,
        "drop_experts": drop_experts,
        "only": only or None,
        "skip": skip or None,
        **ctx.meta.get(METHOD_OPTIONS, {}),
    }
    recovery: RecoverRequest | None = None
    if recover is None:
        requests = prune_requests(**asked)
    else:
        requests, recovery = prune_and_recover_requests(recover, **asked)
    from calmix.pruning import sharing
    from calmix.pruning.budget import parse_memory
    from calmix.pruning.checkpoint import prune_checkpoints

    targets = {
        output / target_name(request) if len(requests) > 1 else output: request
        for request in requests
    }
    if len(requests) > 1 and (output / "config.json").is_file():
        raise InputError(f"{output} is a model folder: name another one for several checkpoints")

    bound = None if max_memory is None else parse_memory(max_memory)
    for target in targets:
        check_apart(target, [sources, allocation])
    if dry_run:
        from calmix.cli.compress import print_taken
        from calmix.compress.estimate import estimate_prune

        taken = estimate_prune(
            model, targets, recovery, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, max_memory=bound,
        )  # fmt: skip
        if as_json:
            print_json([asdict(one) | {"stage": one.stage.name} for one in taken])
        else:
            print_taken(taken, f"{model}, on this machine")
        return

    def started(drawn: CalibrationSet | None) -> None:
        if drawn is not None:
            shares = ", ".join(f"{name} {count}" for name, count in drawn.counts.items())
            err.print(
                f"calibrating on {drawn.rows} rows of {drawn.length} tokens: {shares}",
                soft_wrap=True,
            )

    recovered: list[RecoveryReport] = []
    with sharing.launched(device) as own:
        leads = sharing.processes()[0] == 0  # of several processes one tells
        with progress_bar(shown=leads) as bar:
            task = bar.add_task("pruning blocks", total=None)

            def pruning(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            how: dict[str, Any] = {
                "dtype": dtype,
                "device": own,
                "trust_remote_code": trust_remote_code,
                "overwrite": overwrite,
                "resume": resume,
                "max_memory": bound,
                "checkpoint_every": checkpoint_every,
                "started": started,
                "writing": writing_on(bar),
                "note": note,
            }
            if recovery is None:
                reports = prune_checkpoints(model, targets, progress=pruning, **how)
            else:
                from calmix.recovery.chain import prune_and_recover

                shown = recovering_on(bar, recovery.method)
                made = prune_and_recover(
                    model, targets, recovery, pruning=pruning, recovering=shown, **how
                )
                reports, recovered = [one for one, _ in made], [one for _, one in made]
    if not leads:
        return
    if as_json:
        told = [
            {"output": str(path)} | report.to_json()
            for path, report in zip(targets, reports, strict=True)
        ]
        for one, again in zip(told, recovered, strict=False):
            one["recovery"] = again.to_json()
        print_json(told[0] if len(told) == 1 else told)
        return
    for path, report in zip(targets, reports, strict=True):
        _tell(path, report, brief=len(targets) > 1)
    for path, again in zip(targets, recovered, strict=False):
        tell_recovery(path, again)


def _tell(path: Path, report: PruneReport, *, brief: bool) -> None:
    """Print what became of a target: a line, and if not `brief` a table of the layers' errors."""
    from calmix.pruning.experts import starved

    kinds: dict[str, list[float]] = {}
    for layer in report.layers:
        if layer.error is not None:
            kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append(layer.error)
    if kinds and not brief:
        rows = [
            {
                "layer": kind,
                "blocks": len(errors),
                "mean output error": f"{sum(errors) / len(errors):.2%}",
                "worst": f"{max(errors):.2%}",
            }
            for kind, errors in kinds.items()
        ]
        print_rows(rows, as_json=False)
    damping = report.options.get("damping", 0)
    raised = [layer.name for layer in report.layers if (layer.damping or 0) > damping]
    if raised:
        out.print(f"damping was raised for {len(raised)} layers, first {raised[0]} (calmix.json)")
    if told := starved(report.layers, report.rows):
        out.print(told, soft_wrap=True, highlight=False)
    dense: dict[str, int] = {}
    for one in report.dense:
        dense[one.reason] = dense.get(one.reason, 0) + one.weights
    whole = report.weights + report.dense_weights
    if dense:
        why = ", ".join(f"{reason} {weights / whole:.1%}" for reason, weights in dense.items())
        out.print(f"left dense, of the blocks' weights: {why}", soft_wrap=True, highlight=False)
    if report.dropped:
        before = sum(len(one.scores) for one in report.dropped)
        after = sum(len(one.kept) for one in report.dropped)
        line = f"{before - after} of {before} experts dropped (calmix.json)"
        alone = "" if report.layers else f" in {report.seconds['total']:.1f} s: {path}"
        out.print(line + alone, soft_wrap=True, highlight=False)
    if not report.layers:
        return
    out.print(
        f"{report.pruned:,} of {report.weights:,} weights pruned ({report.sparsity:.4%}) "
        f"in {report.seconds['total']:.1f} s: {path}",
        soft_wrap=True,
        highlight=False,
    )


def perplexity_command(
    model: ModelName,
    text: Annotated[
        Path, typer.Option(show_default=False, help="A .txt, .jsonl or .parquet file.")
    ],
    length: Annotated[int, typer.Option(min=2, help="Window length in tokens.")] = 2048,
    separator: Annotated[str, typer.Option(help="Put between the documents of the file.")] = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity and bits per byte of a text, in non-overlapping windows of one length."""
    from calmix.capability.perplexity import perplexity
    from calmix.models import check_models, open_model
    from calmix.sources.readers import LocalFile

    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    check_models(model, **how)
    documents = LocalFile(type="file", path=text).read()
    whole = separator.join(document.text for document in documents)
    opened = open_model(model, **how)
    with progress_bar() as bar:
        task = bar.add_task("scoring windows", total=None)
        result = perplexity(
            opened,
            whole,
            length=length,
            tick=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print_json({"model": model, "text": str(text)} | asdict(result))
    else:
        out.print(
            f"perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte "
            f"(context {result.length}, {result.windows} windows)",
            highlight=False,
        )
