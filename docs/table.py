"""Fill the README's table of behaviour and size from folders of `calmix compress`.

    python docs/table.py OUT [OUT ...]

What a model answers is of `OUT/abilities.json`, which `calmix evaluate OUT/model --against MODEL
--suite abilities -o OUT/abilities.json` writes; without it of the folder's own scores.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from calmix.cli.common import size
from calmix.compression.plan import target
from calmix.report.card import read_card
from calmix.report.words import with_span

README = Path(__file__).parents[1] / "README.md"
BETWEEN = re.compile(r"(<!-- table: .*? -->\n).*?(<!-- end of table -->)", re.DOTALL)
HEAD = ["model, compressed to", "size, packed", "generated answers kept %", "worst ability",
        "likelihood kept %", "suites"]  # fmt: skip


def row(folder: Path) -> list[str]:
    """Return the cells of a folder."""
    card = read_card(folder)
    asked, answers, worst = card.asked, card.behaved.answers, card.behaved.worst
    return [
        f"{asked['model']}, {target(asked)}, effort {asked['effort']}",
        f"{size(card.size)}, {size(card.packed)}",
        "not asked" if answers is None else f"{with_span(answers.share)} of {answers.dense}",
        "–" if worst is None else f"{worst.name} {with_span(worst.share)}",
        "–" if card.kept is None else with_span(card.kept.total),
        ", ".join(f"{dense.suite['name']} {dense.suite['version']}" for dense, _ in card.pairs),
    ]  # fmt: skip


def main(folders: list[Path]) -> None:
    """Write the table into the README."""
    lines = [HEAD, ["---"] * len(HEAD), *map(row, folders)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    table += "\nHigher is better; brackets are 95 % intervals over items. Programs run "
    table += "(`--allow-code-execution`).\n"
    text = README.read_text(encoding="utf-8")
    README.write_text(BETWEEN.sub(rf"\1\n{table}\n\2", text), encoding="utf-8")


if __name__ == "__main__":
    main([Path(one) for one in sys.argv[1:]])
