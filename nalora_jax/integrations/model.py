"""The common base of adapted Linen and NNX models.

The user's tree is never modified. Adapters are a separate tree with the keymap's names. During one
call they are placed next to their kernels, so that they pass through all transformations of the
module's parameters (``nn.scan``, ``nn.remat``, ``nn.vmap``). Statistics are returned the same way,
as the gradient of a zero leaf, since there is no other way to get values out of a scan that does
not return them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from nalora_jax import trees
from nalora_jax.dense import init_a
from nalora_jax.errors import NaloraError
from nalora_jax.integrations.layers import check_merged, holds_numbers
from nalora_jax.integrations.targets import Target, flat_shape
from nalora_jax.measurement import GateStatsConfig, Probe, gate_statistics
from nalora_jax.method import activations
from nalora_jax.method.low_rank import residual
from nalora_jax.method.optimizer import find_gates
from nalora_jax.ops import reductions


@dataclass(frozen=True)
class Foreign(ABC):
    """A model with adapters; Linen and NNX models have the same methods.

    Attributes:
      targets: the adapted projections.
      stats: strides of the statistics.
    """

    targets: tuple[Target, ...]
    stats: GateStatsConfig

    @abstractmethod
    def _call(
        self, variables: Any, leaves: Mapping[str, Mapping[str, Any]], args: Any, options: Any
    ) -> Any:
        """Calls the user's model with ``leaves`` (by the user's path) next to its kernels."""

    @abstractmethod
    def _merged(self, variables: Any, lora: Any) -> Any:
        """Returns the user's variables with every adapter folded into its kernel."""

    @abstractmethod
    def _plain(self, variables: Any, args: Any, options: Any) -> Any:
        """Calls the user's model without adapters."""

    def merge(self, variables: Any, lora: Any, *args: Any, **options: Any) -> Any:
        """Returns the user's variables with every adapter folded into its kernel, for serving.

        Given the arguments of a call, the merged model's result is compared with `apply`. This
        detects a kernel that the model also reads outside of its layer. A Linen module uses its
        example if no arguments are given. The comparison is skipped under `jax.jit` and for shapes
        without values.

        Raises:
          NaloraError: the merged model's result differs from the adapted model's.
        """
        merged = self._merged(variables, lora)
        if not args:
            args, options = self._example
        if args and holds_numbers((variables, lora, args, options)):
            adapted = jax.jit(lambda v, a: self.apply(v, a, *args, **options))(variables, lora)
            run = jax.jit(lambda v: self._plain(v, args, options))
            check_merged(run(merged), adapted, run(variables))
        return merged

    @property
    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of an example call; empty if there is none."""
        return (), {}

    @property
    def gates(self) -> dict[str, str]:
        """The block of every adapted gate, as `nalora_jax.method.optimizer.nalora` takes it."""
        return find_gates(jax.eval_shape(self.init, jax.random.key(0)))

    @property
    def gate_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of the statistics of every block, as ``init_gate_state`` takes it."""
        return {
            block: (*t.projection.lead, math.prod(t.projection.outputs))
            for block, t in self._blocks.items()
        }

    @property
    def _blocks(self) -> dict[str, Target]:
        return {target.path.rpartition("/")[0]: target for target in self.targets if target.gate}

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns fresh float32 adapters, nested by the keymap's names: A random, B zero."""
        leaves: dict[str, jax.Array] = {}
        for target, target_key in zip(self.targets, jax.random.split(key, len(self.targets)), strict=True):
            lead, d_in, d_out = flat_shape(target.projection)
            leaves[f"{target.path}/a"] = init_a(target_key, (*lead, d_in, target.rank))
            leaves[f"{target.path}/b"] = jnp.zeros((*lead, target.rank, d_out), jnp.float32)
        return trees.unflatten(leaves)

    def apply(
        self,
        variables: Any,
        lora: Any,
        *args: Any,
        gate_mask: Mapping[str, jax.Array] | None = None,
        token_weights: jax.Array | None = None,
        taps: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Calls the user's model with its adapters.

        Args:
          variables: a Linen module's variables or an NNX model's state.
          lora: adapters.
          args: the model's arguments.
          gate_mask: masks by block for the gated gradient of A; they never change the result.
          token_weights: weights of the tokens in the statistics, shaped like the gates' input
            without its last axis.
          taps: zeros whose gradient is the statistics; see `gradients`.
          options: passed to the model.
        """
        flat = trees.flatten(lora)
        leaves: dict[str, dict[str, Any]] = {}
        for target in self.targets:
            factors = {name: flat[f"{target.path}/{name}"] for name in ("a", "b")}
            block = target.path.rpartition("/")[0]
            if target.gate and gate_mask is not None:
                factors["mask"] = gate_mask[block]
            if target.gate and taps is not None:
                factors["taps"] = taps[block]
                if token_weights is not None:
                    lead = target.projection.lead
                    factors["weights"] = jnp.broadcast_to(token_weights, (*lead, *token_weights.shape))
            leaves[target.projection.own] = factors
        return self._call(variables, leaves, args, options)

    def gradients(
        self,
        loss: Callable[[Callable[..., Any]], Any],
        variables: Any,
        lora: Any,
        *,
        gate_mask: Mapping[str, jax.Array] | None = None,
        token_weights: jax.Array | None = None,
        has_aux: bool = False,
    ) -> tuple[Any, Any, dict[str, dict[str, jax.Array]]]:
        """Returns the value, the gradients of the adapters, and the statistics of the gates.

        Args:
          loss: takes the adapted model as a function of the model's arguments, returns a scalar
            (with ``has_aux``, a pair of the scalar and auxiliary data).
          variables: see `apply`.
          lora: the adapters, with respect to which the loss is differentiated.
          gate_mask: per-channel factors of the gradient of the gates' A.
          token_weights: ``[batch, seq]``, 0 for padding.
          has_aux: as in `jax.value_and_grad`.

        Returns:
          The value, the gradients, and by block the sums that ``update_gate_state`` takes.
        """

        def run(lora: Any, taps: Any) -> Any:
            call = partial(
                self.apply, variables, lora, gate_mask=gate_mask, token_weights=token_weights, taps=taps
            )
            return loss(call)

        value, (grads, stats) = jax.value_and_grad(run, argnums=(0, 1), has_aux=has_aux)(lora, self._taps())
        return value, grads, stats

    def _taps(self) -> dict[str, dict[str, jax.Array]]:
        """Returns taps, zeros in the shapes of every block's statistics."""

        def zeros(target: Target) -> dict[str, jax.Array]:
            z = jax.ShapeDtypeStruct((1, math.prod(target.projection.outputs)), jnp.float32)
            weights = jax.ShapeDtypeStruct((1,), jnp.bool_)
            shapes = jax.eval_shape(lambda z, w: self._statistics(target.gate, z, z, w), z, weights)
            return jax.tree.map(
                lambda leaf: jnp.zeros((*target.projection.lead, *leaf.shape), jnp.float32), shapes
            )

        return {block: zeros(target) for block, target in self._blocks.items()}

    def _statistics(
        self, gate: str, base: jax.Array, delta: jax.Array, weights: jax.Array
    ) -> dict[str, jax.Array]:
        stride = self.stats.probe_stride
        probe = Probe(reductions.sampled(base, weights, stride), reductions.sampled(delta, weights, stride))
        stats = gate_statistics(base + delta, probe, weights, activations.get(gate), self.stats)
        return {name: value.astype(jnp.float32) for name, value in stats.items()}

    def _adapted(
        self, target: Target, x: jax.Array, base: jax.Array, leaves: Mapping[str, Any]
    ) -> jax.Array:
        """Returns the output of one call of a projection, with the adapter's output added.

        Args:
          target: the projection.
          x: ``[..., *inputs]``, the layer's input.
          base: ``[..., *outputs]``, the layer's output.
          leaves: ``a [d_in, r]``, ``b [r, d_out]`` and, for a gate, optionally ``mask``, ``taps``,
            ``weights``.
        """
        _, d_in, d_out = flat_shape(target.projection)
        rows = base.reshape(-1, d_out)
        a, b, mask = leaves["a"], leaves["b"], leaves.get("mask")
        delta = residual(x.reshape(-1, d_in), a, b, target.scale, mask)
        delta = delta.astype(base.dtype)
        if "taps" not in leaves:
            return (rows + delta).reshape(base.shape)
        weights = leaves.get("weights")
        tokens = base.shape[: base.ndim - len(target.projection.outputs)]
        if weights is not None and weights.shape != tokens:
            expected = f"shape {tokens}, as {target.path} sees it"
            raise NaloraError("token_weights", expected=expected, found=weights.shape)
        flat = jnp.ones(rows.shape[:1], bool) if weights is None else weights.reshape(-1)
        observe = partial(self._statistics, target.gate)
        return _observed(rows, delta, flat, dict(leaves["taps"]), observe).reshape(base.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _observed(
    base: jax.Array, delta: jax.Array, weights: jax.Array, taps: Any, statistics: Any
) -> jax.Array:
    """Returns ``base + delta``; the gradient of ``taps`` is the statistics of the forward pass."""
    return base + delta


def _observed_fwd(base: jax.Array, delta: jax.Array, weights: jax.Array, taps: Any, statistics: Any) -> Any:
    return base + delta, statistics(base, delta, weights)


def _observed_bwd(statistics: Any, sums: Any, g: jax.Array) -> Any:
    return g, g, None, sums


_observed.defvjp(_observed_fwd, _observed_bwd)


def folded(kernel: Any, target: Target, lora: Mapping[str, Any]) -> jax.Array:
    """Returns a kernel with its adapter added, computed in float32; ``lora`` is flattened."""
    a, b = (lora[f"{target.path}/{name}"] for name in ("a", "b"))
    chex.assert_shape(kernel, target.projection.kernel_shape)
    delta = target.scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    if target.projection.dense.transposed:
        delta = jnp.swapaxes(delta, -1, -2)
    return (kernel.astype(jnp.float32) + delta.reshape(kernel.shape)).astype(kernel.dtype)
