"""Mixers whose state has one size: scores of choices, and counted operations."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from nalora_jax.evaluate.likelihood import score_groups
from nalora_jax.layout.estimates import attention_flops
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.delta_rule import CHUNK, DeltaInputs, gated_delta_rule
from tests.models.test_decoder import DELTA_NET
from tests.param_trees import init_params


def test_choices_with_a_common_context_are_scored_like_single_ones():
    model, variables = Decoder(DELTA_NET), {"params": init_params(DELTA_NET, jax.random.key(0))}
    rng = np.random.default_rng(1)
    contexts = [rng.integers(1, 48, n).tolist() for n in (9, 6, 4)]
    groups = [[(context, rng.integers(1, 48, n).tolist()) for n in (2, 3)] for context in contexts]
    together = score_groups(model, variables, groups)

    @jax.jit
    def log_probs_of(tokens):
        logits = model.apply(variables, model.apply(variables, tokens), method="unembed")
        return jax.nn.log_softmax(logits)[0]

    for group, scores in zip(groups, together, strict=True):
        for (context, continuation), score in zip(group, scores, strict=True):
            row = context + continuation
            log_probs = log_probs_of(np.array([row + [0] * (12 - len(row))]))[len(context) - 1 :]
            expected = sum(float(log_probs[i, token]) for i, token in enumerate(continuation))
            assert score.log_prob == pytest.approx(expected, abs=1e-4)


def test_flops_of_a_delta_rule_are_those_of_its_program():
    """A layer of the mixer alone."""
    mixer = dict(DELTA_NET.kinds[1])["mixer"]
    one = replace(DELTA_NET, kinds=(), layer_kinds=(), n_layers=1, mixer=mixer)
    sizes, lead = one.mixer, (1, CHUNK, one.mixer.key_heads)
    keys, rates = (*lead, sizes.key_dim), (*lead, sizes.value_heads // sizes.key_heads)
    shapes = keys, keys, (*rates, sizes.value_dim), rates, rates
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    segments = jax.ShapeDtypeStruct((1, CHUNK), "int32")
    program = jax.jit(lambda *x: gated_delta_rule(DeltaInputs(*x[:5]), x[5]))
    compiled = program.lower(*arguments, segments).compile().cost_analysis()["flops"]
    inverse = sizes.value_heads * 10 * 2 * CHUNK**3
    conv = 2 * sizes.conv_width * sizes.channels * CHUNK
    assert attention_flops(one, CHUNK) - conv + inverse == pytest.approx(compiled, rel=0.1)
