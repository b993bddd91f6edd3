"""The studies of this repository: their protocols are whole, and their records belong to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nalora_jax.config import RunConfig
from nalora_jax.study.plan import wanted
from nalora_jax.study.protocol import Protocol, read_protocol
from nalora_jax.study.provenance import checked_records
from nalora_jax.study.records import Records
from nalora_jax.study.report import render_results

STUDIES = Path(__file__).parents[2] / "studies"
FOLDERS = sorted(path.parent for path in STUDIES.glob("*/protocol.toml"))


def _first(protocol: Protocol, task: str) -> RunConfig:
    return protocol.config(protocol.models[0], task, protocol.baseline, protocol.rates[0], 0)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_and_records_of_a_committed_study_are_its_own(folder: Path) -> None:
    protocol = read_protocol(folder)
    records = checked_records(protocol, Records(folder))  # records of earlier versions stay valid
    assert (folder / "results.md").read_text().startswith(render_results(protocol, records))
    assert records.keys() <= {run.id for run in wanted(protocol, records)}
    of_text = [t for name, t in protocol.tasks.items() if not _first(protocol, name).vision.task]
    assert all(task.test_items >= 100 for task in of_text)
    readme = (folder / "README.md").read_text()
    assert f"nalora study run studies/{folder.name}" in readme
    for heading in ("**Question.**", "**Protocol**", "**Budget.**"):
        assert heading in readme
