"""The subcommand ``nalora plan``: estimates, and refusals that name their cause."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from nalora_jax.cli.command import parse
from nalora_jax.cli.plan import PlanArgs, plan
from nalora_jax.errors import NaloraError

pytestmark = pytest.mark.usefixtures("prepared")


@pytest.fixture
def prepared(monkeypatch):
    monkeypatch.setattr("nalora_jax.cli.plan._prepare", lambda **_: None)  # JAX runs already


def estimate(*topology: str, steps=100, **options) -> None:
    run = dataclasses.replace(PlanArgs().run, model="llama-3.1-8b", steps=steps)
    plan(PlanArgs(topology, estimate=True, run=run, **options))


def command(text: str) -> None:
    """Executes ``nalora plan`` with the words of a text."""
    _, args = parse(["plan", "--estimate", *text.split()])
    plan(args)


def test_steps_and_a_price_give_hours_and_cost(tmp_path, capsys):
    file = tmp_path / "plans.jsonl"
    estimate("v5litepod-16", steps=2000, price=1.2, json=file)
    estimate("v5e:4x4", steps=2000)
    record = json.loads(file.read_text())
    assert (record["topology"], record["estimate"]) == ("v5litepod-16", True)
    hours = 2000 * record["seconds"] / 3600
    lines = capsys.readouterr().out.splitlines()
    time = f"  time        at least {hours:.2f} hours for 2,000 steps"
    assert lines[1] == f"{time}, {16 * 1.2 * hours:,.2f} at 1.2 a chip and hour"
    million = 1.2 * 16 / (record["tokens_per_second"] * 3600 / 1e6)
    assert (
        lines[2] == f"  cost        at least {million:.4g} a million tokens, at 1.2 a chip and hour"
    )
    assert lines[4] == time


@pytest.mark.parametrize(
    ("topology", "flags", "message"),
    [
        ("v5e:4x4x2", "", "--topology: expected a slice of v5e"),
        (
            "v5e:4x8",
            "--mesh.tensor 16",
            "--mesh.tensor: .*32 query heads and 8 key/value heads, found 16",
        ),
        ("2xv6e:4x4", "--mesh.data 1", "--mesh.data: .*2 slices.*found 1"),
        (
            "v6e:4x4",
            "--seq 131073",
            "--seq: expected at most the model's 131,072 positions, found 131073",
        ),
        ("v6e:4x4", "--model.rope-scaling llama3:factor=2", "--model.rope-scaling"),
        ("v6e:4x4", "--batch 7", "--train.batch-size"),
        (
            "v6e:4x4",
            "--json /no/such/x",
            "--json: expected a file in an existing folder, found /no/such/x",
        ),
        ("v6e:4x4", "--data.max-length auto", "--data.max-length: expected the tokens of a row"),
        ("v6e:4x4", "--vision.task classify", "--vision.task: expected a language model"),
    ],
)
def test_a_refusal_names_its_cause(topology, flags, message):
    with pytest.raises(NaloraError, match=message):
        command(f"--model llama-3.1-8b --topology {topology} {flags}")


def test_hub_ids_of_known_models_are_planned_without_a_download(capsys):
    for name in ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"):
        command(f"--model {name} --topology v6e:4x4")
    short, _, hub, _ = capsys.readouterr().out.splitlines()
    assert hub == short.replace("llama-3.1-8b", "meta-llama/Llama-3.1-8B")


def test_a_hub_that_does_not_answer_is_named_with_the_known_models(monkeypatch):
    def refused(name, file):
        raise NaloraError(name, expected="the hub", found="no network", remedy="check the network")

    monkeypatch.setattr("nalora_jax.weights.hub.snapshot", refused)
    message = "--model: .*one of .*llama-3.1-8b.*found no network .somebody/a-llama on the hub.; check the network"
    with pytest.raises(NaloraError, match=message):
        command("--model somebody/a-llama --topology v6e:2x2")


def test_messages_of_native_libraries_go_to_a_file(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from nalora_jax.cli.plan import compiler_messages_in\n"
        "with compiler_messages_in(Path(sys.argv[1])):\n"
        "    os.write(2, b'E0000 no TPU\\n'); print('a note', file=sys.stderr)\n"
        "print('an end', file=sys.stderr); os.write(2, b'a later line\\n')"
    )
    file = tmp_path / "logs" / "compiler.log"
    result = subprocess.run(
        [sys.executable, "-c", program, file], stderr=subprocess.PIPE, text=True, check=True
    )
    assert result.stderr.splitlines() == ["a note", "an end", "a later line"]
    assert file.read_text() == "E0000 no TPU\n"
