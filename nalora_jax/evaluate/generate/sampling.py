"""Next token from logits: greedy, or sampled with temperature, top-k, top-p and min-p.

All settings are array arguments of the compiled step, so a change does not compile (except for
turning the repetition penalty on), and each row of a batch can have its settings. The filters do
not sort the vocabulary: each keeps the tokens above a threshold. Bisection over the bit patterns of
floats finds the threshold exactly, in one pass over the row per bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# On the host, or within a program.
_Array = jax.Array | np.ndarray

# Bit patterns of non-negative floats have the order of the floats; this is the pattern of 1.0.
_ONE_BITS = 0x3F800000


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Sampling settings of each row of a batch."""

    temperature: _Array  # float32 [batch]; 0: greedy
    top_k: _Array  # int32 [batch]; number of kept tokens, 0: all
    top_p: _Array  # float32 [batch]; kept probability, 1: all
    min_p: (
        _Array  # float32 [batch]; minimum probability relative to the maximum, 0: all
    )
    seed: _Array  # uint32 [batch]
    # float32 [batch], penalty of tokens in the text; None: 1 for all rows
    repetition: _Array | None = None


def make_sampling(
    batch: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seeds: Sequence[int] = (0,),
) -> Sampling:
    """Returns the settings of a batch, equal for all rows except the seed.

    Args:
      batch: number of rows.
      temperature, top_k, top_p, min_p: as in `Sampling`.
      repetition_penalty: of tokens in the text; 1: none.
      seeds: of the first rows; the last seed is repeated.
    """
    words = np.array(
        [seed & 0xFFFFFFFF for seed in seeds], np.uint32
    )  # the low 32 bits
    rows = np.minimum(np.arange(batch), len(seeds) - 1)  # index of each row's seed
    repetition = None
    if repetition_penalty != 1:
        repetition = np.full((batch,), repetition_penalty, np.float32)
    return Sampling(
        temperature=np.full((batch,), temperature, np.float32),
        top_k=np.full((batch,), top_k, np.int32),
        top_p=np.full((batch,), top_p, np.float32),
        min_p=np.full((batch,), min_p, np.float32),
        seed=words[rows],
        repetition=repetition,
    )


def mark_seen_tokens(
    sampling: Sampling,
    tokens: _Array,
    lengths: _Array,
    vocab: int,
) -> jax.Array | None:
    """Marks the tokens of the vocabulary that occur in each prompt.

    Args:
      sampling: settings of each row.
      tokens: int32 ``[batch, seq]``, padded on the right; negative for gaps.
      lengths: int32 ``[batch]``, gaps included.
      vocab: size of the vocabulary.

    Returns:
      bool ``[batch, vocab]``, True for tokens of the prompt; None without a repetition penalty.
    """
    if sampling.repetition is None:
        return None
    batch, seq = tokens.shape
    # Padding gets an id outside of the vocabulary, which the update drops.
    within = jnp.arange(seq)[None] < lengths[:, None]
    ids = jnp.where(within & (tokens >= 0), tokens, vocab)
    rows = jnp.arange(batch)[:, None]
    none = jnp.zeros((batch, vocab), bool)
    return none.at[rows, ids].set(True, mode="drop")


def mark_token(seen: jax.Array | None, token: jax.Array) -> jax.Array | None:
    """Returns ``seen`` (`mark_seen_tokens`) with the newest token ``[batch]`` of each row."""
    if seen is None:
        return None
    return seen.at[jnp.arange(token.shape[0]), token].set(True)


def next_tokens(
    logits: jax.Array,
    sampling: Sampling,
    step: jax.Array,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Returns one token for each row.

    A row's sample depends on its logits, its seed and ``step``, not on its position in the batch.

    Args:
      logits: float32 ``[batch, vocab]``.
      sampling: settings of each row.
      step: int scalar, number of tokens sampled before.
      seen: bool ``[batch, vocab]``, tokens of the text so far (`mark_seen_tokens`).

    Returns:
      int32 ``[batch]``.
    """
    if seen is not None:
        # Keskar et al., arXiv 1909.05858, as in transformers: seen tokens become less likely.
        penalty = jnp.asarray(sampling.repetition)[:, None]
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(seen, penalised, logits)
    greedy = likeliest(logits)
    drawn = lax.cond(
        jnp.any(sampling.temperature > 0),  # a greedy batch skips the costs of sampling
        lambda: _draw(logits, sampling, step),
        lambda: greedy,
    )
    return jnp.where(sampling.temperature > 0, drawn, greedy)


def _draw(
    logits: jax.Array,
    sampling: Sampling,
    step: jax.Array,
) -> jax.Array:
    """Returns one sampled token of each row, int32 ``[batch]``.

    By the Gumbel-max trick, the largest of the logits plus Gumbel noise is a sample of their
    softmax. Rows with temperature 0 get a token that the caller does not use.
    """
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    scaled = logits / temperature[:, None]
    allowed = kept_tokens(scaled, sampling.top_k, sampling.top_p, sampling.min_p)

    def gumbel(seed: jax.Array) -> jax.Array:
        """Returns the noise ``[vocab]`` of a row and step."""
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    noise = jax.vmap(gumbel)(jnp.asarray(sampling.seed))
    noisy = jnp.where(allowed, scaled, -jnp.inf) + noise
    return likeliest(noisy)


def likeliest(logits: jax.Array) -> jax.Array:
    """Returns the index of the largest value of each row, the first one of ties: int32 ``[batch]``.

    It uses two plain reductions: `jnp.argmax` reduces pairs, which XLA:CPU does not vectorise (five
    times slower).
    """
    vocab = logits.shape[-1]
    indices = jnp.arange(vocab, dtype=jnp.int32)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # The index of every token with the largest value; ``vocab`` for the others.
    candidates = jnp.where(logits == largest, indices[None], vocab)
    # within the vocabulary even if all are NaN
    return jnp.minimum(jnp.min(candidates, axis=-1), vocab - 1)


def kept_tokens(
    logits: _Array,
    top_k: _Array,
    top_p: _Array,
    min_p: _Array,
) -> jax.Array:
    """Returns True for tokens to sample from.

    They are the smallest set of the ``top_k`` most likely tokens with probability ``top_p``,
    without tokens below ``min_p``. Ties at a threshold are all kept.

    Args:
      logits: float32 ``[batch, vocab]``, after temperature.
      top_k: int ``[batch]``; 0 keeps all.
      top_p: float ``[batch]``; 1 keeps all.
      min_p: float ``[batch]``, minimum probability relative to the maximum (arXiv 2407.01082); 0
        keeps all.

    Returns:
      bool ``[batch, vocab]``, true for at least the most likely token.
    """
    # Probabilities relative to the maximum, in [0, 1].
    p = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))

    def first_k() -> jax.Array:
        """Returns True for the ``top_k`` most likely tokens: each has the weight 1."""
        limit = jnp.where(top_k > 0, top_k, p.shape[-1]).astype(jnp.float32)
        return p >= _threshold(p, jnp.ones_like(p), limit)

    def nucleus(within: jax.Array) -> jax.Array:
        """Returns True for the most likely tokens of ``within`` with the share ``top_p`` of it."""
        mass = jnp.where(within, p, 0.0)
        # An infinite limit keeps all; the sum as limit could drop the last token by rounding.
        total = jnp.sum(mass, axis=-1)
        limit = jnp.where(top_p < 1, top_p * total, jnp.inf)
        return within & (p >= _threshold(p, mass, limit))

    within = lax.cond(jnp.any(top_k > 0), first_k, lambda: jnp.ones_like(p, bool))
    within = lax.cond(jnp.any(top_p < 1), nucleus, lambda inside: inside, within)
    return within & (p >= jnp.asarray(min_p)[:, None])


def _threshold(
    p: jax.Array,
    weights: jax.Array,
    limit: jax.Array,
) -> jax.Array:
    """Returns the smallest t for which the weights of ``p > t`` sum to less than ``limit``.

    It bisects the bit patterns of t between 0.0 and 1.0, one bit per pass.

    Args:
      p: float32 ``[batch, vocab]`` in [0, 1].
      weights: float32 ``[batch, vocab]``.
      limit: float32 ``[batch]``.

    Returns:
      float32 ``[batch, 1]``.
    """
    bits = lax.bitcast_convert_type(p, jnp.int32)

    def halve(
        _: jax.Array, ends: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Halves the range of bit patterns, int32 ``[batch]`` each, that contains the result."""
        low, high = ends
        middle = (low + high) // 2
        is_above = bits > middle[:, None]
        above = jnp.sum(jnp.where(is_above, weights, 0.0), axis=-1)
        is_enough = above < limit  # the result is at most the middle
        low = jnp.where(is_enough, low, middle + 1)
        high = jnp.where(is_enough, middle, high)
        return low, high

    zero = jnp.zeros(p.shape[:1], jnp.int32)
    ends = (zero, zero + _ONE_BITS)
    low, _ = lax.fori_loop(0, _ONE_BITS.bit_length(), halve, ends)
    return lax.bitcast_convert_type(low, jnp.float32)[:, None]
