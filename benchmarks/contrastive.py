"""Collectives of the contrastive step, by the TPU compiler (no TPU is used), for docs/images.md.

    pip install '.[tpu,vision]' && python benchmarks/contrastive.py      # in a separate environment
    python benchmarks/contrastive.py --page                              # only the page, from the record

CLIP ViT-B/16, rank 8 on the feed-forward blocks of both towers, 128 pairs a chip, weights
replicated. Only the features of both towers may be gathered: every chip's negatives are the pairs
of all chips.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import CLIP_B16, write
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from markers import write_between
from methods import with_method

from nalora_jax.cli.planning.program import devices, placed
from nalora_jax.common import trees
from nalora_jax.common.axes import BATCH_AXES
from nalora_jax.config import LoRAConfig, LoRARule, MeshConfig, RunConfig, TrainConfig, VisionConfig
from nalora_jax.data.images.processor import ImageProcessor
from nalora_jax.layout import distributed
from nalora_jax.layout.figures import figures
from nalora_jax.layout.machines import topology
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.models.vision.dual import init_lora
from nalora_jax.train.dual import check_dual, dual_program, resolve_dual

RECORD = Path(__file__).parent / "results" / "contrastive.json"
PAGE = Path(__file__).parents[1] / "docs" / "images.md"
START, END = "<!-- table: benchmarks/contrastive.py -->", "<!-- end of table -->"
PAIRS, TOKENS, RANK = 128, 77, 8  # pairs per chip, tokens of a caption


def contrastive_step(
    config: RunConfig, base: DualConfig, mesh: Mesh, *, seq: int
) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jitted step of a run with ``vision.task`` "contrast" and its arguments' shapes.

    The shapes are placed on ``mesh``.

    Args:
      config: the run; its batch size is the number of pairs over all devices.
      base: architecture of the pair; images are squares of the size that its position embeddings
        cover.
      mesh: real or abstract devices.
      seq: tokens of a caption.
    """
    check_dual(config, base, mesh)
    spec = resolve_dual(config, base)
    shapes = base.param_shapes().items()
    weights = trees.unflatten(
        {path: jax.ShapeDtypeStruct(shape, config.compute.dtype) for path, shape in shapes}
    )
    lora = jax.eval_shape(lambda params: init_lora(base, spec, jax.random.key(0), params), weights)
    # The scale and the offset of grey levels do not affect the program, so the defaults are used.
    program = dual_program(config, base, spec, lora, mesh, ImageProcessor())
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    state, places = placed(jax.eval_shape(program.fresh, lora, key), mesh, distributed.STATE_RULES)
    params, _ = placed(weights, mesh, distributed.PARAM_RULES)
    by_rows = NamedSharding(mesh, P(None, BATCH_AXES))
    rows, side = (1, config.train.batch_size), base.image.image_size
    batch = {
        "pixels": jax.ShapeDtypeStruct(
            (*rows, side, side, base.image.channels), jnp.uint8, sharding=by_rows
        ),
        "tokens": jax.ShapeDtypeStruct((*rows, seq), jnp.int32, sharding=by_rows),
        "token_weights": jax.ShapeDtypeStruct((*rows, seq), jnp.float32, sharding=by_rows),
    }
    return program.compiled_step(places), (params, state, batch)


def compiled(name: str) -> dict[str, Any]:
    """Returns the bytes that a chip receives per step, by kind of collective and its use."""
    machine = topology(name)
    mesh = distributed.make_mesh(MeshConfig(data=machine.size), devices(machine))
    rows = PAIRS * machine.size
    config = RunConfig(
        lora=LoRAConfig(rules=(LoRARule("ffn", RANK),)),
        train=TrainConfig(batch_size=rows),
        vision=VisionConfig("contrast"),
    )
    config = with_method(config, "nalora", warmup=None)
    base = DualConfig.from_hf(CLIP_B16)
    measured = figures(*contrastive_step(config, base, mesh, seq=TOKENS))
    kinds: dict[str, list[Any]] = defaultdict(list)
    for collective in measured.collectives:
        kinds[collective.kind].append(collective)
    return {
        "topology": name,
        "chips": machine.size,
        "pairs": rows,
        "features": 2 * rows * base.image.features * 4,
        "memory": measured.memory,
        "kinds": {
            kind: {
                "times": sum(collective.times for collective in several),
                "received": sum(collective.total for collective in several),
                "largest": max(collective.received for collective in several),
            }
            for kind, several in sorted(kinds.items())
        },
    }


def table(record: dict[str, Any]) -> str:
    """Returns Markdown with a row for each kind."""
    lines = ["| collective | times a step | MB that a chip receives | largest, MB |", "|---|--:|--:|--:|"]
    for kind, result in record["kinds"].items():
        received, largest = result["received"] / 1e6, result["largest"] / 1e6
        lines.append(f"| {kind} | {result['times']:g} | {received:.2f} | {largest:.2f} |")
    megabytes, share = record["features"] / 1e6, 1 - 1 / record["chips"]
    where = f"{record['topology']}, {record['chips']} chips, {record['pairs']:,} pairs a step"
    features = (
        f"the features of both towers as a whole are {megabytes:.2f} MB (float32), of which a chip lacks"
    )
    head = f"{where}, {record['memory'] / 1e9:.1f} GB a chip; {features} {megabytes * share:.2f} MB."
    return head + "\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v6e:4x8")
    parser.add_argument("--page", action="store_true", help="nothing but the page")
    options = parser.parse_args()
    if not options.page:
        jax.config.update("jax_platforms", "cpu")  # the compiler of TPUs is used, no TPU
        write(RECORD, compiled(options.topology))
    write_between(PAGE, START, END, table(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
