"""Two real processes over loopback with a shared folder and a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny
from tests.emulator import emulator, variables

WORKER = """
import sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.output import CHECKPOINTS, check_shared, open_output

assert distributed.initialize_distributed() and jax.process_count() == 2
mesh = distributed.make_mesh(MeshConfig(data=-1, fsdp=2))
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}

# As on a TPU's torus, whose mesh does not go through the processes one after the other.
order = np.array(jax.devices())[[0, 2, 3, 1]].reshape(mesh.devices.shape)
torus = Mesh(order, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
data = np.arange(24, dtype=np.float32).reshape(8, 3)
rows = distributed.process_rows(torus, 8)
assert rows.tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]][jax.process_index()]
batch = distributed.make_global_batch({"x": data[rows]}, torus)
np.testing.assert_array_equal(distributed.fetch(batch["x"]), data)

rows = distributed.process_rows(mesh, 8)
assert len(rows) == 4
batch = distributed.make_global_batch({"x": data[rows]}, mesh)
assert batch["x"].shape == (8, 3)
total = jax.jit(lambda x: (x * jnp.arange(8.0)[:, None]).sum())(batch["x"])
assert float(total) == (data * np.arange(8)[:, None]).sum()

state = {"layers": {"ffn": {"gate_proj": {"a": np.arange(48, dtype=np.float32).reshape(3, 8, 2)}}}, "step": np.int32(1)}
where = distributed.shardings(state, mesh, distributed.STATE_RULES)
placed = jax.tree.map(lambda x, at: jax.make_array_from_callback(x.shape, at, lambda index: x[index]), state, where)
if jax.process_index() == 0:
    time.sleep(0.5)  # the other one must wait for the verdict before it writes
with (
    open_output(sys.argv[1], resume=False) as output,
    Checkpointer(output.folder / CHECKPOINTS, fingerprint="f", config={}) as checkpoints,
):
    checkpoints.save(1, placed, {"row": 3}, {"accuracy": 0.5})
    checkpoints.save(2, placed, {"row": 4})
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (2, 1)
    restored, position = checkpoints.restore("best", placed)
assert position == {"row": 3}
for before, after in zip(jax.tree.leaves(placed), jax.tree.leaves(restored)):
    assert before.sharding == after.sharding
    for one, other in zip(before.addressable_shards, after.addressable_shards):
        np.testing.assert_array_equal(one.data, other.data)

try:
    with open_output(sys.argv[1], resume=False):
        pass
except NaloraError as error:
    print("DONE", error)

mesh = distributed.make_mesh(MeshConfig(data=1, fsdp=-1))  # each process holds a part of the state
where = distributed.shardings(state, mesh, distributed.STATE_RULES)

def times(factor):
    values = lambda x, at: jax.make_array_from_callback(x.shape, at, lambda index: factor * x[index])
    return jax.tree.map(values, state, where)

with open_output("gs://bucket/run", resume=False) as output:
    assert not output.resumes
    with Checkpointer(output.checkpoints, fingerprint="f", config={}, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, times(step), {"row": step})
    if jax.process_index() == 0:
        (output.folder / "adapter").mkdir()
        (output.folder / "adapter" / "weights").write_text("trained")
    output.share("adapter")
    assert (output.folder / "adapter" / "weights").read_text() == "trained"
with open_output("gs://bucket/run", resume="auto") as output:
    assert output.resumes
    assert (output.folder / "adapter" / "weights").read_text() == "trained"
    with Checkpointer(output.checkpoints, fingerprint="f", config={}) as checkpoints:
        restored, position = checkpoints.restore("latest", times(1))
assert position == {"row": 2}
for before, after in zip(jax.tree.leaves(times(2)), jax.tree.leaves(restored)):
    for one, other in zip(before.addressable_shards, after.addressable_shards):
        np.testing.assert_array_equal(one.data, other.data)

for name in ("shared", f"own-{jax.process_index()}"):
    folder = Path(sys.argv[1]).parent / name
    folder.mkdir(exist_ok=True)
    try:
        check_shared(folder, within=1.0)
        print(name, "seen", list(folder.iterdir()))
    except NaloraError as error:
        print(name, error, list(folder.iterdir()))
"""


def test_two_processes_share_a_batch_checkpoints_a_bucket_and_a_verdict_on_folders(
    tmp_path: Path, two_processes: Any
) -> None:
    with emulator(tmp_path / "objects") as (held, address):
        cache = tiny.new_cache(tmp_path / "cache")
        command = ["-c", WORKER, str(tmp_path / "run")]
        finished = two_processes(command, devices=2, NALORA_CACHE=cache, **variables(address))
    for (status, out, error), said in zip(finished, ("--output", "process 0"), strict=True):
        assert status == 0, error
        assert f"DONE {said}" in out
        assert "shared seen []" in out
        assert "that all 2 processes share, found one that process 1 does not see; name a folder on" in out
        assert out.rstrip().endswith("[]")
    names = {name.removeprefix("run/") for name in held.objects["bucket"]}
    assert {"adapter/weights", "checkpoints/2/commit_success.txt"} <= names
    assert "checkpoints/2/state/digests.json" in names
    assert {f"checkpoints/2/state/ocdbt.process_{i}/manifest.ocdbt" for i in (0, 1)} <= names
    # One checkpoint is kept, and no lock or mark is left.
    assert not [name for name in names if name.startswith(("checkpoints/1/", ".", "remote.lock"))]
