"""What a CPU prefers around compiled programs: numerics, rematerialisation, the heap."""

from __future__ import annotations

import os
from dataclasses import replace

from nalora_jax.cpu import heap, native, processor
from nalora_jax.cpu.implementation import CPU, usable
from nalora_jax.ops import numerics as ops_numerics
from nalora_jax.ops import programs
from nalora_jax.ops.numerics import Numerics

# d_model up to which products on tiles are computed again sooner than saved (benchmarks/notes/versus_peft.md).
_WIDEST_RECOMPUTED = 1024


@CPU.implements(ops_numerics.refined)
def refined(numerics: Numerics) -> Numerics:
    """Only native kernels round their sums on the way out; XLA's products would take another pass for it."""
    bf16 = numerics.operand == "bfloat16" and usable(numerics)
    return replace(numerics, inner="bfloat16") if bf16 else numerics


@CPU.implements(programs.best_remat)
def best_remat(d_model: int, numerics: Numerics, gated: bool = True) -> str:
    """What a product costs per byte of its result grows with d_model; what it costs to save that byte does not.

    A block with one wide product has half as much to save: CLIP ViT-B/16 is 6% faster so (benchmarks/few_shot.py).
    """
    tiles = numerics.operand == "bfloat16" and usable(numerics) and native.multiplies_on_tiles()
    return "attention" if tiles and gated and d_model <= _WIDEST_RECOMPUTED else "dots"


@CPU.implements(programs.after_compilation)
def after_compilation(numerics: Numerics) -> None:
    """Hands the compiler's memory back, and has the heap keep from step to step what the program frees."""
    heap.release()
    heap.retain()


@CPU.implements(programs.device_name)
def device_name(numerics: Numerics) -> str:
    """The processor behind the device."""
    return f"{processor.name()}, {os.cpu_count()} cores"


@CPU.implements(programs.processor_name)
def processor_name(numerics: Numerics) -> str:
    """As the system names it."""
    return processor.name()
