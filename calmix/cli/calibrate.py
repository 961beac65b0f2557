"""`calibrate`: make calibration sets, list sources of text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from calmix.cli.common import line, note, print_json, print_table
from calmix.cli.verbs import group, verb
from calmix.errors import InputError, nearest
from calmix.files import check_output_folder
from calmix.options import (
    DrawOptions,
    Licence,
    ModelOptions,
    licence_option,
    option,
    own_sources_option,
    path_option,
)
from calmix.progress import Progress
from calmix.sources.licences import allowed, short
from calmix.sources.mixes import GENERATOR_NAMES as GENERATORS
from calmix.sources.mixes import MIXES, mix_text
from calmix.sources.registry import builtin_sources, get_source, own_sources

WRITING_FACTS = ("settings", "aggregation_4", "perplexity", "pieces", "J")  # of self-written text
calibrate = group("calibrate", default="draw")


@verb("draw", of=calibrate)
def draw(
    drawn: DrawOptions,
    how: ModelOptions,
    spec: str = option(
        ...,
        "Source, a:0.5,b:0.5, uniform:a,b, file; or self-written.",
        argument=True,
        names="calibration",
    ),
    model: str = option(..., "Model that the set is for.", flag="--model -m"),
    output: Path = path_option(..., "Folder to write."),
    overwrite: bool = option(False, "Replace a calibration set."),
) -> None:
    """Draw a calibration set from sources, or let the model write it.

    For text that the model writes, SPEC is self-written, chat, igsp, self-cal or sgs, and may have
    settings: igsp,candidates=2.
    """
    from calmix.calibration.request import calibration_set, parse_calibration
    from calmix.calibration.tokenizer import open_tokenizer
    from calmix.models.loading import check_length
    from calmix.models.opening import check_models, open_model

    request = parse_calibration(spec, **drawn.drawn())
    if request.saved is not None:
        raise InputError(f"{spec} is already a calibration set: copy the folder or export it")
    written = bool(request.written)
    if not written and (how.dtype, how.device) != ("auto", "auto"):
        raise InputError("--dtype and --device have no effect: this set is drawn without the model")
    inputs = [model, drawn.sources, *request.files]
    check_output_folder(output, inputs=inputs, overwrite=overwrite)
    check_models(model, **how.opening())
    opened: Any = open_tokenizer(model, trust_remote_code=how.trust_remote_code)
    check_length(request.draw.length, opened.context)
    if written:
        opened = open_model(model, **how.opening())
    with Progress() as bar:
        drawn_set = calibration_set(
            request, opened, writing=bar.writing, note=note, tick=bar.each("drawing")
        )
    drawn_set.save(output, overwrite=overwrite)
    manifest, leakage = drawn_set.manifest, drawn_set.manifest["leakage"]
    dropped = {} if leakage == "off" else {k: len(ids) for k, ids in leakage["dropped"].items()}
    print_json(
        {
            "folder": str(output),
            "rows": drawn_set.rows,
            "length": drawn_set.length,
            "counts": drawn_set.counts,
            "chat_turns": manifest.get("chat_turns"),
            **{key: manifest[key] for key in WRITING_FACTS if key in manifest},
            "sha256": drawn_set.sha256,
            "leakage": leakage if leakage == "off" else {"dropped": dropped},
        }
    )
    shares = ", ".join(f"{name} {count}" for name, count in drawn_set.counts.items())
    line(f"{output}: {drawn_set.rows} rows of {drawn_set.length} tokens ({shares})")
    if turns := manifest.get("chat_turns"):
        line(f"{turns} user turns in the model's chat format")
    if "generated" in manifest:
        values = ", ".join(f"{k} {v:.1f}" for k, v in manifest["perplexity"].items())
        line(f"4-gram aggregation {manifest['aggregation_4']:.2%}, perplexity {values}")
        if looping := manifest["pieces"]["looping"]:
            line(
                f"{looping} texts repeat more than {manifest['settings']['repeats']:.0%} of their "
                "4-grams after all retries: try a higher temperature"
            )
    if leakage == "off":
        line("not checked for leakage")
    else:
        line(
            f"dropped {sum(dropped.values())} of {sum(leakage['checked'].values())} documents, "
            f"which share {leakage['words']} words in a row with an item of suite "
            f"{leakage['suite']}"
        )


@verb("sources", of=calibrate)
def list_sources(
    sources: Path | None = own_sources_option(),
    licence: Licence = licence_option(),
    dimension: str | None = option(None, "Only sources of this dimension, e.g. code."),
) -> None:
    """List the sources; files, folders and hub ids (owner/name) are sources too."""
    from calmix import words

    known = {**builtin_sources(), **own_sources(sources)}
    dimensions = {source.dimension for source in known.values()}
    if dimension is not None and dimension not in dimensions:
        hint = nearest(dimension, dimensions)
        raise InputError(f"no source has dimension '{dimension}': {hint}")
    selection = [
        source
        for source in known.values()
        if allowed(source.licence, licence) and dimension in (None, source.dimension)
    ]
    rows = [
        {
            "name": source.name,
            "dimension": source.dimension,
            "use": source.use,
            "licence": source.licence,
            "available": source.reader.availability,
            "kind": source.kind,
            "size": source.size,
            "from": source.reader.origin,
            "version": source.reader.version,
            "description": source.description,
        }
        for source in selection
    ]
    print_json(rows)
    heads = ("name", "dimension", "use", "licence", "available")
    print_table(
        [{head: row[head] for head in heads} | {"licence": short(row["licence"])} for row in rows],
        text=["licence", "available"],
        least=["available", "licence"],
    )
    line(words.wrapped(f"mixes: {', '.join(MIXES)}; offline: all that need no hub"))


@verb("show", of=calibrate)
def show_source(
    name: str = option(..., "A source, file or hub id.", argument=True),
    documents: int = option(1, "Documents to show.", ge=1),
    characters: int = option(600, "Characters per document.", ge=1),
    sources: Path | None = own_sources_option(),
) -> None:
    """Show a source and the beginning of its first documents."""
    own = own_sources(sources)
    if name in MIXES and name not in own:
        print_json({"mix": MIXES[name]})
        line(f"{name}: {mix_text(MIXES[name])}")
        return
    if name in GENERATORS and name not in own:
        raise InputError(f"{name} has no text yet: the model writes it (calmix calibrate {name})")
    source = get_source(name, own)
    source.check()
    first: list[dict[str, Any]] = [
        {"id": one.id, "characters": len(one.text), "text": one.text[:characters]}
        for one in itertools.islice(source.documents(), documents)
    ]
    entry, version = source.model_dump(mode="json") | {"use": source.use}, source.reader.version
    print_json({"source": entry, "version": version, "documents": first})
    line(": ".join(dict.fromkeys((source.name, source.description))))
    use = "" if source.use == "own" else f" ({source.use})"
    facts = source.dimension, source.kind, f"{source.licence}{use}", version
    line(", ".join(one for one in facts if one not in ("-", source.name)))
    for one in first:
        line(f"--- {one['id']} ({one['characters']} characters)\n{one['text']}")
