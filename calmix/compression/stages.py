"""What each stage of `calmix compress` does: typed requests with a command line to print."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.request import CalibrationRequest, calibration_set, parse_calibration
from calmix.calibration.tokenizer import open_tokenizer
from calmix.compression.folder import PACK_FOLDER
from calmix.compression.results import StageResult, ready
from calmix.deploy import compressed_tensors, gguf
from calmix.deploy.pack import pack
from calmix.evaluating import evaluate_against
from calmix.evaluation.comparison import scores_record
from calmix.evaluation.scores import describe, load_dense, write_scores
from calmix.evaluation.suites import Suite, choose, runnable
from calmix.files import sha256_file, write_json
from calmix.manifest import MANIFEST, Input, read_sealed, record
from calmix.memory import parse_memory
from calmix.models.folder import fingerprint
from calmix.models.opening import open_model, resolve_model
from calmix.options import DrawOptions, option_words
from calmix.progress import Progress
from calmix.pruning.checkpoint import prune_checkpoint
from calmix.pruning.requests import PruneRequest, RecoverRequest, prune_request, recover_request
from calmix.recovery.checkpoint import recover

FILE_KIND = "GGUF file"


@dataclass(frozen=True, kw_only=True)
class StageRequest(ABC):
    """What one stage does.

    Attributes:
        reads: inputs by role (`calmix.compression.results.Result`).
        how: `device` and `trust_remote_code`, as for `open_model`.
        max_memory: as a user writes it.
    """

    reads: Mapping[str, Input] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)
    max_memory: str | None = None

    @property
    def decides(self) -> dict[str, Any]:
        """What the result's own record says of the request."""
        return {}

    @property
    @abstractmethod
    def words(self) -> tuple[str, ...]:
        """The command without its output."""

    @abstractmethod
    def run(self, output: Path, bar: Progress) -> None:
        """Write the result."""

    def named(self, role: str) -> str:
        """Return the name of an input."""
        return self.reads[role].name

    def work(self, bar: Progress) -> dict[str, Any]:
        """Return the arguments of a long run (`calmix.pruning.requests.How`)."""
        most = None if self.max_memory is None else parse_memory(self.max_memory)
        how = {**self.how, "max_memory": most, "resume": True}
        return how | {"writing": bar.writing, "note": bar.note}

    def options(self, **more: Any) -> list[str]:
        """Return the words of options, those of a long run last."""
        return option_words({**more, **self.how, "max_memory": self.max_memory, "resume": True})


@dataclass(frozen=True)
class Draw(StageRequest):
    """Draw a set, or let the model write it; `draw` is as for `calmix.calibration_set`."""

    text: str
    model: str
    draw: Mapping[str, Any]

    @cached_property
    def request(self) -> CalibrationRequest:
        """The checked request."""
        return parse_calibration(self.text, **self.draw)

    @property
    def written(self) -> bool:
        """Whether the model writes some of the text."""
        return bool(self.request.written)

    @property
    def decides(self) -> dict[str, Any]:
        return self.request.record()

    @property
    def words(self) -> tuple[str, ...]:
        how = self.how if self.written else {**self.how, "device": None}
        return "calibrate", self.text, *option_words({"model": self.model, **self.draw, **how})

    def run(self, output: Path, bar: Progress) -> None:
        self.drawn(bar).save(output)

    def drawn(self, bar: Progress) -> CalibrationSet:
        """Return the set."""
        opened: Any
        if self.written:
            opened = open_model(self.model, **self.how)
        else:
            trust = self.how["trust_remote_code"]
            opened = open_tokenizer(self.model, trust_remote_code=trust)
        tick = bar.each("drawing")
        return calibration_set(self.request, opened, writing=bar.writing, note=bar.note, tick=tick)


@dataclass(frozen=True)
class Prune(StageRequest):
    """Prune or quantise the `model` on the `calibration`, if there is one; `target` is as for
    `prune_request`."""

    target: Mapping[str, Any]

    @property
    def text(self) -> str | None:
        """The calibration set."""
        return self.named("calibration") if "calibration" in self.reads else None

    @property
    def request(self) -> PruneRequest:
        """The checked request."""
        return prune_request(**self.target, calibration=self.text)

    @property
    def decides(self) -> dict[str, Any]:
        return _decides(self.request)

    @property
    def words(self) -> tuple[str, ...]:
        options = self.options(**self.target, calibration=self.text)
        return "prune", self.named("model"), *options

    def run(self, output: Path, bar: Progress) -> None:
        how = self.work(bar) | {"progress": bar.of("blocks")}
        prune_checkpoint(self.named("model"), output, self.request, **how)


@dataclass(frozen=True)
class Recover(StageRequest):
    """Train what is left of the `model` towards the dense one (`against`)."""

    method: str
    epochs: int | None = None

    @property
    def request(self) -> RecoverRequest:
        """The checked request."""
        text = self.named("calibration")
        return recover_request(method=self.method, epochs=self.epochs, calibration=text)

    @property
    def decides(self) -> dict[str, Any]:
        return _decides(self.request)

    @property
    def words(self) -> tuple[str, ...]:
        names = {role: self.named(role) for role in ("against", "calibration")}
        options = self.options(**names, method=self.method, epochs=self.epochs)
        return "recover", self.named("model"), *options

    def run(self, output: Path, bar: Progress) -> None:
        how = self.work(bar) | {"progress": bar.of(self.method)}
        recover(self.named("model"), self.named("against"), self.request, output, **how)


@dataclass(frozen=True)
class Pack(StageRequest):
    """Write the `model` in fewer bytes, without loss."""

    @property
    def words(self) -> tuple[str, ...]:
        return "export", self.named("model"), "--to", PACK_FOLDER

    def run(self, output: Path, bar: Progress) -> None:
        pack(self.named("model"), output, progress=bar.of("packing"))


@dataclass(frozen=True)
class Export(StageRequest):
    """Write the quantised `model` for an engine (`to`): as a checkpoint in compressed-tensors, or
    as a GGUF file in the layout of another (`like`), and its record.

    The record has the manifest of the quantised model, which is not kept, the hashes of the files,
    and that of the model that they open as.
    """

    to: str
    like: Path | None = None

    @property
    def words(self) -> tuple[str, ...]:
        return "export", self.named("model"), "--to", self.to, *option_words({"like": self.like})

    def run(self, output: Path, bar: Progress) -> None:
        folder, tick = Path(self.named("model")), bar.each("export", 2)
        if self.to == "vllm":
            compressed_tensors.export(str(folder), output, say=tick)
            return
        facts = gguf.export(str(folder), output, like=self.like, overwrite=True, say=tick)
        manifest = record(
            FILE_KIND,
            inputs={"model": Input(str(folder), fingerprint(folder))},
            files={output.name: sha256_file(output)},
            opened=fingerprint(resolve_model(str(output))),
            pruned=read_sealed(folder / MANIFEST, ""),
            **facts,
        )
        write_json(output.with_name(f"{output.name}.json"), manifest)


@dataclass(frozen=True)
class Score(StageRequest):
    """Score the `model`, against the dense one (`against`) if there is one.

    Attributes:
        suite, part: the suite and which of it (`calmix.evaluation.suites.choose`); a user's
            prompts are a suite too, of which `half` may be kept from calibration.
        dense: a file of the dense model's scores, used instead of scoring it.
        repeat: whether to generate the dense model's answers twice.
    """

    suite: Suite | str
    part: Mapping[str, Any]
    half: bool = False
    dense: Path | None = None
    repeat: bool = False
    allow_code_execution: bool = False

    @property
    def chosen(self) -> Suite:
        """The part of the suite, with the tasks that may not run."""
        return choose(self.suite, **self.part)

    @property
    def scored(self) -> Suite:
        """The same without them, unless they are allowed."""
        return runnable(self.chosen, self.allow_code_execution)[0]

    @property
    def decides(self) -> dict[str, Any]:
        return {"suite": describe(self.scored)}

    @property
    def words(self) -> tuple[str, ...]:
        against = self.dense or (self.named("against") if "against" in self.reads else None)
        scored: dict[str, Any] = {"suite": None if self.suite == "offline" else self.suite}
        if isinstance(self.suite, Suite):
            (task,) = self.suite.tasks.values()
            scored = {"prompts": task.file, "test_half": self.half}
        options = {
            "against": against,
            **scored,
            **self.part,
            "repeat": self.repeat,
            "allow_code_execution": self.allow_code_execution,
        }
        return "evaluate", self.named("model"), *option_words({**options, **self.how})

    def run(self, output: Path, bar: Progress) -> None:
        against = self.named("against") if "against" in self.reads else None
        scores, dense = evaluate_against(
            self.named("model"),
            self.chosen,
            against if self.dense is None else load_dense(self.dense),
            repeat=self.repeat,
            allow_code_execution=self.allow_code_execution,
            bar=bar,
            **self.how,
        )
        write_scores(output, scores_record(scores, dense))


@dataclass(frozen=True)
class Stage:
    """One step of a compression, and the result it leaves, complete or not at all; a stage that
    leaves None always runs. A result is removed once that for which it is made, `spent`, is there.
    """

    name: str
    request: StageRequest
    leaves: Path | None
    spent: Path | None = None

    @property
    def command(self) -> str:
        """The command line for a shell."""
        output = () if self.leaves is None else ("-o", str(self.leaves))
        return shlex.join(["calmix", *self.request.words, *output])

    @property
    def result(self) -> StageResult:
        """What is recorded of the result."""
        request = self.request
        path = self.leaves or Path()
        return StageResult(self.name, path, request.reads, request.decides, self.spent)

    @property
    def done(self) -> bool:
        """Whether the result is there, or no longer needed."""
        return ready(self.leaves) or ready(self.spent)

    def run(self, bar: Progress) -> None:
        """Make the result."""
        self.request.run(self.leaves or Path(), bar)


def _decides(request: DrawOptions) -> dict[str, Any]:
    """Return what a request decides, besides its text, as its result records it."""
    record = request.record()
    first = {"method": record["method"]}  # its options differ too where it does
    return first | {key: one for key, one in record.items() if key not in ("calibration", "draw")}
