"""Runs on preference pairs, with a loss of `nalora_jax.ops.preference_losses`.

The reference of a loss that has one is the base with the adapter off: a second forward pass with
the same frozen weights. A loss depends on tokens only through the log-probabilities of the answers.
So its gradient equals the gradient of a cross-entropy whose weights are the derivative of the loss
with respect to each token's log-probability, and logits are computed in chunks like in any other
step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nalora_jax.assembly.objectives import NextToken, through_surrogate
from nalora_jax.assembly.program import Assembly
from nalora_jax.config import PreferenceConfig, RunConfig
from nalora_jax.config.checks import Limits, trained_tables
from nalora_jax.config.settings import UNCHANGED
from nalora_jax.data.forms import uses_chat_template
from nalora_jax.data.preference_pairs import held_out_pairs, pair_data, pairs_digest
from nalora_jax.data.source import Source
from nalora_jax.data.sources import open_held_out
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.preference_evaluation import PreferenceEvaluator
from nalora_jax.kinds import text
from nalora_jax.kinds.inputs import (
    describe_base,
    open_records,
    resolve_base,
    settle_schedule,
    stream_shape,
)
from nalora_jax.kinds.record import Arrays, Inputs, register_kind
from nalora_jax.loading.adapted import AdaptedModel
from nalora_jax.mesh import distributed
from nalora_jax.method.step import Batch, Evaluated
from nalora_jax.models.config import ModelConfig
from nalora_jax.ops.preference_losses import (
    LOSSES,
    AnswerScores,
    PairLosses,
    chosen_nll,
    label_figures,
    pair_losses,
    pair_weights,
)
from nalora_jax.weights.model_files import LoadedModel, open_files

_WITHOUT_REFERENCE = " or ".join(
    name for name, loss in LOSSES.items() if not loss.has_reference
)


# Settings that not every loss reads.
_OF_SOME = tuple(
    dict.fromkeys(name for loss in LOSSES.values() for name in loss.settings)
)


def open_inputs(config: RunConfig, source: Mapping[str, Source] | None) -> Inputs:
    """Opens the model's files and the pairs, tokenizes them and settles the settings.

    Raises:
      NaloraError: a model or pairs that cannot be read, pairs that do not fit, or too few held out.
    """
    files = open_files(resolve_base(config))
    preference = config.preference
    # raises for rules that match nothing, before data is tokenized
    base, tokenizer, adapters = describe_base(config, files)
    context = base.max_positions
    train, held = open_records(config.data, source)
    turns = uses_chat_template(train.read([0])[0], config.data, preference.chosen_field)
    shape = stream_shape(config) | {"context": context}
    data = pair_data(train, config.data, preference, tokenizer, **shape)
    longest = int(data.store.lengths().max())
    if longest > context:
        raise NaloraError(
            "training data",
            expected=f"answers with their prompts of at most {context} tokens, the model's context",
            found=f"one of {longest}",
            # A row has both completions of a pair, each with its prompt.
            remedy=f"set --data.max-length to {2 * context} or less",
        )
    config = replace(
        config, data=replace(config.data, max_length=data.pattern.capacity)
    )
    config = settle_schedule(config, base.d_model, data.rows_per_epoch, "rows of pairs")
    pairs = held_out_pairs(held, config.data, preference, tokenizer, context)
    questions = {
        "reported": pairs_digest(pairs[0]),
        "selecting": pairs_digest(pairs[1]),
    }
    return Inputs(config, base, files, data, pairs, questions, turns, adapters)


def evaluator(
    inputs: Inputs, loaded: LoadedModel, assembly: Assembly, pairs: Any
) -> PreferenceEvaluator:
    """Returns the evaluator of some held-out pairs."""
    model = assembly.eval_model
    mesh = distributed.multi_device_mesh(assembly.mesh)
    return PreferenceEvaluator(
        model, loaded.tokenizer, pairs, inputs.config.preference, mesh=mesh
    )


def program_parts(config: RunConfig, processor: Any) -> dict[str, Any]:
    """Returns the objective of a preference loss, for `nalora_jax.assembly.program.assemble`."""
    return {"objective": partial(Preference, config=config.preference)}


def adapter_evaluator(
    model: AdaptedModel, config: RunConfig, mesh: Mesh | None, named: bool
) -> PreferenceEvaluator:
    """Returns the evaluator of a trained adapter on held-out pairs.

    See `text.adapter_evaluator`.
    """
    data = config.data
    tokenizer = model.base.tokenizer
    records = open_held_out(data, data.eval_split)
    context = model.base.config.max_positions
    pairs, _ = held_out_pairs(records, data, config.preference, tokenizer, context)
    return PreferenceEvaluator(
        model.module, tokenizer, pairs, config.preference, mesh=mesh
    )


def limits(config: RunConfig) -> Iterator[Limits]:
    """Yields the values that other settings may have in a run on pairs."""
    # also of --kind preference
    yield Limits("preference pairs", {"preference.loss": tuple(LOSSES)})
    preference = config.preference
    loss = LOSSES[preference.loss]
    if loss.has_reference:
        remedy = (
            "the reference is the base with the adapter off, which these adapters change: "
            f"use --preference.loss {_WITHOUT_REFERENCE}"
        )
        yield Limits("--preference.loss", {"lora.init": UNCHANGED}, remedy)
        remedy = (
            "the reference is the base, whose weights are trained: use --preference.loss "
            f"{_WITHOUT_REFERENCE}"
        )
        yield Limits("--preference.loss", {"tune": ((),)}, remedy)
    unread = {}
    for name in _OF_SOME:
        if name not in loss.settings:
            unread[f"preference.{name}"] = (getattr(PreferenceConfig(), name),)
    cause = f"--preference.loss {preference.loss}, which does not read it"
    yield Limits(cause, unread)
    rows = {"data.loss_last": (0,), "data.too_long": ("drop", "truncate", "error")}
    cause = "--preference.loss, which compares entire answers"
    yield Limits(cause, {"vision.task": ("",)} | rows)
    if config.adapter and loss.has_reference:
        remedy = (
            "the reference is the base without an adapter: merge this one first (nalora merge), "
            f"or use --preference.loss {_WITHOUT_REFERENCE}"
        )
        yield Limits("--adapter", {"preference.loss": ("none",)}, remedy)
    for flag in trained_tables(config):
        yield Limits(flag, {"preference.loss": ("none",)})


@dataclass(frozen=True)
class Preference:
    """`nalora_jax.method.step.Objective` of packed pairs (`nalora_jax.data.preference_pairs`)."""

    policy: NextToken
    config: PreferenceConfig

    def loss(
        self, variables: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array
    ) -> Evaluated:
        """Returns the loss, see `nalora_jax.method.step.Objective`.

        The batch has the arrays of text and ``pairs [rows, pairs]``, and for a loss without pairs
        ``desirable`` of the same shape.
        """
        hidden = self.policy.hidden(variables, batch, key)
        # Minus log-probabilities, [rows, seq], without a gradient: the surrogate below has it.
        alignments = None
        if self.config.weighted:
            scores = self.policy.target_scores(hidden, params, batch)
            policy_losses = scores.losses
            alignments = self._by_answer(scores.alignments, batch)
        else:
            policy_losses = self.policy.target_losses(hidden, params, batch)
        # [rows, pairs, 2]: of the answers, chosen first.
        log_probs = self._by_answer(-policy_losses, batch)
        ratios = jnp.zeros_like(log_probs)
        if LOSSES[self.config.loss].has_reference:
            base = self.policy.base_hidden(variables, batch)
            reference_losses = self.policy.target_losses(base, params, batch)
            ratios = self._by_answer(reference_losses - policy_losses, batch)
        tokens = jnp.maximum(self._by_answer(batch["loss_weights"], batch), 1.0)
        real = batch["pairs"]
        weights = None
        if alignments is not None:
            weights = pair_weights(alignments, tokens)  # [rows, pairs]
        labels = None
        if not LOSSES[self.config.loss].has_pairs:
            # Of all devices' rows, and without a gradient.
            labels = label_figures(batch["desirable"], ratios, real)

        def total(change: jax.Array) -> tuple[jax.Array, PairLosses]:
            """Returns the loss, summed over real pairs, and its parts, after a change of the
            log-probabilities ``[rows, pairs, 2]``."""
            answers = AnswerScores(
                log_probs + change, ratios + change, tokens, labels, weights
            )
            losses = pair_losses(answers, self.config)
            return jnp.sum(real * losses.loss), losses

        # The gradient in the log-probabilities, [rows, pairs, 2], becomes the weights of the
        # tokens' cross-entropy in a surrogate with the same gradient.
        differentiate = jax.value_and_grad(total, has_aux=True)
        (value, losses), slope = differentiate(jnp.zeros_like(log_probs))
        surrogate = self.policy.cross_entropy(
            hidden, params, batch, self._by_token(-slope, batch)
        )
        chosen = losses.rewards[..., 0]
        rejected = losses.rewards[..., 1]
        nll = chosen_nll(AnswerScores(log_probs, ratios, tokens, labels))
        measured = {
            "rewards_chosen": jnp.sum(real * chosen),
            "rewards_rejected": jnp.sum(real * rejected),
            "rewards_margin": jnp.sum(real * (chosen - rejected)),
            "rewards_accuracy": jnp.sum(real * (chosen > rejected)),
            "chosen_nll": jnp.sum(real * nll),
        }
        if weights is not None:
            measured["pair_weight"] = jnp.sum(real * weights)
        return through_surrogate(value, surrogate, measured)

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the numbers of real tokens and of pairs."""
        return self.policy.counts(batch)[0], jnp.sum(batch["pairs"])

    def _by_answer(self, values: jax.Array, batch: Batch) -> jax.Array:
        """Sums ``[rows, seq]`` over each segment to ``[rows, pairs, 2]``; segment 0 is padding."""
        count = 2 * batch["pairs"].shape[1]
        sums = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, count + 1))(
            values, batch["segment_ids"]
        )
        # [rows, 1 + 2 * pairs] -> [rows, pairs, 2]
        return sums[:, 1:].reshape(sums.shape[0], -1, 2)

    def _by_token(self, values: jax.Array, batch: Batch) -> jax.Array:
        """Spreads ``[rows, pairs, 2]`` over the loss tokens of ``[rows, seq]``; 0 elsewhere."""
        # [rows, 1 + 2 * pairs]: entry 0 is the padding's, then one entry per segment.
        flat = jnp.pad(values.reshape(values.shape[0], -1), ((0, 0), (1, 0)))
        return (
            jnp.take_along_axis(flat, batch["segment_ids"], axis=1)
            * batch["loss_weights"]
        )


def batch_arrays(config: RunConfig, base: ModelConfig, images: int) -> Arrays:
    """Returns the arrays of a batch besides those of text, see `Kind`."""
    arrays: Arrays = {"pairs": ((1,), "float32")}
    if not LOSSES[config.preference.loss].has_pairs:
        arrays["desirable"] = ((1,), "float32")
    return arrays


KIND = register_kind(
    replace(
        text.KIND,
        name="preference",
        open_inputs=open_inputs,
        evaluator=evaluator,
        evaluate=adapter_evaluator,
        program_parts=program_parts,
        limits=limits,
        rate=1 / 8,  # a guess, without evidence (docs/data.md)
        batch_arrays=batch_arrays,
        compares_with_base=True,
        subject="nalora_jax.study.preferences:Preferences",
    )
)
