"""The native kernels of every kind that this CPU has; with vectors only, also those for tiles,
which are emulated."""

from __future__ import annotations

from pathlib import Path

import pytest

from nalora_jax.common import processor
from nalora_jax.cpu.native import library

EMULATED = Path(__file__).with_name("emulated_tiles.h")
QUICK = "-O0"  # -O3 takes 13 s more; tiles are emulated with -O1, which is 3 s more
KINDS = [*processor.kinds(), *(["emulated"] if processor.kinds()[:1] == ("vectors",) else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Numbers are tested in every kind, their callers in the kind that this machine's users get."""
    if "kernels" in metafunc.fixturenames:
        every = getattr(metafunc.module, "EVERY_KIND", False)
        metafunc.parametrize("kernels", KINDS if every else KINDS[:1], indirect=True)


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes `nalora_jax.cpu.native` available for a test, whatever the machine."""
    monkeypatch.setenv("NALORA_NATIVE", request.param)
    if request.param == "emulated":
        flags = ("-DNALORA_TILES", "-include", str(EMULATED), *library._VECTORS, "-O1")
        monkeypatch.setitem(library._FLAGS, "emulated", flags)
        monkeypatch.setattr(processor, "kinds", lambda: ("emulated",))
    elif request.param != KINDS[0]:  # users of this machine get the first one
        monkeypatch.setitem(library._FLAGS, request.param, (*library._FLAGS[request.param], QUICK))
    assert library.kind() == request.param
    return str(request.param)
