"""`predict`: which calibration set keeps most, before anything is pruned."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from calmix.cli.common import (
    TEXT,
    AsJson,
    Device,
    Dtype,
    Leakage,
    LeakageTokens,
    Length,
    Licence,
    ModelName,
    Sources,
    TrustRemoteCode,
    note,
    out,
    print_json,
    progress_bar,
    writing_on,
)
from calmix.cli.study_report import parse_weights
from calmix.cli.tables import print_rows
from calmix.errors import InputError
from calmix.specs import METHOD


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("predict", rich_help_panel=TEXT)(predict_command)


def predict_command(
    model: ModelName,
    calibrations: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC...",
            show_default=False,
            help="Calibration sets, as for calmix prune: sources, mixes, files, self-written.",
        ),
    ],
    method: Annotated[
        str, typer.Option(help="How it is to be pruned, with options: admm,refit=5.")
    ] = METHOD,
    sparsity: Annotated[
        float | None, typer.Option(show_default="0.6", help="Share of weights to prune.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(show_default=False, help="N:M, instead of a share.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=NUMBER,...",
            show_default="all the same",
            help="What counts in the total, such as general=1,code=2.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            show_default="held-out text of each dimension",
            help="Also your own text, or yours for a dimension: code=mine.jsonl (repeat).",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(show_default="16", help="Rows of each source.")
    ] = None,
    length: Length = None,
    seed: Annotated[int | None, typer.Option(show_default="0", help="Seed of the draws.")] = None,
    every: Annotated[
        int | None, typer.Option(show_default="7", help="Look at every k-th block.")
    ] = None,
    leakage: Leakage = None,
    leakage_tokens: LeakageTokens = None,
    licence: Licence = None,
    sources: Sources = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Order calibration sets by what a prune on them would lose, without pruning.

    Each source runs through the dense model once; further mixes of it take seconds. The shares
    order sets and are no retention: docs/analysis.md says how well.
    """
    from calmix.analysis.predict import EVERY, LENGTH, ROWS, check_request, predict
    from calmix.analysis.recommend import check_weights
    from calmix.capability.texts import builtin_readers, parse_texts, texts
    from calmix.models import check_models, open_model
    from calmix.study.spec import as_pattern

    if sparsity is not None and pattern is not None:
        raise InputError("give either --sparsity (such as 0.5) or --pattern (such as 2:4)")
    target = sparsity if pattern is None else pattern
    shares, own_texts = parse_weights(weights), parse_texts(text or ())
    if shares is not None:
        check_weights(shares, (*builtin_readers(), *own_texts), "the held-out text")
    asked: dict[str, Any] = {
        "method": method,
        "rows": ROWS if rows is None else rows,
        "length": LENGTH if length is None else length,
        "every": EVERY if every is None else every,
        "sources": sources,
        "seed": seed,
        "leakage": leakage,
        "leakage_tokens": leakage_tokens,
        "licence": licence,
    }
    pruned_to = None if target is None else as_pattern(target)
    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    check_request(calibrations, **asked)
    check_models(model, **how)
    opened = open_model(model, **how)
    with progress_bar() as bar:
        task = bar.add_task("predicting", total=None)
        made = predict(
            opened,
            calibrations,
            pattern=pruned_to,
            weights=shares,
            held_out=texts(opened, own_texts, rows=ROWS, length=LENGTH),
            tick=lambda what: bar.update(task, description=what, advance=1),
            note=note,
            writing=writing_on(bar),
            **asked,
        )
    if as_json:
        print_json([asdict(one) for one in made])
        return
    rows_told = [
        {"calibration": one.calibration, "total": f"{one.total:.2%}"}
        | {name: f"{value:.2%}" for name, value in one.lost.items()}
        for one in made
    ]
    print_rows(rows_told, as_json=False, text=["calibration"], title="output energy lost")
    out.print("the least first; it orders sets and is no retention", highlight=False)
