"""`calibrate` and `measure`: make a calibration set, tell what its text is like."""

from __future__ import annotations

from pathlib import Path
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
    Packing,
    Sources,
    TrustRemoteCode,
    note,
    out,
    print_json,
    progress_bar,
    writing_on,
)
from calmix.cli.tables import print_rows
from calmix.errors import InputError
from calmix.files import check_output_folder

Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        show_default=False,
        help="NAME, a:0.5,b:0.5, uniform:a,b,c or a .yaml file; a NAME is a source (calmix "
        "sources ls), a file, a folder or a hub id. Or self-written, igsp, self-cal or sgs.",
    ),
]
ForModel = Annotated[
    str, typer.Option("--model", "-m", show_default=False, help="The model it is for.")
]


WRITTEN = ("settings", "aggregation_4", "perplexity", "pieces", "J")  # of text a model wrote


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("calibrate", rich_help_panel=TEXT)(calibrate)
    app.command("measure", rich_help_panel=TEXT)(measure)
    anything = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("generate", hidden=True, context_settings=anything)(generate)


def generate() -> None:
    """Say the verb's new name."""
    raise InputError(
        "calmix generate is now calmix calibrate, with settings behind the generator's name: "
        "calmix calibrate self-written,temperature=0.8 --model MODEL -o FOLDER"
    )


def calibrate(
    spec: Spec,
    model: ForModel,
    output: Annotated[
        Path, typer.Option("--output", "-o", show_default=False, help="Folder to write.")
    ],
    rows: Annotated[int | None, typer.Option(show_default="64", help="Rows.")] = None,
    length: Length = None,
    seed: Annotated[int | None, typer.Option(show_default="0", help="Seed of the draw.")] = None,
    packing: Packing = None,
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
    """Draw a calibration set from sources and save it."""
    from calmix.calibration import ask, open_tokenizer, resolve
    from calmix.models import check_models, open_model

    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    draw: dict[str, Any] = {
        "rows": rows, "length": length, "seed": seed, "packing": packing,
        "leakage": leakage, "leakage_tokens": leakage_tokens, "licence": licence,
        "sources": sources,
    }  # fmt: skip
    asked = ask(spec, **draw)
    if asked.saved is not None:
        raise InputError(f"{spec} is a calibration set already: copy the folder, or export it")
    if not asked.runs_model and (dtype, device) != ("auto", "auto"):
        raise InputError("--dtype and --device have no effect: this set is drawn without the model")
    check_models(model, **how)
    check_output_folder(output, inputs=[model, sources, *asked.files], overwrite=overwrite)
    opened: Any = open_tokenizer(model, trust_remote_code=trust_remote_code)
    ask(spec, context=opened.context, **draw)
    if asked.runs_model:
        opened = open_model(model, **how)
    with progress_bar() as bar:
        task = bar.add_task("drawing", total=None)
        made = resolve(
            spec,
            opened,
            tick=lambda name: bar.update(task, description=f"drew {name}", advance=1),
            writing=writing_on(bar),
            note=note,
            **draw,
        )
    made.save(output, overwrite=overwrite)
    dropped = _dropped(made.manifest)
    if as_json:
        print_json(
            {
                "folder": str(output),
                "rows": made.rows,
                "length": made.length,
                "counts": made.counts,
                "sha256": made.sha256,
                "leakage": "off" if dropped is None else {"dropped": dropped},
            }
            | {key: made.manifest[key] for key in WRITTEN if key in made.manifest}
        )
        return
    shares = ", ".join(f"{name} {count}" for name, count in made.counts.items())
    out.print(f"{output}: {made.rows} rows of {made.length} tokens ({shares})", soft_wrap=True)
    if "generated" in made.manifest:
        _print_written(made.manifest)
    if dropped is None:
        out.print("not checked for leakage")
    else:
        guard = made.manifest["leakage"]
        out.print(
            f"dropped {sum(dropped.values())} of {sum(guard['checked'].values())} documents: they "
            f"share {guard['tokens']} tokens in a row with an item of suite {guard['suite']}",
            soft_wrap=True,
        )


def _print_written(manifest: dict[str, Any]) -> None:
    perplexities = ", ".join(f"{k} {v:.1f}" for k, v in manifest["perplexity"].items())
    out.print(f"4-gram aggregation {manifest['aggregation_4']:.2%}, perplexity {perplexities}",
              soft_wrap=True, highlight=False)  # fmt: skip
    if looping := manifest["pieces"]["looping"]:
        out.print(
            f"{looping} texts repeat more than {manifest['settings']['repeats']:.0%} of their "
            "4-grams: the model wrote none better, try a higher temperature",
            soft_wrap=True, highlight=False,
        )  # fmt: skip


def _dropped(manifest: dict[str, Any]) -> dict[str, int] | None:
    leakage = manifest["leakage"]
    if leakage == "off":
        return None
    return {name: len(entries) for name, entries in leakage["dropped"].items()}


def measure(
    specs: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC...",
            show_default=False,
            help="Sources, mixes, .yaml files or saved sets; 'offline': every offline source.",
        ),
    ],
    model: ForModel,
    rows: Annotated[int, typer.Option(help="Rows of the budget.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    draws: Annotated[int, typer.Option(help="Draws, each with its own seed.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first draw.")] = 0,
    packing: Packing = None,
    reference: Annotated[
        str | None,
        typer.Option(show_default="the other SPECs pooled", help="SPEC for coverage and mismatch."),
    ] = None,
    perplexity: Annotated[
        bool, typer.Option(help="Compute perplexity, which runs the model.")
    ] = True,
    sources: Sources = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", show_default=False, help="Write to a .json or .csv file."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure what calibration text is like, all at one token budget."""
    from calmix.calibration import open_tokenizer
    from calmix.calibration.measuring import check_request, check_result_file, table
    from calmix.calibration.measuring import measure as run
    from calmix.models import check_models, open_model
    from calmix.sources import offline_sources

    names = [n for spec in specs for n in (offline_sources() if spec == "offline" else [spec])]
    asked: dict[str, Any] = {
        "rows": rows, "length": length, "draws": draws, "seed": seed,
        "packing": "concat" if packing is None else packing, "reference": reference,
        "perplexity": perplexity,
        "sources": sources,
    }  # fmt: skip
    files = check_request(names, **asked)
    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    check_models(model, **how)
    if output is not None:
        check_result_file(output, [model, sources, *files])
    opened: Any
    if perplexity:
        opened = open_model(model, **how)
    else:
        opened = open_tokenizer(model, trust_remote_code=trust_remote_code)
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=len(names) * draws)
        measurement = run(
            names,
            opened,
            **asked,
            tick=lambda name: bar.update(task, description=f"measured {name}", advance=1),
        )
    if output is not None:
        measurement.save(output)
    if as_json:
        print_json(measurement.to_dict())
        return
    budget = measurement.budget
    print_rows(
        table(measurement),
        as_json=False,
        least=[] if len(names) <= 4 else None,
        title=f"{budget['tokens']} tokens a draw ({rows} x {length}), {draws} draws from seed "
        f"{seed}; mean ± half of the 95 % interval",
    )
    for name, told in measurement.notes.items():
        out.print(f"{name}: {told}", soft_wrap=True)
