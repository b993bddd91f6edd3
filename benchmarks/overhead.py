"""Cost of the mechanisms: step time of NA-LoRA over LoRA, same shapes, pairs in one process.

    python benchmarks/overhead.py --dtype bfloat16 --pairs 40
    python benchmarks/overhead.py --method default           # the mechanism that is on by default

Both compiled steps alternate in random order. NA-LoRA computes statistics in every step and its
mechanisms act from the first step; LoRA computes no statistics. Prints the median ratio with its
95% bootstrap interval.
"""

from __future__ import annotations

import argparse

from common import alternate, random_tokens, save
from training import base_model, batch_of, parse, run_config, without_statistics


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--remat", default="auto")
    parser.add_argument("--method", choices=("nalora", "default"), default="nalora")
    return parser.parse_args()


def main() -> None:
    from nalora_jax.config import MeshConfig
    from nalora_jax.layout import distributed
    from nalora_jax.train.program import assemble

    chosen = options()
    shared = parse(["--dtype", chosen.dtype, "--layers", str(chosen.layers), "--remat", chosen.remat])
    mesh = distributed.make_mesh(MeshConfig())
    base, params = base_model(shared, mesh)
    batch = batch_of(random_tokens(1, chosen.batch, chosen.seq, base.vocab_size)[0], mesh)

    def stepper(method: str) -> object:
        assembly = assemble(run_config(shared, method=method), base, params, mesh)
        view = assembly.view(params)
        compiled = without_statistics(assembly.step) if method == "lora" else assembly.step
        held = [assembly.state]

        def step() -> object:
            held[0], metrics = compiled(view, held[0], batch)
            return metrics["loss"]

        return step

    pairs = alternate(stepper(chosen.method), stepper("lora"), pairs=chosen.pairs)
    case = f"{chosen.dtype} {chosen.batch}x{chosen.seq}" + (
        "" if chosen.method == "nalora" else f", {chosen.method}"
    )
    record = {"settings": vars(chosen), **pairs.to_dict()}
    save("overhead", case, record)
    ratio = record["ratio"]
    print(
        f"{case}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}, {ratio['pairs']} pairs)"
    )


if __name__ == "__main__":
    main()
