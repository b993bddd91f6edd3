"""One sharded NA-LoRA step on one page: mesh, rules, `jax.jit` with shardings, and rows.

The model, the channel statistics and the step come from `nalora_minimal.py`, a program for one
device, in which no line changes. Sharding is a property of the arrays, so this page only decides
where each array is. The compiler splits the matmuls and inserts the collectives. On eight devices
the updates equal the library's (tests/test_change_one_thing.py). It needs jax, optax and flax.

    export XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu
    python docs/sharded_minimal.py

Several processes each execute the same command, with the address of the first, their number and
their index. On a TPU pod the three arguments are not needed:

    export XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu
    python docs/sharded_minimal.py localhost:9911 2 0 &
    python docs/sharded_minimal.py localhost:9911 2 1
"""

import functools
import re
import sys

import jax
import nalora_minimal as page
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# ---------------------------------------------------------------- the mesh

# data    replicas of everything, each with its own rows: gradients of the adapters are summed
# fsdp    more rows, and the frozen weights are split: a layer is gathered before its use
# tensor  the channels of the feed-forward block and the heads: activations are summed
AXES = ("data", "fsdp", "tensor")


def make_mesh(shape=(2, 2, 2)):
    """Returns the mesh of all devices. Neighbors in the last axis are nearest to each other."""
    return Mesh(np.array(jax.devices()).reshape(shape), AXES)


# ---------------------------------------------------------------- the rules: path -> sharding

# The first pattern found in the path of an array decides. Frozen weights are [layers, in, out].
RULES = (
    (r"embed/embedding", P(None, "fsdp")),
    (r"norm/scale", P()),
    (
        r"(q|k|v|gate|up)_proj/kernel",
        P(None, "fsdp", "tensor"),
    ),  # splits what they produce
    (r"(o|down)_proj/kernel", P(None, "tensor", "fsdp")),  # splits what they consume
    # The small adapters, and the optimizer's moments, whose paths end as theirs.
    (r"(gate|up)_proj/a", P(None, "fsdp", None)),
    (r"(gate|up)_proj/b", P(None, None, "tensor")),
    (r"down_proj/a", P(None, "tensor", None)),
    (r"down_proj/b", P(None, None, "fsdp")),
    (r"averages/occupancy", P(None, None, "tensor")),  # [layers, regions, channels]
    (r"averages/", P(None, "tensor")),  # [layers, channels]
    (r"step|count", P()),
)
# Every process has whole rows: of the devices only those along "tensor" share them.
ROWS = P(("data", "fsdp"))


def path_of(keys):
    """Returns a path such as "layers/ffn/gate_proj/a" from the keys of jax.tree_util."""
    parts = (
        getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))
        for key in keys
    )
    return "/".join(map(str, parts))


def find_sharding(path, mesh):
    """Returns the sharding of an array. An array without a rule is an error: never a default."""
    for pattern, spec in RULES:
        if re.search(pattern, path):
            return NamedSharding(mesh, spec)
    raise ValueError(f"{path}: no rule for it")


def find_shardings(tree, mesh):
    """Returns a tree of shardings, one for each array."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, array: find_sharding(path_of(keys), mesh), tree
    )


# ---------------------------------------------------------------- arrays on the mesh


def place(tree, shardings):
    """Returns the tree on the mesh. Each device reads its own part only."""

    def part(array, sharding):
        array = np.asarray(array)
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index]
        )

    return jax.tree.map(part, tree, shardings)


def place_rows(rows, mesh):
    """Returns the global batch [B, T], of which ``rows`` are the part of this process."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, ROWS), rows)


# ---------------------------------------------------------------- the step


def make_step(params, lora, optimizer, config, mesh):
    """Returns the compiled step, the frozen weights and the state, both on the mesh.

    The state keeps its shardings from step to step, and its memory: it is donated. The loss is a
    mean over the global batch, so every process has the same.
    """
    state = page.init_state(lora, optimizer, config)
    frozen = find_shardings(params, mesh)
    moving = find_shardings(state, mesh)
    whole = NamedSharding(mesh, P())
    step = jax.jit(
        functools.partial(page.train_step, optimizer=optimizer, config=config),
        in_shardings=(frozen, moving, NamedSharding(mesh, ROWS)),
        out_shardings=(moving, whole),
        donate_argnums=1,
    )
    return step, place(params, frozen), place(state, moving)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        address, count, index = sys.argv[1:]
        jax.distributed.initialize(address, int(count), int(index))
    mesh = make_mesh((jax.device_count() // 4, 2, 2))
    config = page.Config()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(4e-3))
    params, lora = page.init(jax.random.key(0), config)
    step, params, state = make_step(params, lora, optimizer, config, mesh)
    for path, array in traverse_util.flatten_dict(params, sep="/").items():
        print(f"{path:30} {array.shape!s:16} {array.sharding.spec}")
    # Processes draw different rows: process p has rows p B / n to (p + 1) B / n of the batch.
    tokens = np.random.default_rng(1).integers(0, config.vocab, (8, 33), dtype=np.int32)
    first = jax.process_index() * 8 // jax.process_count()
    last = (jax.process_index() + 1) * 8 // jax.process_count()
    for i in range(20):
        state, loss = step(params, state, place_rows(tokens[first:last], mesh))
        print(f"step {i:3}: loss {loss:.5f}")
