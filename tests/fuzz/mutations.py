"""Seeded mutations of bytes, of JSON values, and of lines of text."""

import json

from calmix.manifest import SEAL, sealed

NESTED = "[" * 5000 + "]" * 5000
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "\ud800", "\x00", "\x1b[2J", "../../x", "/etc/passwd",
    "<script>alert(1)</script>", "[/bold]", "x" * 100_000, "{a.b}", "%s", "off", "2:4", "0.5",
    [], {}, [[]], [None], [-1], {"": {}}, {"x": None}, [1, "2", 3.0], ["x"] * 1000,
)  # fmt: skip
_EIGHT = [
    f"*{name}, *{name}, *{name}, *{name}, *{name}, *{name}, *{name}, *{name}" for name in "abcde"
]
LINES = (
    "&a [*a]", "<<: *a", "<<: {rows: 3}", "? [a, b]\n: c", "? {a: b}\n: c", "\t", "---", "...",
    "a: &a [x, x, x, x, x, x, x, x]\n"
    + "\n".join(f"{k}: &{k} [{held}]" for k, held in zip("bcdef", _EIGHT, strict=True)),
    "x: !!python/object/apply:os.system ['true']", "x: 2001-99-99", "x: 0x", "x: 1e999", "x: .nan",
    "x: " + "9" * 5000, "x: " + NESTED, "- x", ": ", "rows: -1", "rows: 99999999999999999999",
    "seed: 1.5", "length: null", "%YAML 9.9", "x: |\n  y", "\ufeff", "\u2028", "x: '",
    'x: "\\ud800"', "x: !!binary '='", "x: 12:30:45", "on: off", "null: null", "1: 2", "[/bold]: x",
)  # fmt: skip


def mutated(raw, kind, rng):
    """Return a mutation of a file's bytes.

    Args:
        raw: the whole file.
        kind: `json`, `sealed` (JSON with its own hash, made right again), `jsonl`, `yaml` or
            `binary`; bytes of all are damaged blindly as well.
        rng: decides everything.
    """
    ways = {
        "json": [_json, _json, _bytes],
        "sealed": [_sealed, _sealed, _sealed, _bytes],
        "jsonl": [_jsonl, _bytes],
        "yaml": [_lines, _lines, _bytes, _numbers],
        "binary": [_bytes, _words, _numbers],
    }
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        raw = rng.choice(ways[kind])(raw, rng)
    return raw


def _bytes(raw, rng):
    content = bytearray(raw)
    if not content:
        return b"\x00"
    at = rng.randrange(min(len(content), rng.choice([64, 4096, len(content)])))
    way = rng.choice(["flip", "bits", "cut", "delete", "insert", "double", "swap", "empty"])
    if way == "flip":
        content[at] = rng.randrange(256)
    elif way == "bits":
        for _ in range(20):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del content[at:]
    elif way == "delete":
        del content[at : at + rng.randrange(1, 40)]
    elif way == "insert":
        content[at:at] = bytes(
            rng.choice(b'{}[]",:0a\n\xff\x00') for _ in range(rng.randrange(1, 9))
        )
    elif way == "double":
        content[at:at] = content[at : at + rng.randrange(1, 400)]
    elif way == "swap":
        other = rng.randrange(len(content))
        content[at], content[other] = content[other], content[at]
    else:
        content.clear()
    return bytes(content)


def _words(raw, rng):
    """Put an extreme integer of four or eight bytes somewhere in the first kilobytes."""
    content = bytearray(raw)
    size = rng.choice([4, 8])
    if len(content) <= size:
        return _bytes(raw, rng)
    at = rng.randrange(min(len(content) - size, rng.choice([32, 512, 8192])))
    value = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 10**9, 2**63 - 1, 2**64 - 1])
    content[at : at + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(content)


def _numbers(raw, rng):
    """Replace a digit by another kind of value."""
    places = [at for at, byte in enumerate(raw[:65536]) if 48 <= byte < 58]
    if not places:
        return _bytes(raw, rng)
    at = rng.choice(places)
    value = rng.choice(
        [b"-1", b"99999999999", b"1.5", b"null", b'"x"', b"1e400", b"", b"[]", b"true"]
    )
    return raw[:at] + value + raw[at + 1 :]


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
    """Return a JSON value with one of its parts, however deep, replaced, dropped or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        way = rng.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.15:
            return value | {str(rng.choice(VALUES))[:50]: rng.choice(VALUES)}
        return value | {key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        way = rng.random()
        if way < 0.1:
            return value[:at] + value[at + 1 :]
        if way < 0.2:
            return value[: at + 1] + value[at:]
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def _jsonl(raw, rng):
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng)
    return b"\n".join(lines)


def _lines(raw, rng):
    lines = raw.decode("utf-8", "replace").split("\n")
    at = rng.randrange(len(lines))
    way = rng.choice(["insert", "replace", "value", "delete", "double", "indent"])
    if way == "insert":
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines.insert(at, indent + rng.choice(LINES))
    elif way == "replace":
        lines[at] = rng.choice(LINES)
    elif way == "value":
        key, colon, _ = lines[at].partition(":")
        try:
            value = json.dumps(rng.choice(VALUES))
        except (ValueError, RecursionError):
            value = "null"
        lines[at] = f"{key}{colon} {value}"
    elif way == "delete":
        del lines[at]
    elif way == "double":
        lines.insert(at, lines[at])
    else:
        lines[at] = " " * rng.randrange(9) + lines[at].lstrip()
    return "\n".join(lines).encode("utf-8", "surrogatepass")
