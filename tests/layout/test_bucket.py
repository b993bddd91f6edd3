"""Two real processes whose output is a bucket, as an emulator of Google's store has it on this machine."""

from __future__ import annotations

from dataclasses import replace

from nalora_jax.config import DebugConfig, MeshConfig
from tests import tiny
from tests.emulator import emulator, put, variables

WORKER = """
import sys
import jax, numpy as np
from nalora_jax.layout import distributed
from nalora_jax.config import DebugConfig, MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.output import open_output

assert distributed.initialize_distributed() and jax.process_count() == 2
first = jax.process_index() == 0
mesh = distributed.make_mesh(MeshConfig(data=1, fsdp=-1))
state = {"layers": {"ffn": {"gate_proj": {"a": np.arange(48, dtype=np.float32).reshape(3, 8, 2)}}}, "step": np.int32(1)}
where = distributed.shardings(state, mesh, distributed.STATE_RULES)

def placed(times):
    one = lambda x, at: jax.make_array_from_callback(x.shape, at, lambda index: times * x[index])
    return jax.tree.map(one, state, where)

def opened(resume):
    return open_output("gs://bucket/run", resume)

with opened(False) as output:
    assert not output.resumes
    with Checkpointer(output.checkpoints, fingerprint="f", config={}, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, placed(step), {"row": step})
    if first:
        (output.folder / "adapter").mkdir()
        (output.folder / "adapter" / "weights").write_text("trained")
    output.share("adapter")
    assert (output.folder / "adapter" / "weights").read_text() == "trained"
with opened("auto") as output:
    assert output.resumes
    assert (output.folder / "adapter" / "weights").read_text() == "trained"
    with Checkpointer(output.checkpoints, fingerprint="f", config={}) as checkpoints:
        restored, position = checkpoints.restore("latest", placed(1))
assert position == {"row": 2}
for before, after in zip(jax.tree.leaves(placed(2)), jax.tree.leaves(restored)):
    for one, other in zip(before.addressable_shards, after.addressable_shards):
        np.testing.assert_array_equal(one.data, other.data)
try:
    with opened(False):
        pass
except NaloraError as error:
    print("DONE", error)
"""


def test_two_processes_write_one_run_into_a_bucket_and_go_on_from_it(two_processes, tmp_path):
    with emulator(tmp_path) as (held, address):
        cache = tiny.new_cache(tmp_path / "cache")
        finished = two_processes(["-c", WORKER], devices=2, NALORA_CACHE=cache, **variables(address))
    for (status, out, error), said in zip(
        finished, ("found gs://bucket/run, which holds", "process 0"), strict=True
    ):
        assert status == 0, error
        assert "DONE" in out
        assert said in out
    names = {name.removeprefix("run/") for name in held.objects["bucket"]}
    assert {
        "adapter/weights",
        "checkpoints/2/commit_success.txt",
        "checkpoints/2/state/digests.json",
    } <= names
    assert {f"checkpoints/2/state/ocdbt.process_{i}/manifest.ocdbt" for i in (0, 1)} <= names
    # One checkpoint is kept, and neither locks nor marks are left.
    assert not [name for name in names if name.startswith(("checkpoints/1/", ".", "remote.lock"))]


def test_two_processes_train_a_model_from_a_bucket_on_data_from_a_bucket(tmp_path):
    config = tiny.make_config(tmp_path, steps=2, mesh=MeshConfig(1, -1, 1), mechanisms=())
    data = replace(config.data, dataset="gs://bucket/data/questions.jsonl")
    config = replace(config, model="gs://bucket/llama", data=data, debug=DebugConfig(profile="2:1"))
    settings = tiny.write_settings(config, tmp_path / "settings.py")
    with emulator(tmp_path / "objects") as (_, address):
        for name, path in [("data/questions.jsonl", tmp_path / "questions.jsonl")] + [
            (f"llama/{path.name}", path) for path in (tmp_path / "model").iterdir()
        ]:
            put(address, name, path.read_bytes())
        command = ["-m", "nalora_jax", "train", "--config", str(settings)]
        cache = tiny.new_cache(tmp_path / "cache")
        for status, _, error in tiny.finish(
            tiny.start(command, count=2, NALORA_CACHE=cache, **variables(address))
        ):
            assert status == 0, error
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "cache" / "buckets").rglob("*.safetensors"))
    traces = {
        path.name for path in (tmp_path / "run" / "profile" / "plugins" / "profile" / "steps_2-2").iterdir()
    }
    assert traces == {"process_0.xplane.pb", "process_1.xplane.pb"}


def test_two_processes_sweep_into_a_bucket_and_resume(tmp_path):
    """Recorded options and settings are read from the bucket; each run is resumed from its checkpoint there."""
    config = tiny.make_config(tmp_path, steps=2, mesh=MeshConfig(run=2, fsdp=1), mechanisms=())
    settings = str(tiny.write_settings(config, tmp_path / "settings.py"))
    url = "gs://bucket/rates"
    started = ["--config", settings, "--sweep", "seed=0,1", "--output", url]
    with emulator(tmp_path / "objects") as (held, address):
        for number, options in enumerate((started, ["--resume", url, "--steps", "3"])):
            command = ["-m", "nalora_jax", "train", *options]
            cache = tiny.new_cache(tmp_path / f"cache{number}")
            finished = tiny.finish(tiny.start(command, count=2, NALORA_CACHE=cache, **variables(address)))
            for status, _, error in finished:
                assert status == 0, error
            assert ("step 1/" in finished[0][1]) == (not number)
            names = {name.removeprefix("rates/") for name in held.objects["bucket"]}
            assert {"sweep.json", "comparison.html"} <= names
            for seed in (0, 1):
                files = {
                    "adapter/adapter_model.safetensors",
                    "report.html",
                    f"checkpoints/{2 + number}/commit_success.txt",
                }
                assert {f"seed-{seed}/{file}" for file in files} <= names
