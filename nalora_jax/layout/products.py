"""Flops of the matmuls of a compiled program, grouped ones included."""

from __future__ import annotations

import math
import re

from nalora_jax.layout.hlo import Computation, Instruction
from nalora_jax.ops.triton_grouped_matmul import NAME as GROUPED_MATMUL

# Defaults of window settings along an axis.
_PLAIN = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}


def flops_of(instruction: Instruction, computation: Computation) -> float:
    """Returns the flops of an instruction; 0 unless it is a matmul or a known kernel."""
    if instruction.opcode in ("convolution", "dot"):
        return _product_flops(instruction, computation)
    if _is_grouped(instruction):
        return _grouped_flops(instruction, computation)
    return 0.0


def kernel_name(instruction: Instruction) -> str:
    """Returns the name of a custom call's kernel.

    It is the direction of cuDNN's attention, the name of a Pallas kernel on a GPU, or the
    instruction's name without its number.
    """
    attention = re.search(r'custom_call_target="__cudnn\$fmha(\w*)"', instruction.attributes)
    if attention:
        if "Backward" in attention[1]:
            return "cudnn_attention_backward"
        return "cudnn_attention_forward"
    name = re.sub(r"[.\d]+$", "", instruction.name)
    pallas_name = re.search(r'op_name="(?:[^"]*/)?(\w+)/pallas_call"', instruction.attributes)
    if pallas_name and name.startswith("pallas_call"):
        return pallas_name[1]
    return name


def _is_grouped(instruction: Instruction) -> bool:
    """Returns True for a grouped matmul: XLA's on a TPU, or this library's kernel on a GPU."""
    name = ""
    if instruction.opcode == "custom-call":
        name = kernel_name(instruction)
    return name == GROUPED_MATMUL or (name.startswith("ragged-dot") and "metadata" not in name)


def _grouped_flops(instruction: Instruction, computation: Computation) -> float:
    """Returns the flops of a grouped matmul of rows ``[m, k]``.

    The result is ``[m, n]``, or, with second operand ``[m, n]``, ``[groups, k, n]``.
    """
    result = instruction.shapes[0].dims
    operands = [computation.instructions[name].shapes[0].dims for name in instruction.operands]
    # The first operand with two axes (lists of groups have one, kernels three) shares a side with
    # the result.
    first, second = next((dims for dims in operands if len(dims) == 2), (0, 0))
    inner = second if len(result) == 2 else first * second / result[-2]
    return 2.0 * result[-2] * result[-1] * inner


def _product_flops(instruction: Instruction, computation: Computation) -> float:
    """Returns twice the multiply-adds of a ``dot`` or ``convolution``."""
    result = math.prod(instruction.shapes[0].dims)
    first, second = (computation.instructions[name].shapes[0].dims for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = []
        if contracted:
            axes = [int(axis) for axis in contracted.group(1).split(",") if axis]
        return 2.0 * result * math.prod(first[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    dims = (first, second, instruction.shapes[0].dims)
    data, kernel, out = (
        dict(zip(names, sizes, strict=True)) for names, sizes in zip(labels.groups(), dims, strict=True)
    )
    axes = sorted(kernel.keys() - {"i", "o"})
    met = [_met(data[axis], kernel[axis], out[axis], _window(instruction, int(axis))) for axis in axes]
    return 2.0 * out["b"] * out["f"] * kernel["i"] * math.prod(met)


def _window(instruction: Instruction, axis: int) -> dict[str, int]:
    """Returns stride, first padding and dilations of a convolution along an axis of its window."""
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = {}
    if window:
        settings = dict(entry.split("=") for entry in window[1].split())
    sizes = {name: int(text.split("x")[axis].split("_")[0]) for name, text in settings.items()}
    return {name: sizes.get(name, default) for name, default in _PLAIN.items()}


def _met(data: int, kernel: int, out: int, window: dict[str, int]) -> int:
    """Returns how often an element of the kernel meets the data along an axis, without padding.

    The TPU compiler writes a matmul whose columns have two axes as a convolution that slides the
    kernel over a single element. All but one in ``kernel`` of its multiply-adds are with padding
    and are not executed.
    """
    places = range(-window["pad"], -window["pad"] + out * window["stride"], window["stride"])
    inside = range(0, (data - 1) * window["lhs_dilate"] + 1, window["lhs_dilate"])
    return sum(place + tap * window["rhs_dilate"] in inside for place in places for tap in range(kernel))
