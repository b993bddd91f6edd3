"""The layers of a decoder as stacks: layers of one kind are stored along a leading axis.

A model whose layers are all alike has one stack, ``layers``. Otherwise the layers are divided into
groups, each of which repeats a period of kinds. Every position of a period is a stack. The division
compiles the fewest layers. Examples (D: dense, M: mixture, L: linear attention, A: attention)::

    D M M M M          group0 repeats D once, group1 repeats M 4 times
                       layers/group0/block0: layer 0;      layers/group1/block0: layers 1, 2, 3, 4
    L L L A L L L A    group0 repeats L L L A twice
                       layers/group0/block0: layers 0, 4;  ...; layers/group0/block3: layers 3, 7

Paths of a uniform model name an array of any model together with a layer's number: `locate` maps
``("layers/ffn/gate_proj", 5)`` to the stack's path and the index on its leading axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nalora_jax.models.config import ModelConfig
from nalora_jax.models.parts import Part
from nalora_jax.models.paths import uniform_path

Shapes = dict[str, tuple[int, ...]]


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
            stacks.append(Stack(f"layers/group{number}/block{position}", _of_kind(config, layers), layers))
        divided.append(tuple(stacks))
    return tuple(divided)


def stacks(config: ModelConfig) -> tuple[Stack, ...]:
    """Returns all stacks of a decoder."""
    return tuple(stack for group in groups(config) for stack in group)


def key_heads(config: ModelConfig) -> int:
    """Returns the largest number that divides the key/value heads of every attention layer."""
    return math.gcd(*(stack.config.n_kv_heads for stack in stacks(config) if stack.config.attends))


def _of_kind(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Returns the uniform config of some layers of one kind."""
    overrides = dict(config.kinds[config.layer_kinds[layers[0]]])
    if config.windows and "windows" not in overrides:
        overrides["windows"] = tuple(config.windows[layer] for layer in layers)
    if config.rope_index and "ropes" not in overrides:
        overrides["rope_index"] = tuple(config.rope_index[layer] for layer in layers)
    return replace(config, kinds=(), layer_kinds=(), n_layers=len(layers), sight=None, **overrides)


def _divide(kinds: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns (start, end, period) of consecutive groups with the smallest sum of periods.

    Of several such divisions the one with the fewest groups is taken.
    """
    best: list[tuple[tuple[int, int], list[tuple[int, int, int]]]] = [((0, 0), [])]
    for end in range(1, len(kinds) + 1):
        options = []
        for start in range(end):
            (cost, count), division = best[start]
            period = _period(kinds[start:end])
            options.append(((cost + period, count + 1), [*division, (start, end, period)]))
        best.append(min(options))
    return best[-1][1]


def _period(kinds: Sequence[int]) -> int:
    """Returns the length of the shortest period that repeats without a remainder."""
    n = len(kinds)
    return next(p for p in range(1, n + 1) if n % p == 0 and kinds[p:] == kinds[:-p])


# ---------------------------------------------------------------- names


@functools.cache
def locate(config: ModelConfig) -> Mapping[tuple[str, int], tuple[str, int]]:
    """Returns stacked path and index of every projection by its uniform path and layer number."""
    numbers = layer_numbers(config)
    return {(uniform_path(path), n): (path, i) for path in numbers for i, n in enumerate(numbers[path])}


# ---------------------------------------------------------------- shapes


def param_shapes(config: ModelConfig) -> Shapes:
    """Returns the shape of every base parameter by path, layers stacked.

    Example (Llama, tied):
      ``{"embed/embedding": (V, D), "layers/attn/q_proj/kernel": (L, D, H * hd), ..., "final_norm/scale": (D,)}``
    """
    d, v = config.d_model, config.vocab_size
    shapes: Shapes = {"embed/embedding": (v, d)}
    for stack in stacks(config):
        of_layer = _layer_shapes(stack.config).items()
        shapes |= {f"{stack.prefix}/{path}": (len(stack.layers), *shape) for path, shape in of_layer}
    if config.layer_embeddings is not None:
        shapes |= config.layer_embeddings.param_shapes(config)
    shapes["final_norm/scale"] = (d,)
    if not config.tie_embeddings:
        shapes["lm_head/kernel"] = (d, v)
    if config.sight is not None:
        shapes |= config.sight.param_shapes()
    return shapes


def projection_shapes(config: ModelConfig) -> Shapes:
    """Returns per-layer kernel shapes of all projections that can be adapted, by stacked path.

    Kernels of experts have a leading axis ``[experts]``.

    Example:
      ``{"layers/attn/q_proj": (576, 576), ..., "layers/ffn/gate_proj": (576, 1536)}``
    """
    shapes: Shapes = {}
    for stack in stacks(config):
        shapes |= {f"{stack.prefix}/{name}": shape for name, shape in _projections(stack.config).items()}
    if config.sight is not None:
        shapes |= config.sight.projection_shapes()
    return shapes


def layer_numbers(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the layers of every path of `projection_shapes`; a projector counts as layer 0."""
    numbers = {
        f"{stack.prefix}/{name}": stack.layers
        for stack in stacks(config)
        for name in _projections(stack.config)
    }
    if config.sight is not None:
        numbers |= {path: tuple(range(depth)) for path, depth in config.sight.depths().items()}
    return numbers


def depths(config: ModelConfig) -> dict[str, int]:
    """Returns the number of stacked layers by path of `projection_shapes`; 1 for a projector."""
    return {path: len(numbers) for path, numbers in layer_numbers(config).items()}


def gate_blocks(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns channel shape and activation of every FFN, by stacked path, the decoder's first.

    Example (Llama): ``{"layers/ffn": ((L, F), "silu")}``.
    """
    blocks: dict[str, tuple[tuple[int, ...], str]] = {}
    for stack in stacks(config):
        for name, (shape, activation) in _gates(stack.config).items():
            blocks[f"{stack.prefix}/{name}"] = ((len(stack.layers), *shape), activation)
    if config.sight is not None:
        blocks |= config.sight.gate_blocks()
    return blocks


# ---------------------------------------------------------------- one layer of a uniform config


def _layer_shapes(config: ModelConfig) -> Shapes:
    norms = []
    if config.pre_norm:
        norms += ["attn_norm", "ffn_norm"]
    if config.post_norm:
        norms += ["attn_post_norm", "ffn_post_norm"]
    shapes: Shapes = {f"{name}/scale": (config.d_model,) for name in norms}
    for component in _parts(config):
        shapes |= {
            f"{component.name}/{path}": shape for path, shape in component.param_shapes(config).items()
        }
    if config.mixer is None:
        shapes |= _qk_norm_shapes(config)
        if config.attn_sinks:
            shapes["attn/sinks"] = (config.n_heads,)
    if config.n_experts and config.ffn is None:
        shapes["ffn/router/kernel"] = (config.d_model, config.n_experts)
        if config.router_bias:
            shapes["ffn/router/bias"] = (config.n_experts,)
    for path, shape in (_attention(config) | _feed_forward(config)).items():
        shapes[f"{path}/kernel"] = shape
        if _has_bias(config, path):
            shapes[f"{path}/bias"] = (*shape[:-2], shape[-1])
    return shapes


def _qk_norm_shapes(config: ModelConfig) -> Shapes:
    if not config.qk_norm:
        return {}
    heads = {"q": config.n_heads, "k": config.n_kv_heads}
    if config.qk_norm != "projection":
        heads = dict.fromkeys(heads, 1)
    return {f"attn/{name}_norm/scale": (count * config.head_dim,) for name, count in heads.items()}


def _has_bias(config: ModelConfig, path: str) -> bool:
    if path.startswith("ffn/"):
        return config.ffn_bias
    return config.has_bias(path.removeprefix("attn/"))


def _projections(config: ModelConfig) -> Shapes:
    shapes = _attention(config) | _feed_forward(config)
    for component in _parts(config):
        shapes |= {
            f"{component.name}/{name}": shape for name, shape in component.projections(config).items()
        }
    return shapes


def _parts(config: ModelConfig) -> list[Part]:
    return [component for component in (config.mixer, config.ffn, config.tail) if component is not None]


def _attention(config: ModelConfig) -> Shapes:
    if config.mixer is not None:
        return {}
    d, q, kv = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    gated = 1 + config.attn_gate
    shapes = {"q_proj": (d, gated * q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
    return {f"attn/{name}": shape for name, shape in shapes.items()}


def _feed_forward(config: ModelConfig) -> Shapes:
    if config.ffn is not None:
        return {}
    d, f = config.d_model, config.d_ff
    shapes = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
    if not config.gated:
        shapes = {"in_proj": (d, f), "out_proj": (f, d)}
    return {f"ffn/{name}": (*_experts(config), *shape) for name, shape in shapes.items()}


def _experts(config: ModelConfig) -> tuple[int, ...]:
    if not config.n_experts:
        return ()
    return (config.n_experts,)


def _gates(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns channel shape and activation of each gated block of a layer, by path."""
    gates = {}
    if config.ffn is None:
        gates = {"ffn": ((*_experts(config), config.d_ff), config.activation)}
    for component in (config.ffn, config.tail):
        if component is not None:
            of_component = component.gates(config).items()
            gates |= {f"{component.name}/{name}".removesuffix("/"): gate for name, gate in of_component}
    return gates
