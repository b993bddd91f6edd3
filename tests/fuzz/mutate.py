"""Seeded damage to files: what a full disk, a bad line, a careless editor or a hostile stranger leaves behind."""

import copy
import json
import tomllib

# Values that break what is written without thinking of them.
_ODD = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x" * 300, "x" * 100_000, "\ud800", "\x00", "../../etc/passwd"),
    *("(a+)+$", "(", "{{ 'a' * 10**9 }}"),
    *([], {}, [[]], [None], {"": None}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
)
_ODD_TOML = (
    *("1979-05-27", "true", "-1", "0", "0x7fffffffffffffff", "9" * 400, "1e308", "nan", "inf"),
    *('""', "[]", "{}", "[[]]", '{"" = 1}', "[1979-05-27]"),
    *(f'"{"x" * 300}"', '"../../etc/passwd"', '"(a+)+$"'),
)
_SPLICES = (
    *(b"", b"\x00", b"\xff" * 8, b"{", b"]", b"[" * 5000, b'"', b"9" * 5000),
    *(b"\\ud800", b"1e999", b"\n", b"{{ 'a' * 10**9 }}", b"{% break %}"),
)


def damaged(content, rng):
    """Returns ``content`` with bits flipped, cut or spliced, or, mostly if it is JSON or TOML, with odd values."""
    if rng.random() < 0.6:
        changed = _changed_json(content, rng) or _changed_toml(content, rng)
        if changed is not None:
            return changed
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


def _changed_json(content, rng):
    """A JSON document, or some lines of one each, with odd values in odd places; None where it is neither."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    for whole in (True, False):
        try:
            value = json.loads(content if whole else lines[number])
        except ValueError:
            continue
        for _ in range(rng.choice((1, 1, 1, 3))):
            value = _changed(value, rng)
        text = json.dumps(value).encode()
        return text if whole else b"\n".join([*lines[:number], text, *lines[number + 1 :]])
    return None


def _changed_toml(content, rng):
    """Returns a TOML document with an odd value in a line; None if ``content`` is not TOML."""
    try:
        tomllib.loads(content.decode())
    except ValueError:
        return None
    lines = content.decode().splitlines()
    at = rng.choice([number for number, line in enumerate(lines) if " = " in line])
    name, _, _ = lines[at].partition(" = ")
    lines[at] = f"{name} = {rng.choice(_ODD_TOML)}"
    return "\n".join(lines).encode()


def _changed(value, rng):
    """A copy of ``value`` with one part replaced, dropped, renamed or doubled."""
    places = list(_places(value))
    if not places:
        return copy.deepcopy(rng.choice(_ODD))
    value = copy.deepcopy(value)
    path = rng.choice(places)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, kind = path[-1], rng.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(("", "x" * 300, "\ud800", f"{key}.", str(key).upper()))] = parent.pop(key)
    elif kind == 2 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    else:
        parent[key] = copy.deepcopy(rng.choice(_ODD))
    return value


def _places(value, path=()):
    """Paths of all parts of nested dicts and lists; of long ones some."""
    items = []
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, part in items[:64]:
        yield (*path, key)
        yield from _places(part, (*path, key))
