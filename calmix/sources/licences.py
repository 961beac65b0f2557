"""What a licence permits, judged by its name alone; this is not legal advice.

permissive       any use, with attribution at most
share-alike      any use; derived work may have to carry the same licence
non-commercial   research or other non-commercial use only
unstated         the publisher states none, or one that calmix does not know
own              the user's own text
"""

from __future__ import annotations

import re
from typing import Literal

from calmix.errors import InputError

Use = Literal["permissive", "share-alike", "non-commercial", "unstated", "own"]
NON_COMMERCIAL: Use = "non-commercial"
OWN_LICENCE = "the user's own"

_RESTRICTED = re.compile(
    r"\bNC(?![a-z])|non[- ]?commercial|research use|research only|academic|MSR-LA", re.IGNORECASE
)
_ALIKE = re.compile(r"\bSA\b|GFDL|\b[LA]?GPL|General Public Licen|share[- ]?alike", re.IGNORECASE)
_FREE = re.compile(
    r"(translations )?(Apache[- ]2\.0|MIT|BSD([- ][23]-Clause)?|ISC|PSF-2\.0|AFL-3\.0|Unlicense"
    r"|CC0(-1\.0)?|ODC-BY(-1\.0)?|CC[- ]BY([- ]?[1-4]\.[05])?|public domain|permissive)"
    r"( licen[cs]e)?",
    re.IGNORECASE,
)


def use_of(licence: str) -> Use:
    """Return what the licences of a source, model or task permit: the strictest counts."""
    if licence == OWN_LICENCE:
        return "own"
    if _RESTRICTED.search(licence):
        return NON_COMMERCIAL
    if _ALIKE.search(licence):
        return "share-alike"
    names = re.split(r"[,;/+]|\b(?:and|or|with)\b", short(licence), flags=re.IGNORECASE)
    parts = [part.strip() for part in names]
    parts = [part for part in parts if part and not part.startswith("through ")]
    return "permissive" if parts and all(map(_FREE.fullmatch, parts)) else "unstated"


def short(licence: str) -> str:
    """Return a licence line without the remarks in brackets."""
    return re.sub(r"\s*\([^()]*\)", "", licence)


def allowed(licence: str, wanted: str | None) -> bool:
    """Whether text under a licence may enter a set that must be `wanted`."""
    return wanted is None or use_of(licence) in (wanted, "own")


def refuse(name: str, licence: str, wanted: str | None) -> None:
    """Raise InputError for a source that is named explicitly and not allowed."""
    if not allowed(licence, wanted):
        raise InputError(
            f"source {name} is {use_of(licence)} ({licence}), not {wanted}: name another, or leave "
            "--licence out"
        )
