"""From a model to its card: all stages, an interrupt after each, and errors; `calmix check`."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import calmix as api
from calmix import words
from calmix.calibration.request import parse_calibration
from calmix.compression.card import read_card
from calmix.compression.compress import Compressed
from calmix.compression.plan import aim, weighed
from calmix.compression.results import Results, read_compressed
from calmix.compression.run_stages import run_stages, stages
from calmix.compression.stages import Recover
from calmix.errors import InputError
from calmix.evaluation.scores import describe
from calmix.evaluation.suites import choose, runnable
from calmix.evaluation.tasks import load_items
from calmix.files import write_json
from calmix.manifest import sealed
from calmix.sources.mixes import MIXES, parse_mix
from tests.calibration.selfgen.test_chat import TEMPLATE
from tests.compress.conftest import damage, interrupts, names, pages, read, refused, shows
from tests.evaluation.helpers import save_pair, scored, written
from tests.evaluation.test_floors import answered
from tests.tiny import hashes, load_weights, save_tiny_model, tiny_tokenizer

FILES = "calibration card.html compress-run.json compress.json model pruned recipe.yaml scores.json"


def test_interrupted_stages_resume_to_the_same_model(calmix, command, compressed, place, tmp_path):
    whole, cut = compressed, tmp_path / "cut"
    commands = read_compressed(whole)["commands"].values()
    verbs = [line.split()[1 + (" answers " in line)] for line in commands]
    assert verbs == ["calibrate", "prune", "recover", "evaluate", "report"]
    assert names(whole) == FILES
    found = load_weights(whole / "model").items()
    maps = torch.cat([w.ravel() for name, w in found if ".layers." in name and w.ndim == 2])
    assert abs((maps == 0).double().mean() - 0.6) < 0.001
    for done, ended in enumerate(interrupts(calmix, command(cut), len(verbs))):
        assert (ended.code, ended.err.splitlines()[-1]) == (130, "interrupted")
        assert ended.err.count("already done") == max(0, done - 1)
        assert f" {verbs[done]} " in ended.err.rpartition("$ calmix")[2]
    ended = calmix(*command(cut)).ok()
    assert ended.err.count("already done") == 4
    first, *rest = ended.out.splitlines()
    named = [line.split(": ")[0] for line in rest]
    assert (first, named) == ("right answers: not measured", ["size", "card", "next", "instead"])
    assert (" kB dense, " in rest[0], rest[-1].endswith("cut-gguf")) == (True, True)
    assert replace(read_card(cut), size=3210, packed=0).disk == "3.21 kB"
    records = {"README.md": "", "calmix.json": ""}  # they name the folders
    assert hashes(cut / "model") | records == hashes(whole / "model") | records
    assert read(place / "measured.json")["retention"] == read(cut / "scores.json")["retention"]
    for more in ((), ("--dry-run",)):
        line = calmix(*command(cut, "--sparsity", 0.5, *more)).line
        assert "is of another request (sparsity: 0.6, now 0.5)" in line


def test_card_numbers_match_scores(calmix, compressed):
    """On the page, in the model card, and from `evaluate rescore`."""
    told = json.loads(calmix("evaluate", "rescore", compressed / "scores.json", "--json").out)
    page, readme = pages(compressed)
    assert "docs/" not in page + readme  # an installed wheel has no docs
    assert "speed" not in (page + readme).lower()  # no engine runs zeros faster
    trained = re.search(r"held-out rows: [\d.]+ before, [\d.]+\s+after, ([\d.]+) on fitted", page)
    assert trained[0] in readme
    curve = read(compressed / "model" / "calmix.json")["recovery"]["curve"]["losses"]
    late = curve[len(curve) // 2 :]
    assert float(trained[1]) == pytest.approx(sum(late) / len(late), abs=1e-4)
    table = page[page.index("<h2>Likelihood</h2>") : page.index("By task")]
    lines = [line.split(" | ") for line in readme.splitlines() if line.count(" | ") == 4]
    shown = {name.removeprefix("| "): kept for name, kept, *_ in lines}
    estimates = {one["name"]: one["kept"] for one in told["dimensions"]} | {"total": told["total"]}
    assert set(estimates) < set(shown)
    for name, one in estimates.items():
        assert one["value"] is not None
        numbers = [f"{100 * one[key]:.1f}".replace("-", "−") for key in ("value", "low", "high")]
        assert shown[name] == "{} [{}, {}]".format(*numbers)
        assert "{} <small>[{}, {}]</small>".format(*numbers) in table
    card = read_card(compressed)
    hashed = [one["SHA-256"] for one in card.hashes]
    shows(page, *hashed)
    shows(readme, *hashed, *card.record["commands"].values())
    assert "src=" not in page
    assert "http" not in re.sub(r"http://www\.w3\.org[^\"]*", "", page)


@pytest.fixture
def measured(compressed):
    """Return a function that writes both models' answers to sums as `abilities.json`."""
    suite = runnable(choose("abilities", quick=True), False)[0]
    pair = read_card(compressed).pairs[0]

    def write(folder, *tasks, repeat=None, **changed):
        both = zip(pair, tasks, strict=True)
        dense, small = (replace(a, suite=describe(suite), tasks=(task,)) for a, task in both)
        repeated = replace(dense, repeat=() if repeat is None else (repeat,))
        save_pair(folder / "abilities.json", repeated, replace(small, **changed))
        return small.retention(dense).total

    return write


def test_card_leads_with_right_answers(calmix, command, out, measured, tmp_path):
    questions = load_items(choose("abilities", quick=True).tasks["sums"])[:30]
    right = [1] * 20 + [0] * 10

    def wrote(right, **other):
        answers = tuple(other.get(f"at_{number}", "same") for number in range(len(right)))
        items = tuple(one.id for one in questions)
        return replace(written("sums", "math", right), items=items, answers=answers)

    dense = wrote(right, at_2="<b>so", at_20="wrong", at_29="no")
    small = [0, 0, 0, *right[3:20], 1, *right[21:]]
    small = wrote(small, at_2="lost it", at_20="found it", at_29="neither")
    total = words.with_span(measured(out, dense, small, repeat=wrote([0, *right[1:]])))
    calmix("report", out).ok()
    calmix("report", out, "-o", tmp_path / "card.html").ok()
    texts = [" ".join(re.sub("<[^>]*>", " ", text).split()) for text in pages(out)]
    lead = (
        "Right answers: no loss is shown, up to 30.0 % is not ruled out; "
        f"{total} % of the dense model's (in math), 3 of 20 lost, 1 gained, p = 0.625."
    )
    ceiling = "The dense model against itself, in other batches: 95.0 ["
    for text in (text.replace("&#39;", "'") for text in texts):
        assert text.index(lead) < text.index(ceiling) < text.index("Kept: 17 of 20 right answers")
        assert "not measured" not in text
    assert f"| math | 30 | 20 | 18 | 3 | 1 | 0.625 | {total} |" in texts[1]
    page = pages(out)[0]
    shown = page[page.index('id="answers"') :].partition("</section>")[0]
    assert ("4 of 4" in shown, shown.count("<article")) == (True, 4)
    assert shown.index(f"sums: {questions[2].question}") < shown.index(questions[20].question)
    assert shown.index("&lt;b&gt;so") < shown.index("lost it") < shown.index("found it")
    assert "neither" not in shown
    printed = " ".join(calmix(*command(out)).ok().out.split())
    assert printed.startswith(lead[0].lower() + lead[1:-1])
    assert ceiling in printed


def test_card_suites_and_foreign_models(calmix, out, measured):
    """All scores of a card are of one pair of models."""
    eight = written("sums", "math", [1] * 8)
    measured(out, eight, eight)
    card = read_card(out)
    first, second = card.suite.split(" and ")
    assert first == "abilities version 3 (8 items of 1 task)"
    assert second.startswith("made version 1 (")
    named = [one["task"] for one in card.tasks if one["task"].endswith("(abilities)")]
    assert named == ["sums (abilities)"]
    assert words.TOO_FEW in card.shortly
    assert [list(row.values()) for row in Compressed(out)._rows()[:3]] == [
        ["right answers", "math", None, None, None],  # of 8, too few to tell
        ["right answers", "total", None, None, None],
        ["right answers kept", "math", 100.0, 67.6, 100.0],
    ]
    left = [(one, replace(two, not_run=("programs",))) for one, two in card.pairs]
    for suite, after in (("offline", "calmix evaluate"), ("mine.yaml", "hf upload")):
        again = replace(card, pairs=left, request=card.request | {"suite": suite})
        assert again.next.startswith(after)  # a user's own programs need no abilities
    measured(out, eight, eight, fingerprint="0")
    assert "abilities.json is about other models than" in calmix("report", out).line
    (out / "abilities.json").unlink()
    next((out / "model").glob("*.safetensors")).unlink()
    assert "safetensors is missing" in calmix("report", out).line


def test_hash_before_recovery(out):
    """Not that of the model between two recoveries, as `--effort best` makes it."""
    once = read(out / "model" / "calmix.json")
    between = {"name": str(out / "blocks"), "sha256": "0" * 64}
    shutil.rmtree(out / "pruned")  # with it, the hash would be compared
    write_json(out / "model" / "calmix.json", sealed(once | {"model": between, "pruned": once}))
    card = read_card(out)
    assert len(card.recoveries) == 2
    hashed = {one["what"]: one["SHA-256"] for one in card.hashes}
    assert hashed["pruned model, before recovery"] == once["model"]["sha256"]


def test_dry_run_writes_nothing_and_sees_too_little_text(calmix, command, tmp_path, place):
    before, dry = sorted(place.glob("*.*")), command(tmp_path / "out", "--dry-run")
    shows(calmix(*dry).ok().out, "nothing was written", "calmix recover")
    costs = json.loads(calmix(*dry, "--json").out)
    assert all(one["memory"] > 0 for one in costs)
    work = {one["stage"]: one["work"] for one in costs}
    assert work["prune"] == "16 rows of 128 tokens"
    assert work["recover by distill"] == "1 x 16 rows of 128 tokens"
    assert work["evaluate"].endswith(" items")
    assert not list(tmp_path.iterdir())
    assert sorted(place.glob("*.*")) == before  # beside the cache
    text = tmp_path / "mine.txt"
    text.write_text("A line of some text.", encoding="utf-8")
    said = f"source {text} has text for 0 rows of 128 tokens, not 16"
    assert said in calmix(*dry, "--calibration", text).line
    assert [*tmp_path.iterdir()] == [text]


def test_dry_run_fetches_nothing(calmix, tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    model, more = "builtin:gemma3-270m", ("--dry-run", "-o", tmp_path / "out")
    for verb, *how in (("compress",), ("prune", "--calibration", "stories", "--sparsity", 0.5)):
        ended = calmix(verb, model, *how, *more).ok()
        assert ended.out.startswith(f"{model} is not here: a run first fetches ")
        shows(ended.out, "weights, 2 bytes each, into", "Nothing was fetched or written")
        told = json.loads(calmix(verb, model, *how, *more, "--json").out)
        assert told["first"].startswith("fetches ")
    assert "--bits 1: below 2 bits" in calmix("compress", model, "--bits", 1, *more).line
    assert not list(tmp_path.iterdir())


def test_locked_folder_is_refused_first(calmix, command, tmp_path, monkeypatch):
    monkeypatch.setattr("calmix.compression.compress.check_request", None)
    out = tmp_path / "out"
    with FileLock(tmp_path / ".out.lock"):
        assert "another process is at work in" in calmix(*command(out)).line
        out.mkdir()
        for verb in ("report", "check"):
            assert "another process is at work in" in calmix(verb, out).line


def test_keep_option_weights():
    mix = ",".join(f"{name}:{weight:g}" for name, weight in MIXES["mix-default"].items())
    for text, keep, wanted in (
        (mix, {"code": 2, "general": 1}, "encyclopedia:1,books:1,python-stdlib:2,code-compiled:2"),
        ("stories:3,procedures:1,news:9", {"commonsense": 1}, "stories:3,procedures:1"),
    ):
        assert weighed(text, keep) == pytest.approx(parse_mix(wanted))
    refused("has no dimension 'math'", weighed, "stories", {"math": 1})


def test_python_matches_the_command(out, options, tmp_path, tiny_folder, capfd, monkeypatch):
    """A finished folder is not recreated, and options are those of the verb."""
    made = api.compress(tiny_folder, out, shown=False, sparsity="0.6", **options)
    assert capfd.readouterr() == ("", "")
    assert made.retention.total.value is not None
    last = made.to_pandas().iloc[-1]
    assert (last["measure"], last["dimension"]) == ("likelihood kept", "total")
    assert repr(made.retention).startswith("<Retention: likelihood kept: ")
    assert "right answers: not measured" in repr(made)
    with monkeypatch.context() as patch:  # the card is read only once
        patch.setattr("calmix.compression.compress.read_card", None)
        assert "right answers: not measured" in repr(made)
    assert made.to_dict()["card"] == str(made.card)
    for wrong, said in (
        ({"efort": "quick"}, "unknown option 'efort': did you mean effort"),
        # Only the verb has these.
        *(({name: True}, f"unknown option '{name}'") for name in ("dry_run", "as_json", "open")),
    ):
        refused(said, api.compress, tiny_folder, tmp_path / "other", **wrong)
    assert not (tmp_path / "other").exists()


def test_effort_and_pattern_stages(asked):
    best = stages(asked(effort="best", sparsity=0.6), Path("out"))
    assert [isinstance(stage.request, Recover) for stage in best].count(True) == 2
    own = stages(asked(pattern="2:4", trust_remote_code=True, no_corpus=True), Path("o"))
    assert own[0].request.words[:2] == ("calibrate", "self-written")
    assert all("--trust-remote-code" in stage.command for stage in own[:-1])
    assert "--pattern 2:4" in own[1].command
    both = asked(bits=4, pattern="2:4")
    assert (both.target, aim(both)["method"]) == ("2:4, 4 bits", "admm")
    assert aim(asked(pattern="2:4", calibration="python-docs"))["method"] == "admm"
    four = stages(asked(effort="quick", bits=4), Path("o"))
    assert not [one for one in four if isinstance(one.request, Recover)]


def test_chat_models_get_chats_and_wide_ones_more_rows(tmp_path, tiny_folder, asked):
    narrow = asked()
    assert ("chat" in narrow.calibration, narrow.rows) == (False, 64)
    folder = str(shutil.copytree(tiny_folder, tmp_path / "talker"))
    tiny_tokenizer(TEMPLATE).save_pretrained(folder)
    text = asked(model=folder).calibration
    usual = {name: 0.75 * weight / 8 for name, weight in MIXES["mix-default"].items()}
    assert parse_mix(text) == {"chat": 0.25} | usual
    assert parse_calibration(text).written
    code = {"chat": 0.25, "python-stdlib": 0.375, "code-compiled": 0.375}
    assert parse_mix(asked(model=folder, keep={"code": 1}).calibration) == code
    assert asked(model=folder, calibration="python-docs").calibration == "python-docs"
    wide = save_tiny_model(tmp_path / "wide", "llama", intermediate_size=40 * narrow.length)
    for effort, rows in (("quick", 160), ("standard", 160), ("best", 320)):
        request = asked(model=str(wide), effort=effort)
        assert request.rows == request.draw["rows"] == rows


def test_pack_of_a_size_from_a_saved_set(calmix, command, tmp_path, tiny_folder, place):
    """Below three bits levels are trained; the card shows the bits, who reads a damaged pack
    refuses it."""
    out, kept, text = tmp_path / "out", tmp_path / "set", str(place / "text.txt")
    small = ("--rows", 16, "--length", 64, "--leakage", "off")
    calmix("calibrate", text, "--model", tiny_folder, *small, "-o", kept).ok()

    def words(*more):
        return [kept if word == text else word for word in command(out, "--size", *more)]

    line = calmix(*words("1kB")).line
    low, high = map(float, re.search(r"has from ([\d.]+) kB to ([\d.]+) kB", line).groups())
    wanted = round(low + (high - low) / 7)  # between 1.5 and 7 bits
    for size in (wanted, wanted + 4):
        costs = json.loads(calmix(*words(f"{size}kB", "--dry-run", "--json")).out)
        (disk,) = [one["disk"] for one in costs if one["stage"] == "pack"]
        assert 0.95 < disk / 1000 / size <= 1
    told = json.loads(calmix(*words(f"{wanted}kB", "--json")).ok().out)
    assert told["card"] == str(out / "card.html")
    assert not (out / "calibration").exists()
    assert "quantise" in (out / "compress.json").read_text()
    assert (out / "pruned" / "calmix-scales").is_dir()
    card = read_card(out)
    bits = card.record["request"]["bits"]
    assert 2 < bits < 3.9
    assert card.title.endswith(f"to {bits:g} bits per weight")
    assert [one["quantised"] for one in card.recoveries] == [card.pruning["weights"]]
    assert card.pruning["bits"] == pytest.approx(bits, abs=0.1)
    packed, scales = (
        sum(path.stat().st_size for path in (out / "pack").glob(f"{where}*.safetensors"))
        for where in ("", "*/")
    )
    assert 0 < packed < card.packed < card.size  # with scales
    assert 0.9 * wanted < (packed + scales) / 1000 <= wanted
    assert "Once packed, a weight takes" in pages(out)[1]
    assert "left to do" not in calmix("doctor", "inspect", out, "--json").out
    weights = max((out / "pack").glob("*.safetensors"))
    damage(weights)
    check = ("check", out, "--keep-at-least", "0.05")
    for reader in (("report", out), check, ("compare", out), words(f"{wanted}kB")):
        assert f"{weights} is damaged or changed" in calmix(*reader).line


def test_oversized_pack_is_refused(asked, tmp_path, monkeypatch):
    """Though its size was predicted to fit."""

    def run(stage):
        stage.leaves.mkdir(parents=True)
        (stage.leaves / "one.safetensors").write_bytes(bytes(40_000))

    monkeypatch.setattr(Results, "check", lambda *_: None)
    request = asked(size="30kB", product="storage", effort="quick")
    said = r"pack would have 40 kB, more than --size 30kB: repeat with --size 22.1kB and another"
    refused(said, run_stages, request, tmp_path / "out", run, lambda *_: None)
    assert [(tmp_path / "out" / one).exists() for one in ("model", "pack")] == [True, False]


def test_low_bits_need_anyway(asked):
    with pytest.raises(InputError) as error:
        asked(size="1kB", product="storage")
    low = re.search(r"has from ([\d.]+) kB", str(error.value))[1]
    few = {"size": f"{float(low) + 0.5}kB", "product": "storage"}
    nothing = "no measured model keeps its answers"
    for target, said in (
        ({"bits": 0.5}, f"--bits 0.5: below 2 bits per weight {nothing}"),
        ({"bits": 1.99}, f"--bits 1.99: below 2 bits per weight {nothing}"),
        (few, f"--size {few['size']} leaves 1."),
        ({"sparsity": 0.71}, nothing),
        ({"pattern": "1:4"}, nothing),
        ({"sparsity": 0.9, "bits": 4}, nothing),
    ):
        refused(rf"{re.escape(said)}.*or pass --anyway$", asked, **target)
        assert asked(**target, anyway=True).target
    for target in ({"bits": 2}, {"bits": 3}, {"sparsity": 0.7}):
        assert asked(**target).target


def test_check_appears_on_its_own_card(calmix, out):
    assert not read_card(out).checked
    ended = calmix("check", out, "--keep-at-least", "0.05")
    assert ended.code in (0, 1), ended.err
    assert "calmix report" in ended.err
    made = read(out / "check.json")
    calmix("report", out)
    page, readme = (text.replace("\N{NO-BREAK SPACE}", " ") for text in pages(out))
    shown = "passed" if made["passed"] else "missed"
    shows(page, made["lines"][0], f'<span class="gate {shown}">floors {shown}</span>')
    assert made["lines"][0] in readme
    for changed, said in (
        (sealed(made | {"model": "0"}), "check.json is of another model: run calmix check"),
        (made | {"passed": None}, "check.json is damaged"),
    ):
        write_json(out / "check.json", changed)
        assert read_card(out).checked.startswith(said)
    (out / "scores.json").unlink()
    assert "is not finished" in calmix("check", out, "--keep-at-least", "0.5").line


def saved(path, *tasks, suite="s", model="pruned"):
    """Write scores of two models on a task as `calmix evaluate --against -o` does."""
    dense, pruned = (scored(task, suite=suite) for task in tasks)
    return save_pair(path, dense, replace(pruned, fingerprint=model))


def test_check_exit_code_and_seal(calmix, tmp_path):
    code, chat, out = answered(100, 120), answered(60, 60, "chat"), tmp_path / "check.json"
    first = saved(tmp_path / "code.json", code, answered(100, 120, kept=97))
    both = (first, saved(tmp_path / "chat.json", chat, chat, suite="t"))
    ended = calmix("check", *both, "--keep-at-least", "0.9", "-o", out).ok()
    said = "Kept at 95 % confidence, at least: code 90 % (3 of 100 right answers lost, 0 "
    assert said in ended.out.replace("\n", " ")
    made = read(out)
    assert sealed(made) == made
    wanted = {"kind": "check", "floors": {"": 0.9}, "confidence": 0.95, "passed": True}
    assert made == made | wanted | {"dense": "f", "model": "pruned"}
    assert [one["hash"] for one in made["suites"]] == ["s", "t"]
    assert [one["items"] for one in made["tested"]] == [100, 60]
    ended = calmix("check", *both, "--keep-at-least", "code=0.95", "--confidence", "90%", "--json")
    told = json.loads(ended.out)
    assert (ended.code, told["passed"], told["confidence"]) == (1, False, 0.9)
    assert told["tested"][0]["bound"] < 0.95
    assert told["lines"][0].startswith("Not kept at 90 % confidence: code keeps 97.0 % (")
    assert max(map(len, calmix("check", *both, "--keep-at-least", "0.9").out.splitlines())) <= 80
    other = saved(tmp_path / "other.json", chat, chat, model="x")
    for files, more, line in (  # others are in `tests/cli/test_mistakes.py`
        (both, (), "--keep-at-least is missing: name the floors"),
        ([first, other], ("--keep-at-least", "0.9"), "is about other models than"),
    ):
        assert line in calmix("check", *files, *more).line


def test_answers_of_own_suite(calmix, tmp_path):
    """They are in `scores.json`, so nothing is missing."""
    record = {"request": {"suite": "mine.yaml"}, "stages": []}
    write_json(tmp_path / "compress.json", sealed(record))
    saved(tmp_path / "scores.json", answered(100, 120), answered(100, 120, kept=97))
    check = ("check", tmp_path, "--keep-at-least", "0.9")
    ended = calmix(*check).ok()
    assert ("code 90 % (3 of 100" in ended.out, "not measured" in ended.err) == (True, False)
    other = answered(9, 9, "chat")  # scored as the card advises; not what was promised
    saved(tmp_path / "abilities.json", other, other, suite="abilities")
    assert "code 90 % (3 of" in calmix(*check).ok().out
    ended = calmix(*check, "-o", tmp_path / "compress.json", "--overwrite")
    assert "compress.json is the input" in ended.line
