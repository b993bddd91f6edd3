"""Headroom for a hand-written kernel: one adapted FFN on a TPU, estimate against the limit.

    python benchmarks/tpu_ffn.py --tpu-path tpu

Compiles the gated FFN of Llama-3.1-8B (rank 8 on gate and up, mask and statistics as in training,
bfloat16) for one chip: forward, and a backward pass with rematerialization of the forward, as in
the training step. The compiler's estimate of every fusion, in cycles, is summed by kind. It is
compared with two limits:

- the matmuls alone, at the chip's peak: no kernel is faster;
- the minimum memory traffic, at the chip's memory bandwidth: the kernels once per matmul, and every
  array of tokens once in each pass (forward x, z, u, hidden, y; backward x, z, u and the gradients
  of y, hidden, z, u, x).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from typing import Any

from common import save
from tables import Row, requirements
from tpu import LLAMA, UNSCHEDULED

TITLE = "One FFN on a TPU against the limit"
SHORT = "One FFN, the limit"
RANK = 8
PRODUCTS = 8  # forward 3, rematerialized 2 (output unused), backward 3: kernels have no gradients
# Peak bfloat16 flops a second, bytes a second, cycles a second (peak / flops a cycle of the matrix
# units).
CHIPS = {"v5e": (197e12, 819e9, 1.5e9), "v5p": (459e12, 2765e9, 1.75e9)}


def compiled(topology: str, tokens: int, compiler: dict[str, str] | None) -> Any:
    """Returns one adapted FFN, forward and backward, on one chip of ``topology``."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from nalora_jax.method import statistics
    from nalora_jax.method.ffn import Adapters, GatedFFN
    from nalora_jax.method.measurement import GateStatsConfig
    from nalora_jax.ops.numerics import numerics_for
    from nalora_jax.ops.storage import SUMS

    place = SingleDeviceSharding(
        topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    )
    d_model, d_ff = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    adapters = Adapters((("gate_proj", RANK), ("up_proj", RANK)))
    block = GatedFFN(
        d_model, d_ff, "silu", adapters, numerics=numerics_for("bfloat16", "tpu"), stats=GateStatsConfig(4)
    )

    def described(shape: tuple[int, ...], dtype: str = "bfloat16") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def step(lora: Any, params: Any, mask: Any, x: jax.Array, g: jax.Array) -> Any:
        def ffn(lora: Any, x: jax.Array, taps: Any) -> Any:
            variables = {"params": params, "lora": lora, "gate_mask": {"mask": mask}, "gate_taps": taps}
            return block.apply(variables, x)

        policy = jax.checkpoint_policies.save_only_these_names(SUMS)
        taps = statistics.taps(statistics.STANDARD, (d_ff,))
        y, pull = jax.vjp(jax.checkpoint(ffn, policy=policy), lora, x, taps)
        return y, pull(g)

    wide = ("gate_proj", "up_proj")
    kernels = {name: {"kernel": described((d_model, d_ff))} for name in wide}
    params = kernels | {"down_proj": {"kernel": described((d_ff, d_model))}}
    lora = {
        name: {"a": described((d_model, RANK), "float32"), "b": described((RANK, d_ff), "float32")}
        for name in wide
    }
    x = described((1, tokens, d_model))
    lowered = jax.jit(step).lower(lora, params, described((d_ff,), "float32"), x, x)
    return lowered.compile(compiler_options=compiler)


def cycles(program: str) -> dict[str, float]:
    """Returns the compiler's estimates in a program's text by kind.

    The kinds are matmuls of frozen weights, passes over tokens, and statistics.
    """
    entry = program[program.index("\nENTRY") :]
    counted: Counter[str] = Counter()
    for line in entry.splitlines():
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        if not estimate:
            continue
        name = (re.search(r'op_name="([^"]*)"', line) or [None, ""])[1]
        frozen = re.search(r"(gate|up|down)_proj/dot_general", name)
        counted["statistics" if "statistics" in name else "products" if frozen else "passes"] += int(
            estimate[1]
        )
    return dict(counted)


def measure(topology: str, tokens: int) -> dict[str, Any]:
    """Returns flops, bytes and estimated seconds of the compiled block with their minimum."""
    d_model, d_ff = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    complete, counted = (
        compiled(topology, tokens, None),
        compiled(topology, tokens, UNSCHEDULED).cost_analysis(),
    )
    clock = CHIPS[topology.split(":")[0]][2]
    return {
        "settings": {"topology": topology, "tokens": tokens},
        "flops": counted["flops"],
        "least_flops": PRODUCTS * 2.0 * tokens * d_model * d_ff,
        "bytes": counted["bytes accessed"],
        "least_bytes": 2.0 * (PRODUCTS * d_model * d_ff + tokens * (5 * d_model + 8 * d_ff)),
        "seconds": {kind: count / clock for kind, count in cycles(complete.as_text()).items()},
        "temporary": int(complete.memory_analysis().temp_size_in_bytes),
    }


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns flops, bytes and time of each case over the minimum."""
    found_rows = []
    for case, result in record["cases"].items():
        flops, bandwidth, _ = CHIPS[result["settings"]["topology"].split(":")[0]]
        for key, unit, scale in (("flops", "TF", 1e12), ("bytes", "GB", 1e9)):
            ours, least = result[key], result[f"least_{key}"]
            texts = f"{ours / scale:.3f} {unit}", f"{least / scale:.3f} {unit}"
            found_rows.append(Row(f"{key}, {case}", *texts, ours / least))
        limit = max(result["least_flops"] / flops, result["least_bytes"] / bandwidth)
        bound = max(result["flops"] / flops, result["bytes"] / bandwidth)
        found_rows.append(Row(f"roofline, {case}", _ms(bound), _ms(limit), bound / limit))
        total = sum(result["seconds"].values())
        found_rows.append(Row(f"compiler's estimate, {case}", _ms(total), _ms(limit), total / limit))
        for kind, seconds in sorted(result["seconds"].items()):
            found_rows.append(Row(f"of this {kind}, {case}", _ms(seconds), _ms(limit), seconds / limit))
    return found_rows


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), ours="XLA's program", other="limit")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tpu-path", default="", help="folder that libtpu was installed into")
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5p:2x2x1"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    if options.tpu_path:
        sys.path.append(options.tpu_path)
    record: dict[str, Any] = {"cases": {}}
    for topology in options.topologies:
        for tokens in options.tokens:
            case = f"{topology.split(':')[0]}, {tokens:,} tokens"
            record["cases"] |= save("tpu_ffn", case, measure(topology, tokens))["cases"]
    print(table(record))


if __name__ == "__main__":
    main()
