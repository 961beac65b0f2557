"""The commands under fault injection, and the folders they run in."""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import calmix.pruning.checkpoint
import calmix.study.running  # imported once, for every fork
from calmix.files import cache_dir
from calmix.recovery import distill
from tests.forks import command, run
from tests.study.conftest import write_study
from tests.tiny import save_tiny_model

RUN = ("calmix-run.json",)  # holds date and seconds
SMALL = ("--rows", 8, "--length", 64, "--leakage", "off")
PRUNES = ("prune sparsegpt", "prune wanda", "prune magnitude", "prune block")
NAMES = (*PRUNES, "recover distill", "recover blocks", "calibrate", "generate", "evaluate", "study")
CACHED = ("generate", "evaluate", "study")  # commands that use the cache


@dataclass(frozen=True)
class Verb:
    """A command that writes `out` in a folder: its arguments, its result to compare, a command that
    detects damage in the result (if there is one), and options to start over."""

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
    drawn = calmix.calibration_set(str(text), opened, rows=8, length=64, leakage="off")
    drawn.save(files / "set")
    calmix.prune(opened.model, drawn.ids, method="wanda", pattern=calmix.Unstructured(0.5))
    opened.model.save_pretrained(files / "pruned")
    opened.tokenizer.save_pretrained(files / "pruned")

    calmix.evaluate(str(files / "model"), files / "suite.yaml", limit=1)  # imports all

    def kept(verb, *options, resume=("--resume",)):
        return Verb(
            lambda at: (verb, *options, "-o", at / "out", *resume),
            partial(tree, without=RUN),
            lambda at: ("doctor", "inspect", at / "out"),
        )

    own = ("--calibration", text, *SMALL)
    recovered = (files / "pruned", "--against", model, "--calibration", files / "set")
    scored = (files / "model", "--suite", files / "suite.yaml")
    actual = {
        "prune sparsegpt": kept("prune", model, *own, "--sparsity", 0.5),
        "prune wanda": kept("prune", model, *own, "--method", "wanda", "--pattern", "2:4"),
        "prune magnitude": kept("prune", model, "--method", "magnitude", "--sparsity", 0.5),
        "prune block": kept("prune", model, *own, "--sparsity", 0.5, "--propagation", "block"),
        "recover distill": kept("recover", *recovered, "--epochs", 1),
        "recover blocks": kept("recover", *recovered, "--method", "blocks", "--epochs", 1),
        "calibrate": kept("calibrate", text, "-m", model, *SMALL, resume=()),
        "generate": kept("calibrate", "self-cal", "-m", model, *SMALL, resume=()),
        "evaluate": Verb(lambda at: ("evaluate", *scored, "-o", at / "out.json"), _scores),
        "study": Verb(lambda at: ("study", "run", study, "-o", at / "out"), _study, anew=()),
    }
    assert tuple(actual) == NAMES
    return actual


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
        return {key: _timeless(content) for key, content in value.items() if key != "seconds"}
    return [_timeless(content) for content in value] if isinstance(value, list) else value


def _study(folder):
    store = folder / "out"
    kept = {name: stored for name, stored in tree(store).items() if name.endswith("safetensors")}
    for path in sorted(store.glob("trials/*/scores.json")):
        kept[str(path.relative_to(store))] = _timeless(json.loads(path.read_text()))
    return {**kept, "files": sorted(tree(folder))}


class Place:
    """The folders of one command under test, and the result of an undisturbed run."""

    def __init__(self, name, verb, folder):
        self.name, self.verb, self.folder = name, verb, folder
        self.log = folder / "log"
        self.assets = cache_dir() / "assets"  # before a fork sets its own cache
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
        """Run the command in a fork."""
        return run(self.acts(at, *options), self.log, **how)

    def acts(self, at, *options):
        """Return a function that runs the command with its own cache."""

        def act():
            os.environ["CALMIX_CACHE"] = str(self.folder / "cache")
            distill.SAVING = 0  # saves every state, so that there are files to damage
            command(*self.verb.arguments(at), *options)()

        return act

    def moment(self, rng):
        """Return a time, in processor seconds, during a run or just after it."""
        return rng.uniform(0, 1.05) * self.whole.seconds

    def judge(self, at, again):
        """Check the result of running the command again."""
        assert not again.code or (again.line and "exists" in again.errors), again.errors
        got = self.verb.result(at)
        names = [n for n in {**self.wanted, **got} if self.wanted.get(n) != got.get(n)]
        assert not names, (names, again.errors[-600:], sorted(tree(at)))

    def seeded(self, fault, number):
        """Return the random generator of one attempt."""
        return random.Random(zlib.crc32(f"{self.name}/{fault}/0/{number}".encode()))
