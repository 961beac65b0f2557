"""What `compress` does, as data: a list of stages, each a command line and what it leaves in OUT.

Printing, the manifest, resuming and the dry run all read that list; nothing here runs anything.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from calmix.analysis.ranking import check_weights
from calmix.calibration import ask, mix_text, open_tokenizer, parse_mix, saved_set
from calmix.calibration.selfgen.generators import CHAT
from calmix.calibration.selfgen.prompts import chat_turns
from calmix.errors import InputError, nearest
from calmix.evaluation.evaluate import choose, runnable, suite_items
from calmix.evaluation.floors import CONFIDENCE, needed, parse_floors
from calmix.evaluation.generations import read_prompts
from calmix.evaluation.suites import Suite, suite_file
from calmix.files import sha256_file, user_path
from calmix.models import check_models, resolve_model
from calmix.models.opening import fingerprint
from calmix.models.shards import read_header, weight_bytes, weight_files
from calmix.options import (
    BITS_METHOD,
    COMPRESS_METHOD,
    MOST_EMBEDDING,
    Compression,
    DeviceOptions,
    Target,
    parse_share,
)
from calmix.pruning.budget import parse_memory
from calmix.sources import get_source
from calmix.sources.registry import local_file
from calmix.specs import LENGTH, SEED, prune_request
from calmix.study.estimate import Timed

# Two sources a dimension of those that need neither network nor extra; mathematics has one. Chats
# come with them where the model has a chat template.
# docs/methods.md has what such a mix keeps.
MIX = {
    "encyclopedia": 1.0, "books": 1.0, "stories": 1.0, "procedures": 1.0,
    "python-stdlib": 1.0, "code-compiled": 1.0, "math-solutions": 2.0,
}  # fmt: skip
PERMISSIVE = {
    "papers": 1.0, "abstracts": 1.0, "procedures": 1.0, "activities": 1.0,
    "python-stdlib": 1.0, "code-compiled": 1.0, "math-solutions": 2.0,
}  # fmt: skip
BITS = 4.5  # where nothing is asked for: what llama.cpp keeps at Q4_K_M, in fewer bytes
MANIFEST = "compress.json"
SCORES, BEHAVIOUR = "scores.json", "abilities.json"
CALIBRATION, PACK = "calibration", "pack"
LEAST, MOST = 1.0, 8.0  # bits a weight that a size may come to
SPARE = 0.015  # of a file: headers, and what an entropy coder is from its bound


@dataclass(frozen=True)
class Effort:
    """How much time a compression may take: rows of the calibration set, recoveries one after the
    other, epochs of the last one, how much of the suites of likelihood and of behaviour is scored,
    most bits of levels that are trained, and whether the distance to the dense model is
    measured."""

    rows: int
    recoveries: tuple[str, ...]
    epochs: int
    likelihood: Mapping[str, Any]
    behaviour: Mapping[str, Any]
    levels: float = 3.9
    distance: bool = True


QUICK = {"quick": True}
SHORT = {**QUICK, "without": ("gsm8k",)}  # the task whose answers take longest


def guarded(suite: str) -> str:
    """Return the suites whose items no calibration text may share: all that are scored."""
    return suite if suite == "abilities" else f"{suite},abilities"


EFFORTS = {
    "quick": Effort(32, ("distill",), 1, {"quick": True, "limit": 10}, SHORT, distance=False),
    "standard": Effort(64, ("distill",), 2, QUICK, QUICK),
    "best": Effort(192, ("blocks", "distill"), 2, {}, {}, 4.5),
}


def slices(asked: Target) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return which suite each file of scores is of, and how much of it is scored: at standard
    effort all items of the abilities with a floor. A suite other than the builtin one of likelihood
    is scored alone, and without a limit."""
    effort, alone = EFFORTS[asked.effort], asked.suite != "offline"
    suite, part = "abilities", effort.behaviour
    if alone:
        suite = asked.suite
        part = {key: one for key, one in effort.likelihood.items() if key != "limit"}
    if asked.keep_at_least is not None and asked.effort == "standard":
        floors = parse_floors(asked.keep_at_least)
        named = tuple(name for name in choose(suite).dimensions if name in floors)
        part = {} if "" in floors else {**part, "whole": named}
    if alone:
        return {SCORES: (suite, part)}
    return {SCORES: (asked.suite, effort.likelihood), BEHAVIOUR: (suite, part)}


def scored(asked: Target) -> dict[str, Suite]:
    """Return what each file of scores is of, without tasks that may not run."""
    return {file: runnable(choose(name, **part), asked.allow_code_execution)[0]
            for file, (name, part) in slices(asked).items()}  # fmt: skip


class Request(Target):
    """A checked compression: all that decides what OUT will hold.

    `calibration` is as `calmix calibrate` takes it, `self-written`, or a saved set's folder; the
    hashes are of the model's files and of the user's own prompts and suite; `length` is the tokens
    of a row.
    """

    calibration: str
    seed: int
    sha256: str
    prompts_sha256: str | None
    suite_sha256: str | None = None
    length: int

    @property
    def generated(self) -> bool:
        """Whether the model writes calibration text."""
        return ask(self.calibration).runs_model

    @property
    def saved(self) -> bool:
        """Whether the calibration set is there already."""
        return saved_set(self.calibration) is not None

    @property
    def most(self) -> int | None:
        """Bytes of memory it may take."""
        return None if self.max_memory is None else parse_memory(self.max_memory)

    @property
    def epochs(self) -> int:
        """Epochs of the last recovery; one in a walk at standard effort, which recovers several."""
        walks = self.keep_at_least is not None and self.effort == "standard"
        return 1 if walks else EFFORTS[self.effort].epochs

    @property
    def target(self) -> str:
        """What is asked for, as it is printed: `60 %`, `2:4`, `2.8 bits`, `50 %, 4 bits`."""
        return target(self.model_dump())


def target(asked: Mapping[str, Any]) -> str:
    """Return what a request asks for, as it is printed."""
    share = None if asked["sparsity"] is None else f"{100 * asked['sparsity']:g} %"
    bits = None if asked.get("bits") is None else f"{asked['bits']:g} bits"
    return ", ".join(filter(None, (asked["pattern"] or share, bits)))


def aim(asked: Target) -> dict[str, Any]:
    """Return the method and what it is asked for, as a prune takes them."""
    sparse = (asked.sparsity, asked.pattern) != (None, None)
    return {
        "method": COMPRESS_METHOD if sparse else BITS_METHOD, "sparsity": asked.sparsity,
        "pattern": asked.pattern, "bits": None if asked.bits is None else f"{asked.bits:g}",
        "embeddings": None if asked.bits is None else embedding_bits(asked.bits),
    }  # fmt: skip


def embedding_bits(bits: float) -> float:
    """Return the bits of embeddings and head beside blocks of so many.

    With as many a byte saves as much error there as in the blocks (benchmarks/embeddings.py).
    """
    return min(max(bits, 2.0), MOST_EMBEDDING)


@lru_cache(maxsize=1)
def timed(name: str, device: str, trust_remote_code: bool) -> Timed:
    """Return a model from its configuration alone, made once for the size and the estimate."""
    return Timed(name, "auto", device, trust_remote_code)


def parse_size(text: str, dense: int) -> float:
    """Return bytes from `120MB`, or from a share of the dense ones: `0.25`, `25%`."""
    if re.search(r"[a-zA-Z]", text):
        return parse_memory(text, "--size")
    try:
        share = parse_share(text)
    except ValueError as error:
        raise InputError(f"--size: {error}") from None
    if not 0 < share < 1:
        raise InputError(f"--size {text}: a share of the dense size is between 0 and 1")
    return float(share * dense)


def bits_for(asked: Target) -> float:
    """Return the bits a weight of the blocks' matrices with which a pack has the size asked for."""
    folder = resolve_model(asked.model)
    dense = weight_bytes(folder)
    wanted = parse_size(asked.size or "", dense)
    held = timed(asked.model, asked.device, asked.trust_remote_code)
    matrices = sum(p.numel() for p in held.blocks.blocks.parameters() if p.ndim > 1)
    places = (place for name in weight_files(folder)
              for place in read_header(folder / name).values())  # fmt: skip
    width = max(places, key=lambda place: place.size).dtype.itemsize
    rest = dense - width * (matrices + held.outer_weights)

    def size(bits: float) -> float:
        outer = embedding_bits(bits) * held.outer_weights
        return (1 + SPARE) * (rest + (bits * matrices + outer) / 8)

    rates = [number / 100 for number in range(round(100 * LEAST), round(100 * MOST) + 1)]
    if not size(LEAST) <= wanted <= size(MOST):
        raise InputError(
            f"--size {asked.size} is out of reach: packed, {asked.model} has from "
            f"{size(LEAST) / 1e3:,.0f} to {size(MOST) / 1e3:,.0f} kB (dense: {dense / 1e3:,.0f} kB)"
        )
    return max(bits for bits in rates if size(bits) <= wanted)


@dataclass(frozen=True)
class Stage:
    """One verb of the row: its arguments, and what it leaves in OUT, whole or not at all; None for
    what is always made anew."""

    name: str
    arguments: tuple[str, ...]
    leaves: str | None

    @property
    def command(self) -> str:
        """The line a shell takes."""
        return shlex.join(["calmix", *self.arguments])

    def stands(self, out: Path) -> bool:
        """Tell whether it has left its result."""
        return self.leaves is not None and (out / self.leaves).exists()


def request(asked: Compression) -> Request:
    """Check what a user asks for, before any work is done."""
    given, saved = asked.calibration, saved_set(asked.calibration) is not None
    _check_idle(asked, saved)
    mix = MIX if asked.licence is None else PERMISSIVE
    text = "self-written" if asked.no_corpus else mix_text(mix) if given is None else given
    if asked.keep is not None:
        text = mix_text(weighed(text, asked.keep))
    draw: dict[str, Any] = {
        "rows": EFFORTS[asked.effort].rows, "leakage": guarded(asked.suite), "seed": asked.seed,
    }  # fmt: skip
    ask(text, licence=asked.licence, **({} if saved else draw))
    # What every stage checks of its own, before the first of them has begun.
    bits, prompts = asked.bits, None
    if asked.size is not None:
        parse_size(asked.size, 2**62)
    elif asked.keep_at_least is not None:
        _check_floors(asked)
    else:
        if (asked.sparsity, asked.pattern, bits) == (None, None, None):
            bits = BITS
        prune_request(**aim(asked.model_copy(update={"bits": bits})), calibration=text)
    runnable(choose(asked.suite), asked.allow_code_execution)
    if asked.prompts is not None:
        read_prompts(asked.prompts)
        prompts = sha256_file(local_file(str(asked.prompts)).path)
    if asked.max_memory is not None:
        parse_memory(asked.max_memory)
    trust = asked.trust_remote_code
    check_models(asked.model, device=asked.device, trust_remote_code=trust)
    tokenizer = open_tokenizer(asked.model, trust_remote_code=trust)
    if given is None and not asked.no_corpus and chat_turns(tokenizer.tokenizer) is not None:
        rest = {name: (1 - CHAT) * weight for name, weight in parse_mix(text).items()}
        text = mix_text({"chat": CHAT} | rest)
    if asked.size is not None:
        bits = bits_for(asked)
    return Request(**{name: getattr(asked, name) for name in Target.model_fields} | {
        "bits": bits, "calibration": text, "seed": asked.seed or SEED,
        "sha256": fingerprint(resolve_model(asked.model)), "prompts_sha256": prompts,
        "length": min(LENGTH, tokenizer.context or LENGTH),
        "suite_sha256": suite_file(asked.suite) and choose(asked.suite).hash,
    })  # fmt: skip


def _check_idle(asked: Compression, saved: bool) -> None:
    """Refuse options that another one leaves without effect."""
    sizes = ("sparsity", "pattern", "bits")
    for where, holds, idle in (
        ("with --no-corpus", asked.no_corpus, ("calibration", "keep", "licence")),
        (f"with {asked.calibration}, which is drawn already", saved, ("seed", "seeds", "keep")),
        ("with --size", asked.size is not None, sizes),
        ("with --keep-at-least", asked.keep_at_least is not None, (*sizes, "size")),
        ("without --keep-at-least", asked.keep_at_least is None, ("confidence", "within", "seeds")),
    ):
        for name in idle if holds else ():
            if getattr(asked, name) is not None:
                raise InputError(f"--{name} has no effect {where}: leave it out")


def _check_floors(asked: Target) -> None:
    """Refuse floors of abilities that are not scored, or of which a user's own rows are too few."""
    suites = scored(asked)
    whole = dict.fromkeys(name for suite, _ in slices(asked).values()
                          for name in choose(suite).dimensions)  # fmt: skip
    rows = None if suite_file(asked.suite) is None else Counter(
        suites[SCORES].dimension_of(task) for task, *_ in suite_items(suites[SCORES]))  # fmt: skip
    for name, floor in parse_floors(asked.keep_at_least or "").items():
        said = f"--keep-at-least names '{name}', "
        if name and name not in whole:
            raise InputError(f"{said}which suite {asked.suite} lacks: {nearest(name, whole)}")
        if name and not any(name in suite.dimensions for suite in suites.values()):
            raise InputError(
                f"{said}whose tasks are not run: pass --allow-code-execution, or a larger --effort"
            )
        least = needed(floor, asked.confidence or CONFIDENCE)
        if name and rows is not None and rows[name] < least:
            raise InputError(
                f"--keep-at-least {name}={floor:g} needs {least} items that the dense model gets "
                f"right, and --effort {asked.effort} scores {rows[name]} rows of {name}: add rows, "
                "take a larger effort, or lower the floor"
            )


def weighed(text: str, keep: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of a mix's sources with each dimension's share as asked for.

    Within a dimension the sources keep their proportions; one that is not named gets nothing.
    """
    asked = ask(text)
    if asked.generate is not None or user_path(text).suffix.lower() in (".yaml", ".yml"):
        raise InputError(f"--keep weighs the sources of a mix, and {text} is none: leave it out")
    dimensions = {name: get_source(name, asked.own).dimension for name in asked.sources}
    dimensions |= {name: name for name in asked.written}
    known = tuple(dict.fromkeys(dimensions.values()))
    shares = check_weights(keep, known, "the calibration set")
    whole = {d: sum(w for n, w in asked.mix.items() if dimensions[n] == d) for d in known}
    found = {
        name: weight / whole[dimensions[name]] * shares[dimensions[name]]
        for name, weight in asked.mix.items()
    }
    return {name: weight for name, weight in found.items() if weight > 0}


def stages(asked: Request, out: Path, held: str | None = None) -> list[Stage]:
    """Return what is done, in order; on the set in folder `held`, if it is there already."""
    effort, model, found = EFFORTS[asked.effort], asked.model, list[Stage]()
    where = asked.asked(DeviceOptions)
    work = where | {"max_memory": asked.max_memory, "resume": True}
    if held is None and asked.saved:
        held = asked.calibration
    elif held is None:
        held = str(out / CALIBRATION)
        found.append(_stage(
            f"{'write' if asked.generated else 'draw'} the calibration set", out, CALIBRATION,
            "calibrate", asked.calibration, model=model, rows=effort.rows, length=asked.length,
            seed=asked.seed, leakage=guarded(asked.suite), licence=asked.licence,
            **where | ({} if asked.generated else {"device": None}),
        ))  # fmt: skip
    wanted = aim(asked)
    sparse = wanted["method"] != BITS_METHOD
    trained = sparse or (asked.bits is not None and asked.bits <= effort.levels)
    recoveries = effort.recoveries if trained else ()
    before = "pruned" if recoveries else "model"
    found.append(_stage(
        "prune" if sparse else "quantise", out, before, "prune", model, **wanted, calibration=held,
        licence=asked.licence if asked.saved else None, **work,
    ))  # fmt: skip
    for way in recoveries:
        last = way == effort.recoveries[-1]
        after = "model" if last else way
        found.append(_stage(
            f"recover by {way}", out, after, "recover", str(out / before), against=model,
            calibration=held, method=way, epochs=asked.epochs if last else None, **work,
        ))  # fmt: skip
        before = after
    made = str(out / "model")
    return [
        *found,
        _stage("pack", out, PACK, "export", made, to="pack"),
        *(scoring(asked, file, made, out, model) for file in slices(asked)),
        _stage("answer prompts", out, "answers.json", "evaluate", "answers", model, made,
               prompts=asked.prompts, **where),
        Stage("report card", ("report", str(out)), None),
    ]  # fmt: skip


def scoring(
    asked: Request, file: str, model: str, out: Path, against: object = None, leaves: str = ""
) -> Stage:
    """Return the stage that leaves a file of a model's scores, `against` a dense one or its scores;
    its path begins with `leaves`. Against saved scores only what these have right is asked, which
    decides what is kept."""
    suite, part = slices(asked)[file]
    near = not EFFORTS[asked.effort].distance and against is not None
    return _stage(
        "evaluate" if file == SCORES else "evaluate behaviour", out, f"{leaves}{file}",
        "evaluate", model, against=against, suite=None if suite == "offline" else suite, **part,
        right_only=isinstance(against, Path) and choose(suite).asks,
        no_distance=near and file == SCORES, allow_code_execution=asked.allow_code_execution,
        **asked.asked(DeviceOptions),
    )  # fmt: skip


def _stage(name: str, out: Path, leaves: str, *words: str, **options: object) -> Stage:
    """Return a verb with options, without those that are None, False or `auto`, that leaves its
    result in OUT."""
    found: list[str] = []
    for key, value in options.items():
        if value is not None and value is not False and (key, value) != ("device", "auto"):
            flag = f"--{key.replace('_', '-')}"
            values = value if isinstance(value, tuple) else (value,)
            found += [flag] if value is True else [s for one in values for s in (flag, str(one))]
    return Stage(name, (*words, *found, "-o", str(out / leaves)), leaves)
