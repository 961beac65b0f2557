"""The smallest model that keeps what is asked for: the walk, its ends, a stop, a refusal."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import calmix as api
from calmix.cli import compress as verb
from calmix.cli import python
from calmix.compression import ladder
from calmix.compression.ladder import RUNGS, walk
from calmix.compression.plan import request, scored
from calmix.compression.running import CANDIDATES, check, check_same
from calmix.errors import InputError, NotKeptError
from calmix.evaluation.evaluate import choose, runnable
from calmix.evaluation.own import EXAMPLES, template
from calmix.evaluation.scores import CapabilityScores, describe
from calmix.manifest import sealed
from calmix.options import Compression
from calmix.report.card import Card
from tests.conftest import Ended
from tests.evaluation.helpers import written

Run = Callable[..., Ended]
Command = Callable[..., tuple[str, ...]]


def asked(model, text, **more):
    return request(
        Compression(model=str(model), calibration=str(text), keep_at_least="math=0.8", **more)
    )


def scores(words, kept=100):
    """Of a hundred sums so many are right, by a command line of `evaluate`."""
    whole = [words[at + 1] for at, word in enumerate(words) if word == "--whole"]
    suite = describe(runnable(choose("abilities", quick=True, whole=whole), False)[0])
    task = written("sums", "math", [1] * kept + [0] * (100 - kept))
    return CapabilityScores("m", f"{kept}", "float32", suite, (replace(task, chance=0.0),))


MEASURED = ladder.plain_distance


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """The distance a walk's begin is chosen by: so far that it is the top, unless a test says."""
    known = {"distance": 100.0}
    monkeypatch.setattr(ladder, "plain_distance", lambda *_: known["distance"])
    return known


def stopping(run, after):
    """Run so many commands, and be interrupted at the next."""
    left = iter(range(after))

    def stopped(words):
        if next(left, None) is None:
            raise KeyboardInterrupt
        run(words)

    return stopped


class Fake:
    """Runs nothing: a candidate of so many bits keeps what it is said to."""

    def __init__(self, out, kept):
        self.out, self.kept = out, kept
        self.run_ = []

    def __call__(self, words):
        self.run_.append(words[0])
        place = Path(words[words.index("-o") + 1])
        if words[0] == "evaluate":
            if "--against" not in words:
                scores(words).save(place)
                return
            told = {"scores": scores(words, self.kept[float(place.parent.name)]).to_dict(),
                    "dense": scores(words).to_dict()}  # fmt: skip
            place.write_text(json.dumps(told), encoding="utf-8")
            return
        place.mkdir(parents=True)
        (place / "made").write_text(str(words), encoding="utf-8")


def test_the_walk_ends_at_the_first_that_fails_and_keeps_the_one_before(
    tiny_folder, text_file, tmp_path
):
    """Even if a smaller one would pass again."""
    out, want = tmp_path / "out", asked(tiny_folder, text_file)
    run = Fake(out, {6.0: 100, 5.0: 98, 4.5: 95, 4.0: 92, 3.2: 84, 2.6: 100})
    said = []
    found = walk(want, out, run, lambda stage, there: said.append((stage.name, there)))
    assert [one.bits for one in found.rungs] == [6, 5, 4.5, 4, 3.2]
    assert (found.bits, found.ended, found.left) == (4, "failed", ())
    assert (out / "model/made").read_text().count("candidates/4/model")
    assert not [*(out / CANDIDATES).glob("*/model"), *(out / CANDIDATES).glob("*/pruned")]
    assert json.loads((out / "abilities.json").read_text())["scores"]["fingerprint"] == "92"
    assert found.why().startswith("3.2 bits fail: math keeps 84.0 % of 100 items by generated ")
    kept = [row["math"].split()[0] for row in found.rows()]
    assert kept == ["100.0", "98.0", "95.0", "92.0", "84.0"]
    assert [row["kept"] for row in found.rows()] == ["yes"] * 4 + ["no"]
    both = ["prune", "evaluate"]
    assert run.run_ == ["calibrate", "evaluate", *both * 4, "prune", "recover", "evaluate"]
    assert said[2] == ("6 bits, quantise", False)
    recovered = next(one for one in ladder.building(want, out, 3.2) if "recover" in one.name)
    assert "--epochs 1 " in recovered.command  # of several that are tried; 2 without a walk
    again = walk(want, out, Fake(out, {}), lambda *_: pytest.fail("nothing is left to do"))
    assert again == found
    with pytest.raises(InputError, match="is of another request"):
        walk(asked(tiny_folder, text_file, seed=1), out, run, lambda *_: None)


def test_a_candidate_passes_if_the_models_of_all_draws_do(tiny_folder, text_file, tmp_path):
    """The second draw's model fails where the first one's does not."""
    out, want = tmp_path / "out", asked(tiny_folder, text_file, seeds=2)
    runs, sets = [], []

    def run(words):
        runs.append(words[0])
        place = Path(words[words.index("-o") + 1])
        if words[0] == "calibrate":
            sets.append((words[words.index("--seed") + 1], place.relative_to(out)))
        kept = 50 if "draw-2/5" in str(place) else 97
        Fake(out, dict.fromkeys(RUNGS, kept))(words)

    found = walk(want, out, run, lambda *_: None)
    assert sets == [("0", Path("calibration")), ("1", Path("candidates/draw-2/calibration"))]
    assert runs == ["calibrate", "calibrate", "evaluate", *["prune", "evaluate"] * 4]
    assert (found.bits, found.ended, len(found.rungs)) == (6, "failed", 2)
    assert "math keeps 50.0 % of 100 items" in found.why()
    assert found.why().endswith("(the worst of 2 draws of text)")
    assert (out / "model/made").read_text().count("draw-2") == 0
    assert not list((out / CANDIDATES).glob("**/model"))
    assert "the models of all 2 draws" in json.loads((out / "check.json").read_text())["lines"][0]
    assert walk(want, out, stop, lambda *_: None) == found


@pytest.mark.parametrize(
    ("kept", "tried", "bits"),
    [
        ({4.0: 95, 3.2: 80}, [4, 3.2], 4),
        ({4.0: 80, 6.0: 99, 5.0: 95, 4.5: 80}, [4, 6, 5, 4.5], 5),
        ({4.0: 80, 6.0: 99, 5.0: 95, 4.5: 95}, [4, 6, 5, 4.5], 4.5),
        ({4.0: 80, 6.0: 80}, [4, 6], None),
        ({4.0: 87, 6.0: 99, 5.0: 50}, [4, 6, 5], 6),  # 87 of 100 prove 0.8 at 95 %, not at 96
        ({4.0: 50, 6.0: 90, 5.0: 89}, [4, 6, 5], 6),  # nor do 89 at 99
    ],
)
def test_a_walk_begins_where_the_distance_says_and_goes_back_to_the_top(
    tiny_folder, text_file, tmp_path, plain, kept, tried, bits
):
    plain["distance"] = 0.035  # 3.2 bits, recovered, are thought to keep 89 of 100, 2.6 bits 82
    out, want = tmp_path / "out", asked(tiny_folder, text_file)
    found = walk(want, out, Fake(out, kept), lambda *_: None)
    assert [one.bits for one in found.rungs] == tried
    assert (found.bits, found.first) == (bits, 4)
    assert found.ended == "failed"
    failed = [one.bits for one in found.rungs if not one.kept]
    assert found.why().startswith(f"{max(failed):g} bits fail")
    assert walk(want, out, stop, lambda *_: None) == found
    assert (out / "model").exists() == (bits is not None)


def test_time_that_ends_before_the_top_is_tried_leaves_no_verdict(
    calmix, command, tiny_folder, text_file, tmp_path, plain, monkeypatch
):
    """The next candidate is thought to take its share of what the last one took."""
    plain["distance"] = 0.025
    out, want = tmp_path / "out", asked(tiny_folder, text_file)
    run = Fake(out, {4.0: 80, 6.0: 99, 5.0: 99, 4.5: 80})
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(ladder, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    found = walk(want, out, run, lambda *_: None, within=45)
    assert (found.bits, found.ended, found.left) == (None, "time", (6, 5, 4.5))
    for module in (verb, python):
        monkeypatch.setattr(module, "make", lambda *_, **__: (found, {}))
    ended = calmix(*command(out, "--keep-at-least", "math=0.8"))
    assert (ended.code, "refused" in ended.out) == (1, False)
    assert ended.out.endswith("stopped: no candidate keeps what is asked yet.\n")
    with pytest.raises(NotKeptError, match=r"keeps math=0\.8 yet: the time given was over"):
        api.compress(str(tiny_folder), out, keep_at_least="math=0.8")
    half = {"4 bits, quantise": 20.0, "6 bits, quantise": 10.0}
    other = tmp_path / "other"
    found = walk(want, other, Fake(other, run.kept), lambda *_: None, 45, half)
    assert ([one.bits for one in found.rungs], found.ended) == ([4, 6], "time")
    run.run_.clear()
    found = walk(want, out, run, lambda *_: None)
    assert (found.bits, found.ended, run.run_) == (5, "failed", ["prune", "evaluate"] * 3)


def test_a_walk_of_a_version_that_began_at_the_top_goes_on(tiny_folder, text_file, tmp_path, plain):
    out, want = tmp_path / "out", asked(tiny_folder, text_file)
    run = Fake(out, dict.fromkeys(RUNGS, 97) | {5.0: 20})
    with pytest.raises(KeyboardInterrupt):
        walk(want, out, stopping(run, 4), lambda *_: None)
    plain["distance"] = 0.025
    path = out / "ladder.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(told | {"first": 4.0}), encoding="utf-8")
    with pytest.raises(InputError, match="is damaged or changed"):
        walk(want, out, run, lambda *_: None)
    old = {key: one for key, one in told.items() if key not in ("first", "self_sha256")}
    path.write_text(json.dumps(sealed(old)), encoding="utf-8")
    found = walk(want, out, run, lambda *_: None)
    assert ([one.bits for one in found.rungs], found.first, found.bits) == ([6, 5], 6, 6)
    told = json.loads(path.read_text(encoding="utf-8")) | {"first": 3.5}
    path.write_text(json.dumps(sealed(told)), encoding="utf-8")
    with pytest.raises(InputError, match="over other candidates"):
        walk(want, out, run, lambda *_: None)


def test_no_model_stays_of_a_candidate_that_is_not_reached(tiny_folder, text_file, tmp_path, plain):
    """It was begun before other floors were asked for."""
    out, want = tmp_path / "out", asked(tiny_folder, text_file)
    plain["distance"] = 0.025
    run = Fake(out, {6.0: 99, 5.0: 20})
    with pytest.raises(KeyboardInterrupt):
        walk(want, out, stopping(run, 3), lambda *_: None)
    assert [path.parent.name for path in out.glob("candidates/*/model")] == ["4"]
    plain["distance"] = 100.0
    assert walk(want, out, run, lambda *_: None).bits == 6
    assert not [*out.glob("candidates/*/model")]


def test_answers_to_a_suite_scored_alone_are_those_that_were_tested(
    tiny_folder, text_file, tmp_path
):
    """Asked once more in other batches, some may differ from what is promised."""
    out, want = tmp_path / "out", asked(tiny_folder, text_file, suite="abilities")
    walk(want, out, Fake(out, {6.0: 93, 5.0: 20}), lambda *_: None)
    assert json.loads((out / "scores.json").read_text())["scores"]["fingerprint"] == "93"
    assert not (out / "abilities.json").exists()


def test_a_walk_begins_at_the_top_where_items_or_time_are_few(
    tiny_folder, text_file, tmp_path, plain
):
    """A hundred right answers prove 0.96 at 95 % alone; candidates below 4 bits are recovered."""
    plain["distance"] = 1e-3
    out, want = tmp_path / "few", asked(tiny_folder, text_file)
    few = want.model_copy(update={"keep_at_least": "math=0.96"})
    found = walk(few, out, Fake(out, {6.0: 100, 5.0: 50}), lambda *_: None)
    assert (found.first, found.bits) == (6, 6)
    out, long = tmp_path / "time", {"3.2 bits, recover by distill": 1e9}
    found = walk(want, out, Fake(out, {6.0: 100, 5.0: 50}), lambda *_: None, 1e6, long)
    assert (found.first, found.bits) == (6, 6)


def test_the_distance_is_that_of_rounded_weights(tiny_folder, monkeypatch):
    ids = {"code": torch.arange(64).reshape(2, 32) % 50}
    monkeypatch.setattr(ladder, "texts", lambda _: ids)
    far = []
    for bits in (3, 4, 8):
        with monkeypatch.context() as patched:
            patched.setattr(ladder, "BITS", bits)
            far.append(MEASURED(str(tiny_folder), "cpu", False))
    assert far[0] > 2 * far[1] > 4 * far[2] > 0
    for bits, recovered, lost in ((4, False, 0.1), (3, False, 0.4), (3, True, 0.24)):
        known = ladder.expected(0.1, bits, recovered)
        assert known == pytest.approx(0.95 * math.exp(-lost))


@pytest.mark.parametrize(
    ("distance", "after", "tried"),
    [(100.0, after, [6, 5, 4.5]) for after in range(7)]
    + [(0.025, after, [4, 6, 5, 4.5]) for after in range(3, 9)],
)
def test_a_stop_goes_on_to_the_same_ladder(
    tiny_folder, text_file, tmp_path, plain, distance, after, tried
):
    """Before the candidate that is begun with, between the two sequences, and within them."""
    plain["distance"] = distance
    out, want = tmp_path / "out", asked(tiny_folder, text_file)
    run = Fake(out, dict.fromkeys(RUNGS, 97) | {4.5: 20, 4.0: 20})
    stopped = stopping(run, after)
    with pytest.raises(KeyboardInterrupt):
        walk(want, out, stopped, lambda *_: None)
    found = walk(want, out, run, lambda *_: None)
    assert [one.bits for one in found.rungs] == tried
    assert (found.bits, found.ended) == (5, "failed")
    assert run.run_ == ["calibrate", "evaluate", *["prune", "evaluate"] * len(tried)]
    assert not [*(out / CANDIDATES).glob("*/model")]


def test_all_may_pass_none_may_pass_and_time_may_end(tiny_folder, text_file, tmp_path, monkeypatch):
    want = asked(tiny_folder, text_file)
    out = tmp_path / "all"
    found = walk(want, out, Fake(out, dict.fromkeys(RUNGS, 95)), lambda *_: None)
    assert (found.bits, found.ended) == (RUNGS[-1], "bottom")
    assert "are the fewest" in found.why()
    out = tmp_path / "none"
    found = walk(want, out, Fake(out, dict.fromkeys(RUNGS, 60)), lambda *_: None)
    assert (found.bits, found.ended, len(found.rungs)) == (None, "failed", 1)
    assert not (out / "model").exists()
    out = tmp_path / "time"
    run = Fake(out, dict.fromkeys(RUNGS, 95))
    with pytest.raises(InputError, match="--within 9 s is too short: the first candidate takes"):
        walk(want, out, run, lambda *_: None, 9, {"6 bits, quantise": 10.0})
    assert not out.exists()
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(ladder, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    found = walk(want, out, run, lambda *_: None, within=55)
    assert (len(found.rungs), found.ended, found.bits) == (2, "time", 5)
    assert "the time given was over" in found.why()
    for name in ("pack", "answers.json", "compress.json"):  # what is made of its model
        (out / name).write_text("of 5 bits")
    run = Fake(out, dict.fromkeys(RUNGS, 95) | {4.0: 20})
    found = walk(want, out, run, lambda *_: None)
    assert run.run_ == ["prune", "evaluate"] * 2
    assert (found.ended, found.bits) == ("failed", 4.5)
    assert (out / "model/made").read_text().count("candidates/4.5/model")
    assert {path.name for path in out.iterdir()} == {
        "abilities.json", "calibration", "candidates", "check.json", "ladder.json", "model"
    }  # fmt: skip


def test_what_cannot_be_proven_is_said_before_anything_is_built(tiny_folder, text_file, tmp_path):
    out, run = tmp_path / "out", Fake(tmp_path / "out", {})
    want = asked(tiny_folder, text_file).model_copy(update={"keep_at_least": "math=0.99"})
    with pytest.raises(InputError, match="needs 299 right answers and has 100"):
        walk(want, out, run, lambda *_: None)
    assert run.run_ == ["calibrate", "evaluate"]
    lower = want.model_copy(update={"keep_at_least": "math=0.9"})  # as the error offers
    run = Fake(out, dict.fromkeys(RUNGS, 80) | {6.0: 100})
    assert walk(lower, out, run, lambda *_: None).bits == 6
    assert run.run_ == ["prune", "evaluate"] * 2
    with pytest.raises(InputError, match="is of another request"):
        walk(want, out, run, lambda *_: None)
    left = out / CANDIDATES / "5/model"
    left.mkdir()  # by a kill
    walk(lower, out, run, lambda *_: None)
    assert not left.exists()
    assert (out / "model").exists()


def test_other_floors_before_a_candidate_are_tested_on_items_of_theirs(
    tiny_folder, text_file, tmp_path
):
    """Neither the dense scores nor those of a first draw are of the items now asked."""
    out, want = tmp_path / "out", asked(tiny_folder, text_file, seeds=2)
    other = want.model_copy(update={"keep_at_least": "math=0.8,chat=0.8"})
    run = Fake(out, dict.fromkeys(RUNGS, 20))
    stopped = stopping(run, 5)
    with pytest.raises(InputError, match="names 'chat', which the scores lack"):
        walk(other, out, stopped, lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        walk(want, out, stopped, lambda *_: None)
    assert run.run_ == ["calibrate", "calibrate", "evaluate", "evaluate", "prune"]
    run.run_.clear()
    with pytest.raises(InputError, match="names 'chat'"):
        walk(other, out, run, lambda *_: None)
    walk(want, out, run, lambda *_: None)
    assert run.run_ == ["evaluate", "evaluate", "evaluate", "prune", "evaluate"]


@pytest.mark.parametrize(
    ("effort", "floors", "chosen"),
    [
        ("standard", "math=0.8", {"quick": True, "whole": ["math"]}),
        ("standard", "0.8,math=0.7", {}),
        ("quick", "math=0.8", {"quick": True, "without": ["gsm8k"]}),
        ("best", "math=0.8", {}),
    ],
)
def test_all_items_of_an_ability_with_a_floor_decide(
    tiny_folder, text_file, effort, floors, chosen
):
    want = asked(tiny_folder, text_file, effort=effort, allow_code_execution=True)
    want = want.model_copy(update={"keep_at_least": floors})
    assert scored(want)["abilities.json"] == choose("abilities", **chosen)
    own = want.model_copy(update={"suite": "abilities"})  # or a user's
    alone = {key: one for key, one in chosen.items() if key != "without"}
    assert scored(own)["scores.json"] == choose("abilities", **alone)


def test_candidates_are_asked_what_the_dense_model_gets_right(tiny_folder, text_file, tmp_path):
    want = asked(tiny_folder, text_file)
    (dense,) = (one for one in ladder.opening(want, tmp_path) if "dense-" in one.leaves)
    assert "--right-only" not in dense.arguments
    *_, candidate = ladder.building(want, tmp_path, 4.0)
    assert "--right-only" in candidate.arguments


def test_a_folder_is_of_one_request(calmix, tiny_folder, text_file, tmp_path):
    """Neither goes on in the other's folder: a walk, and a compression of a given size."""
    out, want = tmp_path / "walk", asked(tiny_folder, text_file)
    with pytest.raises(KeyboardInterrupt):
        walk(want, out, stop, lambda *_: None)
    plain = request(Compression(model=str(tiny_folder), calibration=str(text_file), bits=3))
    with pytest.raises(InputError, match=r"of another request .keep_at_least: math=0\.8, now None"):
        check(plain, out)
    check(ladder.at(want, 4), out)
    for words in (("report", out), ("check", out, "--keep-at-least", "0.9")):
        assert "walk has no model yet: run its calmix compress again" in calmix(*words).line
    shown = calmix("doctor", "inspect", out)
    assert (shown.code, "walk: ladder of candidates" in shown.out) == (0, True)
    other = tmp_path / "plain"
    other.mkdir()
    record = {"request": plain.model_dump(mode="json"), "commands": {}, "versions": {}}
    (other / "compress.json").write_text(json.dumps(sealed(record)), encoding="utf-8")
    with pytest.raises(InputError, match=r"is of another request .bits: 3\.0, now None"):
        walk(want, other, stop, lambda *_: None)


def stop(words):
    raise KeyboardInterrupt


def test_a_first_stage_that_fails_leaves_no_record(tiny_folder, text_file, tmp_path):
    out, want = tmp_path / "out", asked(tiny_folder, text_file)
    run = Fake(out, {})
    for refused, left in (("calibrate", False), ("evaluate", True)):

        def refuse(words, refused=refused):
            if words[0] == refused:
                raise InputError("no such text")
            run(words)

        with pytest.raises(InputError, match="no such text"):
            walk(want, out, refuse, lambda *_: None)
        assert (out / "calibration/made").exists() == out.exists() == left


@pytest.mark.parametrize(("suite", "after"), [("offline", "measure"), ("mine.yaml", "hf upload")])
def test_programs_of_own_rows_are_no_reason_to_measure_abilities(suite, after):
    known = SimpleNamespace(answers=1, not_run=("programs",))
    card = SimpleNamespace(behaved=known, asked={"suite": suite}, measure="measure",
                           out=Path("out"))  # fmt: skip
    assert Card.next.fget(card).startswith(after)


def test_what_own_rows_cannot_prove_is_refused_at_once(calmix, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in template("mine").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = command(tmp_path / "out", "--suite", "mine.yaml", sparse=False)
    for kept, said in (
        ("code=0.9", "names 'code', whose tasks are not run: pass --allow-code-execution"),
        (
            "support=0.9",
            "needs 29 items that the dense model gets right, and --effort quick scores"
            " 3 rows of support: add rows",
        ),
    ):
        for more in ((), ("--dry-run",)):
            assert said in calmix(*words, "--keep-at-least", kept, *more).line
    assert not (tmp_path / "out").exists()


def test_rows_that_change_make_another_request(tiny_folder, text_file, tmp_path):
    for name, text in template("mine").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    given = Compression(model=str(tiny_folder), calibration=str(text_file), bits=3,
                        suite=str(tmp_path / "mine.yaml"))  # fmt: skip
    before = request(given)
    (tmp_path / "mine-choices.jsonl").write_text(json.dumps(EXAMPLES["choices"] | {"answer": 0}))
    with pytest.raises(InputError, match=r"another request .suite_sha256"):
        check_same(request(given), before.model_dump(mode="json"), tmp_path)
    assert request(given.model_copy(update={"suite": "offline"})).suite_sha256 is None


def test_the_verb_builds_tests_and_ends_with_a_card(calmix, command, tmp_path, monkeypatch):
    run = verb._run

    def planted(words):
        """A random model knows nothing: both are given answers that they know better."""
        run(words)
        path = Path(words[words.index("-o") + 1]) if "-o" in words else Path()
        if words[0] != "evaluate" or not path.name.endswith("scores.json"):
            return
        told = json.loads(path.read_text(encoding="utf-8"))
        lost = {"6": 1.05, "5": 1.1, "out": 1.1}.get(path.parent.name, 300.0)
        whole = {"dense": 1.0, "scores": lost} if "dense" in told else {"scores": 1.0}
        for whose, nats in whole.items():
            for task in told.get(whose, told)["tasks"]:
                for row, gold in zip(task["loglikelihoods"], task["gold"], strict=True):
                    row[gold] = -nats
        path.write_text(json.dumps(told), encoding="utf-8")

    monkeypatch.setattr(verb, "_run", planted)
    out, floors = tmp_path / "out", ("--keep-at-least", "code=0.4")
    words = command(out, sparse=False)
    ended = calmix(*words, *floors).ok()
    assert "4.5 bits fail: code keeps" in ended.out.replace("\n", " ")
    assert "card: " in ended.out
    assert "Kept at 95 % confidence, at least: code 40 %" in ended.out
    assert json.loads((out / "compress.json").read_text())["request"]["bits"] == 5
    told = json.loads((out / "check.json").read_text(encoding="utf-8"))
    assert (told["passed"], told["floors"]) == (True, {"code": 0.4})
    calmix("check", out).ok()  # what the folder was made for
    assert json.loads((out / "check.json").read_text(encoding="utf-8"))["floors"] == {"code": 0.4}
    assert "to 5 bits a weight" in (out / "card.html").read_text(encoding="utf-8")
    readme = (out / "model/README.md").read_text(encoding="utf-8")
    for said in ("Kept at 95 % confidence, at least: code 40 %", "tags: [quantized, calmix]",
                 " MB quantised, ", "Once packed, a weight takes 5.0"):  # fmt: skip
        assert said in readme
    before = (out / "ladder.json").read_bytes()
    ended = calmix(*words, *floors, "--within", "1s", "--json")
    assert (ended.code, len(json.loads(ended.out)["ladder"]["rungs"])) == (0, 3)
    assert (out / "ladder.json").read_bytes() == before
    assert "is of another request (keep_at_least" in calmix(*words, floors[0], "code=0.45").line
    monkeypatch.setattr(ladder, "RUNGS", (3.5, 3.0))
    other = [str(tmp_path / "no") if one == str(out) else one for one in words]
    ended = calmix(*other, *floors)
    assert ended.code == 1
    assert "refused: no candidate keeps what is asked" in ended.out
    assert not (tmp_path / "no/model").exists()
    ended = calmix(*other, *floors, "--json")
    assert (ended.code, json.loads(ended.out)["model"]) == (1, None)
    how = {"effort": "quick", "calibration": other[7], "suite": other[9], "shown": False}
    with pytest.raises(NotKeptError, match=r"keeps code=0\.4: 3\.5 bits fail: code keeps"):
        api.compress(other[1], tmp_path / "no", keep_at_least="code=0.4", **how)
    third = [str(tmp_path / "dry") if one == str(out) else one for one in words]
    ended = calmix(*third, *floors, "--dry-run").ok()
    assert "3.5 bits, quantise" in ended.out
    assert "must get right at least: 4 in code" in ended.out
    assert not (tmp_path / "dry").exists()
