"""Direct preference optimisation (arXiv 2305.18290) as an objective of the training step.

    delta = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)
    loss  = -(1 - s) log sigmoid(beta delta) - s log sigmoid(-beta delta)

p_ref is the base with the adapter off: a second forward pass with the same frozen weights. The loss
depends on tokens only through delta. So its gradient equals the gradient of a cross-entropy whose
weights are the derivative of the loss with respect to each token's log-probability, and logits are
computed in chunks like in any other step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.config import PreferenceConfig
from nalora_jax.method.step import Batch, Evaluated
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.split_rows import joined
from nalora_jax.ops.target_losses import target_losses
from nalora_jax.train.objectives import NextToken

# Collections that the policy has in addition to the base's.
ADAPTED = ("lora", "gate_mask", "gate_taps")


class Pairs(NamedTuple):
    """Loss and rewards of pairs, each float32 with the shape of the log-ratios."""

    loss: jax.Array
    chosen: jax.Array  # rewards: beta times the log-ratio
    rejected: jax.Array


def dpo(chosen: jax.Array, rejected: jax.Array, config: PreferenceConfig) -> Pairs:
    """Returns the DPO loss and the rewards of pairs.

    Args:
      chosen, rejected: log-ratios of policy and reference; per completion token with
        ``config.per_token``.
      config: beta and label smoothing.
    """
    margin = config.beta * (chosen - rejected)
    smoothing = config.label_smoothing
    loss = (1 - smoothing) * jax.nn.softplus(-margin) + smoothing * jax.nn.softplus(margin)
    return Pairs(loss, config.beta * chosen, config.beta * rejected)


@dataclass(frozen=True)
class Preference:
    """`nalora_jax.method.step.Objective` of DPO on packed pairs (`nalora_jax.data.preference`)."""

    policy: NextToken
    config: PreferenceConfig

    def loss(self, variables: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array) -> Evaluated:
        """Returns the loss, see `nalora_jax.method.step.Objective`.

        The batch has the arrays of text and ``pairs [rows, pairs]``.
        """
        hidden = self.policy.hidden(variables, batch, key)
        base = {name: tree for name, tree in variables.items() if name not in ADAPTED}
        reference = self.policy.model.clone(adapters=AdapterSpec()).apply(
            base, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
        )
        policy_losses, reference_losses = (self._losses(h, params, batch) for h in (hidden, reference))
        # [rows, pairs, 2]: log-ratios of the completions, chosen first, and their token counts.
        ratios = self._by_answer(reference_losses - policy_losses, batch)
        tokens = jnp.maximum(self._by_answer(batch["loss_weights"], batch), 1.0)
        per = 1.0 / tokens if self.config.per_token else jnp.ones_like(tokens)
        real = batch["pairs"]

        def total(ratios: jax.Array) -> tuple[jax.Array, Pairs]:
            losses = dpo(ratios[..., 0] * per[..., 0], ratios[..., 1] * per[..., 1], self.config)
            return jnp.sum(real * losses.loss), losses

        (value, losses), slope = jax.value_and_grad(total, has_aux=True)(ratios)
        surrogate = self.policy.cross_entropy(hidden, params, batch, self._by_token(-slope, batch))
        measured = {
            "rewards_chosen": jnp.sum(real * losses.chosen),
            "rewards_rejected": jnp.sum(real * losses.rejected),
            "rewards_margin": jnp.sum(real * (losses.chosen - losses.rejected)),
            "rewards_accuracy": jnp.sum(real * (losses.chosen > losses.rejected)),
        }
        # Value of the loss, gradient of the surrogate.
        return Evaluated(lax.stop_gradient(value - surrogate) + surrogate, lax.stop_gradient(measured))

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the numbers of real tokens and of pairs."""
        return self.policy.counts(batch)[0], jnp.sum(batch["pairs"])

    def _losses(self, hidden: jax.Array, params: Any, batch: Batch) -> jax.Array:
        policy = self.policy
        losses = target_losses(
            hidden,
            policy.kernel(params),
            policy.parts(batch["targets"]),
            policy.parts(batch["loss_weights"]),
            policy.head,
            policy.numerics,
            chunk=policy.loss_chunk,
            compact=policy.is_compact,
            shards=policy.batch_shards,
        )
        return joined(losses, policy.row_sharding, batch["tokens"].shape[1])

    def _by_answer(self, values: jax.Array, batch: Batch) -> jax.Array:
        """Sums ``[rows, seq]`` over each segment to ``[rows, pairs, 2]``; segment 0 is padding."""
        count = 2 * batch["pairs"].shape[1]
        sums = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, count + 1))(values, batch["segment_ids"])
        return sums[:, 1:].reshape(sums.shape[0], -1, 2)

    def _by_token(self, values: jax.Array, batch: Batch) -> jax.Array:
        """Spreads ``[rows, pairs, 2]`` over the loss tokens of ``[rows, seq]``; 0 elsewhere."""
        flat = jnp.pad(values.reshape(values.shape[0], -1), ((0, 0), (1, 0)))
        return jnp.take_along_axis(flat, batch["segment_ids"], axis=1) * batch["loss_weights"]
