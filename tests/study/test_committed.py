"""The studies of this repository: their protocols are whole, and their records belong to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nalora_jax.study.plan import wanted
from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.records import Records

STUDIES = Path(__file__).parents[2] / "studies"
FOLDERS = sorted(path.parent for path in STUDIES.glob("*/protocol.toml"))


def test_there_are_studies() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_committed_study_can_be_read_and_its_records_are_its_own(folder: Path) -> None:
    protocol, records = read_protocol(folder), Records(folder).read()
    assert records.keys() <= {run.id for run in wanted(protocol, records)}
    assert {task.test_items for task in protocol.tasks.values()} == {1000}
    readme = (folder / "README.md").read_text()
    assert f"nalora study run studies/{folder.name}" in readme
    for heading in ("**Question.**", "**Protocol**", "**Budget.**"):
        assert heading in readme
