"""The command line: ``nalora SUBCOMMAND ...``, also ``python -m nalora_jax SUBCOMMAND ...``.

Bad input prints one line on standard error with exit status 2, several broken records a line each.
Ctrl-C has status 130, SIGTERM 143, a lost process of a multi-host run 75. A traceback is a bug.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from nalora_jax.common import notes, terminal
from nalora_jax.common.redaction import redact
from nalora_jax.errors import (
    Interrupted,
    ListedError,
    LostPeerError,
    NaloraError,
    visible,
)

# Error codes that are caused by the machine or a path, not by the library.
_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EFBIG,
    errno.EMFILE,
)
_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
# Subcommands that run for hours, and must continue if the reader of their output ends.
_LASTING = ("train", "study")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand of ``argv`` (default: the process's); returns the exit status."""
    words = argv
    if words is None:
        words = sys.argv[1:]
    terminal.open_closed_streams()
    # Imports and tracing make millions of objects and little garbage: a seventh of the time to a
    # first step.
    gc.set_threshold(100_000, 10, 10)

    def run() -> None:
        # after the terminal's streams are open
        from nalora_jax.cli.command import (
            execute,
        )

        execute(_take_log_format(words))

    lasts = any(word in _LASTING for word in words[:1])
    with terminal.outlive_terminal() if lasts else terminal.replace_streams("stderr"):
        status = guard(run)
    if argv is None and status == 128 + signal.SIGTERM:
        # The process ends now: the same request, sent twice, must not kill it instead.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return status


def guard(run: Callable[[], None]) -> int:
    """Returns the exit status of ``run``; an error that is not a bug is printed in one line."""
    notes.log_to_stderr()
    try:
        run()
        sys.stdout.flush()
    except LostPeerError as error:
        _fail(str(error))
        sys.stdout.flush()
        # a normal exit from JAX's group would wait for the lost processes
        os._exit(error.status)
    except ListedError as error:
        return _fail(*str(error).splitlines())
    except NaloraError as error:
        return _fail(str(error))
    except Interrupted as stopped:
        print(redact(visible(str(stopped))), file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. `nalora eval ... | head`
        terminal.silence(sys.stdout)
        return 141
    except OSError as error:
        if error.errno not in (*_MACHINE, *_PATHS):
            raise
        return _fail(f"{error.filename or 'output'}: {error.strerror}")
    except (RuntimeError, ValueError, AssertionError) as error:
        if (complaint := _jax_complaint(error)) is None:
            raise
        return _fail(complaint)
    return 0


def _jax_complaint(error: Exception) -> str | None:
    """Returns a message if JAX cannot start with the environment's settings, or None.

    For example JAX_PLATFORMS=cuda without a GPU.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__")
    if module == "jax._src.config":
        return str(error)  # it names the variable
    if module != "jax._src.xla_bridge":
        return None
    reason = (
        str(error).partition(" (set JAX_PLATFORMS")[0] or "its plugin is not installed"
    )
    platforms = os.environ.get("JAX_PLATFORMS", "any platform")
    where = "JAX_PLATFORMS"
    expected = "a platform with a device on this machine"
    return str(
        NaloraError(
            where,
            expected=expected,
            found=f"{platforms} ({reason})",
            remedy="unset it, or use cpu",
        )
    )


def _fail(*lines: str) -> int:
    message = redact(visible("\n  ".join(" ".join(line.split()) for line in lines)))
    print(
        json.dumps({"level": "ERROR", "message": message})
        if notes.writes_json()
        else f"error: {message}",
        file=sys.stderr,
    )
    return 2


def _take_log_format(argv: Sequence[str]) -> list[str]:
    """Removes ``--log-format`` from the arguments; stores it in the environment for subprocesses.

    Every subcommand has this option.
    """
    remaining: list[str] = []
    words = iter(argv)
    for word in words:
        if word != "--log-format" and not word.startswith("--log-format="):
            remaining.append(word)
            continue
        if "=" in word:
            log_format = word.partition("=")[2]
        else:
            log_format = next(words, "nothing")
        if log_format not in ("text", "json"):
            raise NaloraError("--log-format", expected="text or json", found=log_format)
        os.environ[notes.LOG_FORMAT] = log_format
    return remaining


if __name__ == "__main__":
    sys.exit(main())
