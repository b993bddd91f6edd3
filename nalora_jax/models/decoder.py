"""The decoder: embedding, a scanned stack of layers, final norm and head; and one layer.

Families differ by their `ModelConfig` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.common.trees import flatten
from nalora_jax.method.ffn import Adapters
from nalora_jax.method.measurement import GateStatsConfig, SampledWeights
from nalora_jax.models.cache import Cache, default_positions, extend, since_last
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig, Part
from nalora_jax.models.embedding import Embedding, LMHead
from nalora_jax.models.parts import (
    HandedKeys,
    ImageFeatures,
    LayerInputs,
    PartOptions,
    ResidualNorm,
    RMSNorm,
    SharedInputs,
    constrain,
    layer_scales,
    part_adapters,
)
from nalora_jax.models.remat import (
    position_policy,
    rematerialize,
    scan_layers,
    stack_layers,
)
from nalora_jax.models.replay import routing_by_stack
from nalora_jax.models.ropes import image_coordinates, rope_tables
from nalora_jax.models.stacks import Stack, groups, parts, stacks
from nalora_jax.models.targets import TOKEN_ROWS, TOKEN_TABLES, AdapterSpec
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.reductions import SAMPLED_RUN, sampled_weights
from nalora_jax.ops.shardings import UNSHARDED, Shardings
from nalora_jax.ops.split_rows import (
    Row,
    block_length,
    pad_to_blocks,
    repeat_for_parts,
    shards_of,
    split_parts,
)
from nalora_jax.ops.storage import LAYER_INPUT, dot, round_and_save


class Block(nn.Module):
    """A layer ``x + post(attention(pre(x)))``, followed by the same with the FFN.

    The family's config decides which of the norms exist.
    """

    config: ModelConfig  # uniform, of the layer's stack
    adapters: AdapterSpec
    options: PartOptions  # of its parts; prefix, part and adapters are theirs

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: LayerInputs, shared: SharedInputs
    ) -> tuple[jax.Array, Any]:
        """Returns ``[batch, seq, d_model]``, and the update of the mixer's state if there is a
        cache."""
        c = self.config
        mixer, feed_forward = parts(c)
        x = checkpoint_name(x, LAYER_INPUT)  # a name for rematerialization policies
        # Attention, or another mixer of tokens. All arrays have x's shape.
        x, normed = self._added("attn_norm", x, None)
        y, update = self._module(mixer)(normed, layer, shared)
        y = self._result("attn_post_norm", y, shared)
        # The FFN. Its norm also adds the mixer's result to x.
        x, normed = self._added("ffn_norm", x, y)
        more = {}
        if feed_forward.reads_stream:
            more["stream"] = x
        if layer.replayed is not None:
            more["replayed"] = layer.replayed
        y = self._module(feed_forward)(
            normed,
            layer.scales.get(feed_forward.name, {}),
            token_weights=shared.token_weights,
            deterministic=shared.deterministic,
            **more,
        )
        x = self._add(x, self._result("ffn_post_norm", y, shared))
        if layer.deepstack is not None:
            x = x + layer.deepstack.astype(x.dtype)
        if c.tail is not None:
            x = self._module(c.tail)(x, layer, shared)
        # Without a reader the update would be stacked over all layers for nothing.
        if layer.cached is None and not c.hands:
            update = None
        return constrain(x, self.options.shardings.rows), update

    def _result(self, norm: str, y: jax.Array, shared: SharedInputs) -> jax.Array:
        """Returns a part's output with the family's dropout and the norm ``norm``."""
        c = self.config
        numerics = self.options.numerics
        if c.residual_dropout and not shared.deterministic:
            y = nn.Dropout(c.residual_dropout, deterministic=False)(y)
        if not c.post_norm:
            return y
        y = round_and_save(y, numerics)
        return RMSNorm(c.norm_eps, c.norm_offset, numerics.result, name=norm)(y)

    def _added(
        self, name: str, x: jax.Array, y: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns ``x + y`` and the input of the next part.

        The input is the norm of the sum, if the family has a norm there.
        """
        c = self.config
        # from the layer's input and the results that norms after parts read
        recomputed = c.post_norm
        if y is not None and not (c.pre_norm and c.residual_scale == 1.0):
            x = self._add(x, y)
            y = None
        if c.pre_norm:
            norm = ResidualNorm(
                c.norm_eps, c.norm_offset, self.options.numerics, recomputed, name=name
            )
            return norm(x, y)
        if recomputed:
            return x, x
        return x, round_and_save(x, self.options.numerics)

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns ``x + residual_scale * y`` in the dtype of the residual stream ``x``."""
        scale = self.config.residual_scale
        if scale != 1.0:
            y = y * jnp.asarray(scale, y.dtype)
        return x + y.astype(x.dtype)

    def _module(self, part: Part) -> Any:
        """Returns the Linen module of a part, with the adapters of its projections."""
        adapters = part_adapters(self.adapters, f"{self.options.prefix}/{part.name}")
        return part.module(
            self.config, replace(self.options, part=part.name, adapters=adapters)
        )


class Decoder(nn.Module):
    """A causal language model with collections ``params``, ``lora``, ``gate_mask``, ``gate_taps``.

    Attributes:
      config: the architecture.
      adapters: ranks and alphas of the adapters; without a collection ``lora`` the base model runs.
      numerics: dtypes, platform, implementation.
      remat: one of `nalora_jax.models.remat.REMAT`.
      stats: strides of the gate statistics, which are the gradients of ``gate_taps``.
      shardings: of activations on a mesh.
      experts: "gather", "send" or "auto", see `nalora_jax.config.ComputeConfig`.
    """

    config: ModelConfig
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    remat: str = "none"
    stats: GateStatsConfig | None = None
    shardings: Shardings = UNSHARDED
    experts: str = "auto"

    def setup(self) -> None:
        """Creates the embedding, the layers, the final norm and an untied head."""
        c = self.config
        # token ids of single rows of the embedding that are trained
        trained = dict(self.adapters.token_indices).get("embed_tokens", ())
        self.embed = Embedding(c.vocab_size, c.d_model, self.shardings.rows, trained)
        if c.layer_embeddings is not None:
            self.layer_embeddings = c.layer_embeddings.module(
                c.n_layers, self.shardings.rows, c.norm_eps, c.norm_offset
            )
        options = PartOptions(
            "layers",
            "",
            Adapters(),
            self.numerics,
            self.stats or GateStatsConfig(),
            self.shardings,
            self.experts,
        )
        if c.layer_kinds:
            self.layers = LayerGroups(c, self.remat, self.adapters, options)
        else:
            block = stack_layers(
                Block, self.remat, c.n_layers, drops=_drops(c, self.adapters)
            )
            self.layers = block(c, self.adapters, options)
        self.final_norm = RMSNorm(c.norm_eps, c.norm_offset, self.numerics.result)
        if not c.tie_embeddings:
            self.lm_head = LMHead(c.vocab_size)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_weights: jax.Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        features: jax.Array | ImageFeatures | None = None,
        lengths: jax.Array | None = None,
        coordinates: jax.Array | None = None,
        replayed: jax.Array | None = None,
    ) -> Any:
        """Returns the hidden states after the final norm.

        Args:
          tokens: int ``[batch, seq]``.
          positions: int ``[batch, seq]``; by default they restart with every segment and continue
            after the cached tokens.
          segment_ids: int ``[batch, seq]``, starting at 1, 0 for padding; tokens attend within
            their segment only. By default every token has segment 1.
          token_weights: ``[batch, seq]`` for the gate statistics, bool or float; by default the
            tokens that are not padding.
          cache: keys and values of earlier calls (`init_cache`); all segments must then be 1.
          deterministic: no dropout; if False and a rate is set, the rng ``dropout`` is needed.
          features: ``[batch, places, d_model]`` of images (``encode_images`` of the model with its
            tower), which replace each row's image tokens in order; a row may have fewer such tokens
            than places.
          lengths: int ``[batch]``, tokens of each row's text, for RoPE that depends on it; by
            default the text ends with these tokens.
          coordinates: int ``[3, batch, seq]`` of the tokens (`image_coordinates`), for RoPE with
            axes; by default those of whole texts with the images of ``features``, or those that
            follow the cached tokens.
          replayed: int ``[batch, seq, mixtures, top_k]``, experts of the layers that have experts,
            in place of their routers' choice (`nalora_jax.models.replay`); negative for tokens
            whose experts the routers choose.

        If ``shardings.rows`` splits the tokens of rows, the arguments have whole rows and the
        result has their parts (`nalora_jax.ops.split_rows.split_parts`).

        Returns:
          ``[batch, seq, d_model]``; with a cache, a pair of that and the extended cache.
        """
        if coordinates is None and self.config.has_axes:
            coordinates = self._coordinates(
                tokens, positions, segment_ids, features, cache
            )
        given = (positions, segment_ids, token_weights, cache, deterministic, lengths)
        shared = self._shared_inputs(tokens, *given, coordinates)
        sharding = self.shardings.rows
        whole = tokens
        tokens = split_parts(whole, sharding)  # of this device, if the mesh splits rows
        # [batch, seq, d_model]
        x = (
            self.embed(tokens, self.numerics).astype(jnp.float32)
            * self.config.embed_scale
        )
        embedded = None  # [layers, batch, seq, width]
        if self.config.layer_embeddings is not None:
            embedded = self.layer_embeddings(tokens, x, self.numerics)
        deepstack = None  # [layers, batch, seq, d_model]
        if isinstance(features, ImageFeatures):
            if features.deepstack is not None:
                images = features.deepstack
                nothing = jnp.zeros_like(x)
                rows = [self._with_images(nothing, shared, y, whole)[0] for y in images]
                deepstack = jnp.stack(rows).astype(self.numerics.result)
            features = features.embeddings
        if features is not None:
            x, shared = self._with_images(x, shared, features, whole)
        by_stack = {}
        if replayed is not None:
            by_stack = routing_by_stack(self.config, split_parts(replayed, sharding))
        x, updates = self._through_layers(
            constrain(x, sharding), cache, shared, embedded, deepstack, by_stack
        )
        hidden = self.final_norm(x)
        if self.is_initializing():  # creates the head's parameters
            self.unembed(hidden)
        if cache is None:
            return hidden
        # Positions and segments may have a leading axis of 1; the cache has them by row.
        positions = jnp.broadcast_to(shared.positions, tokens.shape)
        segments = jnp.broadcast_to(shared.segments, tokens.shape)
        return hidden, extend(
            cache, updates, positions, segments, self.numerics, coordinates
        )

    def _coordinates(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        features: jax.Array | ImageFeatures | None,
        cache: Cache | None,
    ) -> jax.Array | None:
        """Returns the coordinates ``[3, batch, seq]`` of the tokens of a call; None for a text
        alone, whose coordinates are its positions."""
        segments = segment_ids
        if segments is None:
            segments = jnp.ones(tokens.shape, jnp.int32)
        if isinstance(features, ImageFeatures):
            vision = self.config.vision
            assert vision is not None
            if positions is None:
                positions = default_positions(segments)
            places = tokens == vision.image_token
            return image_coordinates(places, positions, segments, features.grids)
        if cache is None:
            return None
        assert cache.coordinates is not None
        following = default_positions(segments) + cache.coordinates[:, None]
        return jnp.broadcast_to(following, (3, *tokens.shape))

    def _shared_inputs(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        token_weights: jax.Array | SampledWeights | None,
        cache: Cache | None,
        deterministic: bool,
        lengths: jax.Array | None,
        coordinates: jax.Array | None,
    ) -> SharedInputs:
        """Returns the inputs that all layers share, of the parts of rows if the mesh splits them.

        Without segments and positions their leading axis is 1, so that masks of whole rows stay
        small.
        """
        sharding = self.shardings.rows
        shape = tokens.shape
        row = None
        segments = jnp.ones((1, shape[1]), jnp.int32)
        if segment_ids is not None:
            segments = segment_ids.astype(jnp.int32)
            if token_weights is None:
                token_weights = segment_ids > 0
        if positions is None:
            positions = default_positions(segments)
            if cache is not None:
                positions = positions + cache.lengths[:, None]
        shards = shards_of(sharding)
        parts = partial(split_parts, sharding=sharding)
        # Shards split the batch, too, so that a leading axis of 1 is not possible.
        if shards > 1:
            batch = shape[0]
        else:
            batch = max(positions.shape[0], segments.shape[0])
        positions, segments = (
            jnp.broadcast_to(x, (batch, shape[1])) for x in (positions, segments)
        )
        if shards > 1:
            weights = jnp.ones(shape, bool)
            if token_weights is not None:
                assert isinstance(token_weights, jax.Array)
                weights = token_weights
            stats = self.stats or GateStatsConfig()
            block = block_length(shape[1], shards)
            token_weights = whole_row_weights(weights, stats, block, parts)
            row = Row(
                pad_to_blocks(positions, sharding), pad_to_blocks(segments, sharding)
            )
        return SharedInputs(
            tables={
                stack.prefix: rope_tables(
                    stack.config.ropes,
                    stack.config.layer_ropes,
                    positions,
                    segments,
                    lengths,
                    parts,
                    coordinates,
                )
                for stack in stacks(self.config)
            },
            positions=parts(positions),
            segments=parts(segments),
            token_weights=token_weights,
            cached_positions=None if cache is None else cache.positions,
            cached_segments=None if cache is None else cache.segments,
            row=row,
            deterministic=deterministic,
        )

    def _with_images(
        self, x: jax.Array, shared: SharedInputs, features: jax.Array, tokens: jax.Array
    ) -> tuple[jax.Array, SharedInputs]:
        """Returns ``x [batch, seq, d]`` with the images' features at their tokens, in order, and
        the layers' inputs.

        In these, the tokens of an image see each other if the model wants it. Features and tokens
        are of whole rows, x may have their parts.
        """
        vision = self.config.vision
        sharding = self.shardings.rows
        row = shared.row
        assert vision is not None
        # [batch, seq of whole rows]: image tokens, and how many precede each
        places = tokens == vision.image_token
        index = split_parts(jnp.maximum(jnp.cumsum(places, axis=1) - 1, 0), sharding)
        # A row with more places than features gets NaN there, so that the error is visible.
        rows = repeat_for_parts(features, sharding).astype(x.dtype)
        rows = jnp.take_along_axis(rows, index[..., None], axis=1, mode="fill")
        x = jnp.where(split_parts(places, sharding)[..., None], rows, x)
        if not vision.mutual:
            return x, shared
        if row is None:
            return x, replace(
                shared, starts=run_starts(places, shared.positions, shared.segments)
            )
        starts = run_starts(
            pad_to_blocks(places, sharding), row.positions, row.segments
        )
        return x, replace(shared, row=row._replace(starts=starts))

    def _through_layers(
        self,
        x: jax.Array,
        cache: Cache | None,
        shared: SharedInputs,
        embedded: jax.Array | None,
        deepstack: jax.Array | None,
        replayed: dict[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the output of the last layer, and the updates of the layers' states by stack."""
        inputs = {
            stack.prefix: LayerInputs(
                window=_scanned(stack.config.layer_windows, GLOBAL_WINDOW),
                rope=_scanned(stack.config.layer_ropes, 0),
                scales=layer_scales(self.adapters, stack.prefix),
                embedded=None if embedded is None else embedded[np.array(stack.layers)],
                cached=None if cache is None else cache.states.get(stack.prefix),
                deepstack=_of_stack(deepstack, stack),
                replayed=replayed.get(stack.prefix),
            )
            for stack in stacks(self.config)
        }
        x = x.astype(self.numerics.result)
        if self.config.layer_kinds:
            return self.layers(x, inputs, shared)
        x, update = self.layers(x, inputs["layers"], shared)
        return x, {"layers": update}

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits ``[..., vocab]`` of ``hidden [..., d_model]``.

        The logit scale and the soft cap are applied.
        """
        c = self.config
        # [..., d_model] -> [tokens, d_model]
        flat = hidden.reshape(-1, c.d_model)
        trained = flatten(self.variables.get("lora", {}))
        if TOKEN_TABLES["lm_head"] in trained:  # the entire head
            logits = dot(flat, trained[TOKEN_TABLES["lm_head"]], self.numerics)
        elif c.tie_embeddings:
            logits = dot(flat, self.embed.table(), self.numerics, dims=(1, 1))
        else:
            logits = self.lm_head(flat, self.numerics)
        head = self.adapters.head_rows(tied=c.tie_embeddings)
        if head is not None and TOKEN_ROWS[head[0]] in trained:
            of_rows = dot(
                flat, trained[TOKEN_ROWS[head[0]]], self.numerics, dims=(1, 1)
            )
            logits = logits.at[:, np.array(head[1])].set(of_rows)
        logits = (logits * c.logit_scale).reshape(*hidden.shape[:-1], c.vocab_size)
        if not c.final_softcap:
            return logits
        return c.final_softcap * jnp.tanh(logits / c.final_softcap)


class Period(nn.Module):
    """One period of a group of layers."""

    stacks: tuple[Stack, ...]
    remat: str
    adapters: AdapterSpec
    options: PartOptions

    @nn.compact
    def __call__(
        self, x: jax.Array, layers: tuple[LayerInputs, ...], shared: SharedInputs
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Returns ``[batch, seq, d_model]``, and the update of every layer's state."""
        updates = []
        for number, (stack, layer) in enumerate(zip(self.stacks, layers, strict=True)):
            block = rematerialize(
                Block, position_policy(self.remat, number, len(self.stacks))
            )
            options = replace(self.options, prefix=stack.prefix)
            x, update = block(
                stack.config, self.adapters, options, name=f"block{number}"
            )(x, layer, shared)
            updates.append(update)
            shared = _with_keys(shared, stack, update, layer.cached)
        return x, tuple(updates)


class LayerGroups(nn.Module):
    """Layers of several kinds: each group is scanned over its periods."""

    config: ModelConfig
    remat: str
    adapters: AdapterSpec
    options: PartOptions

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: dict[str, LayerInputs], shared: SharedInputs
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns ``[batch, seq, d_model]``, and the updates of the layers' states by stack."""
        updates: dict[str, Any] = {}
        for number, group in enumerate(groups(self.config)):
            period = scan_layers(
                Period, len(group[0].layers), drops=_drops(self.config, self.adapters)
            )(group, self.remat, self.adapters, self.options, name=f"group{number}")
            prefixes = [stack.prefix for stack in group]
            x, of_group = period(
                x, tuple(inputs[prefix] for prefix in prefixes), shared
            )
            updates |= zip(prefixes, of_group, strict=True)
            # A stack that hands on its keys has one layer.
            for stack in (stack for stack in group if stack.config.hands):
                # its update and its cache, without the axis [layers]
                first = jax.tree.map(
                    lambda y: y[0], (updates[stack.prefix], inputs[stack.prefix].cached)
                )
                shared = _with_keys(shared, stack, *first)
        return x, updates


def _with_keys(
    shared: SharedInputs, stack: Stack, update: tuple[jax.Array, jax.Array], cached: Any
) -> SharedInputs:
    """Returns the inputs of later layers, which may read the keys and values of a stack of one
    layer."""
    if not stack.config.hands:
        return shared
    return replace(
        shared, handed=shared.handed | {stack.config.hands: HandedKeys(*update, cached)}
    )


def _drops(config: ModelConfig, adapters: AdapterSpec) -> bool:
    """Returns True if training draws dropout within a layer."""
    return bool(config.attn_dropout or config.residual_dropout or adapters.dropout)


def _of_stack(deepstack: jax.Array | None, stack: Stack) -> jax.Array | None:
    """Returns the image features ``[layers, batch, seq, d_model]`` that a stack's layers add."""
    if deepstack is None or not stack.config.deepstack:
        return None
    return deepstack[np.array(stack.layers)]


def _scanned(by_layer: tuple[int, ...], default: int) -> jax.Array | None:
    """Returns the values of a stack's layers; None if all of them are the default."""
    if set(by_layer) == {default}:
        return None
    return jnp.asarray(by_layer, jnp.int32)


def whole_row_weights(
    weights: jax.Array,
    config: GateStatsConfig,
    block: int,
    parts: Callable[[jax.Array], jax.Array],
) -> SampledWeights:
    """Returns the weights of parts of rows for the positions that are sampled of the whole rows.

    Args:
      weights: ``[batch, seq]`` of whole rows.
      config: strides.
      block: tokens of the blocks that parts consist of.
      parts: returns the parts of rows ``[batch, seq]``.
    """
    length = weights.shape[-1]
    config = config.of_rows(length)
    strides = config.stride, config.probe_stride
    of_gate, of_probe = (parts(sampled_weights(weights, stride)) for stride in strides)

    def within_blocks(stride: int) -> int:
        """Returns the stride of the samples taken within blocks, 1 for all positions."""
        # The largest stride at which samples of blocks contain the sample of their row. A group of
        # the row consists of whole groups of a block, which take the group's run if the weights of
        # all others are 0. If the row's positions are taken singly, or blocks divide runs, all are
        # taken.
        singly = length % (SAMPLED_RUN * stride) or block % SAMPLED_RUN
        if singly:
            return 1
        return math.gcd(stride, block // SAMPLED_RUN)

    gate, probe = map(within_blocks, strides)
    return SampledWeights(parts(weights), of_gate, of_probe, (gate, probe), length)


# ---------------------------------------------------------------- cache


def init_cache(
    config: ModelConfig,
    batch: int,
    length: int,
    numerics: Numerics = Numerics(),  # noqa: B008
) -> Cache:
    """Returns an empty cache of ``numerics.operand`` with ``length`` slots.

    The slots must hold the tokens of all calls, padding included. With ``length`` 0 the first call
    attends to its own tokens only and allocates slots for exactly those; `grow` adds more.

    A compiled program does not detect writes beyond the last slot: they overwrite the last slots.
    The caller must choose ``length`` accordingly.
    """
    slots = jnp.zeros((batch, length), jnp.int32)
    return Cache(
        states={
            stack.prefix: parts(stack.config)[0].init_state(
                stack.config, batch, length, numerics
            )
            for stack in stacks(config)
            if not stack.config.reads
        },
        positions=slots,
        segments=slots,
        lengths=jnp.zeros((batch,), jnp.int32),
        index=jnp.zeros((), jnp.int32),
        coordinates=jnp.zeros((batch,), jnp.int32) if config.has_axes else None,
    )


# ---------------------------------------------------------------- images in rows of tokens


def run_starts(
    places: jax.Array, positions: jax.Array, segments: jax.Array
) -> jax.Array:
    """Returns the position of the first token of each run of ``places``: int ``[batch, seq]``.

    A token outside of ``places`` keeps its own position.

    Example: places ``[[0, 1, 1, 1, 0]]``, positions ``[[0, 1, 2, 3, 4]]`` -> ``[[0, 1, 1, 1, 4]]``.
    """
    positions = jnp.broadcast_to(positions, places.shape)
    segments = jnp.broadcast_to(segments, places.shape)
    # Starting at the second token of a row: True if it continues the run of the token before it.
    both_in_places = places[:, 1:] & places[:, :-1]
    same_segment = segments[:, 1:] == segments[:, :-1]
    begins = ~(both_in_places & same_segment)
    first = jnp.concatenate([jnp.ones_like(places[:, :1]), begins], axis=1)
    return positions - since_last(first)
