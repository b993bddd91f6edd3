"""A process whose terminal or standard streams go away continues; `test_elastic.py` does so with a run."""

import os
import pty
import subprocess
import sys
import time

# Makes the terminal on standard input the process's own: closing the terminal's other end then sends SIGHUP.
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
TAKE_TERMINAL += "os.execv(sys.argv[1], sys.argv[1:])"
PRINTS = """
import sys, time
from pathlib import Path
from nalora_jax.common import terminal
terminal.open_closed_streams()
with terminal.outliving_terminal():
    for name in ("first", "second"):
        Path(sys.argv[1], name).touch()
        while not Path(sys.argv[1], f"after {name}").exists():
            print("out", flush=True)
            print("error", file=sys.stderr, flush=True)
            time.sleep(0.01)
"""


def test_a_process_without_standard_output_outlives_its_terminal(tmp_path):
    """SIGHUP, and EIO on standard error."""
    mine, theirs = pty.openpty()
    without_output = ["/bin/sh", "-c", 'exec "$@" >&-', "sh"]
    command = [sys.executable, "-c", TAKE_TERMINAL, *without_output, sys.executable, "-c", PRINTS]
    process = subprocess.Popen(
        [*command, str(tmp_path)], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    with os.fdopen(mine, "rb", buffering=0) as screen:
        assert screen.read(5) == b"error"
    (tmp_path / "after first").touch()
    while not (tmp_path / "second").exists():
        assert process.poll() is None, process.returncode
        time.sleep(0.01)
    time.sleep(0.1)  # in which it writes to streams without another end
    (tmp_path / "after second").touch()
    assert process.wait(60) == 0
