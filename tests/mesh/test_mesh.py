"""Meshes, the specs of all arrays, rows of processes, and the options that a step is compiled
with."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common import trees
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.mesh import distributed, processes, sharding
from nalora_jax.mesh.distributed import compiler_options
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from tests.models.compared import COMPARED


def specs(shapes, rules):
    tree = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    mesh = distributed.make_mesh(MeshConfig(1, 4, 2))
    placed = trees.flatten(sharding.shardings(trees.unflatten(tree), mesh, rules))
    return {path: sharding.spec for path, sharding in placed.items()}


def test_axes_are_auto_and_minus_one_takes_what_is_left():
    mesh = distributed.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert distributed.make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(3, 1, 1), "8 device.*data 3 x fsdp 1 x tensor 1"),
        (MeshConfig(-1, 3, 1), "divides the 8 device"),
        (MeshConfig(-1, -1, 1), "at most one axis of -1"),
        (MeshConfig(1, -3, 1), "axis sizes of 1 or more"),
        (MeshConfig(run=3), r"--mesh.run: expected a divisor of the 8 device.*1, 2, 4, 8, found 3"),
    ],
)
def test_wrong_products_are_refused(config, message):
    with pytest.raises(NaloraError, match=message):
        distributed.make_mesh(config)


L, D, F, RANK, BOTH = 3, 64, 128, 8, ("tensor", "fsdp")
WEIGHTS = {
    "embed/embedding": ((256, D), P("tensor", "fsdp")),
    "lm_head/kernel": ((D, 256), P("fsdp", "tensor")),
    "layers/attn_norm/scale": ((L, D), P()),
    "layers/attn/q_proj/kernel": ((L, D, D), P(None, "fsdp", "tensor")),
    "layers/attn/q_proj/bias": ((L, D), P(None, "tensor")),
    "layers/attn/o_proj/kernel": ((L, D, D), P(None, "tensor", "fsdp")),
    # latents that all heads share, and the heads that follow from them
    "layers/attn/kv_a_proj/kernel": ((L, D, F), P(None, "fsdp")),
    "layers/attn/kv_b_proj/kernel": ((L, D, F), P(None, "fsdp", "tensor")),
    "layers/ffn/gate_proj/kernel": ((L, D, F), P(None, "fsdp", "tensor")),
    "layers/ffn/down_proj/kernel": ((L, F, D), P(None, "tensor", "fsdp")),
    # fsdp splits experts by their number if it divides it.
    "layers/group0/block0/ffn/down_proj/kernel": ((L, 8, F, D), P(None, "fsdp", "tensor")),
    "layers/group1/block0/ffn/down_proj/kernel": ((L, 2, F, D), P(None, None, "tensor", "fsdp")),
    "layers/ffn/router/kernel": ((L, D, 8), P(None, "fsdp")),
}
STATE = {
    "layers/attn/q_proj/a": ((L, D, RANK), P(None, "fsdp")),
    "layers/attn/q_proj/b": ((L, RANK, D), P(None, None, BOTH)),
    "layers/attn/q_a_proj/b": ((L, RANK, D), P()),
    "layers/attn/q_b_proj/b": ((L, RANK, D), P(None, None, BOTH)),
    "layers/ffn/down_proj/a": ((L, F, RANK), P(None, BOTH)),
    "layers/ffn/down_proj/b": ((L, RANK, D), P(None, None, "fsdp")),
    "layers/group0/block0/ffn/down_proj/a": ((L, 8, F, RANK), P(None, None, BOTH)),
    "gate/memory/mask/layers/ffn/slope": ((L, F), P(None, BOTH)),
    "gate/memory/step_scale/layers/ffn/occupancy": ((L, 4, F), P(None, None, BOTH)),
    "gate/memory/step_scale/layers/group0/block0/ffn/occupancy": (
        (L, 8, 4, F),
        P(None, None, None, BOTH),
    ),
    "gate/updates/layers/ffn": ((L,), P()),
    "gate_taps/layers/ffn/delta": ((L, F), P(None, BOTH)),
    "gate_taps/layers/ffn/tokens": ((L,), P()),
    "gate_mask/layers/ffn/mask": ((L, F), P(None, BOTH)),
    "step": ((), P()),
}
# Within a step adapters are split like the weight over tensor, and whole over fsdp.
WITHIN = {
    "layers/attn/q_proj/a": ((L, D, RANK), P()),
    "layers/attn/q_proj/b": ((L, RANK, D), P(None, None, "tensor")),
    "layers/ffn/down_proj/a": ((L, F, RANK), P(None, "tensor")),
    "layers/group0/block0/ffn/down_proj/b": ((L, 8, RANK, D), P()),
}


@pytest.mark.parametrize(
    ("rules", "table"),
    [
        (sharding.PARAM_RULES, WEIGHTS),
        (sharding.STATE_RULES, STATE),
        (sharding.STEP_RULES, WITHIN),
    ],
    ids=["weights", "state", "step"],
)
def test_specs_by_path(rules, table):
    expected = {path: spec for path, (_, spec) in table.items()}
    assert specs({path: shape for path, (shape, _) in table.items()}, rules) == expected


# Defaults of transformers that no model has: 96 heads do not divide the width.
SIZES = {"glm4_moe": {"head_dim": 128}, "deepseek_v2": {"num_experts_per_tok": 6}}


@pytest.mark.parametrize("family", COMPARED)
def test_every_weight_of_every_family_has_a_rule_and_every_large_one_is_split(family):
    raw = transformers.AutoConfig.for_model(family, **SIZES.get(family, {})).to_dict()
    shapes = param_shapes(ModelConfig.from_hf(raw))
    whole = [path for path, spec in specs(shapes, sharding.PARAM_RULES).items() if spec == P()]
    assert all(math.prod(shapes[path][1:]) < 2**16 for path in whole), whole  # values per layer


def test_an_array_without_a_rule_is_refused_by_name():
    with pytest.raises(NaloraError, match="vision/patch"):
        specs({"vision/patch": (8, 8)}, sharding.PARAM_RULES)


def test_a_dimension_that_does_not_divide_is_replicated_alone():
    mesh = distributed.make_mesh(MeshConfig(1, 2, 4))
    for spec, shape, fitted in (
        (P("fsdp", "tensor"), (3, 64, 126), P(None, "fsdp")),
        (P(("data", "fsdp"), None), (6, 5), P(("data", "fsdp"))),
        (P(BOTH), (12,), P("tensor")),
        (P(None, "tensor"), (128,), P()),
    ):
        assert sharding.fit_spec(spec, shape, mesh) == fitted


def test_heads_that_tensor_does_not_divide_are_refused_by_name():
    distributed.check_heads(4, n_heads=8, n_kv_heads=4)
    message = r"--mesh.tensor.*8 query heads and 2 key/value heads.*found 4; use 1 or 2"
    with pytest.raises(NaloraError, match=message):
        distributed.check_heads(4, n_heads=8, n_kv_heads=2)


# ---------------------------------------------------------------- processes

CLUSTER = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES", "TPU_ML_PLATFORM", "TPU_SKIP_MDS_QUERY", "MEGASCALE_NUM_SLICES",
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """A single machine's environment, and the arguments with which jax.distributed.initialize was
    called."""
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: seen.append(arguments))
    return seen


GKE = {
    "TPU_WORKER_HOSTNAMES": "a",
    "MEGASCALE_NUM_SLICES": "2",
    "TPU_SKIP_MDS_QUERY": "true",
}  # a host a slice
COORDINATED = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    "environment",
    [{"TPU_WORKER_HOSTNAMES": "a,b"}, GKE, {"SLURM_STEP_NUM_TASKS": "4"}, COORDINATED],
)
def test_many_hosts_are_recognised_from_the_environment(calls, monkeypatch, environment):
    assert processes.initialize_distributed() is False
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.initialize_distributed() is True
    (call,) = calls  # none for the single machine
    expected = (2, 1) if environment is COORDINATED else (None, None)
    assert (call["num_processes"], call["process_id"]) == expected
    assert call["heartbeat_timeout_seconds"] <= 60  # a lost peer is found within two minutes


def test_an_incomplete_environment_is_named(calls, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(
        NaloraError, match=r"JAX_NUM_PROCESSES: expected a whole number, found 'two'"
    ):
        processes.initialize_distributed()


@pytest.mark.parametrize("lead", [(), (3,)])
def test_rows_go_to_their_devices_in_any_order_of_devices(lead):
    devices = np.array(jax.devices())[[5, 0, 3, 6, 1, 7, 2, 4]].reshape(2, 2, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    tokens = np.random.default_rng(0).integers(0, 99, (*lead, 8, 6))
    placed = distributed.make_global_batch({"tokens": tokens}, mesh, rows_axis=len(lead))["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    np.testing.assert_array_equal(distributed.process_rows(mesh, 8), np.arange(8))
    expected = jax.device_put(tokens, NamedSharding(mesh, P(*[None] * len(lead), ("data", "fsdp"))))
    for one, other in zip(placed.addressable_shards, expected.addressable_shards, strict=True):
        assert one.device == other.device
        np.testing.assert_array_equal(one.data, other.data)


# ---------------------------------------------------------------- options of the compiler

FUSED = "xla_tpu_enable_async_collective_fusion"
OFFLOADED = "xla_tpu_enable_sparse_core_collective_offload_all_gather"


def options(platform: str, kind: str, fsdp: int) -> dict[str, object]:
    device = SimpleNamespace(platform=platform, device_kind=kind)
    return compiler_options(SimpleNamespace(shape={"fsdp": fsdp}, devices=np.array([device])))


def test_options_are_the_platform_s_and_for_gathers_where_there_are_any():
    assert (
        options("tpu", "TPU v6 lite", 1)
        == options("tpu", "TPU v9", 8)
        == options("cpu", "cpu", 8)
        == {}
    )
    whole, split = (options("gpu", "NVIDIA H100", fsdp) for fsdp in (1, 8))
    assert all(name.startswith("xla_gpu") for name in split)
    assert whole.items() < split.items()
    # Options come and go with JAX's versions, and one that XLA does not know is an error when a run
    # compiles its step.
    jax.jit(lambda: 0.0, compiler_options=split).lower().compile()
    assert sum("pipeline" in name for name in split) == 1
    # libtpu refuses fused collectives elsewhere, for wrong results and hangs; those have
    # SparseCores.
    assert FUSED in options("tpu", "TPU v5 lite", 8)
    for kind in ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e"):
        assert OFFLOADED in options("tpu", kind, 8)
        assert FUSED not in options("tpu", kind, 8)
