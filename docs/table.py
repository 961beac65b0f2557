"""Fill the README's table of behaviour and size from folders of `calmix compress`.

    python docs/table.py OUT [OUT ...]

What a model answers is of `OUT/abilities.json`, which `calmix evaluate OUT/model --against MODEL
--suite abilities -o OUT/abilities.json` writes; without it of the folder's own scores.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from calmix.cli.common import percent, size
from calmix.compression.running import read_record
from calmix.evaluation.behaviour import behaviour
from calmix.evaluation.retention import Estimate
from calmix.evaluation.scores import load_dense, load_scores

README = Path(__file__).parents[1] / "README.md"
BETWEEN = re.compile(r"(<!-- table: .*? -->\n).*?(<!-- end of table -->)", re.DOTALL)
HEAD = ["model, pruned to", "size, packed", "generated answers kept %", "worst ability",
        "likelihood kept %", "suites"]  # fmt: skip


def span(one: Estimate) -> str:
    """Return a share in per cent with its interval."""
    return f"{percent(one.value)} [{percent(one.low)}, {percent(one.high)}]"


def weights(folder: Path, files: str = "*.safetensors") -> int:
    """Return the bytes of a folder's weights, or of other files."""
    return sum(path.stat().st_size for path in folder.rglob(files) if path.is_file())


def row(folder: Path) -> list[str]:
    """Return the cells of a folder."""
    asked = read_record(folder).request
    target = asked["pattern"] or f"{asked['sparsity']:.0%}"
    pairs, suites = [], []
    for path in (folder / "scores.json", folder / "abilities.json"):
        dense = load_dense(path) if path.is_file() else None
        if dense is not None:
            pairs.append((dense, load_scores(path)))
            suites.append(f"{dense.suite['name']} {dense.suite['version']}")
    found, kept = behaviour(*pairs), pairs[0][1].retention(pairs[0][0])
    packed = size(weights(folder / "pack", "*"))
    answers = found.answers
    worst = "–" if found.worst is None else f"{found.worst.name} {span(found.worst.share)}"
    return [
        f"{asked['model']}, {target}, effort {asked['effort']}",
        f"{size(weights(folder / 'model'))}, {packed}",
        "not asked" if answers is None else f"{span(answers.share)} of {answers.dense}", worst,
        span(kept.total), ", ".join(suites),
    ]  # fmt: skip


def main(folders: list[Path]) -> None:
    """Write the table into the README."""
    lines = [HEAD, ["---"] * len(HEAD), *map(row, folders)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    table += "\nHigher is better; brackets are 95 % intervals over items.\n"
    text = README.read_text(encoding="utf-8")
    README.write_text(BETWEEN.sub(rf"\1\n{table}\n\2", text), encoding="utf-8")


if __name__ == "__main__":
    main([Path(one) for one in sys.argv[1:]])
