"""Memory of a training step on a long row, whole on one device and split over eight (--mesh.context).

    python benchmarks/long_rows.py
    python benchmarks/long_rows.py --seq 16384 --remat full

Both programs train adapters of SmolLM2-135M on one row; the figure is the temporary memory of a
device in the compiled program. The programs are not executed: the figure depends on shapes and
the compiler only.
"""

from __future__ import annotations

import argparse
import os

from common import ARCHITECTURES


def temporary_bytes(context: int, options: argparse.Namespace) -> int:
    """Returns the temporary memory of one of ``context`` devices."""
    import jax

    from nalora_jax.cli.planning.program import step_and_arguments
    from nalora_jax.config import ComputeConfig, DataConfig, MeshConfig, RunConfig, TrainConfig
    from nalora_jax.layout import distributed
    from nalora_jax.models.config import ModelConfig

    config = RunConfig(
        steps=100,
        mesh=MeshConfig(data=1, fsdp=1, tensor=1, context=context),
        train=TrainConfig(batch_size=1),
        data=DataConfig(max_length=options.seq),
        compute=ComputeConfig(dtype=options.dtype, remat=options.remat),
    )
    mesh = distributed.make_mesh(config.mesh, jax.devices()[:context])
    step, arguments = step_and_arguments(config, ModelConfig.from_hf(ARCHITECTURES["smollm2"]), mesh)
    return int(step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="auto")
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    whole, split = (temporary_bytes(context, options) for context in (1, options.devices))
    print(
        f"{options.seq} tokens: {whole / 1e6:,.0f} MB on one device, {split / 1e6:,.0f} MB on each of",
        end=" ",
    )
    print(f"{options.devices} devices, {split / whole:.3f} of it")


if __name__ == "__main__":
    main()
