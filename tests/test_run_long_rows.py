"""A run beyond the context of its model: settings, adapter, card, merged model, other tools."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.__main__ import main
from nalora_jax.cli import training
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.evaluate import needle as evaluate_needle
from nalora_jax.evaluate.run_log import recorded_settings
from nalora_jax.train.adapted import load
from tests import tiny

SCALING = "yarn:factor=2"
TOKENS = np.random.default_rng(1).integers(2, len(tiny.WORDS), (1, 120))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    """Rows of 112 tokens on a model whose context has 64."""
    folder = tmp_path_factory.mktemp("long")
    rng, letters = np.random.default_rng(0), list(string.ascii_lowercase)
    texts = [" ".join(rng.choice(letters, 100)) for _ in range(40)]
    records = [json.dumps({"prompt": text, "completion": " z"}) for text in texts]
    (folder / "questions.jsonl").write_text("\n".join(records) + "\n")
    data = DataConfig(str(folder / "questions.jsonl"), max_length=112, eval_limit=4, select_limit=2)
    with tiny.on_named_devices(folder / "cache"):
        config = tiny.make_config(folder, data=data, rope_scaling=SCALING, steps=2, mechanisms=())
        training.run(config)
        yield config


def test_every_file_of_the_run_names_the_scaling(run: RunConfig) -> None:
    folder = Path(run.output)
    assert recorded_settings(folder)["rope_scaling"] == SCALING
    base = load(folder / "adapter").base  # the adapter alone, without the run
    assert (base.config.max_positions, base.rope_scaling) == (128, SCALING)
    card = (folder / "adapter" / "README.md").read_text()
    assert "change the base's config" in card
    assert '"original_max_position_embeddings": 64' in card
    assert '"max_position_embeddings": 128' in card


def test_needles_before_and_after_are_printed_and_in_the_report(run, monkeypatch, capsys):
    letters = [" ".join(string.ascii_lowercase[i : i + 7]) + "." for i in range(19)]
    monkeypatch.setattr(evaluate_needle, "sentences", lambda split: letters)
    assert main(["eval", run.output, "--needle", "110", "--limit", "1"]) == 0
    headings = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[::3]]
    assert headings == ["needle retrieval", "needle retrieval, base", "difference"]
    folder = Path(run.output)
    found = json.loads((folder / "needle.json").read_text())
    assert [row["length"] for row in found["before"]["rows"]] == [110]
    assert found["comparison"]["n"] == 5
    assert "110" in (folder / "report.html").read_text().split("Needle retrieval")[1]
    (folder / "needle.json").write_text('{"before": 3}')
    assert main(["report", run.output]) == 2
    assert "needle.json: expected results of nalora eval --needle" in capsys.readouterr().err
    (folder / "needle.json").unlink()


def test_a_merged_run_is_the_same_model_in_transformers(run: RunConfig, tmp_path: Path) -> None:
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    assert main(["merge", run.output, "--output", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    assert theirs.config.max_position_embeddings == 128
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    for source in (run.output, tmp_path / "merged"):
        model = load(source, dtype="float32")
        ours = np.asarray(tiny.logits_of(model.module, model.variables, TOKENS))
        assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_scaling_that_shortens_the_context_is_refused(run, capsys):
    flags = ["--model", run.model, "--model.rope-scaling", "yarn:factor=0.5", "--dry-run"]
    assert main(["train", *flags]) == 2
    message = "expected a context of at least 64 tokens, the model's, found 32"
    assert message in capsys.readouterr().err
