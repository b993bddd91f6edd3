"""Damaged inputs for one parser: each is read, and what comes out is counted."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from nalora_jax.errors import NaloraError
from tests.fuzz.mutate import damaged
from tests.fuzz.parsers import PARSERS, Parser

_MAX_MESSAGE = 2000  # bytes
_SECONDS = 10.0  # of the processor, after which an input hangs


class _HangError(BaseException):
    """Raised by a timer, and caught by no parser."""


@dataclass
class Tally:
    """What the inputs of one parser did."""

    inputs: int = 0
    hangs: list[int] = field(default_factory=list)
    untyped: Counter[str] = field(default_factory=Counter)  # errors that are not this library's own
    memory_mb: int = 0  # above that of the undamaged file


def run(name: str, seed: int, count: int) -> Tally:
    """Reads the first inputs of a seed, one after another; an input depends on its number alone."""
    (parser,) = (each for each in PARSERS if each.name == name)
    tally = Tally()
    signal.signal(signal.SIGPROF, _hang)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parser.write(folder)
        parser.read(folder)  # the undamaged one is read, so that errors are the damage's
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        contents = {path: path.read_bytes() for path in files}
        baseline = _peak_mb()
        for number in range(count):
            rng = random.Random(f"{parser.name} {seed} {number}")
            file = rng.choice(files) if parser.file == "*" else folder / parser.file
            if parser.file == "*" and rng.random() < 0.05:
                _displace(file, rng)
            else:
                file.write_bytes(damaged(contents[file], rng))
            _attempt(parser, folder, number, tally)
            _restore(file, contents[file])
        tally.memory_mb = _peak_mb() - baseline
    return tally


def _hang(number: int, frame: FrameType | None) -> NoReturn:
    raise _HangError


def _displace(file: Path, rng: random.Random) -> None:
    """Removes a file, or puts a folder or a link to itself in its place."""
    file.unlink()
    kind = rng.randrange(3)
    if kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(file.name)


def _restore(file: Path, content: bytes) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def _attempt(parser: Parser, folder: Path, number: int, tally: Tally) -> None:
    """Reads a folder, and counts an error that is not the library's own, a long message, or a hang."""
    tally.inputs += 1
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.read(folder)
    except NaloraError as error:
        size = len(str(error).encode("utf-8", "surrogatepass"))
        if size > _MAX_MESSAGE:
            tally.untyped[f"a message of {size} bytes"] += 1
    except _HangError:
        tally.hangs.append(number)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also what Rust raises
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        tally.untyped[f"{type(error).__name__} at {place}: {str(error)[:200]!r}"] += 1
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _peak_mb() -> int:
    """Returns the largest memory of this process, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6
