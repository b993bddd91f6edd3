"""How a run is stopped, and what it takes to go on."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import pytest

from nalora_jax.__main__ import main
from nalora_jax.cli.command import parse
from nalora_jax.config import MeshConfig, RunConfig, TrainConfig
from nalora_jax.errors import Interrupted, NaloraError
from nalora_jax.evaluate.run_log import to_json
from nalora_jax.layout import distributed
from nalora_jax.layout.distributed import make_mesh
from nalora_jax.train import run as run_module
from nalora_jax.train.kinds import text
from nalora_jax.train.progress import Progress
from tests import tiny

pytestmark = pytest.mark.usefixtures("surroundings")

nalora_run = import_module("nalora_jax.cli.training")


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own, and runs on one device."""
    with tiny.on_one_device(tmp_path_factory.mktemp("new") / "cache"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stops")


@pytest.fixture(scope="module")
def stopped(folder: Path) -> RunConfig:
    """A run that SIGTERM stopped after its third step."""
    config = tiny.make_config(folder)
    config = replace(config, train=replace(config.train, log_every=4))
    log = Progress.log

    def stop_at_3(self: Progress, step: int, values: Any) -> None:
        log(self, step, values)
        if step == 2:  # arrives while the loop is at work
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "log", stop_at_3)
        with pytest.raises(Interrupted) as caught:
            nalora_run.run(config)
    assert (caught.value.status, caught.value.saved) == (143, 3)
    assert str(caught.value) == (
        f"interrupted by SIGTERM; saved step 3; continue with --output {config.output} --resume"
    )
    return config


def test_an_evaluation_file_that_was_edited_is_found_when_the_run_goes_on(
    stopped: RunConfig, folder: Path
) -> None:
    questions = folder / "questions.jsonl"
    text = questions.read_text()
    lines = text.splitlines(keepends=True)
    cut = len(lines) * 8 // 10  # of them are trained on
    questions.write_text("".join(lines[:cut]) + "".join(lines[cut:]).replace('"gold": 1', '"gold": 0'))
    try:
        with pytest.raises(
            NaloraError, match="--data.eval-split: expected the questions .*evaluation data has changed"
        ):
            nalora_run.run(replace(stopped, resume=True))
    finally:
        questions.write_text(text)


def test_resume_takes_the_run_s_own_settings_and_names_what_disagrees(
    stopped: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["train", "--output", stopped.output, "--resume"]
    _, args = parse(asked)
    assert args.run == replace(stopped, resume=True)  # type: ignore[union-attr]
    _, args = parse(["train", "--output", stopped.output, "--resume", "auto", "--train.keep", "5"])
    assert args.run == replace(stopped, resume="auto", train=replace(stopped.train, keep=5))  # type: ignore[union-attr]
    _, args = parse(["train", "--output", stopped.output])
    assert args.run == RunConfig(output=stopped.output)  # type: ignore[union-attr]
    assert main([*asked, "--train.batch-size", "4", "--seed", "3"]) == 2
    error = capsys.readouterr().err
    for part in ("seed = 0", "seed = 3", "train.batch_size = 8", "train.batch_size = 4"):
        assert part in error


def test_a_run_that_was_stopped_and_continued_writes_the_bytes_of_one_that_was_not(
    stopped: RunConfig, folder: Path
) -> None:
    resumed = nalora_run.run(replace(stopped, resume="auto"))
    whole = nalora_run.run(replace(stopped, output=str(folder / "whole")))
    for name in ("loss", "tokens", "grad_norm"):  # the line of step 4 includes step 3
        lines = tiny.logged(whole.folder, name)
        assert list(lines) == [2, 4, 6]
        assert tiny.logged(resumed.folder, name) == pytest.approx(lines, rel=1e-8)
    assert resumed.before == whole.before
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes(), name


def test_more_steps_than_the_run_had_are_taken_with_a_warning_that_says_what_that_means(
    stopped: RunConfig, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(folder / "whole")
    assert main(["train", "--output", output, "--resume", "--steps", "8"]) == 0
    assert "--steps 8 instead of 6: the learning-rate schedule spans the steps" in capsys.readouterr().err
    lines = tiny.lines(output)
    assert [line["resumed"]["settings"]["steps"] for line in lines if "resumed" in line] == [8]
    _, args = parse(["train", "--output", output, "--resume"])
    assert args.run.steps == 8  # type: ignore[union-attr]


def test_a_run_that_is_stopped_after_its_steps_says_how_to_go_on(
    stopped: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def measure(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run_module, "finish", measure)
    output = str(folder / "whole")
    with pytest.raises(Interrupted) as caught:
        nalora_run.run(replace(stopped, output=output, steps=8, resume=True))
    assert str(caught.value) == f"interrupted by SIGTERM; continue with --output {output} --resume"
    assert caught.value.status == 143
    assert "resumed from step 8, the last one: no step is left" in caplog.messages


def test_settings_of_another_run_and_fewer_steps_are_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.make_config(folder, output=str(tmp_path / "run"))
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"run": to_json(config.to_dict())}) + "\n")
    monkeypatch.setattr(text, "load_weights", None)
    with pytest.raises(NaloraError, match=r"--resume .*seed = 0, found seed = 3"):
        nalora_run.run(replace(config, resume=True, seed=3))
    with pytest.raises(NaloraError, match=r"--steps: expected 3 or more, .*found 2; leave --steps out"):
        nalora_run.run(replace(config, resume=True, steps=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh": MeshConfig(1, 1, 4)},
            "--mesh.tensor: expected a divisor of the model",
        ),
        (
            {"mesh": MeshConfig(8, 1, 1), "train": TrainConfig(batch_size=12)},
            "--train.batch-size: .*rows",
        ),
        ({"data": {"prompt_field": "ask"}}, "expected a field 'ask'.* --data.prompt-field"),
        ({"data": {"chat": True}}, "chat template"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    config = tiny.make_config(folder, output=str(tmp_path / "run"))
    config = replace(config, **(changes | {"data": replace(config.data, **changes.get("data", {}))}))
    count = config.mesh.data * config.mesh.tensor
    monkeypatch.setattr(distributed, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:count]))
    monkeypatch.setattr(text, "load_weights", None)
    with pytest.raises(NaloraError, match=message):
        nalora_run.run(config)
