"""Log metrics of a train state: histograms of the mechanisms' factors, and update norms.

They are a separate small program that runs at log steps only, so other steps have no extra cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nalora_jax.common import trees
from nalora_jax.mesh.distributed import replicated_sharding
from nalora_jax.method.step import TrainState
from nalora_jax.method.transform import Mechanisms, own_factors
from nalora_jax.models.targets import AdapterSpec


class StateMetrics:
    """Metrics of one run's states.

    Args:
      mechanisms: the run's mechanisms.
      spec: its adapters.
      mesh: the mesh of its states.
    """

    def __init__(self, mechanisms: Mechanisms, spec: AdapterSpec, mesh: Mesh) -> None:
        self.mechanisms = mechanisms
        self.spec = spec
        self._compiled = jax.jit(self.compute, out_shardings=replicated_sharding(mesh))

    def compile_ahead(self, state: TrainState) -> None:
        """Compiles for states like this one, so that no step's tokens/s includes this time."""
        self._compiled.lower(state).compile()

    def measure(self, state: TrainState) -> dict[str, Any]:
        """Returns metrics of ``state`` in host memory; all processes have to call it.

        Returns:
          ``histograms``: by label of a mechanism its ``edges`` [B] and ``counts`` [layers, B + 1].
            They count the channels by the mechanism's factor of the next step: below the first
            edge, between adjacent edges, and at or above the last one. Layers of several blocks are
            concatenated, channels of experts are counted together.
          ``adapters``: by path the Frobenius norm of ``s A B`` of every layer, [layers]; of all
            experts together.
          ``ranks``: with AdaLoRA, by path the remaining ranks of each layer, [layers]; of all
            experts together.
        """
        return self.record(*jax.device_get(self._compiled(state)))

    def record(self, counts: Any, norms: Any, ranks: Any) -> dict[str, Any]:
        """Returns the result of `compute`, in host memory, as `measure` does."""
        bins = {label: mechanism.bins for label, mechanism in self.mechanisms.entries}
        histograms = {
            label: {"edges": bins[label], "counts": count}
            for label, count in counts.items()
        }
        metrics = {"histograms": histograms, "adapters": norms}
        if ranks:
            metrics["ranks"] = ranks
        return metrics

    def compute(
        self, state: TrainState
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns counts of factors, norms and ranks of ``state``; not compiled."""
        factors = {}
        if state.gate is not None:
            factors = own_factors(state.gate, self.mechanisms)
        bins = {label: mechanism.bins for label, mechanism in self.mechanisms.entries}
        counts = {}
        for label, of_blocks in factors.items():
            histograms = [
                factor_histogram(factor, bins[label]) for factor in of_blocks.values()
            ]
            counts[label] = jnp.concatenate(histograms)
        used = {}
        if self.spec.adalora:
            used = trees.flatten(state.opt_state.kept)
        ranks = {
            path.removesuffix("/singular"): jnp.sum(_rows(leaf), axis=1)
            for path, leaf in used.items()
        }
        return counts, adapter_norms(trees.flatten(state.lora), self.spec), ranks


def _rows(leaf: jax.Array) -> jax.Array:
    """Reshapes [layers, ...] to [layers, n]."""
    return leaf.reshape(leaf.shape[0], -1)


def factor_histogram(factor: jax.Array, edges: tuple[float, ...]) -> jax.Array:
    """Counts each layer's channels below the first edge, between edges, and at or above the last.

    Args:
      factor: [layers, ..., d_ff].
      edges: [B], increasing; a value on an edge counts as above it.

    Returns:
      [layers, B + 1] int32.
    """
    rows = _rows(factor)
    # [layers, B]: channels at or above each edge.
    reached = jnp.sum(
        rows[:, None, :] >= np.asarray(edges, np.float32)[None, :, None],
        axis=-1,
        dtype=jnp.int32,
    )
    full = jnp.full((len(rows), 1), rows.shape[1], jnp.int32)
    empty = jnp.zeros((len(rows), 1), jnp.int32)
    # Bin counts are differences of adjacent cumulative counts.
    return -jnp.diff(jnp.concatenate([full, reached, empty], axis=1), axis=1)


def adapter_norms(
    leaves: Mapping[str, jax.Array], spec: AdapterSpec
) -> dict[str, jax.Array]:
    """Returns the Frobenius norm of ``s A B`` of every layer, by path: [layers] float32.

    ``A B``, as large as the kernel, is never formed: its squared norm is the sum of the elements of
    ``(A^T A) * (B B^T)``, both [r, r].

    Args:
      leaves: adapters by path: ``<path>/a`` [layers, ..., d_in, r] and ``<path>/b`` [layers, ...,
        r, d_out]; AdaLoRA's ``<path>/singular`` [layers, ..., r].
      spec: the adapted projections.
    """
    norms = {}
    for path, _ in spec.targets:
        a = leaves[f"{path}/a"]
        b = leaves[f"{path}/b"]
        if spec.adalora:
            a = a * leaves[f"{path}/singular"][..., None, :]
        of_a = jnp.einsum("l...dr,l...ds->l...rs", a, a, precision="highest")
        of_b = jnp.einsum("l...rd,l...sd->l...rs", b, b, precision="highest")
        # Sums the experts' axes, too.
        squared = jnp.sum(of_a * of_b, axis=tuple(range(1, a.ndim)))
        # Rounding may give a small negative sum.
        norms[path] = jnp.asarray(spec.scales(path)) * jnp.sqrt(
            jnp.maximum(squared, 0.0)
        )
    return norms


def non_finite(state: Any) -> list[str]:
    """Returns the paths of the floating-point arrays with NaN or infinity, e.g.
    ``["opt_state/0/mu/..."]``.

    Reads the state once and fetches once; every process has to call it.
    """
    floats = {
        path: leaf
        for path, leaf in trees.flatten(state).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    if not floats:
        return []
    finite_leaves = jax.device_get(_all_finite(list(floats.values())))
    return [
        path for path, finite in zip(floats, finite_leaves, strict=True) if not finite
    ]


def first_bad_row(array: jax.Array) -> int:
    """Returns the first index of axis 0 with NaN or infinity: the layer, in an array of stacked
    layers."""
    return int(jax.device_get(_first_bad_row(jnp.atleast_1d(array))))


@jax.jit
def _first_bad_row(array: jax.Array) -> jax.Array:
    """Returns the first index of axis 0 with a non-finite value, int32 []; 0 if there is none."""
    return jnp.argmin(jnp.isfinite(array).all(axis=tuple(range(1, array.ndim))))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    """Returns bool [leaves]: True for leaves without NaN and infinity."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
