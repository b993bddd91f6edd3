"""Doing finished runs again: whether the records say what this code on this machine computes."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from nalora_jax.errors import NaloraError
from nalora_jax.study.execution import perform
from nalora_jax.study.laboratory import Laboratory
from nalora_jax.study.plan import wanted
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Records
from nalora_jax.train.machine import describe_device

# Nats per token. The same program on the same kind of machine gives the same bits; another order of sums gives less
# than this in a few hundred steps, and another computation more.
TOLERANCE = 1e-3


def verify(protocol: Protocol, *, count: int = 3, seed: int | None = None) -> str:
    """Does ``count`` finished runs again, drawn at random, and compares their losses with the records.

    Drawn are runs that this kind of machine recorded, as long as there is one: another kind adds in another order, and
    hundreds of steps make a difference of it that says nothing about the code.

    Args:
      protocol: of the study.
      count: how many, at most.
      seed: of the draw; by default another one every time.

    Returns:
      One line per run with both losses, and a last one if runs of other machines were left out.

    Raises:
      NaloraError: there is no record, or a loss differs by more than `TOLERANCE`.
    """
    records, laboratory = Records(protocol.folder).read(), Laboratory(protocol)
    finished = [run for run in wanted(protocol, records) if run.id in records]
    if not finished:
        raise NaloraError(str(protocol.folder), expected="at least one finished run", found="none")
    here = describe_device()
    ours = [run for run in finished if records[run.id]["device"] == here] or finished
    lines = []
    for run in random.Random(seed).sample(ours, min(count, len(ours))):
        with tempfile.TemporaryDirectory() as folder:
            again = perform(run, laboratory, Path(folder) / "snapshot.npz")
        old, new = records[run.id], again
        for name in ("validation", "test"):
            then, now = (one.get(name, {}).get("loss") for one in (old, new))
            if then is None and now is None:
                continue
            same = None not in (then, now) and abs(then - now) <= TOLERANCE
            line = f"{run}: {name} loss {then} in the record, {now} now"
            if not same:
                raise NaloraError(line, expected=f"a difference of at most {TOLERANCE:g}", found="more")
            lines.append(line)
    if len(ours) < len(finished):
        lines.append(f"drawn from the {len(ours)} of {len(finished)} runs that were recorded on {here}")
    return "\n".join(lines)
