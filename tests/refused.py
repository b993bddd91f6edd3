"""The test of a table of refusals: a call, and a part of its message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nalora_jax.errors import NaloraError

# Called with a monkeypatch and an empty folder.
Call = Callable[[pytest.MonkeyPatch, Path], Any]


def table_test(refusals: Mapping[str, tuple[Call, str]]) -> Callable[..., None]:
    """Returns a test with a case for each row: a call, and a pattern that its message matches."""

    @pytest.mark.parametrize("name", refusals)
    def test(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        call, message = refusals[name]
        with pytest.raises(NaloraError, match=message):
            call(monkeypatch, tmp_path)

    return test
