"""The compiled programs of generation: prefill, then decoding of several tokens a call; or whole
groups of samples.

Both take weights, adapters, settings and the number of steps as arguments, so that a change of
these does not compile another program. Programs are specialised to shapes only, and `bucket` keeps
their number small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.sampling import (
    Array,
    Sampling,
    next_tokens,
    seen_tokens,
    with_token,
)
from nalora_jax.models.cache import Cache, grow, repeat
from nalora_jax.models.decoder import Decoder, init_cache
from nalora_jax.ops.storage import prepare

if TYPE_CHECKING:
    from nalora_jax.data.images.files import ImageProcessor

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

    tokens: (
        Array  # int32 [batch, seq], padded on the right; in chunks, negative in gaps
    )
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
    seen: jax.Array | None = (
        None  # bool [batch, vocab], tokens of the text, with a repetition penalty
    )


def view_weights(model: Decoder, variables: Mapping[str, Any]) -> Weights:
    """Converts ``{"params": ...}``, optionally with ``"lora"``, to the programs' layout."""
    head: dict[str, Any] = {
        "params": {
            name: leaf for name, leaf in variables["params"].items() if name in _HEAD
        }
    }
    if trained := {
        name: leaf for name, leaf in variables.get("lora", {}).items() if name in _HEAD
    }:
        head["lora"] = trained
    return Weights(prepare(variables, model.numerics), head)


@partial(jax.jit, static_argnames=("model", "processor"))
def see(
    model: Decoder, processor: ImageProcessor, weights: Weights, pixels: Array
) -> jax.Array:
    """Returns image-token features of uint8 pixels ``[batch, images, height, width, 3]``."""
    features: jax.Array = model.apply(
        weights.body, processor.normalise(jnp.asarray(pixels)), method="see"
    )
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
    step = jnp.asarray(step)
    logits = model.apply(weights.head, last, method="unembed")
    seen_so_far = seen_tokens(
        prompts.sampling, prompts.tokens, prompts.lengths, logits.shape[-1]
    )
    token = next_tokens(logits, prompts.sampling, step, seen_so_far)
    done = _stops(token, prompts.stop_ids) | ~prompts.live
    return State(
        grow(cache, slots), token, done, step + 1, with_token(seen_so_far, token)
    )


def _at_once(
    model: Decoder, weights: Weights, prompts: Prompts
) -> tuple[jax.Array, Cache]:
    """Returns ``[batch, d_model]`` of the prompts' last tokens, and their cache."""
    batch = prompts.tokens.shape[0]
    hidden, cache = model.apply(
        weights.body,
        prompts.tokens,
        segment_ids=_segments(prompts),
        cache=init_cache(model.config, batch, 0, model.numerics),
        features=prompts.features,
    )
    return jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)[
        :, 0
    ], cache


def _in_chunks(
    model: Decoder, weights: Weights, prompts: Prompts, slots: int, chunk: int
) -> tuple[jax.Array, Cache]:
    """Returns the same, of ``chunk`` tokens of every prompt at a time."""
    tokens = jnp.asarray(prompts.tokens)
    lengths = jnp.asarray(prompts.lengths)
    segments = _segments(prompts)
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
        here = jnp.take_along_axis(
            hidden, jnp.clip(place, 0, chunk - 1)[:, None, None], axis=1
        )[:, 0]
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


def _features_from(
    model: Decoder, prompts: Prompts, start: jax.Array, chunk: int
) -> jax.Array | None:
    """Returns the features of the image tokens of every row starting at the token ``start``.

    They are ``[batch, places, d_model]`` with at most ``chunk`` places; None without images.
    """
    if prompts.features is None:
        return None
    sight = model.config.sight
    features = jnp.asarray(prompts.features)
    assert sight is not None
    tokens = jnp.asarray(prompts.tokens)
    earlier = (tokens == sight.image_token) & (
        jnp.arange(tokens.shape[1])[None] < start
    )
    index = (
        jnp.sum(earlier, axis=1)[:, None]
        + jnp.arange(min(chunk, features.shape[1]))[None]
    )
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

    def body(
        carry: tuple[jax.Array, State, jax.Array],
    ) -> tuple[jax.Array, State, jax.Array]:
        i, state, new_tokens = carry
        hidden, cache = model.apply(
            weights.body, state.token[:, None], cache=state.cache
        )
        logits = model.apply(weights.head, hidden[:, 0], method="unembed")
        token = next_tokens(logits, prompts.sampling, state.step, state.seen)
        column = jnp.where(state.done, NO_TOKEN, token)[:, None]
        new_tokens = lax.dynamic_update_slice(
            new_tokens, column, (jnp.zeros_like(i), i)
        )
        done = state.done | _stops(token, prompts.stop_ids)
        return (
            i + 1,
            State(cache, token, done, state.step + 1, with_token(state.seen, token)),
            new_tokens,
        )

    def unfinished(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.done)

    new_tokens = jnp.full((state.token.shape[0], size), NO_TOKEN, jnp.int32)
    state = replace(state, done=state.done | finished)
    _, state, new_tokens = lax.while_loop(
        unfinished, body, (jnp.zeros((), jnp.int32), state, new_tokens)
    )
    return state, new_tokens


@partial(jax.jit, static_argnames=("model", "samples", "limit"))
def sample_groups(
    model: Decoder, weights: Weights, prompts: Prompts, *, samples: int, limit: int
) -> tuple[jax.Array, jax.Array]:
    """Samples several completions of every prompt in one call.

    A prompt is processed once: the samples of its group start from copies of its cache. The call
    ends early if every sample has ended.

    Args:
      model: the decoder.
      weights: from `view_weights`.
      prompts: ``[prompts]`` of the arrays, except for ``sampling``, which has ``[prompts *
        samples]``; its temperatures are above 0, and it has no repetition penalty.
      samples: completions of each prompt.
      limit: maximum number of tokens of a completion.

    Returns:
      int32 ``[prompts * samples, limit]``, samples of one prompt next to each other: tokens with
      the stop token, then `NO_TOKEN`; and float32 of the same shape: the log-probability of each
      token at its temperature, before top-k, top-p and min-p; 0 after the end.
    """
    last, cache = _at_once(model, weights, prompts)
    cache = grow(repeat(cache, samples), jnp.asarray(prompts.tokens).shape[1] + limit)
    logits = model.apply(
        weights.head, jnp.repeat(last, samples, axis=0), method="unembed"
    )
    done = ~jnp.repeat(jnp.asarray(prompts.live), samples)
    tokens = jnp.full((done.shape[0], limit), NO_TOKEN, jnp.int32)
    log_probs = jnp.zeros((done.shape[0], limit), jnp.float32)

    def body(carry: Any) -> Any:
        i, cache, logits, done, tokens, log_probs = carry
        token = next_tokens(logits, prompts.sampling, i)
        scaled = (
            logits.astype(jnp.float32)
            / jnp.asarray(prompts.sampling.temperature)[:, None]
        )
        picked = jnp.take_along_axis(scaled, token[:, None], axis=1)[:, 0]
        log_prob = picked - jax.nn.logsumexp(scaled, axis=1)
        at = (jnp.zeros_like(i), i)
        tokens = lax.dynamic_update_slice(
            tokens, jnp.where(done, NO_TOKEN, token)[:, None], at
        )
        log_probs = lax.dynamic_update_slice(
            log_probs, jnp.where(done, 0.0, log_prob)[:, None], at
        )
        done = done | _stops(token, prompts.stop_ids)
        hidden, cache = model.apply(weights.body, token[:, None], cache=cache)
        logits = model.apply(weights.head, hidden[:, 0], method="unembed")
        return i + 1, cache, logits, done, tokens, log_probs

    def unfinished(carry: Any) -> jax.Array:
        return (carry[0] < limit) & ~jnp.all(carry[3])

    start = (jnp.zeros((), jnp.int32), cache, logits, done, tokens, log_probs)
    *_, tokens, log_probs = lax.while_loop(unfinished, body, start)
    return tokens, log_probs


def _stops(token: jax.Array, stop_ids: Array) -> jax.Array:
    """Returns True for ``[batch]`` tokens that are stop ids."""
    return jnp.any(token[:, None] == stop_ids[None, :], axis=-1)


# ---------------------------------------------------------------- shapes of few sizes

# Place in a row without a token.
GAP = -1


def bucket(size: int, *, minimum: int = 1, multiple: int = 1) -> int:
    """Returns the smallest number of the form ``2^n`` or ``3 * 2^n`` that is at least ``size``.

    At most a third of the result is padding.

    Args:
      size: minimum result.
      minimum: smallest bucket.
      multiple: divisor of the result (the number of shards).

    Example:
      >>> [bucket(n) for n in (1, 5, 7, 40, 65, 100)]
      [1, 6, 8, 48, 96, 128]
    """
    size = max(size, minimum, 1)
    rounded = 1 << (size - 1).bit_length()  # the next power of two
    if rounded >= 4 and size <= rounded * 3 // 4:
        rounded = rounded * 3 // 4
    return -(-rounded // multiple) * multiple


def padded_length(size: int, *, minimum: int, chunk: int = 0) -> int:
    """Returns ``size`` rounded up to a `bucket`; with ``chunk``, to a multiple at most 1/8 larger.

    Example:
      >>> padded_length(40, minimum=16), padded_length(50_000, minimum=16, chunk=2048)
      (48, 51200)
    """
    if not chunk:
        return bucket(size, minimum=minimum)
    eighth = (1 << (size.bit_length() - 1)) // 8
    step = chunk * max(eighth // chunk, 1)
    return -(-size // step) * step


def padded_rows(
    ids: Sequence[Sequence[int]],
    batch: int,
    *,
    chunk: int = 0,
    uncut: int | None = None,
) -> dict[str, np.ndarray]:
    """Returns ``tokens``, padded on the right, and ``lengths`` of a batch; spare rows have one
    token.

    See `padded_length` for ``chunk``. Runs of the token ``uncut`` are not divided among chunks.
    """
    if chunk and uncut is not None:
        ids = [_with_uncut_runs(row, uncut, chunk) for row in ids]
    tokens = np.zeros(
        (batch, padded_length(max(map(len, ids)), minimum=16, chunk=chunk)), np.int32
    )
    for row, values in enumerate(ids):
        tokens[row, : len(values)] = values
    return {
        "tokens": tokens,
        "lengths": np.array([*map(len, ids), *[1] * (batch - len(ids))], np.int32),
    }


def _with_uncut_runs(ids: Sequence[int], token: int, chunk: int) -> list[int]:
    """Returns ``ids`` with gaps (`GAP`), so that no run of ``token`` crosses a multiple of
    ``chunk``.

    Raises:
      NaloraError: a run is longer than a chunk.

    Example:
      >>> _with_uncut_runs([5, 5, 7, 7, 7, 5], 7, 4)
      [5, 5, -1, -1, 7, 7, 7, 5]
    """
    row: list[int] = []
    for is_run, values in groupby(ids, key=lambda value: value == token):
        run = list(values)
        left = -len(row) % chunk
        if is_run and len(run) > chunk:
            expected = f"at least {len(run)}, the image tokens that see each other"
            raise NaloraError(
                "prefill_chunk",
                expected=expected,
                found=chunk,
                remedy="use larger chunks",
            )
        if is_run and len(run) > left:
            row += [GAP] * left
        row += run
    return row
