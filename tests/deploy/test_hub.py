"""Pushing to the hub: which files go up, and what its refusals become. The hub is made up."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from calmix.deploy.pack import pack, unpack
from calmix.models.shards import PACK

ADDRESS = "https://huggingface.co/me/small"
TO = ("--to", "hub", "--repository", "me/small")


class Repository(str):
    """An address as the hub client gives it."""

    repo_id = "me/small"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub that keeps what it is given, or raises `error`."""
    kept = SimpleNamespace(files={}, options={}, private="", error=None)

    class Api:
        def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> Repository:
            if kept.error is not None:
                raise kept.error
            assert exist_ok
            kept.private = private
            return Repository(ADDRESS)

        def upload_folder(self, *, folder_path: Path, **options: Any) -> None:
            kept.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            kept.options = options

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return kept


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model with a card."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "README.md").write_text("# card\n", encoding="utf-8")
    return folder


def test_a_model_goes_up_with_its_card(calmix, hub, model) -> None:
    ended = calmix("export", model, *TO, "--private")
    assert (ended.code, ended.out.strip(), ended.err) == (0, ADDRESS, "")
    assert hub.files == {path.name: path.read_bytes() for path in model.iterdir()}
    assert hub.private is True
    assert hub.options["repo_id"] == "me/small"
    assert PACK in hub.options["delete_patterns"]  # an earlier pack is not left beside it
    (model / "README.md").unlink()
    ended = calmix("export", model, *TO)
    assert (ended.code, "pushed without a card" in ended.err) == (0, True)
    assert hub.private is None  # of a repository that is there, nothing is changed


def test_a_pack_goes_up_and_comes_back_as_the_model(calmix, hub, model, tmp_path) -> None:
    assert calmix("export", model, *TO, "--pack").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert hub.files["README.md"] == b"# card\n"
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in hub.files.items():
        (fetched / name).write_bytes(content)
    unpack(fetched, tmp_path / "back")
    for path in model.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    pack(model, tmp_path / "made")
    assert calmix("export", tmp_path / "made", *TO).code == 0
    assert PACK in hub.files
    ended = calmix("export", tmp_path / "made", *TO, "--pack")
    assert "is a pack already: leave --pack out" in ended.line


def test_what_the_hub_refuses_is_one_line(calmix, hub, model, tmp_path) -> None:
    def status(code: int) -> errors.HfHubHTTPError:
        answer: Any = SimpleNamespace(status_code=code, headers={}, request=None)
        return errors.HfHubHTTPError("no", response=answer)

    for error, words in (
        (errors.HFValidationError("no"), "'me/small' is not a hub id: write owner/name"),
        (status(401), "log in first (hf auth login)"),
        (status(403), "the hub refuses a push to me/small: status 403"),
        (errors.OfflineModeIsEnabled("off"), "cannot be reached for me/small"),
        (ConnectionError("down"), "(ConnectionError): nothing was pushed"),
    ):
        hub.error = error
        ended = calmix("export", model, *TO)
        assert (ended.code, words in ended.line) == (2, True), ended.err
    (tmp_path / "empty").mkdir()
    line = calmix("export", tmp_path / "empty", *TO).line
    assert line.endswith("has no config.json: it is not a model folder")
    assert not hub.files
