"""What checkpoints cost: time of a run's steps with one save in a hundred over that of the same steps without.

    python benchmarks/checkpoint_stall.py --every 100 --pairs 3

Writing is asynchronous: a save waits for the last one and copies the arrays to host memory, and the files are written
while steps go on. Blocks of --every steps alternate: one that begins with a save, one that does not, each ending when
its last step has. Prints the median ratio with its 95% bootstrap interval; it has to be at most 1.05.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import alternate, random_tokens, save
from tables import Row, at_most, requirements, spread
from training import base_model, batch_of, parse, run_config

TITLE = "What checkpoints cost: a save every 100 steps over none"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--every", type=int, default=100, help="steps of a block")
    parser.add_argument("--pairs", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    import jax

    from nalora_jax import distributed
    from nalora_jax.config import MeshConfig
    from nalora_jax.train.assembly import assemble
    from nalora_jax.train.checkpoint import Checkpointer

    given = options()
    shared = parse(["--dtype", given.dtype, "--layers", str(given.layers)])
    mesh = distributed.make_mesh(MeshConfig())
    base, params = base_model(shared, mesh)
    batch = batch_of(random_tokens(1, given.batch, given.seq, base.vocab_size)[0], mesh)
    assembly = assemble(run_config(shared, method="nalora"), base, params, mesh)
    view, held = assembly.view(params), [assembly.state]

    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpointer(Path(folder) / "c", fingerprint="f", config={}) as checkpoints,
    ):

        def block(saves: bool) -> object:
            if saves:
                checkpoints.save(int(held[0].step), held[0], {"row": 0})
            metrics: dict[str, Any] = {}
            for _ in range(given.every):
                held[0], metrics = assembly.step(view, held[0], batch)
            return jax.block_until_ready(metrics["loss"])

        pairs = alternate(lambda: block(True), lambda: block(False), pairs=given.pairs, warmup=1)
    case = f"{given.dtype} {given.batch}x{given.seq} every {given.every}"
    print(table(save("checkpoint_stall", case, {"settings": vars(given), **pairs.to_dict()})))


def rows(record: dict[str, Any]) -> list[Row]:
    """One row for each dtype and shape."""
    return [_row(case, found) for case, found in record["cases"].items()]


def _row(case: str, found: dict[str, Any]) -> Row:
    ratio = found["ratio"]
    ours, other = (spread(found["seconds"][name], 2, "s") for name in ("first", "second"))
    interval = f"{ratio['low']:.3f} to {ratio['high']:.3f}, {ratio['pairs']} pairs"
    return Row(f"{case}", ours, other, ratio["median"], at_most(1.05), interval)


def table(record: dict[str, Any]) -> str:
    """The section's Markdown."""
    return requirements(rows(record), ours="with a save", other="without")


if __name__ == "__main__":
    main()
