"""A run that moves from 1 process to 2, to 8 devices of one process and to 2, and equals the run that stayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.config import MeshConfig, TrainConfig
from nalora_jax.errors import NaloraError
from tests import tiny
from tests.layout.elastic import Record, advance


def in_processes(count: int, folder: Path, steps: int) -> list[Record]:
    started = tiny.start(
        ["-m", "tests.layout.elastic", str(folder), str(steps)],
        count=count,
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    done = []
    for status, out, error in tiny.finish(started):
        assert status == 0, error
        words = [line.split()[1:] for line in out.splitlines() if line.startswith("STEP")]
        done.append([(int(step), tokens, float(loss)) for step, tokens, loss in words])
    assert all(one == done[0] for one in done)
    return done[0]


def test_a_run_that_moves_between_processes_and_devices_goes_on_as_if_it_had_stayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NALORA_CACHE", tiny.new_cache(tmp_path / "cache"))
    alone = tiny.make_config(tmp_path, steps=12)
    stayed = advance(replace(alone, output=str(tmp_path / "stayed")), 10, 1)
    moved = advance(alone, 3, 1)
    moved += in_processes(2, tmp_path, 3)
    moved += advance(replace(alone, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), 2, 8)
    moved += advance(replace(alone, mesh=MeshConfig(1, 2, 1)), 2, 2)
    assert [(step, tokens) for step, tokens, _ in moved] == [(step, tokens) for step, tokens, _ in stayed]
    assert len({tokens for _, tokens, _ in moved}) > 8
    np.testing.assert_allclose([loss for *_, loss in moved], [loss for *_, loss in stayed], rtol=2e-4)

    other = replace(alone, train=TrainConfig(batch_size=4))
    with pytest.raises(
        NaloraError, match=r"train\.batch_size = 8, found train\.batch_size = 4; restore these"
    ):
        advance(other, 1, 1)
