"""``python -m tests.mutants``: its verdicts, on a package of one function."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, which forks: here JAX may have started.
RUN = """
import sys
from pathlib import Path
from tests.mutants import __main__ as mutants

mutants.PRELOADED = ()
planted = mutants.read_mutants(Path(sys.argv[1]) / "rooms")
for outcome in mutants.judge_all(Path(sys.argv[1]), planted, jobs=1, copied=("nalora_jax", "tests")):
    print(outcome.mutant.name, outcome.verdict)
"""
MUTANTS = """
[difference]
reason = "a difference is no sum"
old = "return a + b"
new = "return a - b"
tests = "tests/test_toy.py -k sum"

[product]
reason = "2 * 2 is 2 + 2"
old = "return a + b"
new = "return a * b"
tests = "tests/test_toy.py -k sum"

[moved]
reason = "the line is no longer there"
old = "return b + a"
new = "return b - a"
tests = "tests/test_toy.py -k sum"

[twice]
reason = "the text is at two places"
old = "a"
new = "b"
tests = "tests/test_toy.py -k sum"

[wrong]
reason = "its test fails without a fault"
old = "return a + b"
new = "return a - b"
tests = "tests/test_toy.py -k wrong"

[nothing]
reason = "there is no such test"
old = "return a + b"
new = "return a - b"
tests = "tests/test_toy.py -k nowhere"
"""
TESTS = """
from nalora_jax.toy import add


def test_sum():
    assert add(2, 2) == 4


def test_wrong():
    assert add(2, 2) == 5
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in {
        "nalora_jax/__init__.py": "",
        "nalora_jax/toy.py": "def add(a, b):\n    return a + b\n",
        "tests/test_toy.py": TESTS,
        "rooms/toy.toml": MUTANTS,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_fault_is_caught_missed_stale_or_broken_and_taken_out_again(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, checkout], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert dict(map(str.split, done.stdout.splitlines())) == {
        "difference": "caught",
        "product": "missed",
        "moved": "stale",
        "twice": "stale",
        "wrong": "broken",
        "nothing": "broken",
    }
    assert "return a + b" in (checkout / "nalora_jax" / "toy.py").read_text()


def test_every_mutant_has_a_reason_and_tests_that_exist() -> None:
    from tests.mutants.__main__ import ROOT, chosen, read_mutants

    mutants = read_mutants()
    assert len(mutants) >= 80
    for mutant in mutants:
        assert mutant.reason
        assert mutant.old != mutant.new
        files = [word for word in mutant.tests.split() if word.endswith(".py")]
        assert files
        assert all((ROOT / file).is_file() for file in files), mutant.name
    assert [mutant.name for mutant in chosen(mutants, ["cap_inverted"])] == ["cap_inverted"]
    with pytest.raises(SystemExit, match="found nowhere"):
        chosen(mutants, ["nowhere"])
