"""`python -m tests.faults [COUNT [NAME]]`: run the fault matrix, and print it as a table.

COUNT is how often each verb is killed (50); NAME the beginning of the verbs' names.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import sys
import tempfile
from pathlib import Path

import torch

import calmix.calibration
import calmix.capability.evaluate
import calmix.cli
import calmix.pruning.checkpoint
import calmix.study.running  # noqa: F401  (imported once, for every fork)
from tests.faults.matrix import Row, faults, small_disk, two_at_once, verbs


def main() -> None:
    """Exit code 1 if a fault is not survived."""
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        chosen = {n: v for n, v in verbs(place / "files").items() if n.startswith(only)}
        for name, verb in chosen.items():
            work = place / name.replace(" ", "-")
            rows.append(_told(faults(name, verb, work, count, "kill")))
            rows.append(_told(faults(name, verb, work, -(-count // 5), "interrupt")))
            rows.append(_told(two_at_once(name, verb, work, -(-count // 25))))
            for read_only in (False, True):
                if (row := small_disk(name, verb, work, read_only=read_only)) is not None:
                    rows.append(_told(row))
    print("\n| what | fault | tried | met at work | survived |\n| --- | --- | --: | --: | --: |")
    for row in rows:
        print(f"| {row.what} | {row.fault} | {row.tried} | {row.ended} | {row.survived} |")
    sys.exit(any(row.found for row in rows))


def _told(row: Row) -> Row:
    print(f"{row.what}, {row.fault}: {row.survived} of {row.tried}", flush=True)
    for line in row.found:
        print(f"  {line}", flush=True)
    return row


if __name__ == "__main__":
    main()
