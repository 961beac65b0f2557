"""Names of models: folders, GGUF files, builtin models and hub ids, which are fetched."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmix import assets
from calmix.errors import DiskError, ModelError, disk_errors, nearest
from calmix.files import user_path
from calmix.models.folder import ADAPTER, BESIDE_WEIGHTS, adapter_error, check_causal, check_folder
from calmix.models.gguf_header import is_gguf
from calmix.yaml_files import packaged

FETCHED: dict[str, Any] = {  # of a model on the hub
    "allow_patterns": ["*.safetensors", "*.json", *BESIDE_WEIGHTS],
    "ignore_patterns": ["*consolidated*.safetensors"],  # a second copy, in Mistral's format
}


@dataclass(frozen=True)
class BuiltinModel:
    """A model in data archives: `parts` maps assets to members that form one GGUF file in order."""

    name: str
    parts: dict[str, str]
    licence: str
    origin: str
    parameters: str
    description: str


@functools.cache
def builtin_models() -> dict[str, BuiltinModel]:
    """Return the builtin models by name (without the `builtin:` prefix)."""
    entries = packaged("models/builtin.yaml")
    return {name: BuiltinModel(name=name, **entry) for name, entry in entries.items()}


def is_served(name: object) -> bool:
    """Whether a model's name is the address of a server."""
    return str(name).lower().startswith(("http://", "https://"))


def known_model(name: str) -> Path | BuiltinModel | None:
    """Return the folder, GGUF file or builtin model of a name; None if it can only be a hub id.

    Raises ModelError if it is none of them, or the folder has no model.
    """
    if name.startswith("builtin:"):
        models = builtin_models()
        short = name.removeprefix("builtin:")
        if short not in models:
            raise ModelError(f"unknown builtin model '{short}': {nearest(short, models)}")
        return models[short]
    path = user_path(name)
    parts = str(path).encode("utf-8", "surrogatepass").split(b"/")
    if max(map(len, parts)) > 255:  # bytes, the limit of file systems
        raise ModelError(f"'{name[:40]}...' is too long for the name of a model")
    if path.is_file():
        if not is_gguf(path):
            raise ModelError(f"{path} is a file but not a .gguf: name its folder, or a GGUF file")
        return path
    if path.is_dir():
        check_folder(path)
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no model folder or .gguf file at {path}")
    if name in builtin_models():
        raise ModelError(f"there is no folder '{name}': did you mean builtin:{name}?")
    return None


def named_model(name: str) -> Path | BuiltinModel | None:
    """Return what `known_model` does, but raise ModelError if neither the cache nor the hub has it
    either. Downloads nothing."""
    from huggingface_hub import try_to_load_from_cache

    if (model := known_model(name)) is None:
        with hub_errors(name):
            cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
        if not cached:
            hub_files(name)
    return model


def local_model(name: str) -> Path | BuiltinModel:
    """Return the folder, GGUF file or builtin model of a name; a hub model is fetched."""
    if (model := known_model(name)) is not None:
        return model
    from huggingface_hub import constants, snapshot_download

    with hub_errors(name), disk_errors(Path(constants.HF_HUB_CACHE)):
        folder = Path(snapshot_download(name, **FETCHED))
    check_folder(folder)
    return folder


def hub_files(name: str) -> Sequence[Any]:
    """Return the files of a model on the hub, with sizes.

    Raises ModelError if it needs a login, is a LoRA adapter, does not continue text, or has no
    safetensors.
    """
    from huggingface_hub import HfApi

    with hub_errors(name):
        about = HfApi().model_info(name, files_metadata=True)
        if about.gated:
            HfApi().auth_check(name)
    config, files = about.config or {}, about.siblings or []
    names = [file.rfilename for file in files]
    if ADAPTER in names and "config.json" not in names:
        raise adapter_error(name, config.get("peft") or {})
    check_causal(name, config)
    if not any(one.endswith(".safetensors") for one in names):
        gguf = next((one for one in names if one.endswith(".gguf")), None)
        hint = f": download one of its GGUF files and name that (hf download {name} {gguf})"
        raise ModelError(f"{name} has no *.safetensors on the hub{hint if gguf else ''}")
    return files


def gguf_file(model: Path | BuiltinModel, folder: Path) -> Path:
    """Return a GGUF file; that of a builtin model is assembled in `folder`."""
    if isinstance(model, BuiltinModel):
        assets.extract(model.parts, file := folder / f"{model.name}.gguf")
        return file
    return model


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except (DiskError, ModelError):
        raise
    except errors.HFValidationError as error:
        raise ModelError(
            f"'{name}' is neither a folder, a .gguf file, a builtin model nor a valid hub id"
        ) from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, then log in "
            "(hf auth login)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model '{name}': check the id; if it is private, log in (hf auth login)"
        ) from error
    except Exception as error:  # the hub client raises many kinds when offline
        kind = "file" if name.lower().endswith(".gguf") else "folder"
        raise ModelError(
            f"there is no {kind} '{name}' and the hub cannot be reached: name a local folder, a "
            ".gguf file or builtin:smollm2-135m, or go online once to fetch it"
        ) from error
