from __future__ import annotations

import dataclasses

import pytest

from nalora_jax.config import RunConfig


@pytest.fixture(scope="module")
def methods(script):
    return script("methods")


def test_each_method_has_the_mechanisms_of_its_name_and_other_settings_stay(methods):
    given = RunConfig(steps=7)
    lora, nalora, default = (methods.with_method(given, name) for name in methods.METHODS)
    assert (lora.mask.kind, lora.step_scale.kind) == ("off", "off")
    assert (nalora.mask.kind, nalora.step_scale.kind) == ("soft", "homogeneity")
    assert (default.mask.kind, default.step_scale.kind) == (given.mask.kind, given.step_scale.kind)
    assert {found.steps for found in (lora, nalora, default)} == {7}


@pytest.mark.parametrize("method", ["nalora", "default"])
def test_mechanisms_act_from_the_first_timed_step_unless_the_library_s_warm_up_is_asked_for(methods, method):
    at_once, later = (methods.with_method(RunConfig(), method, warmup=warmup) for warmup in (0, None))
    assert (at_once.mask.warmup, at_once.step_scale.warmup) == (0, 0)
    own = RunConfig()
    assert (later.mask.warmup, later.step_scale.warmup) == (own.mask.warmup, own.step_scale.warmup)
    assert dataclasses.replace(at_once, mask=later.mask, step_scale=later.step_scale) == later
