"""Where results may go, decided before the work; writing that a full disk or power loss ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from calmix.errors import InputError
from calmix.files import atomic_folder, check_output_folder, write_text

MAGNITUDE = ("--method", "magnitude", "--sparsity", 0.5)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_a_mount_point_is_refused_before_the_work(calmix, tiny_folder, disk, option):
    ended = calmix("prune", tiny_folder, *MAGNITUDE, "-o", disk, option)
    assert ended.code == 2
    assert "mount point" in ended.line
    assert f"name a folder in it, such as {disk / 'out'}" in ended.line
    assert names(disk.parent) == ["disk"]
    assert calmix("prune", tiny_folder, *MAGNITUDE, "-o", disk / "out").code == 0


def test_what_holds_a_mount_point_is_refused(disk):
    with pytest.raises(InputError, match="mount point"):
        check_output_folder(disk.parent, overwrite=True)


@pytest.mark.parametrize("output", [".", "..", "sub/.."])
def test_the_folder_one_is_in_is_refused(calmix, tiny_folder, tmp_path, monkeypatch, output):
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    ended = calmix("prune", tiny_folder, *MAGNITUDE, "-o", output, "--overwrite")
    assert ended.code == 2
    assert "holds the folder you are in" in ended.line
    assert names(tmp_path) == ["here"]
    assert names(here) == ["sub"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_to_the_disk_it_names(calmix, tiny_folder, tmp_path, there):
    large, small = tmp_path / "large", tmp_path / "small"
    small.mkdir()
    if there:
        (large / "place").mkdir(parents=True)
    (small / "out").symlink_to(large / "place")
    ended = calmix("prune", tiny_folder, *MAGNITUDE, "-o", small / "out")
    assert ended.code == 0, ended.err
    assert (small / "out").is_symlink()
    assert (large / "place" / "calmix.json").is_file()
    assert names(small) == ["out"]
    assert names(large) == ["place"]


def test_folders_and_files_written_through_a_link(tmp_path):
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "file").symlink_to(tmp_path / "text")
    with atomic_folder(tmp_path / "folder") as beside:
        write_text(beside / "a", "a")
    write_text(tmp_path / "file", "b")
    assert (tmp_path / "real" / "a").read_text() == "a"
    assert (tmp_path / "text").read_text() == "b"
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").is_symlink()


def test_places_nothing_can_be_written_to(calmix, tiny_folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    for output, told in {
        tmp_path / "file" / "out": "cannot write to",
        tmp_path / ("x" * 300): "cannot write to",
        tmp_path / "circle": "a link in a circle",
    }.items():
        ended = calmix("prune", tiny_folder, *MAGNITUDE, "-o", output)
        assert ended.code == 2, output
        assert told in ended.line
