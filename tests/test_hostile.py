"""Hostile files are refused in one line, quickly, and nothing outside is read or written."""

import json
import os
import resource
import shutil
import time

import pytest

from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.request import calibration_set
from calmix.calibration.tokenizer import open_tokenizer
from calmix.cli.common import printable
from calmix.deploy.gguf import export
from calmix.deploy.pack import pack, unpack
from calmix.errors import InputError, ModelError, SourceError
from calmix.files import write_json
from calmix.inspecting import inspect
from calmix.models import chat_template
from calmix.models.folder import check_folder
from calmix.models.opening import resolve_model
from calmix.sources.local import LocalFile
from calmix.study.store import open_store
from tests.tiny import tiny_gguf, tiny_tokenizer


def bomb(levels=9, width=9):
    """Return YAML of a few lines that is `width ** levels` values once aliases are written out."""
    lines = ["a0: &a0 [x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


@pytest.fixture
def model(tmp_path, tiny_folder):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def prune(calmix, model):
    options = ("--method", "magnitude", "--sparsity", 0.5, "-o", model.parent / "out")
    return calmix("prune", model, *options)


TEXTS = (
    *("a: 2001-99-99", "a: !!str [b]", "a: !!int ''", "a: !!bool maybe", "a: !!timestamp x"),
    "a: &a [*a]",
    f"a: {'[' * 600}",
    "a: 1\n" * 200_000,
    'a: "\\ud800"',
    "a: !!python/object/apply:os.system ['touch harm']",
    "<<: &m [{a: 1}, *m]",
    bomb(),
)


def test_hostile_yaml(calmix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb, more, texts in (
        ("study run", ("-o", "store"), TEXTS),
        ("evaluate suite", (), [bomb()]),
        ("calibrate sources --sources", (), [bomb()]),
    ):
        for text in texts:
            (tmp_path / "file.yaml").write_text(text)
            began = time.process_time()
            assert "file.yaml" in calmix(*verb.split(), "./file.yaml", *more).line, text[:80]
            assert time.process_time() - began < 10
    assert [path.name for path in tmp_path.iterdir()] == ["file.yaml"]


def test_hostile_rows(tmp_path):
    for name, line in (("rows.jsonl", "more than 64 MiB"), ("one.txt", "binary")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 30)  # sparse
        with pytest.raises(SourceError, match=line):
            list(LocalFile(type="file", path=tmp_path / name).read())


def test_weight_files_outside_the_folder(calmix, tmp_path, model):
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    before = (tmp_path / "outside.safetensors").read_bytes()
    index = model / "model.safetensors.index.json"
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), 3, "a\0b", ".."):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        assert "which is not a file in its folder" in prune(calmix, model).line
    assert (tmp_path / "outside.safetensors").read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_oversized_configuration_is_refused(calmix, tmp_path, model):
    path = model / "config.json"
    config = json.loads(path.read_text())
    for key in ("num_hidden_layers", "hidden_size", "head_dim", "vocab_size"):
        path.write_text(json.dumps(config | {key: 10**8}))
        assert key in prune(calmix, model).line


def test_model_code_does_not_run(calmix, tmp_path, model):
    harm = tmp_path / "harm"
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(harm)!r}).touch()\n")
    for name, auto in (
        ("config.json", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ):
        value = json.loads((model / name).read_text()) | {"auto_map": auto, "model_type": "evil"}
        (model / name).write_text(json.dumps(value))
    assert prune(calmix, model).line
    assert calmix("calibrate", "python-docs", "-m", model, "-o", tmp_path / "set").code == 2
    assert not harm.exists()


def with_value(raw, key, number, skip=4):
    """Return a GGUF file with another number behind a key, its type and what else is to skip."""
    at, size = raw.index(key.encode()) + len(key) + skip, 8 if number >= 2**32 else 4
    return raw[:at] + number.to_bytes(size, "little") + raw[at + size :]


def test_hostile_gguf(calmix, tmp_path, model):
    """As a model, and as the file that an export is like."""
    whole = tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    array = {"skip": 8}  # the type of the array, and that of its entries
    for content, says in (
        (with_value(whole, "tokenizer.ggml.tokens", 2**40, **array), "counts 1099511627776"),
        (with_value(whole, "tokenizer.ggml.tokens", 2**22, **array), "cut short, or its header"),
        (with_value(whole, "llama.block_count", 10**9), "block_count 1000000000, more than its"),
        (with_value(whole, "llama.attention.head_count", 10**9), "head_count 1000000000, more"),
        (whole.replace(b"general.architecture", b"general.architectura"), "names no architecture"),
        (whole[:4] + whole[4:8][::-1] + whole[8:], "big-endian"),
        (whole[:8] + (2**40).to_bytes(8, "little") + whole[16:], "counts 1099511627776"),
        (with_value(whole, "blk.0.attn_q.weight", 2**60, 4), "more than its bytes can hold"),
        (with_value(whole, "blk.0.attn_q.weight", 10**9, 0), "has 1000000000 dimensions"),
        (with_value(whole, "llama.block_count", 77, 0), "unknown type 77"),
        (whole[:2000], "cut short"),
        (b"GGUF", "cut short"),
        (b"not a model", "not a GGUF file"),
    ):
        (path := tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=rf"bad\.gguf: .*{says}"):
            resolve_model(str(path))
        with pytest.raises(ModelError, match=rf"cannot read .*bad\.gguf: .*{says}"):
            export(str(model), tmp_path / "out.gguf", like=path)
        assert not list(tmp_path.glob("*out.gguf*"))


def sixty_times(body):
    """Return a template that repeats something."""
    start = "{% set ns = namespace(s='x', n=3, a=1, b=1) %}{% for _ in range(60) %}"
    return start + body + "{% endfor %}"


def test_chat_template_limits(calmix, tmp_path, monkeypatch, model):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    monkeypatch.setattr(chat_template, "TEMPLATE_MEMORY", 2**26)
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n' * 9)
    small = ("--rows", 1, "--length", 32, "--leakage", "off")
    for template in (
        "{{ 'a' * 10000000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%9999999999d' % 1 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        sixty_times("{% set ns.s = ns.s ~ ns.s %}"),
        sixty_times("{% set ns.n = ns.n * ns.n %}"),
    ):
        (model / "chat_template.jinja").write_text(template)
        ended = calmix("calibrate", path, "-m", model, "-o", tmp_path / "set", *small)
        assert "chat template" in ended.line, template
        assert not (tmp_path / "set").exists()


def test_a_chat_template_that_takes_no_signals_ends_the_process(monkeypatch, capfd):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    pairs = sixty_times("{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}")
    tokenizer = tiny_tokenizer(pairs + "{{ ns.a == ns.b }}")
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        try:
            chat_template.templated(tokenizer, [{"role": "user", "content": "Hi"}])
        finally:  # also if the signal comes before the comparison
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert "chat_template.py" in capfd.readouterr().err


def store(path, **changes):
    entry = {"id": "t0", "label": "x", "key": ["m", "c", 1], "set": None} | changes
    suite = {"name": "s", "version": 1, "hash": "h", "dimensions": []}
    index = {"kind": "study store", "format": 2, "name": "n", "text": "", "suite": suite}
    write_json(path / "store.json", index | {"trials": [entry]})
    return path


def test_links_in_a_model_folder(calmix, tmp_path, model):
    secret, link, deep = tmp_path / "id_rsa", model / "NOTICE", model / "code/deep/NOTICE"
    secret.write_text("secret")
    deep.parent.mkdir(parents=True)
    outside = secret, "../id_rsa", tmp_path / "nowhere", "/proc/self/environ", tmp_path
    for place, target in [*((link, target) for target in outside), (deep, secret)]:
        place.symlink_to(target)
        assert "NOTICE is a link out of its folder" in prune(calmix, model).line
        with pytest.raises(InputError, match="is a link out of its folder"):
            pack(model, tmp_path / "out")
        place.unlink()
    assert not (tmp_path / "out").exists()
    link.symlink_to("config.json")
    prune(calmix, model).ok()
    assert (tmp_path / "out/NOTICE").read_bytes() == (model / "config.json").read_bytes()

    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for file in (path for path in model.iterdir() if path.is_file()):
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    check_folder(snapshot)
    (blobs / "more").symlink_to(secret)
    (snapshot / "more").symlink_to("../../blobs/more")
    with pytest.raises(InputError, match=r"1/more is a link out of its folder, to .*id_rsa"):
        check_folder(snapshot)
    (snapshot / "more").unlink()
    other = shutil.copytree(snapshot, tmp_path / "models--c--d/snapshots/1", symlinks=True)
    for folder in (shutil.copytree(snapshot, tmp_path / "clone"), other):
        (folder / "NOTICE").unlink(missing_ok=True)
        (folder / "NOTICE").symlink_to(blobs / "config.json")  # of a model of the user's own
        with pytest.raises(InputError, match="is a link out of its folder"):
            check_folder(folder)


def test_links_in_sets_packs_and_text(tmp_path, tiny_folder):
    texts, secret = tmp_path / "texts", tmp_path / "id_rsa"
    texts.mkdir()
    secret.write_text("secret " * 50)
    (texts / "a.txt").write_text("alpha " * 50)
    opened, packed = open_tokenizer(str(tiny_folder)), tmp_path / "pack"
    drawn = calibration_set(str(texts), opened, rows=2, length=8, leakage="off")
    saved = drawn.save(tmp_path / "set")
    pack(tiny_folder, packed)
    for folder in (saved, packed):
        (folder / "link").symlink_to(secret)
        assert "is a link out of its folder" in inspect(folder).problems[0]
    for act in (CalibrationSet.open, lambda _: unpack(packed, tmp_path / "out")):
        with pytest.raises(InputError, match="is a link out of its folder"):
            act(saved)
    (texts / "b.txt").symlink_to(secret)
    reader = LocalFile(type="file", path=texts)
    assert [one.id for one in reader.read()] == ["a.txt/0"]
    assert reader.files()[1] == "links out of the folder (1)"


def test_names_and_links_in_a_store(tmp_path):
    paths = [{"id": "../../x"}, {"id": "/etc"}, {"id": ""}, {"set": "../x"}]
    for changes in (*paths, {"id": 3}, {"key": [[]]}, {"key": ["m"]}):
        with pytest.raises(InputError, match="is damaged"):
            open_store(store(tmp_path / "store", **changes))
    for where in ("trials", "trials/t0", "calibration/c", "dense/d.json"):
        path = store(tmp_path / where.replace("/", "-"))
        link = path / where
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tmp_path)
        with pytest.raises(InputError, match="is a link out of its folder"):
            open_store(path)
        link.unlink()
        (path / "within").mkdir()
        link.symlink_to(path / "within")
        assert open_store(path).index.trials
    (tmp_path / "elsewhere").symlink_to(path)
    assert open_store(tmp_path / "elsewhere").index.trials


def test_control_characters_are_not_printed():
    text = "a\N{NO-BREAK SPACE}b\N{IDEOGRAPHIC SPACE}c\n"
    assert printable(text) == text
    assert printable("\x1b\N{RIGHT-TO-LEFT OVERRIDE}\N{LINE SEPARATOR}\ud800") == "\ufffd" * 4


def test_names_are_not_markup(calmix, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        '"[/bold][red]x":\n  licence: "\\e[2J:smile:"\n  reader: {type: file, path: x}\n'
    )
    ended = calmix("calibrate", "sources", "--sources", path).ok()
    assert "[/bold][red]x" in ended.out
    assert "\x1b[2J" not in ended.out
    assert ":smile:" in ended.out
    assert "\x1b" not in calmix("calibrate", "show", "[/bold]\x1b[2J").line
    (path := tmp_path / "[bold].txt").write_text("alpha " * 400)
    assert "[bold]" in calmix("calibrate", "show", path).ok().out
