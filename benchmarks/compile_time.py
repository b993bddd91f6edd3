"""How compile time grows with depth: 30 layers over 2, the same step, without any compilation cache.

python benchmarks/compile_time.py --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
from common import random_tokens, summary, write
from training import base_model, batch_of, parse, run_config


def compile_seconds(layers: int, dtype: str) -> float:
    """Lowering and compiling one NA-LoRA step."""
    from nalora_jax import mesh as layout
    from nalora_jax.assembly import assemble
    from nalora_jax.config import MeshConfig

    options = parse(["--dtype", dtype, "--layers", str(layers), "--method", "nalora"])
    mesh = layout.make_mesh(MeshConfig())
    base, params = base_model(options, mesh)
    assembly = assemble(run_config(options), base, params, mesh)
    batch = batch_of(random_tokens(1, 8, 128, base.vocab_size)[0], mesh)
    view = assembly.view(params)
    jax.clear_caches()
    start = time.perf_counter()
    assembly.step.lower(view, assembly.state, batch).compile()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[int, list[float]] = {2: [], 30: []}
    for _ in range(options.rounds):
        for layers, seconds in found.items():
            seconds.append(compile_seconds(layers, options.dtype))
    ratio = statistics.median(found[30]) / statistics.median(found[2])
    print(
        f"compile time, 30 layers / 2 layers, {options.dtype}: {ratio:.2f}", {k: summary(v) for k, v in found.items()}
    )
    write(f"compile_time_{options.dtype}", {"ratio": ratio, "seconds": {str(k): v for k, v in found.items()}})


if __name__ == "__main__":
    main()
