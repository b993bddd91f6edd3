"""Loss of completions against transformers, one document at a time."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from nalora_jax.common.trees import unflatten
from nalora_jax.data.items import CompletionItem
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate import likelihood
from nalora_jax.evaluate.perplexity import completion_loss
from nalora_jax.evaluate.statistics import bootstrap
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import param_shapes


@pytest.fixture
def documents() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).tolist() for n in (5, 9, 4, 12, 7, 6)]


def expected_sums(documents, torch_log_probs, first_target):
    tables = [torch_log_probs(d[:first_target], d[first_target:])[0] for d in documents]
    return np.array([-t.sum() for t in tables]), np.array([len(t) for t in tables])


@pytest.mark.parametrize("first_target", [1, 3])
def test_loss_equals_transformers_and_is_weighted_by_tokens(
    model, variables, documents, torch_log_probs, first_target
):
    items = [CompletionItem(d[:first_target], d[first_target:], "", "") for d in documents]
    result = completion_loss(model, variables, items)
    sums, counts = expected_sums(documents, torch_log_probs, first_target)
    np.testing.assert_allclose(result.loss, sums.sum() / counts.sum(), rtol=1e-5)
    np.testing.assert_allclose(result.perplexity, math.exp(sums.sum() / counts.sum()), rtol=1e-4)
    assert (result.tokens, result.n) == (counts.sum(), 6)
    np.testing.assert_allclose((result.low, result.high), bootstrap(sums, counts), rtol=1e-4)


def test_items_on_a_mesh_give_the_same_loss(model, variables, documents):
    items = [CompletionItem(d[:1], d[1:], "", "") for d in documents]
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices())
    sharded, single = (completion_loss(model, variables, items, mesh=one) for one in (mesh, None))
    np.testing.assert_allclose(sharded.loss, single.loss, rtol=1e-6)
    assert sharded.n == single.n == 6


def test_nothing_to_predict_is_an_error(model, variables):
    with pytest.raises(NaloraError, match="at least one target token"):
        completion_loss(model, variables, [])


def test_logits_of_a_long_row_are_never_held_together():
    """Compiled memory of held-out losses: completions with or without a shared prefix."""
    sizes = {"vocab_size": 32768, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    raw = {"model_type": "llama", "num_attention_heads": 2, "rms_norm_eps": 1e-5, **sizes}
    config = ModelConfig.from_hf(raw | {"max_position_embeddings": 2**15})
    model, seq = Decoder(config), 8192
    params = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in param_shapes(config).items()}
    variables = {"params": unflatten(params)}

    def rows(*shape: int, names: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, "int32") for name in names}

    compiled = []
    of_texts = ("tokens", "positions", "segments")
    for stem, tail in ((seq, 32), (0, seq)):
        shape = (1, 1, tail)
        scored = jax.ShapeDtypeStruct(shape, "int32"), jax.ShapeDtypeStruct(shape, "bool")
        texts = rows(1, stem, names=of_texts), rows(*shape, names=of_texts)
        compiled.append(likelihood._stems_and_tails.lower(model, variables, *texts, *scored).compile())
    logits = 4 * seq * config.vocab_size
    assert max(program.memory_analysis().temp_size_in_bytes for program in compiled) < logits / 8
