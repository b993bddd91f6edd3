"""The configs of --sweep options, and what cannot be swept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nalora_jax.common.digests import seal
from nalora_jax.config import LoRARule, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.study.sweeps.grid import axes_of, grid, recorded_sweep


def test_all_combinations_become_runs_with_folders_named_by_their_values() -> None:
    runs = grid(
        RunConfig(output="out/"), axes_of(["optimizer.learning-rate=1e-3,2e-3", "--seed=0,1"])
    )
    found = [(run.optimizer.learning_rate, run.seed) for run in runs]
    assert found == [(1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1)]
    assert runs[2].output == "out/learning-rate-0.002_seed-0"


def test_values_of_a_sweep_have_the_type_of_their_setting() -> None:
    rules, wide = axes_of(["lora.rules=ffn:2+attn:4:8,ffn:16", "lora.dora=true,no"])
    assert rules == (
        "lora.rules",
        ((LoRARule("ffn", 2), LoRARule("attn", 4, 8.0)), (LoRARule("ffn", 16),)),
    )
    assert wide == ("lora.dora", (True, False))
    assert axes_of(["optimizer.weight-decay=0,1"])[0][1] == (0.0, 1.0)
    names = [Path(run.output).name for run in grid(RunConfig(), [rules])]
    assert names == ["rules-ffn-2+attn-4-8.0", "rules-ffn-16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "optimizer.learning-rat=1",
            r"learning_rat: expected a field of .* did you mean learning_rate\?",
        ),
        ("mesh.tensor=1,2", "expected a setting that may differ between runs, found mesh.tensor"),
        ("seed=0,,1", "--sweep seed=0,,1: expected a value, found nothing after a comma"),
        ("seed=", "expected SETTING=VALUE,VALUE,..., found no values"),
        ("seed=one", "seed: expected a whole number, found 'one'"),
        ("seed=0 seed=1", "expected each setting once, found seed"),
    ],
)
def test_a_bad_sweep_option_is_refused(options: str, message: str) -> None:
    with pytest.raises(NaloraError, match=message):
        grid(RunConfig(), axes_of(options.split()))


def test_a_changed_or_damaged_record_of_sweep_options_is_refused(tmp_path: Path) -> None:
    assert recorded_sweep(str(tmp_path)) is None
    file = tmp_path / "sweep.json"
    sealed = json.dumps(
        seal({"sweep": ["seed=0,1"], "run": RunConfig(steps=7).to_dict()}), indent=1
    )
    file.write_text(sealed)
    assert recorded_sweep(str(tmp_path)) == (("seed=0,1",), RunConfig(steps=7))
    changed = sealed.replace('"steps": 7', '"steps": 5')
    for text, expected in (
        (changed, "the content that its sha256"),
        ("[1]", "the options of a sweep"),
    ):
        file.write_text(text)
        with pytest.raises(NaloraError, match=f"sweep.json: expected {expected}"):
            recorded_sweep(str(tmp_path))
