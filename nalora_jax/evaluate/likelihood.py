"""Log-likelihoods of continuations, for multiple choice, perplexity and the harness.

Shared contexts are computed once for all continuations. A group is a list of (context, continuation)
pairs whose texts share a prefix: the choices of a question. Its *stem* is the shared prefix, computed
once. Its *tails* are the remaining tokens of each text; a tail attends to the stem, but not to other
tails. Stems of several groups are packed into one row, and their tails into rows called lanes, as
many as the largest number of tails of a group:

    stem row      s s s s s t t t t u u u .          three groups s, t, u; "." is padding
    lane 0        s s t u u .                        first tails
    lane 1        s s s t u .                        second tails

The last shared token is part of the tails, so that every scored token is predicted at a position of
a tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from nalora_jax.common.notes import counting
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.programs import place_batch, prompt_shards
from nalora_jax.layout.distributed import context_size, fetch, row_sharding
from nalora_jax.models.cache import Cache, grow, repeat
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder, init_cache
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
    fitting: Sequence[Sequence[Pair]] = (),
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
      fitting: groups that fit into the shapes of the batches, ``groups`` among them; by default ``groups``.
        Calls with the same ``fitting`` share one program.
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
    sized = [split_group(index, pairs, switch) for index, pairs in enumerate(fitting)] or splits
    layout = choose_layout(sized, tokens=batch_tokens, shards=prompt_shards(mesh))
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


# ---------------------------------------------------------------- packing

Pair = tuple[Sequence[int], Sequence[int]]  # context and continuation, as token ids

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


@dataclass
class ScoringRow:
    """A stem row, its lanes and the groups in them."""

    room: int  # of the stem row
    lane_room: list[int]
    groups: list[Split] = field(default_factory=list)
    lanes: list[list[int]] = field(default_factory=list)  # by group: the lane of each tail

    def add(self, group: Split) -> bool:
        """Adds ``group`` if it fits, assigning longer tails to emptier lanes."""
        order = sorted(range(len(group.tails)), key=lambda i: -len(group.tails[i]))
        emptiest = sorted(range(len(self.lane_room)), key=lambda i: -self.lane_room[i])
        chosen = dict(zip(order, emptiest, strict=False))
        if len(group.stem) > self.room or any(
            len(group.tails[i]) > self.lane_room[j] for i, j in chosen.items()
        ):
            return False
        self.room -= len(group.stem)
        for tail, lane in chosen.items():
            self.lane_room[lane] -= len(group.tails[tail])
        self.groups.append(group)
        self.lanes.append([chosen[i] for i in range(len(group.tails))])
        return True


@dataclass(frozen=True)
class ScoringLayout:
    """The shapes of every batch of a plan, so that one program scores all of them."""

    rows: int  # stem rows in a batch
    stem: int  # tokens in a stem row
    lanes: int  # tail rows for each stem row
    tail: int  # tokens in a tail row


@dataclass(frozen=True)
class ScoringBatch:
    """Arrays of one call. Integer segments separate groups, 0 is padding."""

    stem: dict[str, np.ndarray]  # tokens, positions, segments: int32 [rows, stem]
    tails: dict[str, np.ndarray]  # tokens, positions, segments: int32 [rows, lanes, tail]
    targets: np.ndarray  # int32 [rows, lanes, tail]
    owner: (
        np.ndarray
    )  # int32 [rows, lanes, tail]: number of the pair that a scored target belongs to, -1 elsewhere


def split_group(index: int, pairs: Sequence[Pair], switch: int | None = None) -> Split:
    """Returns the stem and the tails of one group.

    Example (context [5, 6, 7], continuations [8] and [9, 8]):
      stem [5, 6], tails [7] and [7, 9], targets [8] and [9, 8]

    Args:
      index: number of the group.
      pairs: contexts and continuations.
      switch: length beyond which a text cannot share a prefix: a group with a longer text has no stem,
        nor has a single text.

    Raises:
      NaloraError: there is no pair, or a context or a continuation is empty.
    """
    if not pairs or not all(len(context) and len(continuation) for context, continuation in pairs):
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
    if len(texts) == 1 or (switch is not None and max(map(len, texts)) - 1 > switch):
        cut = 0
    return Split(
        index,
        stem=texts[0][:cut],
        tails=[text[cut:-1] for text in texts],
        targets=[text[cut + 1 :] for text in texts],
        scored=[len(continuation) for _, continuation in pairs],
    )


def _common_prefix(texts: Sequence[list[int]]) -> int:
    first, last = min(texts), max(texts)  # their common prefix equals the prefix shared by all
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )


def choose_layout(splits: Sequence[Split], *, tokens: int, shards: int = 1) -> ScoringLayout:
    """Returns shapes that fit all groups with little padding.

    Args:
      splits: the groups.
      tokens: approximate number of stem tokens per batch.
      shards: divisor of the number of rows.
    """
    lanes = max(len(split.tails) for split in splits)
    longest_stem = max(len(split.stem) for split in splits)
    longest_tail = max(len(tail) for split in splits for tail in split.tails)
    stems = sum(len(split.stem) for split in splits)
    tails = sum(len(tail) for split in splits for tail in split.tails) / lanes
    # Longer rows have less padding, but their attention costs more: 256 and 512 are a compromise.
    stem = _rounded(max(longest_stem, min(256, stems)))  # 0 without shared prefixes
    tail = _rounded(max(longest_tail, min(1.05 * tails * (stem / stems if stems else 1), 512)))
    needed = max(-(-stems // max(stem, 1)), int(-(-tails // tail)))
    rows = min(max(1, tokens // max(stem, tail)), needed)
    return ScoringLayout(-(-rows // shards) * shards, stem, lanes, tail)


def _rounded(size: float) -> int:
    """Rounds up to a multiple of 8, or of 32 above 128, for few distinct shapes."""
    step = 8 if size <= 128 else 32
    return int(-(-size // step) * step)


def pack_rows(splits: Sequence[Split], layout: ScoringLayout) -> list[ScoringRow]:
    """Packs all groups into rows: longest first, each into the first open row with room."""
    open_rows: list[ScoringRow] = []
    rows: list[ScoringRow] = []
    for split in sorted(splits, key=lambda split: -len(split.stem) - max(map(len, split.tails))):
        if not any(row.add(split) for row in open_rows):
            row = ScoringRow(layout.stem, [layout.tail] * layout.lanes)
            fits = row.add(split)
            assert fits, "the layout holds every group"
            rows.append(row)
            open_rows = [*open_rows, row][-_OPEN_ROWS:]
    return rows


def make_batches(
    splits: Sequence[Split], layout: ScoringLayout
) -> Iterator[tuple[ScoringBatch, list[tuple[int, int]]]]:
    """Yields batches of all groups, each with the (group, pair) of every owner number."""
    rows = pack_rows(splits, layout)
    for start in range(0, len(rows), layout.rows):
        yield _fill(rows[start : start + layout.rows], layout)


def _fill(rows: Sequence[ScoringRow], layout: ScoringLayout) -> tuple[ScoringBatch, list[tuple[int, int]]]:
    shape = (layout.rows, layout.lanes, layout.tail)
    stem, tails = _empty(layout.rows, layout.stem), _empty(*shape)
    targets, owner = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    pairs: list[tuple[int, int]] = []
    for r, row in enumerate(rows):
        filled, used = 0, [0] * layout.lanes
        for segment, (group, lanes) in enumerate(zip(row.groups, row.lanes, strict=True), start=1):
            _write(stem, (r, slice(filled, filled + len(group.stem))), group.stem, 0, segment)
            filled += len(group.stem)
            for tail, (tokens, lane) in enumerate(zip(group.tails, lanes, strict=True)):
                begin, end = used[lane], used[lane] + len(tokens)
                _write(tails, (r, lane, slice(begin, end)), tokens, len(group.stem), segment)
                targets[r, lane, begin:end] = group.targets[tail]
                owner[r, lane, end - group.scored[tail] : end] = len(pairs)
                pairs.append((group.index, tail))
                used[lane] = end
    return ScoringBatch(stem, tails, targets, owner), pairs


def _empty(*shape: int) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segments")}


def _write(
    arrays: dict[str, np.ndarray], at: tuple[int | slice, ...], tokens: list[int], first: int, segment: int
) -> None:
    arrays["tokens"][at] = tokens
    arrays["positions"][at] = np.arange(first, first + len(tokens))
    arrays["segments"][at] = segment


_LEAST_BLOCK = 128  # tokens; shorter rows are computed on every device


def for_rows(model: Decoder, mesh: Mesh | None, seq: int) -> Decoder:
    """Returns ``model`` for rows of ``seq`` tokens without a cache; its result has parts of long rows."""
    splits = all(
        stack.config.mixer is None or stack.config.mixer.splits_rows for stack in stacks(model.config)
    )
    if context_size(mesh) == 1 or not splits or seq < 2 * context_size(mesh) * _LEAST_BLOCK:
        return model
    return model.clone(activation_sharding=row_sharding(mesh))
