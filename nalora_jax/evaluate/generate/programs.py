"""The compiled programs of generation: prefill and decoding of several tokens, or whole groups.

They take weights, adapters, settings and the number of steps as arguments, so that a change of
these does not compile another program. Programs are specialised to shapes only, and `bucket` keeps
their number small.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.sampling import (
    Sampling,
    _Array,
    mark_seen_tokens,
    mark_token,
    next_tokens,
)
from nalora_jax.mesh.processes import fetch
from nalora_jax.models.cache import Cache, default_positions, grow, repeat
from nalora_jax.models.decoder import Decoder, init_cache
from nalora_jax.models.parts import ImageFeatures
from nalora_jax.models.replay import ROUTING, recorded_routing
from nalora_jax.models.ropes import image_coordinates
from nalora_jax.ops.storage import prepare

if TYPE_CHECKING:
    from nalora_jax.data.images.image_chat import AnyProcessor

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
        _Array  # int32 [batch, seq], padded on the right; in chunks, negative in gaps
    )
    lengths: _Array  # int32 [batch], at least 1, gaps included
    live: _Array  # bool [batch]; false for padding rows
    stop_ids: _Array  # int32 [stops]
    sampling: Sampling
    # of images, from `encode_images`: [batch, places, d_model], or `ImageFeatures`
    features: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """State of generation between two calls."""

    cache: Cache
    token: jax.Array  # int32 [batch], the newest, not yet in the cache
    done: jax.Array  # bool [batch]
    step: jax.Array  # int32 [], tokens generated so far
    # bool [batch, vocab], tokens of the text, with a repetition penalty
    seen: jax.Array | None = None


def view_weights(model: Decoder, variables: Mapping[str, Any]) -> Weights:
    """Returns a model's variables in the programs' layout.

    ``variables`` are ``{"params": ...}``, and ``"lora"`` if there are adapters.
    """
    head = {"params": _of_head(variables["params"])}
    adapters = _of_head(variables.get("lora", {}))
    if adapters:
        head["lora"] = adapters
    return Weights(prepare(variables, model.numerics), head)


def _of_head(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters or adapters of the embedding and the output head."""
    return {name: leaf for name, leaf in tree.items() if name in _HEAD}


@partial(jax.jit, static_argnames=("model", "processor"))
def encode_images(
    model: Decoder,
    processor: AnyProcessor,
    weights: Weights,
    images: Mapping[str, _Array],
) -> Any:
    """Returns the features of image tokens, ``[batch, places, d_model]``.

    ``images`` are the processor's arrays of prompts; the places are those of all images of a prompt
    in order.
    """
    inputs = processor.inputs(images)
    return model.apply(weights.body, *inputs, method="encode_images")


@partial(jax.jit, static_argnames=("model", "slots", "chunk"))
def prefill(
    model: Decoder,
    weights: Weights,
    prompts: Prompts,
    step: _Array | np.int32 = np.int32(0),  # noqa: B008
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

    Returns:
      The state with each prompt's next token.
    """
    if chunk:
        last, cache = _in_chunks(model, weights, prompts, slots, chunk)
    else:
        (last, cache), _ = _at_once(model, weights, prompts)
    step = jnp.asarray(step)
    logits = model.apply(weights.head, last, method="unembed")
    vocab = logits.shape[-1]
    seen = mark_seen_tokens(prompts.sampling, prompts.tokens, prompts.lengths, vocab)
    token = next_tokens(logits, prompts.sampling, step, seen)
    done = _is_stop(token, prompts.stop_ids) | ~prompts.live
    return State(
        cache=grow(cache, slots),
        token=token,
        done=done,
        step=step + 1,
        seen=mark_token(seen, token),
    )


def _at_once(
    model: Decoder,
    weights: Weights,
    prompts: Prompts,
    *,
    records: bool = False,
) -> tuple[tuple[jax.Array, Cache], jax.Array | None]:
    """Processes all tokens of the prompts in one call.

    Returns:
      The hidden states of the prompts' last tokens, ``[batch, d_model]``, with the cache; and the
      experts of every token, see `_apply`.
    """
    batch = prompts.tokens.shape[0]
    (hidden, cache), experts = _apply(
        model,
        weights,
        prompts.tokens,
        records=records,
        segment_ids=_segments(prompts),
        cache=init_cache(model.config, batch, 0, model.numerics),
        features=prompts.features,
    )
    last = prompts.lengths - 1
    return (_take_rows(hidden, last), cache), experts


def _apply(
    model: Decoder,
    weights: Weights,
    tokens: _Array,
    *,
    records: bool,
    **options: Any,
) -> tuple[tuple[jax.Array, Cache], jax.Array | None]:
    """Returns the hidden states and the cache of a call with a cache, and with ``records`` the
    experts of every token (`recorded_routing`)."""
    if not records:
        return model.apply(weights.body, tokens, **options), None
    outputs, written = model.apply(weights.body, tokens, mutable=[ROUTING], **options)
    return outputs, recorded_routing(model.config, written[ROUTING])


def _take_rows(hidden: jax.Array, places: _Array) -> jax.Array:
    """Returns the hidden state of one place of each row, ``[batch, d_model]``.

    ``hidden`` is ``[batch, seq, d_model]`` and ``places`` int ``[batch]``.
    """
    # [batch, 1, d_model] -> [batch, d_model]
    return jnp.take_along_axis(hidden, places[:, None, None], axis=1)[:, 0]


def _in_chunks(
    model: Decoder,
    weights: Weights,
    prompts: Prompts,
    slots: int,
    chunk: int,
) -> tuple[jax.Array, Cache]:
    """Returns the result of `_at_once`, computed for a part of every prompt at a time.

    Args:
      model, weights, prompts, slots, chunk: as for `prefill`.
    """
    tokens = jnp.asarray(prompts.tokens)
    lengths = jnp.asarray(prompts.lengths)
    segments = _segments(prompts)
    of_chunk = partial(lax.dynamic_slice_in_dim, slice_size=chunk, axis=1)
    coordinates = None  # [3, batch, seq]
    if isinstance(prompts.features, ImageFeatures) and model.config.has_axes:
        assert model.config.vision is not None
        places = tokens == model.config.vision.image_token
        positions = default_positions(segments)
        grids = prompts.features.grids
        coordinates = image_coordinates(places, positions, segments, grids)

    def step(i: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        """Processes chunk ``i``: extends the cache, and ``last`` for prompts that end in it."""
        last, cache = carry  # hidden states [batch, d_model] of prompts that have ended
        start = i * chunk
        hidden, cache = model.apply(
            weights.body,
            of_chunk(jnp.maximum(tokens, 0), start),
            segment_ids=of_chunk(segments, start),
            cache=cache,
            features=_features_from(model, prompts, start, chunk),
            lengths=jnp.sum(segments, axis=1),
            coordinates=None
            if coordinates is None
            else lax.dynamic_slice_in_dim(coordinates, start, chunk, axis=2),
        )
        end = (
            lengths - 1 - start
        )  # place of each prompt's last token, from the chunk's start
        at_end = _take_rows(hidden, jnp.clip(end, 0, chunk - 1))
        ends_here = (end >= 0) & (end < chunk)
        return jnp.where(ends_here[:, None], at_end, last), cache

    cache = init_cache(model.config, tokens.shape[0], slots, model.numerics)
    last = jnp.zeros((tokens.shape[0], model.config.d_model), model.numerics.result)
    filled = (jnp.max(lengths) + chunk - 1) // chunk  # chunks with tokens, rounded up
    chunked: tuple[jax.Array, Cache] = lax.fori_loop(0, filled, step, (last, cache))
    return chunked


def _segments(prompts: Prompts) -> jax.Array:
    """Returns 1 for the prompts' tokens, and 0 for padding and gaps: int ``[batch, seq]``."""
    tokens = jnp.asarray(prompts.tokens)
    lengths = jnp.asarray(prompts.lengths)
    within = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    return (within & (tokens >= 0)).astype(jnp.int32)


def _features_from(
    model: Decoder,
    prompts: Prompts,
    start: jax.Array,
    chunk: int,
) -> Any:
    """Returns the features of the image tokens of a chunk: of each row, those from ``start`` on.

    Args:
      model: the decoder.
      prompts: with the features of all their image tokens.
      start: first token of the chunk.
      chunk: number of tokens.

    Returns:
      ``[batch, places, d_model]`` with at most ``chunk`` places; None without images.
    """
    if prompts.features is None:
        return None
    vision = model.config.vision
    of_images = prompts.features
    if isinstance(of_images, ImageFeatures):
        features = of_images.embeddings
    else:
        features = jnp.asarray(of_images)
    assert vision is not None
    tokens = jnp.asarray(prompts.tokens)
    is_earlier = jnp.arange(tokens.shape[1])[None] < start
    earlier = (tokens == vision.image_token) & is_earlier
    first = jnp.sum(earlier, axis=1)  # index of each row's first feature, [batch]
    places = jnp.arange(min(chunk, features.shape[1]))
    index = first[:, None] + places[None]  # [batch, places]

    def of_chunk(rows: jax.Array) -> jax.Array:
        """Returns the chunk's part of features ``[batch, places, d_model]``."""
        return jnp.take_along_axis(rows, index[..., None], axis=1, mode="fill")

    if not isinstance(of_images, ImageFeatures):
        return of_chunk(features)
    deepstack = of_images.deepstack
    if deepstack is not None:
        deepstack = jnp.stack([of_chunk(rows) for rows in deepstack])
    return ImageFeatures(of_chunk(features), of_images.grids, deepstack)


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
        """Puts the newest token into the cache, generates the next one, and writes column ``i``."""
        i, state, new_tokens = carry
        hidden, cache = model.apply(
            weights.body, state.token[:, None], cache=state.cache
        )
        # [batch, 1, d_model] -> [batch, vocab]
        logits = model.apply(weights.head, hidden[:, 0], method="unembed")
        token = next_tokens(logits, prompts.sampling, state.step, state.seen)
        column = jnp.where(state.done, NO_TOKEN, token)[:, None]
        at = (jnp.zeros_like(i), i)
        new_tokens = lax.dynamic_update_slice(new_tokens, column, at)
        state = State(
            cache=cache,
            token=token,
            done=state.done | _is_stop(token, prompts.stop_ids),
            step=state.step + 1,
            seen=mark_token(state.seen, token),
        )
        return i + 1, state, new_tokens

    def unfinished(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.done)

    new_tokens = jnp.full((state.token.shape[0], size), NO_TOKEN, jnp.int32)
    state = replace(state, done=state.done | finished)
    start = (jnp.zeros((), jnp.int32), state, new_tokens)
    _, state, new_tokens = lax.while_loop(unfinished, body, start)
    return state, new_tokens


class SampledGroups(NamedTuple):
    """The completions of `sample_groups`, samples of one prompt next to each other."""

    # int32 [prompts * samples, limit], with the stop token; `NO_TOKEN` after it
    tokens: jax.Array
    # float32, same shape: of each token at its temperature, before top-k, top-p and min-p; 0 after
    # the end
    log_probs: jax.Array
    # If routing is recorded, the experts of every token (`recorded_routing`): of the prompts,
    # [prompts, seq, mixtures, top_k], and of the completions, [prompts * samples, limit, mixtures,
    # top_k], -1 after the end.
    of_prompts: jax.Array | None = None
    of_samples: jax.Array | None = None

    def fetched(self) -> SampledGroups:
        """Returns the same arrays on the host."""
        return jax.tree.map(fetch, self)

    def routing(self, row: int, prompt: int, written: int) -> np.ndarray | None:
        """Returns the experts of the tokens of a completion and its prompt, ``[prompt + written,
        mixtures, top_k]``; None if they are not recorded.

        Args:
          row: of the completion.
          prompt: number of the prompt's tokens.
          written: number of the completion's tokens.
        """
        if self.of_prompts is None or self.of_samples is None:
            return None
        samples = self.of_samples.shape[0] // self.of_prompts.shape[0]
        before = self.of_prompts[row // samples, :prompt]
        return np.concatenate([before, self.of_samples[row, :written]])


@partial(jax.jit, static_argnames=("model", "samples", "limit", "records"))
def sample_groups(
    model: Decoder,
    weights: Weights,
    prompts: Prompts,
    *,
    samples: int,
    limit: int,
    records: bool = False,
) -> SampledGroups:
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
      records: record the experts of every token.
    """
    (last, cache), of_prompts = _at_once(model, weights, prompts, records=records)
    slots = prompts.tokens.shape[1] + limit
    cache = grow(repeat(cache, samples), slots)
    last = jnp.repeat(last, samples, axis=0)
    logits = model.apply(weights.head, last, method="unembed")
    temperature = jnp.asarray(prompts.sampling.temperature)
    done = ~jnp.repeat(jnp.asarray(prompts.live), samples)
    tokens = jnp.full((done.shape[0], limit), NO_TOKEN, jnp.int32)
    log_probs = jnp.zeros((done.shape[0], limit), jnp.float32)
    of_samples = None
    if of_prompts is not None:
        shape = (done.shape[0], limit, *of_prompts.shape[2:])
        of_samples = jnp.full(shape, -1, of_prompts.dtype)

    def body(carry: Any) -> Any:
        """Samples token ``i`` of every completion, and computes the logits of the next one."""
        i, cache, logits, done, tokens, log_probs, of_samples = carry
        token = next_tokens(logits, prompts.sampling, i)
        scaled = logits.astype(jnp.float32) / temperature[:, None]  # [samples, vocab]
        picked = jnp.take_along_axis(scaled, token[:, None], axis=1)[:, 0]
        log_prob = picked - jax.nn.logsumexp(scaled, axis=1)
        at = (jnp.zeros_like(i), i)
        new_tokens = jnp.where(done, NO_TOKEN, token)[:, None]
        tokens = lax.dynamic_update_slice(tokens, new_tokens, at)
        new_log_probs = jnp.where(done, 0.0, log_prob)[:, None]
        log_probs = lax.dynamic_update_slice(log_probs, new_log_probs, at)
        (hidden, cache), experts = _apply(
            model, weights, token[:, None], records=records, cache=cache
        )
        if experts is not None:
            experts = jnp.where(done[:, None, None, None], -1, experts)
            of_samples = lax.dynamic_update_slice_in_dim(of_samples, experts, i, axis=1)
        done = done | _is_stop(token, prompts.stop_ids)
        logits = model.apply(weights.head, hidden[:, 0], method="unembed")
        return i + 1, cache, logits, done, tokens, log_probs, of_samples

    def unfinished(carry: Any) -> jax.Array:
        i, _, _, done, *_ = carry
        return (i < limit) & ~jnp.all(done)

    first = jnp.zeros((), jnp.int32)
    start = (first, cache, logits, done, tokens, log_probs, of_samples)
    *_, tokens, log_probs, of_samples = lax.while_loop(unfinished, body, start)
    return SampledGroups(tokens, log_probs, of_prompts, of_samples)


def _is_stop(token: jax.Array, stop_ids: _Array) -> jax.Array:
    """Returns True for ``[batch]`` tokens that are stop ids."""
    return jnp.any(token[:, None] == stop_ids[None, :], axis=-1)


# ---------------------------------------------------------------- shapes of few sizes

# Place in a row without a token.
GAP = -1


def bucket(
    size: int,
    *,
    minimum: int = 1,
    multiple: int = 1,
) -> int:
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
    smaller = rounded * 3 // 4  # the number 3 * 2^n below it
    if rounded >= 4 and size <= smaller:
        rounded = smaller
    return -(-rounded // multiple) * multiple  # rounded up to a multiple


def padded_length(
    size: int,
    *,
    minimum: int,
    chunk: int = 0,
) -> int:
    """Returns the padded length of rows of up to ``size`` tokens, at least ``minimum``.

    It is a `bucket`, or with ``chunk`` a multiple of ``chunk``, with few distinct results: a row
    of at least 8 chunks gets at most 1/8 of padding.

    Example:
      >>> padded_length(40, minimum=16), padded_length(50_000, minimum=16, chunk=2048)
      (48, 51200)
    """
    if not chunk:
        return bucket(size, minimum=minimum)
    eighth = (
        1 << (size.bit_length() - 1)
    ) // 8  # of the largest power of two up to size
    step = chunk * max(eighth // chunk, 1)
    return -(-size // step) * step


def padded_rows(
    ids: Sequence[Sequence[int]],
    batch: int,
    *,
    chunk: int = 0,
    uncut: int | None = None,
) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch of prompts.

    Args:
      ids: token ids of each prompt.
      batch: number of rows, at least the number of prompts.
      chunk: as for `padded_length`.
      uncut: a token whose runs are not divided among chunks, by gaps (`GAP`) before them.

    Returns:
      ``tokens``, int32 ``[batch, seq]``, padded on the right, and ``lengths``, int32 ``[batch]``,
      with gaps. Spare rows have one token.
    """
    if chunk and uncut is not None:
        ids = [_with_uncut_runs(row, uncut, chunk) for row in ids]
    longest = max(map(len, ids))
    seq = padded_length(longest, minimum=16, chunk=chunk)
    tokens = np.zeros((batch, seq), np.int32)
    lengths = np.ones(batch, np.int32)
    for row, values in enumerate(ids):
        lengths[row] = len(values)
        tokens[row, : len(values)] = values
    return {"tokens": tokens, "lengths": lengths}


def _with_uncut_runs(
    ids: Sequence[int],
    token: int,
    chunk: int,
) -> list[int]:
    """Returns ``ids`` with gaps (`GAP`) before some of the runs of ``token``.

    No run then crosses a multiple of ``chunk``.

    Raises:
      NaloraError: a run is longer than a chunk.

    Example:
      >>> _with_uncut_runs([5, 5, 7, 7, 7, 5], 7, 4)
      [5, 5, -1, -1, 7, 7, 7, 5]
    """
    row: list[int] = []
    for is_run, values in itertools.groupby(ids, key=lambda value: value == token):
        run = list(values)
        left = -len(row) % chunk  # places up to the chunk's end
        if is_run and len(run) > chunk:
            raise NaloraError(
                "prefill_chunk",
                expected=f"at least {len(run)}, the image tokens that see each other",
                found=chunk,
                remedy="use larger chunks",
            )
        if is_run and len(run) > left:
            row += itertools.repeat(GAP, left)
        row += run
    return row
