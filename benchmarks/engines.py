"""Tokens a second and memory of one model in several engines, dense and compressed, in one run.

    python benchmarks/engines.py MODEL... [--llama PYTHON] [--vllm PYTHON] [--repeats 3]

MODEL is a model folder or builtin name (transformers), a pack (`calmix.load`), or a GGUF file
(llama.cpp, by the interpreter of an environment with llama-cpp-py-sync). With an interpreter that
has vLLM, a folder runs there too, and the log-probabilities of the prompt are compared with those
in transformers.
Each in a process of its own, one row, two threads: seconds from its start to the first answer; the
prompt is 256 tokens at once, writing 64 more one at a time, the best of the repeats; memory is what
stays resident, mapped files counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import commit, machine

CHILD = """
import json, os, sys, time
began = time.perf_counter()
kind, place, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3])
PROMPT, WRITTEN, THREADS = 256, 64, 2
logs = []
if kind == "vllm":
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams
    model = LLM(place, max_model_len=512, max_num_seqs=1, dtype="auto",
                enable_prefix_caching=False, enforce_eager=True)  # compiling takes minutes
    ids = [(at % 1000) + 100 for at in range(PROMPT)]
    def run(written, **more):
        how = SamplingParams(temperature=0, max_tokens=written, ignore_eos=True, **more)
        return model.generate({"prompt_token_ids": ids}, how, use_tqdm=False)[0]
    told = run(1, prompt_logprobs=0).prompt_logprobs
    logs = [each[one].logprob for each, one in zip(told[1:], ids[1:])]
elif kind == "llama.cpp":
    from llama_cpp_py_sync import Llama
    model = Llama(place, n_ctx=512, n_threads=THREADS, verbose=False)
    text = "one two three four five six seven eight " * 60
    while len(model.tokenize(text)) > PROMPT:
        text = text[:-1]
    def run(written):
        model.generate(text, max_tokens=written, temperature=0.0)
else:
    import torch
    torch.set_num_threads(THREADS)
    ids = torch.arange(PROMPT + WRITTEN)[None] % 1000 + 100
    import calmix
    model = calmix.load(place) if kind == "pack" else calmix.open_model(place).model
    @torch.inference_mode()
    def run(written):
        made = model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1)
        for at in range(1, written):
            made = model(ids[:, PROMPT + at : PROMPT + at + 1], use_cache=True,
                         past_key_values=made.past_key_values)
    with torch.inference_mode():
        shares = model(ids[:, :PROMPT]).logits[0, :-1].float().log_softmax(-1)
    logs = shares.gather(1, ids[0, 1:PROMPT, None])[:, 0].tolist()
run(1)
first = time.perf_counter() - began
def timed(written):
    start = time.perf_counter()
    run(written)
    return time.perf_counter() - start
prompt = min(timed(1) for _ in range(repeats))
whole = min(timed(WRITTEN) for _ in range(repeats))
held = [line for line in open("/proc/self/status") if line.startswith("VmRSS")][0].split()[1]
print(json.dumps({"first": first, "prompt": PROMPT / prompt,
                  "writing": (WRITTEN - 1) / (whole - prompt), "held": int(held) / 1000,
                  "logs": logs}))
"""


def kind_of(place: str) -> str:
    """Return the engine a model is for."""
    folder = Path(place)
    if folder.suffix == ".gguf":
        return "llama.cpp"
    if (folder / "calmix-pack.json").is_file():
        return "pack"
    return "transformers"


def main() -> None:
    """Print a row a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--llama", default=sys.executable)
    parser.add_argument("--vllm", help="interpreter of an environment with vLLM")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    print(f"{machine()}, commit {commit()}")
    print(
        "| model | engine | files, MB | to the first answer, s | prompt, tokens/s "
        "| writing, tokens/s | memory, MB |"
    )
    print("|---" * 7 + "|")
    for place in asked.models:
        kind, path = kind_of(place), Path(place)
        files = [path] if path.is_file() else [*path.rglob("*")]
        size = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
        both = [kind] + ["vllm"] * bool(asked.vllm and kind == "transformers" and path.is_dir())
        logs = []
        for engine in both:
            python = {"llama.cpp": asked.llama, "vllm": asked.vllm}.get(engine, sys.executable)
            done = subprocess.run(
                [python, "-c", CHILD, engine, place, str(asked.repeats)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(f"{place}: {done.stderr.strip().splitlines()[-1]}")
            told = json.loads(done.stdout.strip().splitlines()[-1])
            logs.append(told["logs"])
            print(
                f"| {path.name} | {engine} | {size or float('nan'):.0f} | {told['first']:.1f} "
                f"| {told['prompt']:.0f} | {told['writing']:.1f} | {told['held']:.0f} |",
                flush=True,
            )
        if len(both) > 1:
            apart = [abs(one - other) for one, other in zip(*logs, strict=True)]
            mean = [-sum(each) / len(each) for each in logs]
            print(
                f"\n{path.name}: {mean[0]:.4f} and {mean[1]:.4f} nats a token in "
                f"{' and '.join(both)}, {sum(apart) / len(apart):.4f} apart, at most "
                f"{max(apart):.4f}\n"
            )


if __name__ == "__main__":
    main()
