"""Running a study: results, shared work, reruns and errors."""

import errno
import os
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.request import calibration_set
from calmix.errors import InputError
from calmix.evaluation.evaluate import evaluate, load_scores
from calmix.evaluation.scores import write_scores
from calmix.files import write_json
from calmix.models.opening import open_model
from calmix.pruning.engine import prune
from calmix.pruning.patterns import Unstructured
from calmix.pruning.requests import recover_request
from calmix.pruning.solvers.grids import read_grids
from calmix.pruning.work import WorkFolder
from calmix.recovery.checkpoint import recover
from calmix.study import bench as bench_module
from calmix.study import running as running_module
from calmix.study.running import chosen_trials
from calmix.study.spec import load_study
from calmix.study.store import SILENCE, open_store, read_results
from calmix.study.trials import planned_trials
from tests import forks
from tests.compress.conftest import names, read, refused
from tests.forks import command, start, stopped, wait
from tests.study.conftest import outcomes, run, states
from tests.tiny import load_weights, save_tiny_model


@pytest.fixture
def store(ran, tmp_path):
    return Path(shutil.copytree(ran.store, tmp_path / "store"))


def forgotten(store, *numbers):
    """Remove trials of a store, and return it opened."""
    opened_store = open_store(store)
    for number in numbers:
        shutil.rmtree(opened_store.trial(opened_store.index.trials[number].id))
    return opened_store


def leased(store, trial, pid=1, host="elsewhere"):
    """Write the lock file of a trial as a process of another machine would."""
    file = store / "locks" / f"{trial}.lock"
    lease = f"mode=lease\ntoken=t\nduration={SILENCE}\n"
    file.write_text(f"filelock/2\npid={pid}\nhost={host}\n{lease}")
    return file


def test_trial_matches_its_steps_by_hand(ran):
    results, study = read_results(ran.store), load_study(ran.path)
    counts = (len(ran.labels), results.planned, results.failed)
    assert (results.name, *counts) == ("tiny", 6, 6, 0)
    # The fifth of six: earlier trials must not affect the model.
    trial = results.trials[4]
    assert (trial.calibration, trial.method, trial.pattern) == ("mix", "sparsegpt", "60%")
    opened = open_model(study.file.models["tiny"].name)
    dense = evaluate(opened, study.suite)
    text = study.file.calibrations["mix"].written
    drawn = calibration_set(text, opened, rows=6, length=32, leakage="off")
    prune(opened.model, drawn.ids, method="sparsegpt", pattern=Unstructured(0.6))
    retained = evaluate(opened, study.suite).retention(dense)
    assert (trial.total.value, trial.total.low) == (retained.total.value, retained.total.low)
    assert [task["pruned"] for task in trial.tasks] == [task.pruned for task in retained.tasks]
    assert trial.sparsity == pytest.approx(0.6, abs=1e-3)
    assert trial.seconds["total"] > 0
    # Shared work is done once: the scores of the dense model are cached.
    cached = [call for call in ran.scores if call.kwargs.get("cache")]
    assert (len(cached), len(ran.scores), len(ran.sets)) == (1, 1 + 6, 3)
    for folder in (ran.store / "calibration").iterdir():
        assert CalibrationSet.open(folder).rows == 6
    assert not list((ran.store / "locks").iterdir())
    assert not (ran.store / "pruned").exists()


def kill_in_second_trial():
    """End the process after the first block of the second trial."""
    keep, done = WorkFolder.keep, []

    def kept(self, **facts):
        keep(self, **facts)
        done.append(facts.get("done"))
        if done.count(1) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    WorkFolder.keep = kept


def test_two_runners_finish_a_killed_study(ran, tmp_path):
    store = tmp_path / "store"
    study = ("study", "run", ran.path, "-o", store, "--skip", "letters*")
    stopped(kill_in_second_trial, *study)
    assert states(store).count("finished") == 1
    (left,) = (store / "pruned").glob("*.unfinished")
    assert read(left / "work.json")["kept"]["done"] == 1
    logs = [tmp_path / name for name in "ab"]
    children = [start(command(*study), log) for log in logs]
    for ended in map(wait, children, logs):
        assert ended.code == 0, ended.errors
    assert forks.run(command(*study), tmp_path / "log").code == 0
    assert states(store) == ["pending"] * 2 + ["finished"] * 4
    assert outcomes(store) == outcomes(ran.store)[2:]
    assert not list((store / "locks").iterdir())
    assert not [f for f in (store / "trials").iterdir() if f.name.startswith(".")]


def test_lock_ends_with_its_process(ran, store, monkeypatch):
    opened_store = forgotten(store, 4)
    pending = opened_store.index.trials[4].id
    with opened_store.lock(pending):
        assert opened_store.runner(pending) == f"pid {os.getpid()} on {socket.gethostname()}"
        assert (opened_store.state(pending), run(ran.path, store).ran) == ("running", [])
    for pid, host, age in ((2**22 + 1, socket.gethostname(), 0), (1, "elsewhere", SILENCE + 1)):
        file = leased(store, pending, pid, host)
        os.utime(file, (time.time() - age,) * 2)
        assert opened_store.state(pending) == "pending"
        assert not list((store / "locks").iterdir())
    file, now = leased(store, pending), time.time()
    with monkeypatch.context() as patch:  # as on a machine whose clock is ahead
        patch.setattr("calmix.study.store.time.time", lambda: now + 2 * SILENCE)
        assert opened_store.runner(pending) == "pid 1 on elsewhere"
    os.utime(file, (now - SILENCE - 1,) * 2)
    refused = Mock(side_effect=PermissionError(errno.EACCES, "refused"))
    monkeypatch.setattr(Path, "unlink", refused)  # as in another user's store
    assert opened_store.state(pending) == "pending"


def test_the_slower_of_two_runners_leaves_the_lock_of_the_faster(ran, store, monkeypatch):
    opened_store, taken, ended = forgotten(store, 4), threading.Event(), threading.Event()
    pending = opened_store.index.trials[4].id
    os.utime(file := leased(store, pending), (time.time() - SILENCE - 1,) * 2)

    def faster():
        with opened_store.lock(pending):
            taken.set()
            ended.wait(9)

    def slow(path, **how):
        if path == file and not runner.ident:
            runner.start()
            taken.wait(0.3)
        unlink(path, **how)

    runner, unlink = threading.Thread(target=faster), Path.unlink
    monkeypatch.setattr(Path, "unlink", slow)
    opened_store.lock(pending)
    assert taken.wait(9)
    assert file.exists()
    ended.set()
    runner.join()


def test_result_of_another_process_counts_once(tiny_study, tmp_path):
    def execute(bench, todo, stage, note):
        for trial in todo:
            yield trial, ("elsewhere", "pid 1 on elsewhere")
        stage(todo[0], "", 0, 1)

    seen = run(tiny_study(), tmp_path / "store", execute=execute)
    assert seen.shown == ["trial 6 of 6: letters sparsegpt 60% seed 0"]


def test_failing_trial_does_not_stop_others(ran, store, monkeypatch):
    real = bench_module.prune_checkpoint

    def broken(name, output, request, **how):
        if request.method == "wanda":
            raise RuntimeError("out of\nmemory")
        return real(name, output, request, **how)

    monkeypatch.setattr(bench_module, "prune_checkpoint", broken)
    failed = forgotten(store, 1, 2).index.trials[1].id
    seen = run(ran.path, store)
    assert (set(seen.errors.values()), len(seen.ran)) == ({"RuntimeError: out of"}, 2)
    assert "Traceback" in read(store / "trials" / failed / "error.json")["traceback"]
    alone = [trial.total for trial in read_results(ran.store).trials if trial.id != failed]
    assert [trial.total for trial in read_results(store).trials] == alone

    def late(bench, todo, stage, note):  # as if the trials had failed elsewhere since it began
        for trial in todo:
            yield trial, running_module.run_one(bench, trial, stage, note, 0.0)

    assert run(ran.path, store, execute=late, retry_failed=True).errors == {}
    room = Mock(return_value=0)
    monkeypatch.setattr(running_module, "checkpoint_bytes", room)
    assert run(ran.path, store).ran == []
    assert room.call_args.args[1] == []  # a failed trial that is not run again needs none


def test_error_does_not_replace_a_result(ran, store, monkeypatch):
    """One was suspended, and another took its trial over."""
    real = bench_module.Bench.run

    def late(*of):
        real(*of)  # as if by the other
        raise RuntimeError("connection lost")

    monkeypatch.setattr(bench_module.Bench, "run", late)
    trial = store / "trials" / forgotten(store, 5).index.trials[5].id
    assert run(ran.path, store).errors == {}
    assert ((trial / "result.json").exists(), (trial / "error.json").exists()) == (True, False)


def test_trial_waits_for_a_stale_lock(ran, store, monkeypatch):
    ended, done = [], SimpleNamespace(summary="")
    monkeypatch.setattr(bench_module.Bench, "ready", lambda *_: None)
    monkeypatch.setattr(bench_module.Bench, "run", lambda *_: done)

    def execute(bench, todo, stage, note):
        file = leased(store, todo[0].id)
        ended.append(running_module.run_one(bench, todo[0], stage, note))
        threading.Timer(0.2, file.unlink).start()
        ended.append(running_module.run_one(bench, todo[0], stage, note, wait=60))
        yield todo[0], ended[-1]

    forgotten(store, 5)
    run(ran.path, store, execute=execute)
    assert ended == [("elsewhere", "pid 1 on elsewhere"), ("finished", done)]


def test_changed_model_gives_no_result(tiny_study, tiny_folder, tmp_path):
    model = tmp_path / "model"
    path = tiny_study((str(tiny_folder), str(shutil.copytree(tiny_folder, model))))
    change = Mock(side_effect=lambda text: text[:4] == "1/2 " and save_tiny_model(model, seed=5))
    (said,) = run(path, tmp_path / "store", change, only=["letters"]).errors.values()
    assert said == f"the files of {model} have changed: run the study again"


def test_interrupt_leaves_a_consistent_store(ran, store, monkeypatch):
    monkeypatch.setattr(bench_module, "evaluate", Mock(side_effect=KeyboardInterrupt))
    forgotten(store, 3, 4)
    with pytest.raises(KeyboardInterrupt):
        run(ran.path, store)
    assert states(store) == ["finished"] * 3 + ["pending"] * 2 + ["finished"]
    assert len(list((store / "trials").iterdir())) == 4


def test_changed_study_keeps_old_trials_and_adds_no_declaration(ran, store):
    for old, new, line in (
        ("sparsegpt: [0.6]", "sparsegpt: [0.5]", "3 finished trials (first: 'letters spars"),
        ("/code.jsonl\n", "/sums.jsonl\n", "2 finished trials (first: 'code sparsegpt 60% s"),
    ):
        seen = run(ran.write((old, new), name="other.yaml"), store, only=["letters w*"])
        assert seen.notes[0].startswith(f"the study has changed: {line}")
        assert run(ran.path, store).ran == []
    index = read(store / "store.json")
    del index["declarations"]  # as of an older version
    write_json(store / "store.json", index)
    assert run(ran.path, store).ran == []
    later = ran.write(more="margin: 5\n", name="later.yaml")
    refused("what study tiny declared has changed", run, later, store)


def test_declaration_is_fixed_by_the_first_result(tiny_study, tmp_path):
    store, line = tmp_path / "store", "  - {name: x, of: {calibration: mix}, over: {calibration: "
    first = f"margin: 5\ncomparisons:\n{line}code}}}}\n"
    path, index = tiny_study(more=first), lambda: open_store(store).index
    broken = Mock(side_effect=lambda _, todo, *__: iter([(one, ("failed", "x")) for one in todo]))
    run(tiny_study(more=first.replace("5", "3"), name="early.yaml"), store, execute=broken)
    seen = run(path, store, only=["mix wanda*"])  # nothing had finished
    (declared,) = index().declarations
    values = "study tiny declares 1 comparison by measure primary, margin 5 points (hash {})"
    assert values.format(declared.hash[:12]) in run(path, tmp_path / "new", execute=broken).notes
    assert (seen.ran, declared.study, declared.intact) == (["mix wanda 2:4 seed 0"], "tiny", True)
    assert declared.since <= read(next(store.glob("trials/*/result.json")))["run"]["finished"]
    for old, new, what in (
        ("margin: 5", "margin: 3", "margin: 5.0, now 3.0"),
        (first, "", "margin: 5.0, now None"),
        ("code}", "letters}", "comparisons.x.over.calibration: code, now letters"),
        ("margin: 5", "margin: 5\nexclude: {quiz: too hard}", "exclude.quiz: None, now too hard"),
        ("margin: 5", "margin: 5\nseeds: [0, 1]", "pairs.x: "),
    ):
        other = tiny_study(more=first.replace(old, new), name="other.yaml")
        with pytest.raises(InputError, match=re.escape(f"declared has changed ({what}")) as error:
            run(other, store)
        remedy = f": name {other} anew, with amends: {{study: tiny, reason: ...}}"
        assert (str(error.value).endswith(remedy), index().declarations) == (True, (declared,))
    # What no comparison is about may change.
    run(tiny_study(("letters:", "others:"), more=first, name="more.yaml"), store, execute=broken)
    assert index().declarations == (declared,)
    amends = "margin: 3\namends: {study: %s, reason: three points matter}\ncomparisons:"
    for name in ("tiny", "more"):
        text = first.replace("margin: 5\ncomparisons:", amends % "none")
        with pytest.raises(InputError, match="what study tiny declared has changed"):
            run(tiny_study(("name: tiny", f"name: {name}"), more=text, name="a.yaml"), store)
    text = first.replace("margin: 5\ncomparisons:", amends % "tiny")
    run(tiny_study(("name: tiny", "name: more"), more=text, name="a.yaml"), store, execute=broken)
    before, now = index().declarations
    assert (before, now.study, now.amends.reason) == (declared, "more", "three points matter")
    refused("what study more declared has changed", run, path, store)
    assert read_results(store).declarations == (before, now)


def test_renamed_sets_and_copied_trials(ran, store, tmp_path, monkeypatch):
    second = tmp_path / "second"
    before = {trial.id: trial.total for trial in read_results(store).trials}
    monkeypatch.setattr(bench_module, "calibration_set", None)  # no set is made again
    forgotten(store, 2)
    for part in ("trials", "calibration", "dense"):
        shutil.copytree(store / part, second / part)
    changes = ("name: tiny", "name: more"), ("  code: ", "  python: "), ("{tiny: ", "{small: ")
    other = ran.write(*changes, ("  mix: ", "  code: "), name="more.yaml")
    seen = run(other, second, only=["letters", "python*"])
    assert seen.ran == ["python sparsegpt 60% seed 0"]
    assert not any("scoring the dense model" in text for text in seen.shown)
    results = read_results(second)
    assert set(results.dense) == {trial.model for trial in results.trials} == {"small"}
    sets = " ".join(trial.calibration for trial in results.trials)
    assert sets == "letters letters python python code code"
    assert {trial.id: trial.total for trial in results.trials} == before
    # The same in one store, even if another set has the old name now.
    assert run(other, store).ran == seen.ran


def test_invalid_stores(ran, store, tmp_path):
    (tmp_path / "file").write_text("x")
    refused("is a file", run, ran.path, tmp_path / "file")
    refused("there is no study store", read_results, tmp_path / "none")
    supported = "but this calmix reads format 2"
    for name, text, says in (
        ("file", "x", "not empty and is not a study"),
        ("store.json", '{"kind": "study store", "format": 99}', f"has format 99, {supported}"),
        ("store.json", '{"kind": "other"}', "of another kind"),
        ("store.json", "{", "damaged"),
    ):
        (tmp_path / name).write_text(text)
        refused(says, run, ran.path, tmp_path)
    forms = ("chat template", "worked examples")  # of two trials
    for file, form in zip(sorted(store.glob("trials/*/scores.json")), forms, strict=False):
        write_scores(file, read(file) | {"form": form})
    refused("the template has changed: run the study in another", read_results, store)


def test_only_and_skip_patterns(ran):
    trials = planned_trials(load_study(ran.path))
    chosen = chosen_trials(trials, ["l*", "mix wanda*"], ["letters w*"])
    labels = ["letters sparsegpt 60% seed 0", "mix wanda 2:4 seed 0"]
    assert [trial.label for trial in chosen] == labels
    assert chosen_trials(trials, ["tiny"], []) == trials  # the model
    for only, skip, said in (
        (["letter"], [], r"no trial matches 'letter': did you mean letters"),
        (["mix"], ["m*"], "leave no trial"),
    ):
        refused(said, chosen_trials, trials, only, skip)


def test_duplicate_trials_are_refused(tiny_study, tmp_path):
    path = tiny_study(("  mix:", f"  twin: {tmp_path}/texts/code.jsonl\n  mix:"))
    with pytest.raises(InputError, match=r"'code sparsegpt.*' and 'twin sparsegpt.*' are the same"):
        run(path, tmp_path / "store")


def test_recovery_matches_its_steps(tiny_study, tmp_path):
    """Of levels, from kept checkpoints whose scores are those of the trials."""
    methods = ('{sparsegpt: [0.6], wanda: ["2:4"]}', "{ecq: [3 bits], magnitude: 0.5}")
    more = "embeddings: 4\nrecovery: [none, 'distill,epochs=1,lr=0.03']\nkeep_checkpoints: true\n"
    path = tiny_study(methods, ("rows: 6", "rows: 16"), more=more)
    seen = run(path, tmp_path / "store", only=["mix*", "magnitude*"])
    plain, last = "ecq + embeddings 4", "ecq + embeddings 4 + distill,epochs=1,lr=0.03"
    labels = [f"mix {recipe} 3 bits seed 0" for recipe in (plain, last)]
    assert (seen.errors, seen.ran) == ({}, ["magnitude + embeddings 4 50%", *labels])
    store, study = open_store(tmp_path / "store"), load_study(path)
    entries = {entry.label: entry for entry in store.index.trials}
    trial = store.result(entries[labels[1]]).trial
    assert trial.method == last
    assert trial.seconds["recover"] > 0
    _, plain, last = folders = [store.trial(entries[label].id) for label in seen.ran]
    files = "checkpoint pruning.json recovery.json request.json result.json scores.json"
    assert names(last) == files
    # Trials that differ only in recovery share one pruning run, timings included.
    assert (plain / "pruning.json").read_bytes() == (last / "pruning.json").read_bytes()
    for folder in folders:
        checkpoint = folder / "checkpoint"
        again = evaluate(str(checkpoint), study.suite, baselines=False)
        assert again.tasks == load_scores(folder / "scores.json").tasks
        grids, weights = read_grids(checkpoint), load_weights(checkpoint)
        for name, grid in grids.items():
            levels = grid.values(grid.levels(weights[name])).to(weights[name].dtype)
            assert torch.equal(levels, weights[name])
    (drawn,) = (tmp_path / "store" / "calibration").iterdir()
    request = recover_request(calibration=str(drawn), epochs=1, lr=0.03)
    model = study.file.models["tiny"].name
    report = recover(str(plain / "checkpoint"), model, request, tmp_path / "recovered")
    data = read(last / "recovery.json")
    assert (data["before"], data["after"]) == (report.before, report.after)
    assert report.after < report.before
    inside = [weights[name].numel() for name in grids if ".layers." in name]
    assert data["quantised"] == sum(inside) > 0
    assert len(grids) > len(inside)
    recovered = load_weights(tmp_path / "recovered")
    assert all(torch.equal(recovered[name], weight) for name, weight in weights.items())
