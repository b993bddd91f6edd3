"""Huge pages for the C library's heap, which have to be asked for before a process starts.

XLA allocates a program's temporary buffers from that heap. On a CPU a training step then touches hundreds of thousands
of new 4 kB pages; in pages of 2 MB it is about a tenth faster (docs/benchmarks.md).
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
_SETTING = "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Starts this process again, in place and once, with huge pages; does nothing where they are not to be had.

    For the first line of a command: what the process has done until then is done again. Process id, standard streams
    and arguments stay. ``GLIBC_TUNABLES=glibc.malloc.hugetlb=0`` in the environment turns it off.
    """
    value = tunables(os.environ, platform.libc_ver(), _kernel_setting())
    if value is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: value})


def tunables(environ: Mapping[str, str], libc: tuple[str, str], kernel: str) -> str | None:
    """The value of GLIBC_TUNABLES to restart with, None where a restart is pointless or has been.

    Args:
      environ: of this process.
      libc: name and version, as `platform.libc_ver` gives them.
      kernel: the kernel's setting, e.g. ``"always [madvise] never"``.

    Example:
      >>> tunables({}, ("glibc", "2.41"), "always [madvise] never")
      'glibc.malloc.hugetlb=1'
    """
    given = environ.get(VARIABLE, "")
    name, version = libc
    if _SETTING in given or name != "glibc" or not kernel or "[never]" in kernel or not _knows_setting(version):
        return None
    return ":".join(filter(None, (given, f"{_SETTING}=1")))


def _knows_setting(version: str) -> bool:
    """Whether a version of the GNU C library has the setting: since 2.35."""
    parts = version.split(".")
    return all(part.isdecimal() for part in parts) and tuple(map(int, parts)) >= (2, 35)


def _kernel_setting() -> str:
    try:
        return _KERNEL.read_text()
    except OSError:  # another system than Linux, or a kernel without huge pages
        return ""
