"""The native kernels as plain C++, which runs everywhere, and on the tiles of a CPU that has them."""

from __future__ import annotations

import jax
import pytest

from nalora_jax import native

KINDS = ["plain", "tiles"] if native.has_tiles() else ["plain"]


@pytest.fixture(params=KINDS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes `nalora_jax.native` available for a test, whatever the machine."""
    monkeypatch.setenv("NALORA_NATIVE", "plain" if request.param == "plain" else "1")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert native.available()
    return str(request.param)
