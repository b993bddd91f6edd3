"""YAML and JSON settings, what is typed for what, and what a dry run says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nalora_jax.cli import command, verbs
from nalora_jax.cli.config_files import as_yaml, load_config
from nalora_jax.config import DataConfig, LoRAConfig, LoRARule, MeshConfig, OptimizerConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.targets import resolve
from tests import tiny

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
    (tmp_path / "a.yaml").write_text(as_yaml(config, changed_only=changed_only))
    assert load_config(tmp_path / "a.yaml") == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [1", "expected a YAML file"),
        ("lora: 3", r"a\.yaml: lora: expected settings by name, found 3"),
        ("step: 3", r"step: expected a field of RunConfig, found none of that name; did you mean steps\?"),
        (
            "data: {dataste: x}",
            r"data\.dataste: expected a field of DataConfig, .*; did you mean dataset\?",
        ),
        ("optimizer: {learning_rate: fast}", r"optimizer\.learning_rate: expected a number, found 'fast'"),
        ("lora: {init: pisa}", "lora.init: expected one of default, pissa, .*, found 'pisa'"),
        ("!!python/object/apply:os.system ['false']", "expected a YAML file"),
    ],
)
def test_broken_settings_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(NaloraError, match=said):
        load_config(tmp_path / "a.yaml")


def test_no_mechanism_is_plain_lora() -> None:
    for words in (["--mechanisms", "none"], ["--mechanisms=none"], ["--mechanisms"]):
        _, args = command.parse(["train", *words, "--steps", "3"])
        assert args.run.mechanisms == ()


def test_what_is_typed_short(tmp_path: Path) -> None:
    _, args = command.parse(["train", "--data.max-length", "auto", "--epochs", "2"])
    assert (args.run.data.max_length, args.run.epochs) == (0, 2.0)
    _, args = command.parse(["train", "--data.max-length=auto", "--resume", "auto"])
    assert (args.run.data.max_length, args.run.resume) == (0, "auto")
    for words in (["--optimizer.learning-rate", "auto"], ["--optimizer.learning-rate=auto"]):
        _, args = command.parse(["train", "--config", "configs/clip_few_shot.py", *words])
        assert args.run.optimizer.learning_rate == 0
    (tmp_path / "a.yaml").write_text("optimizer: {learning_rate: auto}")
    assert load_config(tmp_path / "a.yaml") == replace(
        RunConfig(), optimizer=replace(RunConfig().optimizer, learning_rate=0.0)
    )
    with pytest.raises(NaloraError, match="--steps: expected steps or epochs, found both"):
        command.parse(["train", "--steps", "3", "--epochs", "1"])
    recorded = replace(RunConfig(), steps=57, epochs=3.0, model="mine", output="elsewhere")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"run": recorded.to_dict()}) + "\n")
    for words in (["--resume", str(folder)], [f"--resume={folder}"], ["--output", str(folder), "--resume"]):
        _, args = command.parse(["train", *words])
        assert args.run == replace(recorded, output=str(folder), resume=True, epochs=0.0)
    _, args = command.parse(["train", "--resume", str(folder), "--steps", "99"])
    assert args.run.steps == 99


def test_a_dry_run_says_what_would_run_and_loads_no_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nalora_jax.data.pipeline.SHORTEST", 1)
    config = tiny.make_config(tmp_path, mesh=MeshConfig())
    config = replace(
        config,
        epochs=3.0,
        data=replace(config.data, eval_split="auto", train_split="train", max_length=0),
        optimizer=OptimizerConfig(learning_rate=0.0),
    )
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.write_bytes(b"no weights")
    settings = tmp_path / "settings.yaml"
    settings.write_text(as_yaml(config))
    _, args = command.parse(["train", "--config", str(settings), "--dry-run"])
    verbs.train(args)
    assert not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    (tmp_path / "resolved.yaml").write_text(text)
    resolved = load_config(tmp_path / "resolved.yaml")
    assert resolved.optimizer.learning_rate == 0.004
    # 2 letters, the answer and its end: 3 positions. Rows of 8 would be 75% full, of 16 they are 94%.
    assert resolved.data.max_length == 16
    # 48 records, five in a row, 8 rows a step.
    assert resolved.steps == -(-3 * 10 // 8)
    assert "optimizer:" in text
    assert "weight_decay" not in text  # the default
    base = tiny.ModelConfig.from_hf(tiny.HF)
    spec = resolve(config.lora, tiny_shapes(base), base.n_layers)
    count = sum(leaf.size for leaf in jax.tree.leaves(init_lora(base, spec, jax.random.key(0))))
    assert f"# adapters: {count:,} trained parameters, 3 projections a layer" in text
    embed, attention, ffn = 28 * 16, 4 * 16 * 16, 3 * 16 * 32
    assert f"# base model: {embed + 2 * (attention + ffn + 2 * 16) + 16:,} parameters" in text
    assert "# held out: 4 examples that results are reported on, 2 that choose the checkpoint" in text
    assert re.search(r"# memory of a device, estimated: 0\.0\d GB \(weights 0\.00, ", text)
    verbs.train(command.parse(["train", "--config", str(settings), "--dry-run", "--all"])[1])
    (tmp_path / "every.yaml").write_text(capsys.readouterr().out)
    assert "weight_decay: 0.0" in (tmp_path / "every.yaml").read_text()
    assert load_config(tmp_path / "every.yaml") == resolved
    words = ["train", "--config", str(settings), "--lora.modules-to-save", "embed_tokens", "--dry-run"]
    verbs.train(command.parse(words)[1])
    assert f"# adapters: {count + embed:,} trained parameters" in capsys.readouterr().out
    words[4:5] = [
        "embed_tokens",
        "lm_head",
        "--data.add-tokens",
        "<x>",
        "--data.add-special-tokens",
        "<go>",
    ]
    verbs.train(command.parse(words)[1])
    text, rows = capsys.readouterr().out, embed + 2 * 16
    assert "# added tokens: '<go>' 28, '<x>' 29; the embedding has 30 rows" in text
    assert f"# base model: {rows + 2 * (attention + ffn + 2 * 16) + 16:,} parameters" in text
    assert f"# adapters: {count + 2 * rows:,} trained parameters" in text
    (tmp_path / "resolved.yaml").write_text(text)
    assert load_config(tmp_path / "resolved.yaml").data.add_special_tokens == ("<go>",)


def test_a_dry_run_shows_every_warning_of_the_run_and_every_run_of_a_sweep(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nalora_jax.cli.dry_run.device_memory", lambda: 1000)
    config = tiny.make_config(tmp_path, mesh=MeshConfig(), steps=9, mechanisms=("hard",))
    settings = tmp_path / "settings.yaml"
    settings.write_text(as_yaml(config))
    words = ["train", "--config", str(settings), "--dry-run", "--train.eval-every", "3"]
    verbs.train(command.parse(words)[1])
    text = capsys.readouterr().out
    assert "# mechanisms: hard, from step 11" in text
    assert (
        f"#   nalora plan --model {config.model} --topology v5e:4x4 --seq {config.data.max_length}" in text
    )
    assert "mechanisms act from step 11, and the run ends at step 9: it is plain LoRA" in caplog.text
    assert "only 2 examples choose the checkpoint" in caplog.text
    sweep = [
        "--sweep",
        "mechanisms=hard,none",
        "--sweep",
        "lora.rules=gate_proj:2,up_proj:4:8",
        "--steps",
        "20",
    ]
    verbs.train(command.parse([*words, *sweep])[1])
    lines = capsys.readouterr().out.splitlines()[-5:]
    output = f"#   {config.output}/mechanisms"
    assert lines == [
        "# 4 runs, the first one as above:",
        f"{output}-hard_rules-gate-proj-2: mechanisms hard, lora.rules gate_proj:2",
        f"{output}-hard_rules-up-proj-4-8.0: mechanisms hard, lora.rules up_proj:4:8",
        f"{output}-none_rules-gate-proj-2: mechanisms none, lora.rules gate_proj:2",
        f"{output}-none_rules-up-proj-4-8.0: mechanisms none, lora.rules up_proj:4:8",
    ]
    assert "no adapter sits on a gate" not in caplog.text
    verbs.train(command.parse([*words, "--lora.rules", "up_proj:2"])[1])
    assert "no adapter sits on a gate" in caplog.text
    for value, message in (("[]", "mechanism"), ("harder", "mechanism")):
        with pytest.raises(NaloraError, match=message):
            verbs.train(command.parse([*words, "--sweep", f"mechanisms=hard,{value}"])[1])


def tiny_shapes(base: Any) -> Any:
    from nalora_jax.models.stacks import projection_shapes

    return projection_shapes(base)
