"""What llama.cpp's own quants of a model keep, at their size on disk: anchors for the frontier.

    python benchmarks/anchors.py MODEL -o FOLDER --llama PYTHON [--types Q4_K_M,IQ3_S]
        [--sets c4=SET mix=SET]

PYTHON is of an environment with llama-cpp-py-sync and gguf, which quantises the F16 file of `calmix
export`; with `--sets` once for the importance matrix of each calibration set. Each file is read
back and tested like any other model: suite `abilities`, quick, programs too, and its distance to
the dense model (FILE.distance.json). What is in FOLDER already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

from calmix.calibration.texts import texts
from calmix.evaluation.behaviour import behaviour
from calmix.evaluation.distance import Reference, distance, reference
from calmix.evaluation.scores import load_pair
from calmix.models import open_model
from calmix.report.words import with_span

QUANTISE = """
import sys
from gguf import GGUFReader
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
ffi, lib = get_ffi(), get_lib()
how = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
how.ftype = getattr(lib, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
if len(sys.argv) > 4:
    read = {one.name: one.data for one in GGUFReader(sys.argv[4]).tensors}
    sums = {name[:-8]: value.reshape(-1) / read[name[:-8] + ".counts"].reshape(-1)[0]
            for name, value in read.items() if name.endswith(".in_sum2")}
    held = ffi.new("struct llama_model_imatrix_data[]", len(sums) + 1)
    kept = []
    for at, (name, value) in enumerate(sums.items()):
        kept += [ffi.new("char[]", name.encode()), ffi.new("float[]", value.tolist())]
        held[at].name, held[at].data, held[at].size = *kept[-2:], len(value)
    how.imatrix = held
sys.exit(lib.llama_model_quantize(*(ffi.new("char[]", one.encode()) for one in sys.argv[1:3]), how))
"""


def run(*words: str | Path) -> None:
    """Run a command, and say what it said if it fails."""
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Quantise, score and print a line a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--types", default="Q4_K_M,Q3_K_M")
    parser.add_argument("--sets", nargs="*", default=[])
    parser.add_argument("--llama", required=True)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    calmix = (sys.executable, "-m", "calmix")

    @cache
    def dense_states() -> Reference:
        opened = open_model(asked.model)
        return reference(opened, texts(opened), cache=True)

    whole = asked.output / "F16.gguf"
    if not whole.exists():
        run(*calmix, "export", asked.model, "--to", "gguf", "-o", whole)
    matrices: dict[str, list[Path]] = {} if asked.sets else {"": []}
    for name, _, held in (one.partition("=") for one in asked.sets):
        matrices[f"-{name}"] = [asked.output / f"imatrix-{name}"]
        if not matrices[f"-{name}"][0].exists():
            run(
                *calmix,
                "export",
                held,
                "--to",
                "imatrix",
                "--model",
                asked.model,
                "-o",
                *matrices[f"-{name}"],
            )
    for kind in asked.types.split(","):
        for name, matrix in matrices.items():
            file, scores = (asked.output / f"{kind}{name}.{end}" for end in ("gguf", "json"))
            if not file.exists():
                run(asked.llama, "-c", QUANTISE, whole, file, kind, *matrix)
            if not scores.exists():
                run(
                    *calmix,
                    "evaluate",
                    file,
                    "--against",
                    asked.model,
                    "--suite",
                    "abilities",
                    "--quick",
                    "--allow-code-execution",
                    "-o",
                    scores,
                )
            far = asked.output / f"{kind}{name}.distance.json"
            if not far.exists():
                found = distance(
                    open_model(str(file)), dense_states(), dense=partial(open_model, asked.model)
                )
                far.write_text(json.dumps(found), "utf-8")
            apart = json.loads(far.read_text("utf-8"))
            parts = {"all": apart["total"], **apart["dimensions"]}
            kls = ", ".join(f"{part} {one['kl_mean']:.3f}" for part, one in parts.items())
            found = behaviour(load_pair(scores))
            told = ", ".join(f"{one.name} {one.kept}/{one.dense}" for one in found.abilities)
            all_, size = found.answers, file.stat().st_size / 1e6
            kept = f"{all_.kept} of {all_.dense}: {with_span(all_.share)} %"
            print(f"{kind}{name}: {size:.1f} MB, {kept}, {told}; KL {kls}", flush=True)


if __name__ == "__main__":
    main()
