"""Restarting with huge pages: when, and that nothing else changes for whoever started the process."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nalora_jax.cpu import hugepages
from nalora_jax.cpu.hugepages import VARIABLE, tunables

ROOT = Path(__file__).parents[2]
GLIBC, MADVISE = ("glibc", "2.41"), "always [madvise] never"
COMMANDS = {"train.py": ["train.py"], "nalora": ["-m", "nalora_jax", "train"]}
# What the restarted process finds on this very machine.
EXPECTED = str(tunables({}, platform.libc_ver(), hugepages._kernel_setting()))


@pytest.mark.parametrize(
    ("given", "libc", "kernel", "expected"),
    [
        ({}, GLIBC, MADVISE, "glibc.malloc.hugetlb=1"),
        ({}, GLIBC, "[always] madvise never", "glibc.malloc.hugetlb=1"),
        ({VARIABLE: "glibc.pthread.rseq=0"}, GLIBC, MADVISE, "glibc.pthread.rseq=0:glibc.malloc.hugetlb=1"),
        ({VARIABLE: "glibc.malloc.hugetlb=1"}, GLIBC, MADVISE, None),  # restarted already
        ({VARIABLE: "glibc.malloc.hugetlb=0"}, GLIBC, MADVISE, None),  # turned off
        ({}, GLIBC, "always madvise [never]", None),
        ({}, GLIBC, "", None),
        ({}, ("glibc", "2.31"), MADVISE, None),
        ({}, ("glibc", "2.35"), MADVISE, "glibc.malloc.hugetlb=1"),
        ({}, ("", ""), MADVISE, None),
    ],
)
def test_a_restart_only_where_it_helps(given, libc, kernel, expected):
    assert tunables(given, libc, kernel) == expected


def environment(**more):
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return clean | {"PYTHONPATH": os.pathsep.join(sys.path)} | more


@pytest.fixture(autouse=True)
def _listening():
    """Tests in the background of a shell ignore the interrupt, and what they start would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(command, config, **more):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    arguments = [sys.executable, *COMMANDS[command], "--config", str(config), "--model", "a b"]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(**more), **pipes)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("given", "expected"), [({}, EXPECTED), ({VARIABLE: "glibc.malloc.hugetlb=0"}, None)])
def test_a_command_restarts_once_and_keeps_its_surroundings(tmp_path, command, given, expected):
    config = tmp_path / "config.py"
    config.write_text(
        f"import os, sys\nprint([os.getpid(), os.environ.get({VARIABLE!r}), sys.argv[-2:], sys.stdin.read()])\n"
        "raise SystemExit(7)\n"
    )
    process = start(command, config, **given)
    out, error = process.communicate("typed")
    assert process.returncode == 7, error
    value = expected or given[VARIABLE]
    assert out == f"{[process.pid, None if value == 'None' else value, ['--model', 'a b'], 'typed']}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_reaches_the_restarted_process(tmp_path, command):
    config = tmp_path / "config.py"
    config.write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = start(command, config)
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "interrupted\n"
    assert process.returncode == 130
    assert time.monotonic() - began < 30


def test_importing_the_library_or_calling_a_verb_restarts_nothing(tmp_path):
    code = f"import os\nfrom nalora_jax.__main__ import main\nmain(['report', {str(tmp_path)!r}])\n"
    code += f"print(os.environ.get({VARIABLE!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
