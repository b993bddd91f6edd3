"""Plants faults in a copy of the package, one at a time, and runs the tests that must notice each.

    python -m tests.mutants                       # all; CONTRIBUTING.md states the time
    python -m tests.mutants method cap_inverted   # one room's, and one by name
    # where each is in the package; exits with 1 if one is stale
    python -m tests.mutants --list

A room is a TOML file next to this one; a mutant is a table of it: the line ``old``, by which the
place is found in the whole package, the line ``new`` that replaces it, the reason, and the
arguments of pytest that select the tests. A mutant is

    caught   a test fails
    missed   all tests pass: one is missing
    stale    ``old`` is not in the package, or in several places (``file`` then names one)
    broken   pytest could not run the tests, or they do not pass without the fault

Exits with status 1 unless all are caught.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "nalora_jax"
# Of the checkout, what tests read.
COPIED = (
    PACKAGE,
    "tests",
    "benchmarks",
    "configs",
    "docs",
    "studies",
    "pyproject.toml",
    "train.py",
)
# What most tests import from other packages, so that forks need not: 2 to 6 CPU seconds a run.
PRELOADED = (
    "jax", "flax.linen", "flax.nnx", "optax", "orbax.checkpoint", "grain", "hypothesis", "scipy.stats", "torch",
    "transformers", "peft", "tokenizers", "safetensors.numpy", "tyro",
)  # fmt: skip
Outcome = tuple["Mutant", str, str, float]  # verdict, what explains it, CPU seconds of its tests
SECONDS = 900  # after which a run of tests is ended


@dataclass(frozen=True)
class Mutant:
    """A fault: the text that it replaces in one file of the package, and the tests that must
    notice."""

    room: str
    name: str
    reason: str
    old: str
    new: str
    tests: str
    file: str = ""  # only if ``old`` is in several files

    def places(self, root: Path) -> list[Path]:
        """Returns the file of each occurrence of ``old``, relative to ``root``."""
        sources = [root / self.file] if self.file else sorted((root / PACKAGE).rglob("*.py"))
        return [
            path.relative_to(root)
            for path in sources
            if path.exists()
            for _ in range(path.read_text(encoding="utf-8").count(self.old))
        ]


def read_mutants(folder: Path = Path(__file__).parent) -> list[Mutant]:
    """Returns all mutants, by room."""
    mutants = [
        Mutant(path.stem, name, **table)
        for path in sorted(folder.glob("*.toml"))
        for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items()
    ]
    repeated = [
        name for name, count in Counter(mutant.name for mutant in mutants).items() if count > 1
    ]
    assert not repeated, f"mutants of one name: {repeated}"
    return mutants


class Copy:
    """A copy of a checkout in which one file at a time has a fault."""

    def __init__(self, root: Path, folder: Path, copied: Sequence[str] = COPIED) -> None:
        self.folder, self._cache = folder / "checkout", folder / "cache"
        self.folder.mkdir(parents=True)
        for name in copied:
            if (root / name).is_dir():
                skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(root / name, self.folder / name, ignore=skipped)
            else:
                shutil.copy2(root / name, self.folder / name)
        self._cache.mkdir()
        users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / PACKAGE
        kernels = Path(os.environ.get("NALORA_CACHE") or users) / "native"
        if kernels.exists():  # to compile them takes half a minute
            shutil.copytree(
                kernels, self._cache / "native", ignore=shutil.ignore_patterns("making-*")
            )
        self._written = int(time.time())

    def run(self, tests: str) -> tuple[int, str, float]:
        """Runs pytest and returns its exit status (-1: it was ended), its last lines and its CPU
        seconds."""
        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider"]
        options += [
            "-W",
            "ignore:Module already imported",
        ]  # a plugin that a preloaded package imports
        with tempfile.TemporaryFile("w+") as output:
            process = os.fork()  # of a process that has imported what takes longest, see PRELOADED
            if process == 0:
                self._become_pytest([*options, *shlex.split(tests)], output.fileno())
            until = time.monotonic() + SECONDS
            while not (ended := os.wait4(process, os.WNOHANG))[0]:
                if time.monotonic() > until:
                    os.killpg(process, signal.SIGKILL)
                time.sleep(0.02)
            output.seek(0)
            lines = [line for line in output.read().splitlines() if line.strip()]
        status = max(os.waitstatus_to_exitcode(ended[1]), -1)
        if any(line.startswith("E ") and "NameError" in line for line in lines):
            status = pytest.ExitCode.INTERRUPTED  # the fault does not run at all
        return status, "\n".join(lines[-5:]), ended[2].ru_utime + ended[2].ru_stime

    def _become_pytest(self, arguments: Sequence[str], output: int) -> NoReturn:
        """Runs pytest in a child process, which ends with its status."""
        status: int = pytest.ExitCode.INTERNAL_ERROR
        try:
            os.setpgrp()
            for stream in (1, 2):
                os.dup2(output, stream)
            os.chdir(self.folder)
            os.environ |= {"NALORA_CACHE": str(self._cache), "PYTHONPATH": str(self.folder)}
            for name in [
                one
                for one in sys.modules
                if one.partition(".")[0] in (PACKAGE, "tests", "benchmarks")
            ]:
                del sys.modules[name]
            sys.path[:] = [
                str(self.folder),
                *(entry for entry in sys.path if entry not in ("", str(ROOT))),
            ]
            status = pytest.main(list(arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(status))

    def judge(self, mutant: Mutant) -> Outcome:
        """Plants the fault, runs its tests and takes it out again."""
        places = mutant.places(self.folder)
        if len(places) != 1:
            where = ", ".join(map(str, places)) or "no file"
            return mutant, "stale", f"{mutant.old!r} is in {where}", 0.0
        path = self.folder / places[0]
        text, times = path.read_text(encoding="utf-8"), path.stat()
        try:
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            # Bytecode is matched by size and whole seconds: each text has a second of its own.
            self._written += 1
            os.utime(path, (self._written, self._written))
            status, lines, seconds = self.run(mutant.tests)
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        verdict = {0: "missed", 1: "caught"}.get(status, "broken")
        return mutant, verdict, "" if verdict == "caught" else lines, seconds


def _start(root: Path, scratch: Path, copied: Sequence[str]) -> None:
    """Makes the copy of a worker process."""
    global _copy
    _copy = Copy(root, scratch / str(os.getpid()), copied)


def _judge(mutants: Sequence[Mutant]) -> list[Outcome]:
    """Judges mutants that have the same tests, after the tests passed without a fault."""
    status, lines, seconds = _copy.run(mutants[0].tests)
    if status:
        note = f"without the fault: pytest {mutants[0].tests} ended with {status}\n{lines}"
        return [(mutant, "broken", note, seconds) for mutant in mutants]
    return [_copy.judge(mutant) for mutant in mutants]


def judge_all(
    root: Path, mutants: Sequence[Mutant], jobs: int, copied: Sequence[str] = COPIED
) -> Iterator[Outcome]:
    """Yields the outcome of every mutant; ``jobs`` processes work side by side, each in its own
    copy of ``root``."""
    groups: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        groups[mutant.tests].append(mutant)
    with tempfile.TemporaryDirectory(prefix="nalora-mutants-") as scratch:
        # Programs that a fault does not change are compiled once. The others as tests/conftest.py
        # sets them.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{scratch}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0"}
        for name in PRELOADED:
            importlib.import_module(name)
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # no backend has started
        arguments = (root, Path(scratch), copied)
        with ProcessPoolExecutor(
            jobs, multiprocessing.get_context("fork"), _start, arguments
        ) as pool:
            for done in as_completed(pool.submit(_judge, group) for group in groups.values()):
                yield from done.result()


def main() -> int:
    """Judges mutants and prints a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants or rooms; by default all")
    parser.add_argument(
        "--list", action="store_true", help="print them and their places, and run no test"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="copies of the package that work side by side"
    )
    args = parser.parse_args()
    mutants = read_mutants()
    if unknown := set(args.names) - {
        name for mutant in mutants for name in (mutant.name, mutant.room)
    }:
        raise SystemExit(
            f"error: NAME: expected a room or a mutant of --list, found {', '.join(unknown)}"
        )
    mutants = [one for one in mutants if not args.names or {one.name, one.room} & set(args.names)]
    if args.list:
        stale = 0
        for mutant in mutants:
            places = mutant.places(ROOT)
            stale += len(places) != 1
            where = str(places[0]) if len(places) == 1 else f"STALE, {len(places)} places"
            print(f"{mutant.room:12} {mutant.name:44} {where}\n{'':12} {mutant.reason}")
        print(f"{len(mutants)} mutants, {stale} stale")
        return int(stale > 0)
    began, verdicts, total = time.monotonic(), Counter[str](), 0.0
    for mutant, verdict, note, seconds in judge_all(ROOT, mutants, args.jobs):
        verdicts[verdict] += 1
        total += seconds
        print(f"{verdict:7} {mutant.room:12} {mutant.name:44} {seconds:5.0f} CPU s", flush=True)
        if note:
            print("        " + note.replace("\n", "\n        "), flush=True)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    print(f"{counts}; {total / 60:.1f} CPU minutes, {(time.monotonic() - began) / 60:.1f} minutes")
    return int(verdicts["caught"] < len(mutants))


if __name__ == "__main__":
    sys.exit(main())
