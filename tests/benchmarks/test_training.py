from __future__ import annotations

import dataclasses

import pytest

from nalora_jax.config import RunConfig
from nalora_jax.method.rules import Mechanism, make


@pytest.fixture(scope="module")
def training(script):
    return script("training")


def test_each_method_has_the_mechanisms_of_its_name_and_other_settings_stay(training):
    given = RunConfig(steps=7)
    lora, nalora, default = (training.with_method(given, name) for name in training.METHODS)
    assert lora.mechanisms == ()
    assert nalora.mechanisms == ("soft:power=2,warmup=0", "homogeneity:warmup=0")
    assert default.mechanisms == tuple(f"{rule}:warmup=0" for rule in given.mechanisms)
    assert {found.steps for found in (lora, nalora, default)} == {7}


@pytest.mark.parametrize("method", ["nalora", "default"])
def test_mechanisms_act_from_the_first_timed_step_unless_the_library_s_warm_up_is_asked_for(
    training, method
):
    at_once, later = (training.with_method(RunConfig(), method, warmup=warmup) for warmup in (0, None))
    rules = [list(map(make, config.mechanisms)) for config in (at_once, later)]
    assert all(rule.warmup == 0 for rule in rules[0])
    assert rules[0] == [dataclasses.replace(rule, warmup=0) for rule in rules[1]]
    assert all(rule.warmup == Mechanism.warmup for rule in rules[1])
    assert dataclasses.replace(at_once, mechanisms=later.mechanisms) == later
