"""What llama.cpp's own quants of a model keep, at their size on disk: anchors for the frontier.

    python benchmarks/anchors.py MODEL -o FOLDER [--types Q4_K_M,Q3_K_M] --llama PYTHON

PYTHON is of an environment with llama-cpp-python, which quantises the F16 file of `calmix export`.
Each file is read back and tested like any other model: suite `abilities`, quick, programs too. What
is in FOLDER already is not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from calmix.evaluation.behaviour import behaviour
from calmix.evaluation.scores import load_pair
from calmix.report.words import with_span

QUANTISE = """
import ctypes, llama_cpp, sys
how = llama_cpp.llama_model_quantize_default_params()
how.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(*map(str.encode, sys.argv[1:3]), ctypes.byref(how)))
"""


def run(*words: str | Path) -> None:
    """Run a command, and say what it said if it fails."""
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Quantise, score and print a line a type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--types", default="Q4_K_M,Q3_K_M")
    parser.add_argument("--llama", required=True)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    calmix = (sys.executable, "-m", "calmix")
    whole = asked.output / "F16.gguf"
    if not whole.exists():
        run(*calmix, "export", asked.model, "--to", "gguf", "-o", whole)
    for kind in asked.types.split(","):
        file, scores = asked.output / f"{kind}.gguf", asked.output / f"{kind}.json"
        if not file.exists():
            run(asked.llama, "-c", QUANTISE, whole, file, kind)
        if not scores.exists():
            run(*calmix, "evaluate", file, "--against", asked.model, "--suite", "abilities",
                "--quick", "--allow-code-execution", "--no-distance", "-o", scores)  # fmt: skip
        found = behaviour(load_pair(scores))
        told = ", ".join(f"{one.name} {one.kept}/{one.dense}" for one in found.abilities)
        all_, size = found.answers, file.stat().st_size / 1e6
        kept = f"{all_.kept} of {all_.dense}: {with_span(all_.share)} %"
        print(f"{kind}: {size:.1f} MB, {kept}, {told}")


if __name__ == "__main__":
    main()
