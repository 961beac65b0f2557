"""Quantise with GPTQModel on given token ids; print one JSON line with the seconds taken.

Run by checkpoints.py under an interpreter that has gptqmodel; it is no dependency of calmix. Only
`quantize()` is timed. The checkpoint is in GPTQ's own format.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version

os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--ids", required=True, help="safetensors file with `ids` (rows, length)")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="weights that share a scale")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--output", required=True, help="folder for the files")
    options = parser.parse_args()

    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    ids = load_file(options.ids)["ids"].tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    config = QuantizeConfig(bits=options.bits, group_size=options.group, device="cpu")
    model = GPTQModel.load(options.model, config)
    began = time.perf_counter()
    model.quantize(rows, batch_size=options.batch)
    seconds = time.perf_counter() - began
    model.save(options.output)
    print(json.dumps({"seconds": seconds, "version": version("gptqmodel")}))


if __name__ == "__main__":
    main()
