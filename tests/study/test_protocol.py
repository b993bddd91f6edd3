"""What a protocol may say, and what is said about one that is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nalora_jax.config import DataConfig, LoRARule, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import resolve
from nalora_jax.study.locations import locate_settings
from nalora_jax.study.planned_runs import list_pending
from nalora_jax.study.protocol import read_protocol
from tests.study.conftest import write_study


def changed(study: Path, pattern: str, text: str) -> Path:
    """The study with one place of its protocol replaced."""
    path = study / "protocol.toml"
    before = path.read_text()
    after = re.sub(pattern, lambda _: text, before, count=1, flags=re.MULTILINE)
    assert after != before
    path.write_text(after)
    return study


def test_a_methods_settings_replace_the_common_settings(study: Path) -> None:
    protocol = read_protocol(study)
    config = protocol.config(protocol.models[0], "z", "half", 0.01, 7)
    assert config.lora.rules == (LoRARule("ffn/gate_proj", 2),)
    assert config.optimizer.rates == (("gate_proj", 0.5),)
    assert (config.optimizer.learning_rate, config.seed, config.steps) == (0.01, 7, 8)
    data = config.data
    assert (data.train_split, data.max_length, data.eval_limit) == ("train[:60%]", 16, 20)
    assert protocol.config(protocol.models[0], "z", "lora", 0.01, 7).optimizer.rates == ()
    assert read_protocol(study / "protocol.toml") == protocol  # the file does as well as its folder


def test_a_method_without_gate_adapters_keeps_the_other_rules(study: Path) -> None:
    changed(study, "^lora.rules.*", 'lora.rules = [{pattern = "ffn/(gate|up)_proj", rank = 2}]')
    protocol = read_protocol(changed(study, "^about = .*", "no_gate = true"))
    config = protocol.config(protocol.models[0], "z", "half", 0.01, 7)
    shapes = {f"layers/ffn/{name}_proj": (8, 16) for name in ("gate", "up", "down")}
    assert [path for path, _ in resolve(config.lora, shapes, 2).targets] == ["layers/ffn/up_proj"]
    others = protocol.config(protocol.models[0], "z", "lora", 0.01, 7).lora
    assert len(resolve(others, shapes, 2).targets) == 2


def test_a_protocols_digest_ignores_comments_and_layout(study: Path) -> None:
    digest = read_protocol(study).digest
    spaced = changed(study, "^steps = 8", "# as many as there is time for\nsteps   =  8")
    assert read_protocol(spaced).digest == digest
    assert read_protocol(changed(study, "^test_seeds.*", "test_seeds = [1, 3]")).digest != digest


WRONG = [
    ("^extend.*", "margin = -0.1", r"margin: expected a number in \[0, 1e6\], found -0.1"),
    (
        "^items = 20",
        "items = -1",
        r"\[probes.z_again\] items: expected a whole number in .*, found -1",
    ),
    (
        "^steps = 8",
        "stepz = 8",
        r"\[run\] stepz: expected a field of RunConfig, .*did you mean steps\?",
    ),
    (
        "^settings.*",
        "settings.steps = 9",
        r"\[methods.half\] settings: expected no setting that belongs",
    ),
    (
        "^settings.*",
        "settings.optimizer.learning_rate = 1",
        "no learning rate, which the grid gives",
    ),
    (
        '^placebo_of = "half"',
        'placebo_of = "x"',
        r"\[methods.again\] placebo_of: expected another method",
    ),
    (
        '^baseline = "lora"',
        'baseline = "lore"',
        "baseline: expected one of lora, half, again, found lore",
    ),
    ("^rates.*", "rates = [2e-2, 1e-2]", "rates: expected ascending rates"),
    ("^test_seeds.*", "test_seeds = [0, 1]", "test_seeds: expected no seed that tunes"),
    (
        "^validation =",
        "valid =",
        r"tasks.z.valid: expected a field of Task, .*; did you mean validation\?",
    ),
    (
        "^data = .*",
        'data = {max_length = 16}\nvision = {task = "chat"}',
        r'\[tasks.z\] vision task: expected "classify", "contrast", or none .* found "chat"',
    ),
    ("^question =", "question", "expected a TOML file"),
    (
        "^steps = 8",
        'steps = 8\nrl = {rewards = ["number"], samples = 2, updates = 3}',
        "expected a multiple of rl.updates, 3",
    ),
]


def test_an_invalid_protocol_is_refused_with_the_name_of_its_field(study: Path) -> None:
    text = (study / "protocol.toml").read_text()
    for pattern, replacement, message in WRONG:
        (study / "protocol.toml").write_text(text)
        with pytest.raises(NaloraError, match=f"protocol.toml: .*{message}"):
            read_protocol(changed(study, pattern, replacement))


def test_paths_are_relative_to_the_study_and_names_of_models_stay_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    for name in ("socialiqa", "train", "photos", "org/model"):
        (folder / name).mkdir(parents=True)
    (folder / "b.csv").write_text("x")
    monkeypatch.chdir(tmp_path)

    def paths(**data: str) -> list[str]:
        config = locate_settings(
            RunConfig(model="org/model", data=DataConfig(**data)), Path("study")
        )
        return [config.model, config.data.dataset, config.data.train_split, config.data.eval_split]

    named = paths(dataset="socialiqa", train_split="train[:5]", eval_split="train")
    assert named == ["study/org/model", "socialiqa", "train[:5]", "train"]
    assert paths(dataset="hf:a/b", eval_split="b.csv")[1::2] == ["hf:a/b", "study/b.csv"]
    mixed = paths(dataset="missing.jsonl*3,gs://x/y.jsonl,./photos,/abs/z.jsonl")
    assert mixed[1] == "study/missing.jsonl*3,gs://x/y.jsonl*1,study/photos*1,/abs/z.jsonl*1"
    (tmp_path / "here.jsonl").write_text("{}")
    with pytest.raises(
        NaloraError, match="study: here.jsonl: expected a path relative to the study's folder"
    ):
        paths(dataset="here.jsonl")
    write_study(folder, Path("org/model"), Path("z.jsonl"))
    run = list_pending(read_protocol("study"), {})[0]
    assert (run.config.model, run.config.data.dataset) == ("study/org/model", "study/z.jsonl")
    monkeypatch.chdir(folder)
    assert list_pending(read_protocol("."), {})[0].id == run.id
