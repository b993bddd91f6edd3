"""What the mechanisms cost: step time of NA-LoRA over that of LoRA, same shapes, pairs in one process.

    python benchmarks/overhead.py --dtype bfloat16 --pairs 40

Both compiled steps alternate in random order, statistics are taken in every step, mask and step scale act from the
first one. Prints the median ratio with its 95% bootstrap interval; writes results/overhead_<dtype>_<batch>x<seq>.json.
"""

from __future__ import annotations

import argparse

import numpy as np
from common import alternate, random_tokens, write
from training import base_model, batch_of, parse, run_config


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--remat", default="auto")
    return parser.parse_args()


def main() -> None:
    from nalora_jax import mesh as layout
    from nalora_jax.assembly import assemble
    from nalora_jax.config import MeshConfig

    given = options()
    shared = parse(["--dtype", given.dtype, "--layers", str(given.layers), "--remat", given.remat])
    mesh = layout.make_mesh(MeshConfig())
    base, params = base_model(shared, mesh)
    batch = batch_of(random_tokens(1, given.batch, given.seq, base.vocab_size)[0], mesh)

    def stepper(method: str) -> object:
        assembly = assemble(run_config(shared, method=method), base, params, mesh)
        view = assembly.view(params)
        held = [assembly.state]

        def step() -> object:
            held[0], metrics = assembly.step(view, held[0], batch)
            return metrics["loss"]

        return step

    pairs = alternate(stepper("nalora"), stepper("lora"), pairs=given.pairs)
    found = pairs.to_dict()
    ratio = found["ratio"]
    print(
        f"NA-LoRA / LoRA, {given.dtype} {given.batch}x{given.seq}: {ratio['median']:.3f} "
        f"({ratio['low']:.3f} to {ratio['high']:.3f}, {ratio['pairs']} pairs); "
        f"median step {np.median(pairs.first):.3f} s over {np.median(pairs.second):.3f} s"
    )
    write(f"overhead_{given.dtype}_{given.batch}x{given.seq}", {"settings": vars(given), **found})


if __name__ == "__main__":
    main()
