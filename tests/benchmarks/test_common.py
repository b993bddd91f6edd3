from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def common():
    path = Path(__file__).parents[2] / "benchmarks" / "common.py"
    spec = importlib.util.spec_from_file_location("benchmarks_common", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


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
        common.run_process([sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)"])


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


def test_results_name_their_machine_and_command(common, tmp_path):
    path = common.write("one", {"value": common.summary([3.0, 1.0, 2.0])}, folder=tmp_path)
    record = json.loads(path.read_text())
    assert record["value"] == {"min": 1.0, "median": 2.0, "max": 3.0, "n": 3}
    assert set(record["machine"]) >= {"cpu", "cores", "flags", "versions", "python"}
    assert record["command"].startswith("python ")
