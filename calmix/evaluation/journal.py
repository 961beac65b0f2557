"""Answers of an interrupted run, so that it goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from calmix.errors import disk_errors

Answers = list[tuple[str, bool]]  # texts, and whether they ended by themselves


class Journal:
    """A file of answers by the hash of what was asked, to which they are appended as they come;
    without a path it keeps nothing. `known` are those that it had when it was opened."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.known = path, dict[str, Answers]()
        if path is None:
            return
        with suppress(FileNotFoundError):
            for line in path.read_bytes().splitlines():
                with suppress(ValueError, TypeError):  # the last line may be cut
                    key, rows = json.loads(line)
                    self.known[key] = [(str(text), bool(ended)) for text, ended in rows]

    def add(self, key: str, answers: Sequence[tuple[str, bool]]) -> None:
        """Append answers to the file."""
        if self.path is not None:
            with disk_errors(self.path), self.path.open("ab") as file:
                file.write(b"\n" + json.dumps([key, answers]).encode() + b"\n")


@contextmanager
def journal_beside(
    output: Path | None, note: Callable[[str], None] | None = None
) -> Iterator[Journal]:
    """Yield the journal of an output file, and delete it once the body has ended well; `note` says
    whether it goes on with an interrupted run."""
    path = None if output is None else output.with_name(f".{output.name}.answers")
    journal = Journal(path)
    count = sum(map(len, journal.known.values()))
    if count and note is not None:
        note(f"resumed: {count:,} answers of an interrupted run are not asked again")
    yield journal
    if path is not None:
        path.unlink(missing_ok=True)
