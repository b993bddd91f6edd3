"""Huge pages for the C library's heap, which must be requested before a process starts.

XLA allocates a program's temporary buffers from that heap. On a CPU a training step then touches
hundreds of thousands of new 4 kB pages; with pages of 2 MB it is about a tenth faster
(docs/benchmarks.md).

A restarted process loses its state. Therefore only a process that runs one of this library's
commands restarts, before any other work and at most once. An environment variable marks the
restart, because the C library removes GLIBC_TUNABLES from processes with more rights than their
user's (setgid).
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
MARK = "NALORA_RESTARTED"
_SETTING = "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Options of the interpreter before its program: without a value, and with one (possibly attached).
_FLAGS = re.compile(r"-[bBdEiIOPqRsSuvx]+")
_VALUED = re.compile(r"-[XW](?P<value>.*)")


def restart() -> None:
    """Restarts this process in place, once, with huge pages if they are available.

    It must be the first statement of a command. Process id, standard streams and arguments are
    kept. It does nothing in a process that is not a command of this library (see `is_command`), or
    with ``GLIBC_TUNABLES=glibc.malloc.hugetlb=0`` in the environment.
    """
    value = tunables(os.environ, platform.libc_ver(), _kernel_setting())
    if value is None or not sys.executable or _has_more_rights() or not is_command(sys.orig_argv, _main_module()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {**os.environ, VARIABLE: value, MARK: "1"},
        )
    except OSError:
        # The interpreter was replaced meanwhile, or the environment is too long: no restart.
        return


def tunables(environ: Mapping[str, str], libc: tuple[str, str], kernel: str) -> str | None:
    """Returns the value of GLIBC_TUNABLES for a restart; None if it would not help or has happened.

    Args:
      environ: of this process.
      libc: name and version, as returned by `platform.libc_ver`.
      kernel: the kernel's setting, e.g. ``"always [madvise] never"``.

    Example:
      >>> tunables({}, ("glibc", "2.41"), "always [madvise] never")
      'glibc.malloc.hugetlb=1'
    """
    given = environ.get(VARIABLE, "")
    name, version = libc
    if MARK in environ or _SETTING in given:
        return None
    if name != "glibc" or not kernel or "[never]" in kernel or not _knows_setting(version):
        return None
    return ":".join(filter(None, (given, f"{_SETTING}=1")))


def is_command(argv: Sequence[str], main: tuple[str, str]) -> bool:
    """Returns True for the commands ``nalora``, ``python -m nalora_jax``, ``python train.py``.

    Returns False for a notebook, a script on standard input or ``-c``, a debugger, and a program
    that runs this library by `runpy`.

    Args:
      argv: the command line of the process, interpreter first (`sys.orig_argv`).
      main: name and file of its module ``__main__``.
    """
    name, file = main
    program = _program(argv)
    if program == ("-m", "nalora_jax"):
        return name == "nalora_jax.__main__"
    if program is None or program[0] == "-m" or not _is_same(program[1], file):
        return False
    return _is_same(file, Path(__file__).parents[2] / "train.py") or _is_console_script(Path(file))


def _program(argv: Sequence[str]) -> tuple[str, str] | None:
    """Returns ``("-m", module)`` or ``("", script)``; None for other command lines."""
    rest = iter(argv[1:])
    for one in rest:
        if one == "-m":
            return "-m", next(rest, "")
        if not one.startswith("-"):
            return "", one
        if valued := _VALUED.fullmatch(one):
            if not valued["value"]:
                next(rest, "")
        elif not _FLAGS.fullmatch(one):
            return None
    return None


def _is_same(one: str | Path, other: str | Path) -> bool:
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return False


def _is_console_script(path: Path) -> bool:
    """Returns True if a file is the script that an installer writes for ``nalora``."""
    try:
        return path.name == "nalora" and b"nalora_jax.__main__" in path.read_bytes()[:4096]
    except OSError:
        return False


def _main_module() -> tuple[str, str]:
    main = sys.modules.get("__main__")
    name = getattr(getattr(main, "__spec__", None), "name", "")
    return str(name), str(getattr(main, "__file__", "") or "")


def _has_more_rights() -> bool:
    """Returns True if the process has another user's or group's rights.

    The C library then ignores GLIBC_TUNABLES.
    """
    return os.getuid() != os.geteuid() or os.getgid() != os.getegid()


def _knows_setting(version: str) -> bool:
    """Returns True if this version of glibc has the setting: 2.35 or later."""
    parts = version.split(".")
    return all(part.isdecimal() for part in parts) and tuple(map(int, parts)) >= (2, 35)


def _kernel_setting() -> str:
    try:
        return _KERNEL.read_text()
    except OSError:  # not Linux, or a kernel without huge pages
        return ""
