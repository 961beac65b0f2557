"""What the command line does before and beside its verbs: options, mistakes, an interrupt."""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from calmix.cli.common import Terminal
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


def test_a_notebooks_backend_of_figures_is_not_the_command_lines(
    calmix: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel of another environment hands its own down to `!calmix`; it need not be here."""
    monkeypatch.setenv("MPLBACKEND", "module://nowhere.backend_inline")
    assert calmix("--version").code == 0
    assert os.environ["MPLBACKEND"] == "agg"


def test_a_file_is_no_terminal_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Terminal(file=io.StringIO())
    assert not console.is_terminal
    console.print("[bold]plain[/]", style="red")
    assert console.file.getvalue() == "[bold]plain[/]\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [("calmix comp", ["compare", "compress"]), ("calmix calibrate sources --d", ["--dimension"])],
)
def test_a_shell_is_told_how_a_line_may_go_on(
    calmix: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, words: str, offered: list[str]
) -> None:
    monkeypatch.setenv("_CALMIX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert sorted(calmix().out.split()) == offered


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prune", "x", "--zzzzz"), "error: No such option: --zzzzz (see calmix prune --help)"),
        (("prune",), "error: Missing argument 'MODEL' (see calmix prune --help)"),
        (("prue", "x"), "error: No such command 'prue'"),
        (
            ("prune", "x", "-o", "y", "--rows", "many"),
            "error: --rows many: must be a valid integer",
        ),
    ],
)
def test_what_the_parser_refuses_is_one_line(
    calmix: Callable[..., Ended], arguments: tuple[str, ...], said: str
) -> None:
    ended = calmix(*arguments)
    assert ended.code == 2
    assert ended.line.startswith(said)


def test_an_interrupt_is_said_and_has_its_own_code(
    calmix: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calmix.cli.doctor.result", stopped)
    ended = calmix("doctor", "assets", "--verify", "--json")
    assert (ended.code, ended.err) == (130, "interrupted\n")


def test_few_kernels_are_kept_where_every_number_of_tokens_has_its_own() -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    code = (
        "import os, sys; from calmix import cli; sys.argv = ['calmix', '--version']; cli.main(); "
        f"print(*(os.environ.get(name) for name in {names}))"
    )
    kept = {key: value for key, value in os.environ.items() if key not in names}
    for given, told in ({}, "64 64"), ({names[0]: "9"}, "9 64"):
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env=kept | given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert ended.stdout.splitlines()[-1] == told


def test_threads_do_not_wait_for_long_where_another_program_has_a_core() -> None:
    """libgomp reads how long when torch is imported, so that has to come later."""
    code = (
        "import os, sys; from calmix import cli; assert 'torch' not in sys.modules; "
        "sys.argv = ['calmix', '--version']; cli.main(); print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    for given, told in (
        ({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None"),
    ):  # fmt: skip
        kept = {
            k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        }
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env=kept | given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert ended.stdout.splitlines()[-1] == told
