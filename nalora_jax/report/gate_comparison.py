"""How two runs moved the gates of one base: the table of ``nalora inspect --against``.

Both models and their base read the same texts. With z0 a gate's pre-activation in the base and z in
a trained model, its gate has moved by ``phi(z) - phi(z0) = F + S``: the feature term
``F = rho(z0) (z - z0)`` that a linear view of the layer promises, and the selection term
``S = (rho(z) - rho(z0)) z`` (`nalora_jax.method.statistics`). z includes what the layers below have
changed. A gate is open if z > 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from textwrap import fill
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common import trees
from nalora_jax.errors import NaloraError
from nalora_jax.loading.adapted import AdaptedModel
from nalora_jax.method.activations import Activation, get_activation
from nalora_jax.method.ffn import PREACTIVATIONS
from nalora_jax.method.statistics import gate_decomposition
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import gate_blocks
from nalora_jax.report.inspect import batches_of_texts
from nalora_jax.report.tables import number, text_table

COMPARISON_CAPTION = (
    "Sums over tokens and channels of a layer, relative to the base. misalignment: sum|S| / "
    "sum|F|, of the model and of the reference. feature, selection: cosine of the model's F, or "
    "S, with the reference's. size: sum|F| of the model over the reference's. opened: share of "
    "gates that the reference opened or closed. followed: share of these that the model moved to "
    "the same side. homogeneity: mean |h - h of the reference|, h = 1 + z rho'/rho within 8 of 0."
)


@dataclass(frozen=True)
class GateComparison:
    """The movements of a model's gates beside a reference's, ``[layers]`` each."""

    misalignment: np.ndarray
    misalignment_of_reference: np.ndarray
    feature: np.ndarray  # cosine
    selection: np.ndarray  # cosine
    size: np.ndarray
    opened: np.ndarray
    followed: np.ndarray
    homogeneity: np.ndarray

    def to_dict(self) -> dict[str, list[float]]:
        """Returns lists, for JSON."""
        return {name: values.tolist() for name, values in vars(self).items()}


def compare_gates(
    model: AdaptedModel,
    reference: AdaptedModel,
    texts: Sequence[str],
    *,
    max_length: int = 256,
) -> dict[str, GateComparison]:
    """Returns the comparison of every gated block, by path (``layers/ffn``).

    Args:
      model: a base with an adapter.
      reference: the same base with another adapter, or with trained weights.
      texts: read by both.
      max_length: tokens of a text.

    Raises:
      NaloraError: the model has no adapter, or the two have other shapes.
    """
    if model.located.adapter is None:
        raise NaloraError(
            "nalora inspect --against",
            expected="a model with an adapter, whose base is the origin of both",
            found=model.located.base,
            remedy="give the folder of the run with the adapter first",
        )
    shape = (model.base.config.d_model, gate_blocks(model.base.config))
    if shape != (reference.base.config.d_model, gate_blocks(reference.base.config)):
        raise NaloraError(
            "--against",
            expected=f"a run of {model.located.base}",
            found=f"{reference.located.base}, a model of another shape",
        )
    sums: dict[str, Any] = {}
    for tokens, segments in batches_of_texts(model.base.tokenizer, texts, max_length):
        arrays = (jnp.asarray(tokens), jnp.asarray(segments))
        start = _preactivations(
            Decoder(model.base.config), {"params": model.base.params}, *arrays
        )
        ours = _preactivations(model.module, model.variables, *arrays)
        theirs = _preactivations(reference.module, reference.variables, *arrays)
        for path, z0 in start.items():
            activation = get_activation(gate_blocks(model.base.config)[path][1])
            of_batch = _sums(z0, ours[path], theirs[path], arrays[1] > 0, activation)
            if path in sums:
                of_batch = jax.tree.map(np.add, sums[path], of_batch)
            sums[path] = jax.device_get(of_batch)
    if not sums:
        raise NaloraError(
            "nalora inspect --against",
            expected="a model with dense self-gated blocks",
            found=model.base.config.model_type,
        )
    return {path: _comparison(of_block) for path, of_block in sums.items()}


def _preactivations(
    module: Decoder,
    variables: Mapping[str, Any],
    tokens: jax.Array,
    segments: jax.Array,
) -> dict[str, jax.Array]:
    """Returns z of every dense gated block, ``[layers, rows, seq, d_ff]``, by its path."""
    plain = module.clone(remat="none")
    _, found = _apply(plain, dict(variables), tokens, segments)
    paths = {}
    for path, leaf in trees.flatten(
        found.get(PREACTIVATIONS, {}), lambda x: isinstance(x, tuple)
    ).items():
        paths[path.removesuffix("/z")] = leaf[0]
    return paths


@partial(jax.jit, static_argnums=0)
def _apply(
    module: Decoder, variables: Any, tokens: jax.Array, segments: jax.Array
) -> Any:
    """Returns the hidden states and the collection of pre-activations."""
    return module.apply(
        variables, tokens, segment_ids=segments, mutable=[PREACTIVATIONS]
    )


@partial(jax.jit, static_argnums=4)
def _sums(
    z0: jax.Array,
    ours: jax.Array,
    theirs: jax.Array,
    real: jax.Array,
    activation: Activation,
) -> dict[str, jax.Array]:
    """Returns sums over real tokens and channels, ``[layers]`` each.

    Args:
      z0, ours, theirs: pre-activations ``[layers, rows, seq, d_ff]`` of base, model and reference.
      real: bool ``[rows, seq]``.
      activation: of the block.
    """
    weight = jnp.broadcast_to(real[None, :, :, None], z0.shape).astype(jnp.float32)

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(values * weight, axis=(1, 2, 3))

    feature, selection = gate_decomposition(z0, ours - z0, activation)
    their_feature, their_selection = gate_decomposition(z0, theirs - z0, activation)
    moved = (theirs > 0) != (z0 > 0)
    followed = moved & ((ours > 0) == (theirs > 0))
    return {
        "count": total(jnp.ones_like(z0)),
        "feature": total(jnp.abs(feature)),
        "selection": total(jnp.abs(selection)),
        "their_feature": total(jnp.abs(their_feature)),
        "their_selection": total(jnp.abs(their_selection)),
        "feature_squares": total(feature**2),
        "selection_squares": total(selection**2),
        "their_feature_squares": total(their_feature**2),
        "their_selection_squares": total(their_selection**2),
        "feature_product": total(feature * their_feature),
        "selection_product": total(selection * their_selection),
        "moved": total(moved.astype(jnp.float32)),
        "followed": total(followed.astype(jnp.float32)),
        "homogeneity": total(
            jnp.abs(_homogeneity(ours, activation) - _homogeneity(theirs, activation))
        ),
    }


def _homogeneity(z: jax.Array, activation: Activation) -> jax.Array:
    """Returns ``h = 1 + z rho' / rho``, limited to [-8, 8]: rho vanishes far below 0."""
    rho, slope = activation.gate(z)
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.clip(1 + z * slope / jnp.maximum(rho, tiny), -8, 8)


def _comparison(sums: Mapping[str, np.ndarray]) -> GateComparison:
    """Returns the figures of a block from its sums."""

    def cosine(name: str) -> np.ndarray:
        squares = sums[f"{name}_squares"] * sums[f"their_{name}_squares"]
        return sums[f"{name}_product"] / np.sqrt(squares)

    with np.errstate(divide="ignore", invalid="ignore"):
        return GateComparison(
            misalignment=sums["selection"] / sums["feature"],
            misalignment_of_reference=sums["their_selection"] / sums["their_feature"],
            feature=cosine("feature"),
            selection=cosine("selection"),
            size=sums["feature"] / sums["their_feature"],
            opened=sums["moved"] / sums["count"],
            followed=sums["followed"] / sums["moved"],
            homogeneity=sums["homogeneity"] / sums["count"],
        )


def comparison_table(comparisons: Mapping[str, GateComparison], title: str) -> str:
    """Returns the comparison as a table for the terminal, with the mean over layers last."""
    names = [field.name for field in fields(GateComparison)]
    rows = list(_rows(comparisons, names))
    columns = np.array([row[1:] for row in rows], float)
    shown = [[label, *map(_cell, values)] for label, *values in rows]
    shown.append(["mean", *map(_cell, np.nanmean(columns, axis=0))])
    heads = [name.replace("misalignment_of_", "of ") for name in names]
    table = text_table(["layer", *heads], shown)
    return "\n".join([title, table, fill(COMPARISON_CAPTION, 100)])


def _rows(
    comparisons: Mapping[str, GateComparison], names: Sequence[str]
) -> Iterator[list[Any]]:
    """Yields label and figures of every layer."""
    for path, comparison in comparisons.items():
        block = path.removeprefix("layers/").removesuffix("ffn").strip("/")
        columns = [getattr(comparison, name) for name in names]
        for layer, values in enumerate(zip(*columns, strict=True)):
            yield [f"{block} {layer}".strip(), *values]


def _cell(value: float) -> str:
    """Returns a number with four decimals, or a dash."""
    return number(float(value), 4)
