"""Fill the README's table and its picture from folders of one `calmix compress` each.

    python docs/readme.py OUT [OUT ...]

The picture is the card of the first folder. Right answers are those of `OUT/abilities.json`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from calmix.compression.card import read_card
from calmix.compression.plan import target
from calmix.files import size_text
from calmix.report.words import p_value, with_span

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "images" / "card.png"
BETWEEN = re.compile(r"(<!-- table: .*? -->\n).*?(<!-- end of table -->)", re.DOTALL)
HEAD = ["compressed to", "size", "tokens/s", "right, % of dense", "lost, gained (p)", "kept %"]


def row(folder: Path) -> list[str]:
    """Return the cells of a folder."""
    card = read_card(folder)
    behaved, counts = card.behaved, card.behaved.counts
    assert behaved.right is not None
    assert counts is not None
    return [
        f"{target(card.request)}, effort {card.request['effort']}",
        size_text(card.packed or card.size),
        f"{card.speeds['llama.cpp']['writing']:.0f}" if card.speeds else "–",
        with_span(behaved.right.total),
        f"{counts.lost} of {counts.dense}, {counts.gained} ({p_value(counts.p)})",
        with_span(counts.share),
    ]


def picture(page: Path) -> None:
    """Write the first screen of a card as an image."""
    sys.path.insert(0, str(ROOT))
    from tests.browser import PROGRAM, browser

    if PROGRAM is None:
        raise SystemExit("no Chromium is installed: the picture is not made")
    with browser(PROGRAM) as shown:
        shown.open(page, width=1000, dark=False)
        shown.screenshot(PICTURE, whole=False)


def main(folders: list[Path]) -> None:
    """Write table and picture."""
    lines = [HEAD, ["---"] * len(HEAD), *map(row, folders)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    text = README.read_text(encoding="utf-8")
    README.write_text(BETWEEN.sub(rf"\1\n{table}\n\2", text), encoding="utf-8")
    picture(folders[0] / "card.html")


if __name__ == "__main__":
    main([Path(one) for one in sys.argv[1:]])
