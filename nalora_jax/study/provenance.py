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

import contextlib
import functools
import hashlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nalora_jax.common.digests import digest_of, json_digest
from nalora_jax.errors import NaloraError
from nalora_jax.method import statistics
from nalora_jax.method.rules import make
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import RECORDS_FILE, Records, StudyRecord

_PACKAGE = Path(__file__).parents[1]
_SOURCES = {".py", ".cc", ".h"}
_LIBRARIES = {"nalora_jax", "jax", "numpy"}  # whose code or version is recorded
_RESTORE = "restore it, or begin a new study in another folder"
ADDED = ("rules", "base", "source", "digest")  # records of earlier versions lack them
# Fields that must agree: their description, and the fields of the records among which they must.
_SHARED = {
    "base": ("base model", ("model",)),
    "adapter": ("adapter that the runs start from", ("model", "task", "method")),
    "source": ("training data", ("model", "task")),
    "data": ("training data or its order", ("model", "task", "seed")),
    "items": ("held-out items", ("model", "task")),
    "rules": ("rule's file", ("model", "method")),
    "parameters": ("number of trained parameters", ("model", "task", "method")),
}


@functools.cache
def code_version() -> str:
    """Returns 12 digits of the sha256 of the package's Python and C++ sources, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in _SOURCES:
            name = str(path.relative_to(_PACKAGE))
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def rule_files(definitions: Iterable[Any]) -> dict[str, str]:
    """Returns the sha256, by file name, of users' files that define these classes and functions.

    Raises:
      NaloraError: a definition has no file, so a change of it could not be detected.
    """
    contents: dict[str, bytes] = {}
    for module in sorted({_module_of(each) for each in definitions}):
        if module.partition(".")[0] in _LIBRARIES:
            continue
        path = Path(getattr(sys.modules.get(module), "__file__", None) or "")
        if not path.is_file():
            raise NaloraError(
                f"rules of the module {module}",
                expected="a file, whose digest the records hold",
                found="a module without one",
                remedy="write the rule to a file and import it",
            )
        contents[path.name] = contents.get(path.name, b"") + path.read_bytes()
    return {name: digest_of(content) for name, content in contents.items()}


def _module_of(definition: Any) -> str:
    """Returns the name of the module that defines a class or function, also of a partial one."""
    while isinstance(definition, functools.partial):
        definition = definition.func
    # NumPy's ufuncs name no module.
    return getattr(inspect.unwrap(definition), "__module__", None) or "numpy"


def record_digest(record: Mapping[str, Any]) -> str:
    """Returns the sha256 of a record's JSON without its ``digest``."""
    content = {name: value for name, value in record.items() if name != "digest"}
    return json_digest(content, sort_keys=True)


def old_records(records: Mapping[str, StudyRecord]) -> list[str]:
    """Returns the ids of the records that an earlier version wrote without all digests."""
    return [name for name, record in records.items() if not set(ADDED) <= set(record)]


def describe_old(records: Mapping[str, StudyRecord]) -> str:
    """Returns the note that is printed if some records cannot be checked completely, else ""."""
    count = len(old_records(records))
    if not count:
        return ""
    return (
        f"{count} of {len(records)} records were made by an earlier version without digests of "
        "base weights, data source, rule files and the record: these are not checked"
    )


def check_records(records: Mapping[str, StudyRecord]) -> None:
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
    for field in _SHARED:
        _check_agreement(records, field)


def _check_agreement(records: Mapping[str, StudyRecord], field: str) -> None:
    """Checks that a field agrees among the records that share it; see `_SHARED`.

    Raises:
      NaloraError: two records differ.
    """
    meaning, group = _SHARED[field]
    # By the group's values and the name of the items: the first record that has a digest, and it.
    first: dict[tuple[Any, ...], tuple[str, Any]] = {}
    for name, record in records.items():
        place = {key: record.get(key) for key in group}
        values = record.get(field)
        if field != "items" or not isinstance(values, Mapping):
            values = {"": values}  # items have several digests by name
        for item, digest in values.items():
            if digest is None:
                continue
            key = (*place.values(), item)
            other, known = first.setdefault(key, (name, digest))
            if digest != known:
                where = f"records {other} and {name}: {field} {item}".rstrip()
                shared = ", ".join(f"{kind} {value}" for kind, value in place.items())
                remedy = f"the {meaning} changed between the runs: restore it, or begin a new study"
                raise NaloraError(
                    where,
                    expected=f"the same for {shared}: {known}",
                    found=digest,
                    remedy=remedy,
                )


# ---------------------------------------------------------------- a protocol that was fixed before


def checked_records(protocol: Protocol, store: Records) -> dict[str, StudyRecord]:
    """Reads a study's records, and checks them against rule files, tests and repository.

    Raises:
      NaloraError: a file is damaged, a record was altered, records do not belong together, a
        rule's file changed, a test has no record, or was made under another protocol.
    """
    # Before the records: a process lists a test as finished after it has written the record.
    tests = store.tests()
    records = store.read()
    check_records(records)
    check_rules(protocol, records)
    check_tests(protocol, store, records, tests)
    return records


def check_rules(protocol: Protocol, records: Mapping[str, StudyRecord]) -> None:
    """Checks that the files of users' rules have not changed since the runs of their methods.

    Raises:
      NaloraError: a file changed.
    """
    for method in protocol.methods:
        current = _current_rules(protocol, method)
        for record in records.values():
            if record["method"] != method or "rules" not in record:
                continue
            for file, digest in current.items():
                recorded = record["rules"].get(file)
                if recorded != digest:
                    raise NaloraError(
                        f"[methods.{method}]: {file}",
                        expected=f"the file of its runs, sha256 {str(recorded)[:16]}",
                        found=f"another content, sha256 {digest[:16]}",
                        remedy=_RESTORE,
                    )


def _current_rules(protocol: Protocol, method: str) -> dict[str, str]:
    """Returns the digests of the files that define a method's mechanisms and statistics."""
    task = next(iter(protocol.tasks))
    config = protocol.config(protocol.models[0], task, method, 1.0, 0)
    definitions: list[Any] = []
    for text in config.mechanisms:
        mechanism = make(text)
        definitions.append(type(mechanism))
        definitions += [
            statistics.get_statistic(name).values for name in mechanism.statistics
        ]
    return rule_files(definitions)


def check_tests(
    protocol: Protocol,
    store: Records,
    records: Mapping[str, StudyRecord],
    listed: Sequence[Mapping[str, Any]],
) -> None:
    """Checks that all tests were made under this protocol, and that finished tests have records.

    Tests are known from the records, from the list of tests in the study's folder, and from earlier
    versions of the records in the repository's history.

    Args:
      protocol: protocol of the study.
      store: its files.
      records: its finished runs.
      listed: its list of tests, read before the records.

    Raises:
      NaloraError: test items were read under another protocol, or the record of a finished test is
        missing or altered.
    """
    tests = [record for record in records.values() if record["stage"] == "test"]
    known = [*tests, *listed, *_committed_tests(protocol)]
    digests = {str(test["protocol"]) for test in known}
    earlier = sorted(digests - {protocol.digest, *protocol.respelled_from})
    if earlier:
        under = f"sha256 {earlier[0][:16]}"
        raise NaloraError(
            str(protocol.path),
            expected=f"the protocol that test items were read under, {under}",
            found=f"another protocol, sha256 {protocol.digest[:16]}",
            remedy=_RESTORE,
        )
    finished = {entry["id"]: entry["record"] for entry in listed if entry.get("record")}
    lost = []
    for name, digest in finished.items():
        if name not in records or records[name].get("digest") != digest:
            lost.append(name)
    if lost:
        raise NaloraError(
            str(store.path),
            expected=f"the record of every finished test in {store.tests_path.name}",
            found=f"{len(lost)} missing or altered: {', '.join(lost[:3])}",
            remedy="restore the record file, or begin a new study in another folder",
        )


def check_committed(protocol: Protocol) -> str | None:
    """Returns the commit with the protocol's current content; None without a git repository.

    Raises:
      NaloraError: the protocol is in a repository but has uncommitted changes, so it might have
        been written after the results were known.
    """
    if _git(protocol, "rev-parse", "--is-inside-work-tree") != "true":
        return None
    name = protocol.path.name
    tracked = _git(protocol, "ls-files", "--error-unmatch", name) is not None
    if not tracked or _git(protocol, "status", "--porcelain", "--", name):
        expected = "a committed protocol before test items are read"
        remedy = "commit it; the tuning runs are kept"
        if tracked:
            found = "changes that are not committed"
        else:
            found = "a file that git does not know"
        raise NaloraError(
            str(protocol.path), expected=expected, found=found, remedy=remedy
        )
    return _git(protocol, "log", "-1", "--format=%H", "--", name)


def _committed_tests(protocol: Protocol) -> Iterator[dict[str, Any]]:
    """Yields all test records that were ever committed, including records deleted later."""
    options = ("--format=", "-p", "-U0", "--no-ext-diff")
    history = _git(protocol, "log", *options, "--", RECORDS_FILE) or ""
    for line in history.splitlines():
        if not line.startswith("+{"):
            continue
        # Not a record: the current file is checked when it is read.
        with contextlib.suppress(ValueError):
            record = json.loads(line[1:])
            if record.get("stage") == "test" and record.get("protocol"):
                yield record


def _git(protocol: Protocol, *arguments: str) -> str | None:
    """Returns git's output for the study's folder, or None if it fails or is not installed."""
    command = ["git", "-C", str(protocol.folder.resolve()), *arguments]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:
        return None
    if result.returncode:
        return None
    return result.stdout.strip()
