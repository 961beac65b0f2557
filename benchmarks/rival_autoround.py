"""Quantise with AutoRound on given token ids; print one JSON line with the seconds taken.

Run by checkpoints.py under an interpreter that has auto-round (and gguf, for a scheme such as
gguf:q4_k_m); it is no dependency of calmix. Only quantising is timed, not writing the files.
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
    parser.add_argument("--scheme", help="such as gguf:q2_k_s; else --bits and --group")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--group", type=int, help="weights that share a scale")
    parser.add_argument("--iterations", type=int, default=200, help="its own default")
    parser.add_argument("--batch", type=int, default=8, help="its own default")
    parser.add_argument("--output", required=True, help="folder for the files")
    options = parser.parse_args()

    import auto_round
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(options.ids)["ids"]
    scheme = {"scheme": options.scheme}
    if options.scheme is None:
        levels = {"bits": options.bits, "group_size": options.group, "sym": True}
        scheme = {"scheme": f"W{options.bits}A16", **levels}
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(options.model),
        **scheme,
        iters=options.iterations,
        dataset=list(ids.split(options.batch)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=options.batch,
        device_map="cpu",
    )
    began = time.perf_counter()
    if options.scheme is None:
        rounding.quantize()
        seconds = time.perf_counter() - began
        rounding.save_quantized(options.output, format="auto_gptq")
    else:  # its GGUF types are packed while it goes
        rounding.quantize_and_save(options.output, format=options.scheme)
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "version": auto_round.__version__}))


if __name__ == "__main__":
    main()
