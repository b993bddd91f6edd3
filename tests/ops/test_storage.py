"""What a rematerialised layer saves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import SAVED, round_and_save


def test_a_product_that_is_saved_is_not_computed_again():
    def layer(x, kernel):
        return jnp.sin(round_and_save(x @ kernel, Numerics())) @ kernel

    def products(policy):
        loss = lambda x: jnp.sum(jax.checkpoint(layer, policy=policy)(x, jnp.ones((4, 4))))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 4)))).count("dot_general")

    # Forward two and backward two; without the name the first is computed again.
    assert products(jax.checkpoint_policies.save_only_these_names(SAVED)) == 4
    assert products(jax.checkpoint_policies.nothing_saveable) == 5
