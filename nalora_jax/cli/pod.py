"""Reports of a run's processes to ``nalora doctor``, and detection of known bad states.

The reports use JAX's coordination service, which needs no device: it also works in a pod with
unusable chips, or whose processes have different versions of JAX.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WAIT = 120  # seconds until an absent process counts as missing
_READ = 2  # seconds to read the report of a process that is present
_SKEW = 5.0  # seconds by which clocks may differ
_LITTLE = 2 << 30  # bytes of free host memory that loading a small model needs
_LOCK = Path("/tmp/libtpu_lockfile")


@dataclass(frozen=True)
class Report:
    """Report of one process.

    It has versions by package, bytes of host memory, clock in seconds, and problems.
    """

    process: int
    host: str
    versions: Mapping[str, str]
    free: int = 0
    total: int = 0
    clock: float = 0.0
    devices: str = ""
    problems: Sequence[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Returns the name for messages."""
        return f"process {self.process} ({self.host})"


class Group:
    """The processes that JAX has joined, or this process alone."""

    def __init__(self) -> None:
        from jax._src import distributed  # the public interface needs devices

        state = distributed.global_state
        self._client: Any = state.client
        self._is_complete = True
        self.index, self.count = (state.process_id, state.num_processes) if self._client else (0, 1)

    def together(self, name: str) -> None:
        """Waits until all processes have called this; does nothing after an earlier timeout."""
        if self._client is None or not self._is_complete:
            return
        try:
            self._client.wait_at_barrier(f"nalora_doctor_{name}", WAIT * 1000)
        except Exception:  # jaxlib raises many types; `exchange` shows the missing processes
            self._is_complete = False

    def exchange(self, name: str, report: Report) -> list[Report | None]:
        """Returns the reports of all processes, with None for a process that sends none."""
        if self._client is None:
            return [report]
        self._client.key_value_set(f"nalora_doctor/{name}/{self.index}", json.dumps(asdict(report)))
        self.together(name)
        return [self._read(f"nalora_doctor/{name}/{index}") for index in range(self.count)]

    def _read(self, key: str) -> Report | None:
        try:
            return Report(**json.loads(self._client.blocking_key_value_get(key, _READ * 1000)))
        except Exception:
            return None


def report(group: Group, versions: Mapping[str, str], problems: Sequence[str]) -> Report:
    """Returns this process's report without devices; all processes read their clocks together."""
    free, total = host_memory()
    problems = [*problems, *memory_problems(free, total)]
    group.together("clock")
    return Report(
        group.index, socket.gethostname(), dict(versions), free, total, time.time(), problems=problems
    )


def rows(reports: Sequence[Report | None]) -> dict[str, str]:
    """Returns one line per process."""
    cells = {}
    middle = _middle(reports)
    for index, report in enumerate(reports):
        if report is not None:
            versions = ", ".join(f"{name} {report.versions[name]}" for name in report.versions)
            memory = f"{report.free / 1e9:.1f} of {report.total / 1e9:.1f} GB free"
            cells[report.name] = (
                f"{report.devices or 'no device'}; {versions}; {memory}; clock "
                f"{report.clock - middle:+.1f} s"
            )
        else:
            cells[f"process {index}"] = "no report"
    return cells


def differences(reports: Sequence[Report | None]) -> Iterator[str]:
    """Yields the problems of the processes, each once, and their differences."""
    for index, report in enumerate(reports):
        if report is None:
            yield f"process {index} sent no report within {WAIT} s: start nalora doctor on every host at the same time"
    present = [report for report in reports if report is not None]
    for problem in dict.fromkeys(problem for report in present for problem in report.problems):
        names = [report.name for report in present if problem in report.problems]
        where = "every process"
        if len(names) != len(reports):
            where = ", ".join(names)
        if len(reports) > 1:
            problem = f"{where}: {problem}"
        yield problem
    for package in sorted({name for report in present for name in report.versions}):
        installed = {r.process: r.versions.get(package, "not installed") for r in present}
        yield from _odd(present, installed, package)
    yield from _odd(present, {report.process: report.devices or "none" for report in present}, "devices")
    middle = _middle(reports)
    for report in present:
        if abs(report.clock - middle) > _SKEW:
            yield f"{report.name}: its clock is {report.clock - middle:+.0f} s off the others': let NTP set it"


def _odd(present: Sequence[Report], values: Mapping[int, str], what: str) -> Iterator[str]:
    """Yields the processes that differ from the most common value."""
    ((common, _), *deviating) = Counter(values.values()).most_common()
    if deviating:
        odd = ", ".join(
            f"{values[report.process]} in {report.name}"
            for report in present
            if values[report.process] != common
        )
        yield f"{what} differ between processes: {common}, but {odd}; make all hosts the same"


def _middle(reports: Sequence[Report | None]) -> float:
    return statistics.median([report.clock for report in reports if report is not None] or [0.0])


# ---------------------------------------------------------------- this machine


def host_memory(
    info: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> tuple[int, int]:
    """Returns free and total bytes of host or container memory, the smaller; zeros if unknown."""
    if not info.exists():
        return 0, 0
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB", info.read_text(), re.MULTILINE))
    free, total = (1024 * int(lines.get(name, 0)) for name in ("MemAvailable", "MemTotal"))
    limit = _number(group / "memory.max")
    if limit is None:
        return free, total
    cached = re.findall(r"^inactive_file (\d+)", _text(group / "memory.stat"), re.MULTILINE)
    used = (_number(group / "memory.current") or 0) - sum(map(int, cached))
    return min(free, max(0, limit - used)), min(total, limit)


def memory_problems(free: int, total: int) -> Iterator[str]:
    """Yields a problem if host memory is too small to load a model."""
    if total and free < _LITTLE:
        yield f"{free / 1e9:.1f} of {total / 1e9:.1f} GB of host memory are free, less than a small model needs"


def chip_problems(
    dev: Path = Path("/dev"), proc: Path = Path("/proc"), lock: Path = _LOCK
) -> Iterator[str]:
    """Yields TPU chips that another process holds, by their device files or libtpu's lock."""
    chips = [*sorted(dev.glob("accel[0-9]*")), *sorted((dev / "vfio").glob("[0-9]*"))]
    if not chips:
        return
    holders = _holders({str(chip) for chip in chips}, proc)
    for pid, held in sorted(holders.items()):
        command = _text(proc / str(pid) / "comm").strip() or "?"
        yield f"process {pid} ({command}) holds {', '.join(sorted(held))}: wait for it, or stop it"
    if not holders and lock.exists():
        yield from _lock_problems(lock)


def _holders(names: set[str], proc: Path) -> dict[int, set[str]]:
    """Returns the files of ``names`` that each other process has open, as visible to this user."""
    holders: dict[int, set[str]] = {}
    for descriptor in proc.glob("[0-9]*/fd/*"):
        try:
            target = str(descriptor.readlink())
        except OSError:  # the process has ended or belongs to another user
            continue
        pid = int(descriptor.parts[-3])
        if target in names and pid != os.getpid():
            holders.setdefault(pid, set()).add(target)
    return holders


def _lock_problems(lock: Path) -> Iterator[str]:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        yield f"{lock} is of user {lock.stat().st_uid}, who may hold the chips; if no such process runs, sudo rm {lock}"
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield f"another process holds {lock}, and so the chips: sudo lsof {lock} names it"
    finally:
        os.close(descriptor)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    if not text.isdecimal():
        return None
    return int(text)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
