"""The subcommand ``nalora plan``: estimates, and refusals that name their cause."""

from __future__ import annotations

import json

import pytest

from nalora_jax.cli.plan import PlanArgs, plan
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError

pytestmark = pytest.mark.usefixtures("prepared")


@pytest.fixture
def prepared(monkeypatch):
    monkeypatch.setattr("nalora_jax.cli.plan._prepare", lambda **_: None)  # JAX runs already


def estimate(*topology: str, **options) -> None:
    plan(PlanArgs("llama-3.1-8b", topology, estimate=True, **options))


def test_an_estimate_shows_the_price_and_writes_the_figures(tmp_path, capsys):
    file = tmp_path / "plans.jsonl"
    estimate("v6e:4x4", "8xh100", price=2.7, json=file)
    lines = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["topology"] for record in records] == ["v6e:4x4", "8xh100"]
    for record, chips, cost in zip(records, (16, 8), lines[1::2], strict=True):
        assert record["estimate"] is True
        assert record["layout"]["data"] * record["layout"]["fsdp"] * record["layout"]["tensor"] == chips
        assert record["tokens_per_second"] == pytest.approx(chips * 4096 / record["seconds"])
        million = 2.7 * chips / (record["tokens_per_second"] * 3600 / 1e6)
        assert cost == f"  cost        at least {million:.4g} a million tokens, at 2.7 a chip and hour"


def test_steps_and_a_price_give_hours_and_cost(tmp_path, capsys):
    file = tmp_path / "plans.jsonl"
    estimate("v5litepod-16", steps=2000, price=1.2, json=file)
    estimate("v5e:4x4", steps=2000)
    hours = 2000 * json.loads(file.read_text())["seconds"] / 3600
    lines = capsys.readouterr().out.splitlines()
    time = f"  time        at least {hours:.2f} hours for 2,000 steps"
    assert lines[1] == f"{time}, {16 * 1.2 * hours:,.2f} at 1.2 a chip and hour"
    assert lines[2].startswith("  cost        at least")
    assert lines[4] == time


def test_rope_scaling_allows_longer_rows(capsys):
    long_row = {"batch": 1, "seq": 524_288, "rope_scaling": "llama3:factor=64"}
    estimate("v6e:8x8", **long_row)
    assert "context 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        ("v5e:4x4x2", {}, "--topology: expected a slice of v5e"),
        (
            "v5e:4x8",
            {"mesh": MeshConfig(tensor=16)},
            "--mesh.tensor: .*32 query heads and 8 key/value heads, found 16",
        ),
        ("v5e:4x8", {"mesh": MeshConfig(tensor=3)}, "--mesh: .*divides the 32 device.*found tensor 3"),
        ("v5e:4x8", {"mesh": MeshConfig(4, 4, 1)}, "--mesh: .*equals the 32 device"),
        ("2xv6e:4x4", {"mesh": MeshConfig(data=1)}, "--mesh.data: .*2 slices.*found 1"),
        ("2xv6e:4x4", {"mesh": MeshConfig(fsdp=32)}, "--mesh.data: .*2 slices.*found 1"),
        ("2xv6e:4x4", {"mesh": MeshConfig(fsdp=-1)}, "--mesh.data: .*2 slices.*found 1"),
        ("v6e:4x4", {"seq": 131073}, "--seq: expected at most the model's 131,072 positions, found 131073"),
        ("v6e:4x4", {"rope_scaling": "llama3:factor=2"}, "--model.rope-scaling"),
        ("v6e:4x4", {"batch": 7}, "--train.batch-size"),
    ],
)
def test_a_refusal_names_its_cause(topology, options, message):
    with pytest.raises(NaloraError, match=message):
        estimate(topology, **options)
