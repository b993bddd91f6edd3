"""Multiple choice and the loss of completions, by hand and against transformers, one document at a
time."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from nalora_jax.common.trees import unflatten
from nalora_jax.data.items import ChoiceItem, CompletionItem
from nalora_jax.evaluate import likelihood
from nalora_jax.evaluate.intervals import bootstrap, wilson
from nalora_jax.evaluate.text_evaluation import TextEvaluator
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import param_shapes


def question(prompt: str, choices: list[str], gold: int) -> ChoiceItem:
    return ChoiceItem(
        list(prompt.encode()), [list(c.encode()) for c in choices], gold, prompt, choices
    )


QUESTIONS = [
    question("Which way is up?", [" up", " down", " sideways"], 0),
    question("Two and two", [" is four", " is five"], 0),
    question("Q", [" a", " bb", " ccc", " dddd"], 2),
    question("Left or right", [" left", " right"], 1),
]


def test_accuracy_and_loss_equal_transformers(model, variables, torch_log_probs):
    evaluator = TextEvaluator(model, None, QUESTIONS)
    records = evaluator.records(variables["params"], None)
    tables = [[torch_log_probs(q.prompt_ids, c)[0] for c in q.choice_ids] for q in QUESTIONS]
    answers = [
        int(np.argmax([t.sum() / len(c.strip()) for t, c in zip(row, q.choices, strict=True)]))
        for row, q in zip(tables, QUESTIONS, strict=True)
    ]
    likeliest = [int(np.argmax([t.sum() for t in row])) for row in tables]
    assert answers != likeliest
    gold = [q.gold for q in QUESTIONS]
    right = np.concatenate([row[q.gold] for row, q in zip(tables, QUESTIONS, strict=True)])
    correct = [a == g for a, g in zip(answers, gold, strict=True)]
    assert [record["answer"] for record in records] == answers
    assert [record["correct"] for record in records] == correct
    summary = evaluator.summary(records)
    assert summary["accuracy"] == np.mean(correct)
    assert summary["accuracy_per_choice"] == np.mean(np.equal(likeliest, gold))
    assert (summary["low"], summary["high"], summary["n"]) == (*wilson(sum(correct), 4), 4)
    assert summary["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)
    np.testing.assert_allclose(summary["loss"], -right.mean(), rtol=1e-5)


def test_choices_with_prompts_of_their_own(model, variables, torch_log_probs):
    prompts = [list(f"The trophy is too {x}".encode()) for x in ("big", "small")]
    ending = list(b" for the case")
    item = ChoiceItem(prompts[0], [ending, ending], 0, "...", ["big", "small"], prompts)
    expected = [torch_log_probs(prompt, ending)[0].sum() for prompt in prompts]
    (record,) = TextEvaluator(model, None, [item]).records(variables["params"], None)
    assert record["answer"] == int(np.argmax(np.array(expected) / [len("big"), len("small")]))
    np.testing.assert_allclose(
        record["loss"] / record["tokens"], -expected[0] / len(ending), rtol=1e-5
    )


def test_loss_equals_transformers_and_is_weighted_by_tokens(model, variables, torch_log_probs):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n).tolist() for n in (5, 9, 4, 12, 7, 6)]
    items = [CompletionItem(d[:3], d[3:], "", "") for d in documents]
    evaluator = TextEvaluator(model, None, items)
    records = evaluator.records(variables["params"], None)
    summary = evaluator.summary(records)
    tables = [torch_log_probs(item.prompt_ids, item.completion_ids)[0] for item in items]
    sums, counts = np.array([-t.sum() for t in tables]), np.array([len(t) for t in tables])
    loss = sums.sum() / counts.sum()
    found = [summary[name] for name in ("loss", "perplexity", "low", "high")]
    np.testing.assert_allclose(found, [loss, math.exp(loss), *bootstrap(sums, counts)], rtol=1e-4)
    assert [record["tokens"] for record in records] == counts.tolist()


def test_logits_of_a_long_row_are_never_held_together():
    """Compiled memory of held-out losses: completions with or without a shared prefix."""
    sizes = {"vocab_size": 32768, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    raw = {"model_type": "llama", "num_attention_heads": 2, "rms_norm_eps": 1e-5, **sizes}
    config = ModelConfig.from_hf(raw | {"max_position_embeddings": 2**15})
    model, seq = Decoder(config), 8192
    params = {
        path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in param_shapes(config).items()
    }
    variables = {"params": unflatten(params)}

    def rows(*shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            n: jax.ShapeDtypeStruct(shape, "int32") for n in ("tokens", "positions", "segments")
        }

    compiled = []
    for stem, tail in ((seq, 32), (0, seq)):
        targets = [jax.ShapeDtypeStruct((1, 1, tail), dtype) for dtype in ("int32", "bool")]
        texts = rows(1, stem), rows(1, 1, tail)
        compiled.append(
            likelihood._stems_and_tails.lower(model, variables, *texts, *targets).compile()
        )
    logits = 4 * seq * config.vocab_size
    assert max(program.memory_analysis().temp_size_in_bytes for program in compiled) < logits / 8
