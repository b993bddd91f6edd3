"""Whole dequantized kernels in compiled programs, by number format of a frozen base (no step runs).

    # in an environment with the compiler: pip install '.[tpu]', or '.[cuda]' in another one
    python benchmarks/stored_matmuls.py --topology v6e:1x1
    python benchmarks/stored_matmuls.py --topology 1xh100

Compiles four gated blocks that are scanned, of Qwen3-8B's width (4096 x 12288), as training does
(forward, recomputed forward and the gradient of the input, 2048 tokens) and as decoding does (8
tokens). For each format it prints

- stored: bytes of the kernels as they are stored;
- arguments and temporary memory of the program;
- whole: bytes of the largest buffer of floats, outside of fusions, with as many elements as one
  kernel; 0 if no dequantized kernel is written to memory;
- accessed: bytes that the compiler counts, with its ratio to those of the stored kernels (each is
  read once in decoding, three times in training).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from common import parser_of, save
from jax.sharding import SingleDeviceSharding

from nalora_jax.ops.dispatch import Numerics, numerics_for
from nalora_jax.ops.scaled import Scaled, Scaling
from nalora_jax.ops.storage import Kernel, matmul
from nalora_jax.planner.abstract_step import devices
from nalora_jax.planner.machines import topology

WIDTH = 4096
WIDE = 12288
LAYERS = 4
TOKENS = {"train": 2048, "decode": 8}
FORMATS: dict[str, Scaling | None] = {
    "bf16": None,
    "fp8 block": Scaling("e4m3", (128, 128)),
    "fp8 channel": Scaling("e4m3", (0, 1)),
    "int8 channel": Scaling("int8", (0, 1), "bfloat16", "bfloat16"),
    "int4 groups": Scaling("int4", (128, 1), "bfloat16", "bfloat16"),
    "NVFP4": Scaling("e2m1", (16, 1), "e4m3", "bfloat16", divides=True),
    "MXFP4": Scaling("e2m1", (32, 1), "e8m0"),
}
_DTYPES = {"bf16": 2, "f32": 4, "f16": 2}
_RESULT = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b(bf16|f32|f16)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")  # by fusions and reductions
# Instructions without a buffer of their own.
_VIEWS = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "constant"}


def main() -> None:
    """Compiles every format and prints the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--topology", default="v6e:1x1", help="see nalora plan")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    options = parser.parse_args()
    where = topology(options.topology)
    place = SingleDeviceSharding(devices(where)[0])
    numerics = numerics_for("bfloat16", where.chip.platform)
    header = [
        "stored",
        "arguments",
        "temporary",
        "whole",
        "accessed",
        "accessed / stored",
    ]
    print(f"{'program':26}" + "".join(f"{name:>19}" for name in header))
    measured: dict[str, dict[str, float]] = {}
    for name in options.formats:
        for step, tokens in TOKENS.items():
            figures = compile_blocks(FORMATS[name], step, tokens, numerics, place)
            cells = [f"{figures[each] / 1e6:16,.0f} MB" for each in header[:-1]]
            cells.append(f"{figures[header[-1]]:19.2f}")
            print(f"{name + ', ' + step:26}" + "".join(cells), flush=True)
            measured[f"{name}, {step}"] = figures
    for case, figures in measured.items():
        save("stored_matmuls", f"{options.topology}: {case}", figures)


def compile_blocks(
    scaling: Scaling | None,
    step: str,
    tokens: int,
    numerics: Numerics,
    place: SingleDeviceSharding,
) -> dict[str, float]:
    """Returns the figures of one program."""
    shapes = {"gate": (WIDTH, WIDE), "up": (WIDTH, WIDE), "down": (WIDE, WIDTH)}
    kernels = {}
    for name, shape in shapes.items():
        kernels[name] = abstract_kernel(scaling, shape, place)
    x = jax.ShapeDtypeStruct((tokens, WIDTH), jnp.bfloat16, sharding=place)
    function = partial(run_blocks, numerics=numerics)
    if step == "train":
        function = partial(train_blocks, numerics=numerics)
    compiled = jax.jit(function).lower(kernels, x).compile()
    memory = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    stored = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kernels)
    )
    accessed = costs.get("bytes accessed", math.nan)
    return {
        "stored": stored,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "whole": max(buffers_of(compiled.as_text(), WIDTH * WIDE), default=0),
        "accessed": accessed,
        "accessed / stored": accessed / stored,
    }


def abstract_kernel(
    scaling: Scaling | None, shape: tuple[int, int], place: SingleDeviceSharding
) -> Any:
    """Returns the shapes of a stack of kernels in a format; None is bfloat16."""

    def array(rows: int, columns: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((LAYERS, rows, columns), dtype, sharding=place)

    if scaling is None:
        return array(*shape, jnp.bfloat16)
    codes = jnp.int8 if scaling.element == "int8" else jnp.uint8
    scales = (
        jnp.uint8 if scaling.scale in ("e4m3", "e8m0") else jnp.dtype(scaling.scale)
    )
    outer = None
    if scaling.divides:
        outer = array(1, 1, jnp.float32)
    d_in, d_out = shape
    arrays: Any = (
        array(d_in // scaling.per_byte, d_out, codes),
        array(*scaling.blocks(shape), scales),
        None,
        outer,
        None,
    )
    return Scaled(*arrays, scaling=scaling)


def run_blocks(
    kernels: dict[str, Kernel], x: jax.Array, numerics: Numerics
) -> jax.Array:
    """Returns ``[tokens, d_model]`` after the gated blocks with residual connections."""

    @jax.checkpoint
    def block(x: jax.Array, layer: dict[str, Kernel]) -> tuple[jax.Array, None]:
        z = matmul(x, layer["gate"], numerics)
        u = matmul(x, layer["up"], numerics)
        return x + matmul(jax.nn.silu(z) * u, layer["down"], numerics), None

    y, _ = jax.lax.scan(block, x, kernels)
    return y


def train_blocks(
    kernels: dict[str, Kernel], x: jax.Array, numerics: Numerics
) -> tuple[jax.Array, jax.Array]:
    """Returns a loss, and its gradient in the blocks' input ``[tokens, d_model]``."""

    def loss(x: jax.Array) -> jax.Array:
        return run_blocks(kernels, x, numerics).astype(jnp.float32).mean()

    value, gradient = jax.value_and_grad(loss)(x)
    return value, gradient


def buffers_of(text: str, elements: int) -> Iterator[int]:
    """Yields the bytes of every buffer of floats with ``elements`` elements in a program's text.

    Instructions within fusions have no buffers; neither do stacks of all layers count.
    """
    fused = set(_CALLED.findall(text))
    within = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            within = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
        matched = _RESULT.match(line)
        if within in fused or matched is None or matched[2] in _VIEWS:
            continue
        for dtype, dims in _ARRAY.findall(matched[1]):
            sizes = [int(size) for size in dims.split(",") if size]
            if math.prod(sizes) == elements:
                yield _DTYPES[dtype] * elements


if __name__ == "__main__":
    main()
