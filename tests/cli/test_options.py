"""The command line outside its verbs: help, completion, environment."""

import importlib.metadata
import math
import os
import re
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from calmix.cli.root import VERBS
from calmix.models.blocks import find_blocks, outer_layers
from calmix.options import BUILTIN_METHODS
from calmix.pruning.methods import methods
from calmix.pruning.solvers.ggml_types import TYPES
from calmix.pruning.type_recipes import recipe_types
from tests.cli.test_mistakes import COMMANDS

MAIN = "from calmix.cli import main; main()"


def test_shell_completion(calmix, monkeypatch):
    monkeypatch.setenv("_CALMIX_COMPLETE", "complete_bash")
    for words, offered in {
        "calmix comp": ["compare", "compress"],
        "calmix calibrate sources --d": ["--dimension"],
        "calmix doctor ins": ["inspect"],
        "calmix check --k": ["--keep-at-least"],
    }.items():
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert sorted(calmix().out.split()) == offered


def test_closed_pipe_is_not_a_failed_check(tmp_path):
    """Exit code 1 means that floors are not met."""
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "CALMIX_CACHE": str(tmp_path)}
    env.pop("PYTHONUNBUFFERED", None)  # it would hide what is not flushed
    for words in ([], ["--help"], ["doctor", "assets"], ["doctor", "assets", "--json"]):
        command = [sys.executable, "-m", "calmix", *words]
        ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=env)
        assert (ended.returncode, ended.stderr) == (141, b""), words
    os.close(write)


def test_environment_defaults(calmix, monkeypatch):
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY", "GOMP_SPINCOUNT")
    for option, values in (
        ({}, ("64", "64", "2000")),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9", "GOMP_SPINCOUNT": "7"}, ("9", "64", "7")),
        ({"OMP_WAIT_POLICY": "passive"}, ("64", "64", None)),
    ):
        for name in (*names, "OMP_WAIT_POLICY"):
            monkeypatch.setenv(name, "")  # so that it is restored afterwards
            monkeypatch.delenv(name)
        # A notebook kernel passes on its matplotlib backend, which may not be installed here.
        for name, value in ({"MPLBACKEND": "module://nowhere.backend_inline"} | option).items():
            monkeypatch.setenv(name, value)
        assert calmix("--version").out == f"calmix {importlib.metadata.version('calmix')}\n"
        assert tuple(map(os.environ.get, names)) == values
        assert os.environ["MPLBACKEND"] == "agg"


def test_help_flags(calmix):
    short = ("-h", "help", "help report", "report -h", "doctor help")
    for words in (*short, "--help-all", "report --help-all", "study plan --help-all"):
        assert calmix(*words.split()).ok().out.startswith("Usage: calmix"), words
    assert "[0]" in calmix("calibrate", "draw", "--help").out.partition("--seed")[2][:60]


def test_help_is_short(calmix):
    ended = calmix()
    assert (ended.code, ended.err) == (2, "")
    top = ended.out.partition("Options:")[0]
    assert re.findall(r"^  (\w+) {2,}", top, re.MULTILINE) == list(VERBS)
    assert len(VERBS) == 11
    options = set(re.findall(r"^ .*?(--[\w-]+)", calmix("prune", "--help").out, re.MULTILINE))
    options -= {"--help", "--help-all"}
    assert len(options) == 14
    assert options < set(re.findall(r"--[\w-]+", calmix("prune", "--help-all").out))


def imported(code, *arguments):
    """Run code in a new process, and return it and which of three large packages it imported."""
    code += "\nfinally: print(*sorted({'pydantic', 'rich', 'torch'} & set(sys.modules)))"
    command = [sys.executable, "-c", f"import sys\ntry: {code}", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    return ended, set(ended.stdout.splitlines()[-1].split())


def test_help_imports_no_command():
    ended, packages = imported(MAIN, "--help")
    assert ended.stdout.startswith("Usage: calmix")
    assert packages == set()
    modules = {module for module, _ in VERBS.values()}  # help of a verb needs no torch
    ended, packages = imported(f"import calmix.cli.{', calmix.cli.'.join(modules)}")
    assert (ended.returncode, "torch" in packages) == (0, False), ended


def test_unknown_names_are_refused_before_pytorch_is_imported():
    prune = ("prune", "builtin:smollm2-135m", "-o", "x", "--sparsity", "0.5")
    for name, more in (
        ("source", ("--calibration", "stories:1,nosuch:1")),
        ("method", ("--method", "nosuch,steps=3")),
    ):
        ended, packages = imported(MAIN, *prune, *more)
        assert ended.stderr.startswith(f"error: unknown {name} 'nosuch'"), ended
        assert "torch" not in packages
    own = {name for name, kind in methods().items() if kind.__module__.startswith("calmix.")}
    assert set(BUILTIN_METHODS) == own


def test_help_is_not_truncated(calmix, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    for name, command in COMMANDS.items():
        ended = calmix(*name.split(), "--help").ok()
        assert max(map(len, ended.out.splitlines())) <= 60, name
        page = "".join(ended.out.split())
        for param in command.params:
            if not param.hidden:
                assert "".join(param.help.split()) in page, (name, param.name)
                assert param.is_flag if param.metavar is None else param.metavar in page
        assert "".join(command.help.replace("\b", "").split()) in page, name


def test_sizes_by_type(calmix):
    """The help of `compress` lists the sizes that llama.cpp's recipes give a known model."""
    shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
    config = Qwen2Config(**shape, **heads, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks, outer = find_blocks(model), outer_layers(model)
    matrices = {one.name: one.shape for one in blocks.layers}
    matrices |= {name: weight.shape for name, weight in outer.items()}
    vectors = model.num_parameters() - sum(map(math.prod, matrices.values()))
    listed = re.findall(r"^ +(\w+) +([\d.]+) GB", calmix("compress", "--help").out, re.M)
    assert len(listed) == 8
    for name, size in listed:
        types = recipe_types(name, config, blocks, outer)
        bits = sum(math.prod(matrices[one]) * TYPES[kind].bits for one, kind in types.items())
        assert f"{(bits / 8 + 4 * vectors) / 1e9:.2f}" == size
