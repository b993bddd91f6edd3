"""Seeded damage to files: what a full disk, a bad line, a careless editor or a hostile stranger
leaves behind."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

# Values of JSON, most of them also of YAML and TOML, that break what is written without thinking of
# them.
_STRINGS = (
    *('""', f'"{"x" * 300}"', f'"{"x" * 100_000}"', r'"\ud800"', r'"\u0000"', '"../../etc/passwd"'),
    *('"(a+)+$"', '"("', "\"{{ 'a' * 10**9 }}\""),
)
_VALUES = (
    *("null", "true", "false", "-1", "0", "1", str(2**31), str(2**63), "9" * 31, "9" * 400, "0x7fffffffffffffff"),
    *("0.5", "-0.0", "1e308", "1e999", "NaN", "Infinity", "1979-05-27"),
    *("[]", "{}", "[[]]", "[null]", '{"": null}', '{"type": "Precompiled", "precompiled_charsmap": "AAAA"}'),
)  # fmt: skip
_SPLICES = (
    *(b"", b"\x00", b"\xff" * 8, b"{", b"]", b"[" * 5000, b'"', b"9" * 5000),
    *(b"\\ud800", b"1e999", b"\n", b"{{ 'a' * 10**9 }}", b"{% break %}"),
)
_START = re.compile(r'(?<![\w"])["\w{\[-]')
_WORD = re.compile(r".[\w.+-]*", re.DOTALL)


def damage(file: Path, rng: random.Random) -> None:
    """Changes a file, or sometimes removes it, or puts a folder or a link to itself in its
    place."""
    content = file.read_bytes()
    if rng.random() < 0.03:
        file.unlink()
        kind = rng.randrange(3)
        if kind == 1:
            file.mkdir()
        elif kind == 2:
            file.symlink_to(file.name)
    else:
        file.write_bytes(_changed(content, rng))


def _changed(content: bytes, rng: random.Random) -> bytes:
    """Returns ``content`` with bits flipped, cut or spliced, or, mostly if it is text, with odd
    values."""
    if rng.random() < 0.6:
        try:
            text = content.decode()
        except ValueError:
            pass
        else:
            for _ in range(rng.choice((1, 1, 1, 3))):
                text = _with_odd_value(text, rng)
            return text.encode()
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.choice(_SPLICES)
        elif kind == 3:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            data[at : at + 8] = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
        else:
            data[at:at] = data[rng.randrange(len(data) + 1) :][: rng.randrange(1, 256)]
    return bytes(data)


def _with_odd_value(text: str, rng: random.Random) -> str:
    """Replaces, removes or doubles a value of a JSON document or line, or a word of another
    text."""
    places = [match.start() for match in _START.finditer(text)]
    if not places:
        return text
    start = rng.choice(places)
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        word = _WORD.match(text, start)
        end = word.end() if word else start
    part, following = text[start:end], text[end:]
    is_name = following.lstrip()[:1] in (":", "=")
    odd = _STRINGS if is_name else _STRINGS + _VALUES
    new = rng.choice((part.upper(), f"{part}, {part}", "", *odd))
    return f"{text[:start]}{new}{following}"
