"""Named text sources: what can be calibrated on, as data, and how each is read."""

from calmix.sources.readers import Document
from calmix.sources.registry import (
    Source,
    builtin_sources,
    get_source,
    load_sources,
    offline_sources,
    own_sources,
)

__all__ = [
    "Document",
    "Source",
    "builtin_sources",
    "get_source",
    "load_sources",
    "offline_sources",
    "own_sources",
]
