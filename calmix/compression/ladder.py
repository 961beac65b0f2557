"""Find the smallest model that meets the floors: test candidates from most bits to fewest.

The walk is a fixed-sequence test: the first candidate that fails ends it, so bounds need no
correction for the number of candidates (Maurer, Hothorn and Lehmacher, 1995). It begins one
candidate above the fewest bits expected to pass. That choice uses no answer of a candidate, so all
items count in the tests. If the first candidate fails, a second sequence walks those of more bits
from the top. Each sequence has its share of the allowed error (Bonferroni); a walk that begins at
the top has all of it. With several samples of the calibration text a candidate has one model per
sample; all must pass, and that of the first sample is kept.

The forecast of what a candidate keeps is ours. In the study of bits (studies/frontier.yaml) a model
at distance KL keeps about exp(-2 KL) of its answers, up to a tenth less where KL is small. One bit
per weight less multiplies the distance by four. Levels solved on text have about half the distance
of plain rounding; recovered levels (of SmolLM2) have 0.3 of it.
"""

from __future__ import annotations

import io
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calmix import files
from calmix.calibration import saved_set
from calmix.calibration.texts import texts
from calmix.compression import plan, running
from calmix.compression.estimate import StageCost, check_room, estimate
from calmix.compression.plan import CALIBRATION, MANIFEST, SCORES, Request, Stage, stages
from calmix.errors import CalmixError, InputError
from calmix.evaluation import floors
from calmix.evaluation.distance import distance, reference
from calmix.evaluation.evaluate import choose
from calmix.evaluation.scores import CapabilityScores, load_scores
from calmix.evaluation.suites import suite_file
from calmix.manifest import read_sealed, sealed
from calmix.models import find_blocks, open_model
from calmix.options import Compression
from calmix.progress import Progress, duration

RUNGS = (6.0, 5.0, 4.5, 4.0, 3.2, 2.6)  # bits per weight; wider steps where each needs a recovery
FIRST = 0.8  # share of the allowed error for a first sequence that begins below the top
MODELS = ("pruned", "blocks", "model")  # folders of a candidate, each made from the one before
KIND, CANDIDATES = "ladder of candidates", "candidates"
BITS = 4  # of plain rounding, whose distance decides where a walk begins
LOST = 0.05  # share of answers lost at any distance
RECOVERED = 0.6  # distance of recovered levels over that of solved ones
HELPS = (
    "Try a lower floor, more rows (--effort best), or more text of the abilities that failed "
    "(--keep)."
)


class Walk:
    """A walk in OUT, as far as it has come: the candidates tested (`rungs`), how it `ended`
    (`failed`, `time` or `bottom`; empty while it goes on), and the bits of the `first` candidate.

    A rung holds `bits`, `seconds` and one verdict of `calmix.evaluation.floors` per sample of the
    text (`verdicts`).
    """

    def __init__(self, request: Request, out: Path) -> None:
        """Read the state in OUT; InputError if OUT is of another request."""
        self.request, self.out = request, out
        saved, but = dict[str, Any](), {"max_memory"}  # which decides nothing that is kept
        if (out / running.LADDER).exists():
            saved = read_sealed(out / running.LADDER, "")
            if request.keep_at_least is None:
                but.add("bits")  # a walk has none
            elif not saved["rungs"]:  # so far only scores depend on the floors (`_forget`)
                but |= {"keep_at_least", "confidence"}
        elif (out / MANIFEST).exists():
            saved = running.read_record(out)
        now = request.model_dump(mode="json")
        held = saved.get("request", now)
        if differs := [key for key in now if held.get(key) != now[key] and key not in but]:
            raise InputError(
                f"{out} is of another request ({differs[0]}: {held.get(differs[0])}, now "
                f"{now[differs[0]]}): repeat that request or name another folder"
            )
        self.rungs: list[dict[str, Any]] = saved.get("rungs", [])
        self.ended, self.first = saved.get("ended", ""), saved.get("first", RUNGS[0])
        if not {self.first, *self.kept} <= {*RUNGS}:
            raise InputError(f"{out} holds a walk over other candidates: choose another -o")
        # The score file that decides, as in `calmix check OUT`: behaviour, which has every ability,
        # or a suite that is scored alone.
        self.file = plan.BEHAVIOUR if request.suite == "offline" else SCORES
        self.dense = out / CANDIDATES / f"dense-{self.file}"
        self.floors = floors.parse_floors(request.keep_at_least) if request.keep_at_least else {}
        self.confidence = request.confidence or floors.CONFIDENCE
        # The folder in OUT of each sample of the text and how its stages are called.
        more = range(2, (request.seeds or 1) + 1)
        self.samples = {"": "", **{f"{CANDIDATES}/draw-{n}": f", sample {n}" for n in more}}
        self.seconds: Mapping[str, float] = {}  # expected of stages, by name

    @property
    def kept(self) -> dict[float, bool]:
        """Whether each tested candidate meets all floors, by its bits."""
        return {rung["bits"]: all(one["passed"] for one in rung["verdicts"]) for rung in self.rungs}

    @property
    def bits(self) -> float | None:
        """Bits of the smallest candidate that passes; None if none does."""
        return min((bits for bits, kept in self.kept.items() if kept), default=None)

    @property
    def left(self) -> tuple[float, ...]:
        """Bits of the candidates that may still be built."""
        done, at = len(self.rungs), RUNGS.index(self.first)
        begun, *later = self.kept.values() or [True]
        order = RUNGS[at + done :] if begun else RUNGS[done - 1 : at]
        return order if all(later) else ()

    @property
    def state(self) -> dict[str, Any]:
        """What is saved in OUT and printed."""
        return {"ended": self.ended, "first": self.first, "rungs": self.rungs}

    @property
    def promise(self) -> list[str]:
        """The verdict on the smallest candidate that passes, in lines."""
        passed = (rung["verdicts"][0] for rung in self.rungs if rung["bits"] == self.bits)
        return next((verdict["lines"] for verdict in passed), [])

    def rows(self) -> list[dict[str, Any]]:
        """Return one record per candidate: what it keeps of each ability, and what is proven."""
        return [
            {"bits": f"{bits:g}", "kept": "yes" if kept else "no"}
            | {one["ability"]: f"{100 * one['kept']:.1f} ({floors.proven(one['bound'])})"
               for one in _weakest(rung)}
            for rung, (bits, kept) in zip(self.rungs, self.kept.items(), strict=True)
        ]  # fmt: skip

    def why(self) -> str:
        """Return a sentence that says why the walk ended."""
        if self.ended == "time":
            return "time ran out before the next candidate: run the same command again to resume"
        if self.ended == "bottom":
            return f"{RUNGS[-1]:g} bits are the fewest that are tried"
        last = max((rung for rung in self.rungs if not self.kept[rung["bits"]]),
                   key=lambda rung: rung["bits"])  # fmt: skip
        failures = ", ".join(
            f"{one['ability']} keeps {100 * one['kept']:.1f} % of {one['items']} items by "
            f"{one['measure']}, proven {floors.proven(one['bound'])} %, required "
            f"{100 * one['floor']:g} %"
            for one in _weakest(last) if not one["passed"]
        )  # fmt: skip
        drawn = len(last["verdicts"])
        of = f" (the worst of {drawn} samples of text)" if drawn > 1 else ""
        return f"{last['bits']:g} bits fail: {failures}{of}"

    def provable(self) -> str:
        """Return a sentence that says how many right answers of the dense model the floors need."""
        counts = ", ".join(
            f"{floors.needed(floor, self.confidence)} {f'in {name}' if name else 'in each ability'}"
            for name, floor in self.floors.items()
        )
        return f"to prove the floors, the dense model must get right at least: {counts}"

    def at(self, bits: float) -> Request:
        """Return the request of one candidate."""
        return self.request.model_copy(update={"bits": bits})

    def folder(self, bits: float, sample: str = "") -> Path:
        """Return the folder of a candidate."""
        return self.out / (sample or CANDIDATES) / f"{bits:g}"

    def whole(self) -> list[Stage]:
        """Return all stages if no candidate fails."""
        return self.opening() + [stage for bits in RUNGS for stage in self.building(bits)]

    def opening(self) -> list[Stage]:
        """Return the stages before the first candidate: missing sets, scores of the dense model."""
        request, listed = self.request, list[Stage]()
        for number, (sample, called) in enumerate(self.samples.items()):
            seeded = request.model_copy(update={"seed": request.seed + number})
            listed += [
                replace(one, name=one.name + called, leaves=str(Path(sample, CALIBRATION)))
                for one in stages(seeded, self.out / sample) if one.leaves == CALIBRATION
            ]  # fmt: skip
        leaves = f"{CANDIDATES}/dense-"
        dense = plan.scoring(request, self.file, request.model, self.out, leaves=leaves)
        return [*listed, replace(dense, name=f"{dense.name}, dense")]

    def building(self, bits: float) -> list[Stage]:
        """Return the stages that build a candidate and score it against the dense scores."""
        request, candidate, listed = self.request, self.at(bits), list[Stage]()
        for sample, called in self.samples.items():
            held = request.calibration if request.saved else str(self.out / sample / CALIBRATION)
            folder = self.folder(bits, sample)
            parts = stages(candidate, folder, held)
            made = itertools.takewhile(lambda one: one.leaves != plan.PACK, parts)
            tested = plan.scoring(candidate, self.file, str(folder / "model"), folder, self.dense)
            listed += [
                replace(one, name=f"{bits:g} bits, {one.name}{called}",
                        leaves=str(folder.relative_to(self.out) / str(one.leaves)))
                for one in (*made, tested)
            ]  # fmt: skip
        return listed

    def run(
        self,
        run: running.Run,
        say: running.Say,
        within: float = math.inf,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Build and test candidates until one fails; move the smallest that passes to OUT/model,
        with its scores beside it.

        `say` receives each stage, and whether its result existed. No candidate is begun that would
        end after `within` seconds; `seconds` are the estimates of stages by name. Too little time
        for one candidate, or too few right answers of the dense model, is an InputError.
        """
        began, before, self.seconds = time.monotonic(), self.opening(), seconds or {}
        due = self._due([*before, *self.building(RUNGS[0])])
        if due > within and not self.rungs:
            raise InputError(
                f"--within {duration(within)} is too short: the first candidate takes about "
                f"{duration(due)} here"
            )
        with files.alone(self.out, wait=False):
            self._save(self.ended)  # first, so that OUT is known as that of a walk
            if self.left:
                self._forget()
                list(running.do(before, self.out, run, say))
                dense = load_scores(self.dense)
                # Raises if the floors cannot be proven.
                floors.judge(self.floors, [(dense, dense)], self.confidence)
                if not self.rungs:
                    self.first = self._first(dense, within - (time.monotonic() - began))
            tested = len(self.rungs)  # by earlier runs: the estimates have only what they left
            while self.left:
                bits, at = self.left[0], time.monotonic()
                made = self.building(bits)
                if self.rungs:
                    last, ours = self.rungs[-1], len(self.rungs) > tested
                    known = self._due(self.building(last["bits"])) if ours else 0.0
                    due = self._due(made)
                    due = last["seconds"] * due / known if known else max(last["seconds"], due)
                    if at - began + due > within:
                        self._save("time")
                        break
                if self.ended:
                    self._reopen()
                list(running.do(made, self.out, run, say))
                verdicts = self._verdicts(bits, dense)
                taken = round(time.monotonic() - at, 1)
                self.rungs.append({"bits": bits, "seconds": taken, "verdicts": verdicts})
                over = "bottom" if self.bits == RUNGS[-1] else "failed"
                self._save("" if self.left else over)
            self._place()

    def _verdicts(self, bits: float, dense: CapabilityScores) -> list[dict[str, Any]]:
        """Test the model of each sample at the level of its sequence, and write the verdict, which
        holds at the requested confidence, beside it."""
        share = FIRST if bits <= self.first else 1 - FIRST
        share = 1.0 if self.first == RUNGS[0] else share
        level = 1 - share * (1 - self.confidence)
        folders = [self.folder(bits, sample) for sample in self.samples]
        pairs = [(dense, load_scores(folder / self.file)) for folder in folders]
        verdicts = [replace(floors.judge(self.floors, [pair], level), confidence=self.confidence)
                    for pair in pairs]  # fmt: skip
        if all(one.passed for one in verdicts):
            verdicts = [replace(one, draws=len(verdicts)) for one in verdicts]
        for folder, pair, verdict in zip(folders, pairs, verdicts, strict=True):
            record = floors.record(verdict, self.floors, [pair])
            files.write_json(folder / floors.FILE, record)
        return [one.to_dict() for one in verdicts]

    def _due(self, listed: Iterable[Stage]) -> float:
        """Return the estimated seconds of stages; unknown ones count as 0."""
        return sum(self.seconds.get(stage.name, 0.0) for stage in listed)

    def _first(self, dense: CapabilityScores, left: float) -> float:
        """Return the bits to begin with: one step above the fewest expected to prove every floor,
        or the most bits if items or time are too few or the distance cannot be measured."""
        request, error = self.request, 1 - self.confidence
        later, level = 1 - (1 - FIRST) * error, 1 - FIRST * error
        try:
            tested = floors.judge(self.floors, [(dense, dense)], later).tested
            plain = plain_distance(request.model, request.device, request.trust_remote_code)
        except CalmixError:
            return RUNGS[0]

        def proves(bits: float) -> bool:
            kept = expected(plain, bits, bits <= plan.EFFORTS[request.effort].levels)
            return all(
                floors.lower_bound(round(kept * one.items), one.items, level) >= one.floor
                for one in tested
            )

        fewest = max((index for index, bits in enumerate(RUNGS) if proves(bits)), default=0)
        bits = RUNGS[max(fewest, 1) - 1]
        return bits if self._due(self.building(bits)) <= left else RUNGS[0]

    def _save(self, ended: str) -> None:
        """Save the state, and remove all models but the smallest that passes and those of
        candidates that may still be built."""
        self.ended = ended
        self.out.mkdir(parents=True, exist_ok=True)
        value = {"kind": KIND, "request": self.request.model_dump(mode="json"), **self.state}
        files.write_json(self.out / running.LADDER, sealed(value))
        for bits in {*RUNGS}.difference(self.left):
            for sample in self.samples:
                for name in MODELS if sample or bits != self.bits else ():
                    shutil.rmtree(self.folder(bits, sample) / name, ignore_errors=True)

    def _forget(self) -> None:
        """Remove scores of other items, left from earlier floors, except those of tested
        candidates."""
        tested = [self.folder(bits, sample) for bits in self.kept for sample in self.samples]
        wanted = plan.scored(self.request)[self.file].hash
        for path in (self.out / CANDIDATES).rglob(f"*{self.file}"):
            if path.parent not in tested and load_scores(path).suite["hash"] != wanted:
                files.remove(path)

    def _reopen(self) -> None:
        """Resume after time ran out: the model becomes a candidate again, and results made from it
        are removed."""
        _move(self.out, self.folder(self.bits or RUNGS[0]))
        made = {stage.leaves for stage in stages(self.request, self.out)} - {CALIBRATION, None}
        for name in (*made, MANIFEST, running.RUN, floors.FILE, "card.html"):
            files.remove(self.out / str(name))
        self.ended = ""

    def _place(self) -> None:
        """Move the smallest candidate that passes to OUT, with its verdict and its answers:
        generated again in other batches, a few would differ."""
        if self.bits is not None:
            chosen = self.folder(self.bits)
            answers = SCORES if choose(self.request.suite).asks else plan.BEHAVIOUR
            for name in (answers, floors.FILE):
                if (chosen / name).exists() and not (self.out / name).exists():
                    files.write_bytes(self.out / name, (chosen / name).read_bytes())
            _move(chosen, self.out)


def _weakest(rung: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the test of each ability, from the sample that proves least."""
    drawn = zip(*(one["tested"] for one in rung["verdicts"]), strict=True)
    return [min(same, key=lambda one: one["bound"] - one["floor"]) for same in drawn]


def _move(folder: Path, to: Path) -> None:
    """Move a candidate's models, the final one last."""
    for name in MODELS:
        if (folder / name).exists():
            (folder / name).rename(to / name)


def plain_distance(model: str, device: str, trust_remote_code: bool) -> float:
    """Return KL(dense || rounded) on the builtin texts, in nats per token: block weights are
    rounded to a uniform grid on which normal weights have an entropy of 4 bits.

    Raises:
        CalmixError: the model cannot be opened or the distance not be measured.
    """
    opened = open_model(model, device=device, trust_remote_code=trust_remote_code)
    dense = reference(opened, texts(opened), cache=True)
    for layer in find_blocks(opened.model).layers:
        weight = layer.view().float()
        step = weight.std(1, keepdim=True) * math.sqrt(2 * math.pi * math.e) / 2**BITS
        layer.view().copy_(torch.where(step > 0, (weight / step).round() * step, weight))
    return float(distance(opened, dense)["total"]["kl_mean"])


def expected(plain: float, bits: float, recovered: bool = False) -> float:
    """Return the share of answers that a candidate is expected to keep."""
    left = RECOVERED if recovered else 1.0
    return (1 - LOST) * math.exp(-left * plain * 4 ** (BITS - bits))


def begin(options: Compression, out: Path) -> Walk:
    """Return the walk in OUT with the checked request, without candidates unless floors are given;
    refuse an OUT that is an input or holds something else."""
    inputs = [options.model, saved_set(options.calibration), options.prompts,
              suite_file(options.suite)]  # fmt: skip
    files.check_apart(out, inputs)
    if not (out / MANIFEST).exists() and not (out / running.LADDER).exists():
        if out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"{out} is not empty and was not made by calmix compress: name another folder"
            )
        files.check_output_folder(out)
    return Walk(plan.check_options(options), out)


def dry(walk: Walk) -> list[StageCost]:
    """Return the cost of all stages, including those of all candidates."""
    if not walk.floors:
        return estimate(walk.request, stages(walk.request, walk.out))
    return estimate(walk.at(RUNGS[0]), walk.whole())


def make(
    options: Compression, out: Path, run: running.Run, note: Callable[[str], None] | None
) -> tuple[Walk, dict[str, float]]:
    """Compress a model; `note` receives each stage as it begins. What stages print is discarded.

    Returns:
        The walk, and the seconds of each stage run now, none if no candidate passes.
    """
    walk = begin(options, out)
    request = walk.request
    if walk.floors:
        with _staged(walk.at(RUNGS[0]), out, walk.whole(), note) as (say, seconds):
            walk.run(run, say, options.within or math.inf, seconds)
        if walk.bits is None:
            return walk, {}
        request = walk.at(walk.bits)
    check_room(request, out)
    with _staged(request, out, stages(request, out), note) as (say, _):
        return walk, running.compress(request, out, run, say)


@contextmanager
def _staged(
    request: Request, out: Path, listed: Sequence[Stage], note: Callable[[str], None] | None
) -> Iterator[tuple[running.Say, dict[str, float]]]:
    """Yield a callback that shows the progress of stages, and the estimated seconds of those
    missing in OUT; what stages print is discarded."""

    def say(stage: Stage, done: bool) -> None:
        if note is not None:
            note(f"{stage.name}: already done" if done else f"$ {stage.command}")
        bar.begin(stage.name)

    seconds: dict[str, float] = {}
    names, left = [one.name for one in listed], [one for one in listed if not one.done(out)]
    with Progress(names, shown=note is not None) as bar, redirect_stdout(io.StringIO()):
        bar.show("estimating", None)
        with suppress(CalmixError):  # only progress and --within need it
            seconds = {one.stage.name: one.seconds for one in estimate(request, left)}
        bar.expect(seconds)
        yield say, seconds
