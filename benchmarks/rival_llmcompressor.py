"""Compress with llm-compressor on given token ids; print one JSON line with the seconds taken.

Run by the benchmarks under an interpreter that has llmcompressor (`make bench` makes one in
.bench-venv); it is no dependency of calmix. Only `oneshot()` is timed. The head is ignored by a
regular expression, because a plain name does not match and the tied embedding would be pruned.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--ids", required=True, help="safetensors file with `ids` (rows, length)")
    parser.add_argument("--method", choices=["sparsegpt", "wanda", "gptq"], required=True)
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--bits", type=int, help="of gptq")
    parser.add_argument("--group", type=int, help="weights that share a scale")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--output", help="folder for the pruned model")
    parser.add_argument("--packed", type=int, default=0, help="1: in compressed-tensors")
    options = parser.parse_args()

    import llmcompressor
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(options.ids)["ids"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    where = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    if options.method == "gptq":
        from llmcompressor.modifiers.quantization import GPTQModifier

        levels = {
            "num_bits": options.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": options.group,
        }
        group = {"targets": ["Linear"], "weights": levels}
        recipe = GPTQModifier(config_groups={"all": group}, ignore=where["ignore"])
    else:
        kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[options.method]
        recipe = kind(sparsity=options.sparsity, **where)
    torch.manual_seed(0)
    began = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        batch_size=options.batch,
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - began
    if options.output:
        if (
            options.method == "gptq" and not options.packed
        ):  # as plain weights, which are on their grid already
            for module in model.modules():
                for name in [n for n in module._parameters if n.startswith("weight_")]:
                    del module._parameters[name]
                vars(module).pop("quantization_scheme", None)
            vars(model.config).pop("quantization_config", None)
        model.save_pretrained(options.output, save_compressed=bool(options.packed))
        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)
    print(json.dumps({"seconds": seconds, "version": llmcompressor.__version__}))


if __name__ == "__main__":
    main()
