"""The page of figures, made from small recorded ones; and what each part reads out of its record."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MACHINE = {
    "cpu": "Abacus 9",
    "cores": 2,
    "flags": {"avx2": True, "avx512f": False, "amx_bf16": False},
    "memory_gb": 8.0,
    "system": "Linux",
    "python": "3.11.7",
    "versions": {"jax": "0.10.2", "peft": "0.21.2"},
}


@pytest.fixture(scope="module")
def run(script):
    return script("run")


def _write(folder: Path, part: str, case: str, found: dict, machine: dict = MACHINE) -> None:
    folder.mkdir(exist_ok=True)
    entry = {"machine": machine, "command": f"python benchmarks/{part}.py --some flags", **found}
    (folder / f"{part}.json").write_text(json.dumps({"cases": {case: entry}}))


def _versus(ours: list[float], theirs: list[float]) -> dict:
    def runs(speeds: list[float], memory: float) -> list[dict]:
        return [{"tokens_per_second": speeds, "peak_rss_mb": memory}]

    settings = {"dtype": "bfloat16", "shape": "8x128", "checkpointing": False}
    return {"settings": settings, "runs": {"nalora_jax": runs(ours, 1000.0), "peft": runs(theirs, 2000.0)}}


def test_the_figures_state_required_and_measured_machine_and_command(run, tmp_path, monkeypatch):
    _write(
        tmp_path / "abacus",
        "versus_peft",
        "bfloat16 8x128",
        _versus([590.0, 600.0, 610.0], [790.0, 800.0, 830.0]),
    )
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "versus_peft.md").write_text("Where the rest goes: elementwise passes.\n")
    monkeypatch.setattr(run.pages, "NOTES", tmp_path / "notes")
    page, figures = run.pages.render(run.NAMES, tmp_path), run.pages.details(run.NAMES, tmp_path)
    speed = "| tokens/s, bfloat16 8x128 | 600 (590 to 610) | 800 (790 to 830) | 0.75 | at least 1.2 | **missed** |"
    memory = "| peak memory, bfloat16 8x128 | 1,000 MB | 2,000 MB | 0.50 | at most 0.8 | met |"
    for text in (page, figures):
        assert speed in text
        assert memory in text
    others = ", ".join(
        name for name in run.NAMES if name not in ("versus_peft", "tpu", "tpu_ffn", "accelerator")
    )
    assert f"1 of 2 measured ratios are as required. Not measured here: {others}." in page
    assert (
        "Abacus 9 (avx2, no AMX), 2 cores, 8 GB; Python 3.11, jax 0.10.2, peft 0.21.2"
        in figures.replace("3.11.7", "3.11")
    )
    assert "- `python benchmarks/versus_peft.py --some flags`" in figures
    assert "[versus_peft.md](versus_peft.md)" in figures


def test_every_machine_has_its_own_table_and_its_own_requirements(run, tmp_path):
    tiles = {**MACHINE, "cpu": "Tiles 1", "generation": "Mosaic", "flags": {"avx2": True, "amx_bf16": True}}
    for name, machine in (("abacus", MACHINE), ("tiles", tiles)):
        _write(tmp_path / name, "versus_peft", "bfloat16 8x128", _versus([1.3], [1.0]), machine)
    page, figures = run.pages.render(run.NAMES, tmp_path), run.pages.details(run.NAMES, tmp_path)
    for machine, required, verdict in (
        ("Abacus 9, AVX2 only", "1.2", "met"),
        ("Tiles 1 (Mosaic), AMX", "1.4", "**missed**"),
    ):
        part = page.split(f"## {machine}\n")[1].split("## ")[0]
        assert f"| tokens/s, bfloat16 8x128 | 1 | 1 | 1.30 | at least {required} | {verdict} |" in part
        assert figures.count(f"**{machine}**") == 1
    assert figures.count(f"## {importlib.import_module('versus_peft').TITLE}") == 1


def test_a_machine_s_table_is_short_and_keeps_what_missed(run, tmp_path):
    cases = {}
    for i in range(20):
        cases[f"bfloat16 8x{i}"] = {
            "machine": MACHINE,
            "command": "x",
            **_versus([1.0 if i == 19 else 2.0], [1.0]),
        }
    (tmp_path / "abacus").mkdir()
    for i, case in enumerate(run.pages.HEADLINES["versus_peft"]):
        cases[case.split(", ", 1)[1]] = cases[f"bfloat16 8x{i}"]
    (tmp_path / "abacus" / "versus_peft.json").write_text(json.dumps({"cases": cases}))
    run.pages.ROWS, rows = 3, run.pages.ROWS
    try:
        page = run.pages.render(run.NAMES, tmp_path)
    finally:
        run.pages.ROWS = rows
    table = [line for line in page.splitlines() if line.startswith("| Training")]
    assert len(table) == 3
    assert [line for line in table if "missed" in line] == [line for line in table if "8x19 " in line] != []


def test_the_committed_pages_are_what_the_committed_figures_give(run):
    page = run.pages.render(run.NAMES)
    assert run.pages.PAGE.read_text() == page, "run: python benchmarks/run.py --page"
    assert run.pages.FIGURES.read_text() == run.pages.details(run.NAMES), (
        "run: python benchmarks/run.py --page"
    )
    assert len(page.splitlines()) <= 200
    for machine in page.split("\n## ")[1:]:
        assert machine.count("\n| ") - 2 <= run.pages.ROWS == 15
    names = {
        row.what
        for found in run.pages.recorded(run.common.PUBLISHED, run.NAMES)
        for row in found.module.rows(found.record)
    }
    assert {what for whats in run.pages.HEADLINES.values() for what in whats} <= names


def test_committed_figures_lie_under_the_name_of_their_machine(run, script):
    machines = script("machines")
    for path in run.common.PUBLISHED.glob("*/*.json"):
        if path.parent in (run.common.OWN, run.common.QUICK):
            continue
        for case in json.loads(path.read_text())["cases"].values():
            assert machines.machine_name(case["machine"]) == path.parent.name, path


def test_own_figures_replace_the_committed_ones_only_when_they_are_published(run, tmp_path):
    published, own = tmp_path / "results", tmp_path / "results" / "own"
    published.mkdir()
    _write(published / "abacus", "versus_peft", "bfloat16 8x128", _versus([1.0], [1.0]))
    _write(published / "abacus", "packed", "kept", {"value": 1})
    own.mkdir()
    _write(own / "abacus", "versus_peft", "float32 8x128", _versus([3.0], [1.0]))
    _write(own / "abacus", "packed", "kept", {"value": 2})
    run.common.OWN, before = own, run.common.OWN
    try:
        assert [found.part for found in run.pages.recorded(published, run.NAMES)] == [
            "versus_peft",
            "packed",
        ]
    finally:
        run.common.OWN = before
    (written,) = run.publish(["versus_peft"], own, published)
    assert written == published / "abacus" / "versus_peft.json"
    cases = json.loads(written.read_text())["cases"]
    assert list(cases) == ["bfloat16 8x128", "float32 8x128"]
    assert cases["float32 8x128"]["runs"]["nalora_jax"][0]["tokens_per_second"] == [3.0]
    assert json.loads((published / "abacus" / "packed.json").read_text())["cases"]["kept"]["value"] == 1


def test_every_part_names_options_that_its_script_has(run):
    for part in run.PARTS:
        source = (BENCHMARKS / f"{part.name}.py").read_text() + (BENCHMARKS / "common.py").read_text()
        flags = {
            word for line in (*part.runs, part.quick) for word in line.split() if word.startswith("--")
        }
        assert all(f'"{flag}"' in source for flag in flags), part.name


@pytest.mark.parametrize("amx", [True, False])
def test_what_is_required_depends_on_the_cpu(run, amx):
    versus = importlib.import_module("versus_peft")
    machine = {**MACHINE, "flags": {"amx_bf16": amx}}
    speed, memory = versus.rows({"cases": {"one": {"machine": machine, **_versus([1.3], [1.0])}}})
    assert (speed.verdict == "met") == (not amx)  # 1.4 with AMX, 1.2 without
    assert memory.limit.value == (0.5 if amx else 0.8)
    other = _versus([0.9], [1.0])
    other["settings"]["architecture"] = "qwen3.5"
    speed, memory = versus.rows({"cases": {"one": {"machine": machine, **other}}})
    assert (speed.limit.value, speed.verdict, memory.limit) == (0.8, "met", None)


def test_the_least_flops_of_a_step_are_those_of_its_products(run):
    flops = importlib.import_module("flops")
    # One layer, one token: by hand. d 576, ff 1536, heads 9 of 64, 3 key heads, rank 8, 49152 tokens; no target.
    projections = 576 * 64 * (2 * 9 + 2 * 3)
    ffn, adapters, attention = 3 * 576 * 1536, 3 * 8 * (576 + 1536), 4 * 9 * 64
    forward = 2 * (projections + ffn + adapters) + attention
    backward = (
        2 * 1536 * 576 + 4 * adapters - 2 * 2 * 8 * 576
    )  # through down alone; adapters of gate and up need no dx
    assert flops.minimum(1, 1, 1) == forward + backward


def test_ratios_of_rounds_are_paired(run):
    tables = importlib.import_module("tables")
    speeds = {"nalora_jax": (1.0, 10.0, 3.0), "peft": (1.0, 5.0, 2.0)}
    runs = {name: [{"speed": [value]} for value in values] for name, values in speeds.items()}
    row = tables.paired_runs("speed", runs, "peft", "speed", None)
    assert (row.ratio, row.spread) == (1.5, "1.000 to 2.00")
