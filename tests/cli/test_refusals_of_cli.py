"""Refusals of the command line that need neither a model nor a run: command lines, and single calls."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from nalora_jax.__main__ import guard, main
from nalora_jax.cli import chat, config_files, evaluate, plan, verbs, verify
from nalora_jax.planner import abstract_step, machines
from tests.refused import Call, table_test


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("doctor --log-format xml", "--log-format: expected text or json, found xml"),
        ("doctor --log-format", "--log-format: expected text or json, found nothing"),
        (
            "report run --output gs://bucket/page",
            "--output: expected a path on this machine, found",
        ),
        ("report gs://bucket/run", "RUN: expected a path on this machine, found gs://bucket/run"),
        ("train --config absent.yaml", "--config absent.yaml: expected a readable file, found No"),
        ("merge", "nalora merge: expected MODEL, found nothing; see nalora merge --help-all"),
        ("merge run", "nalora merge: expected --output, found nothing; see nalora merge"),
    ],
)
def test_a_command_line_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def type_latin_1(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))


def chat_in_latin_1(patch: pytest.MonkeyPatch, _: Path) -> None:
    type_latin_1(patch)
    next(chat._lines())


def prompt_in_latin_1(patch: pytest.MonkeyPatch, _: Path) -> None:
    type_latin_1(patch)
    verbs.generate(verbs.cli.GenerateArgs("model", prompt="-"))


def show_no_image(*_: Any) -> None:
    model = SimpleNamespace(base=SimpleNamespace(processor=dict))
    chat._Talk._add_image(SimpleNamespace(model=model), "")  # type: ignore[arg-type]


def quantize_encoders(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(evaluate, "is_dual", lambda *_: True)
    evaluate.evaluate(evaluate.EvalArgs("run", quantize="int8"))


def write_messages_below_a_file(_: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "cache").touch()
    with plan.compiler_messages_in(folder / "cache" / "compiler.log"):
        pass


def plan_without_a_compiler(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(importlib.util, "find_spec", lambda _: None)
    abstract_step.devices(machines.topology("v5e:4x4"))


def plan_an_unknown_slice(patch: pytest.MonkeyPatch, _: Path) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("no such slice\nat libtpu.cc")

    patch.setattr(importlib.util, "find_spec", lambda _: True)
    patch.setattr(abstract_step.topologies, "get_topology_desc", refuse)
    abstract_step.devices(machines.topology("v5e:4x4"))


def convert_into_a_file_that_exists(_: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}'
    )
    (folder / "run.yaml").touch()
    verbs.from_peft(verbs.cli.FromPeftArgs(folder, folder / "run.yaml"))


def ask_a_server_without_log_probabilities(patch: pytest.MonkeyPatch, _: Path) -> None:
    def call(_: verify.Server, path: str, body: Any = None) -> Any:
        if body:
            return {"choices": [{"logprobs": {"tokens": ["a"]}}]}
        if path == "/v1/models":
            return {"data": [{"id": "mine"}]}
        return []

    patch.setattr(verify.Server, "_call", call)
    verify.Server("http://server", "mine").log_probs(np.array([[1, 2]]), adapted=True)


def judge_an_adapter_without_effect(patch: pytest.MonkeyPatch, _: Path) -> None:
    ours = [("base", np.array([[-1.0]])), ("adapter", np.array([[-1.00001]]))]
    patch.setattr(verify, "_candidates", lambda *_: iter(ours))
    verify.judge(None, np.array([[1]]), [{0: -1.0}], [{0: -1.0}])  # type: ignore[arg-type]


REFUSALS: dict[str, tuple[Call, str]] = {
    "a chat in Latin-1": (chat_in_latin_1, "standard input: expected text in UTF-8, found 'utf-8'"),
    "a prompt in Latin-1": (
        prompt_in_latin_1,
        "--prompt -: expected text in UTF-8 on standard input, found 'utf-8'",
    ),
    "no image in a chat": (show_no_image, "/image: expected an image file, found none"),
    "a settings file that is a folder": (
        lambda _, folder: config_files.read_values(folder),
        "--config .*: expected a readable file, found Is a directory",
    ),
    "quantized encoders": (
        quantize_encoders,
        "--quantize: expected none for image and text encoders, found int8",
    ),
    "a plan for no machine": (
        lambda *_: plan.plan(plan.PlanArgs()),
        "--topology: expected at least one machine, found none",
    ),
    "a plan without a model": (
        lambda *_: plan._print_plans(plan.PlanArgs(), [machines.topology("v6e:4x4")]),
        "--model: expected a model, found none",
    ),
    "a cache below a file": (
        write_messages_below_a_file,
        "compiler.log: expected a file that can be written, found .*; set NALORA_CACHE",
    ),
    "no compiler for a TPU": (
        plan_without_a_compiler,
        r"nalora plan: expected the compiler for .*; pip install 'nalora_jax\[tpu\]'",
    ),
    "a slice that the compiler does not know": (
        plan_an_unknown_slice,
        "--topology: expected a topology that the tpu compiler knows, found v5e:4x4: no such slice$",
    ),
    "converted settings over a file": (
        convert_into_a_file_that_exists,
        "--output: expected a new file, found .*run.yaml, which exists",
    ),
    "a server without log probabilities": (
        ask_a_server_without_log_probabilities,
        r"http://server: expected log probabilities by token id, found \['tokens'\]",
    ),
    "no server": (
        lambda *_: verify.Server("http://127.0.0.1:9/v1", None),
        "http://127.0.0.1:9/v1/models: expected an OpenAI-compatible server, found",
    ),
    "an adapter without effect": (
        judge_an_adapter_without_effect,
        "--texts: expected a change of 0 nats by the adapter.*; give texts like those",
    ),
}

test_it_is_refused = table_test(REFUSALS)


def test_a_platform_that_jax_cannot_start_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    assert guard(lambda: jax.devices("abacus")) == 2
    error = capsys.readouterr().err
    assert "JAX_PLATFORMS: expected a platform with a device on this machine, found abacus" in error
    assert error.endswith("; unset it, or use cpu\n")
