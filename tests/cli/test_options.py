"""What the command line does without a verb."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

from tests.conftest import Ended


def test_the_version_is_that_of_the_package(calmix: Callable[..., Ended]) -> None:
    ended = calmix("--version")
    assert (ended.code, ended.out) == (0, f"calmix {importlib.metadata.version('calmix')}\n")


def test_without_a_verb_help_is_shown_and_the_code_says_it_was_a_mistake(
    calmix: Callable[..., Ended],
) -> None:
    ended = calmix()
    assert ended.code == 2
    assert "calibrate" in ended.out + ended.err
