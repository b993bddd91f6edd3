"""The native kernels as plain C++, which runs everywhere, and with the vectors and the tiles of a CPU that has them."""

from __future__ import annotations

import jax
import pytest

from nalora_jax import native


@pytest.fixture(params=native.kinds())
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes `nalora_jax.native` available for a test, whatever the machine."""
    monkeypatch.setenv("NALORA_NATIVE", request.param)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert native.available()
    return str(request.param)
