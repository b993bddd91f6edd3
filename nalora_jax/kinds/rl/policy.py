"""Policy gradients (`nalora_jax.ops.policy_losses`) as an objective of the training step.

As in `nalora_jax.kinds.preference`, the loss depends on tokens only through their
log-probabilities. So its gradient is the gradient of a cross-entropy whose weights are the
derivatives of the loss by the log-probabilities, and logits are computed in chunks. The base model
has the same weights with the adapter off.

A batch has the arrays of text, one sample a row, whose loss weights are 1 for the sample's tokens,
and

    advantages  [rows]
    real        [rows]       0 for rows of padding
    sampled     [rows, seq]  log-probability of each target when it was sampled, by the generator
    old         [rows, seq]  log-probability by the training program before the first of several
                             updates; absent with one update, which computes it
    base        [rows, seq]  log-probability by the base; absent if the update computes it
    replayed    [rows, seq, mixtures, top_k]  experts that the generator chose; absent unless they
                             are replayed. The base chooses its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.assembly.objectives import NextToken, through_surrogate
from nalora_jax.method.step import Batch, Evaluated
from nalora_jax.ops.policy_losses import (
    Correction,
    ImportanceWeights,
    Losses,
    PolicyLoss,
    denominator,
    importance_weights,
    policy_loss,
)


@dataclass(frozen=True)
class Policy:
    """`nalora_jax.method.step.Objective` of samples with advantages.

    Attributes:
      text: the objective of the same model on text.
      settings: of the loss.
      temperature: at which the samples were drawn.
      correction: for samples of another policy; None: the generator's are the policy's own.
    """

    text: NextToken
    settings: PolicyLoss
    temperature: float = 1.0
    correction: Correction | None = None

    @property
    def policy(self) -> NextToken:
        """Returns the objective whose logits are divided by the temperature: c tanh(s x / c) / T
        has scale s / T and cap c / T."""
        head = self.text.head
        t = self.temperature
        return replace(
            self.text,
            head=head._replace(scale=head.scale / t, softcap=head.softcap / t),
        )

    def loss(
        self, variables: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array
    ) -> Evaluated:
        """Returns the loss, see `nalora_jax.method.step.Objective`, and metrics of the samples.

        Metrics are means over the same tokens as the loss: ``entropy`` (of the policy, estimated by
        minus the log-probability of its own samples), ``divergence`` from the base, ``clipped``
        (share of tokens without a gradient), ``mismatch`` (absolute difference between the
        log-probabilities of generator and training program) and ``mismatch_bound`` (total variation
        distance between their distributions of a token, estimated by half of |ratio - 1|: it bounds
        by how much the probability of any event differs). With a correction see also
        `_weight_metrics`.
        """
        mask = batch["loss_weights"]
        hidden = self._hidden(variables, batch, key)
        log_probs = -self.policy.target_losses(hidden, params, batch)
        old = batch.get("old", log_probs)
        base = batch.get("base")
        if base is None:
            base = self.base_log_probs(variables, params, batch)
        weights = None
        if self.correction is not None:
            weights = importance_weights(
                old, batch["sampled"], mask, self.correction, self.settings.name
            )

        def total(log_probs: jax.Array) -> tuple[jax.Array, Losses]:
            """Returns the loss, summed over samples, and its parts, for log-probabilities ``[rows,
            seq]``."""
            losses = policy_loss(
                log_probs,
                old,
                base,
                mask,
                batch["advantages"],
                self.settings,
                None if weights is None else weights.weights,
            )
            return losses.loss, losses

        # The gradient in the log-probabilities, [rows, seq], is the weight of each token's
        # cross-entropy in a surrogate with the same gradient in the weights.
        (value, losses), slope = jax.value_and_grad(total, has_aux=True)(log_probs)
        surrogate = self.policy.cross_entropy(hidden, params, batch, -slope)
        share = mask
        # Weight of each token in the metrics: a mean over samples, but over all tokens for "dapo".
        if self.settings.name != "dapo":
            share = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
        measured = {
            "entropy": -jnp.sum(share * log_probs),
            "divergence": jnp.sum(share * losses.divergence),
            "clipped": jnp.sum(share * losses.clipped),
            "mismatch": jnp.sum(share * jnp.abs(old - batch["sampled"])),
            "mismatch_bound": jnp.sum(
                share * jnp.abs(jnp.expm1(old - batch["sampled"]))
            )
            / 2,
        }
        if weights is not None:
            measured |= self._weight_metrics(weights, share)
        return through_surrogate(value, surrogate, measured)

    def _hidden(
        self, variables: Mapping[str, Any], batch: Batch, key: jax.Array
    ) -> jax.Array:
        """Returns the policy's hidden states, see `NextToken.hidden`, with the experts of the
        generator if the batch has them."""
        routed = {}
        if "replayed" in batch:
            routed["replayed"] = batch["replayed"]
        return self.policy.hidden(variables, batch, key, **routed)

    def _weight_metrics(
        self, weights: ImportanceWeights, share: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns metrics of the importance weights, means with the weights ``share [rows, seq]``.

        They are ``weight`` (before clip and masks), ``weight_clipped`` (share of tokens whose
        weight the clip lowered), ``tokens_masked`` and ``samples_masked``.
        """
        assert self.correction is not None
        clipped = jnp.zeros_like(weights.ratio)
        if self.correction.clip:
            clipped = weights.ratio > self.correction.clip
        return {
            "weight": jnp.sum(share * weights.ratio),
            "weight_clipped": jnp.sum(share * clipped),
            "tokens_masked": jnp.sum(share * ~weights.in_tokens),
            "samples_masked": jnp.sum(share * ~weights.in_samples),
        }

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the number of real tokens and the denominator of the loss."""
        return self.text.counts(batch)[0], denominator(
            batch["loss_weights"], batch["real"], self.settings
        )

    def log_probs(
        self, variables: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array
    ) -> jax.Array:
        """Returns the policy's log-probabilities of the targets, ``[rows, seq]``; 0 without a loss
        weight."""
        hidden = self._hidden(variables, batch, key)
        return -self.policy.target_losses(hidden, params, batch)

    def base_log_probs(
        self, variables: Mapping[str, Any], params: Any, batch: Batch
    ) -> jax.Array:
        """Returns the log-probabilities ``[rows, seq]`` of the targets without the adapter, at the
        same temperature; 0 without a loss weight."""
        hidden = self.text.base_hidden(variables, batch)
        return -self.policy.target_losses(hidden, params, batch)
