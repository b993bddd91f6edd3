"""Whole sweeps on a tiny model: the folders that they leave, divergence, interruption and
resumption."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax.__main__ import main
from nalora_jax.cli import training
from nalora_jax.config import MeshConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds import text
from nalora_jax.study.sweeps.sweep_run import SweepResult, sweep
from nalora_jax.train.progress import Progress
from tests import tiny

pytestmark = pytest.mark.usefixtures("surroundings")

RATES = (2e-2, 1e-2, 1e3)  # the last one diverges, with a weight decay of the same size


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own, and runs on one device."""
    with tiny.on_named_devices(tmp_path_factory.mktemp("new") / "cache"):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("sweeps")
    config = tiny.make_config(folder, mesh=MeshConfig(data=1, fsdp=1, tensor=1, run=1))
    # A sweep's, so that a solo run shares its programs.
    compute = replace(config.compute, implementation="xla")
    return replace(config, train=replace(config.train, log_every=4), compute=compute)


def _configs(base: RunConfig, folder: Path) -> list[RunConfig]:
    configs = []
    for rate in RATES:
        decay = rate if rate == 1e3 else 0.0
        optimizer = replace(base.optimizer, learning_rate=rate, weight_decay=decay)
        configs.append(replace(base, output=str(folder / f"rate-{rate:g}"), optimizer=optimizer))
    return configs


@pytest.fixture(scope="module")
def swept(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return sweep(_configs(base, tmp_path_factory.mktemp("swept")))


def _adapter(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def _assert_equal(one: Path, other: Path) -> None:
    first, second = _adapter(one), _adapter(other)
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_allclose(
            leaf, second[name], rtol=0, atol=1e-4 * np.max(np.abs(second[name])), err_msg=name
        )


def test_each_run_leaves_what_its_solo_run_leaves(
    swept: SweepResult, base: RunConfig, tmp_path: Path
) -> None:
    folder = next(iter(swept.runs))
    alone = training.run(replace(base, output=str(tmp_path / "alone")))
    _assert_equal(Path(folder), alone.folder)
    assert tiny.logged(folder) == pytest.approx(tiny.logged(alone.folder), rel=1e-5)
    listings = [
        sorted(p.relative_to(f).as_posix() for p in Path(f).glob("*"))
        for f in (folder, alone.folder)
    ]
    assert listings[0] == listings[1]
    assert tiny.lines(folder)[0]["runs_in_program"] == len(RATES)
    assert "runs_in_program" not in tiny.lines(alone.folder)[0]
    assert f"in a program of {len(RATES)} runs" in Path(swept.page).read_text()


def test_a_run_that_diverges_is_frozen_and_reported(swept: SweepResult) -> None:
    ((folder, error),) = swept.diverged.items()
    assert folder.endswith("rate-1000")
    assert "the checkpoints of earlier steps are kept" in str(error)
    done = tiny.lines(folder)[-1]["done"]
    assert "expected" in done["message"]
    assert len(swept.runs) == 2
    assert Path(swept.page).exists()


def test_a_sweep_that_sigterm_stopped_continues_with_other_programs(
    swept: SweepResult, base: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny.write_settings(
        replace(base, output=str(tmp_path / "out")), tmp_path / "settings.py"
    )
    log, signals = Progress.log, []

    def stop_at_3(self: Progress, step: int, values: Any) -> None:
        log(self, step, values)
        if step == 2 and not signals:  # a second signal would stop the process at once
            signals.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "log", stop_at_3)
        options = ["--sweep", "optimizer.learning-rate=2e-2,1e-2"]
        assert main(["train", "--config", str(settings), *options]) == 143
    assert (
        f"saved step 3; continue with --output {tmp_path / 'out'} --resume"
        in capsys.readouterr().err
    )
    assert '"sha256": ' in (tmp_path / "out" / "sweep.json").read_text()
    assert main(["train", "--resume", str(tmp_path / "out"), "--mesh.runs-per-device", "1"]) == 0
    messages = capsys.readouterr().err.splitlines()
    data_notes = [message for message in messages if "training data:" in message]
    assert len(data_notes) == 1
    assert [message for message in messages if "resumed from step" in message] == [
        f"learning-rate-{rate}: resumed from step 3" for rate in ("0.02", "0.01")
    ]
    for folder, rate in zip(swept.runs, ("0.02", "0.01"), strict=True):
        resumed = tmp_path / "out" / f"learning-rate-{rate}"
        _assert_equal(resumed, Path(folder))
        assert tiny.logged(resumed) == pytest.approx(tiny.logged(folder), rel=1e-5)
    assert (tmp_path / "out" / "comparison.html").exists()


def test_bad_sweeps_are_refused_before_the_weights_are_read(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_loaded", None)
    configs = _configs(base, tmp_path)
    many, three = replace(base.mesh, runs_per_device=10**9), replace(base.mesh, run=3)
    on_many, on_three = (
        [replace(config, mesh=mesh) for config in configs] for mesh in (many, three)
    )
    for runs, message in (
        ([], "expected at least one run, found none"),
        ([configs[0], configs[0]], "expected runs with different names, found rate-0.02"),
        (on_many, r"--mesh.runs-per-device: expected at most \d+ runs"),
        (on_three, "--mesh.run: expected a divisor of the 1 device"),
    ):
        with pytest.raises(NaloraError, match=message):
            sweep(runs)
