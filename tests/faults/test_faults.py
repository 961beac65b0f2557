"""Faults, command by command: each ends with the bytes of an undisturbed run, or a clear error.

`make test` tries a kill and two damaged files of one command, `make test-long` dozens of each.
"""

import os
import subprocess

import pytest

from tests.faults.places import CACHED, NAMES, RUN, Place, tree, verbs
from tests.forks import command, run, start, wait

LONG = bool(os.environ.get("CALMIX_LONG"))
pytestmark = [pytest.mark.real, *([pytest.mark.long] if LONG else [])]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    return verbs(tmp_path_factory.mktemp("faults") / "files")


@pytest.fixture(scope="module")
def place(request, chosen, tmp_path_factory):
    return Place(request.param, chosen[request.param], tmp_path_factory.mktemp("place"))


def tries(count, *, now=0, names=NAMES):
    """Repeat a test `count` times for every command; in `make test`, `now` times for one."""
    chosen = [(name, number) for name in names for number in range(count)]
    few = [("prune sparsegpt", number) for number in range(now)]
    return pytest.mark.parametrize(("place", "number"), chosen if LONG else few, indirect=["place"])


@tries(60, now=1)
def test_killed_command_resumes(place, number):
    """Kill a command at a seeded moment, up to three times in a row, then run it again."""
    how = "kill" if number < 50 else "interrupt"
    rng, folder = place.seeded(how, number), place.fresh("tried")
    for _ in range(rng.choice([1, 1, 2, 3])):
        ended = place.run(folder, after=place.moment(rng), how=how)
        assert "Traceback" not in ended.errors
        if ended.code in (0, 2):
            break
    place.judge(folder, place.run(folder))


@tries(50, now=2)
def test_damaged_file_is_reported_or_harmless(place, number):
    """Stop a command, damage one of its files, then run it again or inspect the result.

    `inspect` must report damage to a finished result. With an unfinished one the command stops with
    one line, or starts over if requested.
    """
    rng, folder, verb = place.seeded("damage", number), place.fresh("tried"), place.verb
    place.run(folder, after=None if number % 2 else place.moment(rng))
    files = [folder / name for name, stored in tree(folder, without=RUN).items() if stored]
    if not files:
        return
    damage(rng, files)
    if verb.reading is not None and (folder / "out").exists():
        assert run(command(*verb.reading(folder)), place.log).line
        return
    again = place.run(folder)
    if again.line and verb.anew:
        again = place.run(folder, *verb.anew)
    if not again.line and (again.code or verb.reading is not None):  # else no hash to go by
        place.judge(folder, again)


def damage(rng, files):
    """Cut a file off, flip a bit of it, or swap it with another."""
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    way = rng.choice(["cut", "flip", "swap"])
    if way == "swap" and len(files) > 1:
        other = rng.choice([file for file in files if file != path])
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return
    at = rng.randrange(len(content))
    if way == "cut":
        del content[at:]
    else:
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def both(place, *folders):
    """Run the command in two folders at once; return how each run ended."""
    logs = [place.folder / f"log-{number}" for number in (0, 1)]
    children = [start(place.acts(at), log) for at, log in zip(folders, logs, strict=True)]
    return [wait(child, log) for child, log in zip(children, logs, strict=True)]


@tries(2)
def test_concurrent_writers_one_wins(place, number):
    """The other stops in one line, or finds it."""
    folder = place.fresh("tried")
    ended = both(place, folder, folder)
    assert all(one.line for one in ended if one.code), ended
    place.judge(folder, next(one for one in ended if not one.code))


@tries(2, names=CACHED)
def test_concurrent_cache_use(place, number):
    folders = place.fresh("tried"), place.fresh("other")
    for folder, ended in zip(folders, both(place, *folders), strict=True):
        assert not ended.code, ended
        place.judge(folder, ended)


@pytest.mark.parametrize("share", [None, 0.1, 0.4, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("place", NAMES if LONG else [], indirect=True)
def test_full_or_read_only_disk_is_one_line(place, share):
    """Once there is room, the command succeeds."""
    disk = place.fresh("disk")
    size = sum(path.stat().st_size for path in (place.folder / "clean").rglob("*"))
    room = "ro" if share is None else f"size={max(4096, int(share * size))}"
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", room, "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("this system does not let tests mount a small disk")
    try:
        ended = place.run(disk)
        assert ended.line or not ended.code, ended
        if share is not None:
            more = ["mount", "-o", "remount,size=64m", str(disk)]
            subprocess.run(more, check=True, capture_output=True)
            place.judge(disk, place.run(disk))
    finally:
        subprocess.run(["umount", disk], check=True, capture_output=True)
