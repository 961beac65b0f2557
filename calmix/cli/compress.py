"""`compress`, `report` and `check`."""

from __future__ import annotations

import time
import webbrowser
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import typer

from calmix.cli.common import line, not_here, note, print_costs, print_json, print_table
from calmix.cli.verbs import verb
from calmix.compression.folder import check_foreign
from calmix.errors import InputError
from calmix.evaluation.prompts import read_prompts
from calmix.evaluation.scores import load_pairs
from calmix.files import cached_sha256, check_apart, check_output_file, check_unlocked, write_json
from calmix.options import Compression, Share, advanced, option, path_option
from calmix.progress import Progress, duration
from calmix.pruning.type_recipes import recipe_name

KERNEL_NOTE = "kernels: for other levels than 4 and 8 bits vLLM needs a GPU"
SPEED_NOTE = (
    "speed: at the end the dense model and the file are timed, which needs the memory of the dense "
    "model in transformers once more"
)


@verb("compress")
def compress(
    options: Compression,
    output: Path = path_option(..., "Folder to write, or to resume in."),
    recipe: Path | None = option(
        None, "YAML file of options, such as an earlier run's recipe.yaml.", metavar="FILE"
    ),
    dry_run: bool = option(False, "Print commands, memory, disk; write nothing."),
    resume: bool = advanced(False, "Resume an interrupted run, as compress always does."),
    open: bool = option(False, "Open the card in a browser at the end."),
) -> None:
    """Quantise a model (or prune and distil it), evaluate it, and write its report card.

    Every stage keeps its result in the output folder. If interrupted, run the same command again to
    resume. calmix check OUT tests the result against floors of your own.

    Types, the size they give Qwen2.5-Coder-1.5B, and right answers of SmolLM2-135M and
    Qwen2.5-Coder-0.5B where measured, in % of the dense model's (docs/results.md and
    docs/lab/methods.md). There are more, e.g. IQ3_S.

    \b
      Q8_0     1.89 GB
      Q6_K     1.46 GB
      Q5_K_M   1.28 GB
      Q4_K_M   1.11 GB  100 and -; the default
      IQ4_NL   1.06 GB  96 and 95
      Q3_K_M   0.92 GB
      Q2_K     0.75 GB
      IQ2_XXS  0.58 GB
      --for vllm --bits 3 --group 32: 58 and 80
    """
    # Before imports that take seconds.
    if options.type:
        recipe_name(options.type)
    if options.prompts is not None:
        read_prompts(options.prompts)
    check_apart(output, [options.model])
    check_foreign(output)
    from calmix import words
    from calmix.compression.card import CARD_PAGE, read_card
    from calmix.compression.compress import begin, dry, make
    from calmix.compression.plan import (
        check_options,
        product_of,
        restricted_sources,
        wide_embeddings,
    )
    from calmix.compression.recipe import with_recipe
    from calmix.compression.search import HELPS
    from calmix.deploy.speed import engine
    from calmix.evaluation.summary import against_itself

    if recipe is not None:
        options = with_recipe(options, recipe)
    if dry_run:
        check_options(options)
        if not_here(options.model):
            return
        search = begin(options, output)
        costs, request = dry(search), search.request
        title = f"{options.model} at {request.target}, effort {options.effort}, on this machine"
        if search.floors:
            title = f"{options.model} to keep {options.keep_at_least}, with all candidates"
        print_json([asdict(one) for one in costs])
        print_costs(costs, title)
        if request.calibration and not request.saved:
            line(f"calibration: {request.rows} rows of {request.length} tokens")
        product = product_of(request)
        for text in (
            wide_embeddings(request),
            KERNEL_NOTE if product == "vllm" and request.bits not in (None, 4, 8) else "",
            restricted_sources(request),
            SPEED_NOTE if product == "gguf" and engine() else "",
        ):
            if text:
                line(words.wrapped(text))
        if search.floors:
            line(words.wrapped(search.provable()))
        return
    began = time.monotonic()
    search, seconds = make(options, output)
    result: dict[str, Any] = {"output": str(output), "model": None}
    if search.floors:
        result |= {"search": {"candidates": search.candidates} | search.state}
        print_table(search.rows(), title="candidates: % of dense (proven %)")
        for text in (search.why(), *search.promise):
            line(words.wrapped(text))
        if search.bits is None:
            text = f"refused: no candidate meets the floors. {HELPS}"
            if search.left:
                text = "stopped: no candidate meets the floors yet."
            print_json(result)
            line(words.wrapped(text))
            raise typer.Exit(1)
    page, card = output / CARD_PAGE, read_card(output)
    result |= {
        "model": str(card.model),
        "card": str(page),
        "seconds": seconds,
        "behaviour": card.behaved.to_dict(),
    }
    print_json(result)
    for text in (card.shortly, against_itself(card.behaved)):
        if text:
            line(words.wrapped(text, rest="  "))
    for text in (card.split, *card.changed):
        if text:
            line(words.wrapped(text, rest="  "))
    line(f"size: {card.sizes}")
    if card.speed:
        line(f"speed: {card.speed}")
    if card.gguf and card.substitutes:
        line(
            f"types: {card.substitutes} matrices have a substitute, because 256 does not divide "
            "their rows"
        )
    if card.file and not card.gguf:
        line(f"levels: {card.levels}, and a scale {card.groups}")
        if {*card.file["levels"]} - {"4", "8"}:
            line(KERNEL_NOTE)
    if card.restricted:
        line(words.wrapped(card.restricted, rest="  "))
    for command in card.runs:
        line(f"run: {command}")
    line(f"card: {page}, after {duration(time.monotonic() - began)}")
    line(f"next: {card.next}")
    if card.instead:
        line(f"instead: {card.instead}")
    if open:
        webbrowser.open(page.resolve().as_uri())


@verb("report", json=False)
def report(
    folder: Path = option(..., "Folder of calmix compress.", argument=True, names="path"),
    output: Path | None = path_option(None, "Page to write.", shown="OUT/card.html"),
) -> None:
    """Write the report card of a compressed model."""
    from calmix.compression.card import CARD_PAGE, write_card

    check_unlocked(folder)
    if output is not None:  # it may stand beside the default page
        inside = folder.iterdir() if folder.is_dir() else ()
        inputs = [path for path in inside if path.suffix != ".html"]
        check_output_file(output, inputs=inputs, overwrite=True)
        if output.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"cannot write a page to {output}: name an .html file")
    with Progress() as bar:
        card = write_card(folder, bar, page := output or folder / CARD_PAGE)
    if card.speed:
        line(f"speed: {card.speed}")
    line(f"report: {page}")


@verb("check")
def check(
    results: tuple[Path, ...] = option(
        ...,
        "Folder of calmix compress, or files of calmix evaluate -o.",
        argument=True,
        names="path",
    ),
    keep_at_least: str | None = option(
        None,
        "Fractions to keep, e.g. 0.9 or code=0.9,general=80%.",
        metavar="FLOORS",
        shown="those the folder was made for",
    ),
    confidence: Share | None = option(
        None, "Confidence of the test, e.g. 0.99.", ge=0.8, le=0.999, shown="0.95"
    ),
    output: Path | None = path_option(None, "JSON file to write.", shown="OUT/check.json"),
    overwrite: bool = option(False, "Replace the output file."),
) -> None:
    """Test whether a model meets its floors; exit code 1 if it does not.

    No model is opened: it reads the scores that compress or evaluate --against wrote, and hashes
    the model that they are of.
    """
    from calmix import words
    from calmix.compression.folder import BEHAVIOUR, COMPRESSED, PROMPTS, SCORES
    from calmix.compression.results import Results, read_compressed, recorded, result_in
    from calmix.evaluation.floors import (
        CONFIDENCE,
        FILE,
        check_floors,
        parse_floors,
        proven,
        record,
    )

    if missing := [path for path in results if not path.exists()]:
        raise InputError(f"there is no file or folder {missing[0]}")
    folders, files, request = [path for path in results if path.is_dir()], results, {}
    if folders:
        if len(results) > 1:
            raise InputError("a folder is checked alone: name one folder, or only files")
        check_unlocked(folders[0])
        request = (written := read_compressed(folders[0]))["request"]
        alone = request.get("suite", "offline") != "offline"
        names = [SCORES if alone else BEHAVIOUR, *[PROMPTS] * bool(request.get("prompts"))]
        files = tuple(result_in(folders[0], name) for name in names)
    wanted = keep_at_least or request.get("keep_at_least")
    if wanted is None:
        raise InputError("--keep-at-least is missing: name the floors, e.g. code=0.9,general=80%")
    floors, carded = parse_floors(wanted), output is None and bool(folders)
    path = folders[0] / FILE if carded else output
    if path is not None:
        inputs = [*files, *(folder / COMPRESSED for folder in folders)]
        check_output_file(path, inputs=inputs, overwrite=overwrite or carded)
    pairs = load_pairs(files)
    proof = Results(partial(cached_sha256, again=True))  # a gate reads the model's every byte
    if folders:
        proof.check_all(recorded(folders[0], written))
    for file, (_, scores) in zip(files, pairs, strict=True) if not folders else ():
        if not proof.check_scores(file, scores):
            note(
                f"only the scores of {scores.model} were checked: its files are not here, or not "
                "written by calmix"
            )
    check = check_floors(floors, pairs, confidence or request.get("confidence") or CONFIDENCE)
    content = record(check, floors, pairs)
    if path is not None:
        write_json(path, content)
    print_json(content)
    rows = [
        {
            "ability": one.ability,
            "measure": one.measure,
            "items": one.items,
            "of dense %": words.percent(one.kept),
            "proven %": proven(one.bound),
            "required %": words.percent(one.floor),
            "": "kept" if one.passed else "too few" if one.too_few else "not kept",
        }
        for one in check.tested
    ]
    dense, pruned = pairs[0]
    print_table(rows, title=f"{pruned.model} against {dense.model}", least=["measure", "items"])
    for text in check.lines():
        line(words.wrapped(text))
    if path is not None:
        note(f"wrote {path}")
    if carded:
        note(f"next: calmix report {folders[0]} adds it to the card")
    if not check.passed:
        raise typer.Exit(1)
