"""A run's adapters on a model: their spec and their initial values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common.trees import flatten, match_rules, unflatten
from nalora_jax.config import RunConfig
from nalora_jax.config.settings import FULL
from nalora_jax.errors import NaloraError
from nalora_jax.method.low_rank import init_a
from nalora_jax.method.tuned import TUNED
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import (
    depths,
    layer_numbers,
    param_shapes,
    projection_shapes,
    stacks,
)
from nalora_jax.models.targets import (
    SCORE,
    TOKEN_ROWS,
    TOKEN_TABLES,
    AdapterSpec,
    TargetSpec,
    layer_path,
    resolve,
)

_ADALORA_STD = 0.02  # standard deviation of AdaLoRA's A and B, as in PEFT
_SCORE_STD = 0.02  # of a new head, as in transformers


def adapter_spec(config: RunConfig, base: ModelConfig) -> AdapterSpec:
    """Returns the adapters that a run's rules select on a model.

    The projections of an image tower and its projector are included.

    Raises:
      NaloraError: a rule has no match, or asks for an impossible rank, or an array cannot be
        trained.
    """
    tuned = select_tuned(config.tune, base)
    if not config.has_adapters:
        return AdapterSpec(tuned=tuned)
    spec = resolve(config.lora, projection_shapes(base), layer_numbers(base))
    return replace(
        spec,
        adalora=config.adalora.target_rank > 0,
        zero_a=config.lora.init == "zero_a",
        tuned=tuned,
    )


# Arrays of a decoder that have a gradient.
_TUNABLE = re.compile(
    r"_proj/(kernel|bias)$|norm/scale$|^embed/embedding$|^lm_head/kernel$"
)


def select_tuned(
    patterns: Sequence[str], base: ModelConfig
) -> tuple[tuple[str, tuple[bool, ...]], ...]:
    """Returns the arrays of a model that ``--tune`` selects, as in `AdapterSpec.tuned`.

    Raises:
      NaloraError: a pattern that matches nothing, or an array that cannot be trained.
    """
    if not patterns:
        return ()
    if tuple(patterns) == (FULL,):
        patterns = ("",)
    # Path of each layer's array -> its path in ``params`` and its number in the stack.
    places: dict[str, tuple[str, int]] = {}
    depths_of = {}
    for path, shape in param_shapes(base).items():
        layers: Sequence[int] = (0,)
        names = [path]
        if path.startswith("layers/"):
            layers = range(shape[0])
            names = [layer_path(path, number) for number in _numbers(base, path)]
        depths_of[path] = len(layers)
        places |= {name: (path, i) for i, name in zip(layers, names, strict=True)}
    rules = [(pattern, True) for pattern in patterns]
    chosen: dict[str, list[bool]] = {}
    for name in match_rules(rules, places, where="--tune"):
        path, layer = places[name]
        chosen.setdefault(path, [False] * depths_of[path])[layer] = True
    _check_tunable(chosen, base)
    return tuple(
        (path, () if all(layers) else tuple(layers))
        for path, layers in sorted(chosen.items())
    )


def _numbers(base: ModelConfig, path: str) -> tuple[int, ...]:
    """Returns the layers of a stacked array."""
    for stack in stacks(base):
        if path.startswith(f"{stack.prefix}/"):
            return tuple(stack.layers)
    raise AssertionError(path)


def _check_tunable(paths: Iterable[str], base: ModelConfig) -> None:
    """Checks that every array has a gradient.

    Raises:
      NaloraError: arrays that the step reads as constants.
    """
    experts = {path for path, shape in param_shapes(base).items() if len(shape) > 3}
    constant = [p for p in paths if p in experts or not _TUNABLE.search(p)]
    if base.vision is not None:
        constant = sorted(paths)
    if constant:
        raise NaloraError(
            "--tune",
            expected="projections, biases, norms, embedding and head of a model of dense text "
            "layers",
            found=f"{', '.join(constant[:4])} ({base.model_type})",
            remedy="name other arrays, or train adapters",
        )


def init_lora(
    config: ModelConfig,
    spec: AdapterSpec,
    key: jax.Array,
    params: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns fresh adapters that leave the base model's output unchanged.

    A is random and B is zero, or B is Gaussian and A is zero; for AdaLoRA the diagonal is zero.

    Args:
      config: the model.
      spec: projections and ranks; a layer's A is zero beyond its own rank.
      key: random key.
      params: base weights, needed for DoRA's magnitudes and for trained tables or table rows.

    Raises:
      NaloraError: a token id without a row in the tables; see `check_token_indices`.
    """
    check_token_indices(spec, config)
    base = flatten(params or {})
    shapes = projection_shapes(config)
    kernels = {path: (depth, *shapes[path]) for path, depth in depths(config).items()}
    leaves = fresh_adapters(spec, kernels, key, base)
    for name in spec.saved:
        if TOKEN_TABLES[name] in base:
            table = base[TOKEN_TABLES[name]]
        else:
            table = base[TOKEN_TABLES["embed_tokens"]].T
        leaves[TOKEN_TABLES[name]] = table.astype(jnp.float32)
    for name, ids in spec.own_rows(tied=config.tie_embeddings).items():
        if name == "lm_head" and not config.tie_embeddings:
            rows = jnp.take(base[TOKEN_TABLES[name]], np.array(ids), axis=1).T
        else:
            rows = jnp.take(base[TOKEN_TABLES["embed_tokens"]], np.array(ids), axis=0)
        leaves[TOKEN_ROWS[name]] = rows.astype(jnp.float32)
    for path, _ in spec.tuned:
        leaves[f"{TUNED}/{path}"] = _float32(base[path])
    if spec.score:
        # No adapter has this number, so none has the same key.
        of_score = jax.random.fold_in(key, len(spec.targets))
        shape = (config.d_model, spec.score)
        leaves[SCORE] = _SCORE_STD * jax.random.normal(of_score, shape)
    return unflatten(leaves)


def _float32(weight: jax.Array) -> jax.Array:
    """Returns a copy in float32, which a step may donate."""
    return jnp.array(weight, jnp.float32)


def adapter_shapes(config: ModelConfig, spec: AdapterSpec) -> Any:
    """Returns the shapes of `init_lora`, which needs no weights for them."""
    weights = {
        path: jax.ShapeDtypeStruct(shape, "float32")
        for path, shape in param_shapes(config).items()
    }
    return jax.eval_shape(
        partial(init_lora, config, spec), jax.random.key(0), unflatten(weights)
    )


def fresh_adapters(
    spec: AdapterSpec,
    kernels: Mapping[str, tuple[int, ...]],
    key: jax.Array,
    base: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """Returns the adapters of `init_lora` by path.

    Args:
      spec: projections and ranks.
      kernels: shape of every stacked kernel, ``(layers, ..., d_in, d_out)``, by path.
      key: random key.
      base: base weights by path, for DoRA's magnitudes.
    """
    shapes = tuple(kernels[path] for path, _ in spec.targets)
    leaves: dict[str, jax.Array] = _factors(
        spec.targets, shapes, key, spec.adalora, spec.zero_a
    )
    if spec.dora:
        for path, _ in spec.targets:
            kernel = base[f"{path}/kernel"].astype(jnp.float32)
            leaves[f"{path}/magnitude"] = jnp.linalg.norm(kernel, axis=-2)
    return leaves


def check_token_indices(
    spec: AdapterSpec,
    config: ModelConfig,
    where: str = "--lora.trainable-token-indices",
    remedy: str = "",
) -> None:
    """Raises an error for token ids without a table row, or with a table that is trained entirely.

    Args:
      spec: the adapters.
      config: the model.
      where: name of the setting or of the file's field, for the message.
      remedy: how to fix ids that are too large, for the message.

    Raises:
      NaloraError: an id beyond the vocabulary, or a table that is also listed in ``saved``.
    """
    for name, ids in spec.token_indices:
        beyond = [token_id for token_id in ids if not 0 <= token_id < config.vocab_size]
        if beyond:
            expected = f"token ids of the {config.vocab_size} rows of {name}, from 0"
            found = ", ".join(map(str, beyond[:5]))
            raise NaloraError(where, expected=expected, found=found, remedy=remedy)
    both = {name for name, _ in spec.token_indices}
    if spec.head_rows(tied=config.tie_embeddings):
        both.add("lm_head")
    if both := both & set(spec.saved):
        expected = (
            "rows of tables that modules_to_save does not name "
            "(a tied head has the embedding's rows)"
        )
        found = f"rows of {' and '.join(sorted(both))}, trained as a whole"
        remedy = "name a table in one of the two"
        raise NaloraError(where, expected=expected, found=found, remedy=remedy)


@partial(jax.jit, static_argnums=(0, 1, 3, 4))
def _factors(
    targets: tuple[tuple[str, TargetSpec], ...],
    shapes: tuple[tuple[int, ...], ...],
    key: jax.Array,
    adalora: bool,
    zero_a: bool,
) -> dict[str, jax.Array]:
    """Returns the initial leaves by path.

    They are ``a [..., d_in, rank]``, ``b [..., rank, d_out]`` and, for AdaLoRA, ``singular [...,
    rank]``.

    ``shapes`` are the shapes of the targets' kernels. Ranks that a layer does not use are zeros;
    with ``zero_a``, b is drawn instead of a.
    """
    leaves = {}
    for i, ((path, target), (*lead, d_in, d_out)) in enumerate(
        zip(targets, shapes, strict=True)
    ):
        # bool [..., rank]
        used = target.used((*lead, target.rank))
        of_a = (*lead, d_in, target.rank)
        of_b = (*lead, target.rank, d_out)
        a = jnp.zeros(of_a)
        b = jnp.zeros(of_b)
        key_a = jax.random.fold_in(key, i)
        if adalora:
            key_a, key_b = jax.random.split(key_a)
            a = _ADALORA_STD * jax.random.normal(key_a, of_a)
            b = _ADALORA_STD * jax.random.normal(key_b, of_b)
            leaves[f"{path}/singular"] = jnp.zeros((*lead, target.rank), jnp.float32)
        elif zero_a:
            # the standard deviation of `init_a`, which is uniform in +-1/sqrt(d_in)
            b = jax.random.normal(key_a, of_b) / math.sqrt(3 * d_in)
        else:
            a = init_a(key_a, of_a)
        leaves[f"{path}/a"] = jnp.where(used[..., None, :], a, 0.0)
        leaves[f"{path}/b"] = jnp.where(used[..., None], b, 0.0)
    return leaves


def merged_kernel(
    kernel: Any, a: Any, b: Any, scale: Any, magnitude: Any = None
) -> Any:
    """Returns ``W + s A B`` in float32; with DoRA's magnitude m, ``m (W + s A B) / |W + s A B|``.

    Arguments are arrays of NumPy or of JAX, and so is the result.

    Args:
      kernel: W, ``[..., d_in, d_out]``.
      a: ``[..., d_in, r]``.
      b: ``[..., r, d_out]``.
      scale: s.
      magnitude: None or ``[..., d_out]``; the norm is over the inputs of each output.
    """
    arrays: Any = jnp
    if isinstance(a, np.ndarray):
        arrays = np
        product = a @ b
    else:
        product = jnp.matmul(a, b, precision="highest")
    merged = kernel.astype(np.float32) + scale * product
    if magnitude is None:
        return merged
    return merged * arrays.expand_dims(
        magnitude / arrays.linalg.norm(merged, axis=-2), -2
    )


def pad_rank(a: Any, b: Any, rank: int) -> tuple[Any, Any]:
    """Zero-pads ``a [..., d_in, r]`` and ``b [..., r, d_out]``, of NumPy or of JAX, to ``rank``."""
    arrays: Any = np if isinstance(a, np.ndarray) else jnp
    lead = [(0, 0)] * (a.ndim - 2)
    missing = (0, rank - a.shape[-1])
    return arrays.pad(a, [*lead, (0, 0), missing]), arrays.pad(
        b, [*lead, missing, (0, 0)]
    )
