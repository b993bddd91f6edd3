"""What programs on a CPU prefer."""

from __future__ import annotations

from dataclasses import replace

from nalora_jax.cpu import native
from nalora_jax.cpu.implementation import usable
from nalora_jax.cpu.storage import Bits
from nalora_jax.ops import dispatch, storage
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import Kernel

# Largest d_model at which recomputing tiled matmuls is faster than saving their results (measured
# with benchmarks/versus_peft.py).
_WIDEST_RECOMPUTED = 1024


@dispatch.preferred.implements("cpu")
def preferred(numerics: Numerics) -> Numerics:
    """Returns bf16 between two matmuls with native kernels, which round while they store.

    XLA's matmuls would need a second pass over the result.
    """
    if numerics.operand == "bfloat16" and usable(numerics):
        return replace(numerics, inner="bfloat16")
    return numerics


@storage.best_remat.implements("cpu")
def best_remat(d_model: int, numerics: Numerics, *, gated: bool = True) -> str:
    """Returns "attention" for narrow gated models on AMX tiles, else "dots".

    The time of a matmul per byte of its result grows with d_model, the time to save a byte does
    not. A block with one wide matmul has half as much to save: CLIP ViT-B/16 is 6% faster with
    "dots".
    """
    tiles = numerics.operand == "bfloat16" and usable(numerics) and native.multiplies_on_tiles()
    if tiles and gated and d_model <= _WIDEST_RECOMPUTED:
        return "attention"
    return "dots"


@storage.reads_cache_in_place.implements("cpu")
def reads_cache_in_place(seq: int, cache: Kernel, numerics: Numerics) -> bool:
    """Returns True for one token per row and a non-empty cache that is stored as bits."""
    slots = isinstance(cache, Bits) and cache.shape[-1] > 0
    return seq == 1 and slots and usable(numerics) and native.multiplies_few_rows()
