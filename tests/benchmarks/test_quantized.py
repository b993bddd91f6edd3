"""The table that the quantization benchmark makes of its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    "path", sorted(BENCHMARKS.glob("results/*/quantized.json")), ids=lambda path: path.parent.name
)
def test_a_stored_result_has_a_row_for_each_kind_and_four_bits_meet_the_bound(path, script):
    quantized = script("quantized")
    record = json.loads(path.read_text())
    (row,) = [row for row in quantized.rows(record) if row.limit]
    assert row.verdict == "met"
    _, _, *rows = quantized.table(record).splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(quantized.KINDS)
    assert "(1.00)" in rows[0]
    kernels = {kind: found["bytes"]["kernels"] for kind, found in record["cases"].items()}
    assert kernels["nf4"] <= 0.35 * kernels["bfloat16"]
    others = {"cases": {kind: found for kind, found in record["cases"].items() if kind != "bfloat16"}}
    assert quantized.rows(others) == []
    assert [row.split(" | ")[1] for row in quantized.table(others).splitlines()[2:]] == [
        f"{kernels[kind] / 1e6:.0f}" for kind in quantized.KINDS[1:]
    ]
