"""Rows of tokens sorted by expert: the router's choice, the rows' way in and out, matmuls and
statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.method import activations, statistics
from nalora_jax.method.low_rank import (
    Adapter,
    Factors,
    Products,
    gated,
    rank_cotangents,
    stack_masked,
)
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.grouped_matmul import (
    grouped_matmul,
    grouped_result,
    joins_factors,
    multiply_factor,
    outer_of_all,
    own_of_all,
    ragged,
    ragged_outer,
)
from nalora_jax.ops.reductions import sample_positions
from nalora_jax.ops.split_rows import block_numbers, gather_rows
from nalora_jax.ops.storage import Kernel, expand


class Places(NamedTuple):
    """Places for the rows of tokens; every row has one place, and a place at most one row."""

    token: jax.Array  # int [places], the token of each place
    # int [tokens * top_k], each row's place, top_k rows of token 0 first
    of_rows: jax.Array
    used: jax.Array | None = None  # bool [places], places with a row; None: all


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def scatter_rows(x: jax.Array, places: Places, top_k: int) -> jax.Array:
    """Returns the token of each place, ``[places, d]``, zeros in unused places.

    Args:
      x: ``[tokens, d]``.
      places: places of the rows.
      top_k: rows of each token.
    """
    rows = _taken(x, places.token)
    if places.used is None:
        return rows
    return jnp.where(places.used[:, None], rows, 0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_token_rows(y: jax.Array, places: Places, top_k: int) -> jax.Array:
    """Returns the sum of each token's rows, ``[tokens, d]``; arguments as for `scatter_rows`, ``y
    [places, d]``."""
    rows = _taken(y, places.of_rows)  # [tokens * top_k, d]
    of_tokens = rows.reshape(-1, top_k, y.shape[-1])
    return jnp.sum(of_tokens, axis=1)


scatter_rows.defvjp(
    lambda x, places, top_k: (scatter_rows(x, places, top_k), places),
    lambda top_k, places, g: (sum_token_rows(g, places, top_k), None),
)
sum_token_rows.defvjp(
    lambda y, places, top_k: (sum_token_rows(y, places, top_k), places),
    lambda top_k, places, g: (scatter_rows(g, places, top_k), None),
)


def _taken(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns ``x[rows]``; without a promise, XLA writes the rows again to mask those out of
    bounds."""
    return jnp.asarray(x).at[rows].get(mode="promise_in_bounds")


class ExpertGroups(NamedTuple):
    """The groups of rows that are sorted by expert."""

    sizes: jax.Array  # int [experts], rows of each
    expert: jax.Array  # int [rows], ascending


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_grouped_matmul(
    x: jax.Array, kernels: Kernel, sizes: jax.Array, numerics: Numerics
) -> jax.Array:
    """Multiplies every row by its expert's frozen kernel; the kernels receive no gradient.

    Args:
      x: ``[rows, d_in]`` sorted by expert.
      kernels: ``[experts, d_in, d_out]``, as they are stored.
      sizes: int ``[experts]``.
      numerics: dtypes of operands and result.

    Returns:
      ``[rows, d_out]`` in ``numerics.result``.
    """
    chex.assert_rank([x, sizes], [2, 1])
    return grouped_matmul(x, expand(kernels, numerics.operand), sizes, numerics)


def _frozen_fwd(
    x: jax.Array, kernels: Any, sizes: jax.Array, numerics: Numerics
) -> tuple[jax.Array, Any]:
    """Returns the product and the residuals: kernels as stored, sizes, and an empty array with x's
    dtype."""
    return frozen_grouped_matmul(x, kernels, sizes, numerics), (
        kernels,
        sizes,
        jnp.zeros((0,), x.dtype),
    )


def _frozen_bwd(
    numerics: Numerics, residuals: Any, g: jax.Array
) -> tuple[jax.Array, None, None]:
    """Returns the gradient of x, ``[rows, d_in]`` in its dtype; kernels and sizes receive none."""
    kernels, sizes, like_x = residuals
    numerics = replace(numerics, result=like_x.dtype.name)
    floats = expand(kernels, numerics.operand)
    return grouped_matmul(g, floats, sizes, numerics, transposed=True), None, None


frozen_grouped_matmul.defvjp(_frozen_fwd, _frozen_bwd)


def grouped_residual(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    groups: ExpertGroups,
    numerics: Numerics,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Returns ``s (x A_e) B_e`` per expert, with the gated gradient.

    This is `nalora_jax.method.low_rank.low_rank` over grouped rows.

    Args:
      x: ``[rows, d_in]`` sorted by expert.
      a: ``[experts, d_in, r]`` float32.
      b: ``[experts, r, d_out]`` float32.
      scale: scalar.
      groups: the rows' experts.
      numerics: its ``adapter`` is the dtype of the operands.
      mask: ``[experts, d_out]`` or None.

    Returns:
      ``[rows, d_out]`` float32, or the platform's dtype of grouped results.
    """
    chex.assert_rank([x, a, b], [2, 3, 3])
    joined = joins_factors(a.shape[0], a.shape[-1], numerics)
    wide = grouped_result(numerics, numerics.adapter)
    products = GroupedProducts(groups, numerics.adapter, joined, wide)
    (y,), _ = gated(products, x, (Factors.of(Adapter(a, b, scale, mask)),))
    return y


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupedProducts(Products):
    """Matmuls of every row with its expert's adapter; factors have a leading axis ``[experts]``."""

    groups: ExpertGroups
    operand: str = field(metadata={"static": True})
    # the factors of all experts are concatenated
    joined: bool = field(metadata={"static": True})
    # dtype of results ``[rows, d]`` that are not joined
    wide: str = field(metadata={"static": True})

    def _to_rank(self, x: jax.Array, factors: jax.Array) -> jax.Array:
        """Returns ``[rows, r]`` of ``[rows, d]`` times ``[experts, d, r]``."""
        if self.joined:
            return own_of_all(x, factors, self.groups.expert, self.operand)
        return ragged(x, factors, self.groups.sizes, self.operand)

    def _from_rank(self, hidden: jax.Array, factors: jax.Array) -> jax.Array:
        """Returns ``[rows, d]`` of ``[rows, r]`` times ``[experts, r, d]``."""
        if self.joined:
            return multiply_factor(hidden, factors, self.groups.expert, self.operand)
        return ragged(hidden, factors, self.groups.sizes, self.operand, self.wide)

    def _per_expert(self, x: jax.Array, g: jax.Array, like: jax.Array) -> jax.Array:
        """Returns ``x_e^T g_e`` of all experts, the transpose of the grouped matmul."""
        if self.joined:
            return outer_of_all(x, g, self.groups.expert, like.shape[0], self.operand)
        return ragged_outer(x, g, self.groups.sizes, self.operand)

    def forward(
        self, x: jax.Array, layers: Sequence[Factors]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """See `Products`."""
        (layer,) = layers
        hidden = layer.scale * self._to_rank(x, layer.a)
        return [self._from_rank(hidden, layer.b)], [hidden]

    def backward(
        self,
        x: jax.Array,
        gs: Sequence[jax.Array],
        layers: Sequence[Factors],
        hidden: Sequence[Any],
    ) -> tuple[jax.Array, list[Any], list[Any]]:
        """See `Products`."""
        (layer,) = layers
        (g,) = gs
        back = self._to_rank(g, stack_masked(layer).swapaxes(1, 2))
        exact, masked = rank_cotangents(layer, back)
        dx = self._from_rank(exact, layer.a.swapaxes(1, 2)).astype(x.dtype)
        return (
            dx,
            [self._per_expert(x, masked, layer.a)],
            [self._per_expert(hidden[0], g, layer.b)],
        )


@dataclass(frozen=True)
class RouterSpec:
    """Scores of a router and its choice of experts."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # scale the chosen experts' scores to sum to 1
    correction: bool = False  # a bias per expert is added to scores for the choice only
    groups: int = 1  # groups of consecutive experts
    groups_kept: int = 1  # experts are chosen from the groups with the highest scores
    scale: float = 1.0  # multiplies the weights
    expert_scale: bool = False  # the model has a factor of each expert's weights
    # A group's score is the sum of its highest expert scores: of two (DeepSeek-V3, arXiv
    # 2412.19437), or of one (DeepSeek-V2, 2405.04434).
    group_top: int = 2


class Routing(NamedTuple):
    """Rows sorted by expert: row i is token ``token[i]`` in expert ``expert[i]``."""

    # int [tokens * top_k], sorts the rows (top_k of token 0, of token 1, ...) by expert
    order: jax.Array
    token: jax.Array  # int [tokens * top_k]
    expert: jax.Array  # int [tokens * top_k], ascending
    sizes: jax.Array  # int [experts], rows of each expert
    weight: jax.Array  # float32 [tokens * top_k]
    back: jax.Array  # int [tokens * top_k], inverse of ``order``

    def chosen(self, *shape: int) -> jax.Array:
        """Returns the experts of every token, int ``[*shape, top_k]``, ``shape`` of the tokens."""
        return self.expert[self.back].reshape(*shape, -1)

    @property
    def groups(self) -> ExpertGroups:
        """The rows' experts, without tokens and weights."""
        return ExpertGroups(self.sizes, self.expert)


def route(
    logits: jax.Array,
    top_k: int,
    spec: RouterSpec,
    *of_experts: jax.Array | None,
    replayed: jax.Array | None = None,
) -> Routing:
    """Returns the ``top_k`` experts of every token and their weights.

    Args:
      logits: float32 ``[tokens, experts]``.
      top_k: experts per token.
      spec: the choice of experts and their weights.
      of_experts: correction and scale, float32 ``[experts]`` or None, see `RouterSpec`.
      replayed: as for `choose`.
    """
    n_experts = logits.shape[-1]
    weights, chosen = choose(logits, top_k, spec, *of_experts, replayed=replayed)
    flat = chosen.reshape(-1)  # [tokens * top_k]
    order = jnp.argsort(flat, stable=True)
    return Routing(
        order=order,
        token=order // top_k,
        expert=flat[order],
        sizes=jnp.bincount(flat, length=n_experts).astype(jnp.int32),
        weight=weights.reshape(-1)[order],
        back=jnp.argsort(order),
    )


def choose(
    logits: jax.Array,
    top_k: int,
    spec: RouterSpec,
    correction: jax.Array | None = None,
    expert_scale: jax.Array | None = None,
    *,
    replayed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns weights and indices of every token's experts, ``[tokens, top_k]``.

    Replayed experts get the weights that these logits give them, with their gradient (routing
    replay, arXiv 2510.11370).

    Args:
      logits: float32 ``[tokens, experts]``.
      top_k: experts per token.
      spec: scores, groups and scale.
      correction: float32 ``[experts]``, if ``spec.correction``.
      expert_scale: float32 ``[experts]``, if ``spec.expert_scale``.
      replayed: int ``[tokens, top_k]``, experts to take in place of the router's choice; negative
        for tokens whose experts the router chooses.
    """
    if spec.scores == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
    ranked = lax.stop_gradient(scores)
    limited = spec.groups != spec.groups_kept
    if correction is not None:
        ranked = ranked + lax.stop_gradient(correction)[None]
    if limited:  # to each token's kept groups
        # [tokens, groups, experts of a group]
        grouped = ranked.reshape(ranked.shape[0], spec.groups, -1)
        of_groups = jnp.sum(lax.top_k(grouped, spec.group_top)[0], axis=-1)
        inside = jax.nn.one_hot(
            lax.top_k(of_groups, spec.groups_kept)[1], spec.groups, dtype=bool
        )
        ranked = jnp.where(
            jnp.any(inside, axis=1)[..., None], grouped, -jnp.inf
        ).reshape(ranked.shape)
    if correction is None and not limited:
        weights, chosen = lax.top_k(scores, top_k)
    else:
        # The correction decides which experts are chosen, not their weights.
        chosen = lax.top_k(ranked, top_k)[1]
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if replayed is not None:
        chosen = jnp.where(replayed >= 0, replayed.astype(chosen.dtype), chosen)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if spec.normalize:  # sigmoids may underflow
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    if expert_scale is not None:
        weights = weights * expert_scale[chosen]
    if spec.scale != 1.0:
        weights = weights * spec.scale
    return weights, chosen


class SampledRows(NamedTuple):
    """Sorted rows that statistics are computed from."""

    rows: jax.Array | None  # int [taken]; None: all rows
    # float32 [experts, taken]: the row's token weight in its own expert, 0 in the others
    weights: jax.Array

    def take(self, x: jax.Array) -> jax.Array:
        """Returns ``[taken, ...]`` of ``[rows, ...]``."""
        if self.rows is None:
            return x
        return x.at[self.rows].get(mode="promise_in_bounds")


def sample(routing: Routing, token_weights: jax.Array, stride: int) -> SampledRows:
    """Samples one in ``stride`` rows of every sequence, with real tokens preferred to padding.

    Single rows are sampled instead of runs, because an expert may have few. The rows of each
    sequence are sorted by expert separately, so that a sequence counts the same in any batch.

    Args:
      routing: of all tokens of the batch.
      token_weights: ``[batch, seq]``, 0 for padding.
      stride: 1 or more.
    """
    token_weights = lax.stop_gradient(token_weights).astype(jnp.float32)
    rows = None
    expert = routing.expert
    weights = jnp.take(token_weights.reshape(-1), routing.token)
    if stride > 1:
        batch = token_weights.shape[0]
        experts = routing.expert[routing.back].reshape(batch, -1)
        # [batch, seq * top_k]: indices of a sequence's rows among all sorted rows, by expert
        places = jnp.take_along_axis(
            routing.back.reshape(batch, -1),
            jnp.argsort(experts, axis=1, stable=True),
            axis=1,
        )
        positions = sample_positions(
            places[..., None], jnp.take(weights, places), stride, run=1
        )
        rows = positions.reshape(-1)
        weights = jnp.take(weights, rows)
        expert = jnp.take(expert, rows)
    return SampledRows(rows, expert_weights(weights, expert, routing))


def expert_weights(
    weights: jax.Array, expert: jax.Array, routing: Routing
) -> jax.Array:
    """Returns the weights ``[experts, taken]`` of `SampledRows`."""
    reached = expert[None, :] == jnp.arange(routing.sizes.shape[0])[:, None]
    return jnp.where(reached, weights[None, :], 0.0)


def expert_statistics(
    z: jax.Array,
    start: jax.Array,
    dz: jax.Array,
    samples: tuple[SampledRows, SampledRows],
    activation: activations.Activation,
    names: Iterable[str],
) -> dict[str, jax.Array]:
    """Returns `nalora_jax.method.measurement.block_statistics` of every expert over its tokens.

    Args:
      z: ``[taken, d_ff]`` full pre-activations of the first sample's rows.
      start: ``[probed, d_ff]`` frozen pre-activations of the second sample's rows.
      dz: ``[probed, d_ff]`` the adapter's change of them.
      samples: rows for the gate's statistics and rows for the probe.
      activation: the gate's.
      names: statistics of the forward pass.

    Returns:
      The same names with a leading ``[experts]`` axis.
    """
    partition = activations.partition(activation.name)

    def one(of_gate: jax.Array, of_probe: jax.Array) -> dict[str, jax.Array]:
        """Returns the statistics of one expert from its weights ``[taken]``, ``[probed]``."""
        stats = statistics.channel_statistics(z, of_gate, activation, partition, names)
        return stats | statistics.probe_statistics(
            start, dz, of_probe, activation, names
        )

    return jax.vmap(one)(samples[0].weights, samples[1].weights)


def expert_cotangent_statistics(
    delta: jax.Array, of: SampledRows, names: Iterable[str]
) -> dict[str, jax.Array]:
    """Returns `nalora_jax.method.statistics.cotangent_statistics` by expert.

    ``delta`` is ``[rows, d_ff]``; the results have a leading axis ``[experts]``.
    """
    sampled = of.take(delta)
    return jax.vmap(
        lambda weights: statistics.cotangent_statistics(sampled, weights, names)
    )(of.weights)


# ---------------------------------------------------------------- samples of rows whose tokens are
# split over devices


def samples_of_parts(
    routing: Routing, token_weights: jax.Array, strides: tuple[int, int], length: int
) -> tuple[SampledRows, SampledRows]:
    """Samples rows of parts of sequences (`nalora_jax.ops.split_rows`) as `sample` does of whole
    ones.

    Within a shard. A place counts the rows of a whole sequence, sorted by expert and then by token.
    The rows of an expert in a block have consecutive places, so the number of these rows and the
    last with weight, two integers by block and expert, are all that shards exchange.

    Args:
      routing: of the shard's tokens.
      token_weights: ``[batch, 2 * block]``, 0 for padding.
      strides: of both samples.
      length: tokens of a whole sequence, without the padding to whole blocks.
    """
    weights = lax.stop_gradient(token_weights).astype(jnp.float32)
    batch = weights.shape[0]
    block = weights.shape[1] // 2
    experts = routing.sizes.shape[0]
    # The rows of the shard's blocks, sorted by expert: [blocks, rows].
    natural = routing.expert[routing.back].reshape(2 * batch, -1)
    order = jnp.argsort(natural, axis=1, stable=True)
    in_order = partial(jnp.take_along_axis, indices=order, axis=1)
    index = in_order(routing.back.reshape(order.shape))
    expert = in_order(natural)
    weight = jnp.take(weights.reshape(-1), jnp.take(routing.token, index))
    # Rows of the padding to whole blocks have no place.
    tokens = jnp.clip(length - jnp.stack(block_numbers()) * block, 0, block)
    exists = order // (order.shape[1] // block) < jnp.tile(tokens, batch)[:, None]
    # bool [blocks, rows, experts]: each sorted row's expert
    reached = jax.nn.one_hot(expert, experts, dtype=bool)
    number = jnp.arange(order.shape[1])[None]
    sizes = jnp.sum(reached, axis=1)
    first = jnp.cumsum(sizes, axis=1) - sizes  # [blocks, experts]
    # [blocks, experts]: the last row with weight, counted from the expert's first row
    with_weight = reached & (weight > 0)[..., None]
    last_number = jnp.max(jnp.where(with_weight, number[..., None], -1), axis=1)
    last = last_number - first
    counts = jnp.sum(reached & exists[..., None], axis=1)
    start, before = _of_sequence(
        counts.reshape(batch, 2, -1), last.reshape(batch, 2, -1)
    )
    of_expert = partial(jnp.take_along_axis, indices=expert, axis=1)
    place = number + of_expert(start - first)
    # The place of the last row with weight before each row; -1 for none.
    until = lax.cummax(jnp.where(weight > 0, place, -1), axis=1)
    preceding = jnp.maximum(_shifted(until), of_expert(before))

    def of_stride(stride: int) -> SampledRows:
        """Returns the first row with weight in every ``stride`` places of a sequence."""
        if stride == 1:
            return sample(routing, weights, stride)
        chosen = (weight > 0) & (place // stride != preceding // stride)
        # The rows of an expert are in at most rows / stride + 2 groups of places.
        most = min(chosen.shape[1], chosen.shape[1] // stride + 2 * experts)
        taken = jnp.argsort(~chosen, axis=1, stable=True)[:, :most]
        arrays = index, jnp.where(chosen, weight, 0.0), expert
        rows, of_rows, to = (
            jnp.take_along_axis(x, taken, axis=1).reshape(-1) for x in arrays
        )
        return SampledRows(rows, expert_weights(of_rows, to, routing))

    return of_stride(strides[0]), of_stride(strides[1])


def _shifted(x: jax.Array) -> jax.Array:
    """Returns each value's predecessor in rows ``[batch, n]``, -1 for the first ones."""
    first = jnp.full_like(x[:, :1], -1)
    return jnp.concatenate([first, x[:, :-1]], axis=1)


def _of_sequence(counts: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the first place of every expert's rows in a shard's blocks, and the last before it
    with weight.

    Args:
      counts: int ``[batch, 2, experts]``, rows of every expert in the shard's two blocks.
      last: the last of these with weight; negative for none.

    Returns:
      Two arrays ``[2 * batch, experts]``.
    """
    batch, _, experts = counts.shape
    # [batch, experts, blocks of the sequence]
    counts, last = jnp.moveaxis(
        gather_rows(jnp.stack([counts, last], axis=-1)), (3, 2), (0, 2)
    )
    # Places of a sequence are sorted by expert, then by block: [batch, experts * blocks].
    flat = counts.reshape(batch, -1)
    start = jnp.cumsum(flat, axis=1) - flat
    last = last.reshape(batch, -1)
    ends = lax.cummax(jnp.where(last >= 0, start + last, -1), axis=1)
    before = _shifted(ends)

    def of_blocks(x: jax.Array) -> jax.Array:
        """Returns the shard's two blocks, ``[2 * batch, experts]``, of all, ``[batch, experts *
        blocks]``."""
        x = x.reshape(batch, experts, -1)[:, :, jnp.stack(block_numbers())]
        return jnp.moveaxis(x, 2, 1).reshape(2 * batch, experts)

    return of_blocks(start), of_blocks(before)
