"""Push what calmix has made to the Hugging Face hub: a model with its card, plain or as a pack."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from calmix.deploy.pack import pack as write_pack
from calmix.errors import InputError, disk_errors
from calmix.files import hidden, real_place
from calmix.models.opening import check_folder
from calmix.models.shards import PACK
from calmix.pruning.solvers.grids import SCALES

CARD = "README.md"
# What a repository held before must not be taken for a part of what it holds now.
REPLACED = ["*.safetensors", "*.safetensors.index.json", PACK, f"{SCALES}/*"]


def push(
    folder: Path,
    repository: str,
    *,
    pack: bool = False,
    private: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Upload a model folder or a pack in one commit, and return the repository's address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    if not (folder / PACK).is_file():
        check_folder(folder)
    elif pack:
        raise InputError(f"{folder} is a pack already: leave --pack out")
    with _refusals(repository):  # before anything is packed
        made = hub.create_repo(repository, private=private or None, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if pack:
            say("pack")
            stack.enter_context(disk_errors(folder))
            packed = stack.enter_context(hidden(real_place(folder))) / "pack"
            write_pack(folder, packed)
            folder = packed
        say("upload")
        with _refusals(repository):
            hub.upload_folder(
                repo_id=made.repo_id, folder_path=folder, delete_patterns=REPLACED,
                commit_message="Model and card by calmix",
            )  # fmt: skip
    return str(made)


@contextlib.contextmanager
def _refusals(repository: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise InputError(f"'{repository}' is not a hub id: write owner/name") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = "log in first (hf auth login)" if status == 401 else f"status {status}"
        raise InputError(f"the hub refuses a push to {repository}: {reason}") from error
    except Exception as error:  # offline, in the many forms the hub client gives it
        raise InputError(
            f"the hub cannot be reached for {repository} ({type(error).__name__}): nothing was "
            "pushed; go online, or upload the folder later"
        ) from error
