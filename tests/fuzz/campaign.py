"""Damaged inputs for one parser: each is read, and what comes out is counted."""

import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from nalora_jax.errors import NaloraError
from tests.fuzz.mutate import damaged

_MAX_MESSAGE = 2000  # bytes


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
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        contents = {path: path.read_bytes() for path in files}
        yield Outcome(first - 1, "", peak_mb())
        for number in range(first, last):
            rng = random.Random(f"{parser.name} {seed} {number}")
            file = rng.choice(files) if parser.file == "*" else folder / parser.file
            if parser.file == "*" and rng.random() < 0.05:
                _displace(file, rng)
            else:
                file.write_bytes(damaged(contents[file], rng))
            yield Outcome(number, attempt(parser, folder), peak_mb())
            _restore(file, contents[file])


def _displace(file, rng):
    """Removes a file, or puts a folder or a link to itself in its place."""
    file.unlink()
    kind = rng.randrange(3)
    if kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(file.name)


def _restore(file, content):
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.write_bytes(content)


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
