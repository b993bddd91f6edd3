"""Studies whose protocol, records, data, base or rules were changed, and those of this
repository."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nalora_jax.__main__ import main
from nalora_jax.errors import NaloraError
from nalora_jax.method.rules import MECHANISMS
from nalora_jax.study import execution
from nalora_jax.study.planned_runs import Run, list_runs
from nalora_jax.study.protocol import Protocol, read_protocol
from nalora_jax.study.provenance import (
    check_committed,
    check_records,
    check_rules,
    checked_records,
    record_digest,
)
from nalora_jax.study.records import Records, StudyRecord
from nalora_jax.study.resources import Resources
from nalora_jax.study.study_progress import RunInProgress
from nalora_jax.study.study_report import render_results, status, write_tables

STUDIES = Path(__file__).parents[2] / "studies"
COMMITTED = sorted(path.parent for path in STUDIES.glob("*/protocol.toml"))
OTHER_PROTOCOL = "expected the protocol that test items were read under"


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    )


def commit(folder: Path, name: str) -> None:
    git(folder, "add", name)
    git(folder, "commit", "-m", name)


def edit(protocol: Protocol, old: str, new: str) -> Protocol:
    text = protocol.path.read_text()
    assert old in text
    protocol.path.write_text(text.replace(old, new))
    return read_protocol(protocol.path)


def test_no_test_item_is_read_before_the_protocol_is_committed(quick: Protocol) -> None:
    folder = quick.folder
    git(folder, "init")
    with pytest.raises(NaloraError, match="expected a committed protocol .*, found a file that"):
        execution.run_study(quick)
    records = Records(folder).read()
    assert {record["stage"] for record in records.values()} == {"tune"}
    assert Records(folder).tests() == []
    commit(folder, "protocol.toml")
    execution.run_study(quick)
    tests = [record for record in Records(folder).read().values() if record["stage"] == "test"]
    assert len({record["commit"] for record in tests}) == 1
    assert len(tests[0]["commit"]) == 40
    with quick.path.open("a") as file:
        file.write("# later\n")
    with pytest.raises(NaloraError, match="found changes that are not committed"):
        check_committed(quick)


def test_a_protocol_that_changes_after_the_tests_is_refused_by_run_report_and_verify(
    quick: Protocol, capsys: pytest.CaptureFixture[str]
) -> None:
    execution.run_study(quick)
    results = quick.folder / "results.md"
    results.write_text("as it was")
    edit(quick, "test_seeds = [1, 2]", "test_seeds = [1, 2, 3]")
    for action in ("run", "report", "verify"):
        assert main(["study", action, str(quick.folder)]) != 0
        assert OTHER_PROTOCOL in capsys.readouterr().err
    assert results.read_text() == "as it was"


def test_tests_in_the_repositorys_history_count_after_their_files_were_deleted(
    quick: Protocol,
) -> None:
    folder = quick.folder
    git(folder, "init")
    commit(folder, "protocol.toml")
    execution.run_study(quick)
    commit(folder, "records.jsonl")
    for name in ("records.jsonl", "tests.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / ".runs")
    changed = edit(quick, "test_seeds = [1, 2]", "test_seeds = [3, 4]")
    commit(folder, "protocol.toml")
    with pytest.raises(NaloraError, match=OTHER_PROTOCOL):
        execution.run_study(changed)
    respelled = edit(changed, "extend = 1", f'extend = 1\nrespelled_from = ["{quick.digest}"]')
    assert checked_records(respelled, Records(folder)) == {}


def test_a_test_is_listed_before_it_reads_test_items(
    quick: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    perform_all = execution.perform_all

    def killed(runs: Sequence[Run], *arguments: Any) -> list[StudyRecord]:
        if runs[0].stage == "test":
            raise KeyboardInterrupt
        return perform_all(runs, *arguments)

    monkeypatch.setattr(execution, "perform_all", killed)
    with pytest.raises(KeyboardInterrupt):
        execution.run_study(quick)
    (entry,) = Records(quick.folder).tests()
    assert (entry["protocol"], entry["record"]) == (quick.digest, None)
    with pytest.raises(NaloraError, match=OTHER_PROTOCOL):
        execution.run_study(edit(quick, "extend = 1", "extend = 2"))


def test_a_finished_test_that_was_altered_is_refused(quick: Protocol) -> None:
    execution.run_study(quick)
    store = Records(quick.folder)
    records = store.read()
    name = next(name for name, record in records.items() if record["stage"] == "test")
    altered = {**records[name], "test": {"loss": 0.0}}
    records[name] = altered | {"digest": record_digest(altered)}  # as a careful forger would
    store.path.write_text("".join(json.dumps(record) + "\n" for record in records.values()))
    for use in (status, write_tables):
        with pytest.raises(NaloraError, match=f"found 1 missing or altered: {name}"):
            use(quick)


@pytest.mark.parametrize("field", ["base", "source", "items", "data", "rules", "parameters"])
def test_records_that_differ_where_they_must_agree_are_refused(field: str) -> None:
    """Tuning runs too: these choose a rate together."""
    common = {"stage": "tune", "model": "m", "task": "t", "method": "a", "seed": 1}
    other = {"seed": 9} if field in ("rules", "parameters") else {"method": "b"}
    value = {"items": {"validation": "v"}, "rules": {"r.py": "1"}}.get(field, "1")
    changed = {"items": {"validation": "w"}, "rules": {"r.py": "2"}}.get(field, "2")
    first, second = common | {field: value}, common | other | {field: changed}
    check_records({"1": first, "2": second | {field: value}})
    check_records({"1": first, "2": common | other})  # a record of an earlier version
    with pytest.raises(NaloraError, match=f"records 1 and 2: {field}.*changed between the runs"):
        check_records({"1": first, "2": second})


RULE = """
from nalora_jax.method.rules import register_mechanism

@register_mechanism("of_a_user", statistics=("slope",))
def of_a_user(averages, context):
    return {factor} + averages["slope"]
"""


def test_a_method_whose_rule_file_changed_after_its_runs_is_refused(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MECHANISMS, "_values", dict(MECHANISMS._values))
    rule = study / "my_rule.py"
    rule.write_text(RULE.replace("{factor}", "1.0"))
    text = (study / "protocol.toml").read_text()
    method = '\n[methods.mine]\nsettings.mechanisms = ["of_a_user"]\n'
    (study / "protocol.toml").write_text('imports = ["my_rule.py"]' + text + method)
    protocol = read_protocol(study)
    run = next(run for run in list_runs(protocol, {}) if run.cell.method == "mine")
    identity = RunInProgress(run, Resources(protocol), study / "x.npz").identity
    assert list(identity["rules"]) == ["my_rule.py"]
    record = {"id": run.id, "stage": "tune", "seed": 0, **run.cell._asdict(), **identity}
    check_rules(protocol, {run.id: record})
    rule.write_text(RULE.replace("{factor}", "2.0"))
    with pytest.raises(
        NaloraError, match=r"\[methods.mine\]: my_rule.py: expected the file of its runs"
    ):
        check_rules(protocol, {run.id: record})
    del record["rules"]  # a record of an earlier version
    check_rules(protocol, {run.id: record})


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_the_tables_of_a_committed_study_are_rendered_from_its_records(folder: Path) -> None:
    protocol = read_protocol(folder)
    records = checked_records(protocol, Records(folder))  # records of earlier versions stay valid
    assert (folder / "results.md").read_text().startswith(render_results(protocol, records))
    assert records.keys() <= {run.id for run in list_runs(protocol, records)}
