"""The layers of a decoder as stacks: layers of one kind are stored along a leading axis.

A model whose layers are all alike has one stack, ``layers``. Otherwise the layers are divided into
groups, each of which repeats a period of kinds. Every position of a period is a stack. The division
compiles the fewest layers. Examples (D: dense, M: mixture, L: linear attention, A: attention)::

    D M M M M          group0 repeats D once, group1 repeats M 4 times
                       layers/group0/block0: layer 0;      layers/group1/block0: layers 1, 2, 3, 4
    L L L A L L L A    group0 repeats L L L A twice
                       layers/group0/block0: layers 0, 4;  ...; layers/group0/block3: layers 3, 7

Paths of a uniform model name an array of any model together with a layer's number: `stacked_places`
maps ``("layers/ffn/gate_proj", 5)`` to the stack's path and the index on its leading axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from nalora_jax.models.attention_layer import SoftmaxAttention
from nalora_jax.models.blocks import GatedBlock
from nalora_jax.models.config import (
    FeedForward,
    Gates,
    Mixer,
    ModelConfig,
    ParamShapes,
    Part,
)
from nalora_jax.models.targets import uniform_path

if TYPE_CHECKING:
    from nalora_jax.models.vision.vision_config import DualConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Stack:
    """Layers of one kind."""

    prefix: str  # "layers", or "layers/group0/block1"
    config: ModelConfig  # a uniform model of only these layers
    layers: tuple[int, ...]  # their numbers in the model


@functools.cache
def groups(config: ModelConfig) -> tuple[tuple[Stack, ...], ...]:
    """Returns the groups of layers in order, each as the stacks of its period."""
    if not config.layer_kinds:
        return ((Stack("layers", config, tuple(range(config.n_layers))),),)
    divided = []
    for number, (start, end, period) in enumerate(_divide(config.layer_kinds)):
        stacks = []
        for position in range(period):
            layers = tuple(range(start + position, end, period))
            stacks.append(
                Stack(
                    f"layers/group{number}/block{position}",
                    _of_kind(config, layers),
                    layers,
                )
            )
        divided.append(tuple(stacks))
    return tuple(divided)


def stacks(config: ModelConfig) -> tuple[Stack, ...]:
    """Returns all stacks of a decoder."""
    return tuple(stack for group in groups(config) for stack in group)


def key_heads(config: ModelConfig) -> int:
    """Returns the largest number that divides the key/value heads of every attention layer."""
    return math.gcd(
        *(stack.config.n_kv_heads for stack in stacks(config) if stack.config.attends)
    )


def _of_kind(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Returns the uniform config of some layers of one kind."""
    overrides = dict(config.kinds[config.layer_kinds[layers[0]]])
    if config.windows and "windows" not in overrides:
        overrides["windows"] = tuple(config.windows[layer] for layer in layers)
    if config.rope_index and "ropes" not in overrides:
        overrides["rope_index"] = tuple(config.rope_index[layer] for layer in layers)
    if overrides.get("n_experts") == 0:
        overrides.setdefault("ffn", None)
    return replace(
        config, kinds=(), layer_kinds=(), n_layers=len(layers), vision=None, **overrides
    )


def _divide(kinds: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns (start, end, period) of consecutive groups with the smallest sum of periods.

    Of several such divisions the one with the fewest groups is taken.
    """
    best = [_Division(0, 0, [])]  # best[end] divides kinds[:end]
    for end in range(1, len(kinds) + 1):
        options = []
        for start in range(end):
            before = best[start]
            period = _period(kinds[start:end])
            groups = [*before.groups, (start, end, period)]
            options.append(_Division(before.periods + period, len(groups), groups))
        best.append(min(options))
    return best[-1].groups


class _Division(NamedTuple):
    """A division of layers into groups; the smallest one is the best."""

    periods: int  # sum of the groups' periods
    number: int  # of groups
    groups: list[tuple[int, int, int]]  # start, end and period of each


def _period(kinds: Sequence[int]) -> int:
    """Returns the length of the shortest period that repeats without a remainder."""
    length = len(kinds)
    for period in range(1, length):
        # The kinds repeat if shifting them by a period changes none.
        if length % period == 0 and kinds[period:] == kinds[:-period]:
            return period
    return length


# ---------------------------------------------------------------- names and shapes


def parts(config: ModelConfig) -> tuple[Mixer, FeedForward]:
    """Returns the mixer and the feed-forward block of a layer of a uniform config."""
    return config.mixer or SoftmaxAttention(), config.ffn or GatedBlock()


def _of_parts(
    config: ModelConfig, facts: Callable[[Part, ModelConfig], Mapping[str, T]]
) -> list[tuple[Stack, str, T]]:
    """Returns the stack and the stacked path of every fact of the layers' parts, which ``facts``
    names."""
    rows = []
    for stack in stacks(config):
        for part in (*parts(stack.config), stack.config.tail):
            if part is None:
                continue
            for name, fact in facts(part, stack.config).items():
                path = f"{stack.prefix}/{part.name}/{name}".removesuffix("/")
                rows.append((stack, path, fact))
    return rows


@functools.cache
def stacked_places(
    config: ModelConfig | DualConfig,
) -> Mapping[tuple[str, int], tuple[str, int]]:
    """Returns stacked path and index of every projection by its uniform path and layer number."""
    numbers = layer_numbers(config)
    return {
        (uniform_path(path), n): (path, i)
        for path in numbers
        for i, n in enumerate(numbers[path])
    }


def param_shapes(config: ModelConfig) -> ParamShapes:
    """Returns the shape of every base parameter by path, layers stacked.

    Example (Llama, tied):
      ``{"embed/embedding": (V, D), "layers/attn/q_proj/kernel": (L, D, H * hd), ...,
      "final_norm/scale": (D,)}``
    """
    d = config.d_model
    v = config.vocab_size
    shapes: ParamShapes = {"embed/embedding": (v, d)}
    norms = ["attn_norm", "ffn_norm"] * config.pre_norm + [
        "attn_post_norm",
        "ffn_post_norm",
    ] * config.post_norm
    of_parts = _of_parts(config, lambda part, c: part.param_shapes(c))
    for stack in stacks(config):
        lead = len(stack.layers)
        shapes |= {f"{stack.prefix}/{name}/scale": (lead, d) for name in norms}
        shapes |= {path: (lead, *shape) for of, path, shape in of_parts if of is stack}
    if config.layer_embeddings is not None:
        shapes |= config.layer_embeddings.param_shapes(config.n_layers, config.d_model)
    shapes["final_norm/scale"] = (d,)
    if not config.tie_embeddings:
        shapes["lm_head/kernel"] = (d, v)
    if config.vision is not None:
        shapes |= config.vision.param_shapes()
    return shapes


def projection_shapes(config: ModelConfig | DualConfig) -> ParamShapes:
    """Returns per-layer kernel shapes of all projections that can be adapted, by stacked path.

    Kernels of experts have a leading axis ``[experts]``.

    Example:
      ``{"layers/attn/q_proj": (576, 576), ..., "layers/ffn/gate_proj": (576, 1536)}``
    """
    if not isinstance(config, ModelConfig):
        return config.projection_shapes()
    shapes = {
        path: shape
        for _, path, shape in _of_parts(config, lambda part, c: part.projections(c))
    }
    if config.vision is None:
        return shapes
    return shapes | config.vision.projection_shapes()


def layer_numbers(config: ModelConfig | DualConfig) -> dict[str, tuple[int, ...]]:
    """Returns the layers of every path of `projection_shapes`; a projector counts as layer 0."""
    if not isinstance(config, ModelConfig):
        return {path: tuple(range(depth)) for path, depth in config.depths().items()}
    of_parts = _of_parts(config, lambda part, c: part.projections(c))
    of_encoders = {} if config.vision is None else config.vision.depths()
    numbers = {path: stack.layers for stack, path, _ in of_parts}
    return numbers | {path: tuple(range(depth)) for path, depth in of_encoders.items()}


def depths(config: ModelConfig | DualConfig) -> dict[str, int]:
    """Returns the number of stacked layers by path of `projection_shapes`; 1 for a projector."""
    return {path: len(numbers) for path, numbers in layer_numbers(config).items()}


def gate_blocks(config: ModelConfig) -> Gates:
    """Returns channel shape and activation of every FFN, by stacked path, the decoder's first.

    Example (Llama): ``{"layers/ffn": ((L, F), "silu")}``.
    """
    blocks: Gates = {
        path: ((len(stack.layers), *shape), activation)
        for stack, path, (shape, activation) in _of_parts(
            config, lambda part, c: part.gates(c)
        )
    }
    if config.vision is None:
        return blocks
    return blocks | config.vision.gate_blocks()
