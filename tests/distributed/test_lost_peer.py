"""What is left of standard error when JAX's coordination service ends a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nalora_jax.distributed import lost_peer

# As jaxlib 0.10 writes them.
POLLED = b"E1127 07:11:58.760615   10217 coordination_service_agent.cc:289] Polled an error from coordination service\n"
FATAL = (
    b"F1127 07:11:58.760780   10217 client.h:81] Terminating process because JAX's service detected fatal errors\n"
    b"*** Check failure stack trace: ***\n    @     0x7fa5c1440634  absl::lts_20260107::log_internal::SendToLog()\n"
)
OTHER = b"W1127 07:11:58.760780   10217 cpu_executable.cc:12] slow\n"
OTHER += b"E1127 07:11:58.760780   10217 gpu_timer.cc:82] late\n"


def passed(text: bytes) -> bytes:
    command = [sys.executable, "-S", "-E", lost_peer.__file__]
    return subprocess.run(command, input=text, stderr=subprocess.PIPE, check=True).stderr


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (b"one\n\ntwo\n" + lost_peer.END, b"one\n\ntwo\n"),
        (b"10% done" + lost_peer.END, b"10% done"),
        (b"killed without a word\nErr", b"killed without a word\nErr"),
        (b"one\n" + OTHER + lost_peer.END, b"one\n" + OTHER),
        (b"one\n" + POLLED + FATAL, b"one\n" + lost_peer.LINE),
        (b"error: disk full\n" + POLLED + FATAL, b"error: disk full\n"),
        (POLLED + b"error: late\n", lost_peer.LINE),
    ],
)
def test_all_is_passed_on_but_a_lost_peer_s_trace_which_becomes_one_line(text: bytes, left: bytes) -> None:
    assert passed(text) == left
    assert lost_peer.LINE.count(b"\n") == 1


def test_an_error_that_comes_in_pieces_is_one():
    command = [sys.executable, "-S", "-E", lost_peer.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as filtering:
        assert filtering.stdin is not None
        assert filtering.stderr is not None
        for piece in (b"err", b"or: disk"):
            filtering.stdin.write(piece)
            filtering.stdin.flush()
            assert filtering.stderr.read1() == piece  # passed on before its line is complete
        filtering.stdin.write(b" full\n" + POLLED + FATAL)
        filtering.stdin.close()
        assert filtering.stderr.read() == b" full\n"
