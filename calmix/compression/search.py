"""Find the smallest model that meets the floors: a bisection over six candidates.

At most three candidates are built, each tested at a third of the allowed error. If more bits never
truly keep less, at most two candidates below the floor are tested before one of them passes, so the
error of what is promised is at most two thirds of the allowed one. No answer decides where the
search begins. With several samples of the calibration text a candidate has one model per sample;
all must pass, and that of the first sample is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calmix import files
from calmix.compression import plan, run_stages
from calmix.compression.card import CARD_PAGE
from calmix.compression.folder import CALIBRATION, COMPRESSED, COMPRESSED_RUN, SCORES, SEARCH
from calmix.compression.plan import CompressRequest
from calmix.compression.resume import state_of
from calmix.compression.run_stages import scoring, stages
from calmix.compression.stages import Draw, Export, Prune, Recover, Stage
from calmix.errors import InputError
from calmix.evaluation import floors
from calmix.evaluation.scores import CapabilityScores, load_scores
from calmix.evaluation.suites import choose
from calmix.manifest import record
from calmix.models.opening import forget

RATES = (6.0, 5.0, 4.5, 4.0, 3.2, 2.6)  # bits per weight; wider steps where each needs a recovery
WHOLE_RATES = (8.0, 6.0, 5.0, 4.0, 3.0, 2.0)  # the same for vLLM
# Models of a candidate, each made from the one before, and the record of a file.
MODELS = ("pruned", "blocks", "quantised", "model", "model.gguf.json", "model.gguf")
CANDIDATES = "candidates"
HELPS = (
    "Try a lower floor, more rows (--effort best), or more text of the abilities that failed "
    "(--keep)."
)


class Search:
    """A search in OUT, as far as it has come: the `candidates` tested, and how it `ended`
    (`failed`, `time` or `bottom`; empty while it goes on).

    A candidate holds `bits`, `seconds` and one result of `calmix.evaluation.floors` per sample of
    the text (`checks`).
    """

    def __init__(self, request: CompressRequest, out: Path) -> None:
        """Read the state in OUT; InputError if OUT is of another request."""
        self.request, self.out = request, out
        saved = state_of(request, out)
        self.candidates: list[dict[str, Any]] = saved.get("candidates", [])
        self.ended: str = saved.get("ended", "")
        self.rates: tuple[float, ...] = WHOLE_RATES if request.product == "vllm" else RATES
        if request.keep_at_least is not None:
            self.rates = tuple(bits for bits in self.rates if plan.reachable(request, bits))
        if not self.rates:
            raise InputError(f"no types of {request.model} give {RATES[-1]:g} to {RATES[0]:g} bits")
        if not self.passed.keys() <= {*self.rates}:
            raise InputError(f"{out} holds a search over other candidates: choose another -o")
        self.files = plan.decisive(request)
        self.floors = floors.parse_floors(request.keep_at_least) if request.keep_at_least else {}
        self.confidence = request.confidence or floors.CONFIDENCE
        self.level = plan.test_level(request)
        # The folder in OUT of each sample of the text and how its stages are called.
        more = range(2, (request.seeds or 1) + 1)
        self.samples = {"": "", **{f"{CANDIDATES}/draw-{n}": f", sample {n}" for n in more}}

    @property
    def passed(self) -> dict[float, bool]:
        """Whether each tested candidate meets all floors, by its bits."""
        return {
            candidate["bits"]: all(one["passed"] for one in candidate["checks"])
            for candidate in self.candidates
        }

    @property
    def bits(self) -> float | None:
        """Bits of the smallest candidate that passes; None if none does."""
        return min((bits for bits, passed in self.passed.items() if passed), default=None)

    @property
    def left(self) -> tuple[float, ...]:
        """Bits of the candidates that may still be built."""
        fewest = min((bits for bits, passed in self.passed.items() if passed), default=math.inf)
        failed = max(
            (bits for bits, passed in self.passed.items() if not passed), default=-math.inf
        )
        return tuple(bits for bits in self.rates if failed < bits < fewest)

    @property
    def state(self) -> dict[str, Any]:
        """What is saved in OUT and printed."""
        return {"ended": self.ended, "candidates": self.candidates}

    @property
    def promise(self) -> list[str]:
        """What is said of the smallest candidate that passes, in lines."""
        passed = (
            candidate["checks"][0]
            for candidate in self.candidates
            if candidate["bits"] == self.bits
        )
        return next((check["lines"] for check in passed), [])

    def rows(self) -> list[dict[str, Any]]:
        """Return one record per candidate: what it keeps of each ability, and what is proven."""
        return [
            {"bits": f"{bits:g}", "kept": "yes" if passed else "no"}
            | {
                one["ability"]: f"{100 * one['kept']:.1f} ({floors.proven(one['bound'])})"
                for one in _weakest(candidate)
            }
            for candidate, (bits, passed) in zip(self.candidates, self.passed.items(), strict=True)
        ]

    def why(self) -> str:
        """Return a sentence that says why the search ended."""
        if self.ended == "time":
            return "time ran out before the next candidate: run the same command again to resume"
        if self.ended == "bottom":
            return f"{self.rates[-1]:g} bits are the fewest that are tried"
        last = max(
            (candidate for candidate in self.candidates if not self.passed[candidate["bits"]]),
            key=lambda candidate: candidate["bits"],
        )
        failures = "; ".join(one["text"] for one in _weakest(last) if not one["passed"])
        drawn = len(last["checks"])
        of = f" (the worst of {drawn} samples of text)" if drawn > 1 else ""
        return f"{last['bits']:g} bits fail: {failures}{of}"

    def provable(self) -> str:
        """Return a sentence that says how many right answers of the dense model the floors need."""
        counts = ", ".join(
            f"{floors.items_needed(floor, self.level)} in {name or 'each ability'}"
            for name, floor in self.floors.items()
        )
        return f"to prove the floors, the dense model must get right at least: {counts}"

    def at(self, bits: float) -> CompressRequest:
        """Return the request of one candidate."""
        return self.request.model_copy(update={"bits": bits})

    def dense(self, file: str) -> Path:
        """Return the file of the dense model's scores beside those of candidates."""
        return self.out / CANDIDATES / f"dense-{file}"

    def folder(self, bits: float, sample: str = "") -> Path:
        """Return the folder of a candidate."""
        return self.out / (sample or CANDIDATES) / f"{bits:g}"

    def longest(self) -> list[Stage]:
        """Return all stages if no candidate fails: no other search takes more."""
        return self.opening() + [stage for bits in self.path for stage in self.building(bits)]

    @property
    def path(self) -> list[float]:
        """The bits of the candidates that are built if none fails."""
        path, left = list[float](), self.rates
        while left:
            at = _middle(left)
            path, left = [*path, left[at]], left[at + 1 :]
        return path

    def opening(self) -> list[Stage]:
        """Return the stages before the first candidate: missing sets, scores of the dense model."""
        request, listed = self.request, list[Stage]()
        for number, (sample, called) in enumerate(self.samples.items()):
            seeded = self.at(self.rates[0]).model_copy(update={"seed": request.seed + number})
            listed += [
                replace(one, name=one.name + called)
                for one in stages(seeded, self.out / sample)
                if isinstance(one.request, Draw)
            ]
        dense = (scoring(request, file, None, self.dense(file)) for file in self.files)
        return [*listed, *(replace(one, name=f"{one.name}, dense") for one in dense)]

    def building(self, bits: float) -> list[Stage]:
        """Return the stages that build a candidate and score it against the dense scores."""
        request, candidate, listed = self.request, self.at(bits), list[Stage]()
        for sample, called in self.samples.items():
            calibration = (
                request.calibration if request.saved else str(self.out / sample / CALIBRATION)
            )
            folder = self.folder(bits, sample)
            parts = stages(candidate, folder, calibration)
            models = (one for one in parts if isinstance(one.request, (Prune, Recover, Export)))
            tested = (
                scoring(candidate, file, folder / request.file, folder / file, self.dense(file))
                for file in self.files
            )
            listed += [
                replace(one, name=f"{bits:g} bits, {one.name}{called}")
                for one in (*models, *tested)
            ]
        return listed

    def run(
        self, run: run_stages.RunStage, say: run_stages.SayStage, within: float = math.inf
    ) -> None:
        """Build and test candidates until none is left between the smallest that passes and one
        that fails; move the smallest that passes to OUT/model, with its scores beside it.

        `say` receives each stage, and whether its result existed. No candidate is begun after
        `within` seconds. Too few right answers of the dense model are an InputError.
        """
        began = time.monotonic()
        with files.alone(self.out, wait=False):
            self._save(self.ended)  # first, so that OUT is known as that of a search
            if self.left:
                self._forget()
                list(run_stages.do(self.opening(), self.out, run, say))
                dense = [load_scores(self.dense(file)) for file in self.files]
                floors.check_provable(self.floors, dense, self.level)
            while left := self.left:
                bits, at = left[_middle(left)], time.monotonic()
                if self.candidates and at - began > within:
                    self._save("time")
                    break
                if self.ended:
                    self._reopen()
                list(run_stages.do(self.building(bits), self.out, run, say))
                checks = self._check(bits, dense)
                taken = round(time.monotonic() - at, 1)
                self.candidates.append({"bits": bits, "seconds": taken, "checks": checks})
                over = "bottom" if self.bits == self.rates[-1] else "failed"
                self._save("" if self.left else over)
            self._place()

    def _check(self, bits: float, dense: Sequence[CapabilityScores]) -> list[dict[str, Any]]:
        """Test the model of each sample, and write the result, which holds at the requested
        confidence, beside it."""
        folders = [self.folder(bits, sample) for sample in self.samples]
        pairs = [
            [(one, load_scores(folder / file)) for one, file in zip(dense, self.files, strict=True)]
            for folder in folders
        ]
        checks = [floors.check_floors(self.floors, some, self.level) for some in pairs]
        checks = [replace(one, confidence=self.confidence) for one in checks]
        if all(one.passed for one in checks):
            checks = [replace(one, draws=len(checks)) for one in checks]
        for folder, some, check in zip(folders, pairs, checks, strict=True):
            record = floors.record(check, self.floors, some)
            files.write_json(folder / floors.FILE, record)
        return [one.to_dict() for one in checks]

    def _save(self, ended: str) -> None:
        """Save the state, and remove all models but the smallest that passes and those of
        candidates that may still be built."""
        self.ended = ended
        self.out.mkdir(parents=True, exist_ok=True)
        value = record(
            "search for a size", request=self.request.model_dump(mode="json"), **self.state
        )
        files.write_json(self.out / SEARCH, value)
        for bits in {*self.rates}.difference(self.left):
            for sample in self.samples:
                folder = self.folder(bits, sample)
                if sample or bits != self.bits:
                    forget(folder / self.request.file)
                    for name in MODELS:
                        files.remove(folder / name)

    def _forget(self) -> None:
        """Remove scores of other items, left from earlier floors, except those of tested
        candidates."""
        tested = [self.folder(bits, sample) for bits in self.passed for sample in self.samples]
        for file, suite in plan.scored(self.request).items():
            for path in (self.out / CANDIDATES).rglob(f"*{file}"):
                if path.parent not in tested and load_scores(path).suite["hash"] != suite.hash:
                    files.remove(path)

    def _reopen(self) -> None:
        """Resume after time ran out: the model becomes a candidate again, and results made from it
        are removed."""
        _move(self.out, self.folder(self.bits or self.rates[0]))
        leaves = [
            stage.leaves for stage in stages(self.at(self.rates[0]), self.out) if stage.leaves
        ]
        others = [self.out / name for name in (COMPRESSED, COMPRESSED_RUN, floors.FILE, CARD_PAGE)]
        for path in (*leaves, *others):
            if path.name != CALIBRATION:
                files.remove(path)
        self.ended = ""

    def _place(self) -> None:
        """Move the smallest candidate that passes to OUT, with its check and its answers:
        generated again in other batches, a few would differ."""
        if self.bits is not None:
            chosen = self.folder(self.bits)
            answers = SCORES if choose(self.request.suite).asks else plan.BEHAVIOUR
            for name in (answers, plan.PROMPTS, floors.FILE):
                if (chosen / name).exists() and not (self.out / name).exists():
                    files.write_bytes(self.out / name, (chosen / name).read_bytes())
            _move(chosen, self.out)


def _weakest(candidate: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the test of each ability, from the sample that proves least."""
    drawn = zip(*(one["tested"] for one in candidate["checks"]), strict=True)
    return [min(same, key=lambda one: one["bound"] - one["floor"]) for same in drawn]


def _move(folder: Path, to: Path) -> None:
    """Move a candidate's models, the final one last."""
    for name in MODELS:
        if (folder / name).exists():
            (folder / name).rename(to / name)


def _middle(left: tuple[float, ...]) -> int:
    """Return the position of the candidate to test next."""
    return (len(left) - 1) // 2
