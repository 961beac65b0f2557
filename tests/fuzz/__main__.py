"""`python -m tests.fuzz COUNT [SEED [KIND]]`: run mutations, and print what was found."""

import os
import sys
import tempfile
from pathlib import Path

from tests.fuzz.readers import KINDS
from tests.fuzz.running import run


def main():
    """Exit code 1 if any mutation is neither read nor refused in one line."""
    count, seed, only = (*sys.argv[1:], *(None,) * 3)[:3]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CALMIX_CACHE"] = str(Path(folder) / "fuzz" / "files" / "cache")
        found = run(Path(folder) / "fuzz", int(count or 10_000), int(seed or 0), only)
    read, refused, faults = found
    print(f"{'kind':20}{'read':>8}{'refused':>9}")
    for name in KINDS:
        print(f"{name:20}{read[name]:8}{refused[name]:9}")
    for place, (numbers, trace) in faults.items():
        print(f"\n{place} ({len(numbers)}: {numbers[:5]})\n{trace}")
    print(f"{read.total()} read, {refused.total()} refused, faults in {len(faults)} places")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
