"""The report card of a result of `calmix compress`."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from calmix import words
from calmix.calibration.dataset import CalibrationSet, saved_set
from calmix.compression.folder import BEHAVIOUR, PACK_FOLDER, PROMPTS
from calmix.compression.plan import EFFORTS, CompressRequest, score_files, slices, target
from calmix.compression.recipe import RECIPE, recipe_text
from calmix.compression.results import read_compressed, verified
from calmix.compression.stages import StageRequest
from calmix.deploy.speed import INSTALL, engine, measure
from calmix.errors import InputError, ModelError
from calmix.evaluation import floors
from calmix.evaluation.answers import Answers, Turned, compare_answers, turned
from calmix.evaluation.behaviour import Behaviour, Pair, behaviour, likelihood
from calmix.evaluation.retention import Retention, flips
from calmix.evaluation.scores import load_pairs
from calmix.evaluation.suites import load_suite, provenance
from calmix.evaluation.summary import (
    ability_rows,
    answer_lines,
    answers_page,
    fault_rows,
    measuring,
    right_answers,
    summary_lines,
)
from calmix.evaluation.tasks import all_items
from calmix.files import size_text, user_path, write_json, write_text
from calmix.manifest import GGUF, Input, lineage, read_record, read_sealed, record
from calmix.models.hub import builtin_models
from calmix.models.shards import weight_bytes
from calmix.options import option_words
from calmix.pages import Bar, Figure, render
from calmix.progress import Progress
from calmix.pruning.solvers.grids import SCALES_FOLDER
from calmix.sources.licences import NON_COMMERCIAL, use_of
from calmix.sources.registry import builtin_sources

SHOWN_CHANGES = 12  # lost and gained answers that the card shows
WEIGHTS = ".safetensors"
CARD_PAGE, ANSWERS_PAGE, README, MODELFILE, SPEED_FILE = (
    "card.html",
    "prompts.html",
    "README.md",
    "Modelfile",
    "speed.json",
)


@dataclass(frozen=True)
class Card:
    """The facts about one compressed model; `request` is the request, `pruning`, `calibration` and
    `recoveries` come from its manifest, `file` from the record of a GGUF file or a checkpoint for
    vLLM, and `speeds` from the measurement of its speed. `tasks` and `hashes` are tables."""

    out: Path
    name: str
    record: Mapping[str, Any]
    request: Mapping[str, Any]
    licence: str
    origin: str
    pruning: Mapping[str, Any]
    model: Path
    size: int
    packed: int
    file: Mapping[str, Any]
    speeds: Mapping[str, Any]
    calibration: Mapping[str, Any]
    recoveries: tuple[Mapping[str, Any], ...]
    pairs: Sequence[Pair]  # the scores of both models on each suite
    prompted: Pair | None  # the scores of both models on the user's prompts
    turned: Sequence[Turned]  # answers that were lost or gained, to show
    questions: Mapping[str, str]  # of their tasks, by item
    tasks: list[dict[str, str]]  # that were scored, with origin and licence
    hashes: list[dict[str, str]]  # of inputs and outputs

    @property
    def speed(self) -> str:
        """Tokens per second and memory beside the dense model; empty if no engine runs it."""
        if not self.speeds:
            return f"{INSTALL} to measure it with calmix report {self.out}" if self.gguf else ""
        return "; ".join(
            f"{which} in {name}: prompt {one['prompt']:.0f} tokens/s, writing "
            f"{one['writing']:.0f}, {size_text(one['memory'])} of memory"
            for which, name in (("the file", "llama.cpp"), ("dense", "transformers"))
            for one in [self.speeds[name]]
        )

    @property
    def recovered(self) -> list[str]:
        """A sentence for each recovery, with the errors on held-out and on fitted rows."""
        lines = []
        for one in self.recoveries:
            before, after = (words.number(one[when], 4) for when in ("before", "after"))
            losses = one["curve"]["losses"] if one["method"] == "distill" else []
            late = losses[len(losses) // 2 :]  # over the last half of the steps
            fitted = f", {words.number(sum(late) / len(late), 4)} on fitted rows" if late else ""
            lines.append(
                f"Recovery by {one['method']}, error on held-out rows: {before} before, {after} "
                f"after{fitted}."
            )
        return lines

    @property
    def gguf(self) -> bool:
        """Whether the model is a GGUF file."""
        return self.model.suffix == GGUF

    @property
    def runs(self) -> list[str]:
        """The commands that run a GGUF file or a checkpoint for vLLM."""
        file, modelfile = shlex.quote(str(self.model)), shlex.quote(str(self.out / MODELFILE))
        if not self.gguf:
            return [f"vllm serve {file}"] if self.file else []
        return [f"llama-cli -m {file}", f"ollama create {self.name} -f {modelfile}"]

    @property
    def bits(self) -> float | None:
        """Bits per weight of a GGUF file or of a checkpoint for vLLM, embeddings and vectors
        included."""
        return self.file.get("bits" if self.gguf else "rate")

    @property
    def substitutes(self) -> int:
        """Number of matrices of a GGUF file whose rows do not fit blocks of 256."""
        layers = (*self.pruning["layers"], *self.pruning["outer"])
        return sum(bool(one["type"] and one["columns"] % 256) for one in layers)

    @property
    def levels(self) -> str:
        """The bits of the levels of a checkpoint for vLLM."""
        counts = self.file["levels"].items()
        each = ", ".join(f"{count} have {bits}" for bits, count in sorted(counts))
        mixed = f" on average (of the matrices {each})" if len(counts) > 1 else ""
        return f"{self.file['bits']:g} bits{mixed}"

    @property
    def groups(self) -> str:
        """The groups of a checkpoint for vLLM, and why they are small."""
        group, text = self.file["group"], f"for every {self.file['group']} inputs"
        odd = any(one["columns"] % 128 for one in self.pruning["layers"])
        return f"{text} (128 does not divide all rows)" if odd and group < 128 else text

    @cached_property
    def kept(self) -> Retention | None:
        """Retention of likelihood; None if no task measures it."""
        return likelihood(*self.pairs[0])

    @cached_property
    def behaved(self) -> Behaviour:
        """Generated answers and choices kept."""
        return behaviour(*self.pairs)

    @cached_property
    def flipped(self) -> Mapping[str, Any]:
        """Items right under one model only."""
        dense, pruned = self.pairs[0]
        return flips(dense.tasks, pruned.tasks)

    @property
    def suite(self) -> str:
        """Name, version and size of each scored suite, behaviour first."""
        return " and ".join(
            f"{scores.suite['name']} version {scores.suite.get('version', '-')} "
            f"({words.counted(sum(len(one.items) for one in scores.tasks), 'item')} of "
            f"{words.counted(len(scores.tasks), 'task')})"
            for _, scores in self.pairs[::-1]
        )

    @property
    def title(self) -> str:
        """What was done to which model."""
        name = self.request["model"].rstrip("/").rpartition("/")[2].removeprefix("builtin:")
        rate = " per kept weight" if self.done == "pruned" else " per weight"
        rate *= self.request["bits"] is not None and self.request["product"] != "vllm"
        return f"{name} {self.done} to {target(self.request)}{rate}"

    @property
    def recipe(self) -> str:
        """The options of the run, in YAML."""
        return recipe_text(self.request)

    @cached_property
    def summary(self) -> list[str]:
        """The results in sentences, behaviour first."""
        return summary_lines(self.behaved, self.kept, self.measure)

    @property
    def split(self) -> str:
        """How many of the user's prompts were calibrated on and tested, in a sentence."""
        if self.prompted is None:
            return ""
        parts = self.calibration, *(self.calibration.get("written") or {}).values()
        counts = [one["settings"]["count"] for one in parts if one.get("generated") == "prompts"]
        tested = words.counted(sum(len(one.items) for one in self.prompted[0].tasks), "prompt")
        own = (self.calibration.get("written") or {}).get("prompts") or {}
        rows = f", {own['rows']} of {self.calibration['rows']} rows" if "rows" in own else ""
        if not counts:
            return f"{tested} were the test, all that the file has; none was calibrated on."
        written = words.counted(counts[0], "prompt")
        return (
            f"The model's answers to {written} were calibrated on{rows}; the test is the other "
            f"{tested}. The split is by hash."
        )

    @cached_property
    def _compared(self) -> Answers | None:
        return compare_answers(self.prompted) if self.prompted else None

    @property
    def changed(self) -> list[str]:
        """What changed in the answers to the user's prompts, in sentences."""
        comparison, prompted = self._compared, self.prompted
        return answer_lines(comparison, prompted[1].distance) if comparison and prompted else []

    @property
    def faults(self) -> list[dict[str, Any]]:
        """The table of faults in these answers."""
        return fault_rows(self._compared) if self._compared else []

    @property
    def shortly(self) -> str:
        """Right answers in one line."""
        if (all_ := self.behaved.answers) is None or not all_.dense:
            return "right answers: not measured" if all_ is None else self.summary[0]
        return f"right answers: {right_answers(self.behaved)}"

    @property
    def sizes(self) -> str:
        """Bytes of the weights on disk before and after."""
        dense = self.record.get("dense_bytes") or 0
        sizes = (dense, "dense"), (self.size, self.done), (self.packed, "packed")
        line = ", ".join(f"{size_text(size)} {name}" for size, name in sizes if size)
        return f"{line}, {self.bits:.2f} bits per weight" if self.bits else line

    @property
    def disk(self) -> str:
        """Bytes of the smallest form of the weights."""
        return size_text(self.packed or self.size)

    @property
    def share(self) -> str:
        """These bytes relative to the dense model's."""
        dense = self.record.get("dense_bytes")
        return (
            f"{100 * (self.packed or self.size) / dense:.0f} % of the dense model" if dense else ""
        )

    @property
    def measure(self) -> str:
        """The command that measures generated answers, including programs."""
        request = CompressRequest(**self.request)
        part = slices(request).get(BEHAVIOUR, ("", EFFORTS[request.effort].behaviour))[1]
        options = {
            # As many items as before: fewer could prove less.
            **{name: part[name] for name in ("quick", "whole") if name in part},
            "repeat": EFFORTS[request.effort].repeat,
            "allow_code_execution": True,
            **request.how,
        }
        written = "-o", self.out / BEHAVIOUR, "--overwrite"
        return measuring(self.model, request.model, *option_words(options), *written)

    @property
    def next(self) -> str:
        """The next command: measure what is missing, or upload the model."""
        builtin = self.request["suite"] in ("offline", "abilities")  # else not by `measure`
        if self.behaved.answers is None or (builtin and self.behaved.not_run):
            return self.measure
        upload = ["hf", "upload", f"NAME/{self.name}"]
        if not self.gguf:
            return shlex.join([*upload, str(self.model)])
        files = (f"--include={one}" for one in (self.model.name, README))
        return shlex.join([*upload, str(self.out), ".", *files])

    @property
    def instead(self) -> str:
        """A hint to quantise, for a sparse model."""
        if self.done == "quantised":
            return ""
        command = ["calmix", "compress", self.request["model"], "-o", f"{self.out}-gguf"]
        return f"quantising usually keeps more than pruning; try {shlex.join(command)}"

    @property
    def removed(self) -> str:
        """How many weights are zero, the bits per weight, and the types of a GGUF file."""
        if self.file and not self.gguf:
            return (
                f"The checkpoint has {self.bits:.2f} bits per weight: {self.levels} in "
                f"{self.file['matrices']} matrices, with a scale {self.groups}; all else is as in "
                "the dense model."
            )
        if self.file:
            types = ", ".join(f"{count} {name}" for name, count in self.file["types"].items())
            text = f"The file has {self.bits:.2f} bits per weight, in {types} tensors."
            if count := self.substitutes:
                text += (
                    f" Blocks of 256 do not fit the rows of {count} matrices, which have the types "
                    "that llama.cpp uses instead."
                )
            return text
        rate, weights, pruned = "", self.pruning["weights"], self.pruning["pruned"]
        if bits := self.pruning.get("bits"):
            rate = f" Once packed, a weight takes {bits:.2f} bits"
            outer = [one["bits"] for one in self.pruning.get("outer", [])]
            rate += f"; one of embeddings or head {max(outer):.2f}." if outer else "."
        moved = self.recoveries and self.done == "quantised"  # zero is one of the levels
        return (
            f"{pruned:,} of {weights:,} weights of its linear layers "
            f"{'were zero before recovery' if moved else 'are zero'} "
            f"({pruned / weights:.2%}).{rate}"
        )

    @property
    def done(self) -> str:
        """`pruned` or `quantised`."""
        return "pruned" if self.request["sparsity"] or self.request["pattern"] else "quantised"

    @property
    def guarded(self) -> str:
        """The result of the leakage check in a sentence."""
        if not self.calibration:
            return f"The text of the importance matrix {self.request['imatrix']} is not known."
        leakage = self.calibration.get("leakage")
        if not isinstance(leakage, dict):
            return "The calibration text was not checked for items of the suite."
        dropped = sum(len(entries) for entries in leakage.get("dropped", {}).values())
        suites = leakage["suite"].replace(",", " or ")
        run = f"{leakage['words']} words" if "words" in leakage else f"{leakage['tokens']} tokens"
        return (
            f"No calibration row shares {run} in a row with an item of suite "
            f"{suites} ({words.counted(dropped, 'document')} dropped)."
        )

    def apart(self, name: str) -> dict[str, str]:
        """Return distance and flips of a dimension, or in `total`."""
        known = self.pairs[0][1].distance or {"total": {}, "dimensions": {}}
        far = (known if name == "total" else known["dimensions"]).get(name, {})
        return {
            "#KL": words.number(far.get("kl_mean")),
            "#top-1 %": words.percent(far.get("top1")),
            "#flips %": words.with_span(self.flipped.get(name)),
        }

    @cached_property
    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """The tables of generated answers, and of likelihood by dimension and by task."""
        abilities = ability_rows(self.behaved)
        if self.kept is None:
            return {"abilities": abilities, "dimensions": [], "tasks": []}
        dimensions = [
            {"dimension": name, "#likelihood kept %": words.with_span(estimate), **self.apart(name)}
            for name, estimate in self.kept.estimates.items()
        ]
        tasks = [
            {
                "task": one.name,
                "dimension": one.dimension,
                "scored by": one.score,
                "#items": one.items,
                "#dense": words.number(one.dense),
                "#pruned": words.number(one.pruned),
                "#accuracy, dense": words.number(one.dense_accuracy),
                "#accuracy, pruned": words.number(one.pruned_accuracy),
                "#kept %": words.with_span(one.kept) if one.signal else "no signal",
            }
            for one in self.kept.tasks
        ]
        return {"abilities": abilities, "dimensions": dimensions, "tasks": tasks}

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """The table of the calibration set; for text the model wrote, one row per dimension."""
        manifest = self.calibration
        if "generated" in manifest:  # such a manifest has no counts
            places = self.out / "calibration", user_path(self.request["calibration"])
            folder = next(filter(saved_set, places), None)
            counts = CalibrationSet.open(folder).counts if folder else {}
            parts: dict[str, Any] = {name: {"rows": rows} for name, rows in counts.items()}
        else:
            parts = {**(manifest.get("sources") or {}), **(manifest.get("written") or {})}
        own = (manifest.get("own") or {}).items()
        known = {name: one.get("dimension", "-") for name, one in own}
        known |= {name: source.dimension for name, source in builtin_sources().items()}
        return [
            {
                "source": name,
                "dimension": known.get(name, "-") if licence else name,
                "#rows": part["rows"],
                "#tokens": part["rows"] * manifest["length"],
                "licence": licence or "written by the model",
                "use": use_of(licence) if licence else "–",
                "version": part.get("version", ""),
            }
            for name, part in parts.items()
            for licence in [part.get("licence")]
        ]

    @property
    def source_types(self) -> str:
        """A warning that the dense model was decoded from a GGUF file; empty if it was not."""
        name = self.request["model"]  # Ollama's files have no suffix
        if not name.startswith("builtin:") and name[-5:] != GGUF and not user_path(name).is_file():
            return ""
        return (
            "The dense model was decoded from a GGUF file: types of its bits (4 to 6 for builtin "
            "models) lose less here than they would of a 16-bit checkpoint."
        )

    @property
    def restricted(self) -> str:
        """What licences keep from commercial use, in a sentence; empty if none is known to."""
        closed = NON_COMMERCIAL
        names = [one["source"] for one in self.sources if one["use"] == closed]
        parts = [f"the dense model ({self.licence})"] if use_of(self.licence) == closed else []
        if names:
            texts = f"the calibration text {words.listed(names)}"
            parts.append(f"{texts} (--licence permissive leaves such text out)")
        return f"Not for commercial use, by licence: {', '.join(parts)}." if parts else ""

    @property
    def checked(self) -> str:
        """What `calmix check` said on this model; empty if it was not run."""
        return self._check[1]

    @property
    def gate(self) -> str:
        """Whether this model `passed` or `missed` its floors; empty if that is not known."""
        return self._check[0]

    @cached_property
    def _check(self) -> tuple[str, str]:
        path, fingerprints = self.out / floors.FILE, [one.fingerprint for one in self.pairs[0]]
        if not path.exists():
            return "", ""
        try:
            value, what = read_sealed(path, ""), "of another model"
            if [value["dense"], value["model"]] == fingerprints:
                return "passed" if value["passed"] else "missed", str(value["lines"][0])
        except InputError:
            what = "damaged"
        return (
            "",
            f"{path.name} is {what}: run calmix check {self.out} {floors.FLAG} FLOORS again.",
        )


def read_card(out: Path) -> Card:
    """Read the card of the model in a folder of `calmix compress`."""
    request = CompressRequest(**read_compressed(out)["request"])
    first = score_files(request)[0]
    whole, results = verified(out, request.file, first)
    options, folder = whole["request"], out / request.file
    model = options["model"]
    names = [first, *[BEHAVIOUR] * (first != BEHAVIOUR and (out / BEHAVIOUR).exists())]
    pairs = load_pairs([out / name for name in names])
    written = read_record(folder)
    exported = "opened" in written
    *trained, manifest = (one for one in lineage(written) if "opened" not in one)
    calibration = manifest["calibration"] or {}
    hashes = {f"dense model {model}": manifest["model"]["sha256"]}
    if calibration:
        hashes["calibration set"] = calibration["sha256"]
    else:
        hashes[f"importance matrix {options['imatrix']}"] = options["imatrix_sha256"]
    if trained:
        hashes["pruned model, before recovery"] = trained[-1]["model"]["sha256"]
    hashes |= {
        name if folder.is_file() else f"{request.file}/{name}": value
        for name, value in results.hashes(folder).items()
        if name.endswith((WEIGHTS, GGUF)) or name == "config.json"
    }
    shown = turned(pairs, SHOWN_CHANGES)
    changed, questions, tasks = {one.task for one in shown}, dict[str, str](), []
    with contextlib.suppress(InputError, KeyError):  # the user's own suite was moved or changed
        suites = ["abilities" if name == BEHAVIOUR else options["suite"] for name in names]
        for suite, (_, scored_by) in zip(suites, pairs, strict=True):
            for one in scored_by.tasks:
                spec = load_suite(suite).tasks[one.name]
                origin = provenance(spec)
                if one.name in changed and one.answers:
                    questions |= {ask.id: ask.question.strip() for ask in all_items(spec)}
                name = f"{one.name} ({suite})" if len(pairs) > 1 else one.name
                tasks.append({"task": name, "use": use_of(origin["licence"]), **origin})
    known = model.startswith("builtin:") and builtin_models().get(model.removeprefix("builtin:"))
    return Card(
        out,
        out.resolve().name,
        whole,
        options,
        known.licence if known else "see the model's own card",
        known.origin if known else model,
        manifest["pruning"],
        folder,
        _bytes(folder, written),
        sum(
            p.stat().st_size
            for p in (out / PACK_FOLDER).rglob("*")
            if p.suffix == WEIGHTS or p.parent.name == SCALES_FOLDER
        ),
        written if exported else {},
        _speeds(out, written),
        calibration,
        tuple(one["recovery"] for one in reversed(trained)),
        pairs,
        load_pairs([out / PROMPTS])[0] if (out / PROMPTS).exists() else None,
        shown,
        questions,
        tasks,
        [{"what": name, "SHA-256": value} for name, value in hashes.items()],
    )


@dataclass(frozen=True)
class Report(StageRequest):
    """Write the report card of a folder."""

    out: Path

    @property
    def words(self) -> tuple[str, ...]:
        return "report", str(self.out)

    def run(self, output: Path, bar: Progress) -> None:
        write_card(self.out, bar)


def write_card(out: Path, bar: Progress, page: Path | None = None) -> Card:
    """Write the report card of the model in OUT, by default to OUT/card.html, and its model card,
    and return it; measure the speed of a GGUF file first where llama.cpp is installed."""
    card = read_card(out)
    if card.gguf:
        write_text(out / MODELFILE, f"FROM ./{card.model.name}\n")
        if engine() and not card.speeds:
            bar.show("measuring speed", None)
            try:
                speeds = measure(
                    card.model, card.request["model"], card.request["trust_remote_code"]
                )
            except ModelError as error:
                bar.note(f"speed was not measured: {error}")
            else:
                model = Input(str(card.model), card.file["opened"])
                write_json(out / SPEED_FILE, record("speed", inputs={"model": model}, **speeds))
                card = replace(card, speeds=speeds)
    write_text(out / RECIPE, card.recipe)
    if card.prompted is not None:
        write_text(out / ANSWERS_PAGE, answers_page({card.name: card.prompted}))
    write_text(page or out / CARD_PAGE, card_page(card))
    write_text((out if card.gguf else card.model) / README, model_card(card))
    return card


def _bytes(model: Path, written: Mapping[str, Any]) -> int:
    """Return the bytes of a GGUF file, of a checkpoint for vLLM, or of weights."""
    if model.is_file():
        return model.stat().st_size
    return int(written["bytes"]) if "opened" in written else weight_bytes(model)


def _speeds(out: Path, written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measured speed of a GGUF file; {} if it was not measured, or of another file."""
    value = read_sealed(out / SPEED_FILE, "") if (out / SPEED_FILE).exists() else {}
    return value if value and value["model"]["sha256"] == written.get("opened") else {}


def kept_figure(card: Card) -> Figure | None:
    """Return the figure of right answers by ability, or of likelihood without answers."""
    does, what = card.behaved, "Likelihood kept, by dimension"
    if does.right is not None:
        shares, what = does.right.estimates, "Right answers relative to the dense model, by ability"
    elif card.kept is None:
        return None
    else:
        shares = card.kept.estimates
    bars = [Bar(name, one) for name, one in shares.items()]
    caption = "Lines: 95 % intervals over items. The dashed line is the dense model."
    return Figure(what, caption, bars, rule=1.0)


def card_page(card: Card) -> str:
    """Return the report card as HTML."""
    return render("card.html", card=card, kept=kept_figure(card))


def model_card(card: Card) -> str:
    """Return the README.md of the compressed model: the same figures in Markdown."""
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", card.origin) and not Path(card.origin).exists()
    named = re.fullmatch(r"[\w.-]+", card.licence)
    return render(
        "model.md",
        card=card,
        base=card.origin if hub else "",
        licence=card.licence.lower() if named else "",
    )
