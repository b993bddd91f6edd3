from __future__ import annotations

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import path as ocp_path

from nalora_jax.common import trees
from nalora_jax.config import LoRAConfig, LoRARule, MeshConfig, RunConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.mesh.distributed import make_mesh
from nalora_jax.mesh.sharding import STATE_RULES, shardings
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.output import CHECKPOINTS as FOLDER

CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed: int, width: int = 64) -> dict[str, Any]:
    """A small train state with every kind of leaf: float32, integers, bfloat16, an empty array,
    typed keys."""
    keys = jax.random.split(jax.random.key(seed), 4)
    adapter = {
        "a": jax.random.normal(keys[0], (3, width, 8)),
        "b": jax.random.normal(keys[1], (3, 8, 128)),
    }
    lora = {"layers": {"ffn": {"gate_proj": adapter}}}
    opt_state = jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), CHAIN.init(lora))
    gate = {
        "memory": {"mask": {"layers": {"ffn": {"slope": jax.random.uniform(keys[2], (3, 128))}}}},
        "half": jnp.full((4,), 1 / 3, jnp.bfloat16),
        "none": jnp.zeros((0, 4)),
    }
    rng = jax.random.split(keys[3], 2)
    return {"step": jnp.int32(seed), "lora": lora, "opt_state": opt_state, "gate": gate, "rng": rng}


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, a, b in zip(
        trees.flatten(left), jax.tree.leaves(left), jax.tree.leaves(right), strict=True
    ):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


DEFAULT = RunConfig()


def opened(
    folder, config: RunConfig = DEFAULT, fingerprint: str = "sha256:aa", **options
) -> Checkpointer:
    return Checkpointer(folder, fingerprint=fingerprint, config=config.to_dict(), **options)


def place(state, sizes):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    return jax.device_put(state, shardings(state, mesh, STATE_RULES))


def test_any_topology_restores_the_same_bits_where_it_wants_them(tmp_path):
    before, after = (2, 4, 1), (1, 2, 4)
    state, target = place(make_state(3), before), place(make_state(0), after)
    data = {"epoch": 1, "row": 48, "seed": 7, "sources": ["socialiqa"]}
    with opened(tmp_path, RunConfig(mesh=MeshConfig(*before))) as checkpoints:
        checkpoints.save(3, state, data)
    with opened(tmp_path, RunConfig(mesh=MeshConfig(*after))) as checkpoints:
        for like in (jax.eval_shape(lambda: make_state(0)), target):
            restored, position = checkpoints.restore("latest", like)
            assert_same_bits(restored, state)
            assert position == data
    for path, leaf in trees.flatten(restored).items():
        assert leaf.sharding == trees.flatten(target)[path].sharding or not leaf.size, path


def test_the_best_is_kept_beside_the_latest(tmp_path):
    """Of losses; below the default, accuracy, whose best is the largest."""
    with opened(tmp_path, keep=2, best_metric="loss", best_mode="min") as checkpoints:
        for step, loss in enumerate([3.0, 1.0, float("nan"), 2.0, 4.0], start=1):
            checkpoints.save(step, make_state(step), {"row": step}, {"accuracy": 0.5, "loss": loss})
        checkpoints.save(6, make_state(6), {"row": 6})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "5", "6"]
    with opened(tmp_path, best_metric="loss", best_mode="min") as checkpoints:
        assert checkpoints.metrics(2) == {"accuracy": 0.5, "loss": 1.0}
        for which, step in (("best", 2), ("latest", 6), (5, 5)):
            state, data = checkpoints.restore(which, make_state(0))
            assert (int(state["step"]), data) == (step, {"row": step})


X = {"x": np.ones(3, np.float32)}
CHANGED = RunConfig(
    mechanisms=("soft:power=2", "curvature_cap"), lora=LoRAConfig(rules=(LoRARule("ffn/gate_proj", 4),)), seed=1
)  # fmt: skip
OTHER = {"x": np.ones(4, np.float32), "more": np.ones(2)}
# What is opened, what is restored, and parts of the message.
REFUSED = {
    "another_base": (
        {"config": RunConfig(model="gemma-3-270m"), "fingerprint": "sha256:bb"},
        ("latest", X),
        ("smollm2-135m-instruct (sha256:aa)", "gemma-3-270m (sha256:bb)", "--model"),
    ),
    "settings_that_change_the_result": (
        {"config": CHANGED},
        ("latest", X),
        ("mechanisms.0 = 'curvature_cap'", "mechanisms.0 = 'soft:power=2'", "seed = 0", "seed = 1", "lora.rules"),
    ),
    "no_best": ({}, ("best", X), ("expected a best checkpoint, found steps [1]",)),
    "other_arrays": (
        {}, ("latest", OTHER), ("float32[3]", "float32[4]", "more absent", "written by another version"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "wanted", "parts"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_of_this_run_is_refused(tmp_path, changes, wanted, parts):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, X, {})
    with opened(tmp_path, **changes) as checkpoints, pytest.raises(NaloraError) as caught:
        checkpoints.restore(*wanted)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_settings_that_do_not_may_change(tmp_path):
    """Also a setting that was not there yet, and rules that are equal in another spelling."""
    config = RunConfig().to_dict() | {"mechanisms": ["curvature_cap:tau=0.1", "soft"]}
    del config["lora"]["dora"]
    with Checkpointer(tmp_path, fingerprint="sha256:aa", config=config) as checkpoints:
        checkpoints.save(1, X, {"row": 8})
    moved = RunConfig(
        model="elsewhere",
        output="b",
        resume=True,
        steps=500,
        mesh=MeshConfig(1, 1, -1),
        train=TrainConfig(log_every=1, eval_every=7, save_every=3, keep=9, patience=2),
        mechanisms=("curvature_cap", "soft:power=1.0"),
    )
    with opened(tmp_path, moved) as checkpoints:
        restored, data = checkpoints.restore("latest", jax.tree.map(jnp.zeros_like, X))
    assert_same_bits(restored, X)
    assert data == {"row": 8}


def test_a_setting_newer_than_the_run_counts_as_its_default(tmp_path):
    config = RunConfig().to_dict()
    del config["lora"]["dora"]
    with Checkpointer(tmp_path, fingerprint="sha256:aa", config=config) as checkpoints:
        checkpoints.save(1, X, {})
    changed = RunConfig(lora=LoRAConfig(dora=True))
    said = "lora.dora = False, found lora.dora = True"
    with opened(tmp_path, changed) as checkpoints, pytest.raises(NaloraError, match=said):
        checkpoints.restore("latest", X)


def test_an_imported_file_is_the_same_by_its_digest_and_not_by_its_path(tmp_path):
    with opened(tmp_path, RunConfig(imports=("loud.py@0123456789ab",))) as checkpoints:
        checkpoints.save(1, X, {})
    moved = RunConfig(imports=("/home/me@work/loud.py@0123456789ab",))
    with opened(tmp_path, moved) as checkpoints:
        restored, _ = checkpoints.restore("latest", jax.tree.map(jnp.zeros_like, X))
    assert_same_bits(restored, X)
    changed = RunConfig(imports=("loud.py@ba9876543210",))
    with opened(tmp_path, changed) as checkpoints, pytest.raises(NaloraError, match="imports"):
        checkpoints.restore("latest", X)


def test_an_interrupted_save_is_neither_seen_nor_kept(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
    scrap = tmp_path / f"2{ocp_path.atomicity_types.TMP_DIR_SUFFIX}"
    (scrap / "state").mkdir(parents=True)
    (scrap / "state" / "half").write_bytes(b"x" * 100)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, {"x": jnp.zeros(3)}, {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2"]


def saved_twice(folder):
    """Two checkpoints, steps 1 and 2, the second with the better metric."""
    with opened(folder, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(
                step, make_state(step, width=8), {"row": 8 * step}, {"accuracy": step / 4}
            )


def flip(path, position):
    content = bytearray(path.read_bytes())
    bit = position % (8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# Orbax's notes of when it wrote what; nothing is restored from them.
NOTES = ("commit_success.txt", "_CHECKPOINT_METADATA")


def test_one_flipped_bit_anywhere_in_the_newest_is_found_and_the_one_before_taken(tmp_path, caplog):
    """The newest is the best as well: of every second file, the best is restored."""
    saved_twice(tmp_path / "whole")
    files = [path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]
    names = [path.relative_to(tmp_path / "whole") for path in files]
    assert {name.parts[1] for name in names} == {"state", "data", "run", "metrics", *NOTES}
    positions = np.random.default_rng(0).integers(0, 2**31, len(names)).tolist()
    for number, (name, position) in enumerate(zip(names, positions, strict=True)):
        folder = tmp_path / str(number) / FOLDER
        shutil.copytree(tmp_path / "whole", folder)
        flip(folder / name, position)
        caplog.clear()
        with opened(folder) as checkpoints:
            restored, data = checkpoints.restore(
                ("latest", "best")[number % 2], make_state(0, width=8)
            )
            assert checkpoints.latest_step() == (2 if name.name in NOTES else 1), name
        step = int(restored["step"])
        assert_same_bits(restored, make_state(step, width=8))
        assert data == {"row": 8 * step}
        if name.name not in NOTES:
            assert step == 1, name
            assert "checkpoint 2 is damaged (" in caplog.text
            assert (tmp_path / str(number) / f"{FOLDER}.damaged" / "2").is_dir()


def test_without_a_whole_checkpoint_the_last_one_is_named_and_kept(tmp_path):
    saved_twice(tmp_path / FOLDER)
    for step in (1, 2):
        (tmp_path / FOLDER / str(step) / "data" / "metadata").unlink()
    message = r"1: .*found a damaged one \(data: metadata is missing\); start a new run"
    with opened(tmp_path / FOLDER) as checkpoints:
        with pytest.raises(NaloraError, match=message):
            checkpoints.restore("latest", make_state(0, width=8))
        assert checkpoints.latest_step() == 1
