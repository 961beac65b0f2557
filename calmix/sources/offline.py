"""Readers of text that needs no network: packages, data archives, generated problems."""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from calmix import assets
from calmix.errors import SourceError, first_line, missing_extra
from calmix.options import Options
from calmix.progress import quiet
from calmix.sources.documents import Document, Reader, Template, fill, lookup, source_files

SKIPPED = {  # folders of a package or of the standard library
    "test",
    "tests",
    "testing",
    "idle_test",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "_vendor",
    "lib2to3",
    "pydoc_data",
    "__pycache__",
}
Items = Literal["all", "odd", "even"]


class PythonText(Reader):
    """Text of the running Python: the modules of its standard library, without tests and bundled
    pip, or the language reference in pydoc, one document per topic."""

    type: Literal["python-stdlib", "python-docs"]

    def read(self) -> Iterator[Document]:
        if self.type == "python-stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            yield from source_files(root, _modules(root))
        else:
            from pydoc_data.topics import topics

            yield from (Document(name, topics[name]) for name in sorted(topics))


def _modules(root: Path) -> Iterator[Path]:
    """Yield modules below a folder, without entering the skipped folders (installed packages)."""
    for folder, inner, files in os.walk(root):
        inner[:] = [one for one in inner if one not in SKIPPED]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


class OfPackage(Reader):
    """Text of a package that may not be installed."""

    package: str

    @property
    def version(self) -> str:
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return self.package

    @property
    def availability(self) -> str:
        return "offline" if self._spec() else f"needs the package {self.package}"

    def _spec(self) -> Any:
        with suppress(ImportError, ValueError):  # of a package that a dotted name is inside
            return importlib.util.find_spec(self.package.replace("-", "_"))
        return None

    def check(self) -> None:
        if self._spec() is None:
            raise SourceError(
                f"the package {self.package} is not installed: pip install {self.package}"
            )


class PackageFiles(OfPackage):
    """Source files of an installed package, without its tests; the package is not imported."""

    type: Literal["package"]
    files: list[str]

    def read(self) -> Iterator[Document]:
        self.check()
        if not (places := self._spec().submodule_search_locations):
            raise SourceError(f"{self.package} is a single module: name a package")
        root = Path(places[0])
        for pattern in self.files:
            if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                raise SourceError(f"'{pattern}' is no pattern of files inside {self.package}")
        files = (path for pattern in self.files for path in root.glob(pattern))
        yield from source_files(root, files, SKIPPED)


class Apart(Options):
    """Texts to avoid: a document that shares a run of `words` words with one is dropped.

    They are the even-numbered requests of `members` (which the suite can score), the odd, or all.
    """

    members: list[str]
    items: Items = "even"
    words: Annotated[int, Field(gt=0)] = 8


class AssetText(Reader):
    """Text from the rendered requests of a data archive, each distinct text once.

    `template` is filled from each request's fields; `{answer}` is the text of the correct choice,
    and `where` keeps requests with given values. What a suite can score is left out: `items: odd`
    yields only requests with an odd `number` (the suite has the even ones), and `apart` drops text
    that overlaps with what the suite reads elsewhere.
    """

    type: Literal["asset"]
    asset: str
    members: list[str]
    template: Template
    after: str | None = None
    before: str | None = None
    items: Items = "all"
    number: str = "doc_id"
    apart: Apart | None = None
    where: dict[str, str | list[str]] = Field(default={})

    @property
    def version(self) -> str:
        asset = assets.get_asset(self.asset)
        return f"{asset.distribution} {asset.version}"

    @property
    def availability(self) -> str:
        state = assets.get_asset(self.asset).state
        return "offline" if state == "ok" else f"fetched on first use (asset {self.asset})"

    def read(self) -> Iterator[Document]:
        scored: set[tuple[str, ...]] = set()
        if self.apart is not None:
            for _, request in self._requests(self.apart.members, self.apart.items):
                scored |= word_runs(self.text(request), self.apart.words)
        wanted = {k: [v] if isinstance(v, str) else v for k, v in self.where.items()}
        seen = {""}
        for member, request in self._requests(self.members, self.items):
            if any(lookup(request, key) not in values for key, values in wanted.items()):
                continue
            text = self.text(request)
            if self.after is not None:
                text = text.partition(self.after)[2]
            if self.before is not None:
                text = text.partition(self.before)[0]
            if (text := text.strip()) in seen:
                continue
            seen.add(text)
            if self.apart is None or scored.isdisjoint(word_runs(text, self.apart.words)):
                yield Document(f"{member.split('/')[-3]}/{request['doc_id']}", text)

    def _requests(self, members: list[str], items: Items) -> Iterator[tuple[str, dict[str, Any]]]:
        for member in members:
            for request in assets.read_jsonl(self.asset, member):
                parity = "odd" if int(lookup(request, self.number)) % 2 else "even"
                if items in ("all", parity):
                    yield member, request

    def text(self, request: dict[str, Any]) -> str:
        """Return a request's text, from the template."""
        doc = request.get("doc", {})
        if "choices" in doc and isinstance(doc.get("gold"), int):
            request = {**request, "answer": doc["choices"][doc["gold"]]}
        return fill(self.template, request)


def word_runs(text: str, n: int) -> set[tuple[str, ...]]:
    """Return every run of `n` words of a text in lower case; for a shorter text, all of it."""
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


class ReasoningGym(OfPackage):
    """Problems with answers from reasoning-gym's seeded generators, taken in turn.

    Text that matches the regular expression `strip` (notes on the answer's format) is removed.
    """

    type: Literal["reasoning-gym"]
    package: str = "reasoning-gym"
    datasets: Annotated[list[str], Field(min_length=1)]
    documents: Annotated[int, Field(gt=0)]
    strip: re.Pattern[str] | None = None

    def check(self) -> None:
        if self._spec() is None:
            raise missing_extra("reasoning-gym problems", "reasoning")

    def read(self) -> Iterator[Document]:
        self.check()
        with quiet():  # its cellpylib warns
            import reasoning_gym
        size = -(-self.documents // len(self.datasets))
        try:
            datasets = [reasoning_gym.create_dataset(n, size=size, seed=0) for n in self.datasets]
        except ValueError as error:  # an unknown name
            raise SourceError(f"reasoning-gym: {first_line(error)}") from error
        seen: set[str] = set()
        for index in range(self.documents):
            item, which = divmod(index, len(datasets))
            entry = datasets[which][item]
            question = re.sub(self.strip or "", "", entry["question"]).strip()
            text = f"{question}\nAnswer: {entry['answer']}"
            if text not in seen:
                seen.add(text)
                yield Document(f"{self.datasets[which]}/{item}", text)
