from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def common(script):
    return script("common")


def test_pairs_alternate_in_random_order_and_wait_for_the_result(common):
    calls = []
    found = common.alternate(lambda: calls.append("a"), lambda: calls.append("b"), pairs=30, warmup=1)
    assert len(found.first) == len(found.second) == 30
    pairs = [tuple(calls[i : i + 2]) for i in range(2, len(calls), 2)]
    assert {("a", "b"), ("b", "a")} == set(pairs)


def test_the_ratio_is_paired_and_its_interval_covers_it(common):
    drift = np.linspace(1, 5, 50)  # a machine that slows down does not change a paired ratio
    noise = 1 + 0.01 * np.random.default_rng(0).normal(size=50)
    found = common.ratio(1.2 * drift * noise, drift)
    assert found["pairs"] == 50
    assert found["low"] <= found["median"] <= found["high"]
    assert found["median"] == pytest.approx(1.2, abs=0.01)
    assert found["high"] - found["low"] < 0.02


def test_a_process_s_last_line_is_its_record(common):
    found = common.run_process([sys.executable, "-c", "print('noise'); print('{\"x\": 1}')"])
    assert found.record == {"x": 1}
    assert found.seconds > 0
    with pytest.raises(RuntimeError, match=r"exit 3.*broken"):
        common.run_process(
            [sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)"]
        )


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import common
block = bytearray(int(sys.argv[2]) << 20)
del block
print('{"peak": %f}' % common.peak_rss_mb())
"""


def test_peak_memory_is_the_process_s_own_whatever_its_parent_holds(common):
    ballast = np.ones(300 << 17)
    command = [sys.executable, "-c", PEAK, str(Path(common.__file__).parent)]
    small, large = (common.run_process([*command, size]).record["peak"] for size in ("1", "200"))
    assert small < ballast.nbytes >> 20
    assert large - small == pytest.approx(199, abs=20)


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


def test_rounds_are_added_to_those_recorded(common, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common.save, "__defaults__", (tmp_path,))
    monkeypatch.setattr(common.load, "__defaults__", (tmp_path,))
    commands = {"a": [sys.executable, "-c", "print('{\"x\": [1, 2]}')"]}
    options = argparse.Namespace(rounds=2, add=False)
    common.compare("part", "case", commands, options)
    record = common.compare("part", "case", commands, argparse.Namespace(rounds=1, add=True), {"more": 1})
    runs = record["cases"]["case"]["runs"]
    assert common.values(runs["a"], "x") == [1, 2] * 3
    assert record["cases"]["case"]["more"] == 1
    record = common.compare("part", "case", commands, argparse.Namespace(rounds=1, add=False))
    assert len(record["cases"]["case"]["runs"]["a"]) == 1


def test_both_sides_of_a_comparison_get_large_pages(common):
    code = "import os, json; print(json.dumps({'found': os.environ['GLIBC_TUNABLES']}))"
    assert common.run_process([sys.executable, "-c", code]).record["found"] == "glibc.malloc.hugetlb=1"


def test_seconds_until_a_moment_count_from_the_start_of_the_process(common):
    code = (
        "import time, json; time.sleep(0.2); print(json.dumps({'done_at': time.time()})); time.sleep(0.3)"
    )
    measured = common.run_process([sys.executable, "-c", code])
    assert 0.2 < measured.record["seconds_until_done"] < measured.seconds - 0.29


def test_new_figures_are_written_to_a_folder_that_git_ignores(common):
    assert common.RESULTS.parent == common.OWN
    root = common.PUBLISHED.parents[1]
    assert f"{common.OWN.relative_to(root)}/" in (root / ".gitignore").read_text().split()


def test_a_comparison_shows_medians_and_their_ratio(common):
    cells = common.compared("memory", [2.0, 1.0, 6.0], [4.0], unit="MB")
    assert cells == ("memory", "2 MB (1 to 6)", "4 MB", "0.500")
    assert common.markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
