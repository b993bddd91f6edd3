"""Objectives of the training step: the only part of a step that depends on the model's inputs.

`nalora_jax.method.step` combines an `Objective` with statistics, masks, gradients, micro-batches
and updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.common.devices import RUN_AXIS
from nalora_jax.method.step import Batch, Evaluated
from nalora_jax.models.targets import TOKEN_ROWS, AdapterSpec
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import (
    Head,
    HeadRows,
    TargetScores,
    WholeHead,
    cross_entropy,
    rows_of_chunk,
    target_losses,
    target_scores,
    trained_cross_entropy,
)
from nalora_jax.ops.reductions import count
from nalora_jax.ops.shardings import UNSHARDED, Shardings
from nalora_jax.ops.split_rows import join_parts, shards_of, split_parts
from nalora_jax.ops.storage import Trained, restore_layout

# Collections that the adapted model has in addition to the base's.
ADAPTED = ("lora", "gate_mask", "gate_taps")


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the tokens with non-zero loss weights."""

    model: Any  # a `nalora_jax.models.decoder.Decoder`, or any module with its call
    head: Head
    numerics: Numerics
    loss_chunk: int = 0
    shardings: Shardings = UNSHARDED  # of hidden states and of the head

    def loss(
        self, variables: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array
    ) -> Evaluated:
        """Returns the loss of ``[rows, seq]`` arrays; see `nalora_jax.method.step.Objective`."""
        hidden = self.hidden(variables, batch, key)
        weights = batch["loss_weights"]
        trained = self.trained_head(variables["lora"], params)
        if trained is not None:
            return Evaluated(self._by_head(hidden, trained, batch, weights))
        return Evaluated(self.cross_entropy(hidden, params, batch, weights))

    def _by_head(
        self,
        hidden: jax.Array,
        trained: WholeHead | HeadRows,
        batch: Batch,
        weights: jax.Array,
    ) -> jax.Array:
        """Returns `cross_entropy` with a gradient for the trained part of the head."""
        return trained_cross_entropy(
            hidden,
            trained,
            self.parts(batch["targets"]),
            self.parts(weights),
            self.head,
            self.numerics,
            chunk=self.loss_chunk,
            shards=self.batch_shards,
        )

    def hidden(
        self, variables: Mapping[str, Any], batch: Batch, key: jax.Array, **options: Any
    ) -> jax.Array:
        """Returns hidden states ``[rows, seq, d_model]`` after the final norm.

        If the mesh splits the tokens of rows, the hidden states are of the rows' `parts`.
        """
        chex.assert_rank(batch["tokens"], 2)
        hidden: jax.Array = self.model.apply(
            variables,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            deterministic=False,
            rngs={"dropout": key},
            **options,
        )
        return hidden

    def base_hidden(self, variables: Mapping[str, Any], batch: Batch) -> jax.Array:
        """Returns the hidden states of the base: the same weights with the adapter off, without
        dropout."""
        base = {name: tree for name, tree in variables.items() if name not in ADAPTED}
        model = self.model.clone(adapters=AdapterSpec())
        return replace(self, model=model).exact_hidden(base, batch)

    def exact_hidden(self, variables: Mapping[str, Any], batch: Batch) -> jax.Array:
        """Returns `hidden` without dropout."""
        hidden: jax.Array = self.model.apply(
            variables,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
        )
        return hidden

    def parts(self, values: jax.Array) -> jax.Array:
        """Returns values of tokens ``[rows, seq]`` in the layout of the hidden states."""
        return split_parts(values, self.shardings.rows)

    def trained_head(
        self, lora: Mapping[str, Any], params: Any
    ) -> WholeHead | HeadRows | None:
        """Returns the head's trained leaves and frozen kernel; None if the head is frozen."""
        if isinstance(self._stored_kernel(params), Trained):
            return WholeHead(self.kernel(params).value, self.head.transposed)
        if "embed" not in lora and "lm_head" not in lora:
            return None
        if "kernel" in lora.get("lm_head", {}):
            return WholeHead(lora["lm_head"]["kernel"])
        rows = self.model.adapters.head_rows(tied=self.head.transposed)
        if rows is None:
            return None
        # Only some rows of the head are trained: these and the frozen kernel form the head.
        name, ids = rows
        group, leaf = TOKEN_ROWS[name].split("/")
        return HeadRows(
            lora[group][leaf], self.kernel(params), ids, self.head.transposed
        )

    def kernel(self, params: Any) -> Any:
        """Returns the head's kernel in its stored form, in the layout that the loss reads.

        It is ``[vocab, d_model]`` for tied embeddings, else ``[d_model, vocab]``.
        """
        kernel = self._stored_kernel(params)
        # Gathered once, for all chunks of the loss, in up to two steps.
        for sharding in self.shardings.head:
            kernel = lax.with_sharding_constraint(kernel, sharding)
            # Between two steps the kernel keeps its row-major layout on a TPU; XLA would choose
            # another one for the loss, and transpose.
            if sharding is not self.shardings.head[-1]:
                kernel = jax.tree.map(
                    lambda x: restore_layout(x, self.numerics), kernel
                )
        return kernel

    def _stored_kernel(self, params: Any) -> Any:
        """Returns the leaf of the head's kernel."""
        if self.head.transposed:
            return params["embed"]["embedding"]
        return params["lm_head"]["kernel"]

    @property
    def batch_shards(self) -> int:
        """Returns the number of parts that the mesh splits the batch into."""
        return count(self.shardings.rows)

    @property
    def is_compact(self) -> bool:
        """Returns True if the loss gathers the rows that have a target.

        The loss of runs on several devices each has chunks of fixed rows: a run would need as many
        chunks as the one with most targets.
        """
        rows = self.shardings.rows
        return rows is None or (
            self.batch_shards == 1 and RUN_AXIS not in rows.mesh.shape
        )

    def cross_entropy(
        self, hidden: jax.Array, params: Any, batch: Batch, weights: jax.Array
    ) -> jax.Array:
        """Returns the cross-entropy of the targets, weighted by ``[rows, seq]`` and summed; hidden
        is of `parts`."""
        kernel = self.kernel(params)
        if isinstance(kernel, Trained):
            head = WholeHead(kernel.value, self.head.transposed)
            return self._by_head(hidden, head, batch, weights)
        return cross_entropy(
            hidden,
            kernel,
            self.parts(batch["targets"]),
            self.parts(weights),
            self.head,
            self.numerics,
            chunk=self._chunk(hidden),
            compact=self.is_compact,
            shards=self.batch_shards,
        )

    def target_losses(self, hidden: jax.Array, params: Any, batch: Batch) -> jax.Array:
        """Returns each token's loss times its weight, ``[rows, seq]``, without a gradient; hidden
        is of `parts`."""
        losses: jax.Array = self._of_targets(target_losses, hidden, params, batch)
        return losses

    def target_scores(
        self, hidden: jax.Array, params: Any, batch: Batch
    ) -> TargetScores:
        """Returns losses and alignments of each token times its weight, ``[rows, seq]``, without a
        gradient; hidden is of `parts`."""
        scores: TargetScores = self._of_targets(target_scores, hidden, params, batch)
        return scores

    def _of_targets(
        self, function: Callable[..., Any], hidden: jax.Array, params: Any, batch: Batch
    ) -> Any:
        """Returns the results of a function of `nalora_jax.ops.losses` for the batch's targets,
        arrays ``[rows, seq]``."""
        results = function(
            hidden,
            self.kernel(params),
            self.parts(batch["targets"]),
            self.parts(batch["loss_weights"]),
            self.head,
            self.numerics,
            chunk=self.loss_chunk,
            compact=self.is_compact,
            shards=self.batch_shards,
        )
        seq = batch["tokens"].shape[1]
        return jax.tree.map(lambda x: join_parts(x, self.shardings.rows, seq), results)

    def _chunk(self, hidden: jax.Array) -> int:
        """Returns the rows of a chunk of logits on a device; 0 leaves it to the loss.

        A part of a row has at least four chunks: rows are split because memory is short.
        """
        if self.loss_chunk or shards_of(self.shardings.rows) == 1:
            return self.loss_chunk
        tokens = hidden.shape[0] * hidden.shape[1] // self.batch_shards
        return min(rows_of_chunk(self.model.config.vocab_size), -(-tokens // 4))

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the numbers of real tokens and of loss tokens."""
        tokens = jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)
        return tokens, jnp.sum(batch["loss_weights"], dtype=jnp.float32)


def through_surrogate(
    value: jax.Array, surrogate: jax.Array, measured: Mapping[str, jax.Array]
) -> Evaluated:
    """Returns a loss with the value of ``value`` and the gradient of ``surrogate``.

    ``measured`` are metrics, which get no gradient.
    """
    return Evaluated(
        lax.stop_gradient(value - surrogate) + surrogate, lax.stop_gradient(measured)
    )
