"""Cost of the mechanisms and memory of an 8B model on a TPU, by the real compiler.

    pip install --no-deps --target tpu libtpu==0.0.42.1         # the version that `jax[tpu]` asks for
    python benchmarks/tpu.py --tpu-path tpu

No TPU is used. Compiles the training step for v5e and v5p topologies with Llama-3.1-8B shapes, rank
8 on gate and up, FSDP over all chips, rematerialization per layer, bfloat16:

- flops and bytes accessed of NA-LoRA over LoRA: XLA counts a loop's body once, so programs of two
  small unrolled depths are compiled and the model's figure is extrapolated; for the same reason the
  loss is one chunk. Three effects of the compiler's schedule are switched off: moves between a
  chip's two memories, each counted three times; matmuls in a loop over the shards of a kernel,
  counted once; and gathers overlapped with a matmul, counted with all their buffers. They are a
  third to a half of the bytes and change by 10% with any change of the program, in both directions.
  The figures "as scheduled" include them;
- temporary memory per chip of both complete programs (32 layers, scanned), with the chip's memory.

Topologies with few chips are enough for the ratios, which do not depend on the number of chips that
share the batch.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

from common import save
from methods import with_method
from tables import Row, at_most, requirements
from training import without_statistics

TITLE = "On TPU topologies"
SHORT = "NA-LoRA over LoRA"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
CHIP_BYTES = {"v5e": 16e9, "v5p": 95e9, "v6e": 32e9}
WHAT = ("costs", "scheduled", "memory")
# Reads and writes of each fusion, once, and no others.
UNSCHEDULED = {
    "xla_msa_enable": "false",
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_tpu_enable_async_collective_fusion": "false",
}


def topology_mesh(name: str) -> Any:
    """Returns a mesh of the topology's abstract chips, all of them on the axis "fsdp"."""
    from jax.experimental import topologies

    from nalora_jax.config import MeshConfig
    from nalora_jax.layout import distributed

    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return distributed.make_mesh(MeshConfig(data=1, fsdp=-1), list(devices))


def program(
    method: str,
    layers: int,
    topology: str,
    rows: int,
    seq: int,
    *,
    unroll: bool,
    compiler: dict[str, str] | None = None,
) -> Any:
    """Returns the compiled training step."""
    from flax import linen as nn

    scan = partial(nn.scan, unroll=layers) if unroll else nn.scan
    with mock.patch.object(nn, "scan", scan):
        step, arguments = _step(
            method, layers, topology_mesh(topology), rows, seq, chunk=rows * seq if unroll else 0
        )
        return step.lower(*arguments).compile(compiler_options=compiler)


def _step(
    method: str, layers: int, mesh: Any, rows: int, seq: int, *, chunk: int
) -> tuple[Any, tuple[Any, ...]]:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from nalora_jax import config as c
    from nalora_jax.common import trees
    from nalora_jax.common.axes import BATCH_AXES
    from nalora_jax.layout import distributed
    from nalora_jax.models.adapters import init_lora
    from nalora_jax.models.config import ModelConfig
    from nalora_jax.models.stacks import param_shapes, projection_shapes
    from nalora_jax.models.targets import resolve
    from nalora_jax.train.decoder_program import decoder_program

    config = c.RunConfig(
        steps=1000,
        lora=c.LoRAConfig(rules=(c.LoRARule("ffn/(gate|up)_proj", 8),)),
        compute=c.ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=chunk),
    )
    config = with_method(config, method)
    base = replace(ModelConfig.from_hf({**LLAMA, "num_hidden_layers": layers}))
    spec = resolve(config.lora, projection_shapes(base), base.n_layers)
    program = decoder_program(config, base, spec, mesh)

    def fresh() -> Any:
        key = jax.random.key(0)
        return program.fresh(init_lora(base, spec, key), jax.random.key_data(key))

    def described(tree: Any, rules: Any) -> tuple[Any, Any]:
        places = distributed.shardings(tree, mesh, rules)
        shapes = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
        )
        return shapes, places

    shapes = {path: jax.ShapeDtypeStruct(shape, "bfloat16") for path, shape in param_shapes(base).items()}
    params, _ = described(trees.unflatten(shapes), distributed.PARAM_RULES)
    state, places = described(jax.eval_shape(fresh), distributed.STATE_RULES)
    by_rows = NamedSharding(mesh, P(None, BATCH_AXES))
    batch = {
        name: jax.ShapeDtypeStruct((1, rows, seq), np.dtype(dtype), sharding=by_rows)
        for name, dtype in {
            "tokens": "int32",
            "targets": "int32",
            "loss_weights": "float32",
            "segment_ids": "int32",
            "positions": "int32",
        }.items()
    }
    compiled = program.compiled_step(places)
    return without_statistics(compiled) if method == "lora" else compiled, (params, state, batch)


def costs(
    topology: str, rows: int, seq: int, depths: tuple[int, int], compiler: dict[str, str] | None
) -> dict[str, dict[str, float]]:
    """Returns the model's flops and bytes accessed per chip, by method."""
    measured = {}
    for method in ("lora", "nalora"):
        few, more = (
            program(method, layers, topology, rows, seq, unroll=True, compiler=compiler).cost_analysis()
            for layers in depths
        )
        layers = LLAMA["num_hidden_layers"]
        per_layer = {
            key: (more[key] - few[key]) / (depths[1] - depths[0]) for key in ("flops", "bytes accessed")
        }
        measured[method] = {
            key: few[key] + (layers - depths[0]) * value for key, value in per_layer.items()
        }
    return measured


def memory(topology: str, rows: int, seq: int, layers: int) -> dict[str, dict[str, int]]:
    """Returns the bytes per chip of the complete program, by method."""
    measured = {}
    for method in ("lora", "nalora"):
        analysis = program(method, layers, topology, rows, seq, unroll=False).memory_analysis()
        measured[method] = {
            "arguments": int(analysis.argument_size_in_bytes),
            "temporary": int(analysis.temp_size_in_bytes),
        }
    return measured


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns costs of NA-LoRA over LoRA, and memory with the chip's capacity."""
    found_rows = []
    for case, result in record["cases"].items():
        ours, other = result["nalora"], result["lora"]
        if "flops" in ours:
            for key, most, unit, scale in (
                ("flops", 1.01, "TF", 1e12),
                ("bytes accessed", 1.02, "GB", 1e9),
            ):
                texts = [f"{side[key] / scale:,.2f} {unit}" for side in (ours, other)]
                limit = None if result["settings"].get("scheduled") else at_most(most)
                found_rows.append(Row(f"{key} per chip, {case}", *texts, ours[key] / other[key], limit))
            continue
        texts = [f"{side['temporary'] / 1e9:.2f} GB" for side in (ours, other)]
        ratio = ours["temporary"] / other["temporary"]
        found_rows.append(Row(f"temporary memory per chip, {case}", *texts, ratio, at_most(1.01)))
        chip = CHIP_BYTES[result["settings"]["topology"].split(":")[0]]
        total = ours["arguments"] + ours["temporary"]
        what = f"all memory of NA-LoRA per chip, {case}, over the chip's"
        found_rows.append(
            Row(what, f"{total / 1e9:.2f} GB", f"{chip / 1e9:.0f} GB", total / chip, at_most(1.0))
        )
    return found_rows


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), ours="NA-LoRA", other="LoRA")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tpu-path", default="", help="folder that libtpu was installed into")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument(
        "--small", nargs="+", default=["v5e:4x4", "v5p:2x2x4"], help="topologies of the costs"
    )
    parser.add_argument("--large", nargs="+", default=["v5e:16x16"], help="topologies of the memory")
    parser.add_argument("--quick", action="store_true", help="few layers")
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    if options.tpu_path:
        sys.path.append(options.tpu_path)
    record: dict[str, Any] = {"cases": {}}
    for topology, what in itertools.product(options.small, ("costs", "scheduled")):
        if what not in options.what:
            continue
        scheduled = what == "scheduled"
        result = costs(
            topology, topology_mesh(topology).size, 2048, (1, 2), None if scheduled else UNSCHEDULED
        )
        case = f"{topology}, one sequence of 2,048 tokens a chip" + (", as scheduled" if scheduled else "")
        settings = {"topology": topology, "scheduled": scheduled}
        record["cases"] |= save("tpu", case, {"settings": settings, **result})["cases"]
    for topology in options.large if "memory" in options.what else ():
        chips = topology_mesh(topology).size
        layers = 4 if options.quick else LLAMA["num_hidden_layers"]
        result = memory(topology, chips, 4096, layers)
        case = f"Llama-3.1-8B, {topology}, one sequence of 4,096 tokens a chip"
        record["cases"] |= save(
            "tpu", case, {"settings": {"topology": topology, "layers": layers}, **result}
        )["cases"]
    print(table(record))


if __name__ == "__main__":
    main()
