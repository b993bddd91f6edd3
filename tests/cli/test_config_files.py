"""YAML and JSON settings, what is typed for what, and what a dry run says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nalora_jax.cli import command, verbs
from nalora_jax.cli.config_files import format_yaml, load_config
from nalora_jax.config import (
    DataConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from nalora_jax.errors import NaloraError
from tests import tiny

CONFIGS = Path(__file__).parents[2] / "configs"
SETTINGS: dict[str, Any] = {
    "model": "somewhere",
    "epochs": 2,
    "resume": "auto",
    "lora": {"rules": ["ffn:16:32", {"pattern": "attn/(q|v)_proj", "rank": 4, "alpha": 8}]},
    "optimizer": {"learning_rate": "2e-3", "rates": [["gate", 2]]},
    "mechanisms": ["soft:power=2", "homogeneity:gains=1/1/1/2"],
    "data": {"dataset": "chat.jsonl", "max_length": "auto"},
}
EXPECTED = RunConfig(
    model="somewhere",
    epochs=2.0,
    resume="auto",
    lora=LoRAConfig(rules=(LoRARule("ffn", 16, 32.0), LoRARule("attn/(q|v)_proj", 4, 8.0))),
    optimizer=OptimizerConfig(learning_rate=2e-3, rates=(("gate", 2.0),)),
    data=DataConfig(dataset="chat.jsonl", max_length=0),
    mechanisms=("soft:power=2", "homogeneity:gains=1/1/1/2"),
)


def test_yaml_and_json_hold_what_differs_from_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(SETTINGS).replace("'2e-3'", "2e-3"))
    (tmp_path / "empty.yml").write_text("# nothing\n")
    for name in ("a.json", "a.yaml"):
        assert load_config(tmp_path / name) == EXPECTED
    assert load_config(tmp_path / "empty.yml") == RunConfig()
    _, args = command.parse(["train", "--config", str(tmp_path / "a.yaml"), "--seed", "3"])
    assert args.run == replace(EXPECTED, seed=3)


@pytest.mark.parametrize("config", [RunConfig(), EXPECTED])
@pytest.mark.parametrize("changed_only", [False, True])
def test_settings_survive_yaml(tmp_path: Path, config: RunConfig, changed_only: bool) -> None:
    (tmp_path / "a.yaml").write_text(format_yaml(config, changed_only=changed_only))
    assert load_config(tmp_path / "a.yaml") == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [1", "expected a YAML file"),
        ("lora: 3", r"a\.yaml: lora: expected settings by name, found 3"),
        ("step: 3", r"step: expected a field of RunConfig, .*; did you mean steps\?"),
        ("data: {dataste: x}", r"data\.dataste: expected a field of .*; did you mean dataset\?"),
        (
            "optimizer: {learning_rate: fast}",
            r"optimizer\.learning_rate: expected a number, found 'fast'",
        ),
        ("!!python/object/apply:os.system ['false']", "expected a YAML file"),
    ],
)
def test_broken_settings_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(NaloraError, match=said):
        load_config(tmp_path / "a.yaml")


def test_what_is_typed_short(tmp_path: Path) -> None:
    for words in (["--mechanisms", "none"], ["--mechanisms=none"], ["--mechanisms"]):
        assert command.parse(["train", *words, "--steps", "3"])[1].run.mechanisms == ()
    _, args = command.parse(["train", "--data.max-length", "auto", "--epochs", "2"])
    assert (args.run.data.max_length, args.run.epochs) == (0, 2.0)
    _, args = command.parse(["train", "--data.max-length=auto", "--resume", "auto"])
    assert (args.run.data.max_length, args.run.resume) == (0, "auto")
    for words in (["--optimizer.learning-rate", "auto"], ["--optimizer.learning-rate=auto"]):
        _, args = command.parse(["train", "--config", str(CONFIGS / "clip_few_shot.py"), *words])
        assert args.run.optimizer.learning_rate == 0
    (tmp_path / "a.yaml").write_text("optimizer: {learning_rate: auto}")
    assert load_config(tmp_path / "a.yaml").optimizer.learning_rate == 0
    with pytest.raises(NaloraError, match="--steps: expected steps or epochs, found both"):
        command.parse(["train", "--steps", "3", "--epochs", "1"])
    recorded = replace(RunConfig(), steps=57, epochs=3.0, model="mine", output="elsewhere")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"run": recorded.to_dict()}) + "\n")
    for words in (
        ["--resume", str(folder)],
        [f"--resume={folder}"],
        ["--output", str(folder), "--resume"],
    ):
        _, args = command.parse(["train", *words])
        assert args.run == replace(recorded, output=str(folder), resume=True, epochs=0.0)
    _, args = command.parse(["train", "--resume", str(folder), "--steps", "99"])
    assert args.run.steps == 99


@pytest.fixture
def dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Prints what `nalora train --dry-run FLAGS` says of a run with settings in a file."""
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))

    def run(config: RunConfig, flags: str = "") -> str:
        settings = tmp_path / "settings.yaml"
        settings.write_text(format_yaml(config))
        verbs.train(
            command.parse(["train", "--config", str(settings), "--dry-run", *flags.split()])[1]
        )
        return capsys.readouterr().out

    return run


def test_a_dry_run_says_what_would_run_and_loads_no_weight(
    tmp_path: Path, dry_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nalora_jax.data.pipeline.SHORTEST", 1)
    config = tiny.make_config(
        tmp_path, mesh=MeshConfig(), epochs=3.0, optimizer=OptimizerConfig(learning_rate=0.0)
    )
    config = replace(
        config, data=replace(config.data, eval_split="auto", train_split="train", max_length=0)
    )
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.write_bytes(b"no weights")
    text = dry_run(config)
    assert not (tmp_path / "run").exists()
    (tmp_path / "resolved.yaml").write_text(text)
    resolved = load_config(tmp_path / "resolved.yaml")
    # 2 letters, the answer and its end: 3 positions. Rows of 8 would be 75% full, of 16 they are
    # 94%. 48 records, five in a row, 8 rows a step.
    figures = (resolved.optimizer.learning_rate, resolved.data.max_length, resolved.steps)
    assert figures == (0.004, 16, -(-3 * 10 // 8))
    assert "weight_decay" not in text  # the default
    embed, attention, ffn = 28 * 16, 4 * 16 * 16, 3 * 16 * 32
    count = 2 * 3 * 4 * (16 + 32)  # of two layers' adapters of rank 4
    assert f"# adapters: {count:,} trained parameters, 3 projections a layer" in text
    assert f"# base model: {embed + 2 * (attention + ffn + 2 * 16) + 16:,} parameters" in text
    assert (
        "# held out: 4 examples that results are reported on, 2 that choose the checkpoint" in text
    )
    assert re.search(r"# memory of a device, estimated: 0\.0\d GB \(weights 0\.00, ", text)
    (tmp_path / "every.yaml").write_text(dry_run(config, "--all"))
    assert "weight_decay: 0.0" in (tmp_path / "every.yaml").read_text()
    assert load_config(tmp_path / "every.yaml") == resolved
    text = dry_run(config, "--lora.modules-to-save embed_tokens lm_head --data.add-tokens <x>")
    assert "# added tokens: '<x>' 28; the embedding has 29 rows" in text
    assert f"# adapters: {count + 2 * (embed + 16):,} trained parameters" in text


def test_a_dry_run_shows_every_warning_of_the_run_and_every_run_of_a_sweep(
    tmp_path: Path,
    dry_run: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nalora_jax.cli.dry_run.device_memory", lambda: 1000)
    train = TrainConfig(batch_size=8, eval_every=3)
    config = tiny.make_config(
        tmp_path, mesh=MeshConfig(), steps=9, mechanisms=("hard",), train=train
    )
    text = dry_run(config)
    assert "# mechanisms: hard, from step 11" in text
    assert f"#   nalora plan --model {config.model} --topology v5e:4x4 --seq" in text
    assert (
        "mechanisms act from step 11, and the run ends at step 9: it is plain LoRA" in caplog.text
    )
    assert "only 2 examples choose the checkpoint" in caplog.text
    sweep = "--sweep mechanisms=hard,none --sweep lora.rules=gate_proj:2,up_proj:4:8 --steps 20"
    lines = dry_run(config, sweep).splitlines()[-5:]
    assert lines[0] == "# 4 runs, the first one as above:"
    folder = f"{config.output}/mechanisms-hard_rules-up-proj-4-8.0"
    assert lines[2] == f"#   {folder}: mechanisms hard, lora.rules up_proj:4:8"
    assert "no adapter sits on a gate" not in caplog.text
    dry_run(config, "--lora.rules up_proj:2")
    assert "no adapter sits on a gate" in caplog.text
    with pytest.raises(NaloraError, match="mechanism"):
        dry_run(config, "--sweep mechanisms=hard,harder")
