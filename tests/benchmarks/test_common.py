from __future__ import annotations

import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def common(script):
    return script("common")


def test_the_ratio_is_paired_and_its_interval_covers_it(common):
    drift = np.linspace(1, 5, 50)  # a machine that slows down does not change a paired ratio
    noise = 1 + 0.01 * np.random.default_rng(0).normal(size=50)
    found = common.ratio(1.2 * drift * noise, drift)
    assert found["pairs"] == 50
    assert found["low"] <= found["median"] <= found["high"]
    assert found["median"] == pytest.approx(1.2, abs=0.01)
    assert found["high"] - found["low"] < 0.02


def test_results_name_their_machine_and_command_and_other_cases_stay(common, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/part.py", "--model", "/home/me/model", "--steps", "3"])
    common.save("part", "one", {"value": common.summary([3.0, 1.0, 2.0])}, folder=tmp_path)
    alone = common.save("part", "two", {"value": 2, "path": "/home/me/model"}, folder=tmp_path)
    record = common.load("part", tmp_path)
    assert list(alone["cases"]) == ["two"]
    assert list(record["cases"]) == ["one", "two"]
    one = record["cases"]["one"]
    assert one["value"] == {"min": 1.0, "median": 2.0, "max": 3.0, "n": 3}
    assert set(one["machine"]) >= {"cpu", "cores", "flags", "versions", "python"}
    assert one["command"] == "python benchmarks/part.py --model .../model --steps 3"
    assert "/home" not in (tmp_path / "part.json").read_text()
