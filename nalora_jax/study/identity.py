"""Identity of a study's runs: digests in each record, and the checks that records belong together.

A record has, next to its settings and measures,

    protocol   sha256 of the protocol's content, without comments and layout
    code       sha256 of the package's sources
    rules      {file name: sha256} of the user's files that define rules and activation
    adapter    digest of the adapter that the run started from, if any
    base       digest of the base's weights
    source     digest of the training data, the same for every seed
    data       digest of the training rows in the seed's order
    items      {name: digest} of the items that it measured
    digest     sha256 of all other fields

Records of earlier versions lack ``rules``, ``base``, ``source`` and ``digest``; they stay valid,
with a printed note.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nalora_jax.common.digests import digest_of, json_digest
from nalora_jax.errors import NaloraError
from nalora_jax.study.records import Record

_PACKAGE = Path(__file__).parents[1]
_SOURCES = {".py", ".cc", ".h"}
_LIBRARIES = {"nalora_jax", "jax", "numpy"}  # whose code or version is recorded
ADDED = ("rules", "base", "source", "digest")  # fields that records of earlier versions lack
# Fields that must agree, each with the fields of the records among which they must.
_SHARED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("base", ("model",)),
    ("adapter", ("model", "task", "method")),
    ("source", ("model", "task")),
    ("data", ("model", "task", "seed")),
    ("items", ("model", "task")),
    ("rules", ("model", "method")),
    ("parameters", ("model", "task", "method")),
)


@functools.cache
def code_version() -> str:
    """Returns 12 digits of the sha256 of the package's Python and C++ sources, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(path for path in _PACKAGE.rglob("*") if path.suffix in _SOURCES):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def rule_files(definitions: Iterable[Any]) -> dict[str, str]:
    """Returns the sha256, by file name, of users' files that define these classes and functions.

    Raises:
      NaloraError: a definition has no file, so a change of it could not be detected.
    """
    contents: dict[str, bytes] = {}
    for module in sorted(set(map(_module, definitions))):
        if module.partition(".")[0] not in _LIBRARIES:
            path = _file(module)
            contents[path.name] = contents.get(path.name, b"") + path.read_bytes()
    return {name: digest_of(content) for name, content in contents.items()}


def _module(definition: Any) -> str:
    while isinstance(definition, functools.partial):
        definition = definition.func
    return getattr(inspect.unwrap(definition), "__module__", None) or "numpy"  # its ufuncs name no module


def _file(module: str) -> Path:
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not Path(file).is_file():
        raise NaloraError(
            f"rules of the module {module}",
            expected="a file, whose digest the records hold",
            found="a module without one",
            remedy="write the rule to a file and import it",
        )
    return Path(file)


def record_digest(record: Mapping[str, Any]) -> str:
    """Returns the sha256 of a record's JSON without its ``digest``."""
    content = {name: value for name, value in record.items() if name != "digest"}
    return json_digest(content, sort_keys=True)


def old_records(records: Mapping[str, Record]) -> list[str]:
    """Returns the ids of the records that an earlier version wrote without all digests."""
    return [name for name, record in records.items() if not all(field in record for field in ADDED)]


def describe_old(records: Mapping[str, Record]) -> str:
    """Returns the note that is printed if some records cannot be checked completely, else ""."""
    count = len(old_records(records))
    if not count:
        return ""
    return (
        f"{count} of {len(records)} records were made by an earlier version without digests of "
        "base weights, data source, rule files and the record: these are not checked"
    )


def check_records(records: Mapping[str, Record]) -> None:
    """Checks that records are unchanged and were made with the same base, data, items and rules.

    Raises:
      NaloraError: a record does not match its digest, or two records must agree and differ.
    """
    for name, record in records.items():
        if record.get("digest") not in (None, record_digest(record)):
            raise NaloraError(
                f"record {name}",
                expected="the content that its digest was computed from",
                found="another content",
                remedy="restore the record file, or delete the line and do the run again",
            )
    for field, group in _SHARED:
        _check_shared(records, field, group)


def _check_shared(records: Mapping[str, Record], field: str, group: tuple[str, ...]) -> None:
    first: dict[tuple[Any, ...], tuple[str, Any]] = {}
    for name, record in records.items():
        place = tuple(record.get(key) for key in group)
        values = record.get(field)
        if field != "items" or not isinstance(values, Mapping):
            values = {"": values}
        for item, digest in values.items():
            if digest is None:
                continue
            other, expected = first.setdefault((*place, item), (name, digest))
            if digest != expected:
                named = ", ".join(f"{key} {label}" for key, label in zip(group, place, strict=True))
                raise NaloraError(
                    f"records {other} and {name}: {field} {item}".rstrip(),
                    expected=f"the same for {named}: {expected}",
                    found=digest,
                    remedy=f"the {_MEANING[field]} changed between the runs: restore it, or begin a new study",
                )


_MEANING = {
    "base": "base model",
    "adapter": "adapter that the runs start from",
    "source": "training data",
    "data": "training data or its order",
    "items": "held-out items",
    "rules": "rule's file",
    "parameters": "number of trained parameters",
}
