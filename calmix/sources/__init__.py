"""Named sources of calibration text, and their readers."""

from calmix.sources.documents import Document as Document
from calmix.sources.registry import Source as Source
from calmix.sources.registry import builtin_sources as builtin_sources
from calmix.sources.registry import get_source as get_source
from calmix.sources.registry import offline_sources as offline_sources
from calmix.sources.registry import own_sources as own_sources
