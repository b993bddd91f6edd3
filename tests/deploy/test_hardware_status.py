"""docs/hardware_status.md agrees with the recorded results."""

from __future__ import annotations

import json
import re

from tests.deploy.sandbox import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "hardware_status.md").read_text()


def rows() -> dict[str, list[str]]:
    """Returns the cells of each machine's row: run, compiled, estimated, versions."""
    table = PAGE.split("## Launchers")[0]
    lines = re.findall(r"^\| ([^|`]*`([\w:-]+)`[^|]*) \|(.*)\|$", table, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for _, name, cells in lines}


def test_a_machine_is_marked_as_run_if_it_has_results() -> None:
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()} - {"own"}  # new measurements
    assert {name for name, cells in rows().items() if cells[0].startswith("yes")} == folders


def test_a_machine_is_marked_as_compiled_with_the_models_that_were_compiled_for_it() -> None:
    lines = map(json.loads, (RESULTS / "pods.jsonl").read_text().splitlines())
    models: dict[str, set[str]] = {}
    for line in lines:
        models.setdefault(line["topology"], set()).add(line["model"])
    for name, compiled in models.items():
        assert re.fullmatch(rf"yes, 20\d\d-\d\d-\d\d, {len(compiled)} models", rows()[name][1]), name


def test_every_file_of_deploy_has_a_status() -> None:
    for path in (ROOT / "deploy").iterdir():
        assert f"`deploy/{path.name}`" in PAGE
