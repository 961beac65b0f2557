"""Checks of output paths before the work, and writes interrupted by a full disk or power loss."""

import errno
import os
import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

from calmix.errors import DiskError, InputError, disk_errors
from calmix.files import (
    NEVER_REPLACED,
    RESULTS,
    atomic_folder,
    check_output_file,
    check_output_folder,
    hidden,
    read_object,
    write_json,
    write_text,
)
from calmix.manifest import file_hashes
from tests.forks import stopped

MAGNITUDE = ("--method", "magnitude", "--sparsity", 0.5)
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no /proc")


@pytest.fixture
def disk(tmp_path):
    """A small disk mounted in a folder."""
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not let tests mount a small disk")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_mount_point_is_refused(calmix, tiny_folder, disk):
    prune = ("prune", tiny_folder, *MAGNITUDE, "-o")
    for option in ("--resume", "--overwrite"):
        line = calmix(*prune, disk, option).line
        assert "mount point" in line
        assert f"name a folder inside it, such as {disk / 'out'}" in line
    assert names(disk.parent) == ["disk"]
    with pytest.raises(InputError, match="mount point"):
        check_output_folder(disk.parent, overwrite=True)
    calmix(*prune, disk / "out").ok()
    source, target = disk / "host.json", disk / "scores.json"
    source.touch()
    target.touch()
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        ended = calmix("evaluate", tiny_folder, "--overwrite", "-o", target)
        assert "is a mount point" in ended.line
    finally:
        subprocess.run(["umount", target], check=True)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_leftovers_of_dead_processes_are_removed(tmp_path, make):
    def act():
        with hidden(tmp_path / "out", make):
            os.kill(os.getpid(), signal.SIGKILL)

    stopped(act)
    (left,) = names(tmp_path)
    assert not list(file_hashes(tmp_path))  # no file of a result
    with atomic_folder(tmp_path / "out") as mine, hidden(tmp_path / "out") as other:
        assert set(names(tmp_path)) == {mine.name, other.name}
        assert left not in (mine.name, other.name)
    assert names(tmp_path) == ["out"]


@pytest.fixture
def output(tmp_path):
    """A folder with an older result."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    return tmp_path / "out"


def stop_rename(monkeypatch, before, stop):
    """Stop before the old folder goes, or the new one comes."""
    rename = Path.rename

    def renamed(path, to):
        if (".partial-" in path.name) == (before == "the new one comes"):
            stop()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", renamed)


def test_kill_between_renames_restores_the_folder(tmp_path, output, monkeypatch):
    def act():
        stop_rename(monkeypatch, "the new one comes", lambda: os.kill(os.getpid(), signal.SIGKILL))
        with atomic_folder(output):
            pass

    stopped(act)
    assert not output.exists()
    with pytest.raises(InputError, match="is not empty"):
        check_output_folder(output)
    assert names(output) == ["old"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_overlapping_an_input_is_refused(tmp_path, monkeypatch, overwrite):
    model = tmp_path / "models" / "a"
    model.mkdir(parents=True)
    for name in ("calmix.json", "config.json"):  # such a folder --overwrite would replace
        (model / name).touch()
    text = tmp_path / "texts" / "mine.txt"
    text.parent.mkdir()
    text.touch()
    (tmp_path / "link").symlink_to(model)
    inputs = ["a:0.5,b:0.5", None, "x" * 5000, tmp_path / "none", str(tmp_path / "link"), text]
    how = {"inputs": inputs, "overwrite": overwrite}
    for check, output, what in (
        (check_output_folder, "models/a", "is the input"),
        (check_output_folder, "link", "is the input"),
        (check_output_folder, "models", "contains the input"),
        (check_output_folder, "", "contains the input"),
        (check_output_folder, "texts", "contains the input"),
        (check_output_folder, "models/a/out", "is inside the input"),
        (check_output_folder, "link/a/b", "is inside the input"),
        (check_output_file, "texts/mine.txt", "is the input"),
        (check_output_file, "models/a/out.json", "is inside the input"),
    ):
        with pytest.raises(InputError, match=what):
            check(tmp_path / output, **how)
    check_output_folder(tmp_path / "models" / "b", **how)
    check_output_file(tmp_path / "texts" / "scores.json", **how)
    monkeypatch.chdir(model.parent)
    for name in (".", "..", "a/.."):
        with pytest.raises(InputError, match="contains the current folder"):
            check_output_folder(Path(name), overwrite=True)


def test_overwrite_replaces_only_results(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    check_output_folder(mine)
    for name in ("calmix.json", "notes.txt", "thesis.tex", "z"):
        (mine / name).touch()
    with pytest.raises(InputError, match=r"contains calmix.json, notes.txt, thesis.tex and 1 more"):
        check_output_folder(mine, overwrite=True)
    for kind, result in RESULTS.items():
        folder = tmp_path / kind
        folder.mkdir()
        for name in result:
            (folder / name).touch()
        never = pytest.raises(InputError, match="--overwrite replaces only")
        with never if kind in NEVER_REPLACED else nullcontext():
            check_output_folder(folder, overwrite=True)


@needs_proc
def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    for output, message in {
        "/proc/deep/out": "cannot write to /proc/deep/out: cannot create files in /proc",
        tmp_path / ("x" * 300): "cannot write to",
        tmp_path / "circle": "is a file",
    }.items():
        with pytest.raises(InputError, match=message):
            check_output_folder(Path(output))
    check_output_folder(tmp_path / "a" / "b")
    check_output_file(tmp_path / "c" / "d.json")
    assert names(tmp_path) == ["circle"]  # checking creates nothing
    with pytest.raises(InputError, match="not a regular file"):
        check_output_file(Path("/dev/null"), overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        check_output_folder(Path("/dev/null"), overwrite=True)


@needs_proc
def test_files_are_synced_before_rename(tmp_path, monkeypatch):
    steps = []

    def follow(owner, name, told):
        step = getattr(owner, name)

        def followed(one, *more):
            steps.append(told(one, *more))
            return step(one, *more)

        monkeypatch.setattr(owner, name, followed)

    follow(os, "fsync", lambda handle: Path(f"/proc/self/fd/{handle}").readlink().name)
    for name in ("rename", "replace"):
        follow(Path, name, lambda path, to: f"> {to.name}")
    write_text(tmp_path / "a", "a")
    assert steps[0].startswith(".a.")
    assert steps[1:] == ["> a", tmp_path.name]
    steps.clear()
    with atomic_folder(tmp_path / "out") as beside:
        (beside / "inner").mkdir()
        (beside / "inner" / "b").write_bytes(b"b")
    assert {"inner", "b", beside.name} == set(steps[:3])
    assert steps[3:] == ["> out", tmp_path.name]


@pytest.mark.parametrize("before", ["the old one goes", "the new one comes"])
def test_interrupted_rename_keeps_the_old_folder(tmp_path, output, monkeypatch, before):
    def make(path):
        path.touch()
        raise KeyboardInterrupt

    stop_rename(monkeypatch, before, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), atomic_folder(output):
        pass
    with pytest.raises(KeyboardInterrupt), hidden(tmp_path / "file", make):
        pytest.fail("it was not made")
    assert names(output) == ["old"]
    assert names(tmp_path) == ["out"]


def test_non_utf8_names(calmix, tiny_folder, tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    write_json(tmp_path / "a.json", {"name": name})
    assert read_object(tmp_path / "a.json", "") == {"name": name}
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_text("alpha beta gamma " * 200)
    command = ("--model", tiny_folder, "--rows", 2, "--length", 32, "--leakage", "off")
    calmix("calibrate", tmp_path / "texts", *command, "-o", tmp_path / "set").ok()
    assert "intact" in calmix("doctor", "inspect", tmp_path / "set").out


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EDQUOT, "anything"), "no space left"),
        (RuntimeError("I/O error: Plus de place (os error 28)"), "no space left"),
        (RuntimeError(f"I/O error: (os error {errno.EROFS})"), "cannot write to"),
        (OSError(errno.EFBIG, "anything"), "cannot write to .*: File too large"),
        (RuntimeError("No space left between words"), None),
        (OSError("No space left"), None),
    ],
)
def test_disk_full_errors(tmp_path, error, told):
    wanted = pytest.raises(DiskError if told else type(error), match=told)
    with wanted as raised, disk_errors(tmp_path):
        raise error
    assert told or raised.value is error


def test_writing_through_links(tmp_path):
    for name in ("folder", "file"):
        (tmp_path / name).symlink_to(tmp_path / f"real {name}")
    with atomic_folder(tmp_path / "folder") as beside:
        write_text(beside / "a", "a")
    write_text(tmp_path / "file", "b")
    assert (tmp_path / "real folder" / "a").read_text() == "a"
    assert (tmp_path / "real file").read_text() == "b"
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").is_symlink()
