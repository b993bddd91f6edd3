"""Output folders: whole or absent, whatever the file system says."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nalora_jax.errors import NaloraError
from nalora_jax.weights.folders import new_folder


def test_a_disk_that_fills_up_under_safetensors_own_writer_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(
                NaloraError, match=r"adapter: expected a place that can be written, .*File too large"
            ),
            new_folder(tmp_path / "adapter") as scratch,
        ):
            save_file({"x": np.zeros(10_000, np.float32)}, scratch / "adapter_model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not list(tmp_path.iterdir())
