"""How many copies of test items the leakage check finds in each format, and what it costs.

    python benchmarks/leakage.py [DATA]

Of the suites' items 400 are drawn, and each is put between two paragraphs as it would stand in
another format. DATA is a folder of JSON Lines: each of its documents that shares text with an item
is printed, and the time by megabyte.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from calmix.calibration import leakage

SUITES = "offline,abilities,smoke"
ITEMS = 400
BEFORE = "The committee met again on Tuesday, after the café had closed.\nNobody had brought notes."
AFTER = "What was said there is lost.\n\nBy the next morning the snow had gone, and so had they."


def lines(text: str, columns: int = 72) -> list[str]:
    return [
        part
        for one in text.splitlines()
        for part in textwrap.wrap(one, columns, replace_whitespace=False) or [""]
    ]


def each_line(form: str, columns: int = 10**6, start: int = 1) -> Callable[[str], str]:
    return lambda text: "\n".join(
        form.format(number, one) for number, one in enumerate(lines(text, columns), start)
    )


def emphasised(text: str) -> str:
    """Every seventh word in bold, as HTML."""
    parts = re.split(r"(\s+)", html.escape(text))
    parts[::14] = [f"<b>{one}</b>" for one in parts[::14]]
    return "".join(parts)


FORMATS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "wrapped at 40 columns": lambda text: "\n".join(lines(text, 40)),
    "wrapped at 72 columns": lambda text: "\n".join(lines(text, 72)),
    "double spaces": lambda text: text.replace(" ", "  "),
    "capitals": str.upper,
    "JSON": lambda text: json.dumps({"text": text}),
    "JSON in JSON": lambda text: json.dumps({"text": json.dumps({"text": text})}),
    "JSON, wrapped at 40": lambda text: json.dumps("\n".join(lines(text, 40))),
    "Python": lambda text: ascii(text),
    "HTML": lambda text: html.escape(text),
    "HTML, <br>": lambda text: "<br>".join(html.escape("\n".join(lines(text, 40))).split("\n")),
    "HTML, <p>": lambda text: "".join(
        f'<p class="x">{html.escape(one)}</p>' for one in lines(text, 72)
    ),
    "HTML, <b>": emphasised,
    "HTML escaped twice": lambda text: html.escape(html.escape(f"<p>{text}</p>")),
    "HTML in JSON": lambda text: json.dumps(f"<p>{html.escape(text)}</p>".replace("\n", "<br>\n")),
    "lines `1: `": each_line("{}: {}"),
    "lines `12. `, wrapped at 40": each_line("{}. {}", 40, 12),
    "lines `  7<tab>`, wrapped at 72": each_line("{:6}\t{}", 72, 7),
    "lines `12 | `, wrapped at 40": each_line("{:03} | {}", 40, 12),
    "lines `Line 3: `, wrapped at 72": each_line("Line {}: {}", 72, 3),
    "lines `> `, wrapped at 40": each_line("> {1}", 40),
    "lines `> > `, wrapped at 72": each_line("> > {1}", 72),
    "lines indented, wrapped at 40": each_line("\t    {1}", 40),
    "lines `# `, wrapped at 40": each_line("# {1}", 40),
    "lines `1: `, in JSON": lambda text: json.dumps(each_line("{}: {}", 40)(text)),
}


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for number, row in enumerate(file):
                values = [one for one in json.loads(row).values() if isinstance(one, str)]
                yield f"{path.name}:{number}", "\n".join(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?")
    options = parser.parse_args()
    items = leakage.suite_items(SUITES)
    start = time.process_time()
    index = leakage.ItemIndex(items)
    print(f"{len(items)} items, index in {time.process_time() - start:.2f} s")
    known = [one for one in items if index.find(one[2])]
    print(f"{len(known)} of them can be found")
    drawn = random.Random(0).sample(known, ITEMS)
    print("| format | found |\n|---|---:|")
    for name, form in FORMATS.items():
        count = sum(
            index.find("\n\n".join((BEFORE, form(text), AFTER))) is not None for _, _, text in drawn
        )
        print(f"| {name} | {count} |", flush=True)
    if options.data is not None:
        texts = list(documents(options.data))
        start = time.process_time()
        leaks = [(name, index.find(text)) for name, text in texts]
        seconds, size = time.process_time() - start, sum(len(text) for _, text in texts) / 1e6
        for name, item in leaks:
            if item is not None:
                print(name, *item)
        print(f"{len(texts)} documents, {1000 * seconds / size:.0f} ms per million characters")


if __name__ == "__main__":
    main()
