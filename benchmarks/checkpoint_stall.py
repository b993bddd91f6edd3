"""Cost of checkpoints: the time that a save adds, as a share of the steps between two saves.

    python benchmarks/checkpoint_stall.py                     # a save every 100 steps
    python benchmarks/checkpoint_stall.py --every 100 --steps 30 --pairs 5

Writing is asynchronous: a save waits for the previous one and copies the arrays to host memory, and
the files are written while training continues. Blocks of --steps steps with and without an initial
save alternate; each ends when its last step and its write have finished. The additional time of a
block with a save, over --every steps, is the share; it must be at most 5%. The duration of the call
that saves, during which no step runs, is printed as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import alternate, random_tokens, save
from tables import Row, at_most, requirements, spread
from training import base_model, batch_of, parse, run_config

TITLE = "What checkpoints cost: a save every 100 steps over none"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--every", type=int, default=100, help="steps between two saves")
    parser.add_argument("--steps", type=int, default=30, help="steps of a timed block")
    parser.add_argument("--pairs", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    import jax

    from nalora_jax.config import MeshConfig
    from nalora_jax.layout import distributed
    from nalora_jax.train.assembly import assemble
    from nalora_jax.train.checkpoint import Checkpointer

    chosen = options()
    shared = parse(["--dtype", chosen.dtype, "--layers", str(chosen.layers)])
    mesh = distributed.make_mesh(MeshConfig())
    base, params = base_model(shared, mesh)
    batch = batch_of(random_tokens(1, chosen.batch, chosen.seq, base.vocab_size)[0], mesh)
    assembly = assemble(run_config(shared, method="nalora"), base, params, mesh)
    view, held, calls = assembly.view(params), [assembly.state], []

    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpointer(Path(folder) / "c", fingerprint="f", config={}) as checkpoints,
    ):

        def block(saves: bool) -> object:
            if saves:
                began = time.perf_counter()
                checkpoints.save(int(held[0].step), held[0], {"row": 0})
                calls.append(time.perf_counter() - began)
            metrics: dict[str, Any] = {}
            for _ in range(chosen.steps):
                held[0], metrics = assembly.step(view, held[0], batch)
            jax.block_until_ready(metrics["loss"])
            checkpoints.wait()
            return metrics["loss"]

        pairs = alternate(lambda: block(True), lambda: block(False), pairs=chosen.pairs, warmup=1)
    case = f"{chosen.dtype} {chosen.batch}x{chosen.seq} every {chosen.every}"
    result = {"settings": vars(chosen), **pairs.to_dict(), "calls": calls[1:]}  # the first is the warm-up's
    print(table(save("checkpoint_stall", case, result)))


def share(result: dict[str, Any]) -> float:
    """Returns the median seconds that a save adds, over the seconds between two saves."""
    seconds, settings = result["seconds"], result["settings"]
    added = statistics.median(x - y for x, y in zip(seconds["first"], seconds["second"], strict=True))
    step = statistics.median(seconds["second"]) / settings["steps"]
    return added / (settings["every"] * step)


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns one row per dtype and shape."""
    return [_row(case, result) for case, result in record["cases"].items()]


def _row(case: str, result: dict[str, Any]) -> Row:
    steps = result["settings"]["steps"]
    with_save, without = (spread(result["seconds"][name], 2, "s") for name in ("first", "second"))
    inside = (
        f"{len(result['calls'])} pairs of {steps} steps, {spread(result['calls'], 3, 's')} within the call"
    )
    return Row(f"{case}", with_save, without, 1.0 + share(result), at_most(1.05), inside)


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), ours="with a save", other="without")


if __name__ == "__main__":
    main()
