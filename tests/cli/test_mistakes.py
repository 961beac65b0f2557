"""Every kind of user error that the options allow, command by command: each prints one line.

Nothing is downloaded, computed or written before it.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

import calmix
from calmix.cli import app
from calmix.deploy.pack import pack
from calmix.evaluation.scores import CapabilityScores
from tests.conftest import write_text_file
from tests.study.conftest import write_study
from tests.synthetic import Plan, save, study
from tests.tiny import save_tiny_model

WRONG = "no-such-thing"
# A correct call of each verb, or of each of its formats; names in braces are the files below, and
# {out} is the output.
VERBS = {
    "compress": "{model} -o {out} --for none",
    "prune": "{model} --calibration {text} --sparsity 0.5 --length 64 -o {out}",
    "recover": "{model} --against {other} --calibration {text} --length 64 -o {out}",
    "export --to pack": "{model} -o {out}",
    "export --to model": "{pack} -o {out}",
    "export --to jsonl": "{set} --model {model} -o {out}.jsonl",
    "calibrate draw": "{text} --model {model} --length 64 -o {out}",
    "calibrate sources": "",
    "calibrate show": "{text}",
    "evaluate run": "{model} --against {other} --suite {suite} -o {out}.json",
    "evaluate rescore": "{scores}",
    "evaluate suites": "",
    "evaluate suite": "{suite}",
    "compare": "{scores}",
    "check": "{scores} --keep-at-least 0.5 -o {out}.json",
    "report": "{results} -o {out}.html",
    "study init": "{out}.yaml",
    "study plan": "{study}",
    "study run": "{study} -o {out}",
    "study status": "{results}",
    "study report": "{results} -o {out}",
    "doctor check": "",
    "doctor inspect": "{set}",
    "doctor models": "",
    "doctor methods": "",
    "doctor assets": "",
}
# Part of the message for errors that depend on another option or the contents of a file.
COMPRESS = "compress {model} -o {out} "
PRUNE = "prune {model} -o {out} --length 64 --calibration {text} "
HALF = PRUNE + "--sparsity 0.5 "
LONG = "error: length 9999 is beyond the model's context of 256 tokens"
SAID = {
    COMPRESS + "--keep code=0": "all weights are 0",
    COMPRESS + "--keep code=1 --no-corpus": "--keep has no effect with --no-corpus",
    COMPRESS + "--no-corpus --calibration news": "--calibration has no effect with --no-corpus",
    COMPRESS + "--no-corpus --licence permissive": "--licence has no effect",
    COMPRESS + "--licence permissive --calibration books": "is unstated",
    COMPRESS + "--calibration {text} --sparsity 0.6 --max-memory 0.5GiB": "0.50 GiB of memory are",
    COMPRESS + "--prompts {blank}": "is empty: it has no text",
    COMPRESS + "--prompts {notes}": "is a folder: name a file of prompts",
    COMPRESS + "--size apples": "--size 'apples' is not a size: write",
    COMPRESS + "--size 0.3 --keep-at-least code=0.4": "--size has no effect with --keep-at-least",
    COMPRESS + "--bits 9": "--bits 9: must be less than or equal to 8",
    COMPRESS + "--keep-at-least code=0.4 --sparsity 0.5": "--sparsity has no effect with",
    COMPRESS + "--keep-at-least cod=0.4": "is not scored: did you mean code",
    COMPRESS + "--keep-at-least code=0.4 --within 2d": "is not a time, such as 90m or 2h",
    COMPRESS + "--within 2h": "has no effect without --keep-at-least",
    COMPRESS + "--seeds 2": "--seeds has no effect without --keep-at-least",
    COMPRESS + "--keep-at-least code=0.4 --confidence 0.6": "greater than or equal to 0.8",
    "evaluate {model} --against {other} --suite {suite} --text code={text}@body -o {text} "
    "--overwrite": "text.txt is the input",
    "compress {model} -o {results}": "is not empty and was not made by calmix compress",
    "report {set}": "was not made by calmix compress: it has no",
    "report {set} -o {out}.txt": "cannot write a page to",
    "check {set} --keep-at-least 0.9": "was not made by calmix compress",
    "check {set} {scores} --keep-at-least 0.9": "a folder is checked alone",
    "check {scores} --keep-at-least 0.9": "without a dense model: evaluate again with --against",
    "check {scores} --keep-at-least 0.9 --confidence 0.5": "--confidence",
    "compare {scores}": "was scored without a dense model",
    "compare builtin:smollm2-135m {half}": "is a model: compare models with --prompts FILE or",
    "compare {half} {x/half} --against {scores}": "two files are called half:",
    "compare {half} {foreign} --against {scores}": "foreign.json was scored against other, not",
    "compare {quiz} --against {scores}": "cannot be compared",
    "prune {model} --calibration igsp --sparsity 0.5 --length 9999 -o {out}": LONG,
    "recover {model} --against {other} --calibration igsp --length 9999 -o {out}": LONG,
    "calibrate draw igsp --model {model} --length 9999 -o {out}": LONG,
    "calibrate show chat": "chat has no text yet: the model writes it (calmix calibrate chat)",
    "calibrate sources --dimension cod": "no source has dimension 'cod': did you mean code",
    PRUNE: "either --sparsity",
    HALF + "--pattern 2:4": "either --sparsity",
    PRUNE + "--sparsity 0.5,0.6": "'0.5,0.6' is not a share",
    PRUNE + "--sparsity 1.5": "write 1.5% or 0.015",
    PRUNE + "--pattern 2of4": "N:M",
    HALF + "--method wanda,sparsegpt": "'sparsegpt' is not of the form option=value",
    HALF + "--method bits=4": "unknown method 'bits=4'",
    HALF + "--method magnitude": "--calibration has no effect",
    HALF + "--damping 1": "sparsegpt,damping=VALUE",
    HALF + "--skip re:(": "is not a regular expression",
    PRUNE + "--bits 4 --embeddings 8": "less than or equal to 6",
    PRUNE + "--bits 4 --embeddings 1": "greater than or equal to 2",
    "prune {model} -o {out} --sparsity 0.5": "needs --calibration",
    "prune {model} -o {out} --sparsity 0.5 --method magnitude,refit=5": "magnitude needs --cali",
    "prune {model} -o {out} --sparsity 0.5 --method magnitude --seed 1": "--seed has no effect",
    "prune": "error: Missing argument 'MODEL' (see calmix prune --help)",
    "prue x": "error: No such command 'prue'",
    "prune x -o y --rows many": "error: --rows many: must be a valid integer",
    "compress x -o y --effort quik": "did you mean quick?",
    "compress x -o y --effort fast": "did you mean quick?",
    "prune x -o y --bits": "error: Option '--bits' requires an argument (see calmix --help)",
    "prune x -o y --ratio 0.5": "did you mean --sparsity?",
    "quantize x": "did you mean prune?",
}
# Verbs that know beforehand how much disk space they need.
DISK = "compress", "prune", "recover", "export --to model", "study run"


def commands(group, name=""):
    """Yield the name of every command, and the command."""
    for key in group.list_commands(None):
        command = group.get_command(None, key)
        if hasattr(command, "commands"):
            yield from commands(command, f"{key} ")
        elif not command.hidden:
            yield name + key, command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small valid inputs of every kind."""
    at = tmp_path_factory.mktemp("inputs")
    actual = {
        "model": at / "models" / "model",
        "other": save_tiny_model(at / "models" / "other"),
        "text": write_text_file(at / "text.txt"),
        "blank": at / "blank.txt",
        **{name: at / name for name in ("set", "pack", "binary", "empty", "notes", "results")},
        **{name: at / f"{name}.json" for name in ("scores", "half", "x/half", "foreign", "quiz")},
    }
    actual["binary"].write_bytes(bytes(range(256)))
    actual["empty"].mkdir()
    actual["notes"].mkdir()
    (actual["notes"] / "one.txt").write_text("What is up?")
    actual["study"] = write_study(at / "study", actual["other"])
    actual["suite"] = actual["study"].with_name("suite.yaml")
    opened = calmix.open_model(str(actual["other"]))
    drawn = calmix.calibration_set(str(actual["text"]), opened, rows=4, length=32, leakage="off")
    drawn.save(actual["set"])
    calmix.prune(opened.model, method="magnitude", pattern=calmix.Unstructured(0.5))
    opened.model.save_pretrained(actual["model"])
    opened.tokenizer.save_pretrained(actual["model"])
    pack(actual["model"], actual["pack"])
    (at / "file").touch()
    with actual["study"].open("a") as file:
        file.write("keep_checkpoints: true\n")
    results = study(Plan(sources=("news", "books"), seeds=(0, 1)))
    save(results, actual["results"])
    (tasks,) = results.dense.values()
    whole = CapabilityScores("m", "f", "float32", dict(results.suite) | {"hash": "h"}, tasks)
    actual["x/half"].parent.mkdir()
    for name in ("scores", "half", "x/half"):
        whole.save(actual[name])
    replace(whole, suite=dict(whole.suite) | {"hash": "other"}).save(actual["quiz"])
    against = replace(whole, model="other", fingerprint="o").to_dict()
    actual["foreign"].write_text(json.dumps({**whole.to_dict(), "dense": against}))
    actual["blank"].write_text("\n")
    return actual


def parameters(verb):
    command = COMMANDS[verb.partition(" --")[0]]
    return list(command.get_params(command.make_context(verb, [], resilient_parsing=True)))


def filled(words, files):
    """Return arguments with the paths of files."""
    return words.format(out=files["text"].parent / "out", **files).split()


def without(words, names):
    """Return arguments without an option and its value."""
    at = next((i for i, word in enumerate(words) if word in names), None)
    return words if at is None else words[:at] + words[at + 2 :]


def mistakes(verb, files):
    """Yield wrong arguments, and words one of which must be in the error."""
    words, params = filled(VERBS[verb], files), parameters(verb)
    yield [*words, "--no-such-option"], "--no-such-option"
    if not any(param.nargs == -1 for param in params):
        yield [*words, "one-too-many"], "one-too-many"
    for param in params:
        names = [*param.opts, *param.secondary_opts]
        if param.param_type_name == "argument":
            if param.required and param is params[0]:
                first = next((i for i, w in enumerate(words) if w.startswith("-")), len(words))
                yield words[first:], (param.metavar or param.name).strip(".")
        elif param.is_flag:
            yield [*words, f"{names[0]}=yes"], names[0]
        else:
            rest = without(words, names)
            if param.required:
                yield rest, max(names, key=len)
            yield [*rest, names[0]], names[0]
            values = [WRONG, "", *(["-7"] if param.metavar == "NUMBER" else [])]
            if param.name == "device" and not torch.cuda.is_available():
                values.append("cuda")
            if "--separator" not in names and "-o" not in names:  # the first takes any text
                for value in values:
                    yield [*rest, names[0], value], value, max(names, key=len).strip("-")
    yield from wrong_words(verb, words, files)
    yield from wrong_outputs(verb, words, files)


def wrong_words(verb, words, files):
    """Yield calls in which an input is missing or of another kind."""
    known = set(map(str, files.values()))
    for at, word in enumerate(words):
        if word in known:
            yield [*words[:at], str(files["text"].parent / WRONG), *words[at + 1 :]], WRONG
            for kind in ("binary", "empty"):
                yield [*words[:at], str(files[kind]), *words[at + 1 :]], kind
            for model in ("org/none", "builtin:none") if word.endswith(("model", "other")) else ():
                yield [*words[:at], model, *words[at + 1 :]], model.partition(":")[2] or model


def wrong_outputs(verb, words, files):
    """Yield calls whose output is, contains or is inside an input, or cannot be written."""
    output = next((word for word in words if Path(word).stem == "out"), None)
    if output is None:
        return
    ending = Path(output).suffix
    more = ["--overwrite"] if any("--overwrite" in p.opts for p in parameters(verb)) else []

    def at(path):
        return [str(path) if word == output else word for word in words] + more

    for name in ("/proc/out", str(files["text"].parent / "file" / "out")):
        yield at(Path(name + ending)), "cannot write to"
    inputs = [Path(word) for word in words if word in set(map(str, files.values()))]
    for path in inputs:
        if verb == "report":
            yield at(path / "store.json"), "is the input"
        elif path.is_dir() or path.suffix == ending:
            yield at(path / f"x{ending}" if path.is_dir() else path), "the input"
        if not ending and verb != "study run":
            yield at(path), "the input" if path.is_dir() else "is a file"
            yield at(path.parent), "contains the input"


@pytest.fixture
def idle(monkeypatch, tmp_path, files):
    """Downloads, computation and sampling are disabled, and neither inputs nor cache may change."""

    def worked(*args, **more):
        raise AssertionError("work was done before the mistake was found")

    for name in (
        "calmix.assets._fetch",
        "transformers.AutoModelForCausalLM.from_pretrained",
        "calmix.models.streaming.StreamedModel.fetch",
        "calmix.sources.registry.Source.documents",
        "huggingface_hub.snapshot_download",
        "calmix.deploy.pack._encoded",
    ):
        monkeypatch.setattr(name, worked)
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    root = files["text"].parent
    before = tree(root)
    yield
    assert tree(root) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"hashes"}  # of inputs 5 seconds old


def tree(folder):
    return {p: ((s := p.stat()).st_mtime_ns, s.st_size) for p in folder.rglob("*")}


def test_error_cases_cover_all_commands(files):
    assert {verb.partition(" --")[0] for verb in VERBS} == set(COMMANDS)
    assert sum(len(list(mistakes(verb, files))) for verb in VERBS) > 800


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("verb", VERBS)
def test_each_error_is_one_line(calmix, files, verb):
    for words, *named in mistakes(verb, files):
        ended = calmix(*verb.split(), *words)
        assert any(word.lower() in ended.line.lower() for word in named), (words, ended)
        assert verb == "doctor inspect" or not ended.out, words  # it reports damage


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("words", SAID)
def test_error_messages(calmix, files, words):
    assert SAID[words] in calmix(*filled(words, files)).line


@pytest.mark.usefixtures("idle")
def test_a_missing_extra_is_reported_before_the_work(calmix, files, monkeypatch):
    for extra, package, words in (
        ("ray", "ray", "study run {study} -o {out} --executor ray"),
        ("reasoning", "reasoning_gym", HALF.replace("{text}", "algebra")),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        assert f"pip install 'calmix[{extra}]'" in calmix(*filled(words, files)).line


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("verb", DISK)
def test_a_full_disk_is_reported_before_the_work(calmix, files, monkeypatch, verb):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    ended = calmix(*verb.split(), *filled(VERBS[verb], files))
    assert "error: no space left for" in ended.line
    assert ended.out == ""
