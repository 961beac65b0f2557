"""Compile the kernel of SparseGPT for NVIDIA's devices, none of which need be here.

    python tests/device/compiled.py

Prints a line of JSON for each: bytes of machine code, registers a thread, bytes
spilt, shared bytes.
"""

import importlib.util
import json
import re
import subprocess
import tempfile
from pathlib import Path

from calmix.pruning.solvers.columns import OUTPUTS, tile

CAPABILITIES = (80, 90)  # A100, H100
CASES = ((0, 128), (4, 128), (8, 128), (3, 129))  # M (0: a mask that is given), columns of a block
KERNEL = Path(__file__).parents[2] / "calmix/pruning/solvers/kernel.py"


def compiled(capability, m, size):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = importlib.util.spec_from_file_location("kernel", KERNEL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    whole, warps = tile(size)
    settings = {"SIZE": whole, "OUTPUTS": OUTPUTS, "M": m or 1, "GO": m // 2, "GIVEN": not m}
    names = [name for name in module.columns.arg_names if name not in settings]
    types = {name: "*fp32" if at < 6 else "i32" for at, name in enumerate(names)}
    source = ASTSource(module.columns, types | dict.fromkeys(settings, "constexpr"), settings)
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )


def resources(code):
    """Registers a thread and bytes spilt, as the tool that comes with Triton tells them.

    What spills stands in the stack; LOCAL is what is declared as local memory.
    """
    import triton

    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    registers, *spilt = (
        int(re.search(rf"{key}:(\d+)", told.stdout)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    return registers, sum(spilt)


def main():
    for capability in CAPABILITIES:
        for m, size in CASES:
            made = compiled(capability, m, size)
            code = made.asm["cubin"]
            registers, spilt = resources(code)
            told = {"capability": capability, "m": m, "size": size, "bytes": len(code)}
            told |= {"registers": registers, "spilt": spilt, "shared": made.metadata.shared}
            print(json.dumps(told))


if __name__ == "__main__":
    main()
