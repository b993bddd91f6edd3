"""Cost of the mechanisms: step time of NA-LoRA over LoRA, same shapes, pairs in one process.

    python benchmarks/overhead.py --dtype bfloat16 --pairs 40
    python benchmarks/overhead.py --method default           # the mechanism that is on by default

Both compiled steps alternate in random order. NA-LoRA computes statistics in every step and its
mechanisms act from the first step; LoRA computes no statistics. Prints the median ratio with its
95% bootstrap interval.
"""

from __future__ import annotations

import argparse

from common import add_work, alternate, parser_of, random_tokens, ratio, save, summary
from training import base_model, batch_of, run_config, without_statistics


def options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_work(parser)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--remat", default="auto")
    parser.add_argument("--method", choices=("nalora", "default"), default="nalora")
    parser.set_defaults(dtype="bfloat16", model=None)
    return parser.parse_args()


def main() -> None:
    from nalora_jax.assembly.program import assemble
    from nalora_jax.config import MeshConfig
    from nalora_jax.mesh import distributed

    chosen = options()
    mesh = distributed.make_mesh(MeshConfig())
    base, params = base_model(chosen, mesh)
    batch = batch_of(
        random_tokens(1, chosen.batch, chosen.seq, base.vocab_size)[0], mesh
    )

    def stepper(method: str) -> object:
        assembly = assemble(run_config(chosen, method=method), base, params, mesh)
        view = assembly.view(params)
        compiled = (
            without_statistics(assembly.step) if method == "lora" else assembly.step
        )
        held = [assembly.state]

        def step() -> object:
            held[0], metrics = compiled(view, held[0], batch)
            return metrics["loss"]

        return step

    first, second = alternate(
        stepper(chosen.method), stepper("lora"), pairs=chosen.pairs
    )
    case = f"{chosen.dtype} {chosen.batch}x{chosen.seq}" + (
        "" if chosen.method == "nalora" else f", {chosen.method}"
    )
    interval = ratio(first, second)
    record = {
        "settings": vars(chosen),
        "first": summary(first),
        "second": summary(second),
    }
    save(
        "overhead",
        case,
        record | {"ratio": interval, "seconds": {"first": first, "second": second}},
    )
    print(
        "{case}: {median:.3f} ({low:.3f} to {high:.3f}, {pairs} pairs)".format(
            case=case, **interval
        )
    )


if __name__ == "__main__":
    main()
