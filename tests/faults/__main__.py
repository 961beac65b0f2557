"""`python -m tests.faults [COUNT [NAME]]`: run the fault matrix, and print it as a table.

COUNT is how often each verb is killed (50); NAME the beginning of the verbs' names.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import sys
import tempfile
from pathlib import Path

from tests.faults.matrix import everything, verbs


def main():
    """Exit code 1 if a fault is not survived."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, verb in verbs(Path(folder) / "files").items():
            if name.startswith(only):
                rows += everything(name, verb, Path(folder) / name.replace(" ", "-"), count, _tell)
    print("\n| what | fault | tried | met at work | survived |\n| --- | --- | --: | --: | --: |")
    for row in rows:
        print(f"| {row.what} | {row.fault} | {row.tried} | {row.ended} | {row.survived} |")
    sys.exit(any(row.found for row in rows))


def _tell(row):
    print(f"{row.what}, {row.fault}: {row.survived} of {row.tried}", flush=True)
    for line in row.found:
        print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
