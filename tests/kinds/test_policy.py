"""Policy gradients: the objective against its formula over whole tables of log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.assembly.program import next_token
from nalora_jax.config import ComputeConfig, PreferenceConfig
from nalora_jax.kinds.rl.policy import Policy
from nalora_jax.ops.policy_losses import CLIPS, Name, PolicyLoss, denominator, policy_loss
from tests.kinds.test_preference import BASE, assembled

ROWS, SEQ, PROMPT, T = 4, 10, 3, 0.8


@pytest.fixture(scope="module")
def assembly():
    return assembled(PreferenceConfig("none"))


def batch_of(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Samples of 2, 4, 7 and 0 tokens (the last is a row of padding) after prompts of 3 tokens."""
    lengths = np.array([2, 4, 7, 0])
    ids = rng.integers(1, BASE.vocab_size, (ROWS, SEQ + 1))
    place = np.arange(SEQ)[None]
    mask = ((place >= PROMPT - 1) & (place < PROMPT - 1 + lengths[:, None])).astype(np.float32)
    within = place < PROMPT + lengths[:, None]
    return {
        "tokens": ids[:, :-1] * within,
        "targets": ids[:, 1:],
        "positions": np.broadcast_to(place, within.shape).astype(np.int32),
        "segment_ids": within.astype(np.int32),
        "loss_weights": mask,
        "advantages": np.array([1.2, -0.7, 0.4, 0.0], np.float32),
        "real": np.array([1, 1, 1, 0], np.float32),
        "sampled": np.zeros((ROWS, SEQ), np.float32),
    }


@partial(jax.jit, static_argnums=0)
def table(model, variables, batch) -> jax.Array:
    """Log-probabilities of the targets ``[rows, seq]``, 0 beyond the samples."""
    hidden = model.apply(variables, batch["tokens"], segment_ids=batch["segment_ids"])
    logits = jax.nn.log_softmax(model.apply(variables, hidden, method="unembed") / T)
    picked = jnp.take_along_axis(logits, batch["targets"][..., None], axis=2)[..., 0]
    return picked * batch["loss_weights"]


@pytest.mark.parametrize(("name", "updates"), [("grpo", "first"), ("dapo", "later")])
def test_loss_and_gradient_are_those_of_the_formula(assembly, name: Name, updates: str) -> None:
    """Of a new rollout, and of one that served updates; tests/ops/test_policy_losses.py has the
    other losses."""
    made, state = assembly
    settings = PolicyLoss(name, *CLIPS[name], length=8, beta=0.1)
    text = next_token(BASE, made.eval_model, ComputeConfig(dtype="float32"))
    objective = Policy(text, settings, T)
    batch = batch_of(np.random.default_rng(1))

    params = {"params": made.params}
    base = table(made.eval_model.clone(adapters=type(made.eval_model.adapters)()), params, batch)
    now = table(made.eval_model, params | {"lora": state.lora}, batch)
    old = now
    if updates == "later":
        old = now + 0.3 * jax.random.normal(jax.random.key(0), now.shape) * batch["loss_weights"]
        batch |= {"old": np.asarray(old), "base": np.asarray(base)}

    def plain(lora) -> jax.Array:
        log_probs = table(made.eval_model, params | {"lora": lora}, batch)
        of = partial(policy_loss, old=old, base=base, mask=batch["loss_weights"])
        return of(log_probs, advantage=batch["advantages"], settings=settings).loss

    def ours(lora) -> tuple[jax.Array, dict[str, jax.Array]]:
        evaluated = objective.loss(params | {"lora": lora}, made.params, batch, jax.random.key(0))
        return evaluated.loss, dict(evaluated.measured)

    expected, gradient = jax.jit(jax.value_and_grad(plain))(state.lora)
    (value, measured), found = jax.jit(jax.value_and_grad(ours, has_aux=True))(state.lora)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    norm = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    assert norm > 1e-4
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4 * norm), found, gradient)
    _, count = objective.counts(batch)
    total, share = (
        denominator(batch["loss_weights"], batch["real"], settings),
        batch["loss_weights"],
    )
    assert count == total == (13 if name == "dapo" else 3)
    if name != "dapo":
        share = share / np.maximum(share.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(measured["entropy"], -(share * now).sum(), rtol=1e-4)
    np.testing.assert_allclose(
        measured["mismatch"], np.abs(share * old).sum(), rtol=1e-4
    )  # sampled: 0
    distance = np.abs(np.exp(np.asarray(old, np.float64)) - 1) / 2
    np.testing.assert_allclose(measured["mismatch_bound"], (share * distance).sum(), rtol=1e-4)
    ratio = np.asarray(base - now)
    divergence = (share * (np.exp(ratio) - ratio - 1)).sum()
    np.testing.assert_allclose(measured["divergence"], divergence, rtol=1e-3)
    assert (float(measured["clipped"]) > 0) == (updates == "later")


def test_temperature_acts_after_the_cap(assembly) -> None:
    text = next_token(BASE, assembly[0].eval_model, ComputeConfig(dtype="float32"))
    text = replace(text, head=text.head._replace(softcap=5.0, scale=0.5))
    products = np.linspace(-40, 40, 9)
    found = Policy(text, PolicyLoss("grpo", 0.2, 0.2, 8), T).policy.head.logits(products)[0]
    np.testing.assert_allclose(found, 5.0 * np.tanh(0.5 * products / 5.0) / T, rtol=1e-5)
