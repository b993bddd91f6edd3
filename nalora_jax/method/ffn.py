"""Self-gated feed-forward blocks with adapters: `GatedFFN` and `SelfGatedFFN`.

    gated       z = x W_gate,  u = x W_up,  y = (phi(z) * u) W_down        (SwiGLU, GeGLU, ...)
    factored  z = x W_gate,  u is given,  y = (phi(z) * u) W_down  (per-layer embeddings of Gemma 4)
    self-gated  z = x W_in,                 y = phi(z) W_out               (MLPs of CLIP, ViT, BERT)

Every matmul may have an adapter. An adapter on the gate changes the selection weight rho(z), not
only the feature. A block therefore reads a channel mask (collection ``gate_mask``, training only),
which weighs the gradient of the gate's A. The channel statistics from which the rules compute the
next step's factors are the gradients of the zeros in ``gate_taps``. Neither changes the forward
value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.method import activations, statistics
from nalora_jax.method.activations import Activation
from nalora_jax.method.low_rank import (
    Adapter,
    Dense,
    adapted_dense,
    init_a,
    parallel_dense,
)
from nalora_jax.method.measurement import (
    GateStatsConfig,
    Measurement,
    SampledWeights,
    block_statistics,
    tapped,
)
from nalora_jax.ops import storage
from nalora_jax.ops.dispatch import Numerics, operation

# The collection of pre-activations, which a caller may ask for (``mutable``).
PREACTIVATIONS = "preactivations"

Scales = Mapping[str, jax.Array | float]


@operation
def gated_mlp(
    x: jax.Array,
    gate: Dense,
    up: Dense | jax.Array | None,
    down: Dense,
    activation: Activation,
    numerics: Numerics,
    measurement: Measurement | None = None,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """Returns ``(phi(x W_gate) * u) W_down``, or ``phi(x W_gate) W_down`` without ``up``.

    Args:
      x: ``[batch, seq, d_model]``.
      gate: ``d_model -> d_ff``; the mask of its adapter weighs the gradient of A.
      up: ``d_model -> d_ff``, of which u is the output; u itself ``[batch, seq, d_ff]``; or None.
      down: ``d_ff -> d_model``.
      activation: phi.
      numerics: dtypes.
      measurement: request for statistics, or None.

    Returns:
      ``[batch, seq, d_model]`` in ``numerics.result``, and the statistics or None.
    """
    u: jax.Array | None
    if isinstance(up, Dense):
        (z, delta), (u, _) = parallel_dense(x, [gate, up], numerics.within())
    else:
        z, delta = adapted_dense(x, gate, numerics.within())
        u = up
        if u is not None:
            u = u.astype(z.dtype)
    z = tapped(z, measurement)
    h, _ = gated_product(z, u, activation, numerics)
    measured = None
    if measurement is not None:
        config = measurement.config
        measured = block_statistics(
            x, gate, z, delta, activation, numerics, measurement
        )
        if config.checks is not None:
            live = (z, u, h)
            measured |= config.checks.block(
                x, gate, live, delta, activation, numerics, config.sharding
            )
    return adapted_dense(h, down, numerics).y, measured


# ---------------------------------------------------------------- phi(z) u


@operation
def gated_product(
    z: jax.Array,
    u: jax.Array | None,
    activation: Activation,
    numerics: Numerics,
    up_limit: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns ``(a * factor, a)`` with ``a = phi(z)``; the factor is `up_factor` of u, 1 if u is
    None.

    Only z and u are saved for the backward pass, rounded to ``numerics.residual``; autodiff would
    also save the sigmoid and phi(z).

    Args:
      z: ``[..., d_ff]``.
      u: the same, or None.
      activation: phi.
      numerics: the computation is in ``numerics.result``.
      up_limit: of `up_factor`.

    Returns:
      ``a * factor`` in z's dtype, and ``a`` in ``numerics.result`` without a gradient.
    """
    if u is not None:
        chex.assert_equal_shape([z, u])
    return _gated_product(z, u, activation, numerics, up_limit)


def up_factor(u: jax.Array, up_limit: float) -> jax.Array:
    """Returns the factor of phi(z): u, or ``1 + clip(u, -up_limit, up_limit)`` (gpt-oss)."""
    if not up_limit:
        return u
    return 1 + jnp.clip(u, -up_limit, up_limit)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _gated_product(
    z: jax.Array,
    u: jax.Array | None,
    activation: Activation,
    numerics: Numerics,
    up_limit: float,
) -> Any:
    """Computes `gated_product`; its gradient is `_gated_product_bwd`."""
    outputs, _ = _gated_product_fwd(z, u, activation, numerics, up_limit)
    return outputs


def _gated_product_fwd(
    z: jax.Array,
    u: jax.Array | None,
    activation: Activation,
    numerics: Numerics,
    up_limit: float,
) -> Any:
    """Returns the outputs of `gated_product`, and the residuals: z, u and an empty array of
    z's dtype."""
    save = partial(
        storage.save_residual,
        dtype=numerics.residual,
        numerics=numerics,
        name=storage.SAVED_WIDE,
    )
    read = partial(storage.read_residual, dtype=numerics.result)
    saved_u = None
    saved_z = save(z)
    if u is not None:
        saved_u = save(u)
    # Computed from the saved arrays, so that a rematerialized layer needs no matmul for the value.
    a = activation.phi(read(saved_z))
    product = a
    if saved_u is not None:
        product = a * up_factor(read(saved_u), up_limit)
    outputs = (storage.round_to(product, z.dtype, numerics), a)
    like_z = jnp.zeros((0,), z.dtype)
    return outputs, (saved_z, saved_u, like_z)


def _gated_product_bwd(
    activation: Activation,
    numerics: Numerics,
    up_limit: float,
    residuals: Any,
    cotangents: Any,
) -> Any:
    """Returns the gradients of z and u, ``[..., d_ff]`` in z's dtype; None for a missing u.

    The cotangent of ``a``, the second output, is ignored: ``a`` has no gradient.
    """
    z, u, like_z = residuals
    z = storage.read_residual(z, numerics.result)
    g = cotangents[0].astype(numerics.result)
    rho, drho = activation.gate(z)
    slope = rho + z * drho  # phi'(z)
    if u is None:
        return storage.round_to(g * slope, like_z.dtype, numerics), None
    u = storage.read_residual(u, numerics.result)
    dz = g * up_factor(u, up_limit) * slope
    du = g * (z * rho)
    if up_limit:
        # the derivative of the clip in `up_factor`
        du = jnp.where(jnp.abs(u) <= up_limit, du, 0.0)
    dz = storage.round_to(dz, like_z.dtype, numerics)
    du = storage.round_to(du, like_z.dtype, numerics)
    return dz, du


_gated_product.defvjp(_gated_product_fwd, _gated_product_bwd)


# ---------------------------------------------------------------- dense layers
#
# Adapters are in the collection ``lora``:
#
#     params: {"gate_proj": {"kernel": [d_in, d_out]}}
#     lora:   {"gate_proj": {"a": [d_in, r], "b": [r, d_out]}}           # DoRA adds "magnitude":
#       [d_out]


class LoRADense(nn.Module):
    """The variables of a frozen dense layer with an optional low-rank adapter."""

    features: int  # d_out
    rank: int = 0  # of the adapter; 0 for a plain frozen layer
    use_bias: bool = False  # True if the frozen layer adds a bias
    dora: bool = False  # True if the adapter is weight-decomposed
    # rate on the adapter's input if not deterministic (needs the rng "dropout")
    dropout: float = 0.0
    experts: int = (
        0  # the leading axis of all arrays, if the layer is one of each expert
    )

    @nn.compact
    def dense(
        self,
        d_in: int,
        scale: jax.Array | float = 1.0,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Dense:
        """Returns the layer's arrays. Without a ``lora`` collection the layer has no adapter.

        Args:
          d_in: width of the input.
          scale: the layer's ``s``.
          mask: ``[d_out]`` for the gated gradient of A (gates only).
          deterministic: True to switch dropout off.
        """
        lead = (self.experts,) if self.experts else ()
        batch_axes = tuple(range(len(lead)))
        init = nn.initializers.lecun_normal(batch_axis=batch_axes)
        kernel = frozen_kernel(self, (*lead, d_in, self.features), init)
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", nn.initializers.zeros_init(), (*lead, self.features)
            )
        name = self.name or "dense"
        has_adapter = self.is_initializing() or self.has_variable("lora", "a")
        if not self.rank or not has_adapter:
            return Dense(kernel, None, bias, name=name)
        random = lambda: init_a(self.make_rng("params"), (*lead, d_in, self.rank))  # noqa: E731
        a = self.variable("lora", "a", random).value
        shape = (*lead, self.rank, self.features)
        b = self.variable("lora", "b", jnp.zeros, shape, jnp.float32).value
        if self.has_variable("lora", "singular"):  # AdaLoRA, in training
            a = a * self.get_variable("lora", "singular")[..., None, :]
        start = magnitude = dropout = None
        if self.has_variable("params", "start_a"):  # PiSSA, LoRA-GA
            start_a = self.get_variable("params", "start_a")
            start = (start_a, self.get_variable("params", "start_b"))
        if self.dora:

            def norms() -> jax.Array:
                """Returns the norms of the kernel's columns ``[d_out]``, with which DoRA starts."""
                expanded = storage.expand(kernel).astype(jnp.float32)
                return jnp.linalg.norm(expanded, axis=-2)

            magnitude = self.variable("lora", "magnitude", norms).value
        if self.dropout > 0 and not deterministic:
            dropout = nn.Dropout(self.dropout, deterministic=False)
        adapter = Adapter(a, b, scale, mask, magnitude, start)
        return Dense(kernel, adapter, bias, dropout, name)


def frozen_kernel(
    module: nn.Module,
    shape: tuple[int, ...],
    init: nn.initializers.Initializer | None = None,
    name: str = "kernel",
) -> storage.Kernel:
    """Returns the frozen array ``name`` of a module, in its storage form.

    Args:
      module: a module within a compact method or ``setup``.
      shape: of the float array.
      init: LeCun-normal by default.
      name: of the parameter.
    """
    if module.has_variable("params", name):
        stored: storage.Kernel = module.get_variable("params", name)
        if module.has_variable(storage.STACKS, name):
            # The bits of all layers stay in one array; the parameter holds the layer's number.
            stack: storage.Bits = module.get_variable(storage.STACKS, name)
            assert isinstance(stored, jax.Array)
            return storage.Bits(stack.bits, stored)
        # Stored in another form, whose leaves have other shapes than `param` would ask for.
        if isinstance(stored, storage.Stored):
            return stored
    kernel: jax.Array = module.param(
        name, init or nn.initializers.lecun_normal(), shape
    )
    return kernel


# ---------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Adapters:
    """The adapters of a block: rank by projection name, and their common options."""

    ranks: tuple[tuple[str, int], ...] = ()
    dora: bool = False
    dropout: float = 0.0

    def rank(self, name: str) -> int:
        """Returns the rank of projection ``name``; 0 if it has no adapter."""
        return dict(self.ranks).get(name, 0)

    def dense(
        self,
        name: str,
        d_in: int,
        d_out: int,
        scales: Scales | None,
        *,
        bias: bool = False,
        experts: int = 0,
        **options: Any,
    ) -> Dense:
        """Returns the arrays of a projection, in the compact module that calls it.

        Args:
          name: of the projection.
          d_in, d_out: width of the input and the output.
          scales: the adapters' ``s`` by projection name; 1 by default.
          bias: True if the projection has one.
          experts: of `LoRADense`.
          options: of `LoRADense.dense`.
        """
        layer = LoRADense(
            d_out, self.rank(name), bias, self.dora, self.dropout, experts, name=name
        )
        dense: Dense = layer.dense(d_in, (scales or {}).get(name, 1.0), **options)
        return dense


class AdaptedBlock(nn.Module):
    """A block with adapters, a mask and statistics; subclasses name its projections."""

    d_model: int
    d_ff: int
    activation: str = "silu"
    adapters: Adapters = Adapters()
    use_bias: bool = False
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()

    # the gate first, the output last
    names: ClassVar[tuple[str, ...]] = (
        "gate_proj",
        "down_proj",
    )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: Scales | None = None,
        *,
        token_weights: jax.Array | SampledWeights | None = None,
        deterministic: bool = True,
        up: jax.Array | None = None,
    ) -> jax.Array:
        """Returns ``[batch, seq, d_model]``.

        Args:
          x: ``[batch, seq, d_in]``.
          scales: the adapters' ``s`` by projection name; 1 by default.
          token_weights: ``[batch, seq]``, weights of the tokens in the statistics.
          deterministic: True to switch adapter dropout off.
          up: the factor ``[batch, seq, d_ff]`` of a block without a projection for it.
        """
        gate_name, *up_name, down_name = self.names

        def dense(
            name: str, d_in: int, d_out: int, mask: jax.Array | None = None
        ) -> Dense:
            """Returns the arrays of a projection with the options of this call."""
            options: dict[str, Any] = {
                "bias": self.use_bias,
                "mask": mask,
                "deterministic": deterministic,
            }
            return self.adapters.dense(name, d_in, d_out, scales, **options)

        d_model = x.shape[-1]
        mask = self.get_variable("gate_mask", "mask")
        gate = dense(gate_name, d_model, self.d_ff, mask)
        factor: Dense | jax.Array | None = up
        if up_name:
            factor = dense(up_name[0], d_model, self.d_ff)
        down = dense(down_name, self.d_ff, self.d_model)
        if self.is_mutable_collection(PREACTIVATIONS) and not self.is_initializing():
            self.sow(
                PREACTIVATIONS, "z", adapted_dense(x, gate, self.numerics.within()).y
            )
        measurement = None
        taps = self.variables.get("gate_taps", {})
        if taps and not self.is_initializing():
            if token_weights is None:
                token_weights = jnp.ones(x.shape[:-1], bool)
            measurement = Measurement.of(token_weights, self.stats, taps)
        # A replacement of the operation computes projections, not a given factor.
        block = gated_mlp.plain if up is not None else gated_mlp
        phi = activations.get_activation(self.activation)
        y, measured = block(x, gate, factor, down, phi, self.numerics, measurement)
        # The gradients of the taps are the statistics.
        if measured is None:
            return y
        return statistics.emit_measured(y, taps, measured)


class GatedFFN(AdaptedBlock):
    """``(phi(x W_gate) * x W_up) W_down`` with adapters on gate_proj, up_proj and down_proj."""

    names = ("gate_proj", "up_proj", "down_proj")


class SelfGatedFFN(AdaptedBlock):
    """``phi(x W_in) W_out`` with adapters on in_proj, which is the gate, and out_proj."""

    names = ("in_proj", "out_proj")
