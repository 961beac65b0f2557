"""The smallest model that keeps what is asked for: candidates from most bits to fewest.

A fixed sequence: the first candidate that fails ends the walk, so that no bound has to be widened
for the number of candidates (Maurer, Hothorn and Lehmacher, 1995). It begins with the one above the
fewest bits that may do, without a look at any answer of a candidate: all items decide. If that
first candidate fails, the ones of more bits are walked from the top. Each of the two sequences has
its share of the errors that the confidence allows (Bonferroni); one that begins at the top has all.
With several draws of the calibration text a candidate is a model of each; all must pass, and the
first draw's is the one that stays.

What a candidate is thought to keep is ours. In the study of bits (studies/frontier.yaml) a model at
a distance KL keeps some exp(-2 KL) of its answers, up to a tenth less where KL is small; a bit less
a weight is four times the distance; levels that are solved on text come to half the distance of
plain rounding, more or less, and recovered ones, of SmolLM2, to 0.3 of it.
"""

from __future__ import annotations

import io
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calmix.calibration import saved_set
from calmix.calibration.texts import texts
from calmix.compression import running
from calmix.compression.estimate import Taken, check_room, estimate
from calmix.compression.plan import (
    BEHAVIOUR,
    CALIBRATION,
    EFFORTS,
    MANIFEST,
    PACK,
    SCORES,
    Request,
    Stage,
    request,
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
from calmix.files import alone, remove, write_bytes, write_json
from calmix.manifest import sealed
from calmix.models import find_blocks, open_model
from calmix.options import Compression
from calmix.progress import Stages, duration

RUNGS = (6.0, 5.0, 4.5, 4.0, 3.2, 2.6)  # bits a weight; wider steps where each takes a recovery
FIRST = 0.8  # of the errors allowed, those of a sequence that does not begin at the top
MODELS = ("pruned", "blocks", "model")  # of a candidate, one made of the other
KIND, CANDIDATES = "ladder of candidates", "candidates"
BITS = 4  # that weights are rounded to for the distance a walk's begin is chosen by
LOST = 0.05  # of the answers, at any distance
RECOVERED = 0.6  # of the distance that solved levels have
HELPS = (
    "What may help: a lower floor, more rows (--effort best), or text of the abilities that failed "
    "(--keep)."
)


@dataclass(frozen=True)
class Rung:
    """A candidate that was built and tested; `verdicts` are of `calmix.evaluation.floors`, one a
    draw of the text."""

    bits: float
    seconds: float
    verdicts: list[dict[str, Any]]

    @property
    def kept(self) -> bool:
        """Whether it keeps all that is asked for."""
        return all(one["passed"] for one in self.verdicts)

    @property
    def tested(self) -> list[dict[str, Any]]:
        """What was tested of every ability, of the draw that proves least of it."""
        drawn = zip(*(one["tested"] for one in self.verdicts), strict=True)
        return [min(same, key=lambda one: one["bound"] - one["floor"]) for same in drawn]


@dataclass(frozen=True)
class Ladder:
    """Candidates so far, the bits of the first, and how the walk ended: `failed`, `time` or
    `bottom`; empty before."""

    rungs: tuple[Rung, ...]
    ended: str
    first: float

    @property
    def bits(self) -> float | None:
        """Bits of the smallest candidate that keeps what is asked for; None if none does."""
        return min((one.bits for one in self.rungs if one.kept), default=None)

    @property
    def left(self) -> tuple[float, ...]:
        """Bits of the candidates that may be built yet."""
        done, at = len(self.rungs), RUNGS.index(self.first)
        begun, *later = [one.kept for one in self.rungs] or [True]
        order = RUNGS[at + done :] if begun else RUNGS[done - 1 : at]
        return order if all(later) else ()

    def rows(self) -> list[dict[str, Any]]:
        """Return a record a candidate: what it keeps of every ability, and what is proven."""
        return [
            {"bits": f"{rung.bits:g}", "kept": "yes" if rung.kept else "no"}
            | {one["ability"]: f"{100 * one['kept']:.1f} ({proven(one['bound'])})"
               for one in rung.tested}
            for rung in self.rungs
        ]  # fmt: skip

    @property
    def promise(self) -> list[str]:
        """What is promised of the smallest candidate that keeps what is asked for, in lines."""
        return next((one.verdicts[0]["lines"] for one in self.rungs if one.bits == self.bits), [])

    def why(self) -> str:
        """Return in a sentence why the walk ended where it did."""
        if self.ended == "time":
            return "the time given was over before the next candidate: run it again to go on"
        if self.ended == "bottom":
            return f"{RUNGS[-1]:g} bits are the fewest that are tried"
        last = max((one for one in self.rungs if not one.kept), key=lambda one: one.bits)
        told = ", ".join(
            f"{one['ability']} keeps {100 * one['kept']:.1f} % of {one['items']} items by "
            f"{one['measure']}, proven {proven(one['bound'])} %, asked {100 * one['floor']:g} %"
            for one in last.tested if not one["passed"]
        )  # fmt: skip
        drawn = len(last.verdicts)
        of = f" (the worst of {drawn} draws of text)" if drawn > 1 else ""
        return f"{last.bits:g} bits fail: {told}{of}"


def dry(options: Compression, out: Path) -> tuple[Request, list[Taken]]:
    """Return a request, checked, and what its stages will take, those of all candidates too."""
    asked = _checked(options, out)
    if asked.keep_at_least is None:
        return asked, estimate(asked, stages(asked, out))
    return asked, estimate(at(asked, RUNGS[0]), whole(asked, out))


def make(
    options: Compression, out: Path, run: running.Run, note: Callable[[str], None] | None
) -> tuple[Ladder | None, dict[str, float]]:
    """Compress a model; `note` is told of stages as they begin, beside a line of progress, and what
    they print is in their files.

    Returns:
        What looking for the smallest model found, if that is asked for; and the seconds of every
        stage that was done now, none if no candidate keeps enough.
    """
    asked, found = _checked(options, out), None
    if asked.keep_at_least is not None:
        with _staged(at(asked, RUNGS[0]), out, whole(asked, out), note) as (say, seconds):
            found = walk(asked, out, run, say, options.within, seconds)
        if found.bits is None:
            return found, {}
        asked = at(asked, found.bits)
    check_room(asked, out)
    with _staged(asked, out, stages(asked, out), note) as (say, _):
        return found, running.compress(asked, out, run, say)


def _checked(options: Compression, out: Path) -> Request:
    """Return the request, checked; an output that is an input, or holds something else, is
    refused."""
    inputs = [options.model, saved_set(options.calibration), options.prompts,
              suite_file(options.suite)]  # fmt: skip
    running.check_place(out, inputs)
    asked = request(options)
    if asked.keep_at_least is None:
        running.check(asked, out)
    else:
        read_ladder(asked, out)
    return asked


@contextmanager
def _staged(
    asked: Request, out: Path, listed: Sequence[Stage], note: Callable[[str], None] | None
) -> Iterator[tuple[running.Say, dict[str, float]]]:
    """Yield what tells a line of progress of each stage, and the seconds that each of those missing
    in OUT will take, as far as that is known; nothing else is printed."""

    def say(stage: Stage, kept: bool) -> None:
        if note is not None:
            note(f"{stage.name}: done before" if kept else f"$ {stage.command}")
        bar.begin(stage.name)

    seconds: dict[str, float] = {}
    names, left = [one.name for one in listed], [one for one in listed if not one.stands(out)]
    with Stages(names, shown=note is not None) as bar, redirect_stdout(io.StringIO()):
        bar.show("estimating", None)
        with suppress(CalmixError):  # it is for the line of progress and --within alone
            seconds = {one.stage.name: one.seconds for one in estimate(asked, left)}
        bar.expect(seconds)
        yield say, seconds


def whole(asked: Request, out: Path) -> list[Stage]:
    """Return all stages of a walk on which no candidate fails."""
    return opening(asked, out) + [one for bits in RUNGS for one in building(asked, out, bits)]


def opening(asked: Request, out: Path) -> list[Stage]:
    """Return the stages before the first candidate: sets are drawn, unless they are there, and the
    dense model scored."""
    found = []
    for number, draw in enumerate(draws(asked)):
        drawn = asked.model_copy(update={"seed": asked.seed + number})
        own = [one for one in stages(drawn, out / draw) if one.leaves == CALIBRATION]
        found += [_within(draw, one) for one in own]
    dense = scoring(asked, deciding(asked), asked.model, out, leaves=f"{CANDIDATES}/dense-")
    return [*found, replace(dense, name=f"{dense.name}, dense")]


def building(asked: Request, out: Path, bits: float) -> list[Stage]:
    """Return the stages of a candidate: it is quantised, and scored against the dense scores."""
    file, wanted, found = deciding(asked), at(asked, bits), list[Stage]()
    dense = out / CANDIDATES / f"dense-{file}"
    for draw in draws(asked):
        held = asked.calibration if asked.saved else str(out / draw / CALIBRATION)
        place = out / _folder(bits, draw)
        made = itertools.takewhile(lambda one: one.leaves != PACK, stages(wanted, place, held))
        tested = scoring(wanted, file, str(place / "model"), place, dense)
        found += [_within(_folder(bits, draw), replace(one, name=f"{bits:g} bits, {one.name}"))
                  for one in (*made, tested)]  # fmt: skip
    return found


def draws(asked: Request) -> list[str]:
    """Return the folder of each draw of the text; the first is OUT itself."""
    return ["", *(f"{CANDIDATES}/draw-{n}" for n in range(2, (asked.seeds or 1) + 1))]


def _within(folder: str, stage: Stage) -> Stage:
    """Return a stage that leaves its result in a folder of OUT, and is named after its draw."""
    number = folder.partition("draw-")[2].partition("/")[0]
    name = stage.name + f", draw {number}" * bool(number)
    return replace(stage, name=name, leaves=str(Path(folder) / (stage.leaves or "")))


def _folder(bits: float, draw: str = "") -> str:
    return f"{draw or CANDIDATES}/{bits:g}"


def provable(asked: Request) -> str:
    """Return how many right answers the floors need of the dense model."""
    floors, confidence = _floors(asked)
    told = ", ".join(
        f"{needed(floor, confidence)} {f'in {name}' if name else 'in each ability'}"
        for name, floor in floors.items()
    )
    return f"to prove the floors the dense model must get right at least: {told}"


def _floors(asked: Request) -> tuple[dict[str, float], float]:
    return parse_floors(asked.keep_at_least or ""), asked.confidence or CONFIDENCE


def at(asked: Request, bits: float) -> Request:
    """Return the request of one candidate."""
    return asked.model_copy(update={"bits": bits})


def deciding(asked: Request) -> str:
    """Return the file of scores that decides, as `calmix check OUT` has it: that of behaviour,
    which holds every ability, or of a suite that is scored alone."""
    return BEHAVIOUR if asked.suite == "offline" else SCORES


def read_ladder(asked: Request, out: Path) -> Ladder:
    """Return what is known of a walk in OUT; InputError if it is of another request."""
    if not (out / running.LADDER).exists():
        running.check(asked, out)
        return Ladder((), "", RUNGS[0])
    held = running.read_ladder_file(out)
    # Before there is a candidate, only scores depend on what is to be kept (`_forget`).
    free = () if held["rungs"] else ("keep_at_least", "confidence")
    running.check_same(asked, held["request"], out, free)
    first = held.get("first", RUNGS[0])
    found = Ladder(tuple(Rung(**one) for one in held["rungs"]), held["ended"], first)
    if not {found.first, *(one.bits for one in found.rungs)} <= {*RUNGS}:
        raise InputError(f"{out} holds a walk over other candidates: choose another -o")
    return found


def walk(
    asked: Request,
    out: Path,
    run: running.Run,
    say: running.Say,
    within: float | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Ladder:
    """Build and test candidates until one fails, and move the smallest that keeps what is asked for
    to OUT/model, its scores of behaviour beside it.

    `say` is told of each stage, and whether its result was there. After `within` seconds no
    candidate is begun; `seconds` are what each stage is thought to take, by its name. Too little
    time for one candidate, or too few right answers of the dense model, are an InputError.
    """
    began, file, seconds = time.monotonic(), deciding(asked), seconds or {}
    found, before = read_ladder(asked, out), opening(asked, out)
    if within is not None and not found.rungs:
        due = _due([*before, *building(asked, out, RUNGS[0])], seconds)
        if due > within:
            raise InputError(
                f"--within {duration(within)} is too short: the first candidate takes about "
                f"{duration(due)} here"
            )
    with alone(out, wait=False):
        if found.ended == "time":
            found = _taken_back(found, asked, out)
        found = _kept(found, asked, out)  # before anything else, so that OUT is known as a walk's
        if found.left:
            floors, confidence = _floors(asked)
            _forget(found, asked, out)
            list(running.do(before, out, run, say))
            dense = load_scores(out / CANDIDATES / f"dense-{file}")
            judge(floors, [(dense, dense)], confidence)  # whether they can be proven
            if not found.rungs:
                left = math.inf if within is None else within - (time.monotonic() - began)
                found = replace(found, first=_first(asked, dense, out, left, seconds))
        while found.left:
            bits, at_ = found.left[0], time.monotonic()
            made = building(asked, out, bits)
            if within is not None and found.rungs:
                last = found.rungs[-1]
                known = _due(building(asked, out, last.bits), seconds)
                due = last.seconds * (_due(made, seconds) / known if known else 1.0)
                if at_ - began + due > within:
                    return _placed(_kept(replace(found, ended="time"), asked, out), asked, out)
            list(running.do(made, out, run, say))
            share = FIRST if bits <= found.first else 1 - FIRST
            level = _level(1.0 if found.first == RUNGS[0] else share, confidence)
            verdicts = _tested(asked, out, bits, dense, level)
            rung = Rung(bits, round(time.monotonic() - at_, 1), verdicts)
            found = replace(found, rungs=(*found.rungs, rung))
            ended = "" if found.left else "bottom" if found.bits == RUNGS[-1] else "failed"
            found = _kept(replace(found, ended=ended), asked, out)
        return _placed(found, asked, out)


def _tested(
    asked: Request, out: Path, bits: float, dense: CapabilityScores, level: float
) -> list[dict[str, Any]]:
    """Test the model of each draw at the level its sequence has, and write down beside it what of
    the confidence asked for comes of it."""
    (floors, confidence), file = _floors(asked), deciding(asked)
    places = [out / _folder(bits, draw) for draw in draws(asked)]
    pairs = [(dense, load_scores(place / file)) for place in places]
    verdicts = [replace(judge(floors, [own], level), confidence=confidence) for own in pairs]
    if all(one.passed for one in verdicts):
        verdicts = [replace(one, draws=len(verdicts)) for one in verdicts]
    for place, own, verdict in zip(places, pairs, verdicts, strict=True):
        write_json(place / FILE, record(verdict, floors, [own]))
    return [one.to_dict() for one in verdicts]


def _due(listed: Iterable[Stage], seconds: Mapping[str, float]) -> float:
    """Return what stages are thought to take, as far as that is known."""
    return sum(seconds.get(stage.name, 0.0) for stage in listed)


def _level(share: float, confidence: float) -> float:
    """Return the confidence of a share of the errors allowed."""
    return 1 - share * (1 - confidence)


def _first(
    asked: Request, dense: CapabilityScores, out: Path, left: float, seconds: Mapping[str, float]
) -> float:
    """Return the bits to begin with: those above the fewest with which what is thought to be kept
    would prove every floor; the most, where the items, a distance or the time is too little."""
    floors, confidence = _floors(asked)
    try:
        tested = judge(floors, [(dense, dense)], _level(1 - FIRST, confidence)).tested
        plain = plain_distance(asked.model, asked.device, asked.trust_remote_code)
    except CalmixError:
        return RUNGS[0]

    def proves(bits: float) -> bool:
        kept = expected(plain, bits, bits <= EFFORTS[asked.effort].levels)
        level = _level(FIRST, confidence)
        return all(lower_bound(round(kept * one.items), one.items, level) >= one.floor
                   for one in tested)  # fmt: skip

    fewest = max((place for place, bits in enumerate(RUNGS) if proves(bits)), default=0)
    bits = RUNGS[max(fewest, 1) - 1]
    return bits if _due(building(asked, out, bits), seconds) <= left else RUNGS[0]


def plain_distance(model: str, device: str, trust_remote_code: bool) -> float:
    """Return KL(dense || rounded) on the builtin texts, in nats a token: weights of the blocks are
    rounded to a grid of even steps on which normal ones take 4 bits.

    Raises:
        CalmixError: the distance cannot be measured, or the model not be opened.
    """
    opened = open_model(model, device=device, trust_remote_code=trust_remote_code)
    dense = reference(opened, texts(opened), cache=True)
    for layer in find_blocks(opened.model).layers:
        weight = layer.view().float()
        step = weight.std(1, keepdim=True) * math.sqrt(2 * math.pi * math.e) / 2**BITS
        layer.assign(torch.where(step > 0, (weight / step).round() * step, weight))
    return float(distance(opened, dense)["total"]["kl_mean"])


def expected(plain: float, bits: float, recovered: bool = False) -> float:
    """Return the share of answers that a candidate is thought to keep."""
    left = RECOVERED if recovered else 1.0
    return (1 - LOST) * math.exp(-left * plain * 4 ** (BITS - bits))


def _kept(ladder: Ladder, asked: Request, out: Path) -> Ladder:
    """Write down how far a walk is; of its models the smallest that is good stays, and those of
    candidates that may be built yet."""
    out.mkdir(parents=True, exist_ok=True)
    value = {"kind": KIND, "request": asked.model_dump(mode="json"), "ended": ladder.ended,
             "first": ladder.first, "rungs": [asdict(one) for one in ladder.rungs]}  # fmt: skip
    write_json(out / running.LADDER, sealed(value))
    for bits in {*RUNGS}.difference(ladder.left):
        for draw in draws(asked):
            for name in MODELS if draw or bits != ladder.bits else ():
                shutil.rmtree(out / _folder(bits, draw) / name, ignore_errors=True)
    return ladder


def _forget(ladder: Ladder, asked: Request, out: Path) -> None:
    """Remove scores of other items than are asked now, of floors that were asked before; those of
    candidates that were tested stay."""
    tested = [out / _folder(rung.bits, draw) for rung in ladder.rungs for draw in draws(asked)]
    file = deciding(asked)
    wanted = scored(asked)[file].hash
    for path in (out / CANDIDATES).rglob(f"*{file}"):
        if path.parent not in tested and load_scores(path).suite["hash"] != wanted:
            remove(path)


def _taken_back(ladder: Ladder, asked: Request, out: Path) -> Ladder:
    """Let a walk that time ended go on: its model is a candidate again, and what was made of it for
    OUT goes."""
    _move(out, out / _folder(ladder.bits or RUNGS[0]))
    made = {stage.leaves for stage in stages(asked, out)} - {CALIBRATION, None}
    for name in (*made, MANIFEST, running.RUN, FILE, "card.html"):
        remove(out / str(name))
    return replace(ladder, ended="")


def _placed(ladder: Ladder, asked: Request, out: Path) -> Ladder:
    """Move the smallest candidate that is good to OUT, with what was tested, and with its answers:
    asked again in other batches, a few would differ."""
    if ladder.bits is not None:
        chosen = out / _folder(ladder.bits)
        for name in (SCORES if choose(asked.suite).asks else BEHAVIOUR, FILE):
            if (chosen / name).exists() and not (out / name).exists():
                write_bytes(out / name, (chosen / name).read_bytes())
        _move(chosen, out)
    return ladder


def _move(place: Path, to: Path) -> None:
    """Move the models of a candidate that are there, the last one last."""
    for name in MODELS:
        if (place / name).exists():
            (place / name).rename(to / name)
