"""Settings: their ranges and types, by the name of the flag, and how plain data become them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from nalora_jax.config import LoRAConfig, LoRARule, RunConfig, config_from_dict
from nalora_jax.config.structured import INTERNAL, flatten_settings, parse_dataclass, ranges
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import check_run_config

RULE = LoRARule("x", 1)
# Values that are refused, and values at the edge that are accepted.
RANGES: dict[str, tuple[list, list]] = {
    "steps": ([0, -1], [1]),
    "epochs": ([-1.0, math.nan, math.inf], [0.0, 0.5]),
    "train.eval_every": ([-2], [-1, 0]),
    "optimizer.b1": ([-0.1, 1.0], [0.0]),
    "optimizer.warmup_share": ([-0.1, 1.1], [0.0, 1.0]),
    "optimizer.eps": ([0.0, math.nan], [1e-12]),
    "lora.rules": (
        [(), (RULE, LoRARule("x", -1)), (LoRARule("x", 4, math.nan),), (LoRARule("x", 4, 0.0),)],
        [(RULE,)],
    ),
}


def with_field(name: str, value: Any) -> RunConfig:
    """The default config with one (dotted) field replaced."""
    config = RunConfig()
    *groups, last = name.split(".")
    if not groups:
        return dataclasses.replace(config, **{last: value})
    group = dataclasses.replace(getattr(config, groups[0]), **{last: value})
    return dataclasses.replace(config, **{groups[0]: group})


@pytest.mark.parametrize("name", RANGES)
def test_what_is_out_of_range_is_refused_by_the_name_of_its_flag(name: str) -> None:
    refused, accepted = RANGES[name]
    for value in refused:
        with pytest.raises(NaloraError) as caught:
            check_run_config(with_field(name, value))
        assert caught.value.where == f"--{name.replace('_', '-')}"
    for value in accepted:
        check_run_config(with_field(name, value))


def test_every_number_of_a_run_has_a_range_at_its_field() -> None:
    numbers = {
        name
        for name, value in flatten_settings(RunConfig().to_dict())
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers <= ranges(RunConfig).keys()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "train.accumulate",
            3,
            r"--train\.batch-size: expected a multiple of --train\.accumulate \(3\)",
        ),
        ("data", None, "RunConfig.data: expected a DataConfig, found None, a NoneType"),
        (
            "lora.rules",
            ("ffn:8",),
            "RunConfig.lora.rules: expected a .*LoRARule, .*, found .*'ffn:8'",
        ),
        ("model", 5, "RunConfig.model: expected a str, found 5, a int"),
        ("resume", "maybe", "RunConfig.resume"),
    ],
)
def test_a_value_of_another_type_and_one_that_does_not_divide_are_named(
    name: str, value: Any, message: str
) -> None:
    with pytest.raises(NaloraError, match=message):
        check_run_config(with_field(name, value))


def test_contrasted_pairs_are_not_split_into_micro_batches() -> None:
    contrast = with_field("vision.task", "contrast")
    split = dataclasses.replace(contrast.train, accumulate=2)
    with pytest.raises(
        NaloraError, match='--train.accumulate: expected 1 with --vision.task "contrast"'
    ):
        check_run_config(dataclasses.replace(check_run_config(contrast), train=split))


def test_every_setting_comes_back_from_json() -> None:
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


def test_logs_of_other_versions_can_be_read() -> None:
    logged = {"steps": 7, "gone": 1, "lora": {"dora": True, "gone": 1}}
    assert config_from_dict(logged) == RunConfig(steps=7, lora=LoRAConfig(dora=True))


def test_settings_that_are_not_in_the_table_are_those_of_the_base():
    base = RunConfig(steps=7, lora=LoRAConfig(dora=True, dropout=0.5))
    config = parse_dataclass(
        RunConfig, {"lora": {"rules": ["ffn:2"], "dropout": "1e-2"}}, base=base
    )
    assert config == RunConfig(
        steps=7, lora=LoRAConfig(rules=(LoRARule("ffn", 2),), dora=True, dropout=0.01)
    )


@dataclass(frozen=True)
class Shelf:
    name: str
    sizes: tuple[float, ...] = ()
    boxes: dict[str, LoRARule] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    place: str = field(default="", metadata=INTERNAL)


def test_tables_by_name_are_dataclasses():
    table = {
        "name": "a",
        "sizes": [1, 2.5],
        "boxes": {"x": {"pattern": "p"}},
        "notes": {"steps": [1]},
    }
    assert parse_dataclass(Shelf, table) == Shelf(
        "a", (1.0, 2.5), {"x": LoRARule("p")}, {"steps": [1]}
    )
    assert isinstance(parse_dataclass(Shelf, table).sizes[0], float)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "file: name: expected a value, found none"),
        (
            {"name": "a", "place": "b"},
            "file: place: expected a field of Shelf, found none of that name",
        ),
        ({"name": "a", "size": [1]}, r"size: expected a field of Shelf, .*; did you mean sizes\?"),
        ({"name": "a", "sizes": [1, "x"]}, r"sizes\[1\]: expected a number, found 'x'"),
        ({"name": "a", "boxes": {"x": {"rank": 1}}}, "file: boxes.x.pattern: expected a value"),
        (
            {"name": "a", "boxes": {"x": "p:x"}},
            r"file: boxes.x: expected PATTERN:RANK\[:ALPHA\], .*found .p:x.",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(table, said):
    with pytest.raises(NaloraError, match=said):
        parse_dataclass(Shelf, table, "file: ")
