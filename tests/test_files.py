"""Checks of output paths before the work, and writes interrupted by a full disk or power loss."""

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from calmix.errors import DiskError, InputError, disk_errors
from calmix.files import (
    NEVER_REPLACED,
    RESULTS,
    atomic_folder,
    check_apart,
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


@pytest.fixture
def synced(monkeypatch):
    """Names of synced files, and `> NAME` for each rename to a name, in order."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not tell which file is synced")
    seen = []
    fsync = os.fsync

    def sync(handle):
        seen.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    for name in ("rename", "replace"):
        step = getattr(Path, name)

        def renamed(path, to, step=step):
            seen.append(f"> {Path(to).name}")
            return step(path, to)

        monkeypatch.setattr(Path, name, renamed)
    return seen


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_mount_point_is_refused(calmix, tiny_folder, disk, option):
    ended = calmix("prune", tiny_folder, *MAGNITUDE, "-o", disk, option)
    assert "mount point" in ended.line
    assert f"name a folder inside it, such as {disk / 'out'}" in ended.line
    assert names(disk.parent) == ["disk"]
    with pytest.raises(InputError, match="mount point"):
        check_output_folder(disk.parent, overwrite=True)
    assert calmix("prune", tiny_folder, *MAGNITUDE, "-o", disk / "out").code == 0
    for name in ("host.json", "scores.json"):
        (disk / name).touch()
    target = disk / "scores.json"
    subprocess.run(["mount", "--bind", str(disk / "host.json"), str(target)], check=True)
    try:
        ended = calmix("evaluate", tiny_folder, "--overwrite", "-o", target)
        assert "is a mount point" in ended.line
    finally:
        subprocess.run(["umount", str(target)], check=True)


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


def test_kill_between_renames_restores_the_folder(tmp_path, output):
    def act():
        rename = Path.rename

        def renamed(path, to):
            if ".partial-" in path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, to)

        Path.rename = renamed
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
    for outputs, what in (
        ((model, tmp_path / "link"), "is the input"),
        ((tmp_path / "models", tmp_path, tmp_path / "texts"), "contains the input"),
        ((model / "out", tmp_path / "link" / "a" / "b"), "is inside the input"),
    ):
        for output in outputs:
            with pytest.raises(InputError, match=what):
                check_output_folder(output, **how)
    for output, what in {text: "is the input", model / "out.json": "is inside the input"}.items():
        with pytest.raises(InputError, match=what):
            check_output_file(output, **how)
    check_output_folder(tmp_path / "models" / "b", **how)
    check_apart(tmp_path, ["builtin:smollm2-135m", tmp_path / "none"])
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
        if kind in NEVER_REPLACED:
            with pytest.raises(InputError, match="--overwrite replaces only"):
                check_output_folder(folder, overwrite=True)
        else:
            check_output_folder(folder, overwrite=True)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a place that takes no files is needed")
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


def test_files_are_synced_before_rename(tmp_path, synced):
    write_text(tmp_path / "a", "a")
    assert synced[0].startswith(".a.")
    assert synced[1:] == ["> a", tmp_path.name]
    synced.clear()
    with atomic_folder(tmp_path / "out") as beside:
        (beside / "inner").mkdir()
        (beside / "inner" / "b").write_bytes(b"b")
    assert {"inner", "b", beside.name} == set(synced[:3])
    assert synced[3:] == ["> out", tmp_path.name]


@pytest.mark.parametrize("before", ["the old one goes", "the new one comes"])
def test_interrupted_rename_keeps_the_old_folder(tmp_path, output, monkeypatch, before):
    rename = Path.rename

    def interrupted(path, to):
        if path == output if before == "the old one goes" else ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, to)

    def make(path):
        path.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
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


class ForeignError(Exception):
    """An exception of a library that is not an OSError."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EDQUOT, "anything"), "no space left"),
        (ForeignError("I/O error: Plus de place (os error 28)"), "no space left"),
        (ForeignError(f"I/O error: (os error {errno.EROFS})"), "cannot write to"),
        (OSError(errno.EFBIG, "anything"), "cannot write to .*: File too large"),
        (ForeignError("No space left between words"), None),
        (OSError("No space left"), None),
    ],
)
def test_disk_full_errors(tmp_path, error, told):
    with (
        pytest.raises(DiskError if told else type(error), match=told) as raised,
        disk_errors(tmp_path),
    ):
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
