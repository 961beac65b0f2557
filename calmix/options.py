"""The options of the verbs: one model each, read by the command line, YAML, Python and manifests.

A field's description is its help text; its type and bounds are its check. `calmix.cli.verbs` makes
flags from the fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from calmix.errors import InputError, nearest, plain_problem


class Options(BaseModel):
    """The options of a verb."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def options_of(self, kind: type[Options]) -> dict[str, Any]:
        """Return the options of one model that were set, by name."""
        names = [name for name in kind.model_fields if name in self.model_fields_set]
        return {name: getattr(self, name) for name in names}


Some = TypeVar("Some", bound=Options)
MODEL = "Hub id, folder, .gguf file, or builtin:smollm2-135m."
SERVED = f"{MODEL.rstrip('.')}; http://HOST:PORT/v1 for generated answers."


def option(
    default: Any,
    text: str,
    *,
    flag: str | None = None,
    shown: str | None = None,
    metavar: str | None = None,
    argument: bool = False,
    advanced: bool = False,
    names: Literal["model", "path", "any", "calibration", "method"] | None = None,
    **bounds: Any,
) -> Any:
    """Return a field of an options model with its help `text` and pydantic's `bounds`.

    `flag` replaces the flag made from the name, `shown` describes the default in help, `argument`
    makes it positional, and an `advanced` option appears only in `--help-all`. What an option
    `names` (a model, a path, either, the sources of a mix, a method) must exist, which is checked
    before slow imports.
    """
    extra: dict[str, Any] = {
        "flag": flag,
        "shown": shown,
        "metavar": metavar,
        "argument": argument,
        "advanced": advanced,
        "names": names,
    }
    return Field(default, description=text, json_schema_extra=extra, **bounds)


advanced = partial(option, advanced=True)


def parse_share(value: Any) -> Any:
    """Return `0.6` or `60%` as a share; for 60 a ValueError suggests both."""
    try:
        if isinstance(value, str) and value.strip().endswith("%"):
            return float(value.strip()[:-1]) / 100
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"'{value}' is not a share, such as 0.6 or 60%") from None
    if 1 < number <= 100:
        raise ValueError(f"{number:g} is above 1: write {number:g}% or {number / 100:g}")
    return number


def parse_weights(value: Any) -> Any:
    """Return weights by name, also from text such as `general=1,code=2`."""
    if not isinstance(value, str):
        return value
    return named_values(f"weights '{value}'", value.split(","), "NAME=NUMBER")


def parse_duration(text: Any) -> float:
    """Return the seconds of `90s`, `30m`, `30min` or `2h`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)\s*", str(text))
    if match is None or not float(match[1]):
        raise ValueError(f"'{text}' is not a time, such as 90m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2][0]]


Share = Annotated[float, BeforeValidator(parse_share), Field(gt=0, lt=1)]
Weights = Annotated[dict[str, float], BeforeValidator(parse_weights)]
# YAML reads a bare `off` as false.
Leakage = Annotated[str, BeforeValidator(lambda value: "off" if value is False else value)]


# Options that several models have.
TRUST = advanced(False, "Run modelling code shipped with the model.")
RUN_CODE = option(False, "Run code the model writes, in a limited subprocess.")
MAX_MEMORY = advanced(None, "Memory to use at most, e.g. 6GiB.", shown="free memory")
measure_option = partial(option, text="Measure to compare by, e.g. accuracy.", metavar="NAME")
MEASURE = measure_option(None, shown="right; without generated answers primary")
STUDY_MEASURE = measure_option(None, shown="the study's primary measure")


class DeviceOptions(Options):
    """Where a model runs, and whether its own code may."""

    device: str = option("auto", "Torch device, e.g. cpu or cuda:1.")
    trust_remote_code: bool = TRUST


class ServerOptions(Options):
    """How a model behind a server is asked."""

    model_name: str | None = option(
        None, "Model at an http:// address that serves several.", flag="--model", metavar="NAME"
    )
    concurrency: int = advanced(4, "Requests to a server at a time.", ge=1, le=256)
    timeout: float = advanced(300.0, "Seconds to wait for a server's answer.", gt=0, le=86_400)


class TrialOptions(DeviceOptions):
    """How a study's trials run; does not change their results."""

    allow_code_execution: bool = RUN_CODE


class ModelOptions(DeviceOptions):
    """How a model is opened."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = advanced(
        "auto", "Number format to compute in."
    )

    def opening(self) -> dict[str, Any]:
        """Return the arguments of `open_model`."""
        return {name: getattr(self, name) for name in ModelOptions.model_fields}


weights_option = partial(option, None, shown="all equal", metavar="NAME=WEIGHT,...")
own_sources_option = partial(
    option, None, "YAML file of your own sources, e.g. mine.yaml.", metavar="FILE"
)
Licence = Literal["permissive"] | None
licence_option = partial(
    option, None, "Only sources with this kind of licence.", flag="--licence --license"
)
path_option = partial(option, flag="--output -o", metavar="PATH")  # of an output


class SizeOptions(Options):
    """How many tokens are sampled, and how."""

    rows: int = option(64, "Rows of the set, e.g. 128.", ge=1)
    length: int = option(512, "Tokens per row, e.g. 2048.", ge=1)
    seed: int = option(0, "Seed of the calibration text, e.g. 1.", ge=0)
    packing: Literal["concat", "window"] = advanced(
        "concat", "Documents joined (concat) or one window of each."
    )
    sources: Path | dict[str, Any] | None = own_sources_option(advanced=True)


class DrawOptions(SizeOptions):
    """How a calibration set is drawn; the same on the command line, in YAML and in Python."""

    leakage: Leakage = advanced("offline", "Suites whose text is excluded; off: no check.")
    licence: Licence = licence_option(advanced=True)
    prompts: Path | None = advanced(
        None, "Your prompts, half of which the source 'prompts' answers.", metavar="FILE"
    )

    def drawn(self) -> dict[str, Any]:
        """Return the drawing options that were set, by name."""
        return self.options_of(DrawOptions)

    def record(self) -> dict[str, Any]:
        """Return all options as JSON-serialisable values, those for drawing under `draw`."""
        values = self.model_dump(mode="json")
        draw = {name: values[name] for name in self.drawn()}
        rest = {name: one for name, one in values.items() if name not in DrawOptions.model_fields}
        return rest | {"draw": draw}


Measure = Literal["right", "primary", "bits", "smoothed", "accuracy", "ratio"]


class Settings(Options):
    """How a study is analysed."""

    measure: Measure | None = STUDY_MEASURE
    without: list[str] = option([], "Leave this task out (repeat).", metavar="TASK")
    default: str | None = advanced(
        None, "Set to compare others with.", shown="mean of the single sources"
    )
    resamples: int = advanced(2000, "Bootstrap resamples for intervals.", ge=1)
    seed: int = advanced(0, "Seed of the bootstrap.", ge=0)


Propagation = Literal["sequential", "block"]
Statistics = Literal["robust", "plain"]  # of a layer's inputs
# How a calibration set is made; `none` is a trial without one.
Strategy = Literal["single", "mix", "self-cal", "sgs", "igsp", "self-written", "none"]
MOST_EMBEDDING = 6  # bits; nearly all levels then fit a byte


class Pruning(DrawOptions):
    """Options that decide the result of a pruning run, besides the target and the method's own."""

    calibration: str | None = option(
        None,
        "Source, mix, file or saved set, e.g. uniform:stories,python-stdlib.",
        names="calibration",
    )
    propagation: Propagation | None = advanced(
        None,
        "sequential: inputs from pruned layers; block: the papers' two passes.",
        shown="sequential",
    )
    statistics: Statistics | None = advanced(
        None,
        "robust: tokens by what their errors cost, shrunk; plain: the papers'.",
        shown="robust",
    )
    drop_experts: float | None = advanced(
        None, "Fraction of experts to drop per MoE layer: 0.25.", gt=0, lt=1
    )
    embeddings: float | None = advanced(
        None,
        "Bits per weight of embeddings and output head: 5.",
        shown="as they are",
        ge=2,
        le=MOST_EMBEDDING,
    )
    only: tuple[str, ...] = advanced((), "Only layers whose names match: '*.mlp.*'.")
    skip: tuple[str, ...] = advanced((), "Skip layers whose names match: '*.o_proj'.")


RECOVERIES = {"distill": (2, 1e-3), "blocks": (2, 3e-3)}  # epochs and learning rate


class Recovering(DrawOptions):
    """Options that decide the result of a recovery; epochs and learning rate depend on the method
    unless given."""

    calibration: str = option(..., "Text to train on, as for calmix prune.", names="calibration")
    method: Literal["distill", "blocks"] = option(
        "distill", "Match the whole model's logits, or block by block."
    )
    epochs: int = option(None, "Maximum passes over the rows.", shown="2", ge=1, le=1000)
    lr: float = option(
        None,
        "Peak learning rate, relative to weights' size.",
        shown="1e-3, blocks 3e-3",
        gt=0,
        lt=1,
        allow_inf_nan=False,
    )
    batch: int = option(4, "Rows per step.", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: dict[str, Any]) -> dict[str, Any]:
        epochs, lr = RECOVERIES.get(values.get("method", "distill"), (None, None))
        return {"epochs": epochs, "lr": lr} | values

    @property
    def text(self) -> str:
        """The recovery as a user writes it, with options that differ from their defaults."""
        usual = Recovering(method=self.method, calibration="")
        settings = (
            f"{key}={getattr(self, key)!r}"
            for key in RECOVERY_OPTIONS
            if getattr(self, key) != getattr(usual, key)
        )
        return ",".join([self.method, *settings])


RECOVERY_OPTIONS = ("epochs", "lr", "batch")


class Target(DeviceOptions):
    """What a model is compressed to, and with which text and time."""

    max_memory: str | None = MAX_MEMORY
    model: str = option(..., MODEL, argument=True, names="model")
    sparsity: Share | None = option(None, "Fraction to prune, e.g. 0.6 or 60%.")
    pattern: str | None = option(None, "N:M instead of a sparsity, e.g. 2:4.")
    bits: float | None = option(
        None, "Bits per weight of the file: 3.4; with a sparsity, per kept weight.", gt=0, le=8
    )
    type: str | None = option(None, "GGUF: llama.cpp's recipe, e.g. Q3_K_M.", shown="Q4_K_M")
    size: str | None = option(None, "Size of the file instead of --bits: 1.2GB, or 0.25 of dense.")
    product: Literal["gguf", "vllm", "none", "storage"] | None = option(
        None,
        "GGUF file, checkpoint for vLLM, plain safetensors, or a pack.",
        flag="--for",
        shown="gguf; none with a sparsity",
    )
    like: Path | None = option(
        None, "GGUF: an existing file of the same model.", metavar="FILE", shown="its own"
    )
    group: int | None = advanced(
        None, "vllm: inputs that share a scale, e.g. 64.", shown="128, or the most that fit"
    )
    asymmetric: bool = advanced(False, "vllm: a zero point for each group.")
    imatrix: Path | None = option(
        None, "GGUF: round as llama.cpp with its importance matrix.", metavar="FILE"
    )
    keep_at_least: str | None = option(
        None, "Smallest model that provably keeps this: code=0.9,math=0.7.", metavar="FLOORS"
    )
    confidence: Share | None = advanced(
        None, "Confidence of --keep-at-least, e.g. 0.99.", shown="0.95", ge=0.8, le=0.999
    )
    seeds: int | None = advanced(
        None, "Text seeds that must all pass --keep-at-least.", shown="1", ge=1, le=9
    )
    effort: Literal["quick", "standard", "best"] = option(
        "standard", "Time to spend on calibration, recovery and evaluation."
    )
    calibration: str | None = option(
        None,
        "Calibration text, as for calmix calibrate.",
        shown="a built-in mix",
        names="calibration",
    )
    suite: str = option("offline", "Suite by name, or a YAML file.")
    seed: int | None = option(None, "Seed of the calibration text.", shown="0", ge=0)
    licence: Licence = licence_option()
    prompts: Path | None = option(
        None, "Your own prompts: half calibrate, half test.", metavar="FILE"
    )
    allow_code_execution: bool = RUN_CODE
    anyway: bool = advanced(False, "Compress below 2 bits or above 70 % zeros too.")


class Compression(Target):
    """The options of `compress`."""

    no_corpus: bool = option(False, "Calibrate on text the model writes itself.")
    keep: Weights | None = weights_option(
        "Weights of dimensions besides chats: code=2,general=1.", shown=None
    )
    within: Annotated[float, BeforeValidator(parse_duration)] | None = advanced(
        None, "Time limit of --keep-at-least, e.g. 2h.", metavar="TIME"
    )


METHOD = "sparsegpt"  # default of pruning
BITS_METHOD = "ecq"  # default for bits without a sparsity
COMPRESS_METHOD = "admm"  # ends in a refit of its own: docs/methods.md
BUILTIN_METHODS = "sparsegpt", "admm", "wanda", "ria", "magnitude", "gptq", "ecq", "ggml", "llama"
NONE = "none"  # method of a request that only drops experts

# Options of every pruning run, whose names no method's option may have.
PRUNE = (
    *Pruning.model_fields,
    *ModelOptions.model_fields,
    "method",
    "sparsity",
    "pattern",
    "model",
    "ids",
    "output",
    "max_memory",
    "micro_tokens",
    "paused",
    "progress",
    "resume",
    "overwrite",
    "json",
    "as_json",
    "help",
)


def named_values(what: str, parts: Iterable[str], form: str) -> dict[str, str]:
    """Return values by name from parts such as `name=value`; errors name `what` and show `form`."""
    values: dict[str, str] = {}
    for part in parts:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise InputError(f"{what}: '{part.strip()}' is not of the form {form}")
        if name in values:
            raise InputError(f"{what} gives {name} twice")
        values[name] = value
    return values


def named_options(what: str, text: str) -> tuple[str, dict[str, str]]:
    """Split `NAME,option=value,...` into the name and its options as text."""
    name, *parts = text.split(",")
    return name.strip(), named_values(f"{what} '{text}'", parts, "option=value")


def checked(model: type[Some], values: Mapping[str, Any]) -> Some:
    """Check options, None being not given; an InputError names the flag of the first mistake."""
    try:
        return model.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        problem = error.errors()[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        raise InputError(f"unknown option '{name}': {nearest(name, model.model_fields)}")
    flag = flags(model, name)[0] if name in model.model_fields else name
    if problem["type"] == "missing":
        raise InputError(f"{flag} is missing")
    said = plain_problem(problem["msg"])
    if problem["type"] == "value_error":
        raise InputError(f"{flag}: {said}" if name else said)
    hint = nearest(str(problem["input"]), re.findall(r"'([^']+)'", said))
    if problem["type"] == "literal_error" and hint.startswith("did"):
        said += f": {hint}"
    raise InputError(f"{flag} {problem['input']}: {said}")


def check_method(text: str) -> None:
    """Refuse an unknown pruning method without importing any."""
    name = text.partition(",")[0].strip()
    names = {*BUILTIN_METHODS, *(one.name for one in entry_points(group="calmix.methods"))}
    if name not in names and name != NONE:
        raise InputError(f"unknown method '{name}': {nearest(name, names)}")


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line, without those that are None or False."""
    words: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif (value or value == 0) and value is not False and (key, value) != ("device", "auto"):
            values = value if isinstance(value, tuple) else (value,)
            words += [word for one in values for word in (flag, str(one))]
    return words


def flags(model: type[Options], name: str) -> list[str]:
    """Return a field's flags on the command line, or the metavar of an argument."""
    extra: Any = model.model_fields[name].json_schema_extra or {}
    if extra.get("argument"):
        return [extra.get("metavar") or name.upper()]
    return (extra.get("flag") or f"--{name.replace('_', '-')}").split()
