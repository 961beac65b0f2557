"""Fixtures: a tiny model, a text, a suite over a made-up archive, and one result."""

import json
import shutil
from pathlib import Path

import pytest

from calmix.cli import app
from calmix.compression.plan import check_request
from calmix.compression.run_stages import stages
from calmix.compression.stages import Stage
from calmix.errors import InputError
from calmix.evaluation.scores import write_scores
from calmix.options import Compression
from calmix.progress import Progress
from tests.conftest import write_text_file
from tests.evaluation.archive import suite_text, use_archive


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a text and a suite that is scored by likelihood."""
    folder = tmp_path_factory.mktemp("place")
    write_text_file(folder / "text.txt")
    lines = [line for line in suite_text().splitlines() if "form: contexts" not in line]
    smoothed = "\n".join(lines).replace("shots: 0}", "shots: 0, score: smoothed}")
    (folder / "made.yaml").write_text(smoothed, encoding="utf-8")  # few items prove a low floor
    return folder


@pytest.fixture(scope="session")
def options(place):
    """The options of every compression."""
    files = {"calibration": str(place / "text.txt"), "suite": str(place / "made.yaml")}
    return {"effort": "quick", **files}


def arguments(options, model, output, *more):
    """Return the arguments of a compression."""
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    return tuple(map(str, ("compress", model, "-o", output, *given, *more)))


@pytest.fixture(scope="session")
def command(options, tiny_folder):
    """Return a function that makes the arguments of a compression, by default to 60 % sparsity."""

    def made(output, *more, sparse=True):
        sized = {"--sparsity", "--pattern", "--bits", "--size", "--keep-at-least"} & {*more}
        target = ("--sparsity", 0.6) if sparse and not sized else ()
        if not target and "--for" not in more:
            target = "--for", "storage" if "--size" in more else "none"
        return arguments(options, tiny_folder, output, *target, *more)

    return made


@pytest.fixture(scope="session")
def asked(tiny_folder):
    """Return a function that checks options and returns the request, by default of safetensors."""
    usual = {"model": str(tiny_folder), "product": "none"}
    return lambda **more: check_request(Compression(**usual | more))


def stopping(run, after):
    """Run `after` stages, and interrupt the next."""
    left = iter(range(after))

    def stopped(*stage):
        if next(left, None) is None:
            raise KeyboardInterrupt
        run(*stage)

    return stopped


def interrupts(calmix, words, stages):
    """Interrupt a compression in its first stage, then in each run one stage later; yield how the
    runs ended."""
    run = Stage.run
    with pytest.MonkeyPatch.context() as patch:
        for done in range(stages):
            patch.setattr(Stage, "run", stopping(run, min(done, 1)))
            yield calmix(*words)


def build(count, request, out):
    """Run the first stages of a request."""
    for stage in stages(request, out)[:count]:
        stage.run(Progress())


def names(folder):
    """Return the names of what is in a folder."""
    return " ".join(sorted(path.name for path in folder.iterdir()))


def read(file):
    """Return what is in a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def pages(out):
    """Return the texts of the card and of the model card."""
    readme = out / ("model" if (out / "model").is_dir() else "") / "README.md"
    return [page.read_text(encoding="utf-8") for page in (out / "card.html", readme)]


def shows(text, *parts):
    """Assert that a text has every part."""
    for part in parts:
        assert part in text


def refused(said, act, *words, **options):
    """Assert that a call is refused."""
    with pytest.raises(InputError, match=said):
        act(*words, **options)


def damage(file):
    """Change the last bit of a file."""
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def prepare(place, patch):
    """Use the made-up archive and a separate cache."""
    patch.setenv("CALMIX_CACHE", str(place / "cache"))
    use_archive(patch)


@pytest.fixture(autouse=True)
def archive(place, monkeypatch):
    prepare(place, monkeypatch)


def finish(place, words):
    """Run a compression, outside of any test."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(place, patch)
        app(list(words), standalone_mode=False)


@pytest.fixture(scope="session")
def compressed(place, command):
    """A finished compression, which tests must not change.

    A random model knows nothing that could be kept: in `scores.json` both have been given answers
    they know better. What was written is `measured.json` beside the folder.
    """
    out = place / "out"
    finish(place, command(out))
    shutil.copy(out / "scores.json", place / "measured.json")
    scores = read(out / "scores.json")
    for whose, nats in (("dense", 1.0), ("scores", 2.5)):
        for task in scores[whose]["tasks"]:
            pairs = zip(task["loglikelihoods"], task["gold"], strict=True)
            for number, (row, gold) in enumerate(pairs):
                row[gold] = -nats - 0.1 * (number % 3)
    write_scores(out / "scores.json", scores)
    finish(place, ("report", str(out)))
    return out


@pytest.fixture
def out(compressed, tmp_path):
    """A copy of the finished compression."""
    return Path(shutil.copytree(compressed, tmp_path / "out"))
