"""Every parser on damaged files, each input in a process of its own that may hang or fill memory
without harm.

    # into docs/checkpoints.md; hours on two cores
    python -m tests.fuzz --inputs 10000 --publish
    python -m tests.fuzz --inputs 300 --only GGUF study

Prints a table: parser, inputs, untyped errors, hangs (10 seconds of the processor, or a minute),
largest memory above that of another input. Exits with status 1 if there was an untyped error, a
hang, or more than 1 GB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.markers import write_between
from nalora_jax.errors import NaloraError
from tests.fuzz.mutate import damage
from tests.fuzz.parsers import PARSERS, Parser

_MAX_MB, _MAX_MESSAGE = 1000, 2000  # the second in bytes
# Timers whose signals end a process, also within C++, and their seconds.
_TIMERS = {signal.ITIMER_PROF: 10.0, signal.ITIMER_REAL: 60.0}
_HANGS = (-signal.SIGPROF, -signal.SIGALRM)
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- fuzz: python -m tests.fuzz --publish -->", "<!-- end of fuzz -->"


@dataclass
class Tally:
    """What the inputs of one parser did."""

    inputs: int
    hangs: list[int] = field(default_factory=list)
    untyped: Counter[str] = field(default_factory=Counter)
    memory_mb: int = 0


def attempt(parser: Parser, good: Path, seed: int, number: int) -> str:
    """Reads a damaged copy of a folder, which depends on the number alone; returns an error that is
    not typed."""
    rng = random.Random(f"{parser.name} {seed} {number}")
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(good, Path(name) / "copy")
        damage(rng.choice(sorted(path for path in folder.rglob("*") if path.is_file())), rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parser.read(folder)
        except NaloraError as error:
            size = len(str(error).encode("utf-8", "surrogatepass"))
            return f"a message of {size} bytes" if size > _MAX_MESSAGE else ""
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:200]!r}"
    return ""


def campaign(name: str, seed: int, count: int) -> Tally:
    """Reads inputs of a parser in forks of this process, which has read the undamaged files."""
    (parser,) = (each for each in PARSERS if each.name == name)
    tally = Tally(max(count // parser.every, min(count, 4)))
    with tempfile.TemporaryDirectory() as scratch:
        tempfile.tempdir = scratch  # also of what a killed fork leaves
        good, error = Path(scratch) / "good", Path(scratch) / "error"
        good.mkdir()
        parser.write(good)
        parser.read(good)
        used = []
        for number in range(tally.inputs):
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics of Rust
                for timer, seconds in _TIMERS.items():
                    signal.setitimer(timer, seconds)
                error.write_text(attempt(parser, good, seed, number), errors="replace")
                os._exit(0)
            _, status, usage = os.wait4(child, 0)
            used.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) // 10**6)
            code = os.waitstatus_to_exitcode(status)
            if code in _HANGS:
                tally.hangs.append(number)
            elif code or error.read_text():
                tally.untyped[f"exit status {code}" if code else error.read_text()] += 1
        tally.memory_mb = max(used) - min(used)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [each.name for each in PARSERS]
    parser.add_argument(
        "--inputs", type=int, default=1000, help="of each parser; of the slow one fewer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="some of the parsers"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="parsers that run at a time"
    )
    parser.add_argument(
        "--publish", action="store_true", help="put a summary into docs/checkpoints.md"
    )
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    print("| parser | inputs | untyped errors | hangs | largest memory |\n|---|---|---|---|---|")
    tallies = {}
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        running = pool.imap(
            partial(campaign, seed=args.seed, count=args.inputs), args.only, chunksize=1
        )
        for name, tally in zip(args.only, running, strict=True):
            tallies[name] = tally
            counts = f"{tally.inputs:,} | {tally.untyped.total()} | {len(tally.hangs)}"
            print(f"| {name} | {counts} | {tally.memory_mb} MB |", flush=True)
    for name, tally in tallies.items():
        for error, count in tally.untyped.most_common(20):
            print(f"{name}: {count} x {error}", file=sys.stderr)
        for number in tally.hangs:
            print(f"{name}: input {number} of seed {args.seed} hangs", file=sys.stderr)
    if args.publish:
        write_between(PAGE, BEGIN, END, summary(tallies))
    return int(any(one.hangs or one.untyped or one.memory_mb > _MAX_MB for one in tallies.values()))


def summary(tallies: dict[str, Tally]) -> str:
    """Returns the lines of the page: totals over all parsers, their names, and those that
    failed."""
    inputs = sum(tally.inputs for tally in tallies.values())
    untyped = sum(tally.untyped.total() for tally in tallies.values())
    hangs = [f"{len(tally.hangs)} of {name}" for name, tally in tallies.items() if tally.hangs]
    return (
        f"{inputs:,} inputs: {untyped} untyped errors; hangs: {'; '.join(hangs) or 'none'}; "
        f"at most {max(tally.memory_mb for tally in tallies.values())} MB.\n"
        f"Parsers: {', '.join(tallies)}."
    )


if __name__ == "__main__":
    sys.exit(main())
