"""Every parser on damaged files, each in a process of its own that may hang or fill memory without harm.

    python -m tests.fuzz --inputs 10000 --publish        # into docs/checkpoints.md; hours on two cores
    python -m tests.fuzz --inputs 300 --only GGUF JSONL

Prints a table: parser, inputs, untyped errors, hangs (10 seconds of the processor, or a minute that passes, so
that a crowded machine makes no hangs), largest memory above that of the undamaged file. Exits with status 1 where there
was an untyped error, a hang, or more than 1 GB.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.markers import write_between
from nalora_jax.errors import NaloraError
from tests.fuzz.mutate import damaged
from tests.fuzz.parsers import PARSERS

_MAX_MB, _MAX_MESSAGE = 1000, 2000  # the second in bytes
# Timers whose signals end a process, also within C++, and their seconds.
_TIMERS = {signal.ITIMER_PROF: 10.0, signal.ITIMER_REAL: 60.0}
_HANGS = (-signal.SIGPROF, -signal.SIGALRM)
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- fuzz: python -m tests.fuzz --publish -->", "<!-- end of fuzz -->"


@dataclass(frozen=True)
class Outcome:
    """What one damaged input did."""

    number: int
    untyped: str  # the error, where it was not this library's own (or its message is too long)
    peak_mb: int  # largest memory of the process so far


def outcomes(parser, seed, first, last):
    """Reads inputs ``first`` to ``last - 1`` of a seed, one after another; an input depends on its number alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parser.write(folder)
        parser.read(folder)  # the undamaged one is read, so that errors are the damage's
        contents = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        yield Outcome(first - 1, "", peak_mb())
        for number in range(first, last):
            rng = random.Random(f"{parser.name} {seed} {number}")
            file = rng.choice(list(contents)) if parser.file == "*" else folder / parser.file
            if parser.file == "*" and rng.random() < 0.05:  # it is gone, or a folder or a link to itself
                file.unlink()
                kind = rng.randrange(3)
                if kind == 1:
                    file.mkdir()
                elif kind == 2:
                    file.symlink_to(file.name)
            else:
                file.write_bytes(damaged(contents[file], rng))
            yield Outcome(number, attempt(parser, folder), peak_mb())
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            file.unlink(missing_ok=True)
            file.write_bytes(contents[file])


def attempt(parser, folder):
    """Empty where the file was read or refused in words, else the error's place and text."""
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


def peak_mb():
    """Largest memory of this process, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6


@dataclass
class Tally:
    """What the inputs of one parser did."""

    inputs: int = 0
    hangs: list[int] = field(default_factory=list)
    untyped: Counter[str] = field(default_factory=Counter)
    memory_mb: int = 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [each.name for each in PARSERS]
    parser.add_argument("--inputs", type=int, default=1000, help="of each parser; of the slow ones fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the parsers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parsers that run at a time")
    parser.add_argument("--publish", action="store_true", help="put a summary into docs/checkpoints.md")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)  # of a process for one parser
    args = parser.parse_args()
    chosen = [each for each in PARSERS if each.name in args.only]
    if args.first is not None:
        for outcome in outcomes(chosen[0], args.seed, args.first, args.inputs):
            print(json.dumps(asdict(outcome)), flush=True)
            for timer, seconds in _TIMERS.items():
                signal.setitimer(timer, seconds)
        return 0
    print("| parser | inputs | untyped errors | hangs | largest memory |\n|---|---|---|---|---|")
    tallies = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        running = pool.map(lambda each: run(each, args.seed, each.share(args.inputs)), chosen)
        for each, tally in zip(chosen, running, strict=True):
            tallies[each.name] = tally
            counts = f"{tally.inputs:,} | {tally.untyped.total()} | {len(tally.hangs)}"
            print(f"| {each.name} | {counts} | {tally.memory_mb} MB |", flush=True)
    if args.publish:
        write_between(PAGE, BEGIN, END, summary(tallies))
    for name, tally in tallies.items():
        for error, count in tally.untyped.most_common(20):
            print(f"{name}: {count} x {error}", file=sys.stderr)
        for number in tally.hangs:
            print(f"{name}: input {number} of seed {args.seed} hangs", file=sys.stderr)
    return int(any(one.hangs or one.untyped or one.memory_mb > _MAX_MB for one in tallies.values()))


def summary(tallies):
    """Returns the lines of the page: totals over all parsers, their names, and those that failed."""
    inputs = sum(tally.inputs for tally in tallies.values())
    untyped = sum(tally.untyped.total() for tally in tallies.values())
    hangs = [f"{len(tally.hangs)} of {name}" for name, tally in tallies.items() if tally.hangs]
    return (
        f"{inputs:,} inputs: {untyped} untyped errors; hangs: {'; '.join(hangs) or 'none'}; "
        f"at most {max(tally.memory_mb for tally in tallies.values())} MB.\n"
        f"Parsers: {', '.join(tallies)}."
    )


def run(parser, seed, count):
    """All inputs of a parser; after one that hangs or ends its process, another process goes on with the next."""
    tally, first = Tally(), 0
    while first < count:
        command = [sys.executable, "-m", "tests.fuzz", "--only", parser.name, "--seed", str(seed)]
        command += ["--first", str(first), "--inputs", str(count)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        baseline = None
        with subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, **options) as child:
            for outcome in map(json.loads, child.stdout or ()):
                if baseline is None:  # of the undamaged file
                    baseline = outcome["peak_mb"]
                    continue
                tally.inputs, first = tally.inputs + 1, outcome["number"] + 1
                tally.memory_mb = max(tally.memory_mb, outcome["peak_mb"] - baseline)
                tally.untyped.update([outcome["untyped"]] if outcome["untyped"] else [])
        if baseline is None:
            raise RuntimeError(f"{parser.name}: the undamaged file is not read: {' '.join(command)}")
        if first < count:
            tally.inputs += 1
            if child.returncode in _HANGS:
                tally.hangs.append(first)
            else:
                tally.untyped["the end of the process"] += 1
            first += 1
    return tally


if __name__ == "__main__":
    sys.exit(main())
