"""Growth of compile time with depth: 30 layers over 2, the same step, without compilation cache.

python benchmarks/compile_time.py --rounds 3
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from common import random_tokens, save
from tables import Row, at_most, compared, requirements
from training import base_model, batch_of, parse, run_config

TITLE = "Compile time in depth"
SHORT = "Compiling"


def compile_seconds(layers: int, dtype: str) -> float:
    """Returns the seconds of lowering and compiling one NA-LoRA step."""
    import jax

    from nalora_jax import distributed
    from nalora_jax.config import MeshConfig
    from nalora_jax.train.assembly import assemble

    options = parse(["--dtype", dtype, "--layers", str(layers), "--method", "nalora"])
    mesh = distributed.make_mesh(MeshConfig())
    base, params = base_model(options, mesh)
    assembly = assemble(run_config(options), base, params, mesh)
    batch = batch_of(random_tokens(1, 8, 128, base.vocab_size)[0], mesh)
    view = assembly.view(params)
    jax.clear_caches()
    start = time.perf_counter()
    assembly.step.lower(view, assembly.state, batch).compile()
    return time.perf_counter() - start


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns one row per dtype; "flat" means within 15%."""
    return [
        compared(
            f"compile the step, {case}: 30 layers over 2",
            *(result["seconds"]["30"], result["seconds"]["2"]),
            at_most(1.15),
            digits=2,
            unit="s",
        )
        for case, result in record["cases"].items()
    ]


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), ours="30 layers", other="2 layers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    by_layers: dict[int, list[float]] = {2: [], 30: []}
    for _ in range(options.rounds):
        for layers, seconds in by_layers.items():
            seconds.append(compile_seconds(layers, options.dtype))
    record = {
        "settings": vars(options),
        "seconds": {str(layers): seconds for layers, seconds in by_layers.items()},
    }
    print(table(save("compile_time", options.dtype, record)))


if __name__ == "__main__":
    main()
