"""Files made to do harm: refused in one line, quickly, and nothing outside is read or written."""

import json
import shutil
import time

import pytest

from calmix.errors import InputError, ModelError, SourceError
from calmix.files import write_json
from calmix.models.shards import read_header, weight_files
from calmix.sources.readers import LINE, LocalFile
from calmix.study.store import open_store

DEEP = "[" * 20_000


def bomb(levels=9, width=9):
    """Return YAML of a few lines that is `width ** levels` values once aliases are written out."""
    lines = ["a0: &a0 [x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


@pytest.fixture
def model(tmp_path, tiny_folder):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.mark.parametrize(
    "text",
    [bomb(), "a: &a [*a]", f"a: {DEEP[:600]}", "a: 1\n" * 200_000, 'a: "\\ud800"', "a: 2001-99-99",
     "a: !!python/object/apply:os.system ['touch harm']", "<<: &m [{a: 1}, *m]"],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["study", "suite", "sources", "mix"])
def test_yaml_that_grows_nests_or_runs_is_one_line(
    calmix, tmp_path, monkeypatch, model, text, verb
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.yaml").write_text(text)
    command = {
        "study": ("study", "run", "file.yaml", "-o", "store"),
        "suite": ("evaluate", "suite", "./file.yaml"),
        "sources": ("calibrate", "sources", "--sources", "file.yaml"),
        "mix": ("calibrate", "file.yaml", "-m", model, "-o", "set"),
    }[verb]
    began = time.process_time()
    ended = calmix(*command)
    assert "file.yaml" in ended.line
    assert time.process_time() - began < 10
    assert not (tmp_path / "harm").exists()


def test_a_line_of_a_gigabyte_is_refused_after_a_part_of_it(tmp_path):
    for name, line in (("rows.jsonl", "more than 64 MiB"), ("one.txt", "binary")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 30)  # sparse
        with pytest.raises(SourceError, match=line):
            list(LocalFile(type="file", path=tmp_path / name).read())
    assert LINE == 64 << 20


def test_a_row_that_nests_or_is_no_text_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    for line in (DEEP, '{"text": "\\ud800"}', '{"text": 1}', "9" * 5000):
        path.write_text('{"text": "fine"}\n' + line)
        with pytest.raises(SourceError, match="line 2"):
            list(LocalFile(type="file", path=path).read())


def test_weight_files_must_lie_in_the_models_folder(calmix, tmp_path, model):
    (tmp_path / "outside.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    before = (tmp_path / "outside.safetensors").read_bytes()
    index = model / "model.safetensors.index.json"
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), 3, "a\0b", ".."):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(ModelError):
            weight_files(model)
        options = ("--method", "magnitude", "--sparsity", 0.5, "-o", tmp_path / "out")
        ended = calmix("prune", model, *options)
        assert ended.line
    assert (tmp_path / "outside.safetensors").read_bytes() == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [1 << 62, (1 << 62) + 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        [],
    ],
)
def test_headers_that_lie_about_sizes_are_refused(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError):
        read_header(path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "head_dim", "vocab_size"])
def test_a_configuration_larger_than_its_weights_is_refused(calmix, tmp_path, model, key):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 10**8}))
    options = ("--method", "magnitude", "--sparsity", 0.5, "-o", tmp_path / "out")
    ended = calmix("prune", model, *options)
    assert key in ended.line


def test_code_beside_a_model_does_not_run_unasked(calmix, tmp_path, model):
    harm = tmp_path / "harm"
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(harm)!r}).touch()\n")
    for name, where in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        path = model / name
        value = json.loads(path.read_text())
        reference = "evil.Evil" if where == "AutoConfig" else ["evil.Evil", "evil.Evil"]
        auto = {where: reference, "AutoModelForCausalLM": "evil.Evil"}
        path.write_text(json.dumps(value | {"auto_map": auto, "model_type": "evil"}))
    options = ("--method", "magnitude", "--sparsity", 0.5, "-o", tmp_path / "out")
    ended = calmix("prune", model, *options)
    assert ended.line
    assert calmix("calibrate", "python-docs", "-m", model, "-o", tmp_path / "set").code == 2
    assert not harm.exists()


def store(path, **changes):
    entry = {"id": "t0", "label": "x", "key": ["m", "c", 1], "set": None} | changes
    index = {
        "kind": "study store", "format": 2, "name": "n", "text": "", "trials": [entry],
        "suite": {"name": "s", "version": 1, "hash": "h", "dimensions": []},
    }  # fmt: skip
    write_json(path / "store.json", index)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "../../x"},
        {"id": "/etc"},
        {"id": ""},
        {"set": "../x"},
        {"id": 3},
        {"key": [[]]},
        {"key": ["m"]},
    ],
)
def test_names_in_a_store_lead_nowhere_else(tmp_path, changes):
    with pytest.raises(InputError, match="is damaged"):
        open_store(store(tmp_path / "store", **changes))


@pytest.mark.parametrize("where", ["trials", "trials/t0", "calibration/c", "dense/d.json"])
def test_links_out_of_a_store_are_refused_and_links_within_are_not(tmp_path, where):
    path = store(tmp_path / "store")
    outside = tmp_path / "outside"
    outside.mkdir()
    link = path / where
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(InputError, match="is a link out of the store"):
        open_store(path)
    link.unlink()
    (path / "within").mkdir()
    link.symlink_to(path / "within")
    assert open_store(path).entries
    (tmp_path / "elsewhere").symlink_to(path)
    assert open_store(tmp_path / "elsewhere").entries


def test_names_are_printed_as_they_are(calmix, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        '"[/bold][red]x":\n  licence: "\\e[2J:smile:"\n  reader: {type: file, path: x}\n'
    )
    ended = calmix("calibrate", "sources", "--sources", path).ok()
    assert "[/bold][red]x" in ended.out
    assert "\x1b[2J" not in ended.out
    assert ":smile:" in ended.out
    ended = calmix("calibrate", "show", "[/bold]\x1b[2J")
    assert "\x1b" not in ended.line
    folder = tmp_path / "[bold]"
    folder.mkdir()
    (folder / "t.txt").write_text("alpha " * 400)
    ended = calmix("calibrate", "show", folder / "t.txt").ok()
    assert "[bold]" in ended.out
