"""The run's settings: every default is valid, and every range is checked by the name of its flag."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from nalora_jax.config import LoRAConfig, LoRARule, RunConfig, check, config_from_dict
from nalora_jax.errors import NaloraError

RULE = LoRARule("x", 1)
# Values that are refused, and values at the edge that are accepted.
RANGES: dict[str, tuple[list, list]] = {
    "steps": ([0, -1], [1]),
    "epochs": ([-1.0, math.nan, math.inf], [0.0, 0.5]),
    "train.batch_size": ([0, -8], [1]),
    "train.eval_every": ([-2], [-1, 0]),
    "data.max_length": ([-1], [0, 1]),
    "compute.stats_positions": ([-1], [0, 1]),
    "data.select_limit": ([0], [1]),
    "optimizer.learning_rate": ([-1.0, math.nan, math.inf], [0.0, 1e-9]),
    "optimizer.b1": ([-0.1, 1.0], [0.0]),
    "optimizer.warmup_share": ([-0.1, 1.1], [0.0, 1.0]),
    "optimizer.eps": ([0.0, math.nan], [1e-12]),
    "lora.dropout": ([-0.1, 1.0, math.nan], [0.0, 0.99]),
    "lora.plus_ratio": ([0.0, -1.0], [16.0]),
    "adalora.target_rank": ([-1, 8], [0, 7]),
    "adalora.final_share": ([-0.1, 1.0], [0.0, 0.9]),
    "lora.rules": (
        [(), (RULE, LoRARule("x", -1)), (LoRARule("x", 4, math.nan),), (LoRARule("x", 4, 0.0),)],
        [(RULE,)],
    ),
}


def with_field(name, value):
    """The default config with one (dotted) field replaced."""
    config = RunConfig()
    *groups, last = name.split(".")
    if not groups:
        return dataclasses.replace(config, **{last: value})
    group = dataclasses.replace(getattr(config, groups[0]), **{last: value})
    return dataclasses.replace(config, **{groups[0]: group})


def test_the_defaults_are_valid_and_returned_as_they_are():
    config = RunConfig()
    assert check(config) is config


@pytest.mark.parametrize("name", RANGES)
def test_what_is_out_of_range_is_refused_by_the_name_of_its_flag(name):
    refused, accepted = RANGES[name]
    for value in refused:
        with pytest.raises(NaloraError) as caught:
            check(with_field(name, value))
        assert caught.value.where == f"--{name.replace('_', '-')}"
    for value in accepted:
        check(with_field(name, value))


def test_a_batch_that_micro_batches_do_not_divide_is_refused():
    wanted = r"--train\.batch-size: expected a multiple of --train\.accumulate \(3\)"
    with pytest.raises(NaloraError, match=wanted):
        check(with_field("train.accumulate", 3))


def test_every_setting_comes_back_from_json():
    def changed(value, hint):
        if dataclasses.is_dataclass(value):
            hints = get_type_hints(type(value))
            fields = {name: changed(getattr(value, name), hint) for name, hint in hints.items()}
            return dataclasses.replace(value, **fields)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return value + 1
        if get_origin(hint) is Literal:
            return next(choice for choice in get_args(hint) if choice != value)
        return f"{value}x" if isinstance(value, str) else value

    config = changed(RunConfig(), RunConfig)
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_logs_of_other_versions_can_be_read():
    logged = {"steps": 7, "gone": 1, "lora": {"dora": True, "gone": 1}}
    assert config_from_dict(logged) == RunConfig(steps=7, lora=LoRAConfig(dora=True))
    assert config_from_dict({}) == RunConfig()


def test_a_value_of_another_type_is_named():
    for name, value, message in (
        ("lora", {"rules": []}, ": expected a LoRAConfig, found .*, a dict"),
        ("data", None, ": expected a DataConfig, found None, a NoneType"),
        ("lora.rules", ("ffn:8",), ": expected a .*LoRARule, .*, found .*'ffn:8'"),
        ("lora.rules", "ffn:8", ""),
        ("model", 5, ": expected a str, found 5, a int"),
        ("data.dataset", None, ""),
        ("resume", "maybe", ""),
    ):
        with pytest.raises(NaloraError, match=f"RunConfig.{name}{message}"):
            check(with_field(name, value))
