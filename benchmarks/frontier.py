"""Share of the dense model's right answers that quantised models keep: the card's reference models.

    python benchmarks/frontier.py > calmix/report/frontier.yaml

Reads the committed store `frontier`: ECQ on the mix with chats, embeddings and head as `compress`
rounds them, without recovery.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path

from calmix.compression.plan import embedding_bits
from calmix.evaluation.behaviour import counted
from calmix.evaluation.suites import WRITTEN
from calmix.study import read_results

STORE = Path(__file__).parents[1] / "studies" / "results" / "frontier" / "store.tar.xz"
MODELS = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
BITS = (8, 4.5, 4, 3)


def main() -> None:
    """Print the file."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(STORE) as archive:
            archive.extractall(folder, filter="data")
        results = read_results(Path(folder) / "frontier")
    shares = {}
    for trial in results.trials:
        tasks = zip(results.paired[trial.id], results.scores[trial.id], strict=True)
        count = counted("all", [both for both in tasks if both[0].metric in WRITTEN])
        if count is not None:
            key = trial.model, trial.method, trial.calibration, trial.pattern
            shares[key] = round(count.share.value, 3)
    print("# Share of the dense model's right answers that are kept at so many bits per weight:")
    print("# python benchmarks/frontier.py")
    for bits in BITS:
        method = f"ecq + embeddings {embedding_bits(bits):g}"
        kept = {
            name: shares[label, method, "mix-8-chat-4", f"{bits:g} bits"]
            for label, name in MODELS.items()
        }
        print(f"{bits:g}: {json.dumps(kept)}".replace('"', ""))


if __name__ == "__main__":
    main()
