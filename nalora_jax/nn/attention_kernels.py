"""Accelerators' attention kernels behind `nalora_jax.nn.attention.attention`, and when each of them applies.

    cudnn    GPU: cuDNN's flash attention through `jax.nn.dot_product_attention`; visibility goes in as a mask
    splash   TPU: JAX's Pallas splash attention, which skips blocks by segments, causality and window

Both keep no ``[seq, seq]`` probabilities. Neither serves cached keys or dropout; those, and what a kernel refuses, take
the plain path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from nalora_jax.nn.attention import Keys, Scoring

log = logging.getLogger(__name__)
_LANES = 128  # a TPU register's width: what block sizes must be multiples of


@dataclass(frozen=True)
class Kernel:
    """Which kernel, and what it must know before it runs; static."""

    name: str = "auto"  # "auto" (by platform), "xla", "cudnn" or "splash"
    windows: tuple[int, ...] = ()  # every value that the window may have, ascending; () means it is never used
    sharding: NamedSharding | None = None  # of [batch, seq, d_model] on a mesh
    interpret: bool = False  # run the Pallas kernel in Python, for tests


def choose(kernel: Kernel, q: jax.Array, keys: Keys, scoring: Scoring, *, plain_only: bool) -> str:
    """The kernel that serves these operands: "xla", "cudnn" or "splash"."""
    if plain_only:
        return "xla"
    if kernel.name != "auto":
        return kernel.name
    platform = jax.default_backend()
    if platform == "gpu" and _cudnn_fits(q, scoring):
        return "cudnn" if _cudnn_compiles(q.shape, keys.k.shape, scoring) else "xla"
    # A Pallas call is not partitioned by the compiler: on several devices it needs the sharding to map itself over.
    mapped = kernel.sharding is not None or jax.device_count() == 1
    if platform == "tpu" and mapped and _splash_fits(q):
        return "splash"
    return "xla"


# ---------------------------------------------------------------- GPU


def _cudnn_fits(q: jax.Array, scoring: Scoring) -> bool:
    return scoring.operand == "bfloat16" and not scoring.softcap and q.shape[1] % 2 == 0 and q.shape[-1] % 8 == 0


@lru_cache(maxsize=64)
def _cudnn_compiles(q_shape: tuple[int, ...], k_shape: tuple[int, ...], scoring: Scoring) -> bool:
    """Whether cuDNN takes these shapes on this GPU: which it does depends on its version and the GPU's generation."""
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q_shape, k_shape))
    visible = jax.ShapeDtypeStruct((q_shape[0], q_shape[1], q_shape[1]), jnp.bool_)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
        return jnp.sum(dot_product(q, k, v, visible, scoring, "cudnn"))

    try:
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, visible).compile()
    except Exception as error:  # cuDNN's refusals have no common type
        log.warning("cuDNN attention does not apply to %s (%s); XLA's is used", q_shape, error)
        return False
    return True


def dot_product(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, scoring: Scoring, implementation: str
) -> jax.Array:
    """`jax.nn.dot_product_attention` as `attention` means it.

    Args:
      q: ``[batch, seq, heads, head_dim]``.
      k: ``[batch, seq, kv_heads, head_dim]``.
      v: the same.
      visible: bool ``[batch or 1, seq, seq]``.
      scoring: scale and operand dtype; no soft cap.
      implementation: "cudnn" or "xla".
    """
    q, k, v = (x.astype(scoring.operand) for x in (q, k, v))
    attend = partial(jax.nn.dot_product_attention, scale=scoring.scale, implementation=implementation)
    # Causality is implied by `visible`, but only the flag lets the kernel skip the upper triangle.
    return attend(q, k, v, mask=visible[:, None], is_causal=True).astype(jnp.float32)


# ---------------------------------------------------------------- TPU


def _splash_fits(q: jax.Array) -> bool:
    return q.shape[1] % _LANES == 0 and q.shape[-1] % 64 == 0


def splash(q: jax.Array, keys: Keys, window: jax.Array | int, scoring: Scoring, kernel: Kernel) -> jax.Array:
    """Splash attention of every example; on a mesh, each device its own examples and heads.

    Args:
      q: ``[batch, seq, heads, head_dim]``.
      keys: of the same tokens, whose positions grow by one along each segment.
      window: scalar, one of ``kernel.windows``; they are compiled, so a traced window chooses among them.
      scoring: scale, soft cap, dtypes.
      kernel: windows, sharding.

    Returns:
      ``[batch, seq, heads, head_dim]`` float32.
    """
    batch = q.shape[0]
    # [batch, heads, seq, head_dim]; splash has no scale of its own.
    arrays = [x.astype(scoring.operand).swapaxes(1, 2) for x in (q * scoring.scale, keys.k, keys.v)]
    segments = jnp.broadcast_to(keys.segments, (batch, q.shape[1]))
    windows = np.asarray(kernel.windows[:-1], np.int32)
    choice = jnp.sum(jnp.asarray(window) > windows)  # 0 where there is one window
    attend: Callable[..., jax.Array] = partial(_splash_local, scoring=scoring, kernel=kernel)
    if kernel.sharding is not None:
        mesh, (rows, *_) = kernel.sharding.mesh, (*kernel.sharding.spec, None)
        heads = P(rows, "tensor" if "tensor" in mesh.shape else None)
        specs = (heads, heads, heads, P(rows), P())
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(*arrays, segments, choice).swapaxes(1, 2).astype(jnp.float32)


def _splash_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    choice: jax.Array,
    *,
    scoring: Scoring,
    kernel: Kernel,
) -> jax.Array:
    """One device's part: ``[batch, heads, seq, head_dim]``."""
    # Where it is used: Pallas is 5 MB and a tenth of a second of every other process.
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    branches = [
        _splash_for_window(q.shape[1], q.shape[2], window, scoring.softcap, kernel.interpret)
        for window in kernel.windows or (q.shape[2],)
    ]
    ids = SegmentIds(segments, segments)
    return jax.lax.switch(choice, [jax.vmap(branch) for branch in branches], q, k, v, ids)


def _splash_for_window(heads: int, seq: int, window: int, softcap: float, interpret: bool) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    local = masks.LocalMask((seq, seq), window_size=(window - 1, 0), offset=0) if window < seq else None
    mask = masks.CausalMask((seq, seq)) if local is None else local
    block = next(size for size in (512, 256, _LANES) if seq % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash_attention_kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
