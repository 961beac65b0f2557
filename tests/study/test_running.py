"""Running a study: results, shared work, reruns and errors."""

import errno
import json
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.resolving import resolve
from calmix.errors import InputError
from calmix.evaluation.evaluate import evaluate, load_scores
from calmix.evaluation.scores import write_scores
from calmix.models.opening import open_model
from calmix.pruning.engine import prune
from calmix.pruning.patterns import Unstructured
from calmix.pruning.solvers.grids import read_grids
from calmix.recovery.checkpoint import recover
from calmix.specs import recover_request
from calmix.study import bench as bench_module
from calmix.study import running as running_module
from calmix.study.running import chosen_trials, run_study
from calmix.study.spec import load_study
from calmix.study.store import SILENCE, open_store, read_results
from calmix.study.trials import plan
from tests.study.conftest import outcomes, writer
from tests.tiny import load_weights, save_tiny_model


def run(path, store, heard=lambda text: None, **options):
    """Run a study; return the labels of trials run, errors by label, and all messages."""
    notes, shown = [], []
    run_study(
        load_study(path),
        store,
        note=lambda text: (heard(text), notes.append(text)),
        show=lambda text, share: shown.append(text),
        **options,
    )
    ended = [one.groups() for text in notes if (one := re.match(r"\d+/\d+ (.*?): (.*)", text))]
    failed = {
        label: said.removeprefix("failed: ") for label, said in ended if said.startswith("failed: ")
    }
    return SimpleNamespace(
        notes=notes, shown=shown, ran=[label for label, _ in ended], errors=failed
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_folder):
    """A study, its store after a run, its messages, and the sets and models that were made."""
    folder, created = tmp_path_factory.mktemp("ran"), []
    with pytest.MonkeyPatch.context() as patch:
        path = writer(folder, tiny_folder, patch)()

        def counted(act, name):
            def run(*rest, **options):
                created.append(name if options.get("cache") else act.__name__)
                return act(*rest, **options)

            return run

        patch.setattr(bench_module, "resolve", counted(resolve, ""))
        patch.setattr(bench_module, "evaluate", counted(evaluate, "dense"))
        first = run(path, folder / "store", only=["mix wanda*"])
        seen = run(path, folder / "store")
        yield path, folder / "store", first.ran + seen.ran, created


def test_trial_matches_its_steps_by_hand(ran):
    path, store, labels, result = ran
    assert len(labels) == 6
    results, study = read_results(store), load_study(path)
    assert (results.name, results.planned, results.failed) == ("tiny", 6, ())
    # The fifth of six: earlier trials must not affect the model.
    trial = results.trials[4]
    assert (trial.calibration, trial.method, trial.pattern) == ("mix", "sparsegpt", "60%")
    opened = open_model(study.file.models["tiny"].name)
    dense = evaluate(opened, study.suite)
    text = study.file.calibrations["mix"].written
    drawn = resolve(text, opened, rows=6, length=32, leakage="off")
    prune(opened.model, drawn.ids, method="sparsegpt", pattern=Unstructured(0.6))
    retained = evaluate(opened, study.suite).retention(dense)
    assert (trial.total.value, trial.total.low) == (retained.total.value, retained.total.low)
    assert [task["pruned"] for task in trial.tasks] == [task.pruned for task in retained.tasks]
    assert trial.sparsity == pytest.approx(0.6, abs=1e-3)
    assert trial.seconds["total"] > 0
    # Shared work is done once.
    assert [result.count(one) for one in ("dense", "evaluate", "resolve")] == [1, 6, 3]
    for folder in (store / "calibration").iterdir():
        assert CalibrationSet.open(folder).rows == 6
    assert not list((store / "locks").iterdir())


def test_lock_ends_with_its_process(tiny_study, tmp_path, monkeypatch):
    path, store = tiny_study(), tmp_path / "store"
    run(path, store, only=["mix wanda*"])
    opened_store = open_store(store)
    pending = next(e.id for e in opened_store.index.trials if e.label == "mix sparsegpt 60% seed 0")
    with opened_store.lock(pending):
        assert opened_store.runner(pending) == f"pid {os.getpid()} on {socket.gethostname()}"
        assert opened_store.state(pending) == "running"
        assert run(path, store, only=["mix*"]).ran == []
    file = store / "locks" / f"{pending}.lock"
    lease = f"mode=lease\ntoken=t\nduration={SILENCE}\n"
    for pid, host, age in ((2**22 + 1, socket.gethostname(), 0), (1, "elsewhere", SILENCE + 1)):
        file.write_text(f"filelock/2\npid={pid}\nhost={host}\n{lease}")
        os.utime(file, (time.time() - age,) * 2)
        assert opened_store.state(pending) == "pending"
        assert not file.exists()
    file.write_text(f"filelock/2\npid=1\nhost=elsewhere\n{lease}")
    assert opened_store.runner(pending) == "pid 1 on elsewhere"
    with monkeypatch.context() as patch:  # as on a machine whose clock is ahead
        now = time.time()
        patch.setattr("calmix.study.store.time.time", lambda: now + 2 * SILENCE)
        assert opened_store.runner(pending) == "pid 1 on elsewhere"
    os.utime(file, (time.time() - SILENCE - 1,) * 2)

    def refused(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "refused")

    monkeypatch.setattr(Path, "unlink", refused)  # as in another user's store
    assert opened_store.state(pending) == "pending"


def test_result_of_another_process_counts_once(tiny_study, tmp_path):
    def execute(bench, todo, stage, note):
        for trial in todo:
            yield trial, ("elsewhere", "pid 1 on elsewhere")
        stage(todo[0], "", 0, 1)

    seen = run(tiny_study(), tmp_path / "store", execute=execute)
    assert seen.shown == ["trial 6 of 6: letters sparsegpt 60% seed 0"]


def test_failing_trial_does_not_stop_others(ran, tmp_path, monkeypatch):
    real = bench_module.prune

    def broken(model, ids, **options):
        report = real(model, ids, **options)
        if options["method"] == "wanda":
            raise RuntimeError("out of\nmemory")
        return report

    monkeypatch.setattr(bench_module, "prune", broken)
    store = tmp_path / "store"
    assert set(run(ran[0], store).errors.values()) == {"RuntimeError: out of"}
    failed = open_store(store).index.trials[1].id
    error = json.loads((store / "trials" / failed / "error.json").read_text())
    assert "Traceback" in error["traceback"]
    # The failure left a pruned model, yet the next trial started from the dense one.
    alone = [t.total for t in read_results(ran[1]).trials if t.method == "sparsegpt"]
    assert [t.total for t in read_results(store).trials] == alone
    # A trial that failed in another process since this one began is not run again.

    def late(bench, todo, stage, note):
        for trial in todo:
            yield trial, running_module.run_one(bench, trial, stage, note, 0.0)

    assert run(ran[0], store, execute=late, retry_failed=True).errors == {}
    # A failed trial that is not run again needs no room.
    requests = []
    monkeypatch.setattr(
        running_module, "checkpoint_bytes", lambda _, trials: requests.append(len(trials)) or 0
    )
    assert run(ran[0], store).ran == []
    assert requests == [0]


def test_error_does_not_replace_a_result(tiny_study, tmp_path, monkeypatch):
    """One was suspended, and another took its trial over."""
    path, store, real = tiny_study(), tmp_path / "store", bench_module.Bench.run

    def late(*of):
        real(*of)  # as if by the other
        raise RuntimeError("connection lost")

    monkeypatch.setattr(bench_module.Bench, "run", late)
    assert run(path, store, only=["mix wanda*"]).errors == {}
    (folder,) = (store / "trials").iterdir()
    names = {file.name for file in folder.iterdir()}
    assert ("result.json" in names, "error.json" in names) == (True, False)


def test_trial_waits_for_a_stale_lock(tiny_study, tmp_path):
    path, store, ended = tiny_study(), tmp_path / "store", []

    def execute(bench, todo, stage, note):
        file = store / "locks" / f"{todo[0].id}.lock"
        file.parent.mkdir(parents=True)
        file.write_text(f"filelock/2\npid=1\nhost=lost\nmode=lease\ntoken=t\nduration={SILENCE}\n")
        ended.append(running_module.run_one(bench, todo[0], stage, note))
        threading.Timer(0.2, file.unlink).start()
        ended.append(running_module.run_one(bench, todo[0], stage, note, wait=60))
        yield todo[0], ended[-1]

    run(path, store, only=["mix wanda*"], execute=execute)
    assert [one for one, _ in ended] == ["elsewhere", "finished"]


def test_changed_model_gives_no_result(tiny_study, tiny_folder, tmp_path):
    model = tmp_path / "model"
    path = tiny_study((str(tiny_folder), str(shutil.copytree(tiny_folder, model))))
    seen = run(path, tmp_path / "store", lambda text: save_tiny_model(model, seed=5))
    line = f"the files of {model} have changed: run the study again"
    assert list(seen.errors.values()) == [line] * 5


def test_interrupt_leaves_a_consistent_store(ran, tmp_path, monkeypatch):
    path, whole, store = ran[0], ran[1], tmp_path / "store"
    calls = []
    real = bench_module.evaluate

    def evaluate(*rest, **options):
        calls.append(1)
        if len(calls) == 4:  # after the dense model and two trials, during the third
            raise KeyboardInterrupt
        return real(*rest, **options)

    monkeypatch.setattr(bench_module, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        run(path, store)
    states = [open_store(store).state(e.id) for e in open_store(store).index.trials]
    assert states == ["finished"] * 2 + ["pending"] * 4
    assert len(list((store / "trials").iterdir())) == 2
    run(path, store)
    assert outcomes(store) == outcomes(whole)


def test_changed_study_keeps_old_trials(tiny_study, tmp_path):
    store = tmp_path / "store"
    run(tiny_study(), store, only=["code"])
    for number, (old, new, left, ran) in enumerate(
        [
            ("sparsegpt: [0.6]", "sparsegpt: [0.5]", 1, 1),
            ("/code.jsonl\n", "/sums.jsonl\n", 2, 0),
        ]
    ):
        seen = run(tiny_study((old, new), name=f"{number}.yaml"), store, only=["mix wanda*"])
        line = f"the study has changed: {left} finished trials (first: 'code sparsegpt 60% seed 0')"
        assert seen.notes[0].startswith(line)
        assert len(seen.ran) == ran
        assert run(tiny_study(), store, only=["code"]).ran == []


def test_declaration_is_fixed_by_the_first_result(tiny_study, tmp_path):
    store, line = tmp_path / "store", "  - {name: x, of: {calibration: mix}, over: {calibration: "
    first = f"margin: 5\ncomparisons:\n{line}code}}}}\n"
    path, index = tiny_study(more=first), lambda: open_store(store).index

    def broken(bench, todo, stage, note):
        return iter([(trial, ("failed", "x")) for trial in todo])

    run(tiny_study(more=first.replace("5", "3"), name="early.yaml"), store, execute=broken)
    seen = run(path, store, only=["mix wanda*"])  # nothing had finished
    (declared,) = index().declarations
    values = "study tiny declares 1 comparison by measure primary, margin 5 points (hash {})"
    assert values.format(declared.hash[:12]) in run(path, tmp_path / "new", execute=broken).notes
    assert seen.ran == ["mix wanda 2:4 seed 0"]
    assert (declared.study, declared.intact) == ("tiny", True)
    trial = json.loads(next(store.glob("trials/*/result.json")).read_text(encoding="utf-8"))
    assert declared.since <= trial["run"]["finished"]
    changes = (
        ("margin: 5", "margin: 3", "margin: 5.0, now 3.0"),
        (first, "", "margin: 5.0, now None"),
        (
            "calibration: code}",
            "calibration: letters}",
            "comparisons.x.over.calibration: code, now letters",
        ),
        ("margin: 5", "margin: 5\nexclude: {quiz: too hard}", "exclude.quiz: None, now too hard"),
        ("margin: 5", "margin: 5\nseeds: [0, 1]", "pairs.x: "),
    )
    for old, new, what in changes:
        other = tiny_study(more=first.replace(old, new), name="other.yaml")
        with pytest.raises(InputError, match=re.escape(f"declared has changed ({what}")) as error:
            run(other, store)
        assert str(error.value).endswith(
            f": name {other} anew, with amends: {{study: tiny, reason: ...}}"
        )
        assert index().declarations == (declared,)
    # What no comparison is about may change.
    run(tiny_study(("letters:", "others:"), more=first, name="more.yaml"), store, execute=broken)
    assert index().declarations == (declared,)
    amends = "margin: 3\namends: {study: %s, reason: three points matter}\ncomparisons:"
    for name, wrong in (("tiny", "none"), ("more", "none")):
        text = first.replace("margin: 5\ncomparisons:", amends % wrong)
        with pytest.raises(InputError, match="what study tiny declared has changed"):
            run(tiny_study(("name: tiny", f"name: {name}"), more=text, name="a.yaml"), store)
    text = first.replace("margin: 5\ncomparisons:", amends % "tiny")
    run(tiny_study(("name: tiny", "name: more"), more=text, name="a.yaml"), store, only=["mix*"])
    before, now = index().declarations
    assert (before, now.study, now.amends.reason) == (declared, "more", "three points matter")
    with pytest.raises(InputError, match="what study more declared has changed"):
        run(path, store)
    assert read_results(store).declarations == (before, now)


def test_declaration_cannot_be_added_later(tiny_study, tmp_path):
    store = tmp_path / "store"
    run(tiny_study(), store, only=["mix wanda*"])
    index = json.loads((store / "store.json").read_text(encoding="utf-8"))
    del index["declarations"]  # as of an older version
    (store / "store.json").write_text(json.dumps(index), encoding="utf-8")
    run(tiny_study(), store, only=["mix wanda*"])
    with pytest.raises(InputError, match="what study tiny declared has changed"):
        run(tiny_study(more="margin: 5\n", name="later.yaml"), store)


def test_renamed_sets_and_copied_trials(tiny_study, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    run(tiny_study(), first, only=["letters", "code*wanda*"])
    before = {trial.id: trial.total for trial in read_results(first).trials}
    monkeypatch.setattr(bench_module, "resolve", None)  # no set is made again
    for part in ("trials", "calibration", "dense"):
        shutil.copytree(first / part, second / part)
    changes = ("name: tiny", "name: more"), ("  code: ", "  python: "), ("{tiny: ", "{small: ")
    other = tiny_study(*changes, ("  mix: ", "  code: "), name="more.yaml")
    seen = run(other, second, only=["letters", "python*"])
    assert seen.ran == ["python sparsegpt 60% seed 0"]
    assert not any("scoring the dense model" in text for text in seen.shown)
    results = read_results(second)
    assert set(results.dense) == {trial.model for trial in results.trials} == {"small"}
    assert [trial.calibration for trial in results.trials] == ["letters"] * 2 + ["python"] * 2
    assert {t.id: t.total for t in results.trials if t.id in before} == before
    # The same in one store, even if another set has the old name now.
    assert run(other, first, only=["letters", "python*"]).ran == seen.ran


def test_invalid_stores(ran, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("x")
    for place, says in (
        (other, "not empty and is not a study store"),
        (other / "file", "is a file"),
    ):
        with pytest.raises(InputError, match=says):
            run(ran[0], place)
    with pytest.raises(InputError, match="there is no study store"):
        read_results(tmp_path / "none")
    for text, says in (
        ('{"kind": "study store", "format": 99}', "has format 99, but this calmix reads format 2"),
        ('{"kind": "other"}', "of another kind"),
        ("{", "damaged"),
    ):
        (other / "store.json").write_text(text)
        with pytest.raises(InputError, match=says):
            run(ran[0], other)


def test_trials_with_two_prompt_forms_are_refused(ran, tmp_path):
    store = shutil.copytree(ran[1], tmp_path / "store")
    forms = ("chat template", "worked examples")
    for file, form in zip(sorted(store.glob("trials/*/scores.json")), forms, strict=False):
        write_scores(file, json.loads(file.read_text()) | {"form": form})
    with pytest.raises(InputError, match="the template has changed: run the study in another"):
        read_results(store)


def test_only_and_skip_patterns(ran):
    trials = plan(load_study(ran[0]))
    chosen = chosen_trials(trials, ["l*", "mix wanda*"], ["letters w*"])
    labels = ["letters sparsegpt 60% seed 0", "mix wanda 2:4 seed 0"]
    assert [trial.label for trial in chosen] == labels
    with pytest.raises(InputError, match=r"no trial matches 'letter': did you mean letters"):
        chosen_trials(trials, ["letter"], [])
    with pytest.raises(InputError, match="leave no trial"):
        chosen_trials(trials, ["mix"], ["m*"])
    (model,) = {trial.model for trial in trials}
    assert chosen_trials(trials, [model], []) == trials


def test_duplicate_trials_are_refused(tiny_study, tmp_path):
    path = tiny_study(("  mix:", f"  twin: {tmp_path}/texts/code.jsonl\n  mix:"))
    with pytest.raises(InputError, match=r"'code sparsegpt.*' and 'twin sparsegpt.*' are the same"):
        run(path, tmp_path / "store")


def test_kept_checkpoints_and_recovered_levels(tiny_study, tmp_path):
    path = tiny_study(
        ('{sparsegpt: [0.6], wanda: ["2:4"]}', "{ecq: [3 bits]}"),
        ("rows: 6", "rows: 16"),
        more="embeddings: 4\nrecovery: [none, 'distill,epochs=1']\nkeep_checkpoints: true\n"
        "right_only: true\n",
    )
    seen = run(path, tmp_path / "store", only=["mix*"])
    assert (seen.errors, len(seen.ran)) == ({}, 2)
    assert "embeddings 4" in seen.ran[0]
    checkpoints = [*(tmp_path / "store" / "trials").glob("*/checkpoint")]
    data = [json.loads((one / "calmix.json").read_text(encoding="utf-8")) for one in checkpoints]
    result = next(one for one in data if one["kind"] == "pruned checkpoint")
    assert (result["request"]["method"], result["request"]["pattern"]) == ("ecq", "3 bits")
    assert len(checkpoints) == 2
    for result in checkpoints:
        again = evaluate(str(result), load_study(path).suite, floors=False)
        stored = load_scores(result.parent / "scores.json")
        assert (again.tasks, again.right_only, stored.right_only) == (stored.tasks, False, True)
        grids, weights = read_grids(result), load_weights(result)
        for name, grid in grids.items():
            levels = grid.values(grid.levels(weights[name])).to(weights[name].dtype)
            assert torch.equal(levels, weights[name])
    (data,) = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in (tmp_path / "store" / "trials").glob("*/recovery.json")
    ]
    inside = [name for name in grids if ".layers." in name]
    assert data["quantised"] == sum(weights[name].numel() for name in inside) > 0
    assert len(grids) > len(inside)


def test_recovery_matches_its_steps(tiny_study, tmp_path):
    path = tiny_study(
        ('{sparsegpt: [0.6], wanda: ["2:4"]}', "{wanda: [0.6], magnitude: 0.5}"),
        ("rows: 6", "rows: 16"),
        more="recovery: [none, 'distill,epochs=1,lr=0.001']\n",
    )
    seen = run(path, tmp_path / "store", only=["mix*", "magnitude*"])
    assert seen.errors == {}
    assert seen.ran == [
        "magnitude 50%",
        "mix wanda 60% seed 0",
        "mix wanda + distill,epochs=1 60% seed 0",
    ]
    store = open_store(tmp_path / "store")
    entries = {entry.label: entry for entry in store.index.trials}
    folders = {label: store.trial(entry.id) for label, entry in entries.items()}
    last = folders[seen.ran[-1]]
    request = json.loads((last / "request.json").read_text(encoding="utf-8"))
    assert request["recovery"] == {"method": "distill", "epochs": 1, "lr": 1e-3, "batch": 4}
    assert sorted(p.name for p in last.iterdir()) == [
        "pruning.json",
        "recovery.json",
        "request.json",
        "result.json",
        "scores.json",
    ]
    trial = store.result(entries[seen.ran[-1]]).trial
    assert (trial.method, trial.seconds["recover"] > 0) == ("wanda + distill,epochs=1", True)
    # Trials that differ only in recovery share one pruning run, timings included.
    reports = [(folders[label] / "pruning.json").read_bytes() for label in seen.ran[1:]]
    assert reports[0] == reports[1]

    study = load_study(path)
    name, text = study.file.models["tiny"].name, study.file.calibrations["mix"].written
    opened = open_model(name)
    dense = evaluate(opened, study.suite)
    drawn_set = resolve(text, opened, rows=16, length=32, leakage="off")
    drawn_set.save(tmp_path / "set")
    prune(opened.model, drawn_set.ids, method="wanda", pattern=0.6)
    opened.model.save_pretrained(tmp_path / "pruned")
    opened.tokenizer.save_pretrained(tmp_path / "pruned")
    prune_args = recover_request(calibration=str(tmp_path / "set"), epochs=1)
    report = recover(str(tmp_path / "pruned"), name, prune_args, tmp_path / "recovered")
    reports = json.loads((last / "recovery.json").read_text(encoding="utf-8"))
    assert (reports["before"], reports["after"]) == (report.before, report.after)
    assert report.after < report.before
    retained = evaluate(open_model(str(tmp_path / "recovered")), study.suite).retention(dense)
    assert trial.total.value == retained.total.value  # the recovery before it had no effect on it
