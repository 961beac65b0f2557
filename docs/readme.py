"""Fill the README's table from folders of one `calmix compress` each, and draw its pictures.

    python docs/readme.py [OUT ...]

Right answers are those of `OUT/abilities.json`. The pictures are the card of the first folder and,
also without a folder, a chart of studies/results/third-model/ranking.csv.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

from calmix.compression.card import read_card
from calmix.compression.plan import target
from calmix.files import size_text
from calmix.words import p_value, with_span

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
README, PICTURE, CHART = ROOT / "README.md", IMAGES / "card.png", IMAGES / "answers.svg"
RANKING = ROOT / "studies" / "results" / "third-model" / "ranking.csv"
BARS = (  # of the chart: label, condition, text, colour
    ("Q4_K_M, 105 MB: calmix, on its mix", "GGML Q4_K_M", "mix", "#0b6bb3"),
    ("Q4_K_M, 105 MB: calmix, on C4", "GGML Q4_K_M", "c4", "#0b6bb3"),
    ("Q4_K_M, 105 MB: llama.cpp, importance matrix of the mix", "llama.cpp Q4_K_M", "mix", "#777"),
    ("Q4_K_M, 105 MB: llama.cpp, importance matrix of C4", "llama.cpp Q4_K_M", "c4", "#777"),
    ("half of the weights zero, 269 MB: SparseGPT, on the mix", "SparseGPT 50%", "mix", "#b3500b"),
    ("half of the weights zero, 269 MB: SparseGPT, on C4", "SparseGPT 50%", "c4", "#b3500b"),
)
WIDE, LEFT, TOP = 560, 12, 28  # pixels: of the chart, and of its margins
SCALE, TALL = 4.2, 40  # pixels of a per cent and of a bar with its label
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


def chart() -> str:
    """Return the chart of right answers, with intervals over items and seeds, as SVG."""
    with RANKING.open(encoding="utf-8", newline="") as file:
        known = {(one["condition"], one["calibration"]): one for one in csv.DictReader(file)}
    parts, bottom = [], TOP + TALL * len(BARS)
    for at, (label, condition, text, colour) in enumerate(BARS):
        one, y = known[condition, text], TOP + TALL * at + 30
        low, value, high = (100 * float(one[f"total_{end}"]) for end in ("low", "value", "high"))
        left, middle, right = (round(LEFT + SCALE * one) for one in (low, value, high))
        parts += [
            f'<text x="{LEFT}" y="{y - 12}" fill="#444">{label}</text>',
            f'<path d="M{left} {y}H{right}" stroke="{colour}" stroke-width="2"/>',
            f'<circle cx="{middle}" cy="{y}" r="5" fill="{colour}"/>',
            f'<text x="{right + 8}" y="{y + 5}">{value:.0f}</text>',
        ]
    dense = round(LEFT + SCALE * 100)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {bottom + 8}" '
        'font-family="sans-serif" font-size="14">\n'
        f'<rect width="{WIDE}" height="{bottom + 8}" fill="#fff"/>\n'
        f'<path d="M{dense} {TOP}V{bottom}" stroke="#999" stroke-dasharray="4"/>\n'
        f'<text x="{dense}" y="{TOP - 8}" text-anchor="middle">dense model: 100 %</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main(folders: list[Path]) -> None:
    """Write table and pictures."""
    CHART.write_text(chart(), encoding="utf-8")
    if not folders:
        return
    lines = [HEAD, ["---"] * len(HEAD), *map(row, folders)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    text = README.read_text(encoding="utf-8")
    README.write_text(BETWEEN.sub(rf"\1\n{table}\n\2", text), encoding="utf-8")
    picture(folders[0] / "card.html")


if __name__ == "__main__":
    main([Path(one) for one in sys.argv[1:]])
