"""Log-likelihoods of continuations, for multiple choice, perplexity and the harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from nalora_jax.common.notes import counting
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.shapes import batch_shards, place_batch
from nalora_jax.evaluate.plan import Pair, ScoringBatch, Split, choose_layout, make_batches, split_group
from nalora_jax.layout.distributed import context_size, fetch, row_sharding
from nalora_jax.models.cache import Cache, grow, init_cache, repeat
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.ropes import sharing_length
from nalora_jax.models.stacks import stacks
from nalora_jax.ops.split_rows import joined
from nalora_jax.ops.storage import prepare

# Number of floats in one chunk of logits.
_CHUNK_FLOATS = 1 << 23


class Score(NamedTuple):
    """Log-likelihood of a continuation."""

    log_prob: float  # natural logarithm, summed over its tokens
    tokens: int
    greedy: bool  # True if every token is the most likely one


def score_groups(
    model: Decoder,
    variables: Mapping[str, Any],
    groups: Sequence[Sequence[Pair]],
    *,
    batch_tokens: int = 1536,
    mesh: Mesh | None = None,
) -> list[list[Score]]:
    """Returns the score of every continuation after its context.

    The contexts of a group should share a prefix (the choices of a question): the prefix is
    computed once. The program is compiled once per model and layout of the data; weights and
    adapters are arguments.

    Args:
      model: the decoder.
      variables: ``params``, and ``lora`` if there are adapters.
      groups: lists of (context ids, continuation ids), neither empty.
      batch_tokens: approximate number of shared tokens per batch.
      mesh: mesh of the weights, if they are sharded; the batch is split over its data axes.

    Returns:
      Scores in the order of ``groups``.

    Raises:
      NaloraError: a group, a context or a continuation is empty, or a text is longer than the model's context.
    """
    if not groups:
        return []
    switch = _longest_sharing(model.config)
    splits = [split_group(index, pairs, switch) for index, pairs in enumerate(groups)]
    _check_lengths(splits, model.config.max_positions)
    layout = choose_layout(splits, tokens=batch_tokens, shards=batch_shards(mesh))
    variables = prepare(variables, model.numerics, tables=False)
    scores: list[list[Score]] = [[Score(0.0, 0, True)] * len(split.tails) for split in splits]
    with counting("evaluating", sum(map(len, scores))) as done:
        for batch, pairs in make_batches(splits, layout):
            log_probs, greedy = _score_batch(model, variables, batch, mesh)
            for (group, pair), score in zip(
                pairs, _by_owner(batch.owner, log_probs, greedy, len(pairs)), strict=True
            ):
                scores[group][pair] = score
            done(len(pairs))
    return scores


def _longest_sharing(config: ModelConfig) -> int | None:
    """Returns the length up to which texts can share a computed prefix, or None without a limit."""
    if any(stack.config.mixer is not None for stack in stacks(config)):
        return 0  # a packed row of prefixes has one state, after its last prefix
    return sharing_length(config.ropes)


def _check_lengths(splits: Sequence[Split], context: int) -> None:
    for split in splits:
        length = len(split.stem) + max(len(tail) for tail in split.tails)
        if length > context:
            raise NaloraError(
                f"evaluation item {split.index}",
                expected=f"at most {context} tokens before the last (the model's context)",
                found=length,
                remedy="drop or shorten long items",
            )


def _score_batch(
    model: Decoder, variables: Any, batch: ScoringBatch, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray]:
    placed = place_batch((batch.stem, batch.tails, batch.targets, batch.owner >= 0), mesh)
    if batch.stem["tokens"].shape[1] == 0:
        model = for_rows(model, mesh, batch.targets.shape[2])
    log_probs, greedy = _stems_and_tails(model, variables, *placed)
    return fetch(log_probs).astype(np.float64), fetch(greedy)


def _by_owner(owner: np.ndarray, log_probs: np.ndarray, greedy: np.ndarray, count: int) -> list[Score]:
    scored = owner >= 0
    who = owner[scored]
    sums = np.bincount(who, log_probs[scored], minlength=count)
    tokens = np.bincount(who, minlength=count)
    hits = np.bincount(who, greedy[scored], minlength=count)
    return [Score(float(s), int(n), bool(h == n)) for s, n, h in zip(sums, tokens, hits, strict=True)]


@partial(jax.jit, static_argnames=("model",))
def _stems_and_tails(
    model: Decoder,
    variables: Any,
    stem: dict[str, jax.Array],
    tails: dict[str, jax.Array],
    targets: jax.Array,
    scored: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities of the scored targets, and True for most likely targets.

    Both have the shape ``[rows, lanes, tail]``.
    """
    lanes, tail = targets.shape[1:]
    tokens, positions, segments = (
        tails[name].reshape(-1, tail) for name in ("tokens", "positions", "segments")
    )
    call = partial(model.apply, variables, tokens, positions=positions, segment_ids=segments)
    if stem["tokens"].shape[1] == 0:
        hidden = joined(call(), model.activation_sharding, tail)
    else:
        hidden, _ = call(cache=_stem_cache(model, variables, stem, lanes, tail))
    return target_log_probs(model, variables, hidden.reshape(*targets.shape, -1), targets, scored)


def _stem_cache(model: Decoder, variables: Any, stem: dict[str, jax.Array], lanes: int, tail: int) -> Cache:
    """Returns keys and values of the stems for every lane, with room for the tails."""
    rows, size = stem["tokens"].shape
    _, cache = model.apply(
        variables,
        stem["tokens"],
        positions=stem["positions"],
        segment_ids=stem["segments"],
        cache=init_cache(model.config, rows, 0, model.numerics),
    )
    return repeat(grow(cache, max(size, tail)), lanes)


def target_log_probs(
    model: Decoder, variables: Any, hidden: jax.Array, targets: jax.Array, scored: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each scored target, computing logits in chunks.

    Args:
      model: the decoder.
      variables: its variables.
      hidden: ``[..., d_model]`` after the final norm.
      targets: int ``[...]``.
      scored: bool ``[...]``, True for targets to score.

    Returns:
      float32 ``[...]``, 0 if not scored; bool ``[...]``, True if scored and no other token is more
      likely.
    """
    shape, n = targets.shape, targets.size
    rows = min(n, max(16, _CHUNK_FLOATS // model.config.vocab_size))
    flat, targets, scored = hidden.reshape(n, -1), targets.reshape(n), scored.reshape(n)
    # Scored positions first, so that only the chunks with scored positions are computed.
    order = jnp.pad(jnp.argsort(~scored, stable=True), (0, -n % rows), constant_values=n)
    chunks = (jnp.sum(scored) + rows - 1) // rows

    def body(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index = lax.dynamic_slice(order, (i * rows,), (rows,))
        logits = model.apply(variables, jnp.take(flat, index, axis=0, mode="clip"), method="unembed")
        chosen = jnp.take(targets, index, mode="clip")
        picked = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
        top = jnp.max(logits, axis=-1)
        log_prob = picked - top - jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1))
        log_probs, greedy = results
        return log_probs.at[index].set(log_prob, mode="drop"), greedy.at[index].set(
            picked >= top, mode="drop"
        )

    start = jnp.zeros((n,), jnp.float32), jnp.zeros((n,), bool)
    log_probs, greedy = lax.fori_loop(0, chunks, body, start)
    return jnp.where(scored, log_probs, 0.0).reshape(shape), (scored & greedy).reshape(shape)


_LEAST_BLOCK = 128  # tokens; shorter rows are computed on every device


def for_rows(model: Decoder, mesh: Mesh | None, seq: int) -> Decoder:
    """Returns ``model`` for rows of ``seq`` tokens without a cache; its result has parts of long rows."""
    splits = all(
        stack.config.mixer is None or stack.config.mixer.splits_rows for stack in stacks(model.config)
    )
    if context_size(mesh) == 1 or not splits or seq < 2 * context_size(mesh) * _LEAST_BLOCK:
        return model
    return model.clone(activation_sharding=row_sharding(mesh))
