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
from nalora_jax.cpu.hugepages import MARK, VARIABLE, is_command, tunables

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
        ({MARK: "1"}, GLIBC, MADVISE, None),  # restarted, and the C library has taken the variable away (setgid)
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
    clean = {name: value for name, value in os.environ.items() if name not in (VARIABLE, MARK)}
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


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [("train.py", {}, EXPECTED), ("nalora", {}, EXPECTED), ("nalora", {VARIABLE: "glibc.malloc.hugetlb=0"}, None)],
)
def test_a_command_restarts_once_and_keeps_its_surroundings(tmp_path, command, given, expected):
    config = tmp_path / "config.py"
    config.write_text(
        f"import os, sys\nprint([os.getpid(), os.environ.get({VARIABLE!r}), sys.argv[-2:], sys.stdin.read()])\n"
        "raise SystemExit(7)\n"  # an error: a file that ends the program must not look like a finished run
    )
    process = start(command, config, **given)
    out, error = process.communicate("typed")
    assert process.returncode == 2, error
    value = expected or given[VARIABLE]
    assert out == f"{[process.pid, None if value == 'None' else value, ['--model', 'a b'], 'typed']}\n"


def test_an_interrupt_reaches_the_restarted_process(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = start("nalora", config)
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


def script(folder, text):
    path = folder / "nalora"
    path.write_text(text)
    return str(path)


OURS = "from nalora_jax.__main__ import command\nsys.exit(command())\n"


@pytest.mark.parametrize(
    ("options", "main", "expected"),
    [
        (["-m", "nalora_jax", "train"], ("nalora_jax.__main__", ""), True),
        (["-u", "-X", "dev", "-Werror", "-m", "nalora_jax"], ("nalora_jax.__main__", ""), True),
        (["-m", "nalora_jax", "train"], ("other", ""), False),  # the program has been replaced meanwhile
        (["-m", "pdb", "-m", "nalora_jax"], ("nalora_jax.__main__", ""), False),
        (["-m", "ipykernel_launcher"], ("nalora_jax.__main__", ""), False),  # runpy in a notebook
        (["-c", "code"], ("nalora_jax.__main__", ""), False),
        (["-"], ("nalora_jax.__main__", ""), False),
        ([], ("nalora_jax.__main__", ""), False),
        (["SCRIPT", "train"], ("", "SCRIPT"), True),
        (["OTHER"], ("", "SCRIPT"), False),  # runpy in a program
        (["OTHER"], ("", "OTHER"), False),
        ([str(ROOT / "train.py")], ("", str(ROOT / "train.py")), True),
        (["OTHER"], ("", str(ROOT / "train.py")), False),
    ],
)
def test_only_a_command_of_the_library_restarts(tmp_path, options, main, expected):
    (tmp_path / "other").mkdir()
    names = {"SCRIPT": script(tmp_path, OURS), "OTHER": script(tmp_path / "other", "import nalora_jax")}
    argv = ["python", *(names.get(one, one) for one in options)]
    assert is_command(argv, (main[0], names.get(main[1], main[1]))) is expected


CALLS = "import sys\nprint('begun', flush=True)\nsys.argv = ['nalora', 'report', 'none']\n"
INSIDE = {
    "runpy": ("import runpy\nrunpy.run_module('nalora_jax', run_name='__main__', alter_sys=True)\n", ["FILE"]),
    "standard input": ("from nalora_jax.__main__ import command\ncommand()\n", ["-"]),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_a_program_that_calls_the_command_is_never_started_again(tmp_path, kind):
    code, options = INSIDE[kind]
    text = CALLS + code
    path = tmp_path / "program.py"
    path.write_text(text)
    argv = [{"FILE": str(path)}.get(one, one) for one in options]
    done = subprocess.run([sys.executable, *argv], input=text, env=environment(), capture_output=True, text=True)
    assert done.stdout == "begun\n"
    assert done.stderr.startswith("error: none/metrics.jsonl: ")


def test_a_variable_that_is_taken_away_on_the_way_does_not_restart_for_ever(tmp_path):
    """As the C library does it to a setgid interpreter."""
    package = tmp_path / "sitecustomize.py"
    package.write_text(f"import os\nprint('started', flush=True)\nos.environ.pop({VARIABLE!r}, None)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "nalora_jax", "report", "none"]
    done = subprocess.run(
        command, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == "started\n" * (1 if EXPECTED == "None" else 2)
