"""One function reads all settings: every table of the repository's protocols against tyro, and what it refuses."""

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from nalora_jax.cli.config_files import settings_of
from nalora_jax.cli.parser import registry
from nalora_jax.config import LoRAConfig, LoRARule, RunConfig, config_from_dict
from nalora_jax.config.structured import INTERNAL, dotted, ranges, structured
from nalora_jax.errors import NaloraError

STUDIES = Path(__file__).parents[2] / "studies"


def tables():
    """Every table of settings in the protocols, as settings of a run; each once."""
    found = []
    for path in STUDIES.glob("*/protocol.toml"):
        protocol = tomllib.loads(path.read_text(encoding="utf-8"))
        found.append(protocol["run"])
        found += [method.get("settings", {}) for method in protocol["methods"].values()]
        for task in protocol["tasks"].values():
            found += [{"data": task.get("data", {})}, {"vision": task.get("vision", {})}]
    return [json.loads(text) for text in dict.fromkeys(map(json.dumps, found))]


def words(value):
    """A value as it is typed."""
    if isinstance(value, dict):
        return [":".join(str(value[name]) for name in ("pattern", "rank", "alpha") if name in value)]
    if isinstance(value, list):
        return [word for item in value for word in words(item)]
    return [str(value)]


def flags(table):
    argv = []
    for name, value in dotted(table):
        if isinstance(value, bool):
            group, _, last = name.rpartition(".")
            name = name if value else f"{group}.no_{last}"
            value = []
        argv += [f"--{name}".replace("_", "-"), *words(value)]
    return argv


def test_every_table_of_the_protocols_is_read_as_tyro_reads_its_flags():
    """Tyro, which takes 0.1 s, reads tables with a setting that those before it lack."""
    every, seen = tables(), set[str]()
    assert len(every) > 50
    for table in every:
        config = structured(RunConfig, table)
        names = {name for name, _ in dotted(table)}
        if not names <= seen:
            assert config == tyro.cli(RunConfig, args=flags(table), registry=registry()), table
        seen |= names
        assert config == settings_of(yaml.safe_load(yaml.safe_dump(table)), Path("a.yaml"))
        assert config == config_from_dict(json.loads(json.dumps(config.to_dict())))
        assert config == structured(RunConfig, table, base=RunConfig())


def test_settings_that_are_not_in_the_table_are_those_of_the_base():
    base = RunConfig(steps=7, lora=LoRAConfig(dora=True, dropout=0.5))
    config = structured(RunConfig, {"lora": {"rules": ["ffn:2"], "dropout": "1e-2"}}, base=base)
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
    table = {"name": "a", "sizes": [1, 2.5], "boxes": {"x": {"pattern": "p"}}, "notes": {"steps": [1]}}
    assert structured(Shelf, table) == Shelf("a", (1.0, 2.5), {"x": LoRARule("p")}, {"steps": [1]})
    assert isinstance(structured(Shelf, table).sizes[0], float)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "file: name: expected a value, found none"),
        ({"name": "a", "place": "b"}, "file: place: expected a field of Shelf, found none of that name"),
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
        structured(Shelf, table, "file: ")


def test_every_number_of_a_run_has_a_range_at_its_field():
    numbers = {
        name
        for name, value in dotted(RunConfig().to_dict())
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers <= ranges(RunConfig).keys()
