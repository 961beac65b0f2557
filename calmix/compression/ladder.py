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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calmix.calibration import saved_set
from calmix.calibration.texts import texts
from calmix.compression import running
from calmix.compression.estimate import StageCost, check_room, estimate
from calmix.compression.plan import (
    BEHAVIOUR,
    CALIBRATION,
    EFFORTS,
    MANIFEST,
    PACK,
    SCORES,
    Request,
    Stage,
    check_options,
    scored,
    scoring,
    stages,
)
from calmix.errors import CalmixError, InputError
from calmix.evaluation.distance import distance, reference
from calmix.evaluation.evaluate import choose
from calmix.evaluation.floors import (
    CONFIDENCE,
    FILE,
    judge,
    lower_bound,
    needed,
    parse_floors,
    proven,
    record,
)
from calmix.evaluation.scores import CapabilityScores, load_scores
from calmix.evaluation.suites import suite_file
from calmix.files import (
    alone,
    check_apart,
    check_output_folder,
    remove,
    write_bytes,
    write_json,
)
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


@dataclass(frozen=True)
class Ladder:
    """The candidates tested so far, how the walk `ended` (`failed`, `time` or `bottom`; empty while
    it goes on), and the bits of the `first` candidate. A rung holds `bits`, `seconds` and one
    verdict of `calmix.evaluation.floors` per sample of the text (`verdicts`)."""

    rungs: tuple[dict[str, Any], ...]
    ended: str
    first: float

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

    def rows(self) -> list[dict[str, Any]]:
        """Return one record per candidate: what it keeps of each ability, and what is proven."""
        return [
            {"bits": f"{bits:g}", "kept": "yes" if kept else "no"}
            | {one["ability"]: f"{100 * one['kept']:.1f} ({proven(one['bound'])})"
               for one in _weakest(rung)}
            for rung, (bits, kept) in zip(self.rungs, self.kept.items(), strict=True)
        ]  # fmt: skip

    @property
    def promise(self) -> list[str]:
        """The verdict on the smallest candidate that passes, in lines."""
        passed = (rung["verdicts"][0] for rung in self.rungs if rung["bits"] == self.bits)
        return next((verdict["lines"] for verdict in passed), [])

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
            f"{one['measure']}, proven {proven(one['bound'])} %, required {100 * one['floor']:g} %"
            for one in _weakest(last) if not one["passed"]
        )  # fmt: skip
        drawn = len(last["verdicts"])
        of = f" (the worst of {drawn} samples of text)" if drawn > 1 else ""
        return f"{last['bits']:g} bits fail: {failures}{of}"


def _weakest(rung: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the test of each ability, from the sample that proves least."""
    drawn = zip(*(one["tested"] for one in rung["verdicts"]), strict=True)
    return [min(same, key=lambda one: one["bound"] - one["floor"]) for same in drawn]


def dry(options: Compression, out: Path) -> tuple[Request, list[StageCost]]:
    """Return the checked request and the cost of its stages, including all candidates."""
    request = _checked(options, out)
    if request.keep_at_least is None:
        return request, estimate(request, stages(request, out))
    return request, estimate(at(request, RUNGS[0]), whole(request, out))


def make(
    options: Compression, out: Path, run: running.Run, note: Callable[[str], None] | None
) -> tuple[Ladder | None, dict[str, float]]:
    """Compress a model; `note` receives each stage as it begins. What stages print is discarded.

    Returns:
        The walk, None without floors, and the seconds of each stage run now, none if no candidate
        passes.
    """
    request, ladder = _checked(options, out), None
    if request.keep_at_least is not None:
        with _staged(at(request, RUNGS[0]), out, whole(request, out), note) as (say, seconds):
            ladder = walk(request, out, run, say, options.within or math.inf, seconds)
        if ladder.bits is None:
            return ladder, {}
        request = at(request, ladder.bits)
    check_room(request, out)
    with _staged(request, out, stages(request, out), note) as (say, _):
        return ladder, running.compress(request, out, run, say)


def _checked(options: Compression, out: Path) -> Request:
    """Return the checked request; refuse an output that is an input or holds something else."""
    inputs = [options.model, saved_set(options.calibration), options.prompts,
              suite_file(options.suite)]  # fmt: skip
    check_apart(out, inputs)
    if not (out / MANIFEST).exists() and not (out / running.LADDER).exists():
        if out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"{out} is not empty and was not made by calmix compress: name another folder"
            )
        check_output_folder(out)
    request = check_options(options)
    read_ladder(request, out)
    return request


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


def whole(request: Request, out: Path) -> list[Stage]:
    """Return all stages of a walk on which no candidate fails."""
    return opening(request, out) + [one for bits in RUNGS for one in building(request, out, bits)]


def opening(request: Request, out: Path) -> list[Stage]:
    """Return the stages before the first candidate: draw missing sets, score the dense model."""
    listed = []
    for number, sample in enumerate(samples(request)):
        drawn = request.model_copy(update={"seed": request.seed + number})
        listed += [_within(sample, one) for one in stages(drawn, out / sample)
                   if one.leaves == CALIBRATION]  # fmt: skip
    dense = scoring(request, deciding(request), request.model, out, leaves=f"{CANDIDATES}/dense-")
    return [*listed, replace(dense, name=f"{dense.name}, dense")]


def building(request: Request, out: Path, bits: float) -> list[Stage]:
    """Return the stages that build a candidate and score it against the dense scores."""
    file, candidate, listed = deciding(request), at(request, bits), list[Stage]()
    dense = out / CANDIDATES / f"dense-{file}"
    for sample in samples(request):
        calibration = request.calibration if request.saved else str(out / sample / CALIBRATION)
        folder = out / _folder(bits, sample)
        parts = stages(candidate, folder, calibration)
        made = itertools.takewhile(lambda one: one.leaves != PACK, parts)
        tested = scoring(candidate, file, str(folder / "model"), folder, dense)
        listed += [_within(_folder(bits, sample), replace(one, name=f"{bits:g} bits, {one.name}"))
                   for one in (*made, tested)]  # fmt: skip
    return listed


def samples(request: Request) -> list[str]:
    """Return the folder of each sample of the text, in OUT; the first is OUT itself."""
    return ["", *(f"{CANDIDATES}/draw-{n}" for n in range(2, (request.seeds or 1) + 1))]


def _within(folder: str, stage: Stage) -> Stage:
    """Return a stage with its result in a folder of OUT and its sample's number in its name."""
    number = folder.partition("draw-")[2].partition("/")[0]
    name = stage.name + f", sample {number}" * bool(number)
    return replace(stage, name=name, leaves=str(Path(folder) / (stage.leaves or "")))


def _folder(bits: float, sample: str = "") -> str:
    return f"{sample or CANDIDATES}/{bits:g}"


def provable(request: Request) -> str:
    """Return a sentence that says how many right answers of the dense model the floors need."""
    floors, confidence = _floors(request)
    counts = ", ".join(
        f"{needed(floor, confidence)} {f'in {name}' if name else 'in each ability'}"
        for name, floor in floors.items()
    )
    return f"to prove the floors, the dense model must get right at least: {counts}"


def _floors(request: Request) -> tuple[dict[str, float], float]:
    return parse_floors(request.keep_at_least or ""), request.confidence or CONFIDENCE


def at(request: Request, bits: float) -> Request:
    """Return the request of one candidate."""
    return request.model_copy(update={"bits": bits})


def deciding(request: Request) -> str:
    """Return the score file that decides, as in `calmix check OUT`: behaviour, which has every
    ability, or a suite that is scored alone."""
    return BEHAVIOUR if request.suite == "offline" else SCORES


def read_ladder(request: Request, out: Path) -> Ladder:
    """Return the state of a walk in OUT; InputError if OUT is of another request."""
    saved, but = dict[str, Any](), set[str]()
    if (out / running.LADDER).exists():
        saved = read_sealed(out / running.LADDER, "")
        if request.keep_at_least is None:
            but = {"bits"}  # a walk has none
        elif not saved["rungs"]:  # so far only scores depend on the floors (`_forget`)
            but = {"keep_at_least", "confidence"}
    elif (out / MANIFEST).exists():
        saved = running.read_record(out)
    now = request.model_dump(mode="json")
    held = saved["request"] if saved else now
    if differs := [key for key in now if held.get(key) != now[key] and key not in but]:
        raise InputError(
            f"{out} is of another request ({differs[0]}: {held.get(differs[0])}, now "
            f"{now[differs[0]]}): repeat that request or name another folder"
        )
    rungs, first = saved.get("rungs", ()), saved.get("first", RUNGS[0])
    ladder = Ladder(tuple(rungs), saved.get("ended", ""), first)
    if not {first, *ladder.kept} <= {*RUNGS}:
        raise InputError(f"{out} holds a walk over other candidates: choose another -o")
    return ladder


def walk(
    request: Request,
    out: Path,
    run: running.Run,
    say: running.Say,
    within: float = math.inf,
    seconds: Mapping[str, float] | None = None,
) -> Ladder:
    """Build and test candidates until one fails; move the smallest that passes to OUT/model, with
    its scores beside it.

    `say` receives each stage, and whether its result existed. No candidate is begun that would end
    after `within` seconds; `seconds` are the estimates of stages by name. Too little time for one
    candidate, or too few right answers of the dense model, is an InputError.
    """
    began, file, seconds = time.monotonic(), deciding(request), seconds or {}
    ladder, before = read_ladder(request, out), opening(request, out)
    due = _due([*before, *building(request, out, RUNGS[0])], seconds)
    if due > within and not ladder.rungs:
        raise InputError(
            f"--within {duration(within)} is too short: the first candidate takes about "
            f"{duration(due)} here"
        )
    with alone(out, wait=False):
        ladder = _saved(ladder, request, out)  # first, so that OUT is known as that of a walk
        if ladder.left:
            floors, confidence = _floors(request)
            _forget(ladder, request, out)
            list(running.do(before, out, run, say))
            dense = load_scores(out / CANDIDATES / f"dense-{file}")
            judge(floors, [(dense, dense)], confidence)  # raises if they cannot be proven
            if not ladder.rungs:
                left = within - (time.monotonic() - began)
                ladder = replace(ladder, first=_first(request, dense, out, left, seconds))
        tested = len(ladder.rungs)  # by earlier runs: the estimates have only what they left to do
        while ladder.left:
            bits, at_ = ladder.left[0], time.monotonic()
            made = building(request, out, bits)
            if ladder.rungs:
                last, ours = ladder.rungs[-1], len(ladder.rungs) > tested
                known = _due(building(request, out, last["bits"]), seconds) if ours else 0.0
                due = _due(made, seconds)
                due = last["seconds"] * due / known if known else max(last["seconds"], due)
                if at_ - began + due > within:
                    ladder = _saved(replace(ladder, ended="time"), request, out)
                    break
            if ladder.ended:
                ladder = _reopened(ladder, request, out)
            list(running.do(made, out, run, say))
            share = FIRST if bits <= ladder.first else 1 - FIRST
            share = 1.0 if ladder.first == RUNGS[0] else share
            verdicts = _tested(request, out, bits, dense, 1 - share * (1 - confidence))
            taken = round(time.monotonic() - at_, 1)
            rung = {"bits": bits, "seconds": taken, "verdicts": verdicts}
            ladder = replace(ladder, rungs=(*ladder.rungs, rung))
            ended = "" if ladder.left else "bottom" if ladder.bits == RUNGS[-1] else "failed"
            ladder = _saved(replace(ladder, ended=ended), request, out)
        return _placed(ladder, request, out)


def _tested(
    request: Request, out: Path, bits: float, dense: CapabilityScores, level: float
) -> list[dict[str, Any]]:
    """Test the model of each sample at the `level` of its sequence, and write the verdict, which
    holds at the requested confidence, beside it."""
    (floors, confidence), file = _floors(request), deciding(request)
    folders = [out / _folder(bits, sample) for sample in samples(request)]
    pairs = [(dense, load_scores(folder / file)) for folder in folders]
    verdicts = [replace(judge(floors, [pair], level), confidence=confidence) for pair in pairs]
    if all(one.passed for one in verdicts):
        verdicts = [replace(one, draws=len(verdicts)) for one in verdicts]
    for folder, pair, verdict in zip(folders, pairs, verdicts, strict=True):
        write_json(folder / FILE, record(verdict, floors, [pair]))
    return [one.to_dict() for one in verdicts]


def _due(listed: Iterable[Stage], seconds: Mapping[str, float]) -> float:
    """Return the estimated seconds of stages; unknown ones count as 0."""
    return sum(seconds.get(stage.name, 0.0) for stage in listed)


def _first(
    request: Request, dense: CapabilityScores, out: Path, left: float, seconds: Mapping[str, float]
) -> float:
    """Return the bits to begin with: one step above the fewest expected to prove every floor, or
    the most bits if items or time are too few or the distance cannot be measured."""
    floors, confidence = _floors(request)
    try:
        tested = judge(floors, [(dense, dense)], 1 - (1 - FIRST) * (1 - confidence)).tested
        plain = plain_distance(request.model, request.device, request.trust_remote_code)
    except CalmixError:
        return RUNGS[0]

    def proves(bits: float) -> bool:
        kept = expected(plain, bits, bits <= EFFORTS[request.effort].levels)
        level = 1 - FIRST * (1 - confidence)
        return all(lower_bound(round(kept * one.items), one.items, level) >= one.floor
                   for one in tested)  # fmt: skip

    fewest = max((index for index, bits in enumerate(RUNGS) if proves(bits)), default=0)
    bits = RUNGS[max(fewest, 1) - 1]
    return bits if _due(building(request, out, bits), seconds) <= left else RUNGS[0]


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


def _saved(ladder: Ladder, request: Request, out: Path) -> Ladder:
    """Save the state of a walk, and remove all models but the smallest that passes and those of
    candidates that may still be built."""
    out.mkdir(parents=True, exist_ok=True)
    value = {"kind": KIND, "request": request.model_dump(mode="json"), "ended": ladder.ended,
             "first": ladder.first, "rungs": ladder.rungs}  # fmt: skip
    write_json(out / running.LADDER, sealed(value))
    for bits in {*RUNGS}.difference(ladder.left):
        for sample in samples(request):
            for name in MODELS if sample or bits != ladder.bits else ():
                shutil.rmtree(out / _folder(bits, sample) / name, ignore_errors=True)
    return ladder


def _forget(ladder: Ladder, request: Request, out: Path) -> None:
    """Remove scores of other items, left from earlier floors, except those of tested candidates."""
    tested = [out / _folder(bits, one) for bits in ladder.kept for one in samples(request)]
    file = deciding(request)
    wanted = scored(request)[file].hash
    for path in (out / CANDIDATES).rglob(f"*{file}"):
        if path.parent not in tested and load_scores(path).suite["hash"] != wanted:
            remove(path)


def _reopened(ladder: Ladder, request: Request, out: Path) -> Ladder:
    """Resume a walk that ran out of time: its model becomes a candidate again, and results made
    from it are removed."""
    _move(out, out / _folder(ladder.bits or RUNGS[0]))
    made = {stage.leaves for stage in stages(request, out)} - {CALIBRATION, None}
    for name in (*made, MANIFEST, running.RUN, FILE, "card.html"):
        remove(out / str(name))
    return replace(ladder, ended="")


def _placed(ladder: Ladder, request: Request, out: Path) -> Ladder:
    """Move the smallest candidate that passes to OUT, with its verdict and its answers: generated
    again in other batches, a few would differ."""
    if ladder.bits is not None:
        chosen = out / _folder(ladder.bits)
        for name in (SCORES if choose(request.suite).asks else BEHAVIOUR, FILE):
            if (chosen / name).exists() and not (out / name).exists():
                write_bytes(out / name, (chosen / name).read_bytes())
        _move(chosen, out)
    return ladder


def _move(folder: Path, to: Path) -> None:
    """Move a candidate's models, the final one last."""
    for name in MODELS:
        if (folder / name).exists():
            (folder / name).rename(to / name)
