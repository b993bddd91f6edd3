"""Flags of earlier versions end in an error with the new spelling of the given values."""

from __future__ import annotations

from pathlib import Path

import pytest

from nalora_jax.cli import command
from nalora_jax.errors import NaloraError

NALORA = str(Path(__file__).parents[2] / "configs" / "nalora.py")


@pytest.mark.parametrize(
    ("flags", "first", "rules"),
    [
        ("--mask.kind soft", "--mask.kind", "soft:power=2.0 curvature_cap"),
        ("--step-scale.kind off --mask.kind off", "--step-scale.kind", "none"),
        ("--mask.kind hard --mask.keep=0.25 --step-scale.kind off", "--mask.kind", "hard:keep=0.25"),
        (
            "--mask.power 1.5 --mask.kind soft --mask.no-mask-gradient",
            "--mask.power",
            "soft:power=1.5,mask_gradient=false curvature_cap",
        ),
        ("--step-scale.tau 0.2", "--step-scale.tau", "curvature_cap:tau=0.2"),
        ("--step_scale.kind off", "--step_scale.kind", "none"),
        (
            "--step-scale.kind homogeneity --step-scale.gains 1 1 1 2",
            "--step-scale.kind",
            "homogeneity:gains=1/1/1/2",
        ),
        (
            "--mask.kind soft --mechanisms delta:q=2",
            "--mask.kind",
            "soft:power=2.0 curvature_cap delta:q=2",
        ),
        (f"--config {NALORA} --mask.warmup 5", "--mask.warmup", "soft:power=2,warmup=5 homogeneity"),
        (f"--config {NALORA} --step-scale.kind off", "--step-scale.kind", "soft:power=2"),
        ("--mask.kind medium", "--mask.kind", "curvature_cap"),
    ],
)
def test_an_old_flag_of_train_names_the_equal_rules(flags: str, first: str, rules: str) -> None:
    with pytest.raises(NaloraError) as caught:
        command.parse(["train", *flags.split()])
    assert (caught.value.where, caught.value.expected) == (first, f"--mechanisms {rules}")


def test_old_flags_of_plan_do_so_too() -> None:
    argv = [
        "plan",
        "--model",
        "m",
        "--topology",
        "v5e:4x4",
        "--mask",
        "soft",
        "--step-scale",
        "homogeneity",
    ]
    with pytest.raises(
        NaloraError, match="^--mask: expected --mechanisms soft:power=2.0 homogeneity, found"
    ):
        command.parse(argv)
    with pytest.raises(NaloraError, match="^--mask.kind: expected a flag of nalora doctor"):
        command.parse(["doctor", "--mask.kind", "soft"])


def test_none_is_plain_lora() -> None:
    for words in (["--mechanisms", "none"], ["--mechanisms=none"], ["--mechanisms"]):
        _, args = command.parse(["train", *words, "--steps", "3"])
        assert args.run.mechanisms == ()
