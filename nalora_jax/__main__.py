"""The command line: ``nalora VERB ...``, also ``python -m nalora_jax VERB ...``.

Bad input is one line on standard error and exit status 2; an interrupt is status 130. A traceback means a bug.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence

from nalora_jax.cpu import hugepages
from nalora_jax.errors import NaloraError

# What the machine, not the library, has to answer for.
_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that ``argv`` (by default the process's arguments) asks for; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv

    def run() -> None:
        # Imported only now: a process that restarts needs neither, and help and refused flags need no JAX.
        verb, args = importlib.import_module("nalora_jax.cli.parser").parse(given)
        importlib.import_module("nalora_jax.cli.verbs").VERBS[verb](args)

    return guarded(run)


def command() -> int:
    """The process ``nalora``: `main` with huge pages where the machine has them."""
    hugepages.restart()
    return main()


def train_command() -> int:
    """The process ``train.py``: the flags of ``nalora train`` without the verb."""
    hugepages.restart()
    return main(["train", *sys.argv[1:]])


def guarded(run: Callable[[], None]) -> int:
    """The exit status of ``run``, which says what went wrong in one line if that is not a bug."""
    _log_to_stderr()
    try:
        run()
        sys.stdout.flush()
    except NaloraError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. `nalora eval ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _MACHINE:
            raise
        return _fail(f"{error.filename or 'output'}: {error.strerror}")
    return 0


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


class _StderrHandler(logging.Handler):
    """Writes to the standard error of the moment, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    logger = logging.getLogger("nalora_jax")
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


if __name__ == "__main__":
    sys.exit(command())
