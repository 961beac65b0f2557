"""`generate`: a calibration set of text the model writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from calmix.cli.calibrate import ForModel
from calmix.cli.common import (
    TEXT,
    AsJson,
    Device,
    Dtype,
    Leakage,
    LeakageTokens,
    Licence,
    Sources,
    TrustRemoteCode,
    note,
    out,
    print_json,
    progress_bar,
    writing_on,
)
from calmix.files import check_output_folder
from calmix.sources import load_sources
from calmix.specs import LENGTH, ROWS, SEED


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("generate", rich_help_panel=TEXT)(generate)


def generate(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            show_default=False,
            help="igsp (several dimensions, chosen by information), self-cal (from a start "
            "token) or sgs (from the first tokens of documents).",
        ),
    ],
    model: ForModel,
    output: Annotated[
        Path, typer.Option("--output", "-o", show_default=False, help="Folder to write.")
    ],
    rows: Annotated[int, typer.Option(help="Rows.")] = ROWS,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = LENGTH,
    seed: Annotated[int, typer.Option(help="Seed of every token.")] = SEED,
    temperature: Annotated[
        float | None,
        typer.Option(show_default="igsp 0.9 (middle), self-cal 1, sgs 0.6", help="Of sampling."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            show_default="auto",
            help="self-cal: from bos (the begin token) or separator (between documents); auto is "
            "bos unless that is a token of chats.",
        ),
    ] = None,
    start_temperature: Annotated[
        float | None,
        typer.Option(show_default=False, help="self-cal: of a text's first token, see --ramp."),
    ] = None,
    ramp: Annotated[
        int | None,
        typer.Option(show_default="0", help="self-cal: tokens from the start temperature on."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(show_default="sgs 50", help="Among the k most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(show_default="sgs 0.95", help="Among the fewest tokens of this probability."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(show_default="sgs 1.2", help="Above 1 discourages.")
    ] = None,
    openers: Annotated[
        Path | None,
        typer.Option(show_default="calmix's own", help="igsp: a .yaml file, by dimension."),
    ] = None,
    candidates: Annotated[
        float | None,
        typer.Option(
            show_default="1",
            help="igsp: write so many times the tokens of the set, and choose among them.",
        ),
    ] = None,
    balance: Annotated[
        float | None,
        typer.Option(
            "--lambda", show_default="1", help="igsp: weight of balanced perplexity; 0 for none."
        ),
    ] = None,
    piece: Annotated[
        int | None, typer.Option(show_default="170", help="igsp: tokens of a piece, about.")
    ] = None,
    band: Annotated[
        float | None,
        typer.Option(show_default="0", help="igsp: share of pieces left out at each end."),
    ] = None,
    repeats: Annotated[
        float | None,
        typer.Option(
            show_default="0.2",
            help="igsp: share of a piece's 4-grams that may repeat; what loops is written anew.",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(show_default="encyclopedia", help="sgs: source of seed texts.")
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(show_default="0.2", help="sgs: share of least likely texts to drop."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(show_default="128", help="Rows written at a time.")
    ] = None,
    leakage: Leakage = None,
    leakage_tokens: LeakageTokens = None,
    licence: Licence = None,
    sources: Sources = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Let the model write its own calibration set, and save it. Interrupted work goes on."""
    from calmix.calibration import open_tokenizer
    from calmix.calibration.resolving import check_guard, check_seeds, guard_of
    from calmix.calibration.selfgen.making import check_generation
    from calmix.calibration.selfgen.making import generate as run
    from calmix.models import check_models, open_model

    options: dict[str, Any] = {
        "start": start, "temperature": temperature, "start_temperature": start_temperature,
        "ramp": ramp, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty,
        "openers": openers, "candidates": candidates, "lambda_": balance, "piece": piece,
        "band": band, "repeats": repeats, "seeds": seeds, "drop": drop,
        "rows": rows, "length": length, "seed": seed, "batch": batch,
        "own": load_sources(sources) if sources is not None else None,
    }  # fmt: skip
    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    files = check_generation(method, **options)
    check_seeds(method, seeds, licence, options["own"])
    check_guard(leakage, leakage_tokens)
    check_models(model, **how)
    check_output_folder(output, inputs=[model, sources, *files], overwrite=overwrite)
    context = open_tokenizer(model, trust_remote_code=trust_remote_code).context
    check_generation(method, context=context, **options)
    opened = open_model(model, **how)
    with progress_bar() as bar:
        made = run(
            method, opened, guard=guard_of(leakage, leakage_tokens, opened),
            writing=writing_on(bar), note=note, **options,
        )  # fmt: skip
    made.save(output, overwrite=overwrite)
    manifest = made.manifest
    if as_json:
        print_json({"folder": str(output), "counts": made.counts} | manifest)
        return
    shares = ", ".join(f"{name} {count}" for name, count in made.counts.items())
    out.print(f"{output}: {made.rows} rows of {made.length} tokens ({shares})", soft_wrap=True)
    out.print(f"4-gram aggregation {manifest['aggregation_4']:.2%}", highlight=False)
    if "selected" in manifest:
        before, after = manifest["first_in_band"], manifest["selected"]
        perplexities = ", ".join(f"{k} {v:.1f}" for k, v in after["perplexity"].items())
        told = ""
        if manifest["pieces"]["in_band"] > manifest["pieces"]["chosen"]:
            told = (
                f"selection within the band: J {before['J']:.4f} to {after['J']:.4f}, 4-gram "
                f"aggregation of the pieces {before['aggregation_4']:.2%} to "
                f"{after['aggregation_4']:.2%}; "
            )
        out.print(f"{told}perplexity {perplexities}", soft_wrap=True, highlight=False)
        if looping := manifest["pieces"]["looping"]:
            out.print(
                f"{looping} of {manifest['pieces']['chosen']} pieces loop, more than "
                f"{manifest['settings']['repeats']:.0%} of their 4-grams: the model wrote none "
                "better, try a higher --temperature",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
