"""Efficiency of a training step: compiled flops over the minimum, and share of the peak.

    python benchmarks/flops.py --count                                # compiled flops over the analytic minimum
    python benchmarks/flops.py --peak --dtype bfloat16 --shape 8x256  # share of the matrix-multiply peak

The minimum counts two flops for every multiply-add that every implementation needs with a frozen
base: per token 2P forward and 2P for the activations' gradients (P: weights of all projections and
of the head), adapters forward and backward (2 + 4 per weight), and causal attention over the keys
up to each token (its gradient costs twice its forward), minus the unused gradients below the first
layer's adapters.

Compiled flops are XLA's count of programs whose layers are unrolled, since it counts the body of a
loop once; for the same reason the loss is one chunk and one block of the vocabulary. Native kernels
are off (NALORA_NATIVE=0), because XLA does not know their flops. The peak is measured with one
large matmul in the process of the step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

from common import SMOLLM2, random_tokens, save
from tables import Row, at_least, at_most, has_amx, requirements, spread
from training import base_model, batch_of, parse, run_config

TITLE = "Distance from the limits"
SHORT = "Distance from the peak"
DTYPES = ("float32", "bfloat16")


def minimum(layers: int, batch: int, seq: int, rank: int = 8, vocab: int = SMOLLM2["vocab_size"]) -> float:
    """Returns the minimum flops of one LoRA step with adapters on gate, up and down."""
    d, ff, dim = SMOLLM2["hidden_size"], SMOLLM2["intermediate_size"], SMOLLM2["head_dim"]
    heads, kv = SMOLLM2["num_attention_heads"], SMOLLM2["num_key_value_heads"]
    projections = d * dim * (2 * heads + 2 * kv)  # of attention
    attend = 4 * (seq + 1) / 2 * heads * dim  # scores and weighted values of one token, forward
    adapters = 3 * rank * (d + ff)
    forward = layers * (2.0 * (projections + 3 * d * ff + adapters) + attend)
    backward = layers * (2.0 * (projections + 3 * d * ff) + 4.0 * adapters + 2.0 * attend)
    # No gradient passes through the first layer's gate and up projections: nothing below is
    # trained.
    unneeded = 2.0 * (projections + 2 * d * ff + 2 * d * rank) + 2.0 * attend
    head = 4.0 * d * vocab * (seq - 1) / seq  # the last token has no target
    return batch * seq * (forward + backward - unneeded + head)


def compiled(layers: int, batch: int, seq: int, dtype: str, method: str) -> float:
    """Returns XLA's flops of the compiled step, with unrolled layers and one vocabulary block."""
    from flax import linen as nn

    from nalora_jax.cpu import cross_entropy

    unrolled = partial(nn.scan, unroll=layers)
    with (
        mock.patch.object(nn, "scan", unrolled),
        mock.patch.object(cross_entropy, "BLOCK", SMOLLM2["vocab_size"]),
    ):
        step, arguments = assembled(layers, batch, seq, dtype, method, remat="none", loss_chunk=batch * seq)
        lowered = step.lower(*arguments)
    return float(lowered.compile().cost_analysis()["flops"])


def assembled(
    layers: int, batch: int, seq: int, dtype: str, method: str, *, remat: str = "auto", loss_chunk: int = 0
) -> tuple[Any, list[Any]]:
    """Returns a step and its arguments."""
    from nalora_jax.config import MeshConfig
    from nalora_jax.layout import distributed
    from nalora_jax.train.assembly import assemble

    options = parse(["--dtype", dtype, "--layers", str(layers), "--method", method, "--remat", remat])
    mesh = distributed.make_mesh(MeshConfig())
    base, params = base_model(options, mesh)
    config = run_config(options)
    config = replace(config, compute=replace(config.compute, loss_chunk=loss_chunk))
    assembly = assemble(config, base, params, mesh)
    data = batch_of(random_tokens(1, batch, seq, base.vocab_size)[0], mesh)
    return assembly.step, [assembly.view(params), assembly.state, data]


def count(options: argparse.Namespace) -> None:
    """Records the model's flops, extrapolated from programs of two small depths.

    All layers except the first are alike.
    """
    os.environ["NALORA_NATIVE"] = "0"
    batch, seq = map(int, options.shape.split("x"))
    few, more = options.layers
    n_layers = SMOLLM2["num_hidden_layers"]
    for method in ("lora", "nalora"):
        counts = {layers: compiled(layers, batch, seq, options.dtype, method) for layers in (few, more)}
        total = counts[more] + (n_layers - more) * (counts[more] - counts[few]) / (more - few)
        record = {
            "settings": vars(options),
            "compiled": counts,
            "whole": total,
            "minimum": minimum(n_layers, batch, seq),
        }
        print(table(save("flops", f"flops of a step: {method}, {options.dtype} {options.shape}", record)))


def matmul_peak(dtype: str, size: int = 4096, repeats: int = 5) -> list[float]:
    """Returns flops per second of a square matmul with a float32 result.

    The faster of XLA's and this library's is used.
    """
    import jax
    import jax.numpy as jnp

    from nalora_jax.ops.matmul import dot
    from nalora_jax.ops.numerics import numerics_for

    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    numerics = numerics_for(dtype)
    ways = (
        lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32),
        lambda x, y: dot(x, y, numerics),
    )
    rates = []
    for product in map(jax.jit, ways):
        product(x, x).block_until_ready()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            seconds.append(time.perf_counter() - start)
        rates.append([2.0 * size**3 / s for s in seconds])
    return max(rates, key=statistics.median)


def share(options: argparse.Namespace) -> None:
    """Records a step's analytic flops per second over the peak before and after it."""
    batch, seq = map(int, options.shape.split("x"))
    layers = SMOLLM2["num_hidden_layers"]
    step, (params, state, data) = assembled(layers, batch, seq, options.dtype, "nalora")
    peak = matmul_peak(options.dtype)
    seconds = []
    for i in range(options.steps + 2):
        start = time.perf_counter()
        state, metrics = step(params, state, data)
        float(metrics["loss"])
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    peak += matmul_peak(options.dtype)
    rates = [minimum(layers, batch, seq) / s for s in seconds]
    case = f"flops per second: nalora, {options.dtype} {options.shape}"
    record = {"settings": vars(options), "flops_per_second": rates, "peak_flops_per_second": peak}
    print(table(save("flops", case, record)))


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns flops first, then shares of the peak."""
    counted, shares = [], []
    for case, result in record["cases"].items():
        if "compiled" in result:
            ours, least = result["whole"], result["minimum"]
            counted.append(
                Row(case, f"{ours / 1e9:,.1f} GF", f"{least / 1e9:,.1f} GF", ours / least, at_most(1.05))
            )
            continue
        rates, peak = (
            [x / 1e9 for x in result[name]] for name in ("flops_per_second", "peak_flops_per_second")
        )
        required = _share(result)
        ratio = statistics.median(rates) / statistics.median(peak)
        shares.append(
            Row(case, spread(rates, unit="GF/s"), spread(peak, unit="GF/s"), ratio, at_least(required))
        )
    return counted + shares


def _share(result: dict[str, Any]) -> float:
    single = result["settings"]["dtype"] == "float32"
    if has_amx(result):
        return 0.6 if single else 0.3
    return 0.75 if single else 0.6


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), other="limit")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--peak", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--shape", default="8x128", help="batch x sequence")
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4], help="of --count")
    parser.add_argument("--steps", type=int, default=8, help="of --peak")
    options = parser.parse_args()
    if not (options.count or options.peak):
        parser.error("choose --count or --peak")
    if options.count:
        count(options)
    if options.peak:
        share(options)


if __name__ == "__main__":
    main()
