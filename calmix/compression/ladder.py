"""The smallest model that keeps what is asked for: candidates from most bits to fewest.

A fixed sequence: each candidate is tested at the whole confidence, and the first that fails ends
the walk, so that no bound has to be widened for the number of candidates (Maurer, Hothorn and
Lehmacher, 1995). Nothing else is chosen by the items: all of them decide.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calmix.compression.plan import BEHAVIOUR, EFFORTS, Request, Stage, stages
from calmix.compression.running import (
    CANDIDATES,
    LADDER,
    check,
    check_same,
    forget,
    read_ladder_file,
)
from calmix.errors import CalmixError, InputError
from calmix.evaluation.evaluate import choose, runnable
from calmix.evaluation.floors import (
    CONFIDENCE,
    FILE,
    check_possible,
    expected,
    judge,
    needed,
    parse_floors,
    record,
)
from calmix.evaluation.scores import load_scores
from calmix.files import alone, write_json
from calmix.manifest import sealed

RUNGS = (6.0, 5.0, 4.0, 3.5, 3.0, 2.6, 2.3, 2.0)  # bits a weight
FOLDER, SCORES, KIND = CANDIDATES, "scores.json", "ladder of candidates"
HELPS = (
    "What may help: a lower floor, more items (--effort best), more rows, or text of the abilities "
    "that failed (--keep)."
)
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Rung:
    """A candidate that was built and tested; `verdict` is of `calmix.evaluation.floors`."""

    bits: float
    seconds: float
    verdict: dict[str, Any]

    @property
    def kept(self) -> bool:
        """Whether it keeps all that is asked for."""
        return bool(self.verdict["passed"])


@dataclass(frozen=True)
class Ladder:
    """Candidates so far, and how the walk ended: `failed`, `time` or `bottom`; empty before."""

    rungs: tuple[Rung, ...] = ()
    ended: str = ""

    @property
    def bits(self) -> float | None:
        """Bits of the smallest candidate that keeps what is asked for; None if none does."""
        return min((one.bits for one in self.rungs if one.kept), default=None)

    @property
    def left(self) -> tuple[float, ...]:
        """Bits of the candidates that may be built yet."""
        return () if self.ended else RUNGS[len(self.rungs) :]

    def rows(self) -> list[dict[str, Any]]:
        """Return a record a candidate: what it keeps of every ability, and what is proven."""
        return [
            {"bits": f"{rung.bits:g}", "kept": "yes" if rung.kept else "no"}
            | {one["ability"]: f"{100 * one['kept']:.1f} ({100 * one['bound']:.1f})"
               for one in rung.verdict["tested"]}
            for rung in self.rungs
        ]  # fmt: skip

    def why(self) -> str:
        """Return in a sentence why the walk ended where it did."""
        if self.ended == "time":
            return (
                "the time given was over before the next candidate: for a smaller one, name "
                "another folder and more time"
            )
        if self.ended == "bottom":
            return f"{RUNGS[-1]:g} bits are the fewest that are tried"
        last = self.rungs[-1]
        told = ", ".join(
            f"{one['ability']} keeps {100 * one['kept']:.1f} % of {one['items']} items by "
            f"{one['measure']}, proven {100 * one['bound']:.1f} %, asked {100 * one['floor']:g} %"
            for one in last.verdict["tested"] if not one["passed"]
        )  # fmt: skip
        return f"{last.bits:g} bits fail: {told}"


def whole(asked: Request, out: Path) -> list[Stage]:
    """Return all stages of a walk on which no candidate fails."""
    suites = suites_of(asked)
    made = [one for bits in RUNGS for one in building(asked, out, bits, suites)]
    return opening(asked, out) + made


def opening(asked: Request, out: Path) -> list[Stage]:
    """Return the stages before the first candidate."""
    return [*drawing(asked, out), *scoring(asked, out, suites_of(asked))]


def provable(asked: Request) -> str:
    """Return how many right answers the floors need of the dense model."""
    floors, confidence = parse_floors(asked.keep_at_least or ""), asked.confidence or CONFIDENCE
    told = ", ".join(
        f"{needed(floor, confidence)} {f'in {name}' if name else 'in each ability'}"
        for name, floor in floors.items()
    )
    return f"to prove the floors the dense model must get right at least: {told}"


def drawing(asked: Request, out: Path) -> list[Stage]:
    """Return the stage that draws the calibration set; none where it is there."""
    return [one for one in stages(asked, out) if one.leaves == "calibration"]


def building(asked: Request, out: Path, bits: float, suites: Sequence[str]) -> list[Stage]:
    """Return the stages of a candidate: it is quantised, and scored against the dense scores."""
    held = asked.calibration if asked.saved else str(out / "calibration")
    made = stages(at(asked, bits), out / FOLDER / f"{bits:g}", held)
    found = []
    for one in made:
        words = one.arguments
        if one.leaves in suites:
            words = _with(words, "--against", str(out / FOLDER / f"dense-{one.leaves}"))
        if one.leaves in ("model", *suites):
            found.append(replace(one, name=f"{bits:g} bits, {one.name}", arguments=words))
    return found


def scoring(asked: Request, out: Path, suites: Sequence[str]) -> list[Stage]:
    """Return the stages that score the dense model alone."""
    found = []
    for one in stages(at(asked, RUNGS[0]), out, "-"):
        if one.leaves in suites:
            leaves = f"dense-{one.leaves}"
            words = _with(one.arguments, "--against", None)
            words = _with(("evaluate", asked.model, *words[2:]), "-o", str(out / FOLDER / leaves))
            found.append(Stage(f"{one.name}, dense", words, leaves))
    return found


def _with(words: tuple[str, ...], flag: str, value: str | None) -> tuple[str, ...]:
    """Return arguments with another value of a flag, or without the flag."""
    place = words.index(flag)
    return (*words[:place], *(() if value is None else (flag, value)), *words[place + 2 :])


def at(asked: Request, bits: float) -> Request:
    """Return the request of one candidate."""
    return asked.model_copy(update={"bits": bits})


def suites_of(asked: Request) -> list[str]:
    """Return the files of scores that decide: of behaviour, and of likelihood where an ability is
    not judged by generated answers, so that `calmix check OUT` sees the same items."""
    if asked.suite != "offline":
        return [SCORES]
    held = choose("abilities", **EFFORTS[asked.effort].behaviour)
    suite, _ = runnable(held, asked.allow_code_execution)
    written = {suite.dimension_of(name) for name, task in suite.tasks.items() if task.writes}
    floors = {*parse_floors(asked.keep_at_least or "")}
    named = floors if "" not in floors else {*suite.dimensions, *choose("offline").dimensions}
    return [BEHAVIOUR, SCORES] if named - written else [BEHAVIOUR]


def read_ladder(asked: Request, out: Path) -> Ladder:
    """Return what is known of a walk in OUT; InputError if it is of another request."""
    if not (out / LADDER).exists():
        check(asked, out)
        return Ladder()
    held = read_ladder_file(out)
    # Before there is a candidate, nothing in OUT depends on what is to be kept.
    free = () if held["rungs"] else ("keep_at_least", "confidence")
    check_same(asked, held["request"], out, free)
    return Ladder(tuple(Rung(**one) for one in held["rungs"]), held["ended"])


def walk(
    asked: Request,
    out: Path,
    run: Callable[[Sequence[str]], None],
    say: Callable[[Stage, bool], None],
    *,
    within: float | None = None,
    first: float = 0.0,
) -> Ladder:
    """Build and test candidates until one fails, and move the smallest that keeps what is asked for
    to OUT/model, its scores of behaviour beside it.

    Args:
        run: runs a command line.
        say: is told of each stage, and whether its result was there.
        within: seconds after which no candidate is begun.
        first: seconds that a candidate is thought to take, before one is built.

    Raises:
        InputError: the dense model's right answers are too few to prove a floor.
    """
    began = time.monotonic()
    floors, confidence = parse_floors(asked.keep_at_least or ""), asked.confidence or CONFIDENCE
    found = read_ladder(asked, out)
    folder = out / FOLDER
    with alone(out, wait=False):

        def keep(ladder: Ladder) -> Ladder:
            value = {"kind": KIND, "request": asked.model_dump(mode="json"), "ended": ladder.ended,
                     "rungs": [asdict(one) for one in ladder.rungs]}  # fmt: skip
            write_json(out / LADDER, sealed(value))
            return ladder

        def drop(ladder: Ladder) -> None:
            for other in ladder.rungs:  # the smallest that is good stays
                if other.bits != ladder.bits:
                    shutil.rmtree(folder / f"{other.bits:g}" / "model", ignore_errors=True)

        def do(listed: Sequence[Stage], place: Path) -> None:
            for stage in listed:
                there = (place / str(stage.leaves)).exists()
                say(stage, there)
                if not there:
                    try:
                        run(stage.arguments)
                    except CalmixError:
                        forget(out)
                        raise

        out.mkdir(parents=True, exist_ok=True)
        keep(found)  # before anything else, so that OUT is known as a walk's
        folder.mkdir(exist_ok=True)
        suites, dense = suites_of(asked), []
        if found.left:
            do(drawing(asked, out), out)
            do(scoring(asked, out, suites), folder)
            dense = [load_scores(folder / f"dense-{one}") for one in suites]
            check_possible(expected(floors, dense, confidence), floors, confidence)
        for bits in found.left:
            place = folder / f"{bits:g}"
            due = found.rungs[-1].seconds if found.rungs else first
            if within is not None and time.monotonic() - began + due > within:
                if not found.rungs:
                    raise InputError(
                        "the time given is over before the first candidate: run the same command "
                        "again with more of it (--within)"
                    )
                found = keep(Ladder(found.rungs, "time"))
                break
            start = time.monotonic()
            place.mkdir(exist_ok=True)
            do(building(asked, out, bits, suites), place)
            scored = [load_scores(place / one) for one in suites]
            pairs = list(zip(dense, scored, strict=True))
            verdict = judge(floors, pairs, confidence)
            write_json(place / FILE, record(verdict, floors, pairs))
            rung = Rung(bits, round(time.monotonic() - start, 1), verdict.to_dict())
            ended = "failed" if not rung.kept else "bottom" if bits == RUNGS[-1] else ""
            found = keep(Ladder((*found.rungs, rung), ended))
            drop(found)
            if not rung.kept:
                break
        drop(found)
        if found.bits is not None:
            _place(folder / f"{found.bits:g}", out)
    return found


def _place(chosen: Path, out: Path) -> None:
    """Move a candidate to OUT, with its scores of behaviour and what was tested."""
    for name in (BEHAVIOUR, FILE):
        if (chosen / name).exists() and not (out / name).exists():
            shutil.copy2(chosen / name, out / f".{name}")
            (out / f".{name}").replace(out / name)
    if (chosen / "model").exists():
        (chosen / "model").rename(out / "model")


def parse_duration(text: str) -> float:
    """Return the seconds of `90s`, `30m`, `30min` or `2h`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)\s*", text)
    if found is None or not float(found[1]):
        raise InputError(f"--within '{text}' is no time, such as 90m or 2h")
    return float(found[1]) * SECONDS[found[2]]
