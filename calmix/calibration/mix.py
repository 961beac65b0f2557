"""A mix: named sources with weights, and how many rows each source gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from calmix.errors import InputError


@dataclass(frozen=True)
class Mix:
    """Source names with positive weights that sum to 1, in the order they were written."""

    weights: dict[str, float]

    def __str__(self) -> str:
        return ",".join(f"{name}:{weight:.4g}" for name, weight in self.weights.items())


def parse_mix(text: str) -> Mix:
    """Parse `name`, `a:0.5,b:0.3,c:0.2` or `uniform:a,b,c` into a mix.

    Names may be paths. Weights are relative; those of 0 drop their source.

    Raises:
        InputError: nothing named, a name given twice, a weight missing, negative or not a
            number, or all weights zero.
    """
    text = text.strip()
    if text.startswith("uniform:"):
        names = _names(text.removeprefix("uniform:"), text)
        return make_mix(dict.fromkeys(names, 1.0), text)
    parts = _names(text, text)
    if len(parts) == 1 and _weight(parts[0]) is None:
        return make_mix({parts[0]: 1.0}, text)
    weights: dict[str, float] = {}
    for part in parts:
        pair = _weight(part)
        if pair is None:
            raise InputError(
                f"calibration '{text}': '{part}' has no weight: write {part}:0.5, or "
                "uniform:a,b,c for equal weights"
            )
        name, weight = pair
        if name in weights:
            raise InputError(f"calibration '{text}' names '{name}' twice")
        weights[name] = weight
    return make_mix(weights, text)


def make_mix(weights: Mapping[str, float], text: str) -> Mix:
    """Return a mix with its weights normalised to sum to 1.

    Raises:
        InputError: a weight is negative or not finite, or all are zero.
    """
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise InputError(f"calibration '{text}': the weight of '{name}' is {weight}, not >= 0")
    total = sum(weights.values())
    if not total > 0:
        raise InputError(f"calibration '{text}': all weights are zero")
    return Mix({name: weight / total for name, weight in weights.items() if weight > 0})


def rows_per_source(mix: Mix, rows: int) -> dict[str, int]:
    """Share out `rows` by weight with the largest-remainder method; the counts add up to `rows`.

    Ties between remainders go to the source written first.
    """
    exact = {name: weight * rows for name, weight in mix.weights.items()}
    # Weights such as 0.1 are not exact in binary: what is an integer but for rounding is one.
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    left = rows - sum(counts.values())
    order = sorted(exact, key=lambda name: round(counts[name] - exact[name], 9))
    for name in order[:left]:
        counts[name] += 1
    return counts


def _names(text: str, whole: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise InputError(f"calibration '{whole}' names no source between its commas")
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise InputError(f"calibration '{whole}' names '{doubles[0]}' twice")
    return names


def _weight(part: str) -> tuple[str, float] | None:
    name, colon, number = part.rpartition(":")
    if not colon or not name:
        return None
    try:
        return name.strip(), float(number)
    except ValueError:
        return None
