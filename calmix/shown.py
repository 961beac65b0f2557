"""Results that display themselves: a line in a console, a table in a notebook or pandas."""

from __future__ import annotations

import html
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calmix.files import check_result_file, write_json, write_text


class Shown:
    """Base class of results, which define `_line` and `_rows`."""

    def __repr__(self: Any) -> str:
        return f"<{type(self).__name__}: {self._line()}>"

    def _repr_html_(self: Any) -> str:
        table = self.to_pandas().to_html(
            index=False, na_rep="", float_format="{:.4g}".format, max_rows=40, border=0
        )
        return f"<p>{html.escape(self._line())}</p>{table}"

    def to_pandas(self: Any) -> Any:
        """Return the table as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self._rows())

    def save(self, path: Path | str) -> None:
        """Write everything to a `.json` file, or the table to a `.csv` file."""
        path = Path(path)
        check_result_file(path)
        if path.suffix.lower() == ".csv":
            write_text(path, self.to_pandas().to_csv(index=False))
        else:
            write_json(path, self.to_dict())

    def to_dict(self: Any) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return asdict(self)


def rounded_percent(value: float | None) -> float | None:
    """Return a share in per cent, to a tenth."""
    return None if value is None else round(100 * value, 1)
