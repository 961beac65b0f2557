"""What `compress` does, as data: a list of stages, each a command line and what it leaves in OUT.

Printing, the manifest, resuming and the dry run all read that list; nothing here runs anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calmix.analysis.recommend import check_weights
from calmix.calibration import Mix, ask, is_saved_set, open_tokenizer, parse_spec
from calmix.errors import InputError, nearest
from calmix.evaluation.evaluate import check_code, choose
from calmix.files import sha256_file, user_path
from calmix.models import check_models, resolve_model
from calmix.models.opening import fingerprint
from calmix.pruning.budget import parse_memory
from calmix.pruning.patterns import parse_pattern
from calmix.sources import get_source
from calmix.sources.licences import check_licence
from calmix.specs import LENGTH, SEED, prune_request

# Two sources a dimension of those that need neither network nor extra; mathematics has one.
# docs/methods.md has what such a mix keeps.
MIX = {
    "encyclopedia": 1.0, "books": 1.0, "stories": 1.0, "procedures": 1.0,
    "python-stdlib": 1.0, "code-compiled": 1.0, "math-solutions": 2.0,
}  # fmt: skip
PERMISSIVE = {
    "papers": 1.0, "abstracts": 1.0, "procedures": 1.0, "activities": 1.0,
    "python-stdlib": 1.0, "code-compiled": 1.0, "math-solutions": 2.0,
}  # fmt: skip
METHOD = "admm"  # ends in a refit of its own: docs/methods.md
MANIFEST = "compress.json"


@dataclass(frozen=True)
class Effort:
    """How much time a compression may take.

    Attributes:
        rows: of the calibration set.
        recoveries: ways of recovery, one after the other.
        epochs: passes of the last one over the rows.
        quick: whether the suite's quick slice is scored, and not all of it.
    """

    rows: int
    recoveries: tuple[str, ...]
    epochs: int
    quick: bool


EFFORTS = {
    "quick": Effort(32, ("distill",), 1, True),
    "standard": Effort(64, ("distill",), 2, False),
    "best": Effort(192, ("blocks", "distill"), 2, False),
}


@dataclass(frozen=True)
class Request:
    """What is to be compressed and how: all that decides what OUT will hold.

    Attributes:
        model: as the user named it; `sha256` of its files.
        sparsity, pattern: one of them.
        calibration: as `calmix calibrate` takes it, `self-written`, or the folder of a saved set.
        length: tokens of a row.
        suite: what is scored, and what the calibration set must not hold.
        prompts: a file of the user's, or None for the suite's; `prompts_sha256` of its bytes.
        licence: `permissive` for no calibration text under another.
    """

    model: str
    sha256: str
    effort: str
    sparsity: float | None
    pattern: str | None
    calibration: str
    length: int
    seed: int
    suite: str
    prompts: str | None
    prompts_sha256: str | None
    licence: str | None
    device: str
    trust_remote_code: bool
    max_memory: str | None

    @property
    def generated(self) -> bool:
        """Whether the model writes the calibration text."""
        return self.calibration == "self-written"

    @property
    def saved(self) -> bool:
        """Whether the calibration set is there already."""
        return is_saved_set(user_path(self.calibration))

    @property
    def target(self) -> str:
        """The sparsity or pattern, as it is printed."""
        return self.pattern or f"{100 * (self.sparsity or 0):g} %"

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return asdict(self)


@dataclass(frozen=True)
class Stage:
    """One verb of the row.

    Attributes:
        name: what is told of it.
        arguments: of `calmix`.
        leaves: what it leaves in OUT, whole or not at all; None for what is always made anew.
    """

    name: str
    arguments: tuple[str, ...]
    leaves: str | None

    @property
    def command(self) -> str:
        """The line a shell takes."""
        return shlex.join(["calmix", *self.arguments])


def request(
    model: str,
    *,
    effort: str = "standard",
    sparsity: float | None = None,
    pattern: str | None = None,
    calibration: str | None = None,
    no_corpus: bool = False,
    keep: Mapping[str, float] | None = None,
    seed: int | None = None,
    suite: str = "offline",
    prompts: Path | None = None,
    licence: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    max_memory: str | None = None,
) -> Request:
    """Check what a user asks for and return it, before any work is done.

    Args:
        keep: weights of the calibration set by dimension of its sources; None leaves them.

    Raises:
        CalmixError: an unknown effort, model, source, suite or dimension, a value out of range,
            options that exclude each other, or one without effect.
    """
    if effort not in EFFORTS:
        raise InputError(f"unknown effort '{effort}': {nearest(effort, EFFORTS)}")
    if no_corpus and calibration is not None:
        raise InputError("--no-corpus and --calibration exclude each other: leave one out")
    if no_corpus and keep is not None:
        raise InputError(
            "--keep has no effect with --no-corpus: the model writes equally many rows of each "
            "dimension"
        )
    if no_corpus and licence is not None:
        raise InputError("--licence has no effect with --no-corpus: the text is the model's own")
    check_licence(licence)
    saved = calibration is not None and is_saved_set(user_path(calibration))
    if saved and seed is not None:
        raise InputError(f"--seed has no effect: {calibration} is drawn already")
    if saved and keep is not None:
        raise InputError(f"--keep has no effect: {calibration} is drawn already")
    mix = MIX if licence is None else PERMISSIVE
    text = "self-written" if no_corpus else str(Mix(mix)) if calibration is None else calibration
    if keep is not None:
        text = str(Mix(weighed(text, keep)))
    draw: dict[str, Any] = {"rows": EFFORTS[effort].rows, "leakage": suite, "seed": seed}
    ask(text, licence=licence, **({} if saved else draw))
    # What every stage checks of its own, before the first of them has begun.
    prune_request(method=METHOD, sparsity=sparsity, pattern=pattern, calibration=text)
    if pattern is not None:
        parse_pattern(pattern)
    check_code(choose(suite), False)
    asked = None
    if prompts is not None:
        from calmix.evaluation.generations import read_prompts

        read_prompts(prompts)
        asked = sha256_file(prompts)
    if max_memory is not None:
        parse_memory(max_memory)
    check_models(model, device=device, trust_remote_code=trust_remote_code)
    context = open_tokenizer(model, trust_remote_code=trust_remote_code).context
    return Request(
        model, fingerprint(resolve_model(model)), effort, sparsity, pattern, text,
        min(LENGTH, context or LENGTH), SEED if seed is None else seed, suite,
        None if prompts is None else str(prompts), asked, licence, device, trust_remote_code,
        max_memory,
    )  # fmt: skip


def weighed(text: str, keep: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of a mix's sources with each dimension's share as asked for.

    Within a dimension the sources keep their proportions; one that is not named gets nothing.

    Raises:
        InputError: an unknown dimension, a weight that is none, all of them zero, or a text that
            is no mix.
    """
    spec = parse_spec(text)
    if spec.generate is not None or user_path(text).suffix.lower() in (".yaml", ".yml"):
        raise InputError(f"--keep weighs the sources of a mix, and {text} is none: leave it out")
    dimensions = {name: get_source(name, spec.own).dimension for name in spec.mix.weights}
    known = tuple(dict.fromkeys(dimensions.values()))
    shares = check_weights(keep, known, "the calibration set")
    whole = {d: sum(w for n, w in spec.mix.weights.items() if dimensions[n] == d) for d in known}
    found = {
        name: weight / whole[dimensions[name]] * shares[dimensions[name]]
        for name, weight in spec.mix.weights.items()
    }
    return {name: weight for name, weight in found.items() if weight > 0}


def stages(asked: Request, out: Path) -> list[Stage]:
    """Return what is done, in order."""
    effort = EFFORTS[asked.effort]
    trust = ("--trust-remote-code",) if asked.trust_remote_code else ()
    device = () if asked.device == "auto" else ("--device", asked.device)
    memory = () if asked.max_memory is None else ("--max-memory", asked.max_memory)
    place = {name: str(out / name) for name in ("calibration", "pruned", "blocks", "model")}
    held = asked.calibration if asked.saved else place["calibration"]
    licence = () if asked.licence is None else ("--licence", asked.licence)
    found: list[Stage] = []
    if not asked.saved:
        found.append(
            Stage(
                "write the calibration set" if asked.generated else "draw the calibration set",
                (
                    "calibrate", asked.calibration, "--model", asked.model,
                    "--rows", str(effort.rows), "--length", str(asked.length),
                    "--seed", str(asked.seed),
                    *_unless("--leakage", asked.suite, "offline"),
                    *licence, *(device if asked.generated else ()), *trust, "-o", held,
                ),
                "calibration",
            )
        )  # fmt: skip
    target = ("--pattern", asked.pattern) if asked.pattern else ("--sparsity", f"{asked.sparsity}")
    found.append(
        Stage(
            "prune",
            (
                "prune", asked.model, "--method", METHOD, *target, "--calibration", held,
                *(licence if asked.saved else ()), *device, *trust, *memory, "--resume",
                "-o", place["pruned"],
            ),
            "pruned",
        )
    )  # fmt: skip
    before = "pruned"
    for way in effort.recoveries:
        after = "model" if way == effort.recoveries[-1] else way
        epochs = ("--epochs", str(effort.epochs)) if after == "model" else ()
        found.append(
            Stage(
                f"recover by {way}",
                (
                    "recover", place[before], "--against", asked.model, "--calibration", held,
                    "--method", way, *epochs,
                    *device, *trust, *memory, "--resume", "-o", place[after],
                ),
                after,
            )
        )  # fmt: skip
        before = after
    suite = _unless("--suite", asked.suite, "offline")
    found += [
        Stage(
            "evaluate",
            (
                "evaluate", place["model"], "--against", asked.model, *suite,
                *(("--quick",) if effort.quick else ()), *device, *trust,
                "-o", str(out / "scores.json"),
            ),
            "scores.json",
        ),
        Stage(
            "answer prompts",
            (
                "evaluate", "answers", asked.model, place["model"], *suite,
                *(() if asked.prompts is None else ("--prompts", asked.prompts)),
                *device, *trust, "-o", str(out / "answers.json"),
            ),
            "answers.json",
        ),
        Stage("report card", ("report", str(out)), None),
    ]  # fmt: skip
    return found


def _unless(option: str, value: str, default: str) -> tuple[str, ...]:
    return () if value == default else (option, value)
