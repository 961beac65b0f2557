"""The cost model: its formulas on sizes done by hand, and what a plan makes of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calmix.errors import InputError
from calmix.models import find_blocks
from calmix.pruning.gram import Gram, triangle
from calmix.study import cost, planning
from calmix.study.cost import Machine, Sizes, on_paper, sizes_of
from calmix.study.planning import estimate, sizes_of_model, suite_work
from calmix.study.probe import probe
from calmix.study.spec import Model, Shape, load_study, parse_study
from calmix.study.trials import plan
from tests.tiny import tiny_config, tiny_model

STUDIES = Path(__file__).parents[2] / "studies"
LLAMA_8B = Sizes(32, 4096, 14336, 4096, 1024, 128256, head=128)
# A machine of round figures: a second is a FLOP, a byte, or a step.
UNIT = Machine("unit", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1e12)


def test_sizes_of_the_8b_model() -> None:
    assert LLAMA_8B.block_weights == 6_979_321_856
    assert LLAMA_8B.weights == pytest.approx(8.03e9, rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "olmo2"])
def test_sizes_read_from_a_configuration_count_the_blocks_weights(kind: str) -> None:
    model = tiny_model(kind)
    found = find_blocks(model)
    weights = sum(
        layer.module.weight.numel() for i in range(len(found)) for layer in found.prunables(i)
    )
    assert sizes_of(tiny_config(kind).to_dict()).block_weights == weights


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_sizes_of_mixtures_count_every_expert_and_those_a_token_sees(kind: str) -> None:
    found = find_blocks(tiny_model(kind))
    layers = [layer for i in range(len(found)) for layer in found.prunables(i)]
    sizes = sizes_of(tiny_config(kind).to_dict())
    assert sizes.block_weights == sum(layer.view().numel() for layer in layers)
    # Two of four experts see a token.
    shares = [1.0 if layer.expert is None else sizes.chosen / 4 for layer in layers]
    assert sizes.active_weights == sum(
        share * layer.view().numel() for share, layer in zip(shares, layers, strict=True)
    )


def test_the_published_figures_of_mixtures() -> None:
    config = {
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_hidden_layers": 48, "intermediate_size": 6144, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "mlp_only_layers": [],
    }  # fmt: skip
    qwen = sizes_of(config)
    assert qwen.weights == pytest.approx(30.5e9, rel=0.01)
    outside = qwen.weights - qwen.block_weights
    assert qwen.active_weights + outside == pytest.approx(3.3e9, rel=0.02)
    dense = replace(qwen, experts=0, inner=8 * 768)
    seconds = [cost.prune_seconds(one, 8, 64, "wanda", "sequential", UNIT) for one in (qwen, dense)]
    # Both maps that read the experts' first input run twice more.
    more = 2 * 2 * 8 * 64 * 48 * 8 * 2 * 2048 * 768
    assert seconds[0]["forward"] - seconds[1]["forward"] == pytest.approx(more)
    assert cost.recover_memory(qwen, 512, "blocks", 4) < cost.recover_memory(
        qwen, 512, "distill", 4
    )


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(KeyError, match="hidden_size"):
        sizes_of({"vocab_size": 3})


def test_the_published_figures_of_the_8b_model() -> None:
    """LLaMA-3.1-8B at 128 x 2048 tokens: the figures of the formulas, worked out elsewhere."""
    tokens = 128 * 2048
    gpu = Machine("unit", *[1.0] * 6, 0.0, float("inf"), float("inf"), 1e12, "cuda")
    seconds = cost.prune_seconds(LLAMA_8B, 128, 2048, "sparsegpt", "sequential", gpu)
    assert seconds["statistic"] == pytest.approx(0.61 * 4.3e15, rel=0.02)
    assert 2 * LLAMA_8B.block_weights * tokens == pytest.approx(3.7e15, rel=0.02)
    assert seconds["factor"] == pytest.approx(1.4e14 / 2, rel=0.05)  # triangles, as the Gram matrix
    # Corrections, and two output energies, each from half of a symmetric matrix.
    assert 3 * 4.8e13 < seconds["solve"] < 3.3 * 4.8e13
    steps = sum(width for width, _ in LLAMA_8B.inputs) * LLAMA_8B.blocks
    assert steps == pytest.approx(0.85e6, rel=0.02)


def test_the_triangle_is_what_the_engine_computes() -> None:
    assert triangle(512, 256) == 0.75
    assert triangle(576, 256) == pytest.approx((256 * (576 + 320) + 64 * 64) / 576**2)
    assert triangle(576, 1024) == 1
    for width, share in ((200, 0.75), (1024, triangle(1024, 256)), (1024, 0.625)):
        assert Gram.work(width, 3, cpu=True).gram == 2 * 3 * width**2 * share
        assert Gram.work(width, 3, cpu=False).gram == 2 * 3 * width**2
    assert Gram.work(8192, 3, cpu=False).gram == 2 * 3 * 8192**2 * 0.625


def test_costs_follow_the_request() -> None:
    small = Sizes(2, 64, 128, 64, 32, 1000)

    def total(rows: int, method: str, propagation: str = "sequential") -> float:
        return sum(cost.prune_seconds(small, rows, 32, method, propagation, UNIT).values())

    forward = cost.forward_seconds(small, 4 * 32, 32, UNIT)
    assert total(4, "sparsegpt", "block") - total(4, "sparsegpt") == pytest.approx(forward)
    assert total(4, "magnitude") < total(4, "wanda") < total(4, "sparsegpt") < total(8, "sparsegpt")
    assert total(4, "magnitude") == total(8, "magnitude")
    memory = [cost.peak_memory(small, rows, 32, "sparsegpt", "cpu") for rows in (400, 800)]
    assert memory[0] < memory[1]
    work = cost.SuiteWork(10, 1000, 0, True)
    kept = cost.disk_bytes(small, work, True) - cost.disk_bytes(small, work, False)
    assert kept == small.weights * 2
    written = cost.SuiteWork(10, 1000, 10, True)
    assert cost.suite_seconds(small, written, UNIT) > cost.suite_seconds(small, work, UNIT)
    far = [cost.distance_seconds(small, tokens, UNIT) for tokens in (0, 100, 200)]
    assert far[0] == 0
    assert far[2] == pytest.approx(2 * far[1])
    sets = {s: cost.set_seconds(small, 4, 32, s, UNIT) for s in ("mix", "self-cal", "self-written")}
    assert "generate" not in sets["mix"]
    assert cost.set_seconds(small, 4, 32, "mix", UNIT, measured=False) == {}
    alone = sets["self-cal"]["generate"]  # 128 tokens
    assert sets["self-written"]["generate"] == pytest.approx(alone * 1.2)


def test_what_an_accelerator_cannot_hold_is_refused_before_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = load_study(STUDIES / "paper-llama31-8b.yaml")
    trials, cuda = plan(study), torch.device("cuda")
    needed = [
        cost.peak_memory(
            sizes_of_model(trial.model, study.models[trial.model]),
            *((0, 0) if trial.draw is None else (trial.draw.rows, trial.draw.length)),
            trial.method, "cuda",
        )
        for trial in trials
    ]  # fmt: skip
    there: list[int | None] = []
    monkeypatch.setattr(planning, "device_memory", lambda device: (0, 0, there[0]))
    for there[:] in ([None], [int(max(needed))]):
        planning.check_memory(study, trials, cuda)
    there[:] = [int(max(needed)) - 1]
    with pytest.raises(InputError, match=r"needs [\d.]+ GB, and there are [\d.]+ GB: fewer or"):
        planning.check_memory(study, trials, cuda)
    planning.check_memory(study, trials, cuda, share=1.1)
    # A device keeps one block's dense weights, a CPU those of all.
    both = [cost.peak_memory(LLAMA_8B, 1, 1, "magnitude", kind) for kind in ("cpu", "cuda")]
    assert both[0] - both[1] > LLAMA_8B.block_weights


def test_a_probe_gives_rates() -> None:
    found = probe(Sizes(2, 64, 128, 64, 32, 320, value_bytes=4), "cpu")
    assert found.device == "cpu"
    for name in (
        "forward_flops",
        "gram_flops",
        "rounded_flops",
        "factor_flops",
        "solve_flops",
        "cached_bytes",
        "memory_bytes",
    ):
        assert 1e6 < getattr(found, name) < 1e15, name
    assert 1e-6 <= found.step_seconds < 0.1


def test_the_paper_study_is_planned_without_its_model() -> None:
    study = load_study(STUDIES / "paper-llama31-8b.yaml")
    sizes = {label: sizes_of_model(label, model) for label, model in study.models.items()}
    assert sizes == {"llama-3.1-8b": LLAMA_8B}
    found = estimate(study, sizes, on_paper(989, 80, 3350))
    assert found.trials == 94
    assert found.sets == 37
    assert found.seconds == pytest.approx(
        sum(g.trials * g.cost.total for g in found.groups) + found.sets_seconds + found.dense
    )
    assert all(16e9 < group.cost.memory < 80e9 for group in found.groups)
    assert found.notes == [
        "the data of suite paper is not at hand: scoring is estimated from assumed sizes of its "
        "tasks"
    ]
    (small, *_) = estimate(study, sizes, on_paper(989, 24, 3350)).notes[1:]
    assert "needs" in small
    assert "there are 24.0 GB" in small


def test_what_a_recovery_and_an_allocation_take_is_planned() -> None:
    text = (STUDIES / "paper-llama31-8b.yaml").read_text(encoding="utf-8")
    head = text[: text.index("grids:")] + "grids: [{methods: {sparsegpt: 0.6}, seeds: [0], "
    seconds, memory = {}, {}
    for way in ("", "allocation: owl", "recovery: blocks", "recovery: distill"):
        study = parse_study(f"{head}{way}}}]\n", STUDIES / "s.yaml").study
        assert study is not None
        (group,) = estimate(study, {"llama-3.1-8b": LLAMA_8B}, on_paper(989, 80, 3350)).groups
        seconds[way], memory[way] = group.cost.seconds, group.cost.memory
        assert group.method == " + ".join(["sparsegpt", *way.split()[1:]])
    plain, owl, blocks, distill = seconds.values()
    assert owl["allocation"] < plain["prune"]
    for found, way in ((blocks, "blocks"), (distill, "distill")):
        size = group.rows, group.length
        alone = cost.recover_seconds(LLAMA_8B, *size, way, 2, 4, on_paper(989, 80, 3350))
        assert (
            found["recover"]
            == alone
            > 3 * cost.forward_seconds(LLAMA_8B, math.prod(size), size[1], on_paper(989, 80, 3350))
        )
    assert {k: v for k, v in distill.items() if k != "recover"} == plain
    assert memory["recovery: distill"] > memory["recovery: blocks"] >= memory[""]
    assert memory["recovery: distill"] > (16 + 2) * LLAMA_8B.block_weights
    # What is recovered in other ways too is pruned once.
    study = parse_study(f"{head}recovery: [none, blocks]}}]\n", STUDIES / "s.yaml").study
    assert study is not None
    first, second = estimate(study, {"llama-3.1-8b": LLAMA_8B}, on_paper(989, 80, 3350)).groups
    assert first.cost.seconds == plain
    assert second.cost.seconds == blocks | {"prune": 0.0}


def test_the_builtin_models_study_is_ordered_and_small_enough() -> None:
    from calmix.study.trials import plan

    trials = plan(load_study(STUDIES / "smollm2-offline.yaml"))
    assert len(trials) <= 100
    first = [t for t in trials if (t.method, t.pattern) == ("sparsegpt", "60%")]
    assert trials[: len(first)] == first
    assert sum(t.strategy == "single" for t in first if t.seed == 0) >= 15
    assert {t.strategy for t in first if t.seed == 2} == {
        "single", "mix", "self-cal", "sgs", "igsp",
    }  # fmt: skip


def test_a_model_that_is_not_here_needs_a_shape(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m \(owner/name\) is not here: give its 'shape'"):
        sizes_of_model("m", Model(name="owner/name"))
    shape = Shape(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=100,
    )  # fmt: skip
    found = sizes_of_model("m", Model(name="owner/name", shape=shape, dtype="float32"))
    assert (found.query, found.key, found.value_bytes) == (64, 64, 4)
    config = {"hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="does not tell its hidden_size"):
        sizes_of_model("m", Model(name=str(tmp_path)))


@pytest.mark.real
def test_the_tokens_of_a_suite_are_counted_about_right() -> None:
    from calmix.calibration import open_tokenizer
    from calmix.capability.suites import load_suite
    from calmix.capability.tasks import load_items

    suite = load_suite("offline").only(tasks=["logic", "gsm8k"])
    tokenizer = open_tokenizer("builtin:smollm2-135m").tokenizer
    exact = 0
    for spec in suite.tasks.values():
        items = load_items(spec)
        texts = list(dict.fromkeys(c for item in items for c in item.contexts))
        shared = planning.preamble(texts)
        parts = [texts[0][:shared], *(t[shared:] for t in texts)]
        parts += [choice for item in items for choice in item.choices]
        exact += sum(len(ids) for ids in tokenizer(parts)["input_ids"])
    work = suite_work(suite)
    assert work.exact
    assert work.tokens == pytest.approx(exact, rel=0.25)
