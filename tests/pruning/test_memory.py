"""Memory plans: what comes first when memory is short, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from calmix import memory
from calmix.errors import InputError
from calmix.memory import GIB, Plan, parse_memory, plan_pruning
from calmix.models.blocks import find_blocks
from calmix.models.streaming import StreamedModel
from calmix.pruning.gram import Gram
from calmix.pruning.methods import get_method
from tests.pruning.toy import refused
from tests.tiny import save_tiny_model

MIB = 2**20


@pytest.fixture(scope="module")
def source():
    """A block of Llama 3 8B without weights."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 1}
    with torch.device("meta"):
        config = AutoConfig.for_model("llama", **sizes, **heads)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    how = {"dtype": torch.bfloat16, "merges": False, "device": torch.device("cpu")}
    how["outside_bytes"] = lambda head=False: 1002 * MIB
    return {"model": model, "blocks": find_blocks(model), **how}


@pytest.fixture
def plan(source, monkeypatch):
    def made(gib, shape=(128, 2048), method="sparsegpt", hidden=4096, held=448, **how):
        monkeypatch.setattr(memory, "token_bytes", lambda *_: 2 * hidden)
        monkeypatch.setattr(memory, "device_memory", lambda _: (held * MIB, 0, None))
        model = SimpleNamespace(**source | {key: how.pop(key) for key in how.keys() & source})
        most = None if gib is None else int(gib * GIB)
        return plan_pruning(model, shape, get_method(method), budget=most, **how)

    return made


def test_order_of_memory_savings(plan):
    """Hidden states in memory, then overlap and paused micro-batches, and at last rows at once."""
    states = 128 * 2048 * 4096 * 2
    plenty = plan(80)
    assert plenty == Plan(2048, None, True, plenty.needed, plenty.expert_bytes, states)
    assert plenty.needed < 80 * GIB
    some = plan((plenty.needed - states) / 0.95 / GIB)
    assert (some.paused, some.overlap, some.states < states) == (None, False, True)
    wide, narrow = plan(12), plan(6)
    assert 0 < narrow.paused < wide.paused < 128
    assert narrow.micro_tokens == wide.micro_tokens == 2048
    assert narrow.states < 2048 * (3 * 4096 + 2 * 14336) * 2  # what a paused one holds
    assert max(wide.needed / 12, narrow.needed / 6) <= GIB
    assert plan(5, (1024, 256)).micro_tokens == 2048
    short = {"shape": (1024, 256), "hidden": 65536, "method": "wanda"}
    assert plan(8, **short).micro_tokens == 2048
    assert plan(4, **short).micro_tokens < 2048
    least = plan(None)  # of nothing that is free
    assert (least.paused, least.overlap, least.micro_tokens, least.states) == (0, False, 2048, 0)


def test_plan_is_sufficient_and_reported(plan, source, monkeypatch):
    with pytest.raises(InputError, match=r"3\.00 GiB of memory cannot hold one block") as told:
        plan(3)
    needed = float(str(told.value).split(": ")[1].split(" GiB")[0])
    assert plan(needed + 0.01).paused == 0
    refused("GiB of memory cannot hold one block", plan, needed - 0.3)
    assert plan(6, held=300) == plan(6, held=400)  # rounded up
    (block,) = source["blocks"].sizes
    assert plan(80, merges=True).needed - plan(80).needed == block
    assert plan(80, method="wanda").needed < plan(80).needed
    assert plan(80, method="magnitude").states == 0
    assert plan(3, (0, 0), "magnitude", sequential=False).paused is None
    needed = []  # with logits of the tokens that are weighed
    for positions in (2**15, 2**16):
        monkeypatch.setattr(memory, "LOGIT_POSITIONS", positions)
        needed.append(plan(800, (8, 256), backward=True).needed)
    assert needed[1] - needed[0] == 2**15 * 128256 * memory.LOGIT_COPIES * 2
    assert plan(800, (8, 256)).needed < needed[0]


def test_plan_uses_the_widest_block(tmp_path, monkeypatch):
    """Gemma 4's full attention is wider than its sliding one."""
    seen = []
    monkeypatch.setattr(memory, "solver_bytes", lambda _, layers, **how: seen.append(layers) or 0)
    opened = StreamedModel(str(save_tiny_model(tmp_path / "model", "gemma4_text")))
    plan_pruning(opened, (12, 32), get_method("sparsegpt"), budget=2**40)
    shapes = [[layer.shape for layer in opened.blocks.prunables(index)] for index in (0, 1)]
    assert shapes[0] != shapes[1]
    assert seen[:4] == [shapes[0], [], shapes[1], []]


def test_micro_batch_follows_free_memory(tiny_folder, monkeypatch):
    """Beside what libraries take there; what others hold of it does not count as room."""
    model = StreamedModel(str(tiny_folder))
    model.device = torch.device("cuda")

    def plan(free, limit=None):
        monkeypatch.setattr(memory, "device_memory", lambda device: (0, free, 80 * GIB))
        return plan_pruning(model, (400, 32), get_method("sparsegpt"), budget=limit)

    whole = plan(2 * GIB)
    assert whole == Plan(8192, None, True, whole.needed, whole.expert_bytes, 400 * 32 * 32 * 4)
    assert memory.WORKSPACE < whole.needed < memory.WORKSPACE + GIB // 8
    least = (memory.WORKSPACE + 8 * MIB) / memory.FREE_SHARE / 0.95
    assert 32 <= plan(int(least)).micro_tokens < 8192
    refused("cannot hold one block at work", plan, memory.WORKSPACE)
    assert plan(0, 2 * GIB).micro_tokens == 8192


def test_solver_memory_grows():
    for name in ("wanda,refit=2", "wanda,bits=4", "sparsegpt,bits=4", "ria,refit=1,bits=3"):
        plain, method = get_method(name.partition(",")[0]), get_method(name)
        least = method.memory(512, 512)
        assert plain.memory(512, 512) <= least < method.memory(1024, 512)
        assert least + 6 * 512 * 3584 <= method.memory(512, 4096)  # copies of the weights
    # A factorisation in float64 where outputs are few.
    assert get_method("wanda,refit=2").memory(4096, 1) >= Gram.memory(4096) + 8 * 4096**2
    assert get_method("wanda,bits=4").memory(64, 4096) >= 20 * 64 * 4096


def test_memory_amounts():
    texts = ("6GiB", "1.5 gib", "512MB", "7000", "2k", "4Mi")
    amounts = [6 * GIB, 3 * GIB // 2, 512 * 10**6, 7000, 2000, 4 * MIB]
    assert [parse_memory(text) for text in texts] == amounts
    for text in ("", "much", "-1GiB", "6 GiBit", "0", "1e9"):
        refused(r"^--max-memory '", parse_memory, text)
