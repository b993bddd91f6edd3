"""Refusals of the study's functions: a call on a study without records, and a part of its message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.study import execution, planned_runs, provenance, study_report, verification
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Records


def digest_a_typed_rule(_: Protocol) -> None:
    definitions: dict[str, Any] = {"__name__": "typed_in"}
    exec("def double(averages, context): return 2.0", definitions)
    provenance.rule_files([definitions["double"]])


def read_a_foreign_list_of_tests(protocol: Protocol) -> None:
    records = Records(protocol.folder)
    records.tests_path.write_text('{"name": "a"}\n')
    records.tests()


def append_to_a_folder(protocol: Protocol) -> None:
    records = Records(protocol.folder)
    records.path.mkdir()
    records.append({"id": "a"})


REFUSALS: dict[str, tuple[Callable[[Protocol], Any], str]] = {
    "an unknown method": (
        lambda protocol: execution.run_study(protocol, methods=["abacus"]),
        "--methods: expected methods of .*: lora, half, again, found abacus",
    ),
    "a loss that no record has": (
        lambda _: planned_runs.cost("loss", {"accuracy": 0.5}),
        "records: loss: expected a number, found none; restore the record file",
    ),
    "a rule without a file": (
        digest_a_typed_rule,
        "rules of the module typed_in: expected a file, .*found a module without one",
    ),
    "tests without an id": (
        read_a_foreign_list_of_tests,
        "tests.jsonl: line 1: expected id and protocol of a test, found name",
    ),
    "records that cannot be written": (
        append_to_a_folder,
        "records.jsonl: expected to append a line, found .*Is a directory.*make room",
    ),
    "a report of no run": (
        study_report.write_tables,
        "records.jsonl: expected records of finished runs, found none; run it first",
    ),
    "a repetition of no run": (
        verification.verify_records,
        "expected at least one finished run, found none",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_refused(name: str, quick: Protocol) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(NaloraError, match=message):
        call(quick)
