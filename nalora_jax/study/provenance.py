"""Checks that test items were read under one, previously fixed protocol, without dropped tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.method import statistics
from nalora_jax.method.rules import make
from nalora_jax.study.identity import check_records, rule_files
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import FILE, Record, Records


def checked_records(protocol: Protocol, store: Records) -> dict[str, Record]:
    """Reads a study's records, and checks them against rule files, tests and repository.

    Raises:
      NaloraError: a file is damaged, a record was altered, records do not belong together, a
        rule's file changed, a test has no record, or was made under another protocol.
    """
    tests = (
        store.tests()
    )  # before the records: a process lists a test as finished after it has written the record
    records = store.read()
    check_records(records)
    check_rules(protocol, records)
    check_tests(protocol, store, records, tests)
    return records


def check_rules(protocol: Protocol, records: Mapping[str, Record]) -> None:
    """Checks that the files of users' rules have not changed since the runs of their methods.

    Raises:
      NaloraError: a file changed.
    """
    for method in protocol.methods:
        current = _current_rules(protocol, method)
        recorded = [
            record["rules"]
            for record in records.values()
            if record["method"] == method and "rules" in record
        ]
        for rules in recorded:
            changed = [file for file, digest in current.items() if rules.get(file) != digest]
            if changed:
                raise NaloraError(
                    f"[methods.{method}]: {changed[0]}",
                    expected=f"the file of its runs, sha256 {str(rules.get(changed[0]))[:16]}",
                    found=f"another content, sha256 {current[changed[0]][:16]}",
                    remedy="restore it, or begin a new study in another folder",
                )


def _current_rules(protocol: Protocol, method: str) -> dict[str, str]:
    """Returns the digests of the files that define a method's mechanisms and statistics."""
    config = protocol.config(protocol.models[0], next(iter(protocol.tasks)), method, 1.0, 0)
    mechanisms = [make(text) for text in config.mechanisms]
    needed = {name for mechanism in mechanisms for name in mechanism.statistics}
    return rule_files([*map(type, mechanisms), *(statistics.get(name).values for name in needed)])


def check_tests(
    protocol: Protocol, store: Records, records: Mapping[str, Record], listed: Sequence[Mapping[str, Any]]
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
    digests = {str(entry["protocol"]) for entry in [*tests, *listed, *_committed_tests(protocol)]}
    earlier = sorted(digests - {protocol.digest, *protocol.respelled_from})
    if earlier:
        raise NaloraError(
            str(protocol.path),
            expected=f"the protocol that test items were read under, sha256 {earlier[0][:16]}",
            found=f"another protocol, sha256 {protocol.digest[:16]}",
            remedy="restore it, or begin a new study in another folder",
        )
    finished = {entry["id"]: entry["record"] for entry in listed if entry.get("record")}
    lost = [name for name, digest in finished.items() if records.get(name, {}).get("digest") != digest]
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
        raise NaloraError(
            str(protocol.path),
            expected="a committed protocol before test items are read",
            found="changes that are not committed" if tracked else "a file that git does not know",
            remedy="commit it; the tuning runs are kept",
        )
    return _git(protocol, "log", "-1", "--format=%H", "--", name)


def _committed_tests(protocol: Protocol) -> Iterator[dict[str, Any]]:
    """Yields all test records that were ever committed, including records deleted later."""
    history = _git(protocol, "log", "--format=", "-p", "-U0", "--no-ext-diff", "--", FILE) or ""
    for line in history.splitlines():
        if not line.startswith("+{"):
            continue
        try:
            record = json.loads(line[1:])
        except ValueError:  # not a record; the current file is checked when it is read
            continue
        if record.get("stage") == "test" and record.get("protocol"):
            yield record


def _git(protocol: Protocol, *arguments: str) -> str | None:
    """Returns git's output for the study's folder, or None if it fails or is not installed."""
    command = ["git", "-C", str(protocol.folder.resolve()), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        return None
    if result.returncode == 0:
        return result.stdout.strip()
    return None
