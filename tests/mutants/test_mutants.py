"""``python -m tests.mutants``: its verdicts, on a package of one function."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# In a process of its own, which forks: here JAX may have started.
RUN = """
import sys
from pathlib import Path
from tests.mutants import __main__ as mutants

mutants.PRELOADED = ()
planted = mutants.read_mutants(Path(sys.argv[1]) / "rooms")
for mutant, verdict, *_ in mutants.judge_all(Path(sys.argv[1]), planted, 1, ("nalora_jax", "tests")):
    print(mutant.name, verdict)
"""
# The line that is replaced, the one that replaces it, and the test.
MUTANTS = {
    "caught": ("return a + b", "return a - b", "sum"),
    "missed": ("return a + b", "return a * b", "sum"),
    "stale": ("return b + a", "return b - a", "sum"),
    "stale_twice": ("a", "b", "sum"),
    "broken": ("return a + b", "return a - b", "wrong"),  # its test fails without a fault
    "broken_without_a_test": ("return a + b", "return a - b", "nowhere"),
}
TESTS = """
from nalora_jax.toy import add

def test_sum():
    assert add(2, 2) == 4

def test_wrong():
    assert add(2, 2) == 5
"""


def test_a_fault_is_caught_missed_stale_or_broken_and_taken_out_again(tmp_path: Path) -> None:
    tables = [
        f"[{name}]\nreason = 'any'\nold = '{old}'\nnew = '{new}'\ntests = 'tests/test_toy.py -k {test}'\n"
        for name, (old, new, test) in MUTANTS.items()
    ]
    for name, text in {
        "nalora_jax/__init__.py": "",
        "nalora_jax/toy.py": "def add(a, b):\n    return a + b\n",
        "tests/test_toy.py": TESTS,
        "rooms/toy.toml": "".join(tables),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-c", RUN, tmp_path]
    plain = os.environ | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"
    }  # each run of pytest would import the plugins
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verdicts = dict(map(str.split, done.stdout.splitlines()))
    assert verdicts == {name: name.partition("_")[0] for name in MUTANTS}
    assert "return a + b" in (tmp_path / "nalora_jax" / "toy.py").read_text()


def test_every_mutant_has_a_reason_and_tests_that_exist() -> None:
    from tests.mutants.__main__ import ROOT, read_mutants

    mutants = read_mutants()
    assert len(mutants) >= 120
    for mutant in mutants:
        assert mutant.reason
        assert mutant.old != mutant.new
        files = [word for word in mutant.tests.split() if word.endswith(".py")]
        assert files
        assert all((ROOT / file).is_file() for file in files), mutant.name
