"""What a resumed `compress` compares: the whole request in OUT with the one of this run.

Its results are compared with their stages, and with what they were made from, by
`calmix.compression.results`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calmix.compression.folder import COMPRESSED, SEARCH
from calmix.compression.plan import CompressRequest
from calmix.compression.results import read_compressed
from calmix.errors import InputError
from calmix.manifest import read_sealed


def state_of(request: CompressRequest, out: Path) -> dict[str, Any]:
    """Return the record in OUT of a search or of a finished model, {} if there is none; InputError
    if OUT is of another request."""
    # Those decide nothing that is kept.
    saved, but = dict[str, Any](), {"max_memory", "anyway"}
    if (out / SEARCH).exists():
        saved = read_sealed(out / SEARCH, "")
        if request.keep_at_least is None:
            but.add("bits")  # a search has none
        elif not saved["candidates"]:  # so far only scores depend on the floors
            but |= {"keep_at_least", "confidence"}
    elif (out / COMPRESSED).exists():
        saved = read_compressed(out)
    now = request.model_dump(mode="json")
    before = saved.get("request", now)
    if differs := [key for key in now if before.get(key) != now[key] and key not in but]:
        raise InputError(
            f"{out} is of another request ({differs[0]}: {before.get(differs[0])}, now "
            f"{now[differs[0]]}): repeat that request or name another folder"
        )
    return saved
