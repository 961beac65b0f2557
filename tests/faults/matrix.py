"""The faults, verb by verb: each ends with an undisturbed run's bytes, or with a clear stop."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.running import run, start, tree, wait
from tests.study.worker import write_study
from tests.tiny import save_tiny_model

RUN = ("calmix-run.json",)  # holds date and seconds
SMALL = ("--rows", 8, "--length", 64, "--leakage", "off")


@dataclass
class Row:
    """One line of the table.

    Attributes:
        tried: how often; `ended` how many of them the fault met at work.
        found: what went wrong, a line each.
    """

    what: str
    fault: str
    tried: int = 0
    ended: int = 0
    found: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
        """How many ended as they must."""
        return self.tried - len(self.found)


@dataclass(frozen=True)
class Verb:
    """A command that writes `out` in a folder.

    Attributes:
        arguments: of the command line, given the folder to write in; asked again after a fault.
        result: what must be the same, given that folder.
    """

    arguments: Callable[[Path], tuple[object, ...]]
    result: Callable[[Path], Mapping[str, object]]


def verbs(files: Path) -> dict[str, Verb]:
    """Return the commands, over tiny files that are written to `files`."""
    model = save_tiny_model(files / "short")
    (files / "text.txt").write_text("alpha beta gamma delta prime sum return river " * 300)
    study = write_study(files, model)

    def prune(*options: object) -> Verb:
        drawn = ("--calibration", files / "text.txt", *SMALL, "--resume")
        return Verb(lambda at: ("prune", model, "-o", at / "out", *drawn, *options), _files)

    found = {
        "prune sparsegpt": prune("--sparsity", 0.5),
        "prune wanda": prune("--method", "wanda", "--pattern", "2:4"),
        "prune magnitude": Verb(
            lambda at: ("prune", model, "-o", at / "out", "--method", "magnitude", "--sparsity",
                        0.5, "--resume"), _files,
        ),
        "prune block": prune("--sparsity", 0.5, "--propagation", "block"),
        "prune targets": prune("--method", "sparsegpt,wanda", "--sparsity", "0.4,0.6"),
        "calibrate": Verb(
            lambda at: ("calibrate", files / "text.txt", "-m", model, "-o", at / "out", *SMALL),
            _files,
        ),
        "generate": Verb(
            lambda at: ("generate", "self-cal", "-m", model, "-o", at / "out", *SMALL), _files
        ),
        "evaluate": Verb(
            lambda at: ("evaluate", files / "model", "--suite", files / "suite.yaml", "-o",
                        at / "out.json"), _scores,
        ),
        "study": Verb(lambda at: ("study", "run", study, "-o", at / "out"), _study),
    }  # fmt: skip
    return found


def _files(folder: Path) -> Mapping[str, object]:
    return tree(folder, without=RUN)


def _scores(folder: Path) -> Mapping[str, object]:
    value = json.loads((folder / "out.json").read_text())
    return {"scores": _timeless(value), "files": sorted(tree(folder))}


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {key: _timeless(held) for key, held in value.items() if key != "seconds"}
    return [_timeless(held) for held in value] if isinstance(value, list) else value


def _study(folder: Path) -> Mapping[str, object]:
    store = folder / "out"
    kept = {name: held for name, held in tree(store).items() if name.endswith("safetensors")}
    for path in sorted(store.glob("trials/*/scores.json")):
        kept[str(path)] = _timeless(json.loads(path.read_text()))  # type: ignore[assignment]
    return {**_relative(kept, store), "files": sorted(tree(folder))}


def _relative(kept: Mapping[str, object], store: Path) -> dict[str, object]:
    return {name.removeprefix(f"{store}/"): value for name, value in kept.items()}


def faults(name: str, verb: Verb, place: Path, count: int, how: str, seed: int = 0) -> Row:
    """End a verb at `count` seeded moments, up to three times in a row, and ask for it again."""
    row = Row(name, "SIGKILL" if how == "kill" else "SIGINT")
    log = place / "log"
    clean = _fresh(place / "clean")
    whole = run(verb.arguments(clean), log)
    if whole.code:
        row.tried, row.found = 1, [f"undisturbed: {whole.errors[-300:]}"]
        return row
    wanted = verb.result(clean)
    for number in range(count):
        rng = random.Random(zlib.crc32(f"{name}/{how}/{seed}/{number}".encode()))
        folder = _fresh(place / "tried")
        row.tried += 1
        ended = None
        for _ in range(rng.choice([1, 1, 2, 3])):
            moment = rng.uniform(0, 1.05) * whole.seconds
            ended = run(verb.arguments(folder), log, moment, how)
            row.ended += ended.code not in (0, 2)
            if ended.code in (0, 2) or "Traceback" in ended.errors:
                break
        if ended is not None and "Traceback" in ended.errors:
            row.found.append(f"{number}: {ended.errors[-300:]}")
            continue
        again = run(verb.arguments(folder), log)
        there = "exists" in again.errors or "finished" in again.errors
        if again.code not in (0, 2) or (again.code == 2 and not there):
            row.found.append(f"{number}: {again.errors[-300:]}")
        elif (got := verb.result(folder)) != wanted:
            row.found.append(f"{number}: differs in {_different(wanted, got)}")
    return row


def _different(wanted: Mapping[str, object], got: Mapping[str, object]) -> str:
    names = [n for n in {**wanted, **got} if wanted.get(n) != got.get(n)]
    told = f"; files {got['files']}" if "files" in names else ""
    return f"{sorted(names)[:6]}{told[:300]}"


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def two_at_once(name: str, verb: Verb, place: Path, count: int) -> Row:
    """Start a verb twice on one output: one makes it, the other stops in one line or finds it."""
    row = Row(name, "two processes")
    clean = _fresh(place / "clean")
    if run(verb.arguments(clean), place / "log").code:
        row.tried, row.found = 1, ["undisturbed"]
        return row
    wanted = verb.result(clean)
    for number in range(count):
        folder = _fresh(place / "tried")
        logs = [place / "log-a", place / "log-b"]
        children = [start(verb.arguments(folder), log, None, "kill") for log in logs]
        ended = [wait(child, log) for child, log in zip(children, logs, strict=True)]
        row.tried, row.ended = row.tried + 1, row.ended + 1
        bad = [one.errors[-300:] for one in ended if one.code and not one.line]
        if bad or all(one.code for one in ended):
            row.found.append(f"{number}: {bad or [one.errors[-200:] for one in ended]}")
        elif (got := verb.result(folder)) != wanted:
            row.found.append(f"{number}: differs in {_different(wanted, got)}")
    return row


def small_disk(name: str, verb: Verb, place: Path, *, read_only: bool) -> Row | None:
    """Write to a disk with room for a part, then for all; or to one that takes nothing.

    None where nothing can be mounted.
    """
    row = Row(name, "read-only disk" if read_only else "full disk")
    clean = _fresh(place / "clean")
    if run(verb.arguments(clean), place / "log").code:
        row.tried, row.found = 1, ["undisturbed"]
        return row
    wanted = verb.result(clean)
    size = sum(path.stat().st_size for path in clean.rglob("*") if path.is_file())
    for share in (None,) if read_only else (0.1, 0.4, 0.7, 0.9, 1.0):
        disk = _fresh(place / "disk")
        room = "ro" if share is None else f"size={max(4096, int(share * size))}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", disk],
                          capture_output=True, check=False).returncode:  # fmt: skip
            return None
        try:
            row.tried += 1
            ended = run(verb.arguments(disk), place / "log")
            row.ended += ended.code != 0
            if ended.code and not ended.line:
                row.found.append(f"{room}: {ended.errors[-300:]}")
            elif not read_only:
                room = ["mount", "-o", "remount,size=64m", str(disk)]
                subprocess.run(room, check=True, capture_output=True)
                again = run(verb.arguments(disk), place / "log")
                if again.code and "exists" not in again.errors:
                    row.found.append(f"{share}: then {again.errors[-300:]}")
                elif (got := verb.result(disk)) != wanted:
                    row.found.append(f"{share}: differs in {_different(wanted, got)}")
        finally:
            subprocess.run(["umount", disk], check=False, capture_output=True)
    return row
