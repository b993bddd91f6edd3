"""Log-likelihoods of continuations, for multiple choice, perplexity and the harness.

Shared contexts are computed once for all continuations. A group is a list of (context,
continuation) pairs whose texts share a prefix: the choices of a question. Its *stem* is the shared
prefix, computed once. Its *tails* are the remaining tokens of each text; a tail attends to the
stem, but not to other tails. Stems of several groups are packed into one row, and their tails into
rows called lanes, as many as the largest number of tails of a group:

    stem row      s s s s s t t t t u u u .          three groups s, t, u; "." is padding
    lane 0        s s t u u .                        first tails
    lane 1        s s s t u .                        second tails

The last shared token is part of the tails, so that every scored token is predicted at a position of
a tail.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from nalora_jax.common.notes import count_progress
from nalora_jax.errors import NaloraError
from nalora_jax.mesh.distributed import (
    context_size,
    place_batch,
    prompt_shards,
    row_sharding,
)
from nalora_jax.mesh.processes import fetch
from nalora_jax.models.cache import grow, repeat
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder, init_cache
from nalora_jax.models.ropes import sharing_length
from nalora_jax.models.stacks import stacks
from nalora_jax.ops.shardings import Shardings
from nalora_jax.ops.split_rows import join_parts
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
    groups: Sequence[Sequence[ScoredPair]],
    *,
    fitting: Sequence[Sequence[ScoredPair]] = (),
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
      fitting: groups that fit into the shapes of the batches, ``groups`` among them; by default
        ``groups``. Calls with the same ``fitting`` share one program.
      batch_tokens: approximate number of shared tokens per batch.
      mesh: mesh of the weights, if they are sharded; the batch is split over its data axes.

    Returns:
      Scores in the order of ``groups``.

    Raises:
      NaloraError: a group, a context or a continuation is empty, or a text is longer than the
        model's context.
    """
    if not groups:
        return []
    switch = _longest_sharing(model.config)
    context = model.config.max_positions
    splits = [split_group(index, pairs, switch) for index, pairs in enumerate(groups)]
    for split in splits:
        if split.length > context:
            raise NaloraError(
                f"evaluation item {split.index}",
                expected=f"at most {context} tokens before the last (the model's context)",
                found=split.length,
                remedy="drop or shorten long items",
            )
    sized = splits
    if fitting:
        sized = [split_group(index, of, switch) for index, of in enumerate(fitting)]
    layout = choose_layout(sized, tokens=batch_tokens, shards=prompt_shards(mesh))
    variables = prepare(variables, model.numerics, tables=False)
    if not layout.stem:
        model = clone_for_rows(model, mesh, layout.tail)
    count = sum(map(len, groups))
    # Of each pair: log-probability, scored tokens, and those that are the most likely token.
    sums, tokens, hits = np.zeros((3, count))
    with count_progress("evaluating", count) as done:
        for batch in make_batches(splits, layout):
            scored = batch.owner >= 0  # [rows, lanes, tail]
            placed = place_batch((batch.stem, batch.tails, batch.targets, scored), mesh)
            log_probs, greedy = map(fetch, _stems_and_tails(model, variables, *placed))
            owners = batch.owner[scored]  # [scored tokens]
            scored_log_probs = log_probs[scored].astype(np.float64)
            sums += np.bincount(owners, scored_log_probs, minlength=count)
            tokens += np.bincount(owners, minlength=count)
            hits += np.bincount(owners, greedy[scored], minlength=count)
            done(len(np.unique(owners)))
    scores = map(
        Score,
        sums.tolist(),
        tokens.astype(int).tolist(),
        (hits == tokens).tolist(),
    )
    return [list(itertools.islice(scores, len(pairs))) for pairs in groups]


def _longest_sharing(config: ModelConfig) -> int | None:
    """Returns the length up to which texts can share a computed prefix, or None without a limit."""
    mixers = [stack.config.mixer for stack in stacks(config)]
    if any(mixer is not None and not mixer.has_slots for mixer in mixers):
        return 0  # a packed row of prefixes has one state, after its last prefix
    return sharing_length(config.ropes)


@partial(jax.jit, static_argnames=("model",))
def _stems_and_tails(
    model: Decoder,
    variables: Any,
    stem: dict[str, jax.Array],
    tails: dict[str, jax.Array],
    targets: jax.Array,
    scored: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes the stems once and the tails after them.

    Args:
      model: the decoder.
      variables: its variables.
      stem: ``tokens``, ``positions`` and ``segments``, int32 ``[rows, stem]``.
      tails: the same, ``[rows, lanes, tail]``.
      targets: int32 ``[rows, lanes, tail]``.
      scored: bool ``[rows, lanes, tail]``.

    Returns:
      The result of `target_log_probs`, ``[rows, lanes, tail]``.
    """
    lanes, tail = targets.shape[1:]
    # All tails as rows: [rows, lanes, tail] -> [rows * lanes, tail]
    call = partial(
        model.apply,
        variables,
        tails["tokens"].reshape(-1, tail),
        positions=tails["positions"].reshape(-1, tail),
        segment_ids=tails["segments"].reshape(-1, tail),
    )
    rows, size = stem["tokens"].shape
    if size == 0:
        hidden = join_parts(call(), model.shardings.rows, tail)
    else:
        # Keys and values of the stems for every lane, with room for the tails.
        _, cache = model.apply(
            variables,
            stem["tokens"],
            positions=stem["positions"],
            segment_ids=stem["segments"],
            cache=init_cache(model.config, rows, 0, model.numerics),
        )
        cache = grow(cache, max(size, tail))
        hidden, _ = call(cache=repeat(cache, lanes))
    # [rows * lanes, tail, d_model] -> [rows, lanes, tail, d_model]
    hidden = hidden.reshape(*targets.shape, -1)
    return target_log_probs(model, variables, hidden, targets, scored)


def target_log_probs(
    model: Decoder,
    variables: Any,
    hidden: jax.Array,
    targets: jax.Array,
    scored: jax.Array,
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
    shape = targets.shape
    n = targets.size
    # rows of one chunk of logits [rows, vocab], at least 16 for a large vocabulary
    rows = min(n, max(16, _CHUNK_FLOATS // model.config.vocab_size))
    flat = hidden.reshape(n, -1)  # [..., d_model] -> [n, d_model]
    targets = targets.reshape(n)
    scored = scored.reshape(n)
    # Scored positions first, so that only the chunks with scored positions are computed.
    order = jnp.argsort(~scored, stable=True)
    # Padded to whole chunks by the index n, which reads are clipped to and writes drop.
    order = jnp.pad(order, (0, -n % rows), constant_values=n)
    chunks = (jnp.sum(scored) + rows - 1) // rows

    def body(
        i: jax.Array, results: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Adds chunk ``i`` to the results, both ``[n]``."""
        index = lax.dynamic_slice(order, (i * rows,), (rows,))
        chunk_hidden = jnp.take(flat, index, axis=0, mode="clip")
        logits = model.apply(variables, chunk_hidden, method="unembed")  # [rows, vocab]
        chunk_targets = jnp.take(targets, index, mode="clip")
        # the target's logit, [rows]
        picked = jnp.take_along_axis(logits, chunk_targets[:, None], axis=-1)[:, 0]
        top = jnp.max(logits, axis=-1)
        total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
        log_prob = picked - top - jnp.log(total)
        log_probs, greedy = results
        log_probs = log_probs.at[index].set(log_prob, mode="drop")
        greedy = greedy.at[index].set(picked >= top, mode="drop")
        return log_probs, greedy

    start = jnp.zeros((n,), jnp.float32), jnp.zeros((n,), bool)
    log_probs, greedy = lax.fori_loop(0, chunks, body, start)
    log_probs = jnp.where(scored, log_probs, 0.0)
    greedy = scored & greedy
    return log_probs.reshape(shape), greedy.reshape(shape)


# ---------------------------------------------------------------- packing

ScoredPair = tuple[
    Sequence[int], Sequence[int]
]  # context and continuation, as token ids

# Number of open rows that are tried for a group.
_OPEN_ROWS = 64


@dataclass(frozen=True)
class Split:
    """A group, split into stem and tails."""

    index: int  # of the group
    stem: list[int]
    tails: list[list[int]]  # inputs of the model
    targets: list[list[int]]  # the next token of each input
    scored: list[int]  # number of continuation tokens at the end of each tail's targets

    @property
    def length(self) -> int:
        """Returns the number of inputs of the group's longest text."""
        return len(self.stem) + max(map(len, self.tails))


@dataclass(frozen=True)
class ScoringLayout:
    """The shapes of every batch of a plan, so that one program scores all of them."""

    rows: int  # stem rows in a batch
    stem: int  # tokens in a stem row
    lanes: int  # tail rows for each stem row
    tail: int  # tokens in a tail row


class ScoringBatch(NamedTuple):
    """Arrays of one call. Integer segments separate groups, 0 is padding."""

    stem: dict[str, np.ndarray]  # tokens, positions, segments: int32 [rows, stem]
    # tokens, positions, segments: int32 [rows, lanes, tail]
    tails: dict[str, np.ndarray]
    targets: np.ndarray  # int32 [rows, lanes, tail]
    # int32 [rows, lanes, tail]: number of a scored target's pair in all groups, -1 elsewhere
    owner: np.ndarray


class ScoringRow:
    """A stem row with its lanes, without the axis ``[rows]``."""

    def __init__(self, layout: ScoringLayout) -> None:
        """Makes the arrays of an empty row, in which every place is padding."""
        shape = (layout.lanes, layout.tail)
        targets = np.zeros(shape, np.int32)
        owner = np.full(shape, -1, np.int32)
        self.arrays = ScoringBatch(_empty(layout.stem), _empty(*shape), targets, owner)
        self._groups = 0  # number of added groups
        self._filled = 0  # tokens of the stem
        self._used = np.zeros(layout.lanes, int)  # tokens by lane

    def add(self, group: Split, number: int) -> bool:
        """Adds ``group`` if it fits, its longer tails to the emptier lanes; returns True if so.

        ``number`` is the number of the group's first pair among the pairs of all groups.
        """
        stem, tails, targets, owner = self.arrays
        sizes = np.array([len(tail) for tail in group.tails])
        # Tails from the longest to the shortest, the lane of each, and where it ends there.
        longest = np.argsort(-sizes, kind="stable")
        lanes = np.argsort(self._used, kind="stable")[: len(sizes)]
        ends = self._used[lanes] + sizes[longest]
        filled = self._filled + len(group.stem)
        if filled > stem["tokens"].shape[0] or ends.max() > targets.shape[1]:
            return False
        self._groups += 1
        _write(stem, (slice(self._filled, filled),), group.stem, 0, self._groups)
        self._filled = filled
        columns = zip(longest.tolist(), lanes.tolist(), ends.tolist(), strict=True)
        for i, lane, end in columns:
            tail = slice(self._used[lane], end)
            _write(tails, (lane, tail), group.tails[i], len(group.stem), self._groups)
            targets[lane, tail] = group.targets[i]
            # Only the targets at the end are of the continuation.
            owner[lane, end - group.scored[i] : end] = number + i
            self._used[lane] = end
        return True


def split_group(
    index: int,
    pairs: Sequence[ScoredPair],
    switch: int | None = None,
) -> Split:
    """Returns the stem and the tails of one group.

    Example (context [5, 6, 7], continuations [8] and [9, 8]):
      stem [5, 6], tails [7] and [7, 9], targets [8] and [9, 8]

    Args:
      index: number of the group.
      pairs: contexts and continuations.
      switch: length beyond which a text cannot share a prefix: a group with a longer text has no
        stem, nor has a single text.

    Raises:
      NaloraError: there is no pair, or a context or a continuation is empty.
    """
    sizes = [min(map(len, pair)) for pair in pairs]
    if min(sizes, default=0) == 0:
        raise NaloraError(
            f"evaluation item {index}",
            expected="at least one token of context and one to score",
            found="none",
            remedy="put a begin- or end-of-text token in front of an empty context",
        )
    texts = [[*context, *continuation] for context, continuation in pairs]
    shortest = min(len(context) for context, _ in pairs)
    shared = _common_prefix([text[:shortest] for text in texts])
    # The last shared token stays in the tails; `shared` is 0 if the first tokens differ.
    cut = max(shared - 1, 0)
    longest = max(map(len, texts)) - 1
    is_too_long = switch is not None and longest > switch
    if len(texts) == 1 or is_too_long:
        cut = 0
    return Split(
        index,
        stem=texts[0][:cut],
        tails=[text[cut:-1] for text in texts],
        targets=[text[cut + 1 :] for text in texts],
        scored=[len(continuation) for _, continuation in pairs],
    )


def _common_prefix(texts: Sequence[list[int]]) -> int:
    """Returns the number of tokens that all texts share."""
    # All share the prefix that the first and the last in lexical order share.
    first = min(texts)
    last = max(texts)
    for place, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return place
    return min(len(first), len(last))


def choose_layout(
    splits: Sequence[Split],
    *,
    tokens: int,
    shards: int = 1,
) -> ScoringLayout:
    """Returns shapes that fit all groups with little padding.

    Args:
      splits: the groups.
      tokens: approximate number of stem tokens per batch.
      shards: divisor of the number of rows.
    """
    lanes = max(len(split.tails) for split in splits)
    stem_sizes = [len(split.stem) for split in splits]
    tail_sizes: list[int] = []
    for split in splits:
        tail_sizes += map(len, split.tails)
    stems = sum(stem_sizes)
    tails = sum(tail_sizes) / lanes
    # Longer rows have less padding, but their attention costs more: 256 and 512 are a compromise.
    # Both are exceeded if a single stem or tail is longer.
    stem = _round_up(max(*stem_sizes, min(256, stems)))  # 0 without shared prefixes
    # Tokens of a lane for the tails of a full stem row, with 5% to spare.
    tails_of_row = 1.05 * tails
    if stems:
        tails_of_row *= stem / stems
    tail = _round_up(max(*tail_sizes, min(tails_of_row, 512)))
    # Rows for all groups, of which a batch has as many as have ``tokens`` tokens. -(-a // b)
    # rounds a / b up.
    stem_rows = -(-stems // max(stem, 1))
    tail_rows = int(-(-tails // tail))
    needed = max(stem_rows, tail_rows)
    rows = min(max(1, tokens // max(stem, tail)), needed)
    rows = -(-rows // shards) * shards
    return ScoringLayout(rows, stem, lanes, tail)


def _round_up(size: float) -> int:
    """Returns a size rounded up to a multiple of 8, or of 32 above 128, for few distinct shapes."""
    step = 8
    if size > 128:
        step = 32
    return int(-(-size // step) * step)


def make_batches(
    splits: Sequence[Split], layout: ScoringLayout
) -> Iterator[ScoringBatch]:
    """Yields batches of all groups.

    The groups are placed from the longest to the shortest, each in the first open row with room.
    """
    rows: list[ScoringRow] = []
    open_rows: list[ScoringRow] = []  # the newest rows, which may have room
    numbered = []  # each group with the number of its first pair
    number = 0
    for split in splits:
        numbered.append((split, number))
        number += len(split.tails)
    numbered.sort(key=lambda pair: -pair[0].length)
    for split, number in numbered:
        if not any(row.add(split, number) for row in open_rows):
            rows.append(ScoringRow(layout))
            fits = rows[-1].add(split, number)
            assert fits, "the layout holds every group"
            open_rows = [*open_rows, rows[-1]][-_OPEN_ROWS:]
    while len(rows) % layout.rows:
        rows.append(ScoringRow(layout))
    for start in range(0, len(rows), layout.rows):
        arrays = (row.arrays for row in rows[start : start + layout.rows])
        # [...] of each row -> [rows, ...]
        yield jax.tree.map(lambda *of_rows: np.stack(of_rows), *arrays)


def _empty(*shape: int) -> dict[str, np.ndarray]:
    """Returns the model's inputs for padding alone, zeros of ``shape``."""
    return {
        "tokens": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
    }


def _write(
    arrays: dict[str, np.ndarray],
    at: tuple[int | slice, ...],
    tokens: list[int],
    first: int,
    segment: int,
) -> None:
    """Writes a text's tokens at the place ``at`` of the model's inputs.

    Args:
      arrays: from `_empty`.
      at: index of the place, as many elements as there are tokens.
      tokens: part of the text.
      first: position of the first of them in the text.
      segment: number of the group in its row, from 1.
    """
    arrays["tokens"][at] = tokens
    arrays["positions"][at] = np.arange(first, first + len(tokens))
    arrays["segments"][at] = segment


_LEAST_BLOCK = 128  # tokens; shorter rows are computed on every device


def clone_for_rows(
    model: Decoder,
    mesh: Mesh | None,
    seq: int,
) -> Decoder:
    """Returns ``model`` for rows of ``seq`` tokens without a cache.

    It splits long rows over the devices of the mesh's context axis, if its layers can.
    """
    devices = context_size(mesh)
    if devices == 1 or seq < 2 * devices * _LEAST_BLOCK:
        return model
    for stack in stacks(model.config):
        mixer = stack.config.mixer
        if mixer is not None and not mixer.splits_rows:
            return model
    rows = row_sharding(mesh)
    return model.clone(shardings=Shardings(rows, rows))
