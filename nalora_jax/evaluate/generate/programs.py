"""The two compiled programs of generation: prefill, then decoding of several tokens a call.

Both take weights, adapters, settings and the number of steps as arguments, so that a change of
these does not compile another program. Programs are specialised to shapes only, and `shapes.bucket`
keeps their number small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nalora_jax.evaluate.generate.sampling import Array, Sampling, next_tokens, seen_tokens, with_token
from nalora_jax.models.cache import Cache, grow, init_cache
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.storage import prepare

if TYPE_CHECKING:
    from nalora_jax.data.images.processor import ImageProcessor

# Parameters of the logits, tied or not.
_HEAD = ("embed", "lm_head")
# Value of `decode` for finished rows.
NO_TOKEN = -1


class Weights(NamedTuple):
    """A model's variables in the programs' layout, sharing their memory."""

    body: Any  # for the layers and for embedding tokens, prepared
    head: Any  # for the logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """A batch of tokenized prompts with its generation settings."""

    tokens: Array  # int32 [batch, seq], padded on the right; in chunks, negative in gaps
    lengths: Array  # int32 [batch], at least 1, gaps included
    live: Array  # bool [batch]; false for padding rows
    stop_ids: Array  # int32 [stops]
    sampling: Sampling
    features: Array | None = None  # [batch, places, d_model] of images, from `see`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """State of generation between two calls."""

    cache: Cache
    token: jax.Array  # int32 [batch], the newest, not yet in the cache
    done: jax.Array  # bool [batch]
    step: jax.Array  # int32 [], tokens generated so far
    seen: jax.Array | None = None  # bool [batch, vocab], tokens of the text, with a repetition penalty


def view_weights(model: Decoder, variables: Mapping[str, Any]) -> Weights:
    """Converts ``{"params": ...}``, optionally with ``"lora"``, to the programs' layout."""
    head: dict[str, Any] = {
        "params": {name: leaf for name, leaf in variables["params"].items() if name in _HEAD}
    }
    if trained := {name: leaf for name, leaf in variables.get("lora", {}).items() if name in _HEAD}:
        head["lora"] = trained
    return Weights(prepare(variables, model.numerics), head)


@partial(jax.jit, static_argnames=("model", "processor"))
def see(model: Decoder, processor: ImageProcessor, weights: Weights, pixels: Array) -> jax.Array:
    """Returns image-token features of uint8 pixels ``[batch, images, height, width, 3]``."""
    features: jax.Array = model.apply(weights.body, processor.normalise(jnp.asarray(pixels)), method="see")
    return features


@partial(jax.jit, static_argnames=("model", "slots", "chunk"))
def prefill(
    model: Decoder,
    weights: Weights,
    prompts: Prompts,
    step: Array | np.int32 = np.int32(0),  # noqa: B008
    *,
    slots: int,
    chunk: int = 0,
) -> State:
    """Processes all prompts and generates the next token of each.

    Args:
      model: the decoder.
      weights: from `view_weights`.
      prompts: the batch.
      step: int scalar, number of tokens at the end of every prompt that were generated before.
      slots: size of the cache: the padded prompt plus all tokens to generate.
      chunk: tokens of each prompt to process at a time, a divisor of the padded length; 0: all. The
        memory of activations does not depend on the length of prompts if it is set.
    """
    if chunk:
        last, cache = _in_chunks(model, weights, prompts, slots, chunk)
    else:
        last, cache = _at_once(model, weights, prompts)
    step, logits = jnp.asarray(step), model.apply(weights.head, last, method="unembed")
    seen_so_far = seen_tokens(prompts.sampling, prompts.tokens, prompts.lengths, logits.shape[-1])
    token = next_tokens(logits, prompts.sampling, step, seen_so_far)
    done = _stops(token, prompts.stop_ids) | ~prompts.live
    return State(grow(cache, slots), token, done, step + 1, with_token(seen_so_far, token))


def _at_once(model: Decoder, weights: Weights, prompts: Prompts) -> tuple[jax.Array, Cache]:
    """Returns ``[batch, d_model]`` of the prompts' last tokens, and their cache."""
    batch = prompts.tokens.shape[0]
    hidden, cache = model.apply(
        weights.body,
        prompts.tokens,
        segment_ids=_segments(prompts),
        cache=init_cache(model.config, batch, 0, model.numerics),
        features=prompts.features,
    )
    return jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0], cache


def _in_chunks(
    model: Decoder, weights: Weights, prompts: Prompts, slots: int, chunk: int
) -> tuple[jax.Array, Cache]:
    """Returns the same, of ``chunk`` tokens of every prompt at a time."""
    tokens, lengths, segments = (
        jnp.asarray(prompts.tokens),
        jnp.asarray(prompts.lengths),
        _segments(prompts),
    )
    of_chunk = partial(lax.dynamic_slice_in_dim, slice_size=chunk, axis=1)

    def step(i: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        last, cache = carry
        hidden, cache = model.apply(
            weights.body,
            of_chunk(jnp.maximum(tokens, 0), i * chunk),
            segment_ids=of_chunk(segments, i * chunk),
            cache=cache,
            features=_features_from(model, prompts, i * chunk, chunk),
            lengths=jnp.sum(segments, axis=1),
        )
        place = lengths - 1 - i * chunk
        here = jnp.take_along_axis(hidden, jnp.clip(place, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(((place >= 0) & (place < chunk))[:, None], here, last), cache

    cache = init_cache(model.config, tokens.shape[0], slots, model.numerics)
    last = jnp.zeros((tokens.shape[0], model.config.d_model), model.numerics.result)
    filled = (jnp.max(lengths) + chunk - 1) // chunk
    chunked: tuple[jax.Array, Cache] = lax.fori_loop(0, filled, step, (last, cache))
    return chunked


def _segments(prompts: Prompts) -> jax.Array:
    """Returns 1 for the prompts' tokens, and 0 for padding and gaps: int ``[batch, seq]``."""
    tokens = jnp.asarray(prompts.tokens)
    within = jnp.arange(tokens.shape[1])[None] < jnp.asarray(prompts.lengths)[:, None]
    return (within & (tokens >= 0)).astype(jnp.int32)


def _features_from(model: Decoder, prompts: Prompts, start: jax.Array, chunk: int) -> jax.Array | None:
    """Returns the features of the image tokens of every row starting at the token ``start``.

    They are ``[batch, places, d_model]`` with at most ``chunk`` places; None without images.
    """
    if prompts.features is None:
        return None
    sight, features = model.config.sight, jnp.asarray(prompts.features)
    assert sight is not None
    tokens = jnp.asarray(prompts.tokens)
    earlier = (tokens == sight.image_token) & (jnp.arange(tokens.shape[1])[None] < start)
    index = jnp.sum(earlier, axis=1)[:, None] + jnp.arange(min(chunk, features.shape[1]))[None]
    return jnp.take_along_axis(features, index[..., None], axis=1, mode="fill")


@partial(jax.jit, static_argnames=("model", "size"), donate_argnames=("state",))
def decode(
    model: Decoder,
    weights: Weights,
    state: State,
    prompts: Prompts,
    finished: jax.Array,
    steps: jax.Array,
    *,
    size: int,
) -> tuple[State, jax.Array]:
    """Generates up to ``steps`` more tokens, fewer if every row is done.

    Args:
      model: as for `prefill`.
      weights: as for `prefill`.
      state: from the previous call; its buffers are reused.
      prompts: as for `prefill`; its settings and stop ids.
      finished: bool ``[batch]``, rows that are finished for reasons known to the host only.
      steps: int scalar, at most ``size``.
      size: length of the result.

    Returns:
      The state, and int32 ``[batch, size]``: the tokens, `NO_TOKEN` after a row's end.
    """

    def body(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
        i, state, new_tokens = carry
        hidden, cache = model.apply(weights.body, state.token[:, None], cache=state.cache)
        logits = model.apply(weights.head, hidden[:, 0], method="unembed")
        token = next_tokens(logits, prompts.sampling, state.step, state.seen)
        column = jnp.where(state.done, NO_TOKEN, token)[:, None]
        new_tokens = lax.dynamic_update_slice(new_tokens, column, (jnp.zeros_like(i), i))
        done = state.done | _stops(token, prompts.stop_ids)
        return i + 1, State(cache, token, done, state.step + 1, with_token(state.seen, token)), new_tokens

    def unfinished(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.done)

    new_tokens = jnp.full((state.token.shape[0], size), NO_TOKEN, jnp.int32)
    state = replace(state, done=state.done | finished)
    _, state, new_tokens = lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state, new_tokens))
    return state, new_tokens


def _stops(token: jax.Array, stop_ids: Array) -> jax.Array:
    """Returns True for ``[batch]`` tokens that are stop ids."""
    return jnp.any(token[:, None] == stop_ids[None, :], axis=-1)
