"""The work folder: locking, resuming, damage; hidden states in memory or on disk."""

import pytest
import torch

from calmix.errors import DiskError, InputError
from calmix.pruning.work import States, WorkFolder
from tests.pruning.toy import refused

ASKED = {"sparsity": 0.5, "only": [], "versions": {"torch": "2"}, "draw": {"torch": "x"}}
SHARD = "checkpoint/model-00001-of-00002.safetensors"
TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
CPU, BATCH = torch.device("cpu"), 2 * 3 * 4 * 4  # bytes of a micro-batch of two rows
DAMAGED = r"is damaged or missing: start over with --overwrite"


def claimed(output, **how):
    work = WorkFolder(output)
    work.claim(ASKED, **{"resume": False, "overwrite": False} | how)
    return work


@pytest.fixture
def cut(tmp_path):
    """The output of a run that ended with two blocks done."""
    work = claimed(tmp_path / "out")
    work.save(SHARD, TENSORS)
    work.keep(done=2, report={"x": 1})
    work.leave(KeyboardInterrupt(), print)
    return tmp_path / "out"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"kept": {}}', b"\xff", b"[" * 5000])
def test_damaged_record(cut, content):
    (WorkFolder(cut).path / "work.json").write_bytes(content)
    refused(r"work\.json " + DAMAGED, claimed, cut, resume=True)
    work = claimed(cut, overwrite=True)
    assert not work.resumes
    work.abandon()


def test_damaged_file(cut):
    work = claimed(cut, resume=True)
    path, files = work.path / SHARD, work.state["files"]
    work.state["files"] = {}  # of another run
    refused("safetensors " + DAMAGED, work.load, SHARD)
    work.state["files"] = files
    work.load(SHARD)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused("safetensors " + DAMAGED, work.load, SHARD)
    path.unlink()
    refused("safetensors " + DAMAGED, work.load, SHARD)
    work.leave(InputError("damaged"), print)
    assert work.path.exists()  # an earlier run's work stays


def test_errors_leave_nothing_full_disk_keeps_work(tmp_path):
    ends = ((InputError, 1, 0), (DiskError, 1, 1), (DiskError, 0, 0), (RuntimeError, 1, 1))
    for error, done, stays in ends:
        work, said = claimed(tmp_path / "out", overwrite=True), []
        work.keep(done=done)
        work.leave(error("x"), said.append)
        assert bool(said) == work.path.exists() == stays


def test_work_folder_lock(tmp_path):
    work = claimed(tmp_path / "out")
    refused("is at work on", claimed, tmp_path / "out", overwrite=True)
    work.abandon()
    claimed(tmp_path / "out").abandon()
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_are_not_replaced(tmp_path):
    work, mine = claimed(tmp_path / "out"), tmp_path / "other.unfinished"
    for folder in (tmp_path / "out", mine):
        folder.mkdir()
        (folder / "mine").touch()
    refused("was created while calmix was running", work.complete, error=DiskError)
    work.abandon()
    refused("is in the way", claimed, tmp_path / "other", overwrite=True)
    WorkFolder(tmp_path / "other").remove_leftover()
    assert (mine / "mine").exists()


def test_leftovers_of_a_late_kill_are_removed(tmp_path):
    """It was removing its folder under a hidden name; only a finished output stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.lock").touch()
    hidden = tmp_path / ".out.unfinished.partial-0123abcd" / "work.json" / "calibration"
    hidden.mkdir(parents=True)
    WorkFolder(tmp_path / "out").remove_leftover()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finished_work_is_not_resumed(cut):
    """It was killed after the renaming, and then the output was moved away."""
    work = WorkFolder(cut)
    work.remove_leftover()  # none yet
    work.checkpoint.rename(work.path / "gone")
    again = claimed(cut, resume=True)
    assert not again.resumes
    again.abandon()


@pytest.mark.parametrize(("room", "files"), [(0, 3), (BATCH, 2), (2**20, 0)])
def test_states_round_trip(tmp_path, room, files):
    states = States(tmp_path, CPU, room)
    for block, kind in enumerate((torch.float32, torch.float32, torch.bfloat16, torch.float32)):
        values = [torch.randn(rows, 3, 4).to(kind) for rows in (2, 2, 1)]
        for number, value in enumerate(values):
            states[number] = value
            states[number].zero_()  # a copy
        assert all(torch.equal(states[n], value) for n, value in enumerate(values))
        if block < 2:  # those of half the bytes find more room
            assert len(list(tmp_path.iterdir())) == files
