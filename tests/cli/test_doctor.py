"""``nalora doctor``: it reports this machine, and finds what is known to be wrong."""

from __future__ import annotations

import importlib.metadata
import platform

import pytest

from nalora_jax.__main__ import main
from tests import tiny


def test_it_reports_versions_devices_kernels_and_caches(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path))
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "data").write_bytes(bytes(2_500_000))
    assert main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"python {platform.python_version()}" in lines
    assert f"jax {importlib.metadata.version('jax')}" in lines
    assert "devices 8 (cpu)" in lines
    assert f"folder {tmp_path}" in lines
    assert "No problem found." in lines
    assert "tokenized data 2.5 MB" in lines
    if tiny.HAS_CPU:
        assert any(line.startswith("kernels ") for line in lines)


def test_what_is_wrong_is_named_and_ends_with_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path))
    (tmp_path / "native").mkdir()
    (tmp_path / "native").chmod(0o777)
    monkeypatch.setenv("NALORA_NATIVE", "magic")
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 1
    problems = capsys.readouterr().out.partition("Problems\n")[2]
    if tiny.HAS_CPU:
        assert "! NALORA_NATIVE: expected 0, 1 or" in problems
    assert "! compiled CPU kernels are not kept: " in problems
