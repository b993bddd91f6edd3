"""Runs of a tiny study: shared programs, pairs, interruption, other processes, and what stops a
study."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nalora_jax.__main__ import main
from nalora_jax.common import trees
from nalora_jax.errors import NaloraError, TrainingDivergedError
from nalora_jax.kinds import text
from nalora_jax.study import execution
from nalora_jax.study.planned_runs import Run, list_pending, list_runs
from nalora_jax.study.protocol import Protocol, read_protocol
from nalora_jax.study.records import (
    Records,
    StudyRecord,
    exact_values,
    read_snapshot,
    write_snapshot,
)
from nalora_jax.study.resources import Resources
from nalora_jax.study.study_progress import RunInProgress
from nalora_jax.study.study_report import status
from nalora_jax.study.verification import verify_records
from tests.study.conftest import assert_starts_alone, write_study


@pytest.fixture(scope="module")
def resources(base: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Resources:
    """Shared by the tests, as the runs of a real process share theirs."""
    return Resources(read_protocol(write_study(tmp_path_factory.mktemp("shared"), base, questions)))


@pytest.fixture(scope="module")
def finished(resources: Resources) -> Path:
    """The folder of a finished study."""
    folder = resources.protocol.folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "Resources", lambda *_: resources)
        assert main(["study", "run", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def records(finished: Path) -> list[StudyRecord]:
    return list(Records(finished).read().values())


def by(records: list[StudyRecord], **wanted: Any) -> StudyRecord:
    (found,) = [one for one in records if all(one[name] == value for name, value in wanted.items())]
    return found


def test_a_method_is_compiled_once_for_all_its_rates_and_seeds(records: list[StudyRecord]) -> None:
    compiled: dict[tuple[str, str], list[int]] = {}
    for one in records:
        compiled.setdefault((one["method"], one["stage"]), []).append(one["compilations"])
    assert not any(sum(counts[1:]) for counts in compiled.values())
    assert compiled["lora", "tune"][0] > 0
    assert compiled["half", "tune"][0] <= 3  # its own step; the model's other programs are there
    assert compiled["again", "tune"][0] == 0  # another seed is no other method


def test_runs_of_a_pair_share_data_initial_adapters_and_items(
    records: list[StudyRecord], resources: Resources
) -> None:
    for seed in (1, 2):
        pair = [
            by(records, stage="test", method=method, seed=seed)
            for method in ("lora", "half", "again")
        ]
        assert len({json.dumps([one["items"], one["data"]]) for one in pair}) == 1
    assert len({one["data"] for one in records}) == 3  # one order per seed
    assert len({json.dumps(one["items"]) for one in records if one["stage"] == "tune"}) == 1
    a, starts = "layers/ffn/gate_proj/a", {}
    for run in (run for run in list_runs(resources.protocol, {}) if run.rate == 1e-2):
        data = resources.subject(run.config).data(run.config)
        starts[run.cell.method] = trees.flatten(resources.start(run, data).lora)[a]
    np.testing.assert_array_equal(starts["lora"], starts["half"])
    assert not np.allclose(starts["lora"], starts["again"])
    assert_starts_alone(text, list_runs(resources.protocol, {})[0], resources)


def test_the_curve_has_every_evaluation_and_only_tests_read_the_test_items(
    records: list[StudyRecord],
) -> None:
    for one in records:
        assert [point["step"] for point in one["curve"]] == [0, 4, 8]
        assert one["curve"][-1]["loss"] == one["validation"]["loss"] < one["curve"][0]["loss"]
        assert ("test" in one) == ("test" in one["items"]) == (one["stage"] == "test")
        assert one["validation"]["n"] == 20
    test = by(records, stage="test", method="lora", seed=1)
    assert test["test"]["n"] == 20
    assert 0 <= test["test"]["accuracy"] <= 1
    assert test["probes"]["z_again"]["before"] > test["probes"]["z_again"]["loss"]


def test_a_finished_study_has_nothing_left_to_do(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "records.jsonl").read_bytes()
    assert execution.run_study(read_protocol(finished)) == 0
    assert (finished / "records.jsonl").read_bytes() == before
    assert main(["study", "status", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert "15 done, 0 in progress, 0 to do" in shown
    assert "chosen 0.04 (at an end of the grid)" in shown


def test_an_interrupted_run_resumes_and_ends_with_the_record_of_an_uninterrupted_run(
    finished: Path, resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, snapshot = Records(finished).read(), tmp_path / "x.npz"
    runs = [run for run in list_runs(resources.protocol, records) if run.stage == "test"]
    run = next(run for run in runs if run.cell.method == "half")
    evaluate, seen = RunInProgress.evaluate, []

    def interrupted(bench: Any, step: int, state: Any) -> Any:
        seen.append(step)
        if step == 8 and len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate(bench, step, state)

    monkeypatch.setattr(RunInProgress, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execution.perform_all([run], resources, [snapshot])
    (again,) = execution.perform_all([run], resources, [snapshot])
    assert seen == [4, 8, 8]
    for name in ("curve", "test", "probes", "validation", "training"):
        assert exact_values(again[name]) == records[run.id][name]
    progress = RunInProgress(run, resources, snapshot)  # which is of step 8
    state = resources.start(run, progress.data)
    assert progress._resumed(state)[1] == 8
    progress.identity = progress.identity | {"code": "another"}
    assert progress._resumed(state)[1] == 0


def test_a_run_that_diverges_has_a_record_that_says_so(
    records: list[StudyRecord],
    resources: Resources,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise TrainingDivergedError("step 3: loss", expected="a finite number", found="nan")

    monkeypatch.setattr("nalora_jax.study.study_progress.run_steps", diverge)
    (record,) = execution.perform_all(
        list_runs(resources.protocol, {})[:1], resources, [tmp_path / "x.npz"]
    )
    assert record["diverged"]
    assert record["validation"] == {"loss": None}
    assert record["curve"] == records[0]["curve"][:1]


def test_records_are_reproduced_from_the_files_that_a_repository_holds(
    finished: Path, resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("protocol.toml", "records.jsonl", "tests.jsonl"):
        shutil.copy(finished / name, tmp_path / name)
    monkeypatch.setattr("nalora_jax.study.verification.Resources", lambda _: resources)
    text = verify_records(read_protocol(tmp_path), count=2)
    assert text.count(" in the record, ") >= 2
    assert "earlier version" not in text


def test_processes_share_a_study_and_no_run_is_done_twice(quick: Protocol) -> None:
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: counts.append(execution.run_study(quick))) for _ in range(3)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    records = Records(quick.folder).read()  # which refuses a run that has two
    assert list_pending(quick, records) == []
    assert (sum(counts), len(counts)) == (len(records), 3)


def test_the_budget_and_the_limit_end_a_study_early(quick: Protocol) -> None:
    assert execution.run_study(quick, limit=2) == 2
    budget = replace(quick, budget_hours=0.045)
    assert execution.run_study(budget) == 3  # 36 seconds each
    assert "5 done" in status(quick)
    assert "of 0.045 h" in status(budget)


def test_splits_that_share_records_are_refused(study: Path, resources: Resources) -> None:
    path = study / "protocol.toml"
    path.write_text(path.read_text().replace('test = "train[80%:]"', 'test = "train[70%:]"'))
    protocol = read_protocol(study)
    fresh, run = (
        Resources(protocol),
        Run(protocol, "test", list_runs(protocol, {})[0].cell, 1e-2, 1),
    )
    fresh._made = {type(s): s for s in (resources.subject(run.config),)}  # its model is loaded
    with pytest.raises(NaloraError, match="shares 30 with it"):
        fresh.test_items(run)


def test_a_record_is_flushed_to_disk_before_its_run_counts_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path)
    flushed: list[int] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size)
    )
    records.append({"id": "a"})
    assert flushed == [records.path.stat().st_size]


def test_an_incomplete_last_line_is_removed_and_a_second_record_of_a_run_is_an_error(
    tmp_path: Path,
) -> None:
    records = Records(tmp_path)
    records.append({"id": "a"})
    with records.path.open("a") as file:
        file.write('{"id": "b", "lo')
    assert set(records.read()) == {"a"}
    records.append({"id": "c"})
    assert list(records.read()) == ["a", "c"]
    records.append({"id": "a"})
    with pytest.raises(NaloraError, match="line 3: expected a record of a run that has none yet"):
        records.read()


def test_a_run_with_a_damaged_snapshot_starts_from_scratch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.npz"
    write_snapshot(path, {"step": np.int32(7)}, {"loss": 1 / 3})
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged in (
        content[:-9],
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    ):
        path.write_bytes(damaged)
        assert read_snapshot(path) is None
    assert caplog.text.count("the snapshot run.npz is damaged: the run starts from scratch") == 2
