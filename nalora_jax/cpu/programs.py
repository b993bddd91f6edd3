"""The facts and preferences of a CPU (`nalora_jax.ops.dispatch.PlatformHooks`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from nalora_jax.cpu import heap, native, processor, storage
from nalora_jax.cpu.implementation import usable
from nalora_jax.cpu.native import library
from nalora_jax.cpu.storage import Bits
from nalora_jax.ops.dispatch import Numerics, Platform, PlatformHooks, register_platform
from nalora_jax.ops.storage import Kernel, Stored

# Largest d_model at which recomputing tiled matmuls is faster than saving their results (measured
# with benchmarks/versus_peft.py).
_WIDEST_RECOMPUTED = 1024
_INSTRUCTIONS = {"tiles": " with AMX", "vectors": " with AVX512-BF16", "floats": " with AVX2"}


class CPUHooks(PlatformHooks):
    """A CPU, with native kernels if they compile."""

    def device_name(self, platform: Platform) -> str:
        """Returns the processor's model, its fastest bf16 instructions, and the number of cores.

        Virtual machines give several generations one name, and they sum in another order.
        """
        instructions = _INSTRUCTIONS.get(library.kinds()[0], "")
        return f"{processor.name()}{instructions}, {os.cpu_count()} cores"

    def processor_name(self) -> str:
        """Returns the processor's model as the system names it."""
        return processor.name()

    def preferred(self, numerics: Numerics) -> Numerics:
        """Returns bf16 between two matmuls with native kernels, which round while they store.

        XLA's matmuls would need a second pass over the result.
        """
        bf16 = numerics.operand == "bfloat16" and usable(numerics)
        if bf16:
            return replace(numerics, inner="bfloat16")
        return numerics

    def best_remat(self, d_model: int, numerics: Numerics, *, gated: bool = True) -> str:
        """Returns "attention" for narrow gated models on AMX tiles, else "dots".

        The time of a matmul per byte of its result grows with d_model, the time to save a byte does
        not. A block with one wide matmul has half as much to save: CLIP ViT-B/16 is 6% faster with
        "dots".
        """
        tiles = numerics.operand == "bfloat16" and usable(numerics) and native.multiplies_on_tiles()
        if tiles and gated and d_model <= _WIDEST_RECOMPUTED:
            return "attention"
        return "dots"

    def after_compilation(self) -> None:
        """Returns the compiler's memory to the system and lets the heap keep freed memory."""
        heap.release()
        heap.retain()

    def prepare(self, variables: Mapping[str, Any], numerics: Numerics, *, tables: bool) -> dict[str, Any]:
        """Returns bf16 kernels as views of their bits."""
        return storage.prepare(variables, numerics, tables=tables)

    def store(self, x: jax.Array) -> jax.Array | Stored:
        """Returns bf16 as its bits."""
        return storage.store(x)

    def reads_cache_in_place(self, seq: int, cache: Kernel, numerics: Numerics) -> bool:
        """Returns True for one token per row and a non-empty cache that is stored as bits."""
        slots = isinstance(cache, Bits) and cache.shape[-1] > 0
        return seq == 1 and slots and usable(numerics) and native.multiplies_few_rows()


register_platform("cpu", CPUHooks())
