"""Freed memory goes back to the system, and a step's buffers do not."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLDS = """
from nalora_jax.train.compilation import release_heap, retain_heap

def held():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) // 1024

blocks = [b"x" * (100_000 + i % 7) for i in range(2000)]
above = bytes(100_000)  # keeps the heap from shrinking by itself
for i in range(len(blocks)):
    blocks[i] = None
before = held()
release_heap()
print(before - held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_blocks_below_a_used_one_are_handed_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLDS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150  # MB of the 200
