"""Seeded mutations of bytes, of JSON values, and of lines of text."""

import json

from calmix.manifest import SEAL, sealed

NESTED = "[" * 5000 + "]" * 5000
PLAIN = (None, True, 0, -1, 2**63, 10**30, 1.5, 1e308, float("nan"), float("inf"))
MARKED = ("", "x", "\ud800", "\x00", "\x1b[2J", "../../x", "<script>alert(1)</script>", "[/bold]")
TEXTS = ("x" * 100_000, "{a.b}", "off", "2:4", "0.5")
PARTS = ([], {}, [[]], [None], [-1], {"": {}}, [1, "2", 3.0], ["x"] * 1000)
VALUES = (*PLAIN, *MARKED, *TEXTS, *PARTS)
KEYS = ("&a [*a]", "<<: *a", "<<: {rows: 3}", "? [a, b]\n: c", "? {a: b}\n: c", "\t", "---", "...")
TAGS = ("a: &a [x, x]\nb: [*a, *a]", "x: !!python/object/apply:os.system ['true']")
NUMBERS = ("x: 2001-99-99", "x: 0x", "x: 1e999", "x: .nan", "x: " + "9" * 5000, "x: " + NESTED)
FIELDS = ("- x", ": ", "rows: -1", "rows: 99999999999999999999", "seed: 1.5", "length: null")
MARKS = ("%YAML 9.9", "x: |\n  y", "\ufeff", "\u2028", "x: '", 'x: "\\ud800"', "x: !!binary '='")
LINES = (*KEYS, *TAGS, *NUMBERS, *FIELDS, *MARKS, "x: 12:30:45", "on: off", "1: 2")


def mutated(raw, kind, rng):
    """Return a mutation of a file's bytes; bytes of every kind are damaged blindly as well, and the
    hash of a `sealed` one is made right again."""
    ways = {
        "json": [_json, _json, _bytes],
        "sealed": [_sealed, _sealed, _sealed, _bytes],
        "jsonl": [_jsonl, _bytes],
        "yaml": [_lines, _lines, _bytes],
        "binary": [_bytes, _words],
    }
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        raw = rng.choice(ways[kind])(raw, rng)
    return raw


def _bytes(raw, rng):
    """Replace, cut off, delete, insert or double some bytes, mostly near the beginning."""
    if not raw:
        return b"\x00"
    at = rng.randrange(min(len(raw), rng.choice([64, 4096, len(raw)])))
    noise = bytes(rng.choice(b'{}[]",:0a\n\xff\x00') for _ in range(rng.randrange(1, 9)))
    size = rng.randrange(1, 400)
    other = bytes([rng.randrange(256)])
    return rng.choice(
        [
            raw[:at] + other + raw[at + 1 :],
            raw[:at],
            raw[:at] + raw[at + size :],
            raw[:at] + noise + raw[at:],
            raw[: at + size] + raw[at:],
            b"",
        ]
    )


def _words(raw, rng):
    """Put an extreme integer of four or eight bytes somewhere in the first kilobytes."""
    size = rng.choice([4, 8])
    if len(raw) <= size:
        return _bytes(raw, rng)
    at = rng.randrange(min(len(raw) - size, rng.choice([32, 512, 8192])))
    value = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 10**9, 2**63 - 1, 2**64 - 1])
    return raw[:at] + (value % 256**size).to_bytes(size, "little") + raw[at + size :]


def _json(raw, rng):
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return _bytes(raw, rng)
    if rng.random() < 0.03:
        return NESTED.encode()
    return json.dumps(_changed(value, rng)).encode()


def _sealed(raw, rng):
    try:
        value = json.loads(_json(raw, rng))
    except (ValueError, RecursionError):
        return raw
    if isinstance(value, dict) and value.get(SEAL) is not None:
        value = sealed(value)
    return json.dumps(value).encode()


def _changed(value, rng):
    """Return a JSON value with one of its parts, however deep, replaced, dropped or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    way = rng.random()
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.15:
            return value | {str(rng.choice(VALUES))[:50]: rng.choice(VALUES)}
        return value | {key: _changed(value[key], rng)}
    at = rng.randrange(len(value))
    if way < 0.2:
        return value[:at] + value[at + 1 :] if way < 0.1 else value[: at + 1] + value[at:]
    return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]


def _jsonl(raw, rng):
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng)
    return b"\n".join(lines)


def _lines(raw, rng):
    """Insert, replace, delete, double or indent a line, or replace the value in it."""
    lines = raw.decode("utf-8", "replace").split("\n")
    at = rng.randrange(len(lines))
    line, key = lines[at], lines[at].partition(":")[0]
    indent = line[: len(line) - len(line.lstrip())]
    lines[at : at + 1] = rng.choice(
        [
            [indent + rng.choice(LINES), line],
            [rng.choice(LINES)],
            [],
            [line, line],
            [" " * rng.randrange(9) + line.lstrip()],
            [f"{key}: {json.dumps(rng.choice(VALUES))}"],
        ]
    )
    return "\n".join(lines).encode("utf-8", "surrogatepass")
