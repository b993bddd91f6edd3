"""The verbs on a tiny model: what they print and write, against direct computations."""

from __future__ import annotations

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.__main__ import main
from nalora_jax.common import trees
from nalora_jax.config import LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.loading.adapted import load
from nalora_jax.report.inspect import inspect_texts, layer_summary
from nalora_jax.train.log import MetricsLog
from tests import emulator, tiny
from tests.observed import observed

HF = tiny.HF | {"num_key_value_heads": 1, "intermediate_size": 24}
TEXTS = ["a b c d e f", "x y z"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama as a Hugging Face folder."""
    tokenizer = tiny.word_tokenizer(chat_template="{{ messages[0]['content'] }} q")
    return tiny.make_model(tmp_path_factory.mktemp("models") / "base", HF, tokenizer, spread=3.0)


@pytest.fixture(scope="module")
def run(base):
    """A run's folder with an adapter (B not zero) on that base."""
    folder = base.parent / "run"
    rules = (LoRARule("layers/1/ffn/gate_proj", 0), LoRARule("ffn/", 2), LoRARule("q_proj", 4, 2.0))
    tiny.make_adapter(folder / "adapter", base, rules)
    with MetricsLog(folder) as log:
        settings = {"model": str(base), "steps": 77, "data": {"chat": True, "max_length": 32}}
        log.start(settings, versions={"jax": "9.9"}, device="cpu")
        log.write({"step": 0, "eval": {"accuracy": 0.111, "n": 50}})
        log.write({"step": 77, "final": True, "eval": {"accuracy": 0.999, "n": 50}})
    return folder


def logits(source, **options):
    model = load(source, dtype="float32", **options)
    return np.asarray(tiny.logits_of(model.module, model.variables, np.array([[3, 4, 5, 6, 7]])))


def test_an_adapter_of_another_base_is_refused(run, tmp_path):
    other = tiny.make_model(tmp_path / "other", HF, spread=2.0)
    with pytest.raises(NaloraError, match="expected an adapter of the base model"):
        load(other, adapter=run, dtype="float32")


def test_generate_applies_the_chat_template_as_the_run_did(base, run, capsys):
    arguments = ["--max-new-tokens", "5", "--dtype", "float32"]
    answers = []
    for given in ([str(run), "--prompt", "a b"], [str(run), "--prompt", "a b q", "--no-chat"]):
        assert main(["generate", *given, *arguments]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]  # this template appends " q"


def test_samples_are_a_function_of_the_seed(base, capsys):
    arguments = ["--prompt", "a b", "--max-new-tokens", "8", "--temperature", "5"]
    answers = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(base), *arguments, "--seed", seed]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_results_are_written_to_a_bucket_and_read_from_there(
    run, base, google, tmp_path, capsys, monkeypatch
):
    held, _ = google
    monkeypatch.chdir(tmp_path)
    for folder in (base, run, run / "adapter"):
        for path in folder.iterdir():
            if path.is_file():
                name = path.relative_to(base.parent)
                emulator.put(os.environ["STORAGE_EMULATOR_HOST"], str(name), path.read_bytes())
    assert main(["export", "gs://bucket/run", "--output", "gs://bucket/exported"]) == 0
    assert capsys.readouterr().out.startswith(
        "gs://bucket/exported: adapter for peft, read back and compared"
    )
    for out in ("imported", "b.vllm", "a.gguf"):
        target = {"b.vllm": "vllm", "a.gguf": "gguf"}.get(out, "peft")
        assert (
            main(
                [
                    "export",
                    "gs://bucket/exported",
                    "--output",
                    f"gs://bucket/{out}",
                    "--for",
                    target,
                ]
            )
            == 0
        )
    merge = ["merge", "gs://bucket/run", "--output", "gs://bucket/merged", "--dtype", "float32"]
    assert main(merge) == 0
    np.testing.assert_allclose(logits("gs://bucket/merged"), logits(run), atol=1e-4)
    assert main(["from-peft", "gs://bucket/exported"]) == 0
    expected = load(run, dtype="float32").lora
    for source in ("run", "exported", "imported"):
        tree = load("gs://bucket/base", adapter=f"gs://bucket/{source}", dtype="float32").lora
        jax.tree.map(np.testing.assert_array_equal, tree, expected)
    np.testing.assert_allclose(logits(base, adapter="gs://bucket/b.vllm"), logits(run), atol=1e-5)
    stored = held.objects["bucket"]
    assert {name.partition("/")[0] for name in stored} == {
        "base", "run", "exported", "imported", "b.vllm", "a.gguf", "merged",
    }  # fmt: skip
    assert not [name for name in stored if "nalora-upload" in name]
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "google"}  # no folder ./gs:
    cards = [emulator.stored(held, out)["README.md"].decode() for out in ("merged", "exported")]
    assert "The adapters are folded into these weights" in cards[0]
    for card in cards:
        assert all(figure in card for figure in ("0.111", "0.999", "| steps | 77 |", "jax 9.9"))


def test_sigterm_leaves_no_unfinished_output(run, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        assert [path.name for path in tmp_path.iterdir()] == [".out.nalora-partial"]
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("nalora_jax.weights.merge.write_shards", stop)
    assert main(["merge", str(run), "--output", str(tmp_path / "out")]) == 143
    assert capsys.readouterr().err.endswith(
        "interrupted by SIGTERM; no unfinished output was left\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_base_alone_has_nothing_to_merge_or_export_which_is_said_before_it_is_loaded(
    base, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.modules["nalora_jax.loading.adapted"], "load_model", None)
    for verb in ("merge", "export"):
        assert main([verb, str(base), "--output", str(tmp_path / "out")]) == 2
        assert "expected an adapter, found a base model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "base", "--texts", " "], "--texts: expected at least one text with a token"),
        (
            ["export", "run", "--for", "gguf", "--output", "absent.bin"],
            "--output: expected a name that ends in .gguf, found absent.bin",
        ),
        (
            ["generate", "base", "--prompt", "a", "--messages", "m.json"],
            "nalora generate: expected --prompt or --messages, found both",
        ),
        (["generate", "base"], "nalora generate: expected --prompt or --messages, found neither"),
    ],
)
def test_what_a_verb_cannot_do_is_refused_before_a_model_is_read(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_inspect_measures_what_the_blocks_compute(base):
    """Against the statistics of one unpadded text at a time, added up here."""
    model = load(base, dtype="float32")
    summary = inspect_texts(model, TEXTS, max_length=5)
    observe = jax.jit(lambda tokens: observed(model.module, model.variables, tokens)[1])
    total = {}
    for text in TEXTS:
        written = observe(jnp.asarray([model.base.tokenizer.encode(text)[:5]]))
        for path, value in trees.flatten(written).items():
            name = path.rpartition("/")[2]
            total[name] = total.get(name, 0) + np.asarray(value, np.float64)
    assert total["tokens"].tolist() == [8.0, 8.0]
    expected = layer_summary(total)
    for name in ("slope", "responsive", "occupancy"):
        np.testing.assert_allclose(getattr(summary, name), getattr(expected, name), rtol=1e-5)
    assert np.isnan(summary.misalignment).all()
    assert ((summary.limit > 0.05) & (summary.limit < 1)).all()


def test_a_model_without_gates_is_not_inspected(base, monkeypatch):
    """As of a custom `FeedForward` that lists none."""
    monkeypatch.setattr(sys.modules["nalora_jax.report.inspect"], "gate_blocks", lambda _: {})
    message = "inspect: expected a model with self-gated feed-forward blocks, found one without"
    with pytest.raises(NaloraError, match=message):
        inspect_texts(load(base, dtype="float32"), TEXTS)


def test_a_file_that_exists_is_not_overwritten_by_an_export(run, tmp_path, capsys):
    file = tmp_path / "lora.gguf"
    file.write_text("mine")
    assert main(["export", str(run), "--for", "gguf", "--output", str(file)]) == 2
    assert "--output: expected a new file" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_an_output_below_a_folder_that_cannot_be_written_is_refused(
    run, tmp_path, capsys, monkeypatch
):
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and writable(path, mode))
    assert main(["merge", str(run), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"--output: expected a folder that can be written, found {tmp_path}, which" in error
