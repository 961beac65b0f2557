"""The faults, verb by verb: each ends with an undisturbed run's bytes, or with a clear stop."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import calmix.pruning.checkpoint
import calmix.study.running  # imported once, for every fork
from calmix.files import cache_dir
from calmix.recovery import distill
from tests.forks import command, run, start, wait
from tests.study.conftest import write_study
from tests.tiny import save_tiny_model

RUN = ("calmix-run.json",)  # holds date and seconds
SMALL = ("--rows", 8, "--length", 64, "--leakage", "off")
NAMES = (
    "prune sparsegpt", "prune wanda", "prune magnitude", "prune block", "prune targets",
    "recover distill", "recover blocks", "calibrate", "generate", "evaluate", "study",
)  # fmt: skip
CACHED = ("generate", "evaluate", "study")  # what keeps something in the cache


@dataclass
class Row:
    """One line of the table: how often it was tried, how many of them the fault met at work, and
    what went wrong, a line each."""

    what: str
    fault: str
    tried: int = 0
    ended: int = 0
    found: list[str] = field(default_factory=list)

    @property
    def survived(self):
        """How many ended as they must."""
        return self.tried - len(self.found)


@dataclass(frozen=True)
class Verb:
    """A command that writes `out` in a folder: its arguments, and what must be the same, given that
    folder; what reads the result and tells damage, if anything does; and options to start over."""

    arguments: Callable[[Path], tuple[object, ...]]
    result: Callable[[Path], Mapping[str, object]]
    reading: Callable[[Path], tuple[object, ...]] | None = None
    anew: tuple[str, ...] = ("--overwrite",)


def verbs(files):
    """Return the commands, over tiny files that are written to `files`."""
    model = save_tiny_model(files / "short")
    text = files / "text.txt"
    text.write_text("alpha beta gamma delta prime sum return river " * 300)
    study = write_study(files, model)
    opened = calmix.open_model(str(model))
    drawn = calmix.resolve(str(text), opened, rows=8, length=64, leakage="off")
    drawn.save(files / "set")
    calmix.prune(opened.model, drawn.ids, method="wanda", pattern=calmix.Unstructured(0.5))
    opened.model.save_pretrained(files / "pruned")
    opened.tokenizer.save_pretrained(files / "pruned")

    calmix.evaluate(str(files / "model"), files / "suite.yaml", limit=1)  # imports all

    def kept(verb, *options, resume=True):
        more = ("--resume",) if resume else ()
        return Verb(
            lambda at: (verb, *options, "-o", at / "out", *more),
            partial(tree, without=RUN),
            lambda at: ("doctor", "inspect", at / "out"),
        )

    own = ("--calibration", text, *SMALL)
    recovered = (files / "pruned", "--against", model, "--calibration", files / "set")
    found = {
        "prune sparsegpt": kept("prune", model, *own, "--sparsity", 0.5),
        "prune wanda": kept("prune", model, *own, "--method", "wanda", "--pattern", "2:4"),
        "prune magnitude": kept("prune", model, "--method", "magnitude", "--sparsity", 0.5),
        "prune block": kept("prune", model, *own, "--sparsity", 0.5, "--propagation", "block"),
        "prune targets": kept(
            "prune", model, *own, "--method", "sparsegpt,wanda", "--sparsity", "0.4,0.6"
        ),
        "recover distill": kept("recover", *recovered, "--epochs", 1),
        "recover blocks": kept("recover", *recovered, "--method", "blocks", "--epochs", 1),
        "calibrate": kept("calibrate", text, "-m", model, *SMALL, resume=False),
        "generate": kept("calibrate", "self-cal", "-m", model, *SMALL, resume=False),
        "evaluate": Verb(
            lambda at: ("evaluate", files / "model", "--suite", files / "suite.yaml", "-o",
                        at / "out.json"), _scores,
        ),
        "study": Verb(lambda at: ("study", "run", study, "-o", at / "out"), _study, anew=()),
    }  # fmt: skip
    found["prune targets"] = Verb(found["prune targets"].arguments, found["prune targets"].result)
    assert tuple(found) == NAMES
    return found


def tree(folder, without=()):
    """Return every file below a folder by its path, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def _scores(folder):
    value = json.loads((folder / "out.json").read_text())
    return {"scores": _timeless(value), "files": sorted(tree(folder))}


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(held) for key, held in value.items() if key != "seconds"}
    return [_timeless(held) for held in value] if isinstance(value, list) else value


def _study(folder):
    store = folder / "out"
    kept = {name: held for name, held in tree(store).items() if name.endswith("safetensors")}
    for path in sorted(store.glob("trials/*/scores.json")):
        kept[str(path.relative_to(store))] = _timeless(json.loads(path.read_text()))
    return {**kept, "files": sorted(tree(folder))}


class Place:
    """Where a verb is tried: its folders, and what an undisturbed run gives."""

    def __init__(self, name, verb, folder):
        self.name, self.verb, self.folder = name, verb, folder
        self.log = folder / "log"
        self.assets = cache_dir() / "assets"  # asked here: a fork has this verb's own cache
        clean = self.fresh("clean")
        self.whole = self.run(clean)
        assert not self.whole.code, f"undisturbed: {self.whole.errors[-300:]}"
        self.wanted = verb.result(clean)

    def fresh(self, name):
        """Return an empty folder; the cache is empty too."""
        for folder in (self.folder / "cache", self.folder / name):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        (self.folder / "cache" / "assets").symlink_to(self.assets)
        return self.folder / name

    def run(self, at, *options, **how):
        """Run the verb in a fork."""
        return run(self.acts(at, *options), self.log, **how)

    def acts(self, at, *options):
        """Return what runs the verb, with the cache of its own."""

        def act():
            os.environ["CALMIX_CACHE"] = str(self.folder / "cache")
            distill.SAVING = 0  # every state is kept: there is something to damage
            command(*self.verb.arguments(at), *options)()

        return act

    def moment(self, rng):
        """Return processor seconds at which a run is at work, or has just ended."""
        return rng.uniform(0, 1.05) * self.whole.seconds

    def judged(self, at, again):
        """Return what is wrong with the result of the verb asked again; None if nothing."""
        if again.code and not (again.line and "exists" in again.errors):
            return again.errors[-300:]
        got = self.verb.result(at)
        if got == self.wanted:
            return None
        names = [n for n in {**self.wanted, **got} if self.wanted.get(n) != got.get(n)]
        told = f"; files {got['files']}" if "files" in names else ""
        return f"differs in {sorted(names)[:6]}{told[:300]}"

    def seeded(self, fault, number):
        """Return what decides a try."""
        return random.Random(zlib.crc32(f"{self.name}/{fault}/0/{number}".encode()))


def faults(place, count, how):
    """End a verb at `count` seeded moments, up to three times in a row, and ask for it again."""
    row = Row(place.name, "SIGKILL" if how == "kill" else "SIGINT")
    for number in range(count):
        rng = place.seeded(how, number)
        folder = place.fresh("tried")
        row.tried += 1
        ended = None
        for _ in range(rng.choice([1, 1, 2, 3])):
            ended = place.run(folder, after=place.moment(rng), how=how)
            row.ended += ended.code not in (0, 2)
            if ended.code in (0, 2) or "Traceback" in ended.errors:
                break
        if ended is not None and "Traceback" in ended.errors:
            row.found.append(f"{number}: {ended.errors[-300:]}")
        elif wrong := place.judged(folder, place.run(folder)):
            row.found.append(f"{number}: {wrong}")
    return row


def damage(place, count):
    """End a verb, damage one file of what it has left, and ask for it again or read it.

    Bytes are cut off or flipped, or two files are swapped. Of a whole result, `inspect` must tell;
    of an unfinished one, the verb: it stops in one line, and starts over if told to.
    """
    row = Row(place.name, "damaged file")
    verb = place.verb
    for number in range(count):
        rng = place.seeded("damage", number)
        folder = place.fresh("tried")
        place.run(folder, after=None if number % 2 else place.moment(rng))
        files = [folder / name for name, held in tree(folder, without=RUN).items() if held]
        if not files:
            continue
        row.tried += 1
        told = _damage(rng, files)
        if verb.reading is not None and (folder / "out").exists():
            row.ended += 1
            read = run(command(*verb.reading(folder)), place.log)
            if not read.line:
                row.found.append(f"{number}, {told}: code {read.code}, {read.errors[-300:]}")
            continue
        again = place.run(folder)
        row.ended += again.line
        if again.line and verb.anew:
            again = place.run(folder, *verb.anew)
        if again.line or (verb.reading is None and not again.code):  # no hash to go by
            continue
        if wrong := place.judged(folder, again):
            row.found.append(f"{number}, {told}: {wrong}")
    return row


def _damage(rng, files):
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    way = rng.choice(["cut", "flip", "swap"])
    if way == "swap" and len(files) > 1:
        other = rng.choice([file for file in files if file != path])
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return f"{path.name} swapped with {other.name}"
    at = rng.randrange(len(content))
    if way == "cut":
        del content[at:]
    else:
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.name} {way} at {at}"


def two_at_once(place, count):
    """Start a verb twice on one output: one makes it, the other stops in one line or finds it."""
    row = Row(place.name, "two processes", count, count)
    for number in range(count):
        folder = place.fresh("tried")
        ended = _both(place, [folder, folder])
        done = next((one for one in ended if not one.code), None)
        if bad := [one.errors[-300:] for one in ended if one.code and not one.line]:
            row.found.append(f"{number}: {bad}")
        elif done is None:
            row.found.append(f"{number}: {[one.errors[-200:] for one in ended]}")
        elif wrong := place.judged(folder, done):
            row.found.append(f"{number}: {wrong}")
    return row


def one_cache(place, count):
    """Start a verb twice on two outputs and one cache: both have what one alone would."""
    row = Row(place.name, "one cache", count, count)
    for number in range(count):
        folders = [place.fresh("tried"), place.fresh("other")]
        for folder, ended in zip(folders, _both(place, folders), strict=True):
            if wrong := ended.errors[-300:] if ended.code else place.judged(folder, ended):
                row.found.append(f"{number}: {wrong}")
                break
    return row


def _both(place, folders):
    logs = [place.folder / f"log-{number}" for number in (0, 1)]
    pairs = list(zip(folders, logs, strict=True))
    children = [start(place.acts(folder), log) for folder, log in pairs]
    return [wait(child, log) for child, log in zip(children, logs, strict=True)]


def small_disk(place, *, read_only):
    """Write to a tmpfs too small for the result, or to one that takes nothing, and then to more.

    None if this process may not mount one.
    """
    row = Row(place.name, "read-only disk" if read_only else "full disk")
    size = sum(path.stat().st_size for path in (place.folder / "clean").rglob("*"))
    for share in (None,) if read_only else (0.1, 0.4, 0.7, 0.9, 1.0):
        disk = place.fresh("disk")
        room = "ro" if share is None else f"size={max(4096, int(share * size))}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", disk],
                          capture_output=True, check=False).returncode:  # fmt: skip
            return None
        try:
            row.tried += 1
            ended = place.run(disk)
            row.ended += ended.code != 0
            if ended.code and not ended.line:
                row.found.append(f"{room}: {ended.errors[-300:]}")
            elif not read_only:
                room = ["mount", "-o", "remount,size=64m", str(disk)]
                subprocess.run(room, check=True, capture_output=True)
                if wrong := place.judged(disk, place.run(disk)):
                    row.found.append(f"{share}: then {wrong}")
        finally:
            subprocess.run(["umount", disk], check=False, capture_output=True)
    return row


def everything(name, verb, folder, count, tell):
    """Bring every fault upon a verb: `count` kills and damaged files, less of the others."""
    torch.set_num_threads(1)
    place = Place(name, verb, folder)
    few, fewer = -(-count // 5), -(-count // 25)
    rows = []
    for fault in (
        partial(faults, place, count, "kill"),
        partial(faults, place, few, "interrupt"),
        partial(damage, place, count),
        partial(two_at_once, place, fewer),
        *([partial(one_cache, place, fewer)] if name in CACHED else []),
        partial(small_disk, place, read_only=False),
        partial(small_disk, place, read_only=True),
    ):
        if (row := fault()) is not None:
            tell(row)
            rows.append(row)
    return rows
