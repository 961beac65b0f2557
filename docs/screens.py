"""Screenshots of pages at 1280 and 390 pixels, light and dark: a card, a study's report, the site.

python docs/screens.py out/card.html out/site -o out/screens

A folder is served to this machine, and its first page is shown.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.browser import PROGRAM, browser, served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--first", action="store_true", help="the first screen alone")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if PROGRAM is None:
        parser.error("no Chromium is installed")
    with ExitStack() as several:
        page = several.enter_context(browser(PROGRAM))
        for path in options.pages:
            if path.is_dir():
                address: Path | str = several.enter_context(served(path))
            else:
                address = path
            for width in (1280, 390):
                for dark in (False, True):
                    page.open(address, width=width, dark=dark)
                    name = f"{path.parent.name}-{path.stem}-{width}-{'dark' if dark else 'light'}"
                    page.screenshot(options.output / f"{name}.png", whole=not options.first)
                    wide = page.run("document.documentElement.scrollWidth")
                    page.run("localStorage.clear(), sessionStorage.clear()")  # a site's own choice
                    print(f"{name}.png{'' if wide <= width else f': {wide} pixels wide'}")


if __name__ == "__main__":
    main()
